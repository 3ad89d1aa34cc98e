// Forward attention over lists of keys on Hopper: a producer feeds two consumer warpgroups of 64 queries each (or three),
// which take turns on the matrix unit. docs/hopper_forward.md explains the schedule.
#pragma once
#include "load.cuh"
#include "softmax.cuh"

namespace sparse_attn::hopper {

// S = Q K^T of one warpgroup, of the first SCORES * 2 keys of a stage: [64, SCORES * 2] fp32. From the first K tile on: one
// addition leads to the descriptor of any.
template <typename K, int SCORES>
__device__ __forceinline__ void multiply_qk(float (&s)[SCORES], const typename K::Element* q,
                                            const typename K::Element* first_k, int slot) {
  const uint64_t a = matrix_descriptor(q, 16, 1024);
  const uint64_t b = matrix_descriptor(first_k, 16, 1024) + slot * int(K::BLOCK_N * K::HEAD_DIM * sizeof(*q) >> 4);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < K::HEAD_DIM / 16; ++step) {
    const int chunk = step / 4, within = (step % 4) * 32;
    const uint64_t a_step = a + ((chunk * 64 * 128 + within) >> 4);
    const uint64_t b_step = b + ((chunk * K::BLOCK_N * 128 + within) >> 4);
    Wgmma<typename K::Element, SCORES * 2>::shared_k_major(s, a_step, b_step, step > 0);
  }
  wgmma_commit();
}

// O = P V (+ O where accumulate != 0) of one warpgroup: [64, HEAD_DIM] fp32.
template <typename K>
__device__ __forceinline__ void multiply_pv(float (&o)[K::HEAD_DIM / 2], const uint32_t (&p)[K::BLOCK_N / 16][4],
                                            const typename K::Element* v, int accumulate) {
  const uint64_t b = matrix_descriptor(v, K::BLOCK_N * 128, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < K::BLOCK_N / 16; ++step)
    Wgmma<typename K::Element, K::HEAD_DIM>::registers_n_major(o, p[step], b + ((step * 16 * 128) >> 4),
                                                               step > 0 ? 1 : accumulate);
  wgmma_commit();
}

// For how many warpgroups this one frees what it shares with them.
template <typename K>
__device__ __forceinline__ int voices_in(const Part& item) {
  if constexpr (K::LEAVES) return item.voices;
  else return 1;
}

// Normalise one warpgroup's rows and leave them in place of their queries, from where a producer's warp has them copied.
template <typename K>
__device__ __forceinline__ void leave_output(const AttendFwdParams& p, SharedStorage<K>& shared, const Part& work,
                                             float (&o)[K::HEAD_DIM / 2], const SoftmaxState& state, int group,
                                             int tile) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  float sum[2] = {state.sum[0], state.sum[1]}, inverse[2];
#pragma unroll
  for (int step = 1; step < 4; step *= 2)
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += __shfl_xor_sync(0xffffffff, sum[r], step);
#pragma unroll
  for (int r = 0; r < 2; ++r) inverse[r] = sum[r] == 0.f ? 0.f : reciprocal_fast(sum[r]);
  // Of the four lanes that hold two rows, the first and the second write one lse each. The shift is as the exponentials
  // had it, rounding and all.
  const int own = lane % 2, query = work.first_query + warp * 16 + lane / 4 + 8 * own;
  const float shift = (own ? state.maximum[1] : state.maximum[0]) * p.scale_log2;
  if (lane % 4 < 2 && query < p.L)
    p.lse[(int64_t(work.batch) * p.q_heads + work.head) * p.L + query] = log_sum(own ? sum[1] : sum[0], shift);
  if (__any_sync(0xffffffff, inverse[0] == 0.f || inverse[1] == 0.f)) {
    // Rows that attend nothing may hold anything, even NaN.
#pragma unroll
    for (int i = 0; i < K::HEAD_DIM / 2; ++i)
      if (inverse[i / 2 % 2] == 0.f) o[i] = 0.f;
  }
  const int row = warp * 16 + lane % 16;
  const uint32_t at = smem_address(shared.q[tile] + group * 64 * K::HEAD_DIM) + row * 128;
