// The tiles of thought_attention's kernels, and the shared memory that they take.
//
// What limits them: 255 registers per thread, which hold the sums of a warp, and the shared memory
// of a block. That is 163 KiB on sm_80, 227 KiB on sm_90 and sm_100, and 99 KiB on sm_86, sm_89 and
// sm_120, which are the graphics cards. Head sizes up to 128 fit everywhere. Beyond, tiles that fit
// read an operand a fifth more often from shared memory: in 16 bits they are compiled besides the
// others, as "small", and taken where the others do not fit; in fp32 they would leave one or two
// warps to a multiprocessor, and there are none.
#pragma once

#include <cstddef>

namespace quietstar::cuda::attention {

// Tiles, by bytes of an element and by the head size that they are made for. A warp has row_tiles
// times 16 rows in the row kernels and the slot kernel, and 16 keys in the key kernel.
struct Shape {
  int warps, row_tiles, keys;
  constexpr int rows() const { return warps * row_tiles * 16; }
  constexpr int threads() const { return warps * 32; }
};
constexpr Shape forward_shape(int bytes, int size, bool small) {
  if (bytes == 4) return {4, 1, size <= 128 ? 32 : 16};
  return size <= 128 ? Shape{4, 2, 32} : Shape{8, 1, small ? 16 : 32};
}
constexpr Shape row_gradient_shape(int bytes, int size, bool small) {
  if (bytes == 4) return size <= 128 ? Shape{4, 1, size <= 64 ? 32 : 16} : Shape{2, 1, 16};
  if (size <= 128) return {4, 2, size <= 64 ? 64 : 32};
  return {4, 1, small ? 16 : 32};
}
struct KeyShape {
  int warps, rows, step;  // rows of a block, and how many of them a warp takes at once
  constexpr int keys() const { return warps * 16; }
  constexpr int threads() const { return warps * 32; }
};
constexpr KeyShape key_gradient_shape(int bytes, int size, bool small) {
  if (bytes == 4) return size <= 128 ? KeyShape{4, size <= 64 ? 32 : 16, 16} : KeyShape{2, 16, 16};
  if (size <= 64) return {4, 32, 32};  // registers for three blocks to a multiprocessor
  if (size <= 128) return {8, size <= 96 ? 64 : 32, 32};
  return small ? KeyShape{4, 16, 16} : KeyShape{4, 32, 32};
}
struct SlotShape {
  int warps, row_tiles;                                  // at most so many warps
  constexpr int rows() const { return row_tiles * 16; }  // of a warp
  constexpr int threads() const { return warps * 32; }
};
constexpr SlotShape slot_gradient_shape(int bytes, int size) {
  if (bytes == 4) return {size <= 128 ? 4 : 2, 1};
  return {2, 2};
}

constexpr int kSeenBy = 3;  // numbers that say what a row sees
constexpr std::size_t kSpanBytes = 4 * sizeof(int);

// Bytes of shared memory. Forward: q, and keys and values in two turns.
constexpr std::size_t forward_bytes(int bytes, int size, bool small) {
  const Shape s = forward_shape(bytes, size, small);
  return static_cast<std::size_t>(bytes) * size * (s.rows() + 4 * s.keys) +
         sizeof(int) * kSeenBy * s.rows() + kSpanBytes * 2 * (s.warps + 1);
}
// q and dout, keys and values in two turns; lse and delta of the rows.
constexpr std::size_t row_gradient_bytes(int bytes, int size, bool small) {
  const Shape s = row_gradient_shape(bytes, size, small);
  return static_cast<std::size_t>(bytes) * size * (2 * s.rows() + 4 * s.keys) +
         sizeof(int) * (kSeenBy + 2) * s.rows() + kSpanBytes * 2 * (s.warps + 1);
}
// Keys and values, q and dout in two turns; range, lse and delta of the rows.
constexpr std::size_t key_gradient_bytes(int bytes, int size, bool small) {
  const KeyShape s = key_gradient_shape(bytes, size, small);
  return static_cast<std::size_t>(bytes) * size * (2 * s.keys() + 4 * s.rows) +
         sizeof(int) * 2 * 4 * s.rows;
}
// 16 keys and values; per warp q and dout of its rows, and p and ds of them and the keys.
constexpr std::size_t slot_gradient_bytes(int bytes, int size, int warps) {
  const SlotShape s = slot_gradient_shape(bytes, size);
  return static_cast<std::size_t>(bytes) * 2 * (16 * size + warps * s.rows() * (size + 16));
}
// Of the kernel that needs the largest number.
constexpr std::size_t max_bytes(int bytes, int size, bool small) {
  const std::size_t all[] = {
      forward_bytes(bytes, size, small), row_gradient_bytes(bytes, size, small),
      key_gradient_bytes(bytes, size, small),
      slot_gradient_bytes(bytes, size, slot_gradient_shape(bytes, size).warps)};
  std::size_t max = 0;
  for (const std::size_t each : all) max = each > max ? each : max;
  return max;
}

constexpr std::size_t kGraphicsCard = 99 * 1024;
static_assert(max_bytes(2, 64, false) <= kGraphicsCard && max_bytes(2, 96, false) <= kGraphicsCard);
static_assert(max_bytes(2, 128, false) <= kGraphicsCard, "the head size of most models");
static_assert(max_bytes(4, 64, false) <= kGraphicsCard &&
              max_bytes(4, 128, false) <= kGraphicsCard);
static_assert(max_bytes(2, 256, true) <= kGraphicsCard);

}  // namespace quietstar::cuda::attention
