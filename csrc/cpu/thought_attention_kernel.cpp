// Forward pass of thought_attention; what is computed stands in quietstar/thought_attention.h.
//
// Tiles. All slots and all query heads of a few neighbouring columns (about 120 rows, see
// thought_attention.cpp) read the same text keys of one key head, so they are one tile: a block of
// 64 keys is loaded once for all of them. Columns are taken in the order of their anchors; a tile
// visits the keys that one of its rows sees, in steps of 16, and masks only where a range ends.
// Within a block, 12 rows at a time: scores = q k^T in registers (12 x 32), to a buffer of 12 x 64
// floats, exponentials there, out += scores v in registers. Nothing larger than that buffer holds
// scores. Keys are packed in panels [16 keys of a dimension side by side], so that both products
// are one broadcast per row and multiply-adds on vectors. bf16 and fp16 become float when packed.
//
// Softmax. Sums are relative to a reference point per row that moves only where a score exceeds it
// by 2^8: then the row is rescaled, which after the first block is rare, and the test is one
// compare per row and block instead of a reduction. Sums stay in 16 lanes until the row is
// finished. The column's own slots come first, being the keys most like their queries.
//
// Few rows. Where one tile sees all of a text (generation), it packs as it goes, into the
// first-level cache; for up to 4 rows it does not pack but takes dot products with the keys as they
// lie.
//
// Cost, with R rows, K keys seen by a row on average, D the head size: 4 R K D operations in
// products, which is 2 D multiply-adds of 16 lanes per 16 scores, beside about 11 vector
// instructions for their exponentials. From memory: q, out and the slots' keys and values once; the
// packed text stays in the second-level cache.
//
// Tried, without gain: tiles of 30 to 240 rows (flat between 60 and 240; 30 is slower at D = 32);
// asking for the rows of the next tile a whole tile ahead (slots lie a power of two apart, so few
// of them survive in the cache that long; some rows ahead is as good in the forward pass and better
// in the backward pass); 1, 4 and 8 slots ahead instead of 2.
#include "thought_attention_rows.h"

namespace quietstar::QUIETSTAR_ISA {
namespace {

constexpr float kInf = __builtin_inff();
// Stands for "no key yet": finite, so that differences with it are numbers.
constexpr float kNothing = -1e30f;
// Exponents may exceed the reference point of their row by so much (2^8) before the row is
// rescaled.
constexpr float kSlack = 8.0f;

class Attend {
 public:
  Attend(const Tile& tile, const AttentionScratch& scratch)
      : tile_(tile),
        s_(scratch),
        size_(tile.call.head_size),
        padded_(tile.job.size),
        cap_(static_cast<float>(tile.call.softcap) * kLog2E) {}

  template <class T>
  void run() {
    load<T>();
    if (tile_.call.key_slots > 0) {
      for (std::int64_t c = 0; c < tile_.columns; ++c) attend_slots<T>(c);
    }
    attend_text<T>();
    finish<T>();
  }

 private:
  template <class T>
  void load() {
    const float factor = query_factor(tile_.call);
    tile_.for_each_row(
        [&](std::int64_t row, std::int64_t h, std::int64_t s, std::int64_t m) {
          load_row(tile_.row_in<const T>(tile_.call.q, h, s, m), size_, padded_, factor,
                   s_.q + row * padded_);
          s_.top[row] = kNothing;
        },
        [&](std::int64_t h, std::int64_t s, std::int64_t m) {
          tile_.prefetch<T>(tile_.call.q, h, s, m);
        });
    tile_.prefetch_slots<T>(0);
    for (std::int64_t i = 0; i < tile_.rows * padded_; i += kLanes) {
      Vec::fill(0).store(s_.out + i);
    }
    for (std::int64_t i = 0; i < tile_.rows * kLanes; i += kLanes) Vec::fill(0).store(s_.sum + i);
    tile_.find_ranges(s_);
  }

  template <class T>
  void attend_slots(std::int64_t c) {
    const ThoughtAttention& call = tile_.call;
    const std::int64_t origin = tile_.first_panel(), slots = call.key_slots - origin;
    const auto* keys = tile_.row_in<const T>(call.k_thought, tile_.head, origin, tile_.column[c]);
    const auto* values = tile_.row_in<const T>(call.v_thought, tile_.head, origin, tile_.column[c]);
    PackedKeys packed{origin, s_.slot_k_panels, nullptr, nullptr, s_.slot_v_rows, padded_};
    take_keys(packed, keys, call.k_thought.slot, slots, tile_.job.rows_per_column,
              s_.slot_k_panels);
    pack_rows(values, call.v_thought.slot, 0, slots, size_, s_.slot_v_rows);
    tile_.prefetch_slots<T>(c + 1);
    const std::int64_t begin = c * tile_.job.rows_per_column;
    const std::int64_t end = begin + tile_.job.rows_per_column;
    for (std::int64_t r = begin; r < end; r += kTileRows) {
      const std::int64_t count = smaller(kTileRows, end - r);
      const auto slot_of = [&](std::int64_t row) { return (r + row - begin) / tile_.job.groups; };
      const std::int64_t low = tile_.first_slot(slot_of(0)) / kPanelKeys * kPanelKeys;
      const std::int64_t high = round_up(tile_.depth(slot_of(count - 1)));
      for (std::int64_t key = low; key < high; key += kBlockKeys) {
        absorb<T>(r, count, packed, key, smaller(key + kBlockKeys, high), true,
                  [&](std::int64_t row, std::int64_t& first, std::int64_t& last) {
                    first = tile_.first_slot(slot_of(row));
                    last = tile_.depth(slot_of(row));
                  });
      }
    }
  }

