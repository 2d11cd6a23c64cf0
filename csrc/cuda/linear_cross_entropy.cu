// Checks and launches of softmax_cross_entropy on a device; the kernels are in
// linear_cross_entropy.cuh.
#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>

#include "launch.cuh"
#include "linear_cross_entropy.cuh"
#include "linear_cross_entropy_plain.cuh"
#include "quietstar/checks.h"

namespace quietstar::cuda {
namespace {

constexpr std::int64_t kMaxVocab = (std::int64_t{1} << 31) - 65536;  // a token's index is an int
constexpr std::int64_t kMaxRows = kMaxVocab;                         // and a row's
constexpr std::int64_t kReserved = 2048;  // bytes of a block's shared memory that are not the row's
constexpr int kThreadsPerMultiprocessor = 1024;  // at the 64 registers that a thread may have

// How a row is worked on.
struct Plan {
  int threads, kept, blocks;
};

// kept: packs of a row that stay in shared memory, in whole chunks of `chunk`. Two blocks or more
// share a multiprocessor if their rows fit, so that one computes while the other waits; a longer
// row has it for itself.
Plan plan(std::int64_t packs, std::int64_t chunk, bool gradient, const Device& device) {
  const auto max = static_cast<std::int64_t>(max_shared_memory(device));
  // Some eight loads per thread keep a row's start and end small beside its middle.
  int threads = 32;
  while (threads < 512 && threads * 8 < packs) threads *= 2;
  std::int64_t kept = gradient ? ceil_div(packs, chunk) * chunk : 0;
  if (2 * (kept * 16 + kReserved) > max) {
    threads = kMaxRowThreads;
    kept = std::min(kept, (max - kReserved) / 16 / chunk * chunk);
  }
  const std::int64_t by_memory = (max + 1024) / (kept * 16 + kReserved);
  const std::int64_t resident = std::max<std::int64_t>(
      1, std::min<std::int64_t>(kThreadsPerMultiprocessor / threads, by_memory));
  return {threads, static_cast<int>(kept), static_cast<int>(resident * multiprocessors(device))};
}

template <class T, class Logit>
void run(const SoftmaxCrossEntropy& call, const Logit& logit, const Device& device) {
  constexpr bool plain = sizeof(T) == 2 && std::is_same_v<Logit, PlainLogit>;
  constexpr int chunk = plain ? kChunkPacks : 1;
  const bool gradient = call.row_weights != nullptr;
  const Plan how = plan(call.vocab / Pack<T>::size, chunk, gradient, device);
  const auto start = [&](auto kernel) {
    launch("softmax_cross_entropy", device, kernel,
           blocks(std::min<std::int64_t>(call.rows, how.blocks)),
           dim3(static_cast<unsigned>(how.threads)), static_cast<std::size_t>(how.kept) * 16,
           static_cast<T*>(call.logits), call.rows, static_cast<int>(call.vocab), call.stride,
           call.targets, call.valid_rows, call.banned_bits, logit,
           static_cast<float>(call.logit_scale / call.temperature), call.nll, call.row_weights,
           how.kept / chunk);
  };
  if constexpr (plain) {
    start(gradient ? softmax_cross_entropy_rows_plain<T, true>
                   : softmax_cross_entropy_rows_plain<T, false>);
  } else {
    start(gradient ? softmax_cross_entropy_rows<T, Logit, true>
                   : softmax_cross_entropy_rows<T, Logit, false>);
  }
}

template <class T>
void run(const SoftmaxCrossEntropy& call, const Device& device) {
  const double scale = call.logit_scale / call.temperature;
  if (call.softcap == 0) {
    run<T>(call, PlainLogit{scale < 0 ? -1.0f : 1.0f, static_cast<float>(std::fabs(scale) / kLn2)},
           device);
  } else {
    run<T>(call,
           CappedLogit{static_cast<float>(call.logit_scale / call.softcap),
                       static_cast<float>(call.softcap / call.temperature / kLn2)},
           device);
  }
}

}  // namespace

void softmax_cross_entropy(const SoftmaxCrossEntropy& call, const Device& device) {
  check(call, kMaxVocab, call.vocab);
  QUIETSTAR_ARGUMENT(call.rows <= kMaxRows, "rows is " + std::to_string(call.rows) +
                                                "; expected 0 to " + std::to_string(kMaxRows));
  with_type(call.dtype, [&](auto type) { run<decltype(type)>(call, device); });
}

void banned_tokens(const std::int64_t* ids, std::int64_t count, std::int64_t vocab,
                   std::uint32_t* mask, const Device& device) {
  launch("banned_tokens", device, set_banned_tokens, blocks(count, 256), dim3(256), 0, ids, count,
         vocab, mask);
}

void scale_in_place(void* data, DType dtype, std::int64_t count, const float* factor,
                    const Device& device) {
  if (count <= 0) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const std::int64_t wanted = ceil_div(count / Pack<T>::size, 256) + 1;
    const std::int64_t resident = std::int64_t{8} * multiprocessors(device);
    launch("scale_in_place", device, scale_elements<T>, blocks(std::min(wanted, resident)),
           dim3(256), 0, static_cast<T*>(data), count, factor);
  });
}

}  // namespace quietstar::cuda
