// Checks, workspace and threads of sample_tokens; the work per row is in sample_tokens_kernel.cpp.
#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "parallel.h"
#include "quietstar/checks.h"
#include "sample_tokens_rows.h"

namespace quietstar {
namespace {

// Rows are handed out in portions of about this many elements: small enough to share the work
// evenly.
constexpr std::int64_t kPortion = 64 * 1024;

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

std::vector<std::int32_t> sorted_banned(const SampleTokens& call) {
  std::vector<std::int32_t> ids;
  ids.reserve(call.banned_count);
  for (std::int64_t i = 0; i < call.banned_count; ++i) {
    const std::int64_t id = call.banned[i];
    QUIETSTAR_ARGUMENT(id >= 0 && id < call.vocab, "banned has the id " + std::to_string(id) +
                                                       "; expected ids from 0 to " +
                                                       std::to_string(call.vocab - 1));
    ids.push_back(static_cast<std::int32_t>(id));
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  QUIETSTAR_ARGUMENT(
      static_cast<std::int64_t>(ids.size()) < call.vocab,
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
  Scratch measured{};
  const std::int64_t bytes = lay_out(measured, call.vocab, nullptr);
  std::atomic<std::int64_t> bad{call.rows};
  in_parallel(portions, call.threads, [&](std::int64_t p, int thread) {
    Scratch scratch{};
    lay_out(scratch, call.vocab, static_cast<char*>(call.workspace) + thread * bytes);
    const std::int64_t begin = p * portion, end = std::min(begin + portion, call.rows);
    const std::int64_t row = QUIETSTAR_SIMD_CALL(sample_rows, call, banned, scratch, begin, end);
    std::int64_t before = bad;
    while (row >= 0 && row < before && !bad.compare_exchange_weak(before, row)) {
    }
  });
  return bad < call.rows ? bad.load() : -1;
}

}  // namespace quietstar
