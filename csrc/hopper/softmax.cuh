// The online softmax of one warpgroup, on the register layout of its matrix instruction: thread t holds
// rows t / 32 * 16 + t % 32 / 4 (and 8 below) and, of every 8 columns, t % 4 * 2 and the next.
#pragma once
#include <float.h>

#include "tile.cuh"

namespace sparse_attn::hopper {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
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

// Columns [16 first, 16 last) of the tile as the left operand of P V.
template <typename Element, int STEPS>
__device__ __forceinline__ void pack_steps(uint32_t (&p)[STEPS][4], const float (&s)[8 * STEPS], int first, int last) {
#pragma unroll
  for (int i = first; i < last; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) p[i][j] = pack(s[8 * i + 2 * j], s[8 * i + 2 * j + 1], Element());
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ln(sum 2^shift), -inf where the sum is 0. lg2.approx is good to 2^-22 between 1 and 2, so the power of two goes apart.
// (sum - sum) is 0, or NaN where the sum is.
__device__ __forceinline__ float log_sum(float sum, float shift) {
  constexpr float kLn2 = 0.69314718f;
  const int bits = __float_as_int(sum);
  float log2;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(__int_as_float((bits & 0x007fffff) | 0x3f800000)));
  const float power = float((bits >> 23) - 127);
  return sum == 0.f ? -INFINITY : fmaf(shift, kLn2, fmaf(power, kLn2, log2 * kLn2)) + (sum - sum);
}

// Where the keys end that this thread's two queries may see.
__device__ __forceinline__ void key_ends(int (&end)[2], const AttendFwdParams& p, int query) {
#pragma unroll
  for (int r = 0; r < 2; ++r) end[r] = p.is_causal ? min(p.S, query + 8 * r + p.S - p.L + 1) : p.S;
}

// Cut keys beyond the causal edge, beyond the sequence end, or in slots that hold no block of this warpgroup's list.
// first_query: of the warpgroup, whose rows all see a block that this one sees whole.
template <typename K, int SCORES, int ENTRIES>
__device__ __forceinline__ void mask_blocks(float (&s)[SCORES], const AttendFwdParams& p, const int (&words)[ENTRIES],
                                            int first_query, int group) {
  constexpr int kOctets = SCORES / 4 / ENTRIES;  // groups of 8 keys, of a block or of half a block
  const int lane = threadIdx.x % 32;
  int end[2], first_end[2];
  key_ends(end, p, first_query + threadIdx.x % 128 / 32 * 16 + lane / 4);
  key_ends(first_end, p, first_query);
#pragma unroll
  for (int e = 0; e < ENTRIES; ++e) {
    const bool is_listed = !K::HALVES || (words[e] >> group & 1);
    const int first = (K::HALVES ? words[e] >> 2 : words[e]) * K::KEY_BLOCK;
    if (is_listed && first + K::KEY_BLOCK <= first_end[0]) continue;
    const int key = is_listed ? first + lane % 4 * 2 : kNoKey - K::BLOCK_N;
#pragma unroll
    for (int j = 0; j < kOctets; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (key + j * 8 + (c & 1) >= end[c >> 1]) s[4 * (e * kOctets + j) + c] = -INFINITY;
  }
}

// The same for single keys.
template <int SCORES>
__device__ __forceinline__ void mask_columns(float (&s)[SCORES], const AttendFwdParams& p, const int* keys,
                                             int query, int lane) {
  int end[2];
  key_ends(end, p, query);
#pragma unroll
  for (int j = 0; j < SCORES / 4; ++j) {
    const int2 pair = *reinterpret_cast<const int2*>(keys + j * 8 + lane % 4 * 2);
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if ((c & 1 ? pair.y : pair.x) >= end[c >> 1]) s[4 * j + c] = -INFINITY;
  }
}

struct SoftmaxState {
  float maximum[2];  // that the exponentials of this thread's two rows are relative to; -inf: none yet
  float sum[2];      // of this thread's columns only
  float limit[2];    // with SKIP only: the least score that keeps a tile
};

// The largest of this thread's scores in its two rows: in four chains a row, since each step takes the time of several.
template <int SCORES>
__device__ __forceinline__ void thread_maxima(float (&maximum)[2], const float (&s)[SCORES]) {
  constexpr int kChains = 4;
  float x[2][kChains];
#pragma unroll
  for (int i = 0; i < SCORES / 4; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float pair = fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]);
      x[r][i % kChains] = i < kChains ? pair : fmaxf(x[r][i % kChains], pair);
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) maximum[r] = fmaxf(fmaxf(x[r][0], x[r][1]), fmaxf(x[r][2], x[r][3]));
}

// What `of_two` and `of_three` leave of the bits of each of the thread's two rows, in four chains.
template <typename Bits, int SCORES, typename F, typename G>
__device__ __forceinline__ void reduce_bits(Bits (&left)[2], const float (&s)[SCORES], F of_two, G of_three) {
  constexpr int kChains = 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    Bits x[kChains];
#pragma unroll
    for (int i = 0; i < SCORES / 4; ++i) {
      const Bits a = __float_as_int(s[4 * i + 2 * r]), b = __float_as_int(s[4 * i + 2 * r + 1]);
      x[i % kChains] = i < kChains ? of_two(a, b) : of_three(x[i % kChains], a, b);
    }
    left[r] = of_two(of_three(x[0], x[1], x[2]), x[3]);
  }
}

