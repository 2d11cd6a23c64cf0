// Checks and launches of softmax_cross_entropy on a device; the kernels are in
// linear_cross_entropy.cuh.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "linear_cross_entropy.cuh"
#include "quietstar/linear_cross_entropy.h"

namespace quietstar::cuda {
namespace {

constexpr std::int64_t kMostWords = (std::int64_t{1} << 31) - 65536;  // a word's index is an int
constexpr std::int64_t kReserved = 2048;  // bytes of a block's shared memory that are not the row's
constexpr int kThreadsPerMultiprocessor = 1024;  // at the 64 registers that a thread may have

void require(bool fine, const std::string& message) {
  if (!fine) throw std::invalid_argument(message);
}

void check(const SoftmaxCrossEntropy& call) {
  require(
      call.words >= 1 && call.words <= kMostWords,
      "words is " + std::to_string(call.words) + "; expected 1 to " + std::to_string(kMostWords));
  require(call.row_stride >= call.words, "row_stride is " + std::to_string(call.row_stride) +
                                             "; expected at least " + std::to_string(call.words));
  require(call.temperature > 0, "temperature is " + std::to_string(call.temperature) +
                                    "; expected a number greater than 0");
  require(call.softcap >= 0,
          "softcap is " + std::to_string(call.softcap) + "; expected 0 (none) or more");
}

// How a row is worked on.
struct Plan {
  int threads, kept, blocks;
};

// kept: packs of a row that stay in shared memory. Two blocks or more share a multiprocessor if
// their rows fit, so that one computes while the other waits; a longer row has it for itself.
Plan plan(std::int64_t packs, bool gradient, const Device& device) {
  const auto most = static_cast<std::int64_t>(most_shared_memory(device));
  // Some eight loads per thread keep a row's start and end small beside its middle.
  int threads = 32;
  while (threads < 512 && threads * 8 < packs) threads *= 2;
  std::int64_t kept = gradient ? packs : 0;
  if (2 * (kept * 16 + kReserved) > most) {
    threads = kMostRowThreads;
    kept = std::min(kept, (most - kReserved) / 16);
  }
  const std::int64_t by_memory = (most + 1024) / (kept * 16 + kReserved);
  const std::int64_t resident = std::max<std::int64_t>(
      1, std::min<std::int64_t>(kThreadsPerMultiprocessor / threads, by_memory));
  return {threads, static_cast<int>(kept), static_cast<int>(resident * multiprocessors(device))};
}

template <class T, class Logit>
void run(const SoftmaxCrossEntropy& call, const Logit& logit, const Device& device) {
  const bool gradient = call.row_weights != nullptr;
  const Plan how = plan(call.words / Pack<T>::size, gradient, device);
  const auto kernel = gradient ? softmax_cross_entropy_rows<T, Logit, true>
                               : softmax_cross_entropy_rows<T, Logit, false>;
  launch("softmax_cross_entropy", device, kernel,
         dim3(static_cast<unsigned>(std::min<std::int64_t>(call.rows, how.blocks))),
         dim3(static_cast<unsigned>(how.threads)), static_cast<std::size_t>(how.kept) * 16,
         static_cast<T*>(call.logits), call.rows, static_cast<int>(call.words), call.row_stride,
         call.targets, call.live, call.banned, logit,
         static_cast<float>(call.logit_scale / call.temperature), call.nll, call.row_weights,
         how.kept);
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

template <class T>
void scale_all(void* data, std::int64_t count, const float* factor, const Device& device) {
  const std::int64_t blocks = (count / Pack<T>::size + 255) / 256 + 1;
  const std::int64_t most = std::int64_t{8} * multiprocessors(device);
  launch("scale_in_place", device, scale_elements<T>,
         dim3(static_cast<unsigned>(std::min(blocks, most))), dim3(256), 0, static_cast<T*>(data),
         count, factor);
}

}  // namespace

void softmax_cross_entropy(const SoftmaxCrossEntropy& call, const Device& device) {
  check(call);
  switch (call.dtype) {
    case DType::bf16:
      return run<BFloat16>(call, device);
    case DType::f16:
      return run<Float16>(call, device);
    default:
      return run<float>(call, device);
  }
}

void banned_words(const std::int64_t* ids, std::int64_t count, std::int64_t words,
                  std::uint32_t* mask, const Device& device) {
  launch("banned_words", device, set_banned_words, dim3(static_cast<unsigned>((count + 255) / 256)),
         dim3(256), 0, ids, count, words, mask);
}

void scale_in_place(void* data, DType dtype, std::int64_t count, const float* factor,
                    const Device& device) {
  if (count <= 0) return;
  switch (dtype) {
    case DType::bf16:
      return scale_all<BFloat16>(data, count, factor, device);
    case DType::f16:
      return scale_all<Float16>(data, count, factor, device);
    default:
      return scale_all<float>(data, count, factor, device);
  }
}

}  // namespace quietstar::cuda
