// Forward attention over lists of keys on Hopper: a producer feeds two consumer warpgroups of 64 queries each,
// which take turns on the matrix unit. docs/hopper_forward.md explains the schedule.
#pragma once
#include "load.cuh"
#include "softmax.cuh"

namespace sparse_attn::hopper {

// S = Q K^T of one warpgroup: [64, BLOCK_N] fp32.
template <typename K>
__device__ __forceinline__ void multiply_qk(float (&s)[BLOCK_N / 2], const typename K::Element* q,
                                            const typename K::Element* k) {
  const uint64_t a = matrix_descriptor(q, 16, 1024), b = matrix_descriptor(k, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < K::HEAD_DIM / 16; ++step) {
    const int chunk = step / 4, within = (step % 4) * 32;
    const uint64_t a_step = a + ((chunk * 64 * 128 + within) >> 4);
    const uint64_t b_step = b + ((chunk * BLOCK_N * 128 + within) >> 4);
    Wgmma<typename K::Element, BLOCK_N>::shared_k_major(s, a_step, b_step, step > 0);
  }
  wgmma_commit();
}

// O = P V (+ O where accumulate != 0) of one warpgroup: [64, HEAD_DIM] fp32.
template <typename K>
__device__ __forceinline__ void multiply_pv(float (&o)[K::HEAD_DIM / 2], const uint32_t (&p)[BLOCK_N / 16][4],
                                            const typename K::Element* v, int accumulate) {
  const uint64_t b = matrix_descriptor(v, BLOCK_N * 128, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_N / 16; ++step)
    Wgmma<typename K::Element, K::HEAD_DIM>::registers_n_major(o, p[step], b + ((step * 16 * 128) >> 4),
                                                               step > 0 ? 1 : accumulate);
  wgmma_commit();
}

// Normalise and write one warpgroup's rows: 64 of them, through shared memory and the copy engine.
template <typename K>
__device__ __forceinline__ void store_tile(const AttendFwdParams& p, const CUtensorMap* map_o, const Work& work,
                                           float (&o)[K::HEAD_DIM / 2], const SoftmaxState& state,
                                           typename K::Element* shared_o, int group) {
  const int thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = quad_sum(state.sum[r]);
    inverse[r] = sum == 0.f ? 0.f : 1.f / sum;
    const int query = work.first_query[0] + warp * 16 + lane / 4 + 8 * r;
    if (lane % 4 == 0 && query < p.L) {
      // From the shift as the exponentials had it, rounding and all.
      constexpr float kLn2 = 0.69314718f;
      const float lse = sum == 0.f ? -INFINITY : fmaf(state.maximum[r] * p.scale_log2, kLn2, logf(sum));
      p.lse[(int64_t(work.batch) * p.q_heads + work.head) * p.L + query] = lse;
    }
  }
  if (thread == 0) tma_store_wait();
  named_sync(kStoreBarrier + group, 128);
  const int row = warp * 16 + lane % 16;
  const uint32_t at = smem_address(shared_o) + row * 128;
#pragma unroll
  for (int j = 0; j < K::HEAD_DIM / 16; ++j) {
    const int piece = 2 * j + lane / 16;  // 16 bytes of the row
    uint32_t packed[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      // Rows that attend nothing may hold anything, even NaN.
      const float low = inverse[c & 1] == 0.f ? 0.f : o[8 * j + 2 * c] * inverse[c & 1];
      const float high = inverse[c & 1] == 0.f ? 0.f : o[8 * j + 2 * c + 1] * inverse[c & 1];
      packed[c] = pack(low, high, typename K::Element());
    }
    store_matrices(at + piece / 8 * 64 * 128 + ((piece % 8) ^ (row % 8)) * 16, packed[0], packed[1], packed[2],
                   packed[3]);
  }
  fence_async_proxy();
  named_sync(kStoreBarrier + group, 128);
  if (thread == 0) {
#pragma unroll
    for (int chunk = 0; chunk < K::HEAD_DIM / kChunk; ++chunk)
      tma_store(map_o, shared_o + chunk * kChunk * 64, chunk * kChunk, work.first_query[0], work.head, work.batch);
    tma_store_commit();
  }
}

