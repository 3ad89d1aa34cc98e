// The online softmax of one warpgroup, on the register layout of its matrix instruction: thread t holds
// rows t / 32 * 16 + t % 32 / 4 (and 8 below) and, of every 8 columns, t % 4 * 2 and the next.
#pragma once
#include "tile.cuh"

namespace sparse_attn::hopper {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <typename Element>
__device__ __forceinline__ void pack_tile(uint32_t (&p)[BLOCK_N / 16][4], const float (&s)[BLOCK_N / 2]) {
#pragma unroll
  for (int i = 0; i < BLOCK_N / 16; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) p[i][j] = pack(s[8 * i + 2 * j], s[8 * i + 2 * j + 1], Element());
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Cut keys beyond the causal edge, beyond the sequence end, or in slots that hold no listed block.
template <int KEY_BLOCK>
__device__ __forceinline__ void mask_tile(float (&s)[BLOCK_N / 2], const AttendFwdParams& p,
                                          const Work& work, int stage, int query, int lane) {
  const int32_t* list = p.indices + work.list;
  const int first = work.first_entry<KEY_BLOCK>(stage);
  int end[2];  // of the keys that this thread's two queries may see
#pragma unroll
  for (int r = 0; r < 2; ++r) end[r] = p.is_causal ? min(p.S, query + 8 * r + p.S - p.L + 1) : p.S;
#pragma unroll
  for (int slot = 0; slot < BLOCK_N / KEY_BLOCK; ++slot) {
    const int block = first + slot < work.visible ? list[first + slot] : p.num_key_blocks;
    const int key = block * KEY_BLOCK + (lane % 4) * 2;
#pragma unroll
    for (int j = 0; j < KEY_BLOCK / 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (key + j * 8 + (e & 1) >= end[e >> 1]) s[4 * (slot * KEY_BLOCK / 8 + j) + e] = -INFINITY;
  }
}

struct True { static constexpr bool value = true; };
struct False { static constexpr bool value = false; };

struct SoftmaxState {
  float maximum[2], sum[2];  // of this thread's two rows; the sum covers this thread's columns only
};

// s becomes exp(s - max); returns in `rescale` what the accumulators must be multiplied by.
template <bool kFirst, bool kMasked>
__device__ __forceinline__ void softmax_tile(float (&s)[BLOCK_N / 2], SoftmaxState& state, float (&rescale)[2],
                                             float scale_log2) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float tile_max = fmaxf(s[2 * r], s[2 * r + 1]);
#pragma unroll
    for (int j = 1; j < BLOCK_N / 8; ++j) tile_max = fmaxf(tile_max, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
    tile_max = quad_max(tile_max);
    const float before = state.maximum[r];
    const float now = kFirst ? tile_max : fmaxf(before, tile_max);
    const float used = kMasked && now == -INFINITY ? 0.f : now;
    rescale[r] = kFirst ? 0.f : exp2_fast((before - used) * scale_log2);
    const float shift = used * scale_log2;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < BLOCK_N / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[4 * j + 2 * r + e];
        x = exp2_fast(fmaf(x, scale_log2, -shift));
        sum += x;
      }
    state.sum[r] = kFirst ? sum : state.sum[r] * rescale[r] + sum;
    state.maximum[r] = now;
  }
}

template <int HEAD_DIM>
__device__ __forceinline__ void rescale_output(float (&o)[HEAD_DIM / 2], const float (&rescale)[2]) {
#pragma unroll
  for (int j = 0; j < HEAD_DIM / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) o[4 * j + e] *= rescale[e >> 1];
}

}  // namespace sparse_attn::hopper
