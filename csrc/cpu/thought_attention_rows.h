// What the forward and backward attention kernels share: the rows of a tile, what they see, and
// packing. For *_kernel.cpp files only.
#pragma once

#include "thought_attention_job.h"
#include "thought_attention_products.h"
#include "vec_rows.h"

namespace quietstar::QUIETSTAR_ISA {

constexpr float kLog2E = 1.442695041f, kLn2 = 0.6931471806f;

static inline std::int64_t smaller(std::int64_t a, std::int64_t b) {
  return a < b ? a : b;
}
static inline std::int64_t larger(std::int64_t a, std::int64_t b) {
  return a > b ? a : b;
}
static inline std::int64_t round_up(std::int64_t n) {
  return (n + kPanelKeys - 1) / kPanelKeys * kPanelKeys;
}

// q is multiplied by this when it is loaded, so that scores are what the exponential takes: base-2
// exponents, or arguments of tanh where there is a cap.
static inline float query_factor(const ThoughtAttention& call) {
  return static_cast<float>(call.softcap > 0 ? call.scale / call.softcap
                                             : call.scale * 1.4426950408889634);
}

// Packed keys and values: of a whole text, of a block of it, or of a column's slots.
struct PackedKeys {
  std::int64_t origin;  // the number of the key that lies first
  const float *k_panels, *v_panels, *k_rows, *v_rows;
  std::int64_t v_stride;  // from one of v_rows to the next
  // Instead of k_panels, where the rows are few: raw_count keys of the call's dtype as they lie.
  const void* raw_keys = nullptr;
  std::int64_t raw_stride = 0, raw_count = 0;
};

// A tile of rows (column, slot, head): where they lie, and which text keys they see.
struct Tile {
  const AttentionJob& job;
  const ThoughtAttention& call;
  std::int64_t pair, batch, head;  // head: of the keys
  const std::int32_t* column;      // columns of the tile
  std::int64_t columns, rows;

  Tile(const AttentionJob& from, std::int64_t which_pair, std::int64_t tile)
      : job(from), call(*from.call), pair(which_pair) {
    batch = pair / call.kv_heads;
    head = pair % call.kv_heads;
    const std::int64_t begin = tile * job.columns_per_tile;
    column = job.order + batch * call.num_thoughts + begin;
    columns = smaller(job.columns_per_tile, call.num_thoughts - begin);
    rows = columns * job.rows_per_column;
  }

  // Calls use(row, head, slot, column) for every row, and soon(head, slot, column) some rows
  // before. The rows of a slot and head lie near each other in memory, so these are the inner loop.
  template <class Use, class Soon>
  void for_each_row(Use use, Soon soon) const {
    constexpr std::int64_t kAhead = 2;
    const std::int64_t groups = job.groups, last = job.rows_per_column;
    for (std::int64_t i = -kAhead; i < last; ++i) {
      const std::int64_t j = i + kAhead;
      for (std::int64_t c = 0; c < columns && j < last; ++c) {
        soon(head * groups + j % groups, j / groups, column[c]);
      }
      for (std::int64_t c = 0; c < columns && i >= 0; ++c) {
        use(c * last + i, head * groups + i % groups, i / groups, column[c]);
      }
    }
  }
  template <class Use>
  void for_each_row(Use use) const {
    for_each_row(use, [](std::int64_t, std::int64_t, std::int64_t) {});
  }

  template <class T>
  T* row_in(const AttentionTensor& t, std::int64_t h, std::int64_t s, std::int64_t m) const {
    return static_cast<T*>(t.data) + batch * t.batch + h * t.head + s * t.slot + m * t.column;
  }

  std::int64_t flat(std::int64_t h, std::int64_t s, std::int64_t m) const {
    return ((batch * call.q_heads + h) * call.query_slots + s) * call.num_thoughts + m;
  }

  // A row in this query slot sees key slots first_slot(slot) .. depth(slot) - 1.
  std::int64_t depth(std::int64_t slot) const {
    return call.key_slots == 0 ? 0 : slot + 1 + call.key_slots - call.query_slots;
  }
  std::int64_t first_slot(std::int64_t slot) const {
    return call.window > 0 ? larger(depth(slot) - call.window, 0) : 0;
  }
  // The first key slot that some row sees, rounded down to a whole panel.
  std::int64_t first_panel() const { return first_slot(0) / kPanelKeys * kPanelKeys; }

