// Checks, workspace, tiles and threads of thought_attention; the arithmetic is in
// thought_attention_kernel.cpp and thought_attention_backward_kernel.cpp.
#include <algorithm>

#include "parallel.h"
#include "quietstar/checks.h"
#include "thought_attention_job.h"

namespace quietstar {
namespace {

// Rows of a tile: enough that the work on a loaded key outweighs the load, few enough that the tile
// stays in the first-level cache beside a block of keys.
constexpr std::int64_t kRowsForward = 120, kRowsBackward = 120;
// Columns of a tile, at most: neighbours see different stretches of text, and a tile visits the
// longest of them.
constexpr std::int64_t kMaxColumns = 16;
// Text gradients are summed in this many parts in all, as far as the memory for them allows.
constexpr std::int64_t kParts = 64, kPartsBytes = std::int64_t{32} << 20;
// Text keys that one thread packs or reduces at a time.
constexpr std::int64_t kPackKeys = 256;

std::int64_t round_up(std::int64_t n) {
  return (n + kPanelKeys - 1) / kPanelKeys * kPanelKeys;
}

// Cuts the call into tiles, by its sizes alone: results do not depend on the number of threads.
AttentionJob plan(const ThoughtAttention& call, bool backward) {
  AttentionJob job{};
  job.call = &call;
  job.groups = call.q_heads / call.kv_heads;
  job.rows_per_column = job.groups * call.query_slots;
  const std::int64_t rows = backward ? kRowsBackward : kRowsForward;
  job.columns_per_tile =
      std::clamp<std::int64_t>(rows / std::max<std::int64_t>(job.rows_per_column, 1), 1,
                               std::clamp<std::int64_t>(call.num_thoughts, 1, kMaxColumns));
  job.tiles = (call.num_thoughts + job.columns_per_tile - 1) / job.columns_per_tile;
  job.pack_ahead = backward || job.tiles > 1;
  job.size = round_up(call.head_size);
  job.text = round_up(call.text_length);
  job.slots = round_up(call.key_slots);
  if (backward) {
    const std::int64_t pairs = std::max<std::int64_t>(call.batch * call.kv_heads, 1);
    const std::int64_t bytes = pairs * job.text * job.size * 2 * std::int64_t{sizeof(float)};
    const std::int64_t fit = bytes == 0 ? kParts : kPartsBytes / bytes;
    job.parts = std::min({(kParts + pairs - 1) / pairs, fit, job.tiles});
    job.parts = std::max<std::int64_t>(job.parts, 1);
  }
  return job;
}

std::int64_t lay_out_shared(AttentionJob& job, bool backward, void* begin) {
  const ThoughtAttention& call = *job.call;
  const std::int64_t keys = call.batch * call.kv_heads * job.text;
  Layout layout(begin);
  layout.place(job.order, call.batch * call.num_thoughts);
  if (job.pack_ahead) {
    layout.place(job.k_panels, keys * call.head_size);
    layout.place(job.v_rows, keys * job.size);
  }
  if (backward) {
    layout.place(job.v_panels, keys * call.head_size);
    layout.place(job.k_rows, keys * job.size);
    layout.place(job.dk_parts, keys * job.size * job.parts);
    layout.place(job.dv_parts, keys * job.size * job.parts);
  }
  return layout.size();
}

std::int64_t lay_out_scratch(const AttentionJob& job, AttentionScratch& s, bool backward,
                             void* begin) {
  const std::int64_t rows = job.columns_per_tile * job.rows_per_column;
  const std::int64_t size = job.call->head_size;
  Layout layout(begin);
  layout.place(s.q, rows * job.size);
  layout.place(s.out, rows * job.size);
  layout.place(s.scores, std::max<std::int64_t>(rows, 16) * kBlockKeys);
  layout.place(s.top, rows);
  layout.place(s.first, rows);
  layout.place(s.last, rows);
  layout.place(s.slot_k_panels, job.slots * size);
  if (backward) {
    layout.place(s.dout, rows * job.size);
    layout.place(s.dscores, rows * kBlockKeys);
    layout.place(s.delta, rows);
    layout.place(s.slot_v_panels, job.slots * size);
    layout.place(s.slot_k_rows, job.slots * job.size);
    layout.place(s.slot_dk, kBlockKeys * job.size);
    layout.place(s.slot_dv, kBlockKeys * job.size);
  } else {
    layout.place(s.sum, rows * 16);
    layout.place(s.slot_v_rows, job.slots * job.size);
    if (!job.pack_ahead) {
      layout.place(s.block_k_panels, kBlockKeys * size);
      layout.place(s.block_v_rows, kBlockKeys * job.size);
    }
  }
  return layout.size();
}

// Columns of each batch row by their anchors, so that the columns of a tile see about the same
// text.
void sort_columns(const AttentionJob& job) {
  const ThoughtAttention& call = *job.call;
  for (std::int64_t b = 0; b < call.batch; ++b) {
    std::int32_t* order = job.order + b * call.num_thoughts;
    const std::int32_t* start = call.text_start + b * call.num_thoughts;
    const std::int32_t* stop = call.text_stop + b * call.num_thoughts;
    for (std::int64_t m = 0; m < call.num_thoughts; ++m) order[m] = static_cast<std::int32_t>(m);
    const auto before = [&](std::int32_t x, std::int32_t y) {
      if (stop[x] != stop[y]) return stop[x] < stop[y];
      return start[x] != start[y] ? start[x] < start[y] : x < y;
    };
    if (!std::is_sorted(order, order + call.num_thoughts, before)) {
      std::sort(order, order + call.num_thoughts, before);
    }
  }
}

// Calls work(index, scratch) for every index below count, on several threads.
template <class Work>
void with_scratch(const AttentionJob& job, char* memory, std::int64_t count, Work work) {
  const bool backward = job.backward != nullptr;
  AttentionScratch measured{};
  const std::int64_t bytes = lay_out_scratch(job, measured, backward, nullptr);
  in_parallel(count, job.call->threads, [&](std::int64_t i, int thread) {
    AttentionScratch scratch{};
    lay_out_scratch(job, scratch, backward, memory + thread * bytes);
    work(i, scratch);
  });
}

// Calls work(pair, begin, end) for portions of the text keys of every pair.
template <class Work>
void over_text(const AttentionJob& job, Work work) {
  const std::int64_t portions = (job.call->text_length + kPackKeys - 1) / kPackKeys;
  in_parallel(portions * job.call->batch * job.call->kv_heads, job.call->threads,
              [&](std::int64_t i, int) {
                const std::int64_t begin = i % portions * kPackKeys;
                work(i / portions, begin, std::min(begin + kPackKeys, job.call->text_length));
              });
}

// Sorts and packs; returns where the threads' memory begins.
char* prepare(AttentionJob& job) {
  char* memory = static_cast<char*>(job.call->workspace);
  memory += lay_out_shared(job, job.backward != nullptr, memory);
  sort_columns(job);
  if (!job.pack_ahead) return memory;
  over_text(job, [&](std::int64_t pair, std::int64_t begin, std::int64_t end) {
    QUIETSTAR_SIMD_CALL(pack_text, job, pair, begin, end);
  });
  return memory;
}

}  // namespace

std::int64_t thought_attention_workspace(const ThoughtAttention& call, bool backward) {
  check(call);
  AttentionJob job = plan(call, backward);
  AttentionScratch scratch{};
  return lay_out_shared(job, backward, nullptr) +
         lay_out_scratch(job, scratch, backward, nullptr) * std::max(call.threads, 1);
}

void thought_attention(const ThoughtAttention& call) {
  check(call);
  AttentionJob job = plan(call, false);
  if (call.batch * call.num_thoughts * job.rows_per_column == 0) return;
  char* memory = prepare(job);
  const std::int64_t pairs = call.batch * call.kv_heads;
  // The longest stretches of text first, so that the threads end together.
  with_scratch(
      job, memory, pairs * job.tiles, [&](std::int64_t i, const AttentionScratch& scratch) {
        QUIETSTAR_SIMD_CALL(attend_tile, job, scratch, i % pairs, job.tiles - 1 - i / pairs);
      });
}

void thought_attention_backward(const ThoughtAttentionBackward& call) {
  check(call.forward);
  AttentionJob job = plan(call.forward, true);
  job.backward = &call;
  char* memory = prepare(job);
  const std::int64_t pairs = call.forward.batch * call.forward.kv_heads;
  with_scratch(job, memory, pairs * job.parts,
               [&](std::int64_t i, const AttentionScratch& scratch) {
                 QUIETSTAR_SIMD_CALL(attend_backward_part, job, scratch, i % pairs, i / pairs);
               });
  over_text(job, [&](std::int64_t pair, std::int64_t begin, std::int64_t end) {
    QUIETSTAR_SIMD_CALL(reduce_text_gradients, job, pair, begin, end);
  });
}

}  // namespace quietstar
