// Backward pass of thought_attention; what is computed stands in quietstar/thought_attention.h.
// With x the scores, p = exp(x - lse) and delta = sum(dout * out) - dlse, per row and key
//   dv = sum p dout,   ds = p (dout.v - delta) [times 1 - tanh^2 under a cap],
//   dq = scale sum ds k,   dk = scale sum ds q,   dsink = -sum exp(sink - lse) delta (in Python).
//
// Tiles of rows as in the forward pass. For a block of 64 keys, 12 rows at a time: two products
// give scores and dout.v, from which p and ds go to two buffers of tile rows x 64 floats, and ds k
// is added to dq. Then, over all rows of the tile, two products add p^T dout to dv and ds^T q to dk
// of the block: long sums in registers, so each gradient of a key is loaded and stored once per
// tile. A column's slots are seen by its own rows only, which are all in one tile: their gradients
// are written at once. Those of the text are summed in parts, each by its fixed set of tiles (part
// p takes tiles p, p + parts, ...), then the parts are added up in their order: no atomics, and the
// same bits for any number of threads.
//
// Cost: 10 R K D operations (R rows, K keys per row, D the head size) and one exponential per
// score. From memory: q, out, dout, dq and the slots once; text gradients, 8 N D bytes per part,
// stay in the second-level cache up to about N D = 64 K elements.
#include "thought_attention_rows.h"

namespace quietstar::QUIETSTAR_ISA {
namespace {

constexpr float kInf = __builtin_inff();

class AttendBackward {
 public:
  AttendBackward(const Tile& tile, const AttentionScratch& scratch, float* dk, float* dv)
      : tile_(tile),
        s_(scratch),
        size_(tile.call.head_size),
        padded_(tile.job.size),
        cap_(static_cast<float>(tile.call.softcap) * kLog2E),
        dk_(dk),
        dv_(dv) {}

  template <class T>
  void run() {
    load<T>();
    if (tile_.call.key_slots > 0) {
      for (std::int64_t c = 0; c < tile_.columns; ++c) slots<T>(c);
    }
    text();
    tile_.for_each_row([&](std::int64_t row, std::int64_t h, std::int64_t s, std::int64_t m) {
      store_row(s_.out + row * padded_, size_, static_cast<float>(tile_.call.scale),
                tile_.row_in<T>(tile_.job.backward->dq, h, s, m));
    });
  }

 private:
  // Rows, and per row the constants: p = 2^(x - lse), ds = p (dout.v - delta).
  template <class T>
  void load() {
    const ThoughtAttention& call = tile_.call;
    const ThoughtAttentionBackward& backward = *tile_.job.backward;
    const float factor = query_factor(call);
    tile_.for_each_row(
        [&](std::int64_t row, std::int64_t h, std::int64_t s, std::int64_t m) {
          float *dout = s_.dout + row * padded_, *out = s_.out + row * padded_;
          load_row(tile_.row_in<const T>(call.q, h, s, m), size_, padded_, factor,
                   s_.q + row * padded_);
          load_row(tile_.row_in<const T>(backward.dout, h, s, m), size_, padded_, 1.0f, dout);
          load_row(tile_.row_in<const T>(call.out, h, s, m), size_, padded_, 1.0f, out);
          Vec sum = Vec::fill(0);
          for (std::int64_t d = 0; d < padded_; d += kLanes) {
            sum = fma(Vec::load(dout + d), Vec::load(out + d), sum);
            Vec::fill(0).store(out + d);  // from here on the sum of dq
          }
          const std::int64_t at = tile_.flat(h, s, m);
          float lse = call.lse[at] * kLog2E;
          float delta = reduce_add(sum) - (backward.dlse ? backward.dlse[at] : 0.0f);
          if (lse == -kInf) lse = delta = 0;  // sees nothing: every key is masked
          backward.delta[at] = delta;
          s_.top[row] = lse;
          s_.delta[row] = delta;
        },
        [&](std::int64_t h, std::int64_t s, std::int64_t m) {
          tile_.prefetch<T>(call.q, h, s, m);
          tile_.prefetch<T>(call.out, h, s, m);
          tile_.prefetch<T>(backward.dout, h, s, m);
        });
    tile_.prefetch_slots<T>(0);
    tile_.find_ranges(s_);
  }