#pragma unroll
  for (int j = 0; j < K::HEAD_DIM / 16; ++j) {
    const int piece = 2 * j + lane / 16;  // 16 bytes of the row
    uint32_t packed[4];
#pragma unroll
    for (int c = 0; c < 4; ++c)
      packed[c] = pack(o[8 * j + 2 * c] * inverse[c & 1], o[8 * j + 2 * c + 1] * inverse[c & 1], typename K::Element());
    store_matrices(at + piece / 8 * 64 * 128 + ((piece % 8) ^ (row % 8)) * 16, packed[0], packed[1], packed[2],
                   packed[3]);
  }
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) mbarrier_arrive(&shared.o_full[tile], voices_in<K>(work));
}

// Whether none of the four warps whose votes these are keeps a tile.
__device__ __forceinline__ bool none_keeps(const unsigned* votes, unsigned to_keep) {
  const uint4 all = *reinterpret_cast<const uint4*>(votes);
  return all.x != to_keep && all.y != to_keep && all.z != to_keep && all.w != to_keep;
}

// A warp's vote to leave out a tile where most are kept; `votes` are those of its warpgroup. One that keeps it goes on; one
// that would not waits for the others. Returns whether all agree to leave it out.
__device__ __forceinline__ bool vote(unsigned* votes, unsigned stage, bool to_skip, int barrier) {
  const unsigned to_keep = 2 * stage + 3;
  store_note_if(threadIdx.x % 32 == 0, votes + threadIdx.x % 128 / 32, to_keep - to_skip);
  __syncwarp();
  if (!to_skip) {
    named_arrive(barrier, 128);
    return false;
  }
  named_sync(barrier, 128);
  return none_keeps(votes, to_keep);
}

// Whether the other warpgroup leaves a tile out, too, as this one would. One that keeps it does not wait.
__device__ __forceinline__ bool other_agrees(const unsigned* votes_of_other, unsigned stage, bool to_skip, int barrier) {
  if (!to_skip) {
    named_arrive(barrier, 256);
    return false;
  }
  named_sync(barrier, 256);
  return none_keeps(votes_of_other, 2 * stage + 3);
}

// What a visit of a stage is known to be when it is compiled.
enum : unsigned {
  kMasked = 1,
  kFirst = 2,    // of the next item
  kPending = 4,  // P V of an earlier stage is issued beside Q K
  kVoting = 8,   // the tile may be left out
  kHalf = 16     // this warpgroup reads no key of the second half
};
template <unsigned FLAGS>
struct Visit {};

// The first N of an array.
template <int N, typename T, int M>
__device__ __forceinline__ T (&first_of(T (&all)[M]))[N] {
  static_assert(N <= M);
  return reinterpret_cast<T(&)[N]>(all);
}

// One of two arrays that differ in length.
template <bool IS_FIRST, typename T, typename U>
__device__ __forceinline__ auto& either(T& first, U& second) {
  if constexpr (IS_FIRST) return first;
  else return second;
}

