// Inner loops of the mixing head; what is computed stands in quietstar/mixing_head.h.
//
// A row is the unit of work: width elements of every operand, 4 KB each at width 1024, so that what
// a row's second loop reads again (its gate is known only after the dot product) comes from the L1
// cache.
//   mixing_first   reads h1 and from_base, writes h1:             2 reads, 1 write an element
//   mixing_tail    reads h2, base, thought, writes h2 and mixed:  3 reads, 2 writes
//   backward       reads grad_mixed, base, thought, h2, writes grad_thought and grad_h2; then reads
//                  grad_h1, h1 and grad_mixed, writes grad_h1:    7 reads, 3 writes
// where PyTorch's cat, bias, relu, lerp and their gradients make several times as many passes. All
// of it is bound by memory, and small against the products: 6 width operations an element in them.
// The gradients of base rows are summed by the owner of a position over its rows in their order: no
// atomics, the same result for any number of threads.
//
// Tried, and did not pay: in 16 bits, adding two halves of the first layer that were both rounded
// (where they cancel, relu ends on the wrong side; see _first_products in
// quietstar_ext/mixing_head/fused.py for what is done instead).
#include <cstdint>

#include "mixing_head_rows.h"
#include "vec_rows.h"

namespace quietstar::QUIETSTAR_ISA {
namespace {

// relu's output below it counts as 0: no bit of a gradient hangs on a subnormal.
constexpr float kSmallest = 1.17549435e-38f;

float sum_of(Vec x) {
  float lane[kLanes];
  x.store(lane);
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  }
  return lane[0];
}

// Calls body(i, count) for the vectors of a row: count is kLanes but for the last.
template <class Body>
inline void for_vectors(std::int64_t width, Body body) {
  std::int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, std::int64_t{kLanes});
  if (i < width) body(i, width - i);
}

template <class T>
class Rows {
 public:
  explicit Rows(const MixingHead& call) : call_(call), width_(call.width) {}

  void first(std::int64_t begin, std::int64_t end) const {
    const Vec zero = Vec::fill(0);
    for (std::int64_t r = begin; r < end; ++r) {
      T* h1 = row(call_.h1, r);
      const T* base = row(call_.from_base, position(r));
      for_vectors(width_, [&](std::int64_t i, std::int64_t n) {
        store_part(h1 + i, max(zero, load_part(h1 + i, n) + load_part(base + i, n)), n);
      });
    }
  }

  void tail(std::int64_t begin, std::int64_t end) const {
    const Vec zero = Vec::fill(0);
    const T *b2 = row(call_.b2, 0), *w3 = row(call_.w3, 0);
    for (std::int64_t r = begin; r < end; ++r) {
      T* h2 = row(call_.h2, r);
      Vec dot = zero;
      for_vectors(width_, [&](std::int64_t i, std::int64_t n) {
        const Vec bias = call_.b2 ? load_part(b2 + i, n) : zero;
        const Vec h = max(zero, load_part(h2 + i, n) + bias);
        dot = fma(h, load_part(w3 + i, n), dot);
        store_part(h2 + i, h, n);
      });
      float gate = sum_of(dot);
      if (call_.sigmoid) gate = 1 / (1 + __builtin_expf(-gate));
      call_.gate[r] = gate;
      const T *base = row(call_.base, position(r)), *thought = row(call_.thought, r);
      T* mixed = row(call_.mixed, r);
      const Vec w = Vec::fill(gate), rest = Vec::fill(1 - gate);
      for_vectors(width_, [&](std::int64_t i, std::int64_t n) {
        store_part(mixed + i, fma(rest, load_part(base + i, n), w * load_part(thought + i, n)), n);
      });
    }
  }