  template <class T>
  void attend_text() {
    const KeySpan all = span_of(s_, 0, tile_.rows);
    PackedKeys packed = tile_.text();
    for (std::int64_t block = all.low / kPanelKeys * kPanelKeys; block < all.high;
         block += kBlockKeys) {
      if (!tile_.job.pack_ahead) packed = pack_block<T>(block);
      for (std::int64_t r = 0; r < tile_.rows; r += kTileRows) {
        const std::int64_t count = smaller(kTileRows, tile_.rows - r);
        const KeySpan span = span_of(s_, r, r + count);
        const std::int64_t begin = larger(block, span.low / kPanelKeys * kPanelKeys);
        const std::int64_t end = smaller(block + kBlockKeys, round_up(span.high));
        if (begin >= end) continue;
        const bool edge = span.all_first > begin || span.all_last < end;
        absorb<T>(r, count, packed, begin, end, edge,
                  [&](std::int64_t row, std::int64_t& first, std::int64_t& last) {
                    first = s_.first[r + row];
                    last = s_.last[r + row];
                  });
      }
    }
  }

  // Text keys [block, block + kBlockKeys), for a tile that is the only one to see them.
  template <class T>
  PackedKeys pack_block(std::int64_t block) {
    const ThoughtAttention& call = tile_.call;
    const T* k = tile_.row_in<const T>(call.k_text, tile_.head, block, 0);
    const T* v = tile_.row_in<const T>(call.v_text, tile_.head, block, 0);
    const std::int64_t count = smaller(kBlockKeys, call.text_length - block);
    PackedKeys packed{block, s_.block_k_panels, nullptr, nullptr, s_.block_v_rows, padded_};
    take_keys(packed, k, call.k_text.slot, count, tile_.rows, s_.block_k_panels);
    // Values are read as they lie where they are whole vectors of floats, and the text does not end
    // within a panel.
    const float* rows = as_floats(v);
    if (rows && size_ == padded_ && count % kPanelKeys == 0) {
      packed.v_rows = rows;
      packed.v_stride = call.v_text.slot;
    } else {
      pack_rows(v, call.v_text.slot, 0, count, size_, s_.block_v_rows);
    }
    return packed;
  }
  // Keys for this many rows: packed, or as they lie where the rows are few.
  template <class T>
  void take_keys(PackedKeys& packed, const T* keys, std::int64_t stride, std::int64_t count,
                 std::int64_t rows, float* panels_to) {
    if (rows <= kFewRows) {
      packed.raw_keys = keys;
      packed.raw_stride = stride;
      packed.raw_count = count;
    } else {
      pack_panels(keys, stride, 0, count, size_, panels_to);
    }
  }
  static const float* as_floats(const float* p) { return p; }
  template <class T>
  static const float* as_floats(const T*) {
    return nullptr;
  }

  // Takes keys [begin, end) (multiples of 16, at most kBlockKeys) into the sums of rows
  // [r, r + count). Where masked, range(row, first, last) says which keys row r + row sees.
  template <class T, class Range>
  void absorb(std::int64_t r, std::int64_t count, const PackedKeys& keys, std::int64_t begin,
              std::int64_t end, bool masked, Range range) {
    const std::int64_t vecs = (end - begin) / kLanes;
    const std::int64_t at = begin - keys.origin;
    if (keys.raw_keys) {
      dot_products(count, keys.raw_count - at, end - begin, size_, s_.q + r * padded_, padded_,
                   static_cast<const T*>(keys.raw_keys) + at * keys.raw_stride, keys.raw_stride,
                   s_.scores, kBlockKeys);
    } else {
      product<false>(count, end - begin, size_, s_.q + r * padded_, padded_,
                     panels(keys.k_panels, size_, at), s_.scores, kBlockKeys, false);
    }
    for (std::int64_t row = 0; row < count; ++row) {
      float* x = s_.scores + row * kBlockKeys;
      if (cap_ > 0) {
        for (std::int64_t v = 0; v < vecs; ++v) {
          (tanh_of(Vec::load(x + v * kLanes)) * Vec::fill(cap_)).store(x + v * kLanes);
        }
      }
      if (masked) {
        std::int64_t first, last;
        range(row, first, last);
        for (std::int64_t v = 0; v < vecs; ++v) {
          const std::int64_t key = begin + v * kLanes;
          keep_lanes(Vec::load(x + v * kLanes), first - key, last - key, Vec::fill(-kInf))
              .store(x + v * kLanes);
        }
      }
      exponentials(r + row, x, vecs);
    }
    product<false>(count, padded_, end - begin, s_.scores, kBlockKeys,
                   rows_of(keys.v_rows, keys.v_stride, at), s_.out + r * padded_, padded_, true);
  }

