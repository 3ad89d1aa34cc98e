// What one work item is: its queries, its list, and the shared memory it uses.
#pragma once
#include "config.h"
#include "params.h"
#include "ptx.cuh"

namespace sparse_attn::hopper {

// One work item: 128 queries of one head, and the list that they read. Its stages run from the last entries
// to the first, so that those which need a mask come at the head of the loop.
struct Work {
  int batch, head, query_block;
  int visible, count, masked;  // entries read; stages; leading stages that need a mask
  int64_t list;                // of its first entry in p.indices
  bool is_last;                // nothing to do: there are no more

  template <int KEY_BLOCK>
  __device__ int first_entry(int stage) const {
    return (count - 1 - stage) * (BLOCK_N / KEY_BLOCK);
  }
};

// Heads go in sections whose keys and values fit the L2 cache together; inside a section the longest rows
// come first.
template <int KEY_BLOCK>
__device__ __forceinline__ Work find_work(const AttendFwdParams& p, int item) {
  constexpr int kEntries = BLOCK_N / KEY_BLOCK;
  Work work;
  work.is_last = item >= p.num_items;
  if (work.is_last) return work;
  const int per_section = p.heads_per_section * p.num_query_blocks;
  const int section = item / per_section, rest = item % per_section;
  const int heads = min(p.heads_per_section, p.batch * p.q_heads - section * p.heads_per_section);
  const int batch_head = section * p.heads_per_section + rest % heads;
  work.batch = batch_head / p.q_heads;
  work.head = batch_head % p.q_heads;
  const int64_t group =
      work.batch * p.list_stride_batch + (work.head / p.list_head_divisor) * p.list_stride_head;
  work.query_block = p.order[group * p.num_query_blocks + rest / heads];
  const int64_t row = group * p.num_query_blocks + work.query_block;
  const int unmasked = p.bounds[row * 2];
  work.visible = p.bounds[row * 2 + 1];
  work.list = p.offsets[row];
  work.count = (work.visible + kEntries - 1) / kEntries;
  work.masked = work.count - unmasked / kEntries;
  return work;
}

// The same, from shared memory, in uniform registers.
__device__ __forceinline__ Work read_work(const Work& shared) {
  Work work;
  work.is_last = uniform(shared.is_last);
  work.batch = uniform(shared.batch), work.head = uniform(shared.head);
  work.query_block = uniform(shared.query_block);
  work.visible = uniform(shared.visible), work.count = uniform(shared.count);
  work.masked = uniform(shared.masked);
  work.list = shared.list;
  return work;
}

template <typename Element, int HEAD_DIM>
struct alignas(1024) SharedStorage {
  Element q[BLOCK_M * HEAD_DIM];           // [HEAD_DIM / 64][BLOCK_M][64], swizzled
  Element k[kStages][BLOCK_N * HEAD_DIM];  // [HEAD_DIM / 64][BLOCK_N][64], swizzled
  Element v[kStages][BLOCK_N * HEAD_DIM];
  Element o[BLOCK_M * HEAD_DIM];           // [BLOCK_M][HEAD_DIM], 16-byte chunks xor-ed with the row
  uint64_t q_full, q_empty;
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
  uint64_t work_full[2], work_empty[2];
  Work work[2];  // the producer finds the next item while the consumers are at the last
};

}  // namespace sparse_attn::hopper