// One consumer warpgroup. Its life is one stream of stages over all its items: the product Q K of a stage is
// issued before P V of the stage before it, even where that stage belongs to the item before.
template <typename K>
__device__ __forceinline__ void consume(const AttendFwdParams& p, SharedStorage<K>& shared) {
  using Element = typename K::Element;
  const int group = uniform(threadIdx.x / 128) - 1, lane = threadIdx.x % 32;
  const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const bool elected = threadIdx.x % 128 == 0;
  float o[K::HEAD_DIM / 2], s_all[K::BLOCK_N / 2];
  uint32_t probabilities[K::BLOCK_N / 16][4];
  constexpr SoftmaxState kNothing = {{-INFINITY, -INFINITY}, {0.f, 0.f}, {}};
  SoftmaxState state = kNothing;
  Part work;
  unsigned position = 0;  // stages before the next one, or the next round
  Ring<K::kValueStages> values;  // where V of that stage is
  unsigned turn = 0;      // items taken so far: the current one and those before it
  // P V not issued yet: whether there is one, where V is, and whether its stage is this warpgroup's alone. Without SKIP
  // there always is one after the first stage.
  bool is_pending = false;
  Ring<K::kValueStages> pending;
  bool is_pending_alone = false;
  int has_output = 0;  // o holds something of this item
  bool is_ready = false;  // K and V of the next visit are there

  auto next_work = [&] {
    mbarrier_wait(&shared.work_full[turn & 1], (turn >> 1) & 1);
    const Part next = read_work<K>(p, shared.work[turn & 1], group);
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&shared.work_empty[turn & 1], K::LEAVES && turn > 0 ? voices_in<K>(work) : 1);
    ++turn;
    return next;
  };
  // This warpgroup is done with a stage; alone with it, it speaks for the other as well.
  auto release = [&](uint64_t* barrier, const Part& item, bool is_alone) {
    if (elected) mbarrier_arrive(barrier, K::ROUNDS && is_alone ? 2 : voices_in<K>(item));
  };

  // Visit i of `item`. is_alone: the next stages are a round, of which this warpgroup has one.
  auto visit_one = [&]<unsigned FLAGS>(const Part& item, int i, bool is_alone, Visit<FLAGS>) {
    constexpr bool kIsMasked = FLAGS & kMasked, kIsFirst = FLAGS & kFirst, kHasPending = FLAGS & kPending;
    constexpr bool kVotes = K::SKIP && FLAGS & kVoting;
    constexpr int kParts = FLAGS & kHalf ? 2 : 1;
    float s_half[K::BLOCK_N / 4];
    auto& s = either<kParts == 1>(s_all, s_half);
    forget(s_half);
    const unsigned step = position + (K::ROUNDS && is_alone ? group : 0);
    auto own = values;
    if (K::ROUNDS && is_alone) own.advance(group);
    position += K::ROUNDS && is_alone ? 2 : 1;
    values.advance(K::ROUNDS && is_alone ? 2 : 1);
    const int slot = uniform(step % K::kKeyStages), phase = (step / K::kKeyStages) & 1, tile = uniform((turn - 1) % kTiles);
    const auto before = K::SKIP ? Ring<K::kValueStages>{step - 1} : pending;
    const int v_slot = uniform(before.slot());
    const int query = item.first_query + row;

    if (i == 0) mbarrier_wait(&shared.q_full[tile], ((turn - 1) / kTiles) & 1);
    // The first stage that both read after rounds (tile.cuh, WATCHES).
    const bool is_after_round = K::WATCHES && kIsFirst && !is_alone && is_pending_alone;
    if (is_after_round && group == 1) wait_for_note(&shared.passed[0], step - 1);
    if (kIsFirst || !is_ready) mbarrier_wait(&shared.k_full[slot], phase);
    if constexpr (K::COLUMNS) fence_async_proxy();
    int words[K::kEntries];
    if constexpr (kIsMasked || K::SKIP) {
#pragma unroll
      for (int e = 0; e < K::kEntries; ++e) words[e] = shared.words[slot][e];
    }

    if constexpr (K::TURNS) named_sync(kTurnBarrier + group, K::kConsumers);
    multiply_qk<K>(s, shared.q[tile] + group * 64 * K::HEAD_DIM, shared.k[0], slot);
    if constexpr (kHasPending) {
      if (kIsFirst || !is_ready) {
        if constexpr (K::COUNTS_V) wait_for_note(&shared.brought, before.at + 1);
        mbarrier_wait(&shared.v_full[v_slot], before.phase());
        if constexpr (K::COLUMNS) fence_async_proxy();  // else the one above was late enough
      }
      multiply_pv<K>(o, probabilities, shared.v[v_slot], has_output);
    }
    if constexpr (K::TURNS) named_arrive(kTurnBarrier + 1 - group, K::kConsumers);

    wgmma_wait<kHasPending ? 1 : 0>();
    pin(s);
    if constexpr (kIsMasked) {
      if (K::COLUMNS && i - item.clear < item.masked_columns) {
        mask_columns(s, p, shared.columns[K::COLUMNS ? slot : 0], query, lane);
        named_sync(kGatherBarrier + group, 128);  // all warps have read the keys: the stage may be filled again
      } else if constexpr (!K::COLUMNS || kParts == 1) {
        mask_blocks<K>(s, p, first_of<(K::kEntries + kParts - 1) / kParts>(words), item.first_query, group);
      }
    }
    release(&shared.k_empty[slot], item, is_alone);
    if (K::WATCHES && (is_alone || kIsFirst)) store_note_if(elected, &shared.passed[group], step + 1);
    const unsigned next = position + (K::ROUNDS && i + 1 >= item.shared && item.alone ? group : 0);
    uint64_t* const next_k = &shared.k_full[next % K::kKeyStages];
    const int next_k_phase = (next / K::kKeyStages) & 1;
    if constexpr (kVotes) is_ready = mbarrier_test(next_k, next_k_phase);  // all that counts if the tile is left out

    SoftmaxState fresh = state;
    if constexpr (kIsFirst) fresh = kNothing;
    float largest[2], rescale[2];
    int bits[2];
    if constexpr (kIsFirst) thread_maxima(largest, s);
    else largest_bits(bits, s);
    if constexpr (kVotes && !kIsFirst) {
      if (same_in_warp(fresh.limit[0] < 0.f || fresh.limit[1] < 0.f)) {
        largest_scores(largest, bits, s);
      } else {  // negative scores count for nothing
#pragma unroll
        for (int r = 0; r < 2; ++r) largest[r] = bits[r] < 0 ? -INFINITY : __int_as_float(bits[r]);
      }
    }
    bool votes_to_skip = false;
    if constexpr (kVotes) {
      if constexpr (kIsFirst) fresh.limit[0] = least_limit(p, query), fresh.limit[1] = least_limit(p, query + 8);
      const bool is_low = largest[0] < fresh.limit[0] && largest[1] < fresh.limit[1];
      unsigned* const votes = shared.votes[step % 4];
      if constexpr (kHasPending) {
        votes_to_skip = vote(votes + 4 * group, step, __all_sync(0xffffffff, is_low), kVoteBarrier + group);
      } else {  // after a tile that was left out: half as long, but all wait
        votes_to_skip = all_of_group(kVoteBarrier + group, is_low);
        store_note_if(lane == 0, votes + 4 * group + threadIdx.x % 128 / 32, 2 * step + 3 - votes_to_skip);
      }
      // The warpgroups may be up to three stages apart: a barrier for each of four.
      if constexpr (!K::HALVES)
        votes_to_skip = other_agrees(votes + 4 * (1 - group), step, votes_to_skip, kPairBarrier + step % 4);
    }
    auto finish_product = [&](unsigned done) {
      if constexpr (kHasPending) {
        wgmma_wait<0>();
        pin(o);
        has_output = 1;
        if constexpr (!K::SKIP) release(&shared.v_empty[v_slot], work, is_pending_alone);
      }
      if constexpr (K::SKIP) store_note_if(elected, &shared.done[group], done);
    };
    auto finish_item = [&] {
      if constexpr (kIsFirst) {
        if (turn > 1) leave_output<K>(p, shared, work, o, state, group, turn % kTiles);
        has_output = 0;
      }
    };
    if (!kVotes || !votes_to_skip) {
      bool moves = kIsFirst || kVotes || may_pass(bits, fresh, p);
      if (moves) {
        if constexpr (!kIsFirst && !kVotes) largest_scores(largest, bits, s);
        moves = move_maxima<kIsFirst, kIsMasked>(largest, fresh, rescale, p);
      }
      if constexpr (kVotes) {
#pragma unroll
        for (int r = 0; r < 2; ++r) fresh.limit[r] = fmaxf(fresh.limit[r], quad_max(largest[r]) + item.skip_below);
      }
      auto& used = first_of<K::BLOCK_N / 16 / kParts>(probabilities);
      exponentials<Element, kIsMasked, K::kFinishAfter>(s, used, fresh, p.scale_log2, [&] {
        // The exponentials so far come first, while the matrix unit works on P V.
        if constexpr (kHasPending && holds(K::GROUPS)) hold_until(fresh.sum[0] + fresh.sum[1] + p.scale, &shared.nothing);
        finish_product(step);
      });
#pragma unroll
      for (int i = K::BLOCK_N / 16 / kParts; i < K::BLOCK_N / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) probabilities[i][j] = 0;
      if (is_after_round) wait_for_note(&shared.passed[1 - group], step + group);
      // Asked now, the answer is there when the next visit starts.
      if constexpr (K::COUNTS_V)
        is_ready = mbarriers_test(next_k, next_k_phase, &shared.v_full[own.slot()], own.phase(), &shared.brought, own.at + 1);
      else is_ready = mbarriers_test(next_k, next_k_phase, &shared.v_full[own.slot()], own.phase());
      finish_item();
      state = fresh;
      if ((kHasPending || K::SKIP) && !kIsFirst && moves) rescale_output<K::HEAD_DIM>(o, rescale);
      if constexpr (!K::SKIP) pending = own;
      if constexpr (kParts > 1) forget(s_all);
      is_pending_alone = is_alone;
      is_pending = true;
      if constexpr (K::SKIP) {
        if (p.kept != nullptr && elected && item.first_query < p.L) {
          const int block = item.first_query / (K::HALVES ? 64 : K::BLOCK_M);
          const int64_t row = int64_t(item.batch * p.q_heads + item.head) * p.num_query_blocks + block;
          p.kept[row * p.num_key_blocks + (K::HALVES ? words[0] >> 2 : words[0])] = 1;
        }
      }
    } else {
      finish_product(step + 1);
      finish_item();
      state = fresh;
      is_pending = false;
    }
  };
  auto visit = [&]<unsigned FLAGS>(const Part& item, int i, bool is_alone, Visit<FLAGS>) {
    if (!K::SKIP || same_in_warp(is_pending)) visit_one(item, i, is_alone, Visit<FLAGS | kPending | kVoting>());
    else visit_one(item, i, is_alone, Visit<FLAGS | kVoting>());
  };

  // Ping-pong, with TURNS: named barrier kTurnBarrier + g lets warpgroup g issue its products; group 0 goes first.
  if (K::TURNS && group == 1) named_arrive(kTurnBarrier, K::kConsumers);
  work = next_work();
  if (work.is_last) return;
  if (work.clear > 0) visit_one(work, 0, work.shared == 0, Visit<kFirst | kVoting>());
  else visit_one(work, 0, work.alone, Visit<kFirst | kMasked | kVoting>());
  while (true) {
    int i = 1;
    if constexpr (K::SKIP) {
      // What loops carry stays in uniform registers only if it is known to be uniform where they begin.
      position = uniform(position), values.at = uniform(values.at);
      if (same_in_warp(work.skip_below == -INFINITY && is_pending)) {  // no tile may be left out
#pragma unroll 2
        for (; i < work.shared; ++i) visit_one(work, i, false, Visit<kPending>());
      }
      while (i < work.shared) {
        if (same_in_warp(is_pending)) {
#pragma unroll 2
          do visit_one(work, i, false, Visit<kPending | kVoting>());
          while (++i < work.shared && same_in_warp(is_pending));
        } else {
#pragma unroll 1
          do visit_one(work, i, false, Visit<kVoting>());
          while (++i < work.shared && !same_in_warp(is_pending));
        }
      }
    } else {
#pragma unroll K::kUnroll
      for (; i < work.shared; ++i) visit_one(work, i, false, Visit<kPending>());
    }
    if constexpr (K::ROUNDS) {
#pragma unroll 1
      for (; i < work.clear; ++i) visit(work, i, true, Visit<0>());
    }
#pragma unroll 1
    for (; i < work.visits - work.last_is_half; ++i) visit(work, i, work.alone, Visit<kMasked>());
    if constexpr (K::MAY_HALVE)
      if (i < work.visits) visit(work, i, work.alone, Visit<kMasked | kHalf>());
    if constexpr (K::LEAVES)
      if (work.visits < work.count) {  // by one stage, which it lets pass
        const int slot = uniform(position % K::kKeyStages), v_slot = uniform(values.slot());
        mbarrier_wait(&shared.k_full[slot], (position / K::kKeyStages) & 1);
        mbarrier_wait(&shared.v_full[v_slot], values.phase());
        named_sync(kPassBarrier + group, 128);  // no product holds the warps together: all have waited before one frees
        release(&shared.k_empty[slot], work, false);
        release(&shared.v_empty[v_slot], work, false);
        ++position, values.advance(1);
      }
    const Part next = next_work();
    if (next.is_last) break;
    if (next.clear > 0) visit(next, 0, next.shared == 0, Visit<kFirst>());
    else visit(next, 0, next.alone, Visit<kFirst | kMasked>());
    work = next;
  }
  if (!K::SKIP || is_pending) {
    if constexpr (K::SKIP) pending = {position - 1};
    if constexpr (K::COUNTS_V) wait_for_note(&shared.brought, pending.at + 1);
    mbarrier_wait(&shared.v_full[pending.slot()], pending.phase());
    if constexpr (K::COLUMNS) fence_async_proxy();
    multiply_pv<K>(o, probabilities, shared.v[pending.slot()], has_output);
    wgmma_wait<0>();
    pin(o);
    if constexpr (!K::SKIP) release(&shared.v_empty[pending.slot()], work, is_pending_alone);  // the other may wait for one more
  }
  leave_output<K>(p, shared, work, o, state, group, turn % kTiles);  // `turn` counts the end, too
}

