// The producer: one warp that walks lists and keeps the copy engine busy.
#pragma once
#include "tile.cuh"

namespace sparse_attn::hopper {

// One elected lane per listed block copies its keys (or values) into the stage.
template <typename Element, int HEAD_DIM, int KEY_BLOCK>
__device__ __forceinline__ void load_stage(Element* stage, const CUtensorMap* map, uint64_t* full, uint64_t* empty,
                                           int phase, int key_block, int lane, int kv_head, int batch) {
  mbarrier_wait(empty, phase ^ 1);
  if (lane == 0) mbarrier_expect_bytes(full, BLOCK_N * HEAD_DIM * sizeof(Element));
  __syncwarp();
  if (lane < BLOCK_N / KEY_BLOCK) {
#pragma unroll
    for (int chunk = 0; chunk < HEAD_DIM / kChunk; ++chunk)
      tma_load(stage + (chunk * BLOCK_N + lane * KEY_BLOCK) * kChunk, map, full, chunk * kChunk, key_block * KEY_BLOCK,
               kv_head, batch);
  }
  __syncwarp();
}

template <typename Element, int HEAD_DIM, int KEY_BLOCK>
__device__ __forceinline__ void produce(const AttendFwdParams& p, const CUtensorMap* map_q, const CUtensorMap* map_k,
                                        const CUtensorMap* map_v, SharedStorage<Element, HEAD_DIM>& shared) {
  constexpr int kEntries = BLOCK_N / KEY_BLOCK;
  const int lane = threadIdx.x % 32;
  int step = 0;  // stages filled so far; K and V rings move together
  int item = blockIdx.x;
  for (int turn = 0;; ++turn) {
    const int slot = turn & 1;
    const Work work = find_work<KEY_BLOCK>(p, item);
    mbarrier_wait(&shared.work_empty[slot], ((turn >> 1) & 1) ^ 1);
    if (lane == 0) {
      shared.work[slot] = work;
      mbarrier_arrive(&shared.work_full[slot]);
    }
    if (work.is_last) return;
    int next = 0;
    if (lane == 0) next = atomicAdd(p.counter, 1) + gridDim.x;

    const int32_t* list = p.indices + work.list;
    const int kv_head = work.head / p.gqa_group;
    mbarrier_wait(&shared.q_empty, (turn & 1) ^ 1);
    if (lane == 0 && work.count > 0) {
      mbarrier_expect_bytes(&shared.q_full, BLOCK_M * HEAD_DIM * sizeof(Element));
      for (int chunk = 0; chunk < HEAD_DIM / kChunk; ++chunk)
        tma_load(shared.q + chunk * BLOCK_M * kChunk, map_q, &shared.q_full, chunk * kChunk,
                 work.query_block * BLOCK_M, work.head, work.batch);
    }
    if (lane == 0 && work.count == 0) mbarrier_arrive(&shared.q_full);
    __syncwarp();

    // Indices arrive 32 at a time, a whole window ahead of their use.
    int window = -1, held = 0, ahead = 0;
    auto read = [&](int w) {
      const int entry = w * 32 + lane;
      return w >= 0 && entry < work.visible ? list[entry] : p.num_key_blocks;
    };
    int previous = 0;
    for (int i = 0; i <= work.count; ++i) {
      int key_block = 0;
      if (i < work.count) {
        const int entry = work.first_entry<KEY_BLOCK>(i);
        if (entry / 32 != window) {
          held = window < 0 ? read(entry / 32) : ahead;
          window = entry / 32;
          ahead = read(window - 1);
        }
        key_block = __shfl_sync(0xffffffff, held, (entry + lane % kEntries) % 32);
        const int s = (step + i) % kStages;
        load_stage<Element, HEAD_DIM, KEY_BLOCK>(shared.k[s], map_k, &shared.k_full[s], &shared.k_empty[s],
                                                 ((step + i) / kStages) & 1, key_block, lane, kv_head, work.batch);
      }
      if (i > 0) {
        const int s = (step + i - 1) % kStages;
        load_stage<Element, HEAD_DIM, KEY_BLOCK>(shared.v[s], map_v, &shared.v_full[s], &shared.v_empty[s],
                                                 ((step + i - 1) / kStages) & 1, previous, lane, kv_head, work.batch);
      }
      previous = key_block;
    }
    step += work.count;
    item = __shfl_sync(0xffffffff, next, 0);
  }
}

}  // namespace sparse_attn::hopper
