// Plain argument structs of the kernels, with the shape of each pointer.
#pragma once
#include <stdint.h>

namespace sparse_attn::hopper {

struct AttendFwdParams {
  void* out;                 // [B, Hq, L, D]
  float* lse;                // [B, Hq, L], natural log
  uint8_t* kept;             // [B, Hq, Lb, Sb], zeros at first; null unless asked
  const float* skip_below;   // [B, Hq], natural log of lambda; null without a skip rule
  const int64_t* offsets;    // [rows + 1]
  const int32_t* indices;    // key blocks, ascending in a row; of pairs of rows: number << 2 | bits, and of rounds: in stages
  const int32_t* bounds;     // [rows, 2]: unmasked and visible entries; of rounds: [rows, 4], schedule.py says what
  const int32_t* order;      // [B' * H', Lb]: query blocks of a head, longest row first
  const int64_t* column_offsets;  // [column rows + 1]
  const int32_t* column_indices;  // single keys, ascending in a row
  const int32_t* column_bounds;   // [B' * H' * Lb, 2]: unmasked and visible columns of a query block
  int* counter;              // one zero: work items handed out after the first gridDim.x
  const void *k, *v;         // [B, Hkv, S, D], for gathering columns
  int64_t k_stride_b, k_stride_h, v_stride_b, v_stride_h;  // in bytes, as the next two
  uint32_t k_stride_n, v_stride_n;
  int64_t out_stride_b, out_stride_h, out_stride_m;
  int64_t list_stride_batch, list_stride_head;  // in (b', h') groups; 0 where the layout broadcasts
  int list_head_divisor;     // query heads that share a list
  int batch, q_heads, gqa_group, L, S;
  int num_query_blocks, num_key_blocks;
  int num_tiles;             // of a head: query blocks, or pairs of them
  int first_row;             // of the first tile: 0, or below by a multiple of 64
  int column_rows, column_group;  // column rows of a head; query blocks that share one
  int heads_per_section, num_long_sections;  // the sections after those have a key head's query heads less
  int num_items;
  bool is_causal;
  float scale, scale_log2;   // scale > 0
  float headroom;            // in unscaled scores: how far one may pass the maximum (softmax.cuh)
};

}  // namespace sparse_attn::hopper
