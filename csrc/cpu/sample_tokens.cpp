// Checks, workspace and threads of sample_tokens; the work per row is in sample_tokens_kernel.cpp.
#include "quietstar/sample_tokens.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "sample_tokens_rows.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace quietstar {
namespace {

constexpr std::int64_t kAlign = 64;
// Rows are handed out in portions of about this many elements: small enough to share the work
// evenly.
constexpr std::int64_t kPortion = 64 * 1024;

// Lays the scratch arrays out from an address; with a null address it only measures.
class Layout {
 public:
  explicit Layout(char* begin) : begin_(begin) {}
  template <class T>
  void place(T*& array, std::int64_t count) {
    if (begin_) array = reinterpret_cast<T*>(begin_ + size_);
    size_ += (count * static_cast<std::int64_t>(sizeof(T)) + kAlign - 1) / kAlign * kAlign;
  }
  std::int64_t size() const { return size_; }

 private:
  char* begin_;
  std::int64_t size_ = 0;
};

std::int64_t lay_out(Scratch& s, std::int64_t vocab, char* begin) {
  const std::int64_t blocks = block_count(vocab);
  Layout layout(begin);
  layout.place(s.block, kBlock);
  layout.place(s.bin_values, kBlock);
  layout.place(s.bins, kBlock);
  layout.place(s.group_max, blocks * kGroups);
  layout.place(s.block_max, blocks);
  layout.place(s.block_sum, blocks);
  layout.place(s.block_scale, blocks);
  layout.place(s.survivors, blocks * kBlock + kGroups);
  layout.place(s.edge, blocks * kBlock + kGroups);
  layout.place(s.bin_mass, kBins);
  layout.place(s.bin_count, kBins);
  return layout.size();
}

void require(bool fine, const std::string& message) {
  if (!fine) throw std::invalid_argument(message);
}

void check(const SampleTokens& call) {
  require(call.vocab >= 1 && call.vocab < (std::int64_t{1} << 31),
          "logits has " + std::to_string(call.vocab) + " columns; expected 1 to 2^31 - 1");
  require(call.temperature == 0 || (call.temperature >= 1e-30 && call.temperature <= 1e30),
          "temperature is " + std::to_string(call.temperature) +
              "; expected 0 or a number from 1e-30 to 1e30");
  require(call.top_k >= 0, "top_k is " + std::to_string(call.top_k) + "; expected 0 or more");
  require(call.top_p > 0 && call.top_p <= 1,
          "top_p is " + std::to_string(call.top_p) + "; expected a number above 0 and up to 1");
  require(call.min_p >= 0 && call.min_p <= 1,
          "min_p is " + std::to_string(call.min_p) + "; expected a number from 0 to 1");
}

std::vector<std::int32_t> sorted_banned(const SampleTokens& call) {
  std::vector<std::int32_t> ids;
  ids.reserve(call.banned_count);
  for (std::int64_t i = 0; i < call.banned_count; ++i) {
    const std::int64_t id = call.banned[i];
    require(id >= 0 && id < call.vocab, "banned has the id " + std::to_string(id) +
                                            "; expected ids from 0 to " +
                                            std::to_string(call.vocab - 1));
    ids.push_back(static_cast<std::int32_t>(id));
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  require(static_cast<std::int64_t>(ids.size()) < call.vocab,
          "banned has all " + std::to_string(call.vocab) + " ids; expected at least one left");
  return ids;
}

}  // namespace

std::int64_t sample_tokens_workspace(std::int64_t vocab, int threads) {
  Scratch measured{};
  return lay_out(measured, vocab, nullptr) * std::max(threads, 1);
}

std::int64_t sample_tokens(const SampleTokens& call) {
  check(call);
  const std::vector<std::int32_t> ids = sorted_banned(call);
  std::vector<std::int64_t> first(block_count(call.vocab) + 1);
  for (std::size_t b = 0; b < first.size(); ++b) {
    const std::int64_t start = static_cast<std::int64_t>(b) * kBlock;
    first[b] = std::lower_bound(ids.begin(), ids.end(), start) - ids.begin();
  }
  const BannedIds banned{ids.data(), first.data()};

  const std::int64_t portion = std::max<std::int64_t>(1, kPortion / call.vocab);
  const std::int64_t portions = (call.rows + portion - 1) / portion;
  const int threads = static_cast<int>(std::min<std::int64_t>(std::max(call.threads, 1), portions));
  Scratch measured{};
  const std::int64_t bytes = lay_out(measured, call.vocab, nullptr);
  std::int64_t bad = call.rows;
  std::atomic<std::int64_t> next{0};

#pragma omp parallel num_threads(threads) if (threads > 1) reduction(min : bad)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num();
#else
    const int thread = 0;
#endif
    Scratch scratch{};
    lay_out(scratch, call.vocab, static_cast<char*>(call.workspace) + thread * bytes);
    for (std::int64_t p; (p = next.fetch_add(1)) < portions;) {
      const std::int64_t begin = p * portion, end = std::min(begin + portion, call.rows);
      const std::int64_t row = QUIETSTAR_SIMD_CALL(sample_rows, call, banned, scratch, begin, end);
      if (row >= 0) bad = std::min(bad, row);
    }
  }
  return bad < call.rows ? bad : -1;
}

}  // namespace quietstar
