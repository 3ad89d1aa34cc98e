// Forward of one query block: panels of queries against the listed keys, online softmax. `ForwardLoop` is
// the walk over the keys, `Forward` its matrix products on vectors; forward_tiles.h has those on AMX tiles.
#pragma once

#include "panels.h"

namespace sparse_attn {
namespace {

// A run of keys that follow one another in a list: a block or part of one, or some columns.
struct KeyRun {
  const int32_t* index;  // key positions; null: first, first + 1, ...
  int64_t first, count;

  int64_t position(int64_t j) const { return index ? index[j] : first + j; }
  RowRun of(const Rows& rows) const {
    return {rows.base + (index ? 0 : first) * rows.stride, rows.stride, index};
  }
};

// How many leading keys of the run some query sees whose causal limit is `last_seen`.
inline int64_t seen_by(const KeyRun& run, int64_t last_seen) {
  if (!run.index) return max64(0, min64(run.count, last_seen - run.first + 1));
  int64_t count = run.count;
  while (count > 0 && run.index[count - 1] > last_seen) --count;
  return count;
}

// `Products` (a class derived from this one) has
//   multiply: scores of the first `seen` keys of a run, and their maxima;
//   absorb: softmax and value product of scored keys, now or by the next `flush`;
//   begin: called before a run of columns or of a block is scored;
//   aim: what the next block reads, for `ahead`;
//   kScoredRows, lead: rows of a run's scores, and how many lie before its first key's;
//   kScoreBuffers: runs whose scores are in use at a time.
template <class Products>
struct ForwardLoop {
  const Shape& shape;
  const ForwardTask& task;
  int64_t panels, scratch_floats;
  float *q, *out;      // [panels][D or Dv][kPanel]
  float *m, *l, *top;  // [panels][kPanel]
  float* scores;       // [kScoreBuffers, or with a skip the panels][kScoredRows][kPanel]
  float* rows;         // [kPanel][max(D, Dv)]
  float factor;        // a logit is a score * factor; > 0, so that the largest score is the largest logit
  Prefetch ahead;

  ForwardLoop(const Shape& shape, const ForwardTask& task) : shape(shape), task(task) {}

  Products& self() { return static_cast<Products&>(*this); }

  void lay_out(Arena& arena) {
    panels = num_panels(task.num_queries);
    q = arena.take(panels * shape.D * kPanel);
    out = arena.take(panels * shape.Dv * kPanel);
    m = arena.take(panels * kPanel);
    l = arena.take(panels * kPanel);
    top = arena.take(panels * kPanel);
    int64_t buffers = max64(Products::kScoreBuffers, task.has_skip ? panels : 1);
    scores = arena.take(buffers * Products::kScoredRows * kPanel);
    rows = arena.take(static_cast<int64_t>(kPanel) * (shape.D > shape.Dv ? shape.D : shape.Dv));
  }

  void load_queries() {
    prefetch_rows<false>(task.q, task.first_query, task.num_queries, shape.D);
    load_panels(task.q, nullptr, task.first_query, task.num_queries, shape.D, rows, q);
    fold_sign();
  }

  void attend() {
    memset(out, 0, sizeof(float) * panels * shape.Dv * kPanel);
    memset(l, 0, sizeof(float) * panels * kPanel);
    for (int64_t i = 0; i < panels * kPanel; ++i) m[i] = -kInf;
    for (int64_t t = 0; t < task.keys.num_blocks; ++t) {
      if (t + 1 < task.keys.num_blocks) {
        self().aim(task.keys.blocks[t + 1]);
      } else {
        prefetch_rows<true>({task.out, task.out_stride, shape.dtype}, task.first_query, task.num_queries,
                            shape.Dv);
      }
      attend_block(task.keys.blocks[t]);
    }
    for (int64_t t = 0; t < task.keys.num_columns; t += kChunk) {
      int64_t count = min64(kChunk, task.keys.num_columns - t);
      attend_run({task.keys.columns + t, 0, count});
    }
    self().flush();
    for (int64_t p = 0; p < panels; ++p) finish(p);
  }

  // Where the scale is not positive, its sign goes to the queries.
  void fold_sign() {
    factor = shape.scale == 0.f ? 1.f : __builtin_fabsf(shape.scale);
    if (shape.scale > 0.f) return;
    float sign = shape.scale < 0.f ? -1.f : 0.f;
    for (int64_t i = 0; i < panels * shape.D * kPanel; ++i) q[i] *= sign;
  }

  void attend_block(int64_t block) {
    int64_t first = block * shape.block_n, count = min64(shape.block_n, shape.S - first);
    if (task.has_skip) {
      if (may_skip(first, count)) return;
      if (task.kept) task.kept[block] = 1;
      if (count <= kChunk) {  // the scores of the vote are still there
        KeyRun run{nullptr, first, count};
        for (int64_t p = 0; p < panels; ++p) {
          int64_t seen = seen_by(run, last_seen(p));
          if (seen > 0) self().absorb(run, p, seen, top + p * kPanel, scores_of(p));
        }
        return;
      }
    } else if (task.kept) {
      task.kept[block] = 1;
    }
    for (int64_t done = 0; done < count; done += kChunk) {
      attend_run({nullptr, first + done, min64(kChunk, count - done)});
    }
  }