  void tail_backward(std::int64_t begin, std::int64_t end, float* grad_b2, float* grad_w3) const {
    const Vec zero = Vec::fill(0), smallest = Vec::fill(kSmallest);
    const T* w3 = row(call_.w3, 0);
    for (std::int64_t r = begin; r < end; ++r) {
      const T *base = row(call_.base, position(r)), *thought = row(call_.thought, r);
      const T *grad = row(call_.grad_mixed, r), *h2 = row(call_.h2, r);
      T *grad_thought = row(call_.grad_thought, r), *grad_h2 = row(call_.grad_h2, r);
      const float gate = call_.gate[r];
      const Vec w = Vec::fill(gate);
      Vec dot = zero;
      for_vectors(width_, [&](std::int64_t i, std::int64_t n) {
        const Vec g = load_part(grad + i, n);
        dot = fma(g, load_part(thought + i, n) - load_part(base + i, n), dot);
        store_part(grad_thought + i, w * g, n);
      });
      float grad_gate = call_.grad_gate[r] + sum_of(dot);
      if (call_.sigmoid) grad_gate *= gate * (1 - gate);
      const Vec outer = Vec::fill(grad_gate);
      for_vectors(width_, [&](std::int64_t i, std::int64_t n) {
        const Vec h = load_part(h2 + i, n);
        const Vec g = zero_where_below(outer * load_part(w3 + i, n), h, smallest);
        store_part(grad_h2 + i, g, n);
        store_part(grad_b2 + i, load_part(grad_b2 + i, n) + g, n);
        store_part(grad_w3 + i, fma(outer, h, load_part(grad_w3 + i, n)), n);
      });
    }
  }

  void positions_backward(const std::int64_t* first, const std::int64_t* order, std::int64_t begin,
                          std::int64_t end, float* sums) const {
    const Vec smallest = Vec::fill(kSmallest);
    float *b1 = sums, *from_base = b1 + width_, *base = from_base + width_;
    for (std::int64_t p = begin; p < end; ++p) {
      std::memset(from_base, 0, sizeof(float) * 2 * static_cast<std::size_t>(width_));
      for (std::int64_t k = first[p]; k < first[p + 1]; ++k) {
        const std::int64_t r = order[k];
        const T *h1 = row(call_.h1, r), *grad = row(call_.grad_mixed, r);
        T* grad_h1 = row(call_.grad_h1, r);
        const Vec rest = Vec::fill(1 - call_.gate[r]);
        for_vectors(width_, [&](std::int64_t i, std::int64_t n) {
          const Vec g = zero_where_below(load_part(grad_h1 + i, n), load_part(h1 + i, n), smallest);
          store_part(grad_h1 + i, g, n);
          store_part(from_base + i, load_part(from_base + i, n) + g, n);
          store_part(base + i, fma(rest, load_part(grad + i, n), load_part(base + i, n)), n);
        });
      }
      T *to_from_base = row(call_.grad_from_base, p), *to_base = row(call_.grad_base, p);
      for_vectors(width_, [&](std::int64_t i, std::int64_t n) {
        const Vec g = load_part(from_base + i, n);
        store_part(b1 + i, load_part(b1 + i, n) + g, n);
        store_part(to_from_base + i, g, n);
        store_part(to_base + i, load_part(base + i, n), n);
      });
    }
  }

 private:
  std::int64_t position(std::int64_t r) const { return call_.index ? call_.index[r] : r; }
  T* row(void* p, std::int64_t r) const { return static_cast<T*>(p) + r * width_; }
  const T* row(const void* p, std::int64_t r) const {
    return static_cast<const T*>(p) + r * width_;
  }

  const MixingHead& call_;
  std::int64_t width_;
};

template <class Function>
void with_rows(const MixingHead& call, Function function) {
  with_type(call.dtype, [&](auto type) { function(Rows<decltype(type)>(call)); });
}

}  // namespace

void mixing_first_rows(const MixingHead& call, std::int64_t begin, std::int64_t end) {
  with_rows(call, [&](const auto& rows) { rows.first(begin, end); });
}

void mixing_tail_rows(const MixingHead& call, std::int64_t begin, std::int64_t end) {
  with_rows(call, [&](const auto& rows) { rows.tail(begin, end); });
}

void mixing_tail_rows_backward(const MixingHead& call, std::int64_t begin, std::int64_t end,
                               float* grad_b2, float* grad_w3) {
  with_rows(call, [&](const auto& rows) { rows.tail_backward(begin, end, grad_b2, grad_w3); });
}

void mixing_positions_backward(const MixingHead& call, const std::int64_t* first,
                               const std::int64_t* order, std::int64_t begin, std::int64_t end,
                               float* sums) {
  with_rows(call,
            [&](const auto& rows) { rows.positions_backward(first, order, begin, end, sums); });
}

}  // namespace quietstar::QUIETSTAR_ISA
