// The producer: it walks lists and keeps the copy engine busy. One warp; where there are columns, which the
// copy engine cannot gather, four.
#pragma once
#include "tile.cuh"

namespace sparse_attn::hopper {

// What a stage holds, in the registers of the producer's threads.
struct Stage {
  bool is_columns;
  int held;     // this lane's word of the list, or this thread's key
  int kv_head, batch;
};

// One elected lane per listed block copies its keys (or values) into the tile.
template <typename K>
__device__ __forceinline__ void copy_blocks(typename K::Element* tile, const CUtensorMap* map, uint64_t* full,
                                            const Stage& stage) {
  const int thread = threadIdx.x % 128;
  if (thread < 32) {
    __syncwarp();  // what the other lanes wrote of the stage comes before the arrival
    if (thread == 0) mbarrier_expect_bytes(full, BLOCK_N * K::HEAD_DIM * sizeof(typename K::Element));
    __syncwarp();
    if (thread < K::kEntries) {
      const int block = K::HALVES ? stage.held >> 2 : stage.held;
#pragma unroll
      for (int chunk = 0; chunk < K::HEAD_DIM / kChunk; ++chunk)
        tma_load(tile + (chunk * BLOCK_N + thread * K::KEY_BLOCK) * kChunk, map, full, chunk * kChunk,
                 block * K::KEY_BLOCK, stage.kv_head, stage.batch);
    }
    __syncwarp();
  }
  if (K::COLUMNS && thread != 0) mbarrier_arrive(full);
}

// Each warp gathers 32 keys; lane l of it holds the number of the l-th. 16 or 8 lanes copy a row of K::HEAD_DIM.
template <typename K>
__device__ __forceinline__ void copy_columns(typename K::Element* tile, const char* from, uint32_t stride_bytes,
                                             uint64_t* full, int held) {
  constexpr int kPieces = K::HEAD_DIM / 8, kRowsAtOnce = 32 / kPieces;  // pieces of 16 bytes
  constexpr int kBatch = 4;  // copies whose keys are passed around together
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, piece = lane % kPieces, first = lane / kPieces;
  const char* rows = from + piece * 16;
  const uint32_t chunk = smem_address(tile) + piece / 8 * BLOCK_N * 128 + (warp * 32 + first) * 128;
  // The swizzle of row r + first: its lower bits are those of r and of `first`, which do not meet.
  auto place = [&](int r) { return chunk + r * 128 + (((piece % 8) ^ first ^ (r % 8)) * 16); };
  auto source = [&](int key) { return rows + uint64_t(stride_bytes) * uint32_t(key); };
  if (__all_sync(0xffffffff, held != kNoKey)) {
#pragma unroll
    for (int batch = 0; batch < 32; batch += kBatch * kRowsAtOnce) {
      int key[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) key[i] = __shfl_sync(0xffffffff, held, batch + i * kRowsAtOnce + first);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) copy_16_bytes(place(batch + i * kRowsAtOnce), source(key[i]));
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < 32; r += kRowsAtOnce) {
      const int key = __shfl_sync(0xffffffff, held, r + first);
      copy_16_bytes_or_zeros(place(r), source(key == kNoKey ? 0 : key), key != kNoKey);
    }
  }
  mbarrier_arrive_after_copies(full);
}

