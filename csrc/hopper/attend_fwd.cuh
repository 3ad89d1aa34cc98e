// Forward attention over block lists on Hopper: one producer warp feeds two consumer warpgroups of 64
// queries each, which take turns on the matrix unit. docs/hopper_forward.md explains the schedule.
#pragma once
#include "load.cuh"
#include "softmax.cuh"

namespace sparse_attn::hopper {

// S = Q K^T of one warpgroup: [64, BLOCK_N] fp32.
template <typename Element, int HEAD_DIM>
__device__ __forceinline__ void multiply_qk(float (&s)[BLOCK_N / 2], const Element* q, const Element* k) {
  const uint64_t a = matrix_descriptor(q, 16, 1024), b = matrix_descriptor(k, 16, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const int chunk = step / 4, within = (step % 4) * 32;
    const uint64_t a_step = a + ((chunk * BLOCK_M * 128 + within) >> 4);
    const uint64_t b_step = b + ((chunk * BLOCK_N * 128 + within) >> 4);
    Wgmma<Element, BLOCK_N>::shared_k_major(s, a_step, b_step, step > 0);
  }
  wgmma_commit();
}

// O += P V of one warpgroup: [64, HEAD_DIM] fp32.
template <typename Element, int HEAD_DIM>
__device__ __forceinline__ void multiply_pv(float (&o)[HEAD_DIM / 2], const uint32_t (&p)[BLOCK_N / 16][4],
                                            const Element* v) {
  const uint64_t b = matrix_descriptor(v, BLOCK_N * 128, 1024);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < BLOCK_N / 16; ++step)
    Wgmma<Element, HEAD_DIM>::registers_n_major(o, p[step], b + ((step * 16 * 128) >> 4), 1);
  wgmma_commit();
}

// Normalise, and write the rows of one warpgroup through shared memory in 16-byte pieces.
template <typename Element, int HEAD_DIM>
__device__ __forceinline__ void store_tile(const AttendFwdParams& p, const Work& work, float (&o)[HEAD_DIM / 2],
                                           SoftmaxState& state, Element* shared_o, int group, bool is_empty) {
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;  // and row + 8
  const int first_query = work.query_block * BLOCK_M + group * 64;
  float inverse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = is_empty ? 0.f : quad_sum(state.sum[r]);
    inverse[r] = sum == 0.f ? 0.f : 1.f / sum;
    const int query = first_query + row + 8 * r;
    if (lane % 4 == 0 && query < p.L) {
      const float lse = sum == 0.f ? -INFINITY : state.maximum[r] * p.scale + logf(sum);
      p.lse[(int64_t(work.batch) * p.q_heads + work.head) * p.L + query] = lse;
    }
  }
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 8; ++j)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = (row + 8 * r) * HEAD_DIM + (j ^ (row % 8)) * 8 + (lane % 4) * 2;
      *reinterpret_cast<uint32_t*>(shared_o + at) =
          pack(o[4 * j + 2 * r] * inverse[r], o[4 * j + 2 * r + 1] * inverse[r], Element());
    }
  named_sync(3 + group, 128);
  constexpr int kPieces = HEAD_DIM / 8, kRowsAtOnce = 128 / kPieces;
  const int piece = thread % kPieces;
  Element* out = static_cast<Element*>(p.out) + work.batch * p.out_stride_b + work.head * p.out_stride_h;
#pragma unroll
  for (int r = thread / kPieces; r < 64; r += kRowsAtOnce) {
    const int query = first_query + r;
    const uint4 data = *reinterpret_cast<const uint4*>(shared_o + r * HEAD_DIM + (piece ^ (r % 8)) * 8);
    if (query < p.L) *reinterpret_cast<uint4*>(out + query * p.out_stride_m + piece * 8) = data;
  }
  named_sync(3 + group, 128);
}