template <typename K>
__global__ void __launch_bounds__(K::kThreads, 1)
    attend_fwd_kernel(const __grid_constant__ AttendFwdParams p, const __grid_constant__ CUtensorMap map_q,
                      const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v,
                      const __grid_constant__ CUtensorMap map_o) {
  extern __shared__ char raw[];
  // Aligned by an offset, so that the compiler still knows it for shared memory.
  auto& shared = *reinterpret_cast<SharedStorage<K>*>(raw + (-smem_address(raw) & 1023));
  if (threadIdx.x == 0) {
    for (int s = 0; s < kTiles; ++s) {
      mbarrier_init(&shared.q_full[s], 1);
      mbarrier_init(&shared.o_full[s], K::kConsumers / 32);
      mbarrier_init(&shared.q_empty[s], 1);
    }
    for (int s = 0; s < K::kKeyStages; ++s) {
      mbarrier_init(&shared.k_full[s], K::kArrivals);
      mbarrier_init(&shared.k_empty[s], K::GROUPS);
    }
    for (int s = 0; s < K::kValueStages; ++s) {
      mbarrier_init(&shared.v_full[s], K::kArrivals);
      mbarrier_init(&shared.v_empty[s], K::GROUPS);
    }
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(&shared.work_full[s], 1);
      mbarrier_init(&shared.work_empty[s], K::kConsumers / 32 + (K::COLUMNS ? 0 : K::SKIP ? 3 : 2));
    }
    shared.filled = 0;
    if constexpr (K::SKIP) {
      for (int i = 0; i < 4 * K::kConsumers / 32; ++i) shared.votes[i / 8][i % 8] = 0;
      shared.done[0] = shared.done[1] = 0;
    }
    if constexpr (K::COUNTS_V) shared.brought = 0;
    if constexpr (K::WATCHES) shared.passed[0] = shared.passed[1] = 0;
    mbarrier_init_fence();
    prefetch_tensor_map(&map_q);
    prefetch_tensor_map(&map_k);
    prefetch_tensor_map(&map_v);
    prefetch_tensor_map(&map_o);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<producer_registers(K::COLUMNS, K::GROUPS)>();
    if (threadIdx.x < K::kProducers) produce<K>(p, &map_q, &map_k, &map_v, &map_o, shared);
    else if (threadIdx.x < 64) schedule<K>(p, &map_q, shared);
    else if (threadIdx.x < 96) store<K>(&map_o, shared);
    else if constexpr (K::SKIP) produce_values<K>(p, &map_v, shared);
  } else {
    keep_registers<consumer_registers(K::COLUMNS, K::GROUPS)>();
    consume<K>(p, shared);
  }
}

}  // namespace sparse_attn::hopper
