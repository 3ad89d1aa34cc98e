// What one work item is: its queries, its list, and the shared memory it uses.
#pragma once
#include "config.h"
#include "params.h"
#include "ptx.cuh"

namespace sparse_attn::hopper {

template <typename Element, int HEAD_DIM>
struct alignas(1024) SharedStorage {
  Element q[BLOCK_M * HEAD_DIM];           // [HEAD_DIM / 64][BLOCK_M][64], swizzled
  Element k[kStages][BLOCK_N * HEAD_DIM];  // [HEAD_DIM / 64][BLOCK_N][64], swizzled
  Element v[kStages][BLOCK_N * HEAD_DIM];
  Element o[BLOCK_M * HEAD_DIM];           // [BLOCK_M][HEAD_DIM], 16-byte chunks xor-ed with the row
  uint64_t q_full, q_empty;
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint64_t tile_full[2], tile_empty[2];
  int tile[2];
};

// Which queries a work item is, and which list they read. Heads go in sections whose keys and values
// fit the L2 cache together; inside a section the longest rows come first.
struct Tile {
  int batch, head, query_block;
  int64_t row;

  __device__ Tile(const AttendFwdParams& p, int item) {
    const int per_section = p.heads_per_section * p.num_query_blocks;
    const int section = item / per_section, rest = item % per_section;
    const int heads = min(p.heads_per_section, p.batch * p.q_heads - section * p.heads_per_section);
    const int batch_head = section * p.heads_per_section + rest % heads;
    batch = batch_head / p.q_heads;
    head = batch_head % p.q_heads;
    const int64_t group = batch * p.list_stride_batch + (head / p.list_head_divisor) * p.list_stride_head;
    const int place = rest / heads;
    query_block = p.order[group * p.num_query_blocks + place];
    row = group * p.num_query_blocks + query_block;
  }
};

// The stages of one row, last entries first: the stages that need a mask come at the head of the loop.
template <int KEY_BLOCK>
struct Stages {
  static constexpr int kEntries = BLOCK_N / KEY_BLOCK;
  const int32_t* list;
  int visible, count, masked;

  __device__ Stages(const AttendFwdParams& p, int64_t row) {
    list = p.indices + p.offsets[row];
    const int unmasked = uniform(p.bounds[row * 2]);
    visible = uniform(p.bounds[row * 2 + 1]);
    count = (visible + kEntries - 1) / kEntries;
    masked = count - unmasked / kEntries;
  }
  __device__ int first_entry(int stage) const { return (count - 1 - stage) * kEntries; }
};

}  // namespace sparse_attn::hopper
