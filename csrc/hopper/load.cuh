// The producers: one warp walks lists and keeps the copy engine busy, one finds work and brings queries, one writes
// outputs, and where tiles may be left out another brings V. Where there are columns, which the copy engine cannot
// gather, four warps gather, and the first does the rest.
#pragma once
#include "tile.cuh"

namespace sparse_attn::hopper {

// What a stage holds, in the registers of the producer's threads.
struct Stage {
  bool is_columns, is_full;  // is_full: every slot of this warp has a key
  int block;                 // this lane's word of the list
  int kv_head, batch;
};

// One elected lane per listed block copies its keys (or values) into the tile.
template <typename K>
__device__ __forceinline__ void copy_blocks(typename K::Element* tile, const CUtensorMap* map, uint64_t* full,
                                            const Stage& stage) {
  const int thread = threadIdx.x % 128;
  if (thread < 32) {
    __syncwarp();  // what the other lanes wrote of the stage comes before the arrival
    if (thread == 0) mbarrier_expect_bytes(full, K::BLOCK_N * K::HEAD_DIM * sizeof(typename K::Element));
    __syncwarp();
    if (thread < K::kEntries) {
      const int block = K::HALVES ? stage.block >> 2 : stage.block;
#pragma unroll
      for (int chunk = 0; chunk < K::HEAD_DIM / kChunk; ++chunk)
        tma_load(tile + (chunk * K::BLOCK_N + thread * K::KEY_BLOCK) * kChunk, map, full, chunk * kChunk,
                 block * K::KEY_BLOCK, stage.kv_head, stage.batch, kEvictLast);
    }
    __syncwarp();
  }
  if (K::COLUMNS && thread != 0) mbarrier_arrive(full);
}

// Each warp gathers 32 keys, whose numbers lie in `keys`: 8 lanes copy 128 bytes of a row, 16 each, four rows at once.
template <typename K>
__device__ __forceinline__ void copy_columns(typename K::Element* tile, const char* base, uint32_t stride_bytes,
                                             uint64_t* full, const int* keys, bool is_full) {
  constexpr int kBatch = 8;  // addresses worked out before they are used
  const int warp = threadIdx.x / 32, row = threadIdx.x % 32 / 8, piece = threadIdx.x % 8;
  const uint64_t from = reinterpret_cast<uint64_t>(base) + piece * 16;
  const uint32_t to = smem_address(tile) + (warp * 32 + row) * 128, even = (piece ^ row) * 16, odd = even ^ 64;
  keys += warp * 32 + row;
  auto copy = [&](int r, uint64_t source, bool is_used) {
#pragma unroll
    for (int chunk = 0; chunk < K::HEAD_DIM / kChunk; ++chunk) {
      const uint32_t place = to + (r % 8 == 0 ? even : odd) + r * 128 + chunk * K::BLOCK_N * 128;
      if (is_full) copy_16_bytes(place, source + chunk * 128);
      else copy_16_bytes_or_zeros(place, source + chunk * 128, is_used);
    }
  };
  if (is_full) {
#pragma unroll
    for (int batch = 0; batch < 32; batch += 4 * kBatch) {
      uint64_t source[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) source[i] = multiply_add(keys[batch + 4 * i], stride_bytes, from);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) copy(batch + 4 * i, source[i], true);
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < 32; r += 4) {
      const bool is_used = keys[r] != kNoKey;
      copy(r, multiply_add(is_used ? keys[r] : 0, stride_bytes, from), is_used);
    }
  }
  mbarrier_arrive_after_copies(full);
}

// The wait of a warp that has time. With SKIP it sleeps between its looks (config.h).
template <typename K>
__device__ __forceinline__ void wait_calmly(uint64_t* barrier, int phase) {
  if constexpr (K::SKIP) {
    while (!mbarrier_test(barrier, phase)) __nanosleep(kIdleNanoseconds);
  } else {
    mbarrier_wait(barrier, phase);
  }
}

// An item whose list is empty: zeros, and -inf. One warp.
template <typename K>
__device__ __forceinline__ void store_nothing(const AttendFwdParams& p, const Work& work) {
  constexpr int kPieces = K::HEAD_DIM / 8;
  const int lane = threadIdx.x % 32;
  auto* out = static_cast<typename K::Element*>(p.out) + work.batch * p.out_stride_b + work.head * p.out_stride_h;
  for (int i = lane; i < K::BLOCK_M * kPieces; i += 32) {
    const int query = work.first_query[i / kPieces / 64] + i / kPieces % 64;
    if (query < p.L)
      *reinterpret_cast<uint4*>(out + query * p.out_stride_m + i % kPieces * 8) = make_uint4(0, 0, 0, 0);
  }
  for (int i = lane; i < K::BLOCK_M; i += 32) {
    const int query = work.first_query[i / 64] + i % 64;
    if (query < p.L) p.lse[(int64_t(work.batch) * p.q_heads + work.head) * p.L + query] = -INFINITY;
  }
}