  template <class T>
  void slots(std::int64_t c) {
    const ThoughtAttention& call = tile_.call;
    const ThoughtAttentionBackward& backward = *tile_.job.backward;
    const std::int64_t m = tile_.column[c], keys = call.key_slots;
    const auto* k = tile_.row_in<const T>(call.k_thought, tile_.head, 0, m);
    const auto* v = tile_.row_in<const T>(call.v_thought, tile_.head, 0, m);
    pack_panels(k, call.k_thought.slot, 0, keys, size_, s_.slot_k_panels);
    pack_panels(v, call.v_thought.slot, 0, keys, size_, s_.slot_v_panels);
    pack_rows(k, call.k_thought.slot, 0, keys, size_, s_.slot_k_rows);
    tile_.prefetch_slots<T>(c + 1);
    const PackedKeys packed{0, s_.slot_k_panels, s_.slot_v_panels, s_.slot_k_rows, nullptr, 0};
    const std::int64_t begin = c * tile_.job.rows_per_column, rows = tile_.job.rows_per_column;
    for (std::int64_t key = 0; key < keys; key += kBlockKeys) {
      const std::int64_t end = smaller(key + kBlockKeys, round_up(keys));
      for (std::int64_t r = begin; r < begin + rows; r += kTileRows) {
        const std::int64_t count = smaller(kTileRows, begin + rows - r);
        score_gradients(r, count, packed, key, end, true,
                        [&](std::int64_t row, std::int64_t& first, std::int64_t& last) {
                          const std::int64_t slot = (r + row - begin) / tile_.job.groups;
                          first = tile_.first_slot(slot);
                          last = tile_.depth(slot);
                        });
      }
      key_gradients(begin, rows, end - key, s_.slot_dk, s_.slot_dv, false);
      for (std::int64_t t = key; t < smaller(end, keys); ++t) {
        store_row(s_.slot_dk + (t - key) * padded_, size_, key_factor(call),
                  tile_.row_in<T>(backward.dk_thought, tile_.head, t, m));
        store_row(s_.slot_dv + (t - key) * padded_, size_, 1.0f,
                  tile_.row_in<T>(backward.dv_thought, tile_.head, t, m));
      }
    }
  }

  void text() {
    const KeySpan all = span_of(s_, 0, tile_.rows);
    const PackedKeys packed = tile_.text();
    const std::int64_t stop = round_up(all.high);
    for (std::int64_t key = all.low / kPanelKeys * kPanelKeys; key < all.high; key += kBlockKeys) {
      const std::int64_t end = smaller(key + kBlockKeys, stop);
      for (std::int64_t r = 0; r < tile_.rows; r += kTileRows) {
        const std::int64_t count = smaller(kTileRows, tile_.rows - r);
        const KeySpan span = span_of(s_, r, r + count);
        const bool edge = span.all_first > key || span.all_last < end;
        score_gradients(r, count, packed, key, end, edge,
                        [&](std::int64_t row, std::int64_t& first, std::int64_t& last) {
                          first = s_.first[r + row];
                          last = s_.last[r + row];
                        });
      }
      key_gradients(0, tile_.rows, end - key, dk_ + key * padded_, dv_ + key * padded_, true);
    }
  }

  // For rows [r, r + count) and keys [begin, end): p to scores, ds to dscores, and ds k to dq.
  template <class Range>
  void score_gradients(std::int64_t r, std::int64_t count, const PackedKeys& keys,
                       std::int64_t begin, std::int64_t end, bool masked, Range range) {
    const std::int64_t vecs = (end - begin) / kLanes;
    float* scores = s_.scores + r * kBlockKeys;
    float* dscores = s_.dscores + r * kBlockKeys;
    product<false>(count, end - begin, size_, s_.q + r * padded_, padded_,
                   panels(keys.k_panels, size_, begin), scores, kBlockKeys, false);
    product<false>(count, end - begin, size_, s_.dout + r * padded_, padded_,
                   panels(keys.v_panels, size_, begin), dscores, kBlockKeys, false);
    for (std::int64_t row = 0; row < count; ++row) {
      float *x = scores + row * kBlockKeys, *dx = dscores + row * kBlockKeys;
      const Vec lse = Vec::fill(s_.top[r + row]), delta = Vec::fill(s_.delta[r + row]);
      for (std::int64_t v = 0; v < vecs; ++v) {
        Vec exponent = Vec::load(x + v * kLanes), slope = Vec::fill(1.0f);
        if (cap_ > 0) {
          const Vec t = tanh_of(exponent);
          exponent = t * Vec::fill(cap_);
          slope = slope - t * t;
        }
        // Rounding may lift an exponent a little above 0, never far; where it is masked, anything.
        const Vec p = exp2_or_zero(min(Vec::fill(64.0f), exponent - lse));
        Vec ds = p * (Vec::load(dx + v * kLanes) - delta);
        if (cap_ > 0) ds = ds * slope;
        p.store(x + v * kLanes);
        ds.store(dx + v * kLanes);
      }
      if (!masked) continue;
      std::int64_t first, last;
      range(row, first, last);
      for (std::int64_t v = 0; v < vecs; ++v) {
        const std::int64_t key = begin + v * kLanes;
        const Vec zero = Vec::fill(0);
        keep_lanes(Vec::load(x + v * kLanes), first - key, last - key, zero).store(x + v * kLanes);
        keep_lanes(Vec::load(dx + v * kLanes), first - key, last - key, zero)
            .store(dx + v * kLanes);
      }
    }
    product<false>(count, padded_, end - begin, dscores, kBlockKeys,
                   rows_of(keys.k_rows, padded_, begin), s_.out + r * padded_, padded_, true);
  }

