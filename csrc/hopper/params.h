// Plain argument structs of the kernels, with the shape of each pointer.
#pragma once
#include <stdint.h>

namespace sparse_attn::hopper {

struct AttendFwdParams {
  void* out;                 // [B, Hq, L, D]
  float* lse;                // [B, Hq, L], natural log
  const int64_t* offsets;    // [rows + 1]
  const int32_t* indices;    // key blocks, ascending in a row
  const int32_t* bounds;     // [rows, 2]: unmasked and visible entries
  const int32_t* order;      // [B' * H', Lb]: query blocks of a head, longest row first
  int* counter;              // one zero: work items handed out after the first gridDim.x
  int64_t out_stride_b, out_stride_h, out_stride_m;
  int64_t list_stride_batch, list_stride_head;  // in (b', h') groups; 0 where the layout broadcasts
  int list_head_divisor;     // query heads that share a list
  int batch, q_heads, gqa_group, L, S;
  int num_query_blocks, num_key_blocks;
  int heads_per_section, num_items;
  bool is_causal;
  float scale, scale_log2;   // scale > 0
};

}  // namespace sparse_attn::hopper