// The turn-th item of this block that has stages, left in shared memory for the others. One warp; `taken` counts the items
// that it looked at.
template <typename K>
__device__ __forceinline__ void publish(const AttendFwdParams& p, SharedStorage<K>& shared, int& taken, int turn) {
  const int lane = threadIdx.x % 32;
  wait_calmly<K>(&shared.work_empty[turn & 1], ((turn >> 1) & 1) ^ 1);
  Work& work = shared.work[turn & 1];
  while (true) {
    if (lane == 0) find_work<K>(p, taken == 0 ? blockIdx.x : atomicAdd(p.counter, 1) + gridDim.x, work);
    ++taken;
    __syncwarp();
    if (work.is_last || work.count > 0) break;
    store_nothing<K>(p, work);
    __syncwarp();
  }
  if (lane == 0) mbarrier_arrive(&shared.work_full[turn & 1]);
}

// What `publish` left, read by a producer's warp.
template <typename K>
__device__ __forceinline__ Work take_work(SharedStorage<K>& shared, int turn) {
  mbarrier_wait(&shared.work_full[turn & 1], (turn >> 1) & 1);
  const Work work = shared.work[turn & 1];
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.work_empty[turn & 1]);
  return work;
}

// Q of the turn-th item. One warp.
template <typename K>
__device__ __forceinline__ void load_q(const CUtensorMap* map_q, SharedStorage<K>& shared, const Work& work,
                                       int turn) {
  const int tile = turn % kTiles;
  wait_calmly<K>(&shared.q_empty[tile], ((turn / kTiles) & 1) ^ 1);
  if (threadIdx.x % 32 == 0) {
    mbarrier_expect_bytes(&shared.q_full[tile], K::BLOCK_M * K::HEAD_DIM * sizeof(typename K::Element));
#pragma unroll
    for (int g = 0; g < K::GROUPS; ++g)
#pragma unroll
      for (int chunk = 0; chunk < K::HEAD_DIM / kChunk; ++chunk)
        tma_load(shared.q[tile] + (g * K::HEAD_DIM + chunk * kChunk) * 64, map_q, &shared.q_full[tile],
                 chunk * kChunk, work.first_query[g], work.head, work.batch, kEvictFirst);
  }
  __syncwarp();
}

// Writes the outputs of the turn-th item, and frees its tile. One warp.
template <typename K>
__device__ __forceinline__ void store_output(const CUtensorMap* map_o, SharedStorage<K>& shared, int batch, int head,
                                             const int (&first_query)[kMostGroups], int turn) {
  const int tile = turn % kTiles;
  wait_calmly<K>(&shared.o_full[tile], (turn / kTiles) & 1);
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int g = 0; g < K::GROUPS; ++g)
#pragma unroll
      for (int chunk = 0; chunk < K::HEAD_DIM / kChunk; ++chunk)
        tma_store(map_o, shared.q[tile] + (g * K::HEAD_DIM + chunk * kChunk) * 64, chunk * kChunk,
                  first_query[g], head, batch, kEvictFirst);
    tma_store_commit();
    tma_store_wait();
    mbarrier_arrive(&shared.q_empty[tile]);
  }
  __syncwarp();
}

// The warp that writes outputs.
template <typename K>
__device__ __forceinline__ void store(const CUtensorMap* map_o, SharedStorage<K>& shared) {
  for (int turn = 0;; ++turn) {
    const Work work = take_work(shared, turn);
    if (work.is_last) break;
    store_output<K>(map_o, shared, work.batch, work.head, work.first_query, turn);
  }
}

// The warp that finds work, which takes several reads in a row. It does so late, so that who is done early takes more.
template <typename K>
__device__ __forceinline__ void schedule(const AttendFwdParams& p, const CUtensorMap* map_q,
                                         SharedStorage<K>& shared) {
  int taken = 0, stages = 0;  // of all items so far
  for (int turn = 0;; ++turn) {
    if constexpr (K::ROUNDS) {
      if (turn > 0) mbarrier_wait(&shared.work_empty[(turn - 1) & 1], ((turn - 1) >> 1) & 1);  // all begin the last item
    } else {
      while (stages - int(load_note(&shared.filled)) > kLastStages) __nanosleep(kFilledNanoseconds);
    }
    publish<K>(p, shared, taken, turn);
    const Work work = shared.work[turn & 1];  // stays until this warp fills the slot again
    if (work.is_last) break;
    stages += work.count;
    load_q<K>(map_q, shared, work, turn);
  }
}