  // dv (+)= p^T dout and dk (+)= ds^T q over rows [r, r + count) and the keys in scores.
  void key_gradients(std::int64_t r, std::int64_t count, std::int64_t keys, float* dk, float* dv,
                     bool add) {
    product<true>(keys, padded_, count, s_.scores + r * kBlockKeys, kBlockKeys,
                  rows_of(s_.dout, padded_, r), dv, padded_, add);
    product<true>(keys, padded_, count, s_.dscores + r * kBlockKeys, kBlockKeys,
                  rows_of(s_.q, padded_, r), dk, padded_, add);
  }

 public:
  // What dk lacks, as q was multiplied by query_factor and not by the scale.
  static float key_factor(const ThoughtAttention& call) {
    return call.softcap > 0 ? static_cast<float>(call.softcap) : kLn2;
  }

 private:
  const Tile& tile_;
  const AttentionScratch& s_;
  const std::int64_t size_, padded_;
  const float cap_;
  float *dk_, *dv_;  // [text][padded_] of this part
};

template <class T>
void reduce_of(const AttentionJob& job, std::int64_t pair, std::int64_t begin, std::int64_t end) {
  const ThoughtAttention& call = *job.call;
  const std::int64_t part = job.text * job.size;
  const auto reduce = [&](float* parts, const AttentionTensor& to, float factor) {
    float* total = parts + pair * job.parts * part;
    T* rows =
        static_cast<T*>(to.data) + pair / call.kv_heads * to.batch + pair % call.kv_heads * to.head;
    for (std::int64_t key = begin; key < end; ++key) {
      float* row = total + key * job.size;
      for (std::int64_t d = 0; d < job.size; d += kLanes) {
        Vec sum = Vec::load(row + d);
        for (std::int64_t p = 1; p < job.parts; ++p) sum = sum + Vec::load(row + p * part + d);
        sum.store(row + d);
      }
      store_row(row, call.head_size, factor, rows + key * to.slot);
    }
  };
  reduce(job.dk_parts, job.backward->dk_text, AttendBackward::key_factor(call));
  reduce(job.dv_parts, job.backward->dv_text, 1.0f);
}

}  // namespace

void attend_backward_part(const AttentionJob& job, const AttentionScratch& scratch,
                          std::int64_t pair, std::int64_t part) {
  const std::int64_t size = job.text * job.size;
  float* dk = job.dk_parts + (pair * job.parts + part) * size;
  float* dv = job.dv_parts + (pair * job.parts + part) * size;
  for (std::int64_t i = 0; i < size; i += kLanes) {
    Vec::fill(0).store(dk + i);
    Vec::fill(0).store(dv + i);
  }
  for (std::int64_t t = part; t < job.tiles; t += job.parts) {
    const Tile tile(job, pair, t);
    AttendBackward attend(tile, scratch, dk, dv);
    with_type(job.call->dtype, [&](auto type) { attend.run<decltype(type)>(); });
  }
}

void reduce_text_gradients(const AttentionJob& job, std::int64_t pair, std::int64_t begin,
                           std::int64_t end) {
  with_type(job.call->dtype, [&](auto type) { reduce_of<decltype(type)>(job, pair, begin, end); });
}

}  // namespace quietstar::QUIETSTAR_ISA