  void attend_run(const KeyRun& run) {
    self().begin(run);
    for (int64_t p = 0; p < panels; ++p) {
      alignas(64) float run_top[kPanel];
      for (float& x : run_top) x = -kInf;
      float* scored = self().free_scores();
      int64_t seen = score(run, p, run_top, scored);
      if (seen > 0) self().absorb(run, p, seen, run_top, scored);
    }
  }

  float* scores_of(int64_t p) { return scores + p * Products::kScoredRows * kPanel; }
  int64_t aligned_key(int64_t query) const { return query + shape.S - shape.L; }
  int64_t first_seen_limit(int64_t p) const { return aligned_key(task.first_query + p * kPanel); }

  // The last key that the last query of panel p sees.
  int64_t last_seen(int64_t p) const {
    if (!shape.is_causal) return shape.S - 1;
    int64_t end = min64((p + 1) * kPanel, task.num_queries);
    return aligned_key(task.first_query + end - 1);
  }

  // Scores of panel p, -inf beyond the causal edge; raises run_top. Returns how many keys were scored.
  int64_t score(const KeyRun& run, int64_t p, float* run_top, float* target) {
    int64_t seen = seen_by(run, last_seen(p));
    if (seen == 0) return 0;
    Vec best[2] = {load(run_top), load(run_top + kLanes)};
    const Vec before[2] = {best[0], best[1]};
    self().multiply(run, p, seen, target, best);
    int64_t limit = first_seen_limit(p);
    if (shape.is_causal && run.position(seen - 1) > limit) {
      best[0] = before[0], best[1] = before[1];
      const LaneIota lane;
      for (int64_t j = 0; j < seen; ++j) {
        float* row = target + (Products::lead(run) + j) * kPanel;
        Int from = splat_int(run.position(j) - limit);  // the first query that sees key j
        Vec left = select(lane.left >= from, load(row), splat(-kInf));
        Vec right = select(lane.right >= from, load(row + kLanes), splat(-kInf));
        store(row, left);
        store(row + kLanes, right);
        best[0] = max(left, best[0]);
        best[1] = max(right, best[1]);
      }
    }
    store(run_top, best[0]);
    store(run_top + kLanes, best[1]);
    return seen;
  }

  // The vote of `Plan`: whether every query of the block has its largest logit in this tile below its
  // running maximum plus skip_below, or sees no key of it. Leaves the tile's maxima in `top`, and its
  // scores too where they fit.
  bool may_skip(int64_t first, int64_t count) {
    for (int64_t i = 0; i < panels * kPanel; ++i) top[i] = -kInf;
    for (int64_t done = 0; done < count; done += kChunk) {
      KeyRun run{nullptr, first + done, min64(kChunk, count - done)};
      for (int64_t p = 0; p < panels; ++p) score(run, p, top + p * kPanel, scores_of(p));
    }
    for (int64_t i = 0; i < task.num_queries; ++i) {
      if (!(top[i] * factor < m[i] + task.skip_below || top[i] == -kInf)) return false;
    }
    return true;
  }

  void finish(int64_t p) {
    int64_t first = task.first_query + p * kPanel;
    int lanes = static_cast<int>(min64(kPanel, task.num_queries - p * kPanel));
    float* panel = out + p * shape.Dv * kPanel;
    for (int half = 0; half < 2; ++half) {
      Vec sum = load(l + p * kPanel + half * kLanes);
      Vec inverse = select(sum == 0.f, Vec{}, 1.f / sum);
      for (int64_t c = 0; c < shape.Dv; ++c) {
        float* row = panel + c * kPanel + half * kLanes;
        store(row, load(row) * inverse);
      }
    }
    for (int i = 0; i < lanes; ++i) {
      float sum = l[p * kPanel + i];
      task.lse[first + i] = sum == 0.f ? -kInf : m[p * kPanel + i] + __builtin_logf(sum);
    }
    store_panel(panel, lanes, shape.Dv, rows, {task.out, task.out_stride, shape.dtype}, first);
  }
};

struct Forward : ForwardLoop<Forward> {
  static constexpr int64_t kScoredRows = kChunk, kScoreBuffers = 1;

  Forward(const Shape& shape, const ForwardTask& task, float* scratch) : ForwardLoop(shape, task) {
    Arena arena{scratch};
    lay_out(arena);
    scratch_floats = arena.used;
  }

  static int64_t lead(const KeyRun&) { return 0; }
  void begin(const KeyRun&) {}
  void flush() {}
  float* free_scores() { return scores; }

  void run() {
    load_queries();
    attend();
  }

  void aim(int64_t block) {
    int64_t first = block * shape.block_n, count = min64(min64(shape.block_n, shape.S - first), kChunk);
    ahead.aim(0, task.k.base + first * task.k.stride, count * task.k.stride);
    ahead.aim(1, task.v.base + first * task.v.stride, count * task.v.stride);
  }

  void multiply(const KeyRun& run, int64_t p, int64_t seen, float* target, Vec* best) {
    rows_dot_panel(run.of(task.k), seen, shape.D, q + p * shape.D * kPanel, target, best, ahead);
  }

  // Softmax and value product of the scored keys.
  void absorb(const KeyRun& run, int64_t p, int64_t seen, const float* run_top, float* scored) {
    const Vec best[2] = {load(run_top), load(run_top + kLanes)};
    Vec keep[2];
    softmax_panel(scored, seen, factor, best, m + p * kPanel, l + p * kPanel, keep);
    add_rows_panel(run.of(task.v), seen, shape.Dv, scored, keep, out + p * shape.Dv * kPanel, ahead);
  }
};

}  // namespace
}  // namespace sparse_attn