// The warp that brings V where tiles may be left out. What both warpgroups leave out is not brought. Whether they do is
// known late, so V comes ahead of the votes where a stage shortly before was kept.
template <typename K>
__device__ __forceinline__ void produce_values(const AttendFwdParams& p, const CUtensorMap* map_v,
                                               SharedStorage<K>& shared) {
  constexpr unsigned kWarps = K::kConsumers / 32;
  const int lane = threadIdx.x % 32;
  unsigned step = 0;
  auto vote_of = [&](unsigned stage) { return load_note(&shared.votes[stage % 4][lane % kWarps]); };
  auto is_kept = [&](unsigned stage) { return __any_sync(0xffffffff, vote_of(stage) == 2 * stage + 3); };
  auto have_voted = [&](unsigned stage) { return __all_sync(0xffffffff, int(vote_of(stage) - (2 * stage + 2)) >= 0); };
  for (int turn = 0;; ++turn) {
    const Work work = take_work(shared, turn);
    if (work.is_last) break;
    const int32_t* list = p.indices + work.list;
    auto read = [&](int entry) { return entry < work.visible ? list[entry] : 0; };
    int held = 0, ahead = read(lane);
    for (int i = 0; i < work.count; ++i, ++step) {
      if (i % 32 == 0) held = ahead, ahead = read(i + 32 + lane);
      const int block = __shfl_sync(0xffffffff, held, i % 32) >> (K::HALVES ? 2 : 0), slot = step % K::kValueStages;
      // Both are done with what was there, and so have voted on the stage after that one.
      auto is_free = [&] { return int(load_note(&shared.done[lane % 2]) + K::kValueStages - 1 - step) >= 0; };
      while (!__all_sync(0xffffffff, is_free())) __nanosleep(kValueNanoseconds);
      if (step >= K::kValueStages) mbarrier_wait(&shared.v_full[slot], (step / K::kValueStages - 1) & 1);
      bool is_needed = work.skip_below == -INFINITY || i == 0 || is_kept(step + 1 - K::kValueStages);
      while (!is_needed) {
        // In this order: a vote to keep comes before the last vote does.
        const bool all_voted = have_voted(step);
        is_needed = is_kept(step);
        if (all_voted) break;
        if (!is_needed) __nanosleep(kValueNanoseconds);
      }
      if (lane == 0) {
        if (is_needed) {
          mbarrier_expect_bytes(&shared.v_full[slot], K::BLOCK_N * K::HEAD_DIM * sizeof(typename K::Element));
#pragma unroll
          for (int chunk = 0; chunk < K::HEAD_DIM / kChunk; ++chunk)
            tma_load(shared.v[slot] + chunk * K::BLOCK_N * kChunk, map_v, &shared.v_full[slot], chunk * kChunk,
                     block * K::KEY_BLOCK, work.head / p.gqa_group, work.batch, kEvictLast);
        } else {
          mbarrier_arrive(&shared.v_full[slot]);
        }
        store_note(&shared.brought, step + 1);
      }
      __syncwarp();
    }
  }
  // Nothing may be under way when the block ends.
  for (unsigned stage = step < K::kValueStages ? 0 : step - K::kValueStages; stage < step; ++stage)
    mbarrier_wait(&shared.v_full[stage % K::kValueStages], (stage / K::kValueStages) & 1);
}