template <typename Element, int HEAD_DIM, int KEY_BLOCK>
__device__ __forceinline__ void consume(const AttendFwdParams& p, SharedStorage<Element, HEAD_DIM>& shared) {
  const int group = uniform(threadIdx.x / 128) - 1, lane = threadIdx.x % 32;
  const bool elected = threadIdx.x % 128 == 0;
  const Element* q = shared.q + group * 64 * kChunk;
  const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  float o[HEAD_DIM / 2], s[BLOCK_N / 2];
  uint32_t probabilities[BLOCK_N / 16][4];
  SoftmaxState state;
  float rescale[2];
  int step = 0;
  // Ping-pong: named barrier 1 + g lets warpgroup g issue its matrix products; group 0 goes first.
  if (group == 1) named_arrive(1, kConsumers);

  for (int turn = 0;; ++turn) {
    mbarrier_wait(&shared.work_full[turn & 1], (turn >> 1) & 1);
    const Work work = read_work(shared.work[turn & 1]);
    mbarrier_arrive(&shared.work_empty[turn & 1]);
    if (work.is_last) return;
    const int query = work.query_block * BLOCK_M + group * 64 + row;
    mbarrier_wait(&shared.q_full, turn & 1);
    if (work.count > 0) {
      int i = 0;
      auto stage = [&](int n) { return (step + n) % kStages; };
      auto phase = [&](int n) { return ((step + n) / kStages) & 1; };
      mbarrier_wait(&shared.k_full[stage(0)], phase(0));
      multiply_qk<Element, HEAD_DIM>(s, q, shared.k[stage(0)]);
      wgmma_wait<0>();
      pin(s);
      if (elected) mbarrier_arrive(&shared.k_empty[stage(0)]);
      if (work.masked > 0) mask_tile<KEY_BLOCK>(s, p, work, 0, query, lane);
      softmax_tile<true, true>(s, state, rescale, p.scale_log2);
      pack_tile<Element>(probabilities, s);
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 2; ++j) o[j] = 0.f;

      auto visit = [&](auto masked) {
        constexpr bool kMasked = decltype(masked)::value;
        mbarrier_wait(&shared.k_full[stage(i)], phase(i));
        named_sync(1 + group, kConsumers);
        multiply_qk<Element, HEAD_DIM>(s, q, shared.k[stage(i)]);
        mbarrier_wait(&shared.v_full[stage(i - 1)], phase(i - 1));
        multiply_pv<Element, HEAD_DIM>(o, probabilities, shared.v[stage(i - 1)]);
        named_arrive(2 - group, kConsumers);
        wgmma_wait<1>();
        pin(s);
        if (elected) mbarrier_arrive(&shared.k_empty[stage(i)]);
        if constexpr (kMasked) mask_tile<KEY_BLOCK>(s, p, work, i, query, lane);
        softmax_tile<false, kMasked>(s, state, rescale, p.scale_log2);
        // A test that never fires keeps the exponentials here, while the matrix unit works on P V:
        // left alone, ptxas moves the wait above them.
        if (state.sum[0] + state.sum[1] < 0.f) __trap();
        wgmma_wait<0>();
        pin(o);
        if (elected) mbarrier_arrive(&shared.v_empty[stage(i - 1)]);
        pack_tile<Element>(probabilities, s);
        // A warp whose maxima all stand multiplies by one: leave it out.
        if (__any_sync(0xffffffff, rescale[0] != 1.f || rescale[1] != 1.f)) rescale_output<HEAD_DIM>(o, rescale);
      };
#pragma unroll 1
      for (i = 1; i < work.masked; ++i) visit(True{});
#pragma unroll 1
      for (; i < work.count; ++i) visit(False{});

      if (elected) mbarrier_arrive(&shared.q_empty);
      mbarrier_wait(&shared.v_full[stage(i - 1)], phase(i - 1));
      multiply_pv<Element, HEAD_DIM>(o, probabilities, shared.v[stage(i - 1)]);
      wgmma_wait<0>();
      pin(o);
      if (elected) mbarrier_arrive(&shared.v_empty[stage(i - 1)]);
    } else {
      if (elected) mbarrier_arrive(&shared.q_empty);
#pragma unroll
      for (int j = 0; j < HEAD_DIM / 2; ++j) o[j] = 0.f;
    }
    store_tile<Element, HEAD_DIM>(p, work, o, state, shared.o + group * 64 * HEAD_DIM, group, work.count == 0);
    step += work.count;
  }
}

template <typename Element, int HEAD_DIM, int KEY_BLOCK>
__global__ void __launch_bounds__(kThreads, 1)
    attend_fwd_kernel(const __grid_constant__ AttendFwdParams p, const __grid_constant__ CUtensorMap map_q,
                      const __grid_constant__ CUtensorMap map_k, const __grid_constant__ CUtensorMap map_v) {
  extern __shared__ char raw[];
  auto& shared = *reinterpret_cast<SharedStorage<Element, HEAD_DIM>*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~uintptr_t(1023));
  if (threadIdx.x == 0) {
    mbarrier_init(&shared.q_full, 1);
    mbarrier_init(&shared.q_empty, 2);
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(&shared.k_full[s], 1);
      mbarrier_init(&shared.k_empty[s], 2);
      mbarrier_init(&shared.v_full[s], 1);
      mbarrier_init(&shared.v_empty[s], 2);
    }
    for (int s = 0; s < 2; ++s) {
      mbarrier_init(&shared.work_full[s], 1);
      mbarrier_init(&shared.work_empty[s], kConsumers);
    }
    mbarrier_init_fence();
    prefetch_tensor_map(&map_q);
    prefetch_tensor_map(&map_k);
    prefetch_tensor_map(&map_v);
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x < 32) produce<Element, HEAD_DIM, KEY_BLOCK>(p, &map_q, &map_k, &map_v, shared);
  } else {
    keep_registers<kConsumerRegisters>();
    consume<Element, HEAD_DIM, KEY_BLOCK>(p, shared);
  }
}

}  // namespace sparse_attn::hopper