  // first and last [rows]; a row that sees no text gets first = text_length, last = 0.
  void find_ranges(const AttentionScratch& s) const {
    for_each_row([&](std::int64_t row, std::int64_t, std::int64_t slot, std::int64_t m) {
      const std::int64_t stop = call.text_stop[batch * call.num_thoughts + m];
      std::int64_t first = larger(call.text_start[batch * call.num_thoughts + m], 0);
      if (call.window > 0) first = larger(first, stop + depth(slot) - call.window);
      const std::int64_t last = smaller(stop, call.text_length);
      s.first[row] = static_cast<std::int32_t>(first < last ? first : call.text_length);
      s.last[row] = static_cast<std::int32_t>(first < last ? last : 0);
    });
  }

  // Asks for a row that will be read soon. Rows of one column lie far apart, often by a power of
  // two, so that no hardware prefetcher finds them and caches keep few of them at a time.
  template <class T>
  void prefetch(const AttentionTensor& t, std::int64_t h, std::int64_t s, std::int64_t m) const {
    const auto* row = reinterpret_cast<const char*>(row_in<const T>(t, h, s, m));
    const auto bytes = call.head_size * static_cast<std::int64_t>(sizeof(T));
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i);
  }

  // Asks for the keys and values that rows of the tile's c-th column see, if there is one.
  template <class T>
  void prefetch_slots(std::int64_t c) const {
    for (std::int64_t t = first_slot(0); t < call.key_slots && c < columns; ++t) {
      prefetch<T>(call.k_thought, head, t, column[c]);
      prefetch<T>(call.v_thought, head, t, column[c]);
    }
  }

  PackedKeys text() const {
    const std::int64_t rows_at = pair * job.text * job.size;
    const std::int64_t panels_at = pair * job.text * call.head_size;
    return {0,
            job.k_panels + panels_at,
            job.v_panels + panels_at,
            job.k_rows + rows_at,
            job.v_rows + rows_at,
            job.size};
  }
};

// The text keys that rows [begin, end) see between them.
struct KeySpan {
  std::int64_t low, high;            // some row sees low .. high - 1; low >= high: none
  std::int64_t all_first, all_last;  // every row sees all_first .. all_last - 1
};
static inline KeySpan span_of(const AttentionScratch& s, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kFar = std::int64_t{1} << 31;
  KeySpan span{kFar, 0, 0, kFar};
  for (std::int64_t r = begin; r < end; ++r) {
    span.low = smaller(span.low, s.first[r]);
    span.high = larger(span.high, s.last[r]);
    span.all_first = larger(span.all_first, s.first[r]);
    span.all_last = smaller(span.all_last, s.last[r]);
  }
  return span;
}

// Keys [begin, end) in panels of 16: panels[key / 16][d][key % 16]. Keys to the next multiple of 16
// become 0.
template <class T>
static inline void pack_panels(const T* from, std::int64_t stride, std::int64_t begin,
                               std::int64_t end, std::int64_t size, float* panels) {
  for (std::int64_t key = begin; key < end; key += kPanelKeys) {
    transpose(from + key * stride, stride, smaller(kPanelKeys, end - key), size,
              panels + key * size);
  }
}

template <class T>
static inline void pack_rows(const T* from, std::int64_t stride, std::int64_t begin,
                             std::int64_t end, std::int64_t size, float* rows) {
  const std::int64_t padded = round_up(size);
  for (std::int64_t key = begin; key < end; ++key) {
    load_row(from + key * stride, size, padded, 1.0f, rows + key * padded);
  }
  for (std::int64_t i = end * padded; i < round_up(end) * padded; ++i) rows[i] = 0;
}

static inline Operand panels(const float* data, std::int64_t size, std::int64_t key) {
  return {data + key * size, kPanelKeys, kPanelKeys * size};
}
static inline Operand rows_of(const float* data, std::int64_t stride, std::int64_t key) {
  return {data + key * stride, stride, kLanes};
}

}  // namespace quietstar::QUIETSTAR_ISA