template <typename K>
__device__ __forceinline__ void produce(const AttendFwdParams& p, const CUtensorMap* map_q, const CUtensorMap* map_k,
                                        const CUtensorMap* map_v, const CUtensorMap* map_o, SharedStorage<K>& shared) {
  const int thread = threadIdx.x, lane = thread % 32;
  int step = 0;                  // stages filled so far; V runs one behind K
  Ring<K::kValueStages> values;  // where V of stage step - 1 goes
  Stage last = {};
  const char* last_values = nullptr;
  // With columns, of the first warp: items looked at, stored, and the two that may be missing.
  int taken = 0, stored = 0;
  struct { int batch, head, first_query; } unstored = {}, latest = {};

  auto load_v = [&](int at) {
    if constexpr (K::SKIP) return;  // another warp's work
    const int s = uniform(values.slot());
    mbarrier_wait(&shared.v_empty[s], values.phase() ^ 1);
    values.advance(1);
    if (K::COLUMNS && last.is_columns)
      copy_columns<K>(shared.v[s], last_values, p.v_stride_n, &shared.v_full[s],
                      shared.columns[K::COLUMNS ? at % K::kKeyStages : 0], last.is_full);
    else copy_blocks<K>(shared.v[s], map_v, &shared.v_full[s], last);
    if (K::COUNTS_V && lane == 0) store_note(&shared.brought, at + 1);
  };
  auto publish_next = [&](int turn) {
    if (K::COLUMNS && thread < 32) publish<K>(p, shared, taken, turn);
  };
  auto store_next = [&] {
    store_output<K>(map_o, shared, unstored.batch, unstored.head, {unstored.first_query, unstored.first_query + 64}, stored++);
    unstored = latest;
  };

  publish_next(0);
  int turn = 0;
  for (;; ++turn) {
    if constexpr (K::COLUMNS) named_sync(kProducerBarrier, K::kProducers);
    const Work work = K::COLUMNS ? shared.work[turn & 1] : take_work(shared, turn);
    if (work.is_last) break;
    if (K::COLUMNS && thread < 32) {
      if (turn >= kTiles) store_next();  // the consumers finished it when they began the item before this one
      load_q<K>(map_q, shared, work, turn);
      latest = {work.batch, work.head, work.first_query[0]};
      if (turn == stored) unstored = latest;
    }
    const int kv_head = work.head / p.gqa_group;
    const char* keys = static_cast<const char*>(p.k) + work.batch * p.k_stride_b + kv_head * p.k_stride_h;
    const char* values = static_cast<const char*>(p.v) + work.batch * p.v_stride_b + kv_head * p.v_stride_h;

    // Words of the list arrive 32 at a time, a whole window ahead of their use; columns, a stage ahead.
    const int32_t* list = p.indices + work.list;
    const int32_t* column_list = p.column_indices + work.column_list;
    auto read = [&](int window) {
      const int entry = window * 32 + lane;
      return entry < work.visible ? list[entry] : (K::HALVES ? p.num_key_blocks << 2 : p.num_key_blocks);
    };
    auto read_column = [&](int stage) {
      const int entry = stage * K::BLOCK_N + thread;
      return entry < work.visible_columns ? column_list[entry] : kNoKey;
    };
    int window = 0, held = read(0), ahead = read(1);
    int column = K::COLUMNS ? read_column(0) : 0;
    int entry = 0, column_stage = 0;
    const int last_look = max(0, work.count - kLastStages);
    for (int i = 0; i < work.count; ++i) {
      const int masked = i - work.unmasked;
      const bool is_columns =
          K::COLUMNS && (i < work.columns || (masked >= 0 && masked < work.masked_columns));
      Stage now = {is_columns, false, 0, kv_head, work.batch};
      const int s = uniform(step % K::kKeyStages);
      mbarrier_wait(&shared.k_empty[s], ((step / K::kKeyStages) & 1) ^ 1);
      if (is_columns) {
        now.is_full = __all_sync(0xffffffff, column != kNoKey);
        shared.columns[K::COLUMNS ? s : 0][thread] = column;
        __syncwarp();
        copy_columns<K>(shared.k[s], keys, p.k_stride_n, &shared.k_full[s], shared.columns[K::COLUMNS ? s : 0],
                        now.is_full);
        column = read_column(++column_stage);  // here, since waiting for `column` would wait for this read too
      } else {
        if (entry / 32 != window) {
          held = ahead;
          window = entry / 32;
          ahead = read(window + 1);
        }
        now.block = __shfl_sync(0xffffffff, held, (entry + lane % K::kEntries) % 32);
        entry += K::kEntries;
        if (thread < K::kEntries) shared.words[s][thread] = now.block;
        copy_blocks<K>(shared.k[s], map_k, &shared.k_full[s], now);
      }
      if (step > 0) load_v(step - 1);
      last = now;
      last_values = values;
      ++step;
      if constexpr (K::COLUMNS) {
        // The consumers have two stages to work on, and those that are left.
        if (i == max(min(1, work.count - 1), work.count - kLastStages)) publish_next(turn + 1);
      } else if constexpr (!K::ROUNDS) {
        if (i == last_look) store_note_if(lane == 0, &shared.filled, step);
      }
    }
  }
  if (step > 0) load_v(step - 1);
  if (K::COLUMNS && thread < 32)
    while (stored < turn) store_next();
}

}  // namespace sparse_attn::hopper