// The bits of floats compare as integers do where one is not negative, and the other way round where both are; and of
// integers one instruction takes the largest of three. So this is the largest score of each of the thread's two rows, unless
// all are negative, and a number that has the sign bit then.
template <int SCORES>
__device__ __forceinline__ void largest_bits(int (&largest)[2], const float (&s)[SCORES]) {
  reduce_bits(largest, s, [](int a, int b) { return max(a, b); },
              [](int a, int b, int c) { return __vimax3_s32(a, b, c); });
}

// The largest score of each row, from what `largest_bits` found.
template <int SCORES>
__device__ __forceinline__ void largest_scores(float (&largest)[2], const int (&bits)[2], const float (&s)[SCORES]) {
  unsigned least[2];
  reduce_bits(least, s, [](unsigned a, unsigned b) { return min(a, b); },
              [](unsigned a, unsigned b, unsigned c) { return __vimin3_u32(a, b, c); });
#pragma unroll
  for (int r = 0; r < 2; ++r) largest[r] = bits[r] < 0 ? __uint_as_float(least[r]) : __int_as_float(bits[r]);
}

// Whether, in the warp, a score passes the maximum of its row by `headroom`, or maybe: where that is a negative number.
__device__ __forceinline__ bool may_pass(const int (&bits)[2], const SoftmaxState& state, const AttendFwdParams& p) {
  bool passes = false;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int limit = __float_as_int(state.maximum[r] + p.headroom);
    passes |= limit < 0 || bits[r] > limit;
  }
  return __any_sync(0xffffffff, passes);
}

// The maxima move only when a score passes them by `headroom` (a factor of 2^8): sums and products stay far from
// overflow, and what a row gained since is divided out at the end. Returns, for the whole warp, whether they moved,
// and then in `rescale` what the accumulators must be multiplied by.
template <bool kFirst, bool kMaybeNone>
__device__ __forceinline__ bool move_maxima(const float (&largest)[2], SoftmaxState& state, float (&rescale)[2],
                                            const AttendFwdParams& p) {
  const bool moves = kFirst || __any_sync(0xffffffff, largest[0] > state.maximum[0] + p.headroom ||
                                                          largest[1] > state.maximum[1] + p.headroom);
  if (moves) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float before = state.maximum[r], row = quad_max(largest[r]);
      const float now = kFirst ? row : fmaxf(before, row);
      const float used = kMaybeNone && now == -INFINITY ? 0.f : now;
      rescale[r] = kFirst ? 0.f : exp2_fast((before - used) * p.scale_log2);
      state.sum[r] = kFirst ? 0.f : state.sum[r] * rescale[r];
      state.maximum[r] = now;
    }
  }
  return moves;
}

// What a query may vote with before it has seen a key; one past the end always votes to skip.
__device__ __forceinline__ float least_limit(const AttendFwdParams& p, int query) {
  return query < p.L ? -FLT_MAX : INFINITY;
}

// s becomes exp(s - maximum), is added to the sums, and goes to `probabilities`, whose registers the product in
// flight still reads: after a part of them, `finish_product` waits for its end.
//   kMaybeNone    a row may have seen no key at all.
//   kFinishAfter  which part: one in so many.
template <typename Element, bool kMaybeNone, int kFinishAfter, int STEPS, typename F>
__device__ __forceinline__ void exponentials(float (&s)[8 * STEPS], uint32_t (&probabilities)[STEPS][4],
                                             SoftmaxState& state, float scale_log2, F finish_product) {
  constexpr int kPairs = 2 * STEPS, kGroup = 4;  // of a row
  constexpr int kFinishAt = kPairs / kFinishAfter < kGroup ? kGroup : kPairs / kFinishAfter;
  float shift[2];
#pragma unroll
  for (int r = 0; r < 2; ++r)
    shift[r] = (kMaybeNone && state.maximum[r] == -INFINITY ? 0.f : state.maximum[r]) * scale_log2;
#pragma unroll
  for (int group = 0; group < kPairs; group += kGroup) {
    if (group == kFinishAt) {
      finish_product();
      pack_steps<Element>(probabilities, s, 0, group / 2);
    }
#pragma unroll
    for (int i = group; i < group + kGroup; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[4 * i + 2 * r + e];
          x = exp2_fast(fmaf(x, scale_log2, -shift[r]));
          state.sum[r] += x;
        }
    if (group >= kFinishAt) pack_steps<Element>(probabilities, s, group / 2, (group + kGroup) / 2);
    // Plus zero, to no other end than that the next group follows this one: left alone, ptxas lets the special
    // function unit wait for all products.
#pragma unroll
    for (int r = 0; r < 2; ++r) shift[r] = fmaf(s[4 * group + 2 * r], 0.f, shift[r]);
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
