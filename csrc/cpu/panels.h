// Moving rows into panels and back, and the exponentials between the two matrix products.
#pragma once

#include "microkernel.h"

namespace sparse_attn {
namespace {

constexpr int kChunk = 128;    // keys (dq, forward) or queries (dk, dv) handled between two products
constexpr int kMaxWidth = 256;  // largest head size

inline int64_t num_panels(int64_t lanes) { return (lanes + kPanel - 1) / kPanel; }
inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// Hands out 64-byte aligned parts of a task's scratch, or only counts them (base null).
struct Arena {
  float* base;
  int64_t used = 0;

  float* take(int64_t floats) {
    float* part = base ? base + used : nullptr;
    used += (floats + 15) / 16 * 16;
    return part;
  }
};

// Asks for rows that are about to be transposed: a transpose touches many lines before it ends one.
template <bool kForWriting>
inline void prefetch_rows(const RawRows& rows, int64_t first, int64_t count, int width) {
  for (int64_t i = 0; i < count; ++i) {
    const char* row = static_cast<const char*>(row_of(rows, first + i));
    for (int at = 0; at < width * element_size(rows.dtype); at += 64) {
      __builtin_prefetch(row + at, kForWriting ? 1 : 0, 3);
    }
  }
}

// panel[d][lane] = source[row(lane)][d] for `lanes` rows; the other lanes are 0.
// row(lane) = index ? index[lane] : first + lane. rows: scratch [kPanel][width].
inline void load_panel(const RawRows& source, const int32_t* index, int64_t first, int lanes, int width,
                       float* rows, float* panel) {
  if (lanes == kPanel && !index && source.dtype == DType::kFloat32) {
    const float* in_place = static_cast<const float*>(row_of(source, first));
    transpose(in_place, source.stride, kPanel, width, panel, kPanel);
    return;
  }
  if (lanes < kPanel) memset(rows, 0, sizeof(float) * kPanel * width);
  for (int i = 0; i < lanes; ++i) {
    const void* row = row_of(source, index ? index[i] : first + i);
    widen(row, source.dtype, width, rows + static_cast<int64_t>(i) * width);
  }
  transpose(rows, width, kPanel, width, panel, kPanel);
}

// The inverse: row first + lane of `target` = panel[:, lane].
inline void store_panel(const float* panel, int lanes, int width, float* rows, const RawRows& target,
                        int64_t first) {
  if (lanes == kPanel && target.dtype == DType::kFloat32) {
    float* in_place = static_cast<float*>(const_cast<void*>(row_of(target, first)));
    transpose(panel, kPanel, width, kPanel, in_place, target.stride);
    return;
  }
  transpose(panel, kPanel, width, kPanel, rows, width);
  for (int i = 0; i < lanes; ++i) {
    void* row = const_cast<void*>(row_of(target, first + i));
    narrow(rows + static_cast<int64_t>(i) * width, target.dtype, width, row);
  }
}

// Every panel of a run of rows.
inline void load_panels(const RawRows& source, const int32_t* index, int64_t first, int64_t count, int width,
                        float* rows, float* panels) {
  for (int64_t done = 0; done < count; done += kPanel) {
    int lanes = static_cast<int>(min64(kPanel, count - done));
    load_panel(source, index ? index + done : nullptr, first + done, lanes, width, rows,
               panels + done * width);
  }
}

// Vectors of one value a lane, from memory that may end before the panel does.
inline void load_lanes(const float* source, int lanes, float fill, Vec* target) {
  float padded[kPanel];
  for (int i = 0; i < kPanel; ++i) padded[i] = i < lanes ? source[i] : fill;
  target[0] = load(padded);
  target[1] = load(padded + kLanes);
}

// Where a row is masked lane by lane: lane i sees row j when i >= from[j], or (kLaneIsKey) i <= upto[j].
struct LaneIota {
  Int left = iota(), right = iota() + kLanes;
};

inline Int splat_int(int64_t x) {
  x = x < -1 ? -1 : x > kPanel ? kPanel : x;
  return Int{} + static_cast<int32_t>(x);
}

// One step of online softmax over scores [count][kPanel], in place. A logit is score * factor, factor > 0;
// `top` is the maximum of the scores, m and l are the running maximum of the logits and the sum of a lane.
// Returns in `keep` what older sums shrink by. Out of line: it needs every register.
__attribute__((noinline)) inline void softmax_panel(float* scores, int64_t count, float factor,
                                                    const Vec* top, float* m, float* l, Vec* keep) {
  Vec base[2], sums[2][2] = {};  // sums of even and odd rows: short sums round less
  for (int half = 0; half < 2; ++half) {
    Vec before = load(m + half * kLanes);
    Vec now = max(top[half] * factor, before);
    base[half] = select(now == -kInf, Vec{}, now);  // exp(-inf - -inf) would be nan
    keep[half] = exp_nonpositive(before - base[half]);
    store(m + half * kLanes, now);
  }
  auto weigh = [&](float* row, Vec* sum) __attribute__((always_inline)) {
    for (int half = 0; half < 2; ++half) {
      Vec weight = exp_nonpositive(load(row + half * kLanes) * factor - base[half]);
      store(row + half * kLanes, weight);
      sum[half] += weight;
    }
  };
  int64_t j = 0;
  for (; j + 1 < count; j += 2) {
    weigh(scores + j * kPanel, sums[0]);
    weigh(scores + (j + 1) * kPanel, sums[1]);
  }
  if (j < count) weigh(scores + j * kPanel, sums[0]);
  for (int half = 0; half < 2; ++half) {
    store(l + half * kLanes, load(l + half * kLanes) * keep[half] + (sums[0][half] + sums[1][half]));
  }
}

}  // namespace
}  // namespace sparse_attn