template <typename K>
__device__ __forceinline__ void produce(const AttendFwdParams& p, const CUtensorMap* map_q, const CUtensorMap* map_k,
                                        const CUtensorMap* map_v, SharedStorage<K>& shared) {
  using Element = typename K::Element;
  const int thread = threadIdx.x, lane = thread % 32;
  int step = 0;    // stages filled so far; V runs one behind K
  int loaded = 0;  // items with stages so far
  int claimed = 0;  // by lane 0 of the first warp: the item after the one published last
  Stage last = {};

  auto publish = [&](int item, int turn) {
    mbarrier_wait(&shared.work_empty[turn & 1], ((turn >> 1) & 1) ^ 1);
    if (lane == 0) {
      shared.work[turn & 1] = find_work<K>(p, item);
      mbarrier_arrive(&shared.work_full[turn & 1]);
      claimed = atomicAdd(p.counter, 1) + gridDim.x;
    }
  };
  auto sync = [&] {
    if constexpr (K::COLUMNS) named_sync(kProducerBarrier, K::kProducers);
    else __syncwarp();
  };
  auto load_v = [&](int at) {
    const int s = at % K::kStages;
    mbarrier_wait(&shared.v_empty[s], ((at / K::kStages) & 1) ^ 1);
    if (K::COLUMNS && last.is_columns) {
      const char* from = static_cast<const char*>(p.v) + last.batch * p.v_stride_b + last.kv_head * p.v_stride_h;
      copy_columns<K>(shared.v[s], from, p.v_stride_n, &shared.v_full[s], last.held);
    } else {
      copy_blocks<K>(shared.v[s], map_v, &shared.v_full[s], last);
    }
  };

  if (thread < 32) publish(blockIdx.x, 0);
  for (int turn = 0;; ++turn) {
    sync();
    const Work work = shared.work[turn & 1];
    if (work.is_last) break;
    if (work.count > 0 && thread < 32) {
      const int tile = loaded % kTiles;
      mbarrier_wait(&shared.q_empty[tile], ((loaded / kTiles) & 1) ^ 1);
      if (lane == 0) {
        mbarrier_expect_bytes(&shared.q_full[tile], BLOCK_M * K::HEAD_DIM * sizeof(Element));
#pragma unroll
        for (int g = 0; g < 2; ++g)
#pragma unroll
          for (int chunk = 0; chunk < K::HEAD_DIM / kChunk; ++chunk)
            tma_load(shared.q[tile] + (g * K::HEAD_DIM + chunk * kChunk) * 64, map_q, &shared.q_full[tile],
                     chunk * kChunk, work.first_query[g], work.head, work.batch);
      }
      __syncwarp();
    }
    if (work.count > 0) ++loaded;

    // Words of the list arrive 32 at a time, a whole window ahead of their use; columns, a stage ahead.
    const int32_t* list = p.indices + work.list;
    const int32_t* column_list = p.column_indices + work.column_list;
    auto read = [&](int window) {
      const int entry = window * 32 + lane;
      return entry < work.visible ? list[entry] : (K::HALVES ? p.num_key_blocks << 2 : p.num_key_blocks);
    };
    auto read_column = [&](int stage) {
      const int entry = stage * BLOCK_N + thread;
      return entry < work.visible_columns ? column_list[entry] : kNoKey;
    };
    int window = 0, held = read(0), ahead = read(1);
    int column = K::COLUMNS ? read_column(0) : 0;
    int entry = 0, column_stage = 0;
    for (int i = 0; i < work.count; ++i) {
      const int masked = i - work.unmasked;
      const bool is_columns =
          K::COLUMNS && (i < work.columns || (masked >= 0 && masked < work.masked_columns));
      Stage now = {is_columns, 0, work.head / p.gqa_group, work.batch};
      const int s = step % K::kStages;
      mbarrier_wait(&shared.k_empty[s], ((step / K::kStages) & 1) ^ 1);
      if (is_columns) {
        now.held = column;
        column = read_column(++column_stage);
        shared.columns[K::COLUMNS ? s : 0][thread] = now.held;
        const char* from = static_cast<const char*>(p.k) + now.batch * p.k_stride_b + now.kv_head * p.k_stride_h;
        copy_columns<K>(shared.k[s], from, p.k_stride_n, &shared.k_full[s], now.held);
      } else {
        if (entry / 32 != window) {
          held = ahead;
          window = entry / 32;
          ahead = read(window + 1);
        }
        now.held = __shfl_sync(0xffffffff, held, (entry + lane % K::kEntries) % 32);
        entry += K::kEntries;
        if (thread < K::kEntries) shared.words[s][thread] = now.held;
        copy_blocks<K>(shared.k[s], map_k, &shared.k_full[s], now);
      }
      if (step > 0) load_v(step - 1);
      last = now;
      ++step;
      // Finding the next item takes several reads in a row: here the consumers have two stages to work on.
      if (thread < 32 && i == min(1, work.count - 1)) publish(claimed, turn + 1);
    }
    if (thread < 32 && work.count == 0) publish(claimed, turn + 1);
  }
  if (step > 0) load_v(step - 1);
}

}  // namespace sparse_attn::hopper
