// Forward with its two products on AMX tiles (tiles.h). Keys come in groups of 32 that lie at multiples of
// 32; those of a run's groups that are outside the run score -inf.
//
// The weights of a run are computed on vectors, a few at a time, while the tiles compute the value product of
// the run before and the scores of the run after.
#pragma once

#include "forward.h"
#include "tiles.h"

namespace sparse_attn {
namespace {

#if defined(SPARSE_ATTN_TILES)

// Weights of a panel's scores, two keys at a step: exp, sums, and pieces as B tiles take them.
template <int kPieces>
struct Weigher {
  const float* scored;
  uint16_t* weights;  // [group][piece][lane half] tiles
  float factor;
  Vec base[2], even[2], odd[2];
  int64_t done, pairs;

  __attribute__((always_inline)) void step() {
    uint16_t* to = weights + done / 16 * kPieces * 2 * kTileItems + done % 16 * 32;
    for (int half = 0; half < 2; ++half) {
      const float* row = scored + 2 * done * kPanel + half * kLanes;
      Vec low = exp_nonpositive(load(row) * factor - base[half]);
      Vec high = exp_nonpositive(load(row + kPanel) * factor - base[half]);
      even[half] += low, odd[half] += high;
      split_pair<kPieces, kPieces != 3>(low, high, to + half * kTileItems, 2 * kTileItems);
    }
    ++done;
  }

  void finish() {
    while (done < pairs) step();
  }
};

// Calls run(beside), where beside() takes a part of the weigher's steps: all of them in `calls` calls.
template <int kPieces, class F>
__attribute__((always_inline)) inline void run_beside(Weigher<kPieces>& weigher, int64_t calls, const F& run) {
  Weigher<kPieces> own = weigher;  // in registers
  int64_t credit = 0;
  run([&]() __attribute__((always_inline)) {
    for (credit += own.pairs; credit > 0 && own.done < own.pairs; credit -= calls) own.step();
  });
  weigher = own;
}

// A scored run whose value product is still to come; seen == 0: none.
struct PendingRun {
  KeyRun run;
  int64_t p, seen = 0;
  const float* scored;
  Vec keep[2];
};

template <int kPieces>
struct TileForward : ForwardLoop<TileForward<kPieces>> {
  using Base = ForwardLoop<TileForward<kPieces>>;
  using Base::ahead, Base::factor, Base::l, Base::m, Base::out, Base::panels, Base::q, Base::rows,
      Base::scratch_floats, Base::shape, Base::task;

  static constexpr int kWeightPieces = weight_pieces(kPieces);
  static constexpr int64_t kGroupWeights = kWeightPieces * 2 * kTileItems;  // a panel's for a group
  static constexpr int64_t kMaxGroups = kChunk / kTileKeys + 1;
  static constexpr int64_t kScoredRows = kMaxGroups * kTileKeys, kScoreBuffers = 2;
  const GroupShape group;
  uint16_t* queries;   // [panels][32 of D][piece][lane half] tiles
  uint16_t* weights;   // [2][group][piece][lane half] tiles: of two runs
  uint16_t* gathered;  // the groups of a run of columns
  float* sums;         // [32][kPanel]
  float* wide;         // scratch of pack_group
  PendingRun pending;
  Weigher<kWeightPieces> weigher{};  // of the pending run
  int parity = 0;

  TileForward(const Shape& shape, const ForwardTask& task, float* scratch) : Base(shape, task), group(shape) {
    Arena arena{scratch};
    Base::lay_out(arena);
    queries = take(arena, panels * query_items());
    weights = take(arena, 2 * kMaxGroups * kGroupWeights);
    gathered = take(arena, task.keys.num_columns ? kChunk / kTileKeys * group.items() : 0);
    sums = arena.take(32 * kPanel);
    wide = arena.take(pack_floats(shape));
    scratch_floats = arena.used;
  }

  static uint16_t* take(Arena& arena, int64_t items) {
    return reinterpret_cast<uint16_t*>(arena.take(items / 2));
  }

  int64_t query_items() const { return kPieces * group.d_tiles * 2 * kTileItems; }