  // Turns exponents into exponentials relative to the row's reference point, and adds them up.
  void exponentials(std::int64_t r, float* x, std::int64_t vecs) {
    Vec row_max = Vec::load(x);
    for (std::int64_t v = 1; v < vecs; ++v) row_max = max(row_max, Vec::load(x + v * kLanes));
    Vec sum = Vec::load(s_.sum + r * kLanes);
    if (any_above(row_max, Vec::fill(s_.top[r] + kSlack))) {
      const float top = reduce_max(row_max);
      const Vec shrink = exp2_or_zero(Vec::fill(s_.top[r] - top));
      s_.top[r] = top;
      sum = sum * shrink;
      float* out = s_.out + r * padded_;
      for (std::int64_t d = 0; d < padded_; d += kLanes) {
        (Vec::load(out + d) * shrink).store(out + d);
      }
    }
    const Vec top = Vec::fill(s_.top[r]);
    for (std::int64_t v = 0; v < vecs; ++v) {
      const Vec e = exp2_or_zero(Vec::load(x + v * kLanes) - top);
      sum = sum + e;
      e.store(x + v * kLanes);
    }
    sum.store(s_.sum + r * kLanes);
  }

  template <class T>
  void finish() {
    const float* sinks = tile_.call.sinks;
    tile_.for_each_row([&](std::int64_t row, std::int64_t h, std::int64_t s, std::int64_t m) {
      double total = reduce_add(Vec::load(s_.sum + row * kLanes)), top = s_.top[row];
      double factor = 1;
      if (sinks) {
        const double sink = sinks[h] * 1.4426950408889634;
        if (sink > top) {
          factor = __builtin_exp2(top - sink);
          total *= factor;
          top = sink;
        }
        total += __builtin_exp2(sink - top);
      }
      const bool empty = total == 0;
      if (!empty) factor /= total;
      tile_.call.lse[tile_.flat(h, s, m)] =
          empty ? -kInf : static_cast<float>((top + __builtin_log2(total)) * 0.6931471805599453);
      store_row(s_.out + row * padded_, size_, static_cast<float>(factor),
                tile_.row_in<T>(tile_.call.out, h, s, m));
    });
  }

  const Tile& tile_;
  const AttentionScratch& s_;
  const std::int64_t size_, padded_;
  const float cap_;  // in base-2 exponents, 0: none
};

template <class T>
void pack_text_of(const AttentionJob& job, std::int64_t pair, std::int64_t begin,
                  std::int64_t end) {
  const ThoughtAttention& call = *job.call;
  const std::int64_t b = pair / call.kv_heads, h = pair % call.kv_heads;
  const auto start = [&](const AttentionTensor& t) {
    return static_cast<const T*>(t.data) + b * t.batch + h * t.head;
  };
  const T *k = start(call.k_text), *v = start(call.v_text);
  const std::int64_t size = call.head_size, panels_at = pair * job.text * size;
  const std::int64_t rows_at = pair * job.text * job.size;
  pack_panels(k, call.k_text.slot, begin, end, size, job.k_panels + panels_at);
  pack_rows(v, call.v_text.slot, begin, end, size, job.v_rows + rows_at);
  if (job.backward) {
    pack_panels(v, call.v_text.slot, begin, end, size, job.v_panels + panels_at);
    pack_rows(k, call.k_text.slot, begin, end, size, job.k_rows + rows_at);
  }
}

}  // namespace

void pack_text(const AttentionJob& job, std::int64_t pair, std::int64_t begin, std::int64_t end) {
  with_type(job.call->dtype,
            [&](auto type) { pack_text_of<decltype(type)>(job, pair, begin, end); });
}

void attend_tile(const AttentionJob& job, const AttentionScratch& scratch, std::int64_t pair,
                 std::int64_t which) {
  const Tile tile(job, pair, which);
  Attend attend(tile, scratch);
  with_type(job.call->dtype, [&](auto type) { attend.run<decltype(type)>(); });
}

}  // namespace quietstar::QUIETSTAR_ISA
