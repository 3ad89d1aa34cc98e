// The two matrix products of attention, both with *lanes across queries* (forward, dq) or across keys
// (dk, dv): a panel is [length][kPanel] floats, the other operand is rows as they lie in memory, read one
// element at a time and broadcast. So K and V need no packing, single keys ("columns") cost the same as
// whole blocks, and a row's maximum and sum are plain vector operations.
#pragma once

#include "simd.h"

namespace sparse_attn {
namespace {

// Row j of a run: base + (index ? index[j] : j) * stride.
struct RowRun {
  const float* base;
  int64_t stride;
  const int32_t* index;

  const float* operator[](int64_t j) const { return base + (index ? index[j] : j) * stride; }
};

// -- rows . panel ----------------------------------------------------------------------------------------

// out[r][lane] = sum_d row[r][d] * panel[d][lane]; `top` takes the maximum over r.
template <int R>
__attribute__((noinline)) void dot_rows(const RowRun& rows, int64_t first, int width, const float* panel,
                                        float* out, Vec* top) {
  const float* row[R];
  for (int r = 0; r < R; ++r) row[r] = rows[first + r];
  Vec acc[R][2] = {};
#pragma GCC unroll 2
  for (int64_t d = 0; d < width; ++d) {
    Vec left = load(panel + d * kPanel), right = load(panel + d * kPanel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      acc[r][0] += left * row[r][d];
      acc[r][1] += right * row[r][d];
    }
  }
  out += first * kPanel;
  Vec best[2] = {top[0], top[1]};  // in registers: for all the compiler knows, `out` might overlap `top`
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(out + r * kPanel, acc[r][0]);
    store(out + r * kPanel + kLanes, acc[r][1]);
    best[0] = max(acc[r][0], best[0]);
    best[1] = max(acc[r][1], best[1]);
  }
  top[0] = best[0], top[1] = best[1];
}

// -- panel . rows ----------------------------------------------------------------------------------------

// target[c][lane] = target[c][lane] * keep[lane] + sum_j rows[j][c] * panel[j][lane] for R values of c.
template <int R>
__attribute__((noinline)) void add_rows(const RowRun& rows, int64_t count, int first, const float* panel, const Vec* keep,
                     float* target) {
  target += static_cast<int64_t>(first) * kPanel;
  Vec acc[R][2] = {};  // the run's own sum: added at the end, it rounds less than a running total
  auto step = [&](const float* row, const float* p) __attribute__((always_inline)) {
    Vec left = load(p), right = load(p + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      acc[r][0] += left * row[r];
      acc[r][1] += right * row[r];
    }
  };
  if (rows.index) {
    for (int64_t j = 0; j < count; ++j) step(rows[j] + first, panel + j * kPanel);
  } else {
    const float* row = rows.base + first;
    for (int64_t j = 0; j < count; ++j, row += rows.stride) step(row, panel + j * kPanel);
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
    store(target + r * kPanel, load(target + r * kPanel) * keep[0] + acc[r][0]);
    store(target + r * kPanel + kLanes, load(target + r * kPanel + kLanes) * keep[1] + acc[r][1]);
  }
}

// -- strips ------------------------------------------------------------------------------------------------

// Calls run.template operator()<R>(first) on strips of at most kRows that cover 0 .. count-1. A short rest
// is evened out with the strip before it: four accumulator rows keep the FMA units busy, one does not.
template <int R, class F>
inline void run_strip(int rows, int64_t first, const F& run) {
  if constexpr (R > 0) {
    if (rows == R) {
      run.template operator()<R>(first);
    } else {
      run_strip<R - 1>(rows, first, run);
    }
  }
}

template <class F>
inline void for_strips(int64_t count, const F& run) {
  int64_t first = 0;
  while (count - first >= 2 * kRows || count - first == kRows) {
    run.template operator()<kRows>(first);
    first += kRows;
  }
  int rest = static_cast<int>(count - first);  // below 2 * kRows
  if (rest > kRows) {
    int half = rest - kRows >= kRows / 2 ? kRows : (rest + 1) / 2;
    run_strip<kRows>(half, first, run);
    first += half, rest -= half;
  }
  if (rest > 0) run_strip<kRows>(rest, first, run);
}

// Memory that the next tile reads, asked for a few lines at a time between the strips of this one: in one
// burst the requests would hold up the loads of the products. (EPYC 7003, D 128, 6 tiles a row: 70 -> 83
// GFLOPS; the burst gained nothing.)
struct Prefetch {
  static constexpr int kLinesAStrip = 6;
  const char *next[2] = {}, *end[2] = {};

  void aim(int which, const float* from, int64_t floats) {
    next[which] = reinterpret_cast<const char*>(from);
    end[which] = next[which] + floats * 4;
  }

  void step() {
    for (int which = 0; which < 2; ++which) {
      for (int i = 0; i < kLinesAStrip && next[which] < end[which]; ++i, next[which] += 64) {
        __builtin_prefetch(next[which], 0, 2);
      }
    }
  }
};

// out[j][lane] = rows[j] . panel[:, lane] for j < count; `top` takes the maximum.
inline void rows_dot_panel(const RowRun& rows, int64_t count, int width, const float* panel, float* out,
                           Vec* top, Prefetch& ahead) {
  for_strips(count, [&]<int R>(int64_t first) {
    ahead.step();
    dot_rows<R>(rows, first, width, panel, out, top);
  });
}

// target[c][lane] = target[c][lane] * keep[lane] + sum_j rows[j][c] * panel[j][lane] for c < width.
inline void add_rows_panel(const RowRun& rows, int64_t count, int width, const float* panel,
                           const Vec* keep, float* target, Prefetch& ahead) {
  for_strips(width, [&]<int R>(int64_t first) {
    ahead.step();
    add_rows<R>(rows, count, static_cast<int>(first), panel, keep, target);
  });
}

}  // namespace
}  // namespace sparse_attn