// An item whose list is empty: zeros, and -inf.
template <typename K>
__device__ __forceinline__ void store_nothing(const AttendFwdParams& p, const Work& work) {
  constexpr int kPieces = K::HEAD_DIM / 8;
  const int thread = threadIdx.x % 128;
  auto* out = static_cast<typename K::Element*>(p.out) + work.batch * p.out_stride_b + work.head * p.out_stride_h;
  for (int i = thread; i < 64 * kPieces; i += 128) {
    const int query = work.first_query[0] + i / kPieces;
    if (query < p.L)
      *reinterpret_cast<uint4*>(out + query * p.out_stride_m + i % kPieces * 8) = make_uint4(0, 0, 0, 0);
  }
  const int query = work.first_query[0] + thread;
  if (thread < 64 && query < p.L) p.lse[(int64_t(work.batch) * p.q_heads + work.head) * p.L + query] = -INFINITY;
}

// Whether all four warps of a warpgroup say yes, which only those hear that do: a warp that says no leaves a note and
// goes on. `note` is the warpgroup's for this stage, and `stage` its number from 1.
__device__ __forceinline__ bool unanimous(unsigned& note, unsigned stage, bool mine, int barrier) {
  if (!__all_sync(0xffffffff, mine)) {
    if (threadIdx.x % 32 == 0) *const_cast<volatile unsigned*>(&note) = stage;
    __syncwarp();
    named_arrive(barrier, 128);
    return false;
  }
  named_sync(barrier, 128);
  return *const_cast<volatile unsigned*>(&note) != stage;
}

