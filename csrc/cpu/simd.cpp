// Run-time choice of the instruction set; see quietstar/simd.h.
#include "quietstar/simd.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>

namespace quietstar {
namespace {

const char* const kNames[] = {"generic", "avx2", "avx512"};

Simd best() {
#ifdef QUIETSTAR_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return Simd::avx512;
  }
  // Every processor with AVX2 has F16C, which compilers cannot all ask about by name.
  if (avx2) return Simd::avx2;
#endif
  return Simd::generic;
}

std::atomic<Simd>& chosen() {
  static std::atomic<Simd> value{best()};
  return value;
}

std::vector<std::string> names_up_to(Simd last) {
  return {kNames, kNames + static_cast<int>(last) + 1};
}

}  // namespace

std::vector<std::string> compiled_simd() {
#ifdef QUIETSTAR_X86
  return names_up_to(Simd::avx512);
#else
  return names_up_to(Simd::generic);
#endif
}

std::vector<std::string> supported_simd() {
  return names_up_to(best());
}

Simd simd() {
  return chosen().load(std::memory_order_relaxed);
}

std::string simd_name() {
  return kNames[static_cast<int>(simd())];
}

void set_simd(const std::string& name) {
  if (name == "auto") {
    chosen() = best();
    return;
  }
  const std::vector<std::string> can = supported_simd();
  const auto found = std::find(can.begin(), can.end(), name);
  if (found == can.end()) {
    std::string expected = "auto";
    for (const std::string& each : can) expected += ", " + each;
    throw std::invalid_argument("simd is '" + name + "'; expected one of " + expected +
                                " on this machine");
  }
  chosen() = static_cast<Simd>(found - can.begin());
}

}  // namespace quietstar
