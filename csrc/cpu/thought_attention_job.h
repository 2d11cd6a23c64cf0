// What csrc/cpu/thought_attention.cpp hands to the kernels of one instruction set.
#pragma once

#include <cstdint>

#include "quietstar/simd.h"
#include "quietstar/thought_attention.h"

namespace quietstar {

constexpr std::int64_t kPanelKeys = 16;  // keys side by side in a packed panel
constexpr std::int64_t kBlockKeys = 64;  // keys that a row tile takes at a time

// One call, cut into tiles. A tile is columns_per_tile neighbours in the order of their anchors,
// with all their slots and all query heads of one key head; its rows are numbered
// (column, slot, head). Sizes marked with + are rounded up to a multiple of 16.
struct AttentionJob {
  const ThoughtAttention* call;
  const ThoughtAttentionBackward* backward;  // null in the forward pass
  std::int64_t groups;                       // query heads per key head
  std::int64_t rows_per_column;              // query_slots * groups
  std::int64_t columns_per_tile;
  std::int64_t tiles;  // per batch row and key head
  std::int64_t parts;  // sets of tiles that sum text gradients apart, see the backward kernel
  bool pack_ahead;     // texts are packed before the tiles start; else each tile packs what it sees
  std::int64_t size;   // head_size +
  std::int64_t text;   // text_length +
  std::int64_t slots;  // key_slots +
  std::int32_t* order;  // [B, M] columns by anchor
  float* k_panels;      // [B * Hkv][text / 16][D][16] keys, so that 16 keys share a vector
  float* v_panels;      // the same of the values, for the backward pass
  float* k_rows;        // [B * Hkv][text][size] keys as they are, for the backward pass
  float* v_rows;        // [B * Hkv][text][size] values
  float* dk_parts;      // [B * Hkv][parts][text][size] sums of text gradients
  float* dv_parts;
};

// Memory of one thread, carved out of the caller's workspace. R: rows of a tile.
struct AttentionScratch {
  float* q;              // [R][size], times the scale
  float* out;            // [R][size] sums of values; dq in the backward pass
  float* dout;           // [R][size]
  float* scores;         // [12 or R][kBlockKeys]
  float* dscores;        // [R][kBlockKeys]
  float* top;            // [R] what the exponents are relative to; lse in the backward pass
  float* sum;            // [R][16] sums of the exponentials, lane by lane
  float* delta;          // [R]
  std::int32_t* first;   // [R] text keys that a row sees
  std::int32_t* last;    // [R]
  float* slot_k_panels;  // [slots / 16][D][16], and so on as in the job
  float* slot_v_panels;
  float* slot_k_rows;  // [slots][size]
  float* slot_v_rows;
  float* block_k_panels;  // [kBlockKeys / 16][D][16] of the text, where nothing is packed ahead
  float* block_v_rows;    // [kBlockKeys][size]
  float* slot_dk;         // [kBlockKeys][size]
  float* slot_dv;
};

QUIETSTAR_EACH_SIMD(
    // Packs text keys [begin, end) of a pair (batch row, key head); begin is a multiple of 16.
    void pack_text(const AttentionJob& job, std::int64_t pair, std::int64_t begin,
                   std::int64_t end);
    // out and lse of one tile.
    void attend_tile(const AttentionJob& job, const AttentionScratch& scratch, std::int64_t pair,
                     std::int64_t tile);
    // Gradients of the tiles of one part; text gradients go to dk_parts and dv_parts.
    void attend_backward_part(const AttentionJob& job, const AttentionScratch& scratch,
                              std::int64_t pair, std::int64_t part);
    // Adds the parts up and writes the gradients of text keys [begin, end).
    void reduce_text_gradients(const AttentionJob& job, std::int64_t pair, std::int64_t begin,
                               std::int64_t end);)

}  // namespace quietstar
