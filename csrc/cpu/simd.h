// Vectors of float32 in the widest registers of the instruction set that this file is compiled for,
// written with GCC/Clang vector extensions. Everything lives in an unnamed namespace: each instruction
// set gets its own copy.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "params.h"

namespace sparse_attn {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRows = 12;  // 12 x 2 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRows = 6;  // 6 x 2 accumulators of 16 registers
#else
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kRows = 12;
#else
constexpr int kRows = 6;
#endif
#endif
constexpr int kLanes = kVectorBytes / 4;
constexpr int kPanel = 2 * kLanes;  // queries (or keys) side by side

constexpr float kInf = __builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
typedef float LooseVec __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<LooseVec*>(p) = x; }
inline Vec splat(float x) { return Vec{} + x; }
inline Vec select(Int mask, Vec a, Vec b) { return mask ? a : b; }
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }

inline Int iota() {
  Int x;
  for (int i = 0; i < kLanes; ++i) x[i] = i;
  return x;
}

// e^x for x <= 0 (a little above is fine); exactly 0 below -87.33, where the result would be subnormal.
// NaN stays NaN. e^x = 2^n 2^f with |f| <= 1/2; the polynomial for 2^f is minimax in relative error
// (2e-9). The whole is within 1.2 units in the last place for x > -5 and within |x| / 8 + 1 of them below,
// where a term weighs e^x in a sum. Degree 5 (9e-8) is 1 % faster, and was seen to miss the tolerance.
inline Vec exp_nonpositive(Vec x) {
  constexpr float kMagic = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  Vec t = x * kLog2E + kMagic;
  Vec f = x * kLog2E - (t - kMagic);  // one rounding where the product is fused
  Vec y = f * 0.0001534944021841511f + 0.0013398876180872321f;
  y = y * f + 0.009618452750146389f;
  y = y * f + 0.055503327399492264f;
  y = y * f + 0.24022647738456726f;
  y = y * f + 0.6931471824645996f;
  y = y * f + 1.f;
  Int bits = (Int)y + ((Int)t << 23);  // casts between vectors keep the bits
  return (Vec)(bits & ~(x < -87.33f));
}

// -- conversions -------------------------------------------------------------------------------------

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

inline float half_to_float(uint16_t h) {
  uint32_t magnitude = to_bits(from_bits((h & 0x7fffu) << 13) * 0x1p112f);  // exact, subnormals too
  magnitude |= (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;                 // inf and nan
  return from_bits(magnitude | (h & 0x8000u) << 16);
}

inline uint16_t float_to_half(float x) {
  uint32_t bits = to_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  uint32_t tiny = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);  // rounds at 2^-24
  uint32_t h = magnitude < 0x38800000u ? tiny : normal;
  h = magnitude >= 0x477ff000u ? 0x7c00u : h;  // 65520 and up
  h = magnitude > 0x7f800000u ? 0x7e00u : h;
  return static_cast<uint16_t>(h | sign);
}

inline uint16_t float_to_bfloat16(float x) {
  uint32_t bits = to_bits(x);
  uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline int element_size(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline const void* row_of(const RawRows& rows, int64_t row) {
  return static_cast<const char*>(rows.base) + row * rows.stride * element_size(rows.dtype);
}

inline void widen(const void* source, DType dtype, int width, float* target) {
  if (dtype == DType::kFloat32) {
    memcpy(target, source, sizeof(float) * width);
  } else if (dtype == DType::kBFloat16) {
    const uint16_t* x = static_cast<const uint16_t*>(source);
    for (int i = 0; i < width; ++i) target[i] = from_bits(static_cast<uint32_t>(x[i]) << 16);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(source);
    for (int i = 0; i < width; ++i) target[i] = half_to_float(x[i]);
  }
}

inline void narrow(const float* source, DType dtype, int width, void* target) {
  if (dtype == DType::kFloat32) {
    memcpy(target, source, sizeof(float) * width);
  } else if (dtype == DType::kBFloat16) {
    uint16_t* x = static_cast<uint16_t*>(target);
    for (int i = 0; i < width; ++i) x[i] = float_to_bfloat16(source[i]);
  } else {
    uint16_t* x = static_cast<uint16_t*>(target);
    for (int i = 0; i < width; ++i) x[i] = float_to_half(source[i]);
  }
}

// -- transposes between rows and panels ----------------------------------------------------------------

#if defined(__AVX2__)
// 8 x 8 floats, from rows `from_stride` apart to rows `to_stride` apart.
inline void transpose_8x8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  __m256 r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
#endif

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < cols.
inline void transpose(const float* from, int64_t from_stride, int rows, int cols, float* to,
                      int64_t to_stride) {
  int done_rows = 0, done_cols = 0;
#if defined(__AVX2__)
  done_rows = rows & ~7, done_cols = cols & ~7;
  for (int i = 0; i < done_rows; i += 8) {
    for (int j = 0; j < done_cols; j += 8) {
      transpose_8x8(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
  }
#endif
  for (int i = 0; i < rows; ++i) {
    for (int j = i < done_rows ? done_cols : 0; j < cols; ++j) {
      to[j * to_stride + i] = from[i * from_stride + j];
    }
  }
}

}  // namespace
}  // namespace sparse_attn