// One consumer warpgroup. Its life is one stream of stages over all its items: the product Q K of a stage is
// issued before P V of the stage before it, even where that stage belongs to the item before.
template <typename K>
__device__ __forceinline__ void consume(const AttendFwdParams& p, const CUtensorMap* map_o, SharedStorage<K>& shared) {
  using Element = typename K::Element;
  const int group = uniform(threadIdx.x / 128) - 1, lane = threadIdx.x % 32;
  const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const bool elected = threadIdx.x % 128 == 0;
  float o[K::HEAD_DIM / 2], s[BLOCK_N / 2];
  uint32_t probabilities[BLOCK_N / 16][4];
  constexpr SoftmaxState kNothing = {{-INFINITY, -INFINITY}, {0.f, 0.f}, {-INFINITY, -INFINITY}};
  SoftmaxState state = kNothing;
  Work work;
  float skip_below = 0.f;  // in units of the unscaled scores
  unsigned step = 0;              // stages seen so far
  unsigned turn = 0, loaded = 0;  // items seen so far, and those of them with stages
  // P V not issued yet, and of which stage. Without SKIP there always is one after the first stage.
  int is_pending = 0;
  unsigned pending = 0;
  int has_output = 0;  // o holds something of this item
  bool k_ready = false, v_ready = false;  // of the next visit, seen already

  auto next_work = [&] {
    for (;; ++turn) {
      mbarrier_wait(&shared.work_full[turn & 1], (turn >> 1) & 1);
      const Work next = read_work(shared.work[turn & 1], group);
      mbarrier_arrive(&shared.work_empty[turn & 1]);
      if (next.is_last || next.count > 0) {
        ++turn;
        return next;
      }
      store_nothing<K>(p, next);
    }
  };

  // Stage i of `item`. kBoundary: it is the first of the next item, and the current one is stored.
  // kPending: P V of an earlier stage is issued beside Q K.
  auto visit_one = [&](const Work& item, int i, auto masked, auto boundary, auto with_pending) {
    constexpr bool kMasked = decltype(masked)::value, kBoundary = decltype(boundary)::value;
    constexpr bool kPending = decltype(with_pending)::value;
    const int slot = uniform(step % K::kStages), tile = uniform(loaded % kTiles), phase = (step / K::kStages) & 1;
    const unsigned v_step = K::SKIP ? pending : step - 1;
    const int v_slot = K::SKIP ? uniform(pending % K::kStages) : (slot + K::kStages - 1) % K::kStages;
    const int query = item.first_query[0] + row;

    if (i == 0) mbarrier_wait(&shared.q_full[tile], (loaded / kTiles) & 1);
    if (kBoundary || !k_ready) mbarrier_wait(&shared.k_full[slot], phase);
    if constexpr (K::COLUMNS) fence_async_proxy();
    int words[K::kEntries];
    if constexpr (kMasked || K::SKIP) {
#pragma unroll
      for (int e = 0; e < K::kEntries; ++e) words[e] = shared.words[slot][e];
    }

    named_sync(kTurnBarrier + group, kConsumers);
    multiply_qk<K>(s, shared.q[tile] + group * 64 * K::HEAD_DIM, shared.k[slot]);
    if constexpr (kPending) {
      if (kBoundary || K::SKIP || !v_ready) mbarrier_wait(&shared.v_full[v_slot], (v_step / K::kStages) & 1);
      if constexpr (K::COLUMNS) fence_async_proxy();
      multiply_pv<K>(o, probabilities, shared.v[v_slot], has_output);
    }
    named_arrive(kTurnBarrier + 1 - group, kConsumers);

    wgmma_wait<kPending ? 1 : 0>();
    pin(s);
    if constexpr (kMasked) {
      if (K::COLUMNS && i - item.unmasked < item.masked_columns) {
        mask_columns(s, p, shared.columns[K::COLUMNS ? slot : 0], query, lane);
        named_sync(kStoreBarrier + group, 128);  // all warps have read the keys: the stage may be filled again
      } else {
        mask_blocks<K>(s, p, words, query, group, lane);
      }
    }
    if (elected) mbarrier_arrive(&shared.k_empty[slot]);

    SoftmaxState fresh = state;
    if constexpr (kBoundary) fresh = kNothing;
    float largest[2], rescale[2];
    thread_maxima(largest, s);
    bool is_kept = true, moves = false;
    if constexpr (K::SKIP) {
      bool skips = true;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        skips &= query + 8 * r >= p.L || largest[r] < fresh.seen[r] + skip_below || largest[r] == -INFINITY;
      is_kept = !unanimous(shared.keeps[group][step % 4], step + 1, skips, kVoteBarrier + group);
    }
    auto finish_product = [&] {
      if constexpr (kPending) {
        // The exponentials so far come first, while the matrix unit works on P V.
        if (is_kept) hold_until(fresh.sum[0] + fresh.sum[1] + p.scale, &shared.nothing);
        wgmma_wait<0>();
        pin(o);
        if (elected) mbarrier_arrive(&shared.v_empty[v_slot]);
        has_output = 1;
      }
    };
    if (is_kept) {
      moves = move_maxima<kBoundary, kMasked>(largest, fresh, rescale, p);
      exponentials<Element, kMasked>(s, probabilities, fresh, p.scale_log2, finish_product);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (K::SKIP) fresh.seen[r] = fmaxf(fresh.seen[r], quad_max(largest[r]));
    } else {
      finish_product();
    }
    // Asked now, the answers are there when the next visit starts.
    k_ready = mbarrier_test(&shared.k_full[(step + 1) % K::kStages], ((step + 1) / K::kStages) & 1);
    v_ready = mbarrier_test(&shared.v_full[slot], phase);
    if constexpr (kBoundary) {
      if (step > 0) store_tile<K>(p, map_o, work, o, state, shared.o + group * 64 * K::HEAD_DIM, group);
      has_output = 0;
    }
    state = fresh;
    if (is_kept) {
      if ((kPending || K::SKIP) && !kBoundary && moves) rescale_output<K::HEAD_DIM>(o, rescale);
      pending = step;
      if constexpr (K::SKIP) {
        if (p.kept != nullptr && elected && item.first_query[0] < p.L) {
          const int64_t block_row = (int64_t(item.batch) * p.q_heads + item.head) * p.num_query_blocks +
                                    item.first_query[0] / 64;
          p.kept[block_row * p.num_key_blocks + (words[0] >> 2)] = 1;
        }
      }
    } else if (elected) {  // V comes all the same
      mbarrier_wait(&shared.v_full[slot], phase);
      mbarrier_arrive(&shared.v_empty[slot]);
    }
    is_pending = is_kept;
    ++step;
  };
  auto visit = [&](const Work& item, int i, auto masked, auto boundary) {
    if (!K::SKIP || uniform(is_pending)) visit_one(item, i, masked, boundary, True{});
    else visit_one(item, i, masked, boundary, False{});
  };
  auto read_limit = [&](const Work& item) {
    if constexpr (K::SKIP) skip_below = p.skip_below[item.batch * p.q_heads + item.head] / p.scale;
  };

  // Ping-pong: named barrier kTurnBarrier + g lets warpgroup g issue its products; group 0 goes first.
  if (group == 1) named_arrive(kTurnBarrier, kConsumers);
  work = next_work();
  if (work.is_last) return;
  read_limit(work);
  if (work.unmasked > 0) visit_one(work, 0, False{}, True{}, False{});
  else visit_one(work, 0, True{}, True{}, False{});
  while (true) {
    int i = 1;
#pragma unroll K::COLUMNS || K::HALVES ? 1 : 2
    for (; i < work.unmasked; ++i) visit(work, i, False{}, False{});
#pragma unroll 1
    for (; i < work.count; ++i) visit(work, i, True{}, False{});
    if (elected) mbarrier_arrive(&shared.q_empty[loaded % kTiles]);
    ++loaded;
    const Work next = next_work();
    if (next.is_last) break;
    read_limit(next);
    if (next.unmasked > 0) visit(next, 0, False{}, True{});
    else visit(next, 0, True{}, True{});
    work = next;
  }
  if (!K::SKIP || uniform(is_pending)) {
    const unsigned v_step = K::SKIP ? pending : step - 1;
    mbarrier_wait(&shared.v_full[v_step % K::kStages], (v_step / K::kStages) & 1);
    if constexpr (K::COLUMNS) fence_async_proxy();
    multiply_pv<K>(o, probabilities, shared.v[v_step % K::kStages], has_output);
    wgmma_wait<0>();
    pin(o);
  }
  store_tile<K>(p, map_o, work, o, state, shared.o + group * 64 * K::HEAD_DIM, group);
  if (elected) tma_store_wait();
}

