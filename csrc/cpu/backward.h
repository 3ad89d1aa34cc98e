// Backward in two passes that share nothing, so that no two threads write one number: dq of a query
// block (lanes are queries), then dk and dv of a run of keys (lanes are keys). Both recompute
// P = exp(S - lse), and dS = P * (dP - delta) * scale.
#pragma once

#include "forward.h"

namespace sparse_attn {
namespace {

struct BackwardQuery {
  const Shape& shape;
  const BackwardQueryTask& task;
  int64_t panels, scratch_floats;
  float *q, *grad_out, *dq;  // [panels][D or Dv][kPanel]
  float *p, *dp;             // [kChunk][kPanel]
  float* rows;
  Prefetch ahead;

  BackwardQuery(const Shape& shape, const BackwardQueryTask& task, float* scratch) : shape(shape), task(task) {
    scratch_floats = lay_out({scratch});
  }

  int64_t lay_out(Arena arena) {
    panels = num_panels(task.num_queries);
    q = arena.take(panels * shape.D * kPanel);
    grad_out = arena.take(panels * shape.Dv * kPanel);
    dq = arena.take(panels * shape.D * kPanel);
    p = arena.take(kChunk * kPanel);
    dp = arena.take(kChunk * kPanel);
    rows = arena.take(static_cast<int64_t>(kPanel) * (shape.D > shape.Dv ? shape.D : shape.Dv));
    return arena.used;
  }

  void run() {
    load_panels(task.q, nullptr, task.first_query, task.num_queries, shape.D, rows, q);
    load_panels(task.grad_out, nullptr, task.first_query, task.num_queries, shape.Dv, rows, grad_out);
    memset(dq, 0, sizeof(float) * panels * shape.D * kPanel);
    for (int64_t t = 0; t < task.keys.num_blocks; ++t) {
      int64_t block = task.keys.blocks[t];
      if (task.kept && !task.kept[block]) continue;
      int64_t end = min64((block + 1) * shape.block_n, shape.S);
      for (int64_t first = block * shape.block_n; first < end; first += kChunk) {
        add_run({nullptr, first, min64(kChunk, end - first)});
      }
    }
    for (int64_t t = 0; t < task.keys.num_columns; t += kChunk) {
      int64_t count = min64(kChunk, task.keys.num_columns - t);
      add_run({task.keys.columns + t, 0, count});
    }
    for (int64_t i = 0; i < panels; ++i) finish(i);
  }

  void add_run(const KeyRun& run) {
    for (int64_t i = 0; i < panels; ++i) {
      int64_t first = task.first_query + i * kPanel;
      int lanes = static_cast<int>(min64(kPanel, task.num_queries - i * kPanel));
      int64_t limit = first + shape.S - shape.L;  // the last key that the first query sees
      int64_t seen = shape.is_causal ? seen_by(run, limit + lanes - 1) : run.count;
      if (seen == 0) continue;
      Vec unused[2] = {};
      rows_dot_panel(run.of(task.k), seen, shape.D, q + i * shape.D * kPanel, p, unused, ahead);
      rows_dot_panel(run.of(task.v), seen, shape.Dv, grad_out + i * shape.Dv * kPanel, dp, unused, ahead);
      Vec lse[2], delta[2];
      load_lanes(task.lse + first, lanes, kInf, lse);
      load_lanes(task.delta + first, lanes, 0.f, delta);
      bool masked = shape.is_causal && run.position(seen - 1) > limit;
      const LaneIota lane;
      for (int64_t j = 0; j < seen; ++j) {
        Int from = splat_int(masked ? run.position(j) - limit : 0);
        score_gradient(lane.left >= from, lse[0], delta[0], p + j * kPanel, dp + j * kPanel);
        score_gradient(lane.right >= from, lse[1], delta[1], p + j * kPanel + kLanes,
                       dp + j * kPanel + kLanes);
      }
      const Vec keep[2] = {splat(1.f), splat(1.f)};
      add_rows_panel(run.of(task.k), seen, shape.D, dp, keep, dq + i * shape.D * kPanel, ahead);
    }
  }

  // scores -> P in place, dP -> dS in place; both 0 where not visible or where a row attends nothing.
  void score_gradient(Int visible, Vec lse, Vec delta, float* scores, float* grad) const {
    visible &= lse != -kInf;
    Vec prob = select(visible, exp_nonpositive(load(scores) * shape.scale - lse), Vec{});
    store(scores, prob);
    store(grad, select(visible, prob * (load(grad) - delta) * shape.scale, Vec{}));
  }

  void finish(int64_t i) {
    int lanes = static_cast<int>(min64(kPanel, task.num_queries - i * kPanel));
    int64_t first = task.first_query + i * kPanel;
    RawRows target{task.dq, task.dq_stride, shape.dtype};
    store_panel(dq + i * shape.D * kPanel, lanes, shape.D, rows, target, first);
  }
};

struct BackwardKey {
  const Shape& shape;
  const BackwardKeyTask& task;
  int64_t panels, scratch_floats;
  float *k, *v, *dk, *dv;  // [panels][D or Dv][kPanel]
  float *p, *dp;           // [kChunk][kPanel]
  float* rows;
  Prefetch ahead;

  BackwardKey(const Shape& shape, const BackwardKeyTask& task, float* scratch) : shape(shape), task(task) {
    scratch_floats = lay_out({scratch});
  }