  // False, and nothing done, where a query is not plain.
  bool run() {
    Base::load_queries();
    if (!split_queries()) return false;
    open_tiles();
    Base::attend();
    close_tiles();
    return true;
  }

  bool split_queries() {
    Plain plain;
    for (int64_t p = 0; p < panels; ++p) {
      const float* panel = q + p * shape.D * kPanel;
      for (int64_t pair = 0; pair < group.d_tiles * 16; ++pair) {
        for (int half = 0; half < 2; ++half) {
          int64_t d = 2 * pair;
          Vec low = d < shape.D ? load(panel + d * kPanel + half * kLanes) : Vec{};
          Vec high = d + 1 < shape.D ? load(panel + (d + 1) * kPanel + half * kLanes) : Vec{};
          plain.see(low), plain.see(high);
          int64_t tile = pair / 16 * kPieces * 2 + half;
          uint16_t* to = queries + p * query_items() + tile * kTileItems + pair % 16 * 32;
          split_pair<kPieces, true>(low, high, to, 2 * kTileItems);
        }
      }
    }
    return plain.all(Plain::kScores);
  }

  static int64_t lead(const KeyRun& run) { return run.index ? 0 : run.first % kTileKeys; }
  int64_t num_groups(const KeyRun& run, int64_t seen) const {
    return (lead(run) + seen + kTileKeys - 1) / kTileKeys;
  }
  const uint16_t* groups(const KeyRun& run) const {
    return run.index ? gathered : task.groups + run.first / kTileKeys * group.items();
  }

  void aim(int64_t block) {
    int64_t first = block * shape.block_n / kTileKeys;
    int64_t end = (min64((block + 1) * shape.block_n, shape.S) + kTileKeys - 1) / kTileKeys;
    const float* from = reinterpret_cast<const float*>(task.groups + first * group.items());
    ahead.aim(0, from, min64(end - first, kMaxGroups) * group.items() / 2);
  }

  // Packs a run of columns.
  void begin(const KeyRun& run) {
    if (!run.index) return;
    if (pending.seen && pending.run.index) flush();
    for (int64_t from = 0; from < run.count; from += kTileKeys) {
      pack_group(shape, task.raw_k, task.raw_v, run.index + from, 0, min64(kTileKeys, run.count - from), wide,
                 gathered + from / kTileKeys * group.items());
    }
  }

  void multiply(const KeyRun& run, int64_t p, int64_t seen, float* target, Vec* best) {
    if (pending.seen && pending.scored == target) weigher.finish();
    int64_t count = num_groups(run, seen), before = lead(run);
    score_groups(run, p, count, before, before + seen, target, best);
  }

  // Scores of `count` groups and their maxima, -inf but for rows from .. to-1; beside them weights of the
  // pending run.
  __attribute__((noinline)) void score_groups(const KeyRun& run, int64_t p, int64_t count, int64_t from,
                                              int64_t to, float* target, Vec* best) {
    const uint16_t *keys = groups(run), *queries_of_panel = queries + p * query_items();
    settle_memory();
    auto score = [&](const auto& beside) __attribute__((always_inline)) {
      sparse_attn::score_groups<kPieces>(group, keys, count, queries_of_panel, target, beside, [&](int64_t g) {
        int64_t first = g * kTileKeys, end = first + kTileKeys;
        if (first < from || end > to) {
          fill_rows(target, first, from);
          fill_rows(target, max64(to, first), end);
        }
        raise(target + first * kPanel, best);
      });
    };
    if (weigher.done < weigher.pairs) {
      run_beside(weigher, steps_a_unit(count), score);
    } else {
      score([] {});
    }
    settle_memory();
  }

  // Steps of the two products of `count` groups.
  int64_t steps_a_unit(int64_t count) const {
    int64_t of_scores = group.d_tiles * num_pairs(kPieces, kPieces);
    return count * (of_scores + (group.c_tiles + 1) / 2 * num_pairs(kPieces, kWeightPieces));
  }