template <typename K>
__global__ void __launch_bounds__(kThreads, 1)
    attend_fwd_kernel(const __grid_constant__ AttendFwdParams p, const __grid_constant__ CUtensorMap map_q,
                      const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                      const __grid_constant__ CUtensorMap map_o) {
  extern __shared__ char raw[];
  auto& shared = *reinterpret_cast<SharedStorage<K>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  if (threadIdx.x == 0) {
    for (int s = 0; s < kTiles; ++s) {
      mbarrier_init(&shared.q_full[s], 1);
      mbarrier_init(&shared.q_empty[s], 2);
    }
    for (int s = 0; s < K::kStages; ++s) {
      mbarrier_init(&shared.k_full[s], K::kArrivals);
      mbarrier_init(&shared.k_empty[s], 2);
      mbarrier_init(&shared.v_full[s], K::kArrivals);
      mbarrier_init(&shared.v_empty[s], 2);
    }
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(&shared.work_full[s], 1);
      mbarrier_init(&shared.work_empty[s], kConsumers);
    }
    for (int i = 0; i < 8; ++i) shared.keeps[i / 4][i % 4] = 0;
    mbarrier_init_fence();
    prefetch_tensor_map(&map_q);
    prefetch_tensor_map(&map_k);
    prefetch_tensor_map(&map_v);
    prefetch_tensor_map(&map_o);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<producer_registers(K::HALVES, K::COLUMNS)>();
    if (threadIdx.x < K::kProducers) produce<K>(p, &map_q, &map_k, &map_v, shared);
  } else {
    keep_registers<consumer_registers(K::HALVES, K::COLUMNS)>();
    consume<K>(p, &map_o, shared);
  }
}

}  // namespace sparse_attn::hopper