  int64_t lay_out(Arena arena) {
    panels = num_panels(task.num_keys);
    k = arena.take(panels * shape.D * kPanel);
    v = arena.take(panels * shape.Dv * kPanel);
    dk = arena.take(panels * shape.D * kPanel);
    dv = arena.take(panels * shape.Dv * kPanel);
    p = arena.take(kChunk * kPanel);
    dp = arena.take(kChunk * kPanel);
    rows = arena.take(static_cast<int64_t>(kPanel) * (shape.D > shape.Dv ? shape.D : shape.Dv));
    return arena.used;
  }

  void run() {
    load_panels(task.k, task.keys, task.first_key, task.num_keys, shape.D, rows, k);
    load_panels(task.v, task.keys, task.first_key, task.num_keys, shape.Dv, rows, v);
    memset(dk, 0, sizeof(float) * panels * shape.D * kPanel);
    memset(dv, 0, sizeof(float) * panels * shape.Dv * kPanel);
    for (int64_t s = 0; s < task.num_sources; ++s) {
      const QuerySource& source = task.sources[s];
      for (int64_t t = 0; t < source.num_blocks; ++t) {
        int64_t block = source.blocks ? source.blocks[t] : source.first_block + t;
        if (source.kept && !source.kept[block * source.kept_stride]) continue;
        int64_t end = min64((block + 1) * shape.block_m, shape.L);
        for (int64_t first = block * shape.block_m; first < end; first += kChunk) {
          for (int64_t i = 0; i < panels; ++i) add_queries(source, first, min64(first + kChunk, end), i);
        }
      }
    }
    for (int64_t i = 0; i < panels; ++i) {
      finish(i, dk + i * shape.D * kPanel, shape.D, task.dk, task.dk_stride, task.dk_sum);
      finish(i, dv + i * shape.Dv * kPanel, shape.Dv, task.dv, task.dv_stride, task.dv_sum);
    }
  }

  int64_t position(int64_t key) const { return task.keys ? task.keys[key] : task.first_key + key; }

  // Queries first .. end-1 against the keys of panel i.
  void add_queries(const QuerySource& source, int64_t first, int64_t end, int64_t i) {
    int lanes = static_cast<int>(min64(kPanel, task.num_keys - i * kPanel));
    int64_t shift = shape.S - shape.L;
    bool masked = false;
    if (shape.is_causal) {
      first = max64(first, position(i * kPanel) - shift);  // the first query that sees the first key
      masked = position(i * kPanel + lanes - 1) > first + shift;
    }
    int64_t count = end - first;
    if (count <= 0) return;
    RowRun q{source.q.base + first * source.q.stride, source.q.stride, nullptr};
    RowRun grad{source.grad_out.base + first * source.grad_out.stride, source.grad_out.stride, nullptr};
    Vec unused[2] = {};
    rows_dot_panel(q, count, shape.D, k + i * shape.D * kPanel, p, unused, ahead);
    rows_dot_panel(grad, count, shape.Dv, v + i * shape.Dv * kPanel, dp, unused, ahead);
    alignas(64) int32_t positions[kPanel];
    for (int lane = 0; lane < kPanel; ++lane) {
      positions[lane] = static_cast<int32_t>(position(min64(i * kPanel + lane, task.num_keys - 1)));
    }
    Int left, right;
    memcpy(&left, positions, sizeof left);
    memcpy(&right, positions + kLanes, sizeof right);
    for (int64_t j = 0; j < count; ++j) {
      int32_t limit = static_cast<int32_t>(masked ? first + j + shift : shape.S);
      float lse = source.lse[first + j], delta = source.delta[first + j];
      if (lse == -kInf) limit = -1;  // attends nothing
      score_gradient(left <= limit, lse, delta, p + j * kPanel, dp + j * kPanel);
      score_gradient(right <= limit, lse, delta, p + j * kPanel + kLanes, dp + j * kPanel + kLanes);
    }
    const Vec keep[2] = {splat(1.f), splat(1.f)};
    add_rows_panel(grad, count, shape.Dv, p, keep, dv + i * shape.Dv * kPanel, ahead);
    add_rows_panel(q, count, shape.D, dp, keep, dk + i * shape.D * kPanel, ahead);
  }

  void score_gradient(Int visible, float lse, float delta, float* scores, float* grad) const {
    Vec prob = select(visible, exp_nonpositive(load(scores) * shape.scale - lse), Vec{});
    store(scores, prob);
    store(grad, select(visible, prob * (load(grad) - delta) * shape.scale, Vec{}));
  }

  void finish(int64_t i, const float* panel, int width, void* target, int64_t stride, float* sums) {
    int lanes = static_cast<int>(min64(kPanel, task.num_keys - i * kPanel));
    transpose(panel, kPanel, width, kPanel, rows, width);
    for (int lane = 0; lane < lanes; ++lane) {
      int64_t key = position(i * kPanel + lane);
      float* row = rows + static_cast<int64_t>(lane) * width;
      float* sum = sums ? sums + key * width : nullptr;
      if (task.accumulate) {
        for (int c = 0; c < width; ++c) sum[c] += row[c];
        continue;
      }
      if (sum) {
        for (int c = 0; c < width; ++c) row[c] += sum[c];
      }
      narrow(row, shape.dtype, width, const_cast<void*>(row_of({target, stride, shape.dtype}, key)));
    }
  }
};

}  // namespace
}  // namespace sparse_attn