  // Maxima of a group's scores.
  static void raise(const float* scored, Vec* best) {
    Vec left[2] = {best[0], best[0]}, right[2] = {best[1], best[1]};
#pragma GCC unroll 4
    for (int j = 0; j < kTileKeys; j += 2) {
      for (int odd = 0; odd < 2; ++odd) {
        left[odd] = max(load(scored + (j + odd) * kPanel), left[odd]);
        right[odd] = max(load(scored + (j + odd) * kPanel + kLanes), right[odd]);
      }
    }
    best[0] = max(left[0], left[1]), best[1] = max(right[0], right[1]);
  }

  static void fill_rows(float* target, int64_t from, int64_t to) {
    for (int64_t i = from * kPanel; i < to * kPanel; ++i) target[i] = -kInf;
  }

  float* free_scores() {
    parity ^= 1;
    return Base::scores + parity * kScoredRows * kPanel;
  }

  // The value product of the run before, and beside it weights of this one.
  void absorb(const KeyRun& run, int64_t p, int64_t seen, const float* run_top, const float* scored) {
    const PendingRun before = pending;
    const uint16_t* before_weights = weigher.weights;
    if (before.seen) end_weights();
    pending.run = run, pending.p = p, pending.seen = seen, pending.scored = scored;
    begin_weights(run_top);
    if (before.seen) add_values(before, before_weights);
  }

  void flush() {
    if (pending.seen == 0) return;
    end_weights();
    add_values(pending, weigher.weights);
    pending.seen = 0;
  }

  // The start of softmax_panel, for the pending run.
  void begin_weights(const float* run_top) {
    weigher.scored = pending.scored, weigher.factor = factor;
    weigher.weights = weigher.weights == weights ? weights + kMaxGroups * kGroupWeights : weights;
    weigher.done = 0, weigher.pairs = num_groups(pending.run, pending.seen) * 16;
    float* m_of_panel = m + pending.p * kPanel;
    for (int half = 0; half < 2; ++half) {
      Vec before = load(m_of_panel + half * kLanes);
      Vec now = max(load(run_top + half * kLanes) * factor, before);
      weigher.base[half] = select(now == -kInf, Vec{}, now);  // exp(-inf - -inf) would be nan
      pending.keep[half] = exp_nonpositive(before - weigher.base[half]);
      weigher.even[half] = weigher.odd[half] = Vec{};
      store(m_of_panel + half * kLanes, now);
    }
  }

  void end_weights() {
    weigher.finish();
    for (int half = 0; half < 2; ++half) {
      float* sum = l + pending.p * kPanel + half * kLanes;
      store(sum, load(sum) * pending.keep[half] + (weigher.even[half] + weigher.odd[half]));
    }
  }

  __attribute__((noinline)) void add_values(const PendingRun& from, const uint16_t* from_weights) {
    float* panel = out + from.p * shape.Dv * kPanel;
    const uint16_t* values = groups(from.run) + group.key_items();
    int64_t count = num_groups(from.run, from.seen);
    auto add = [&](const auto& beside) __attribute__((always_inline)) {
      for (int64_t c = 0; c < group.c_tiles; c += 2) {
        ahead.step();
        settle_memory();
        const uint16_t* left = values + c * kPieces * kTileItems;
        if (c + 1 < group.c_tiles) {
          sum_values<kPieces, true>(group, left, count, from_weights, sums, beside);
        } else {
          sum_values<kPieces, false>(group, left, count, from_weights, sums, beside);
        }
        settle_memory();
        int64_t width = min64(32, shape.Dv - c * 16);
        for (int64_t i = 0; i < width; ++i) {
          float *row = panel + (c * 16 + i) * kPanel, *sum = sums + i * kPanel;
          store(row, load(row) * from.keep[0] + load(sum));
          store(row + kLanes, load(row + kLanes) * from.keep[1] + load(sum + kLanes));
        }
      }
    };
    if (weigher.done < weigher.pairs) {
      run_beside(weigher, steps_a_unit(count), add);
    } else {
      add([] {});
    }
  }
};

#endif

}  // namespace
}  // namespace sparse_attn
