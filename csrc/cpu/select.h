// AnchorAttention's selection: what the anchor gives a block of queries (Pool), and which keys some queries
// that speak for a superblock want (Lister). Keys are rows and queries lanes, as in the forward pass.
#pragma once

#include "panels.h"

namespace sparse_attn {
namespace {

typedef int32_t LooseInt __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));

inline Int load_int(const int32_t* p) { return *reinterpret_cast<const LooseInt*>(p); }

// Bit i is set where lane i of the mask is.
inline uint32_t lane_bits(Int mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

inline RowRun rows_from(const Rows& rows, int64_t first) {
  return {rows.base + first * rows.stride, rows.stride, nullptr};
}

// Raises the maximum m by x_j, a <= j < z, and adds exp(x_j - m) to the sum l; read(j) gives x_j.
template <class F>
inline void fold(int64_t a, int64_t z, bool wants_sum, Vec& m, Vec& l, const F& read) {
  Vec top = m;
  for (int64_t j = a; j < z; ++j) top = max(read(j), top);
  if (wants_sum) {
    Vec base = select(top == -kInf, Vec{}, top);  // exp(-inf - -inf) would be nan
    l *= exp_nonpositive(m - base);
    for (int64_t j = a; j < z; ++j) l += exp_nonpositive(read(j) - base);
  }
  m = top;
}

// -- the anchor of a query block ---------------------------------------------------------------------------

struct Pool {
  const Shape& shape;
  const PoolTask& task;
  int64_t panels, scratch_floats;
  float *q, *scores, *rows;
  Prefetch ahead;

  Pool(const Shape& shape, const PoolTask& task, float* scratch) : shape(shape), task(task) {
    Arena arena{scratch};
    panels = num_panels(task.num_queries);
    q = arena.take(panels * shape.D * kPanel);
    scores = arena.take(kChunk * kPanel);
    rows = arena.take(static_cast<int64_t>(kPanel) * shape.D);
    scratch_floats = arena.used;
  }

  void run() {
    load_panels(task.q, nullptr, task.first_query, task.num_queries, shape.D, rows, q);
    for (int64_t i = 0; i < panels * shape.D * kPanel; ++i) q[i] *= shape.scale;
    average();
    double sum = 0;
    for (int64_t p = 0; p < panels; ++p) {
      Vec m[2] = {splat(-kInf), splat(-kInf)}, l[2] = {};
      int64_t first_limit = task.first_query + p * kPanel + shape.S - shape.L;
      int64_t lanes = min64(kPanel, task.num_queries - p * kPanel), end = first_limit + lanes;
      attend_keys(p, 0, min64(task.init_end, end), first_limit, m, l);
      attend_keys(p, task.local, end, first_limit, m, l);
      for (int64_t i = 0; i < lanes; ++i) {
        float top = m[i / kLanes][i % kLanes], total = l[i / kLanes][i % kLanes];
        sum += !task.is_lse || top == -kInf ? top : top + __builtin_logf(total);
      }
    }
    *task.anchor = static_cast<float>(sum / static_cast<double>(task.num_queries));
  }

  void average() {
    for (int64_t d = 0; d < shape.D; ++d) {
      Vec sum = {};
      for (int64_t p = 0; p < panels; ++p) {
        const float* row = q + (p * shape.D + d) * kPanel;
        sum += load(row) + load(row + kLanes);
      }
      float total = 0;
      for (int i = 0; i < kLanes; ++i) total += sum[i];
      task.mean[d] = total / static_cast<float>(task.num_queries);
    }
  }

  void attend_keys(int64_t p, int64_t begin, int64_t end, int64_t first_limit, Vec* m, Vec* l) {
    for (int64_t first = begin; first < end; first += kChunk) {
      int64_t count = min64(kChunk, end - first);
      Vec top[2] = {splat(-kInf), splat(-kInf)};
      rows_dot_panel(rows_from(task.k, first), count, shape.D, q + p * shape.D * kPanel, scores, top, ahead);
      bool cut = first + count - 1 > first_limit;
      const LaneIota lane;
      for (int half = 0; half < 2; ++half) {
        if (!cut && !task.is_lse) {
          m[half] = max(top[half], m[half]);
          continue;
        }
        const float* column = scores + half * kLanes;
        if (!cut) {
          fold(0, count, true, m[half], l[half], [&](int64_t j) { return load(column + j * kPanel); });
          continue;
        }
        Int number = half ? lane.right : lane.left;
        fold(0, count, task.is_lse, m[half], l[half], [&](int64_t j) {
          Int from = splat_int(first + j - first_limit);  // the first query that sees the key
          return select(number >= from, load(column + j * kPanel), splat(-kInf));
        });
      }
    }
  }
};

// -- the keys that speakers want ---------------------------------------------------------------------------

// A lane is a superblock: speaker r of superblock s is lane s % kLanes of vector r * width + s / kLanes. So
// what a superblock's speakers have in common is taken over vectors, never across lanes.
struct Lister {
  const ListTask& task;
  int64_t width, vectors, panels;
  int64_t end, most_offered, least_stop, least_seen;  // keys
  bool is_given;
  int64_t scratch_floats;
  float *q, *scores;
  float *m, *l, *reference;       // [vectors][kLanes]
  float* least;                   // [width][kLanes]: minus theta
  int32_t *seen, *stop, *counts;  // [vectors][kLanes], [width][kLanes] twice
  Prefetch ahead;

  Lister(const ListTask& task, float* scratch) : task(task) {
    is_given = task.reference == Reference::kGiven;
    width = task.R == 1 ? 2 : 1;
    vectors = task.R * width;
    panels = (vectors + 1) / 2;
    Arena arena{scratch};
    int64_t chunks = is_given ? 1 : (task.S + kChunk - 1) / kChunk;
    q = arena.take(panels * task.D * kPanel);
    scores = arena.take(chunks * panels * kChunk * kPanel);
    m = arena.take(vectors * kLanes), l = arena.take(vectors * kLanes);
    reference = arena.take(vectors * kLanes);
    least = arena.take(width * kLanes);
    seen = reinterpret_cast<int32_t*>(arena.take(vectors * kLanes));
    stop = reinterpret_cast<int32_t*>(arena.take(width * kLanes));
    counts = reinterpret_cast<int32_t*>(arena.take(width * kLanes));
    scratch_floats = arena.used;
  }

  void run() {
    set_up();
    if (is_given) {
      for (int64_t first = task.begin; first < most_offered; first += kChunk) {
        int64_t count = min64(kChunk, most_offered - first);
        score(first, count, scores);
        mark(first, first, first + count, scores);
      }
      return;
    }
    for (int64_t first = 0; first < end; first += kChunk) {
      int64_t count = min64(kChunk, end - first);
      score(first, count, chunk_at(first));
      refer(first, count);
    }
    finish_reference();
    if (!task.theta) {
      double mass[kPanel][kThetaSteps + 1] = {};
      measure(mass);
      choose_thetas(mass);
    }
    for_offered([&](int64_t first, int64_t a, int64_t z, const float* chunk) { mark(first, a, z, chunk); });
  }

  // -- geometry

  int64_t slot(int64_t s, int64_t r) const { return (r * width + s / kLanes) * kLanes + s % kLanes; }

  float* chunk_at(int64_t first) { return scores + first / kChunk * panels * kChunk * kPanel; }

  const float* column(const float* chunk, int64_t vector) const {
    return chunk + vector / 2 * kChunk * kPanel + vector % 2 * kLanes;
  }

  template <class F>
  void for_offered(const F& run) {
    for (int64_t first = task.begin / kChunk * kChunk; first < most_offered; first += kChunk) {
      run(first, max64(first, task.begin), min64(first + kChunk, most_offered), chunk_at(first));
    }
  }

  void set_up() {
    memset(q, 0, sizeof(float) * panels * task.D * kPanel);
    end = 0, most_offered = 0, least_stop = least_seen = task.S;
    for (int64_t s = 0; s < task.num; ++s) {
      most_offered = max64(most_offered, task.stop[s]);
      least_stop = min64(least_stop, task.stop[s]);
      for (int64_t r = 0; r < task.R; ++r) {
        int64_t sees = task.seen[s * task.R + r];
        end = max64(end, sees);
        if (sees > 0) least_seen = min64(least_seen, sees);
      }
    }
    // Lanes without a speaker see everything and want nothing (finish_reference).
    for (int64_t i = 0; i < vectors * kLanes; ++i) {
      seen[i] = static_cast<int32_t>(end), m[i] = -kInf, l[i] = 0, reference[i] = kInf;
    }
    for (int64_t i = 0; i < width * kLanes; ++i) {
      stop[i] = static_cast<int32_t>(most_offered), counts[i] = 0, least[i] = 0;
    }
    for (int64_t s = 0; s < task.num; ++s) {
      stop[s] = static_cast<int32_t>(task.stop[s]);
      if (task.theta) least[s] = -task.theta[s];
      for (int64_t r = 0; r < task.R; ++r) set_up_speaker(s, r);
    }
  }

  void set_up_speaker(int64_t s, int64_t r) {
    int64_t number = s * task.R + r, at = slot(s, r);
    if (task.seen[number] == 0) return;
    seen[at] = static_cast<int32_t>(task.seen[number]);
    counts[s] += 1;
    if (is_given) reference[at] = task.given[number];
    float* panel = q + at / kPanel * task.D * kPanel + at % kPanel;
    for (int64_t d = 0; d < task.D; ++d) panel[d * kPanel] = task.speakers[number * task.D + d];
  }

  // -- logits and what they are compared with

  void score(int64_t first, int64_t count, float* chunk) {
    for (int64_t p = 0; p < panels; ++p) {
      Vec top[2] = {};
      rows_dot_panel(rows_from(task.k, first), count, task.D, q + p * task.D * kPanel,
                     chunk + p * kChunk * kPanel, top, ahead);
    }
  }

  // Takes keys first .. first + count - 1 into the maximum and the sum of every speaker that refers to them.
  void refer(int64_t first, int64_t count) {
    bool of_all = task.reference == Reference::kLseOfAll;
    int64_t stop_plain = of_all ? least_seen : min64(task.begin, least_seen);
    int64_t cut_from = max64(first, of_all ? least_seen : least_stop), z = first + count;
    bool wants_sum = task.reference != Reference::kMaxOfAnchor;
    const float* chunk = chunk_at(first);
    for (int64_t i = 0; i < vectors; ++i) {
      const float* x = column(chunk, i) - first * kPanel;
      Vec top = load(m + i * kLanes), sum = load(l + i * kLanes);
      fold(first, max64(first, min64(z, stop_plain)), wants_sum, top, sum,
           [&](int64_t j) { return load(x + j * kPanel); });
      if (cut_from < z) {
        Int until = load_int(seen + i * kLanes), from = of_all ? Int{} : load_int(stop + i % width * kLanes);
        fold(cut_from, z, wants_sum, top, sum, [&](int64_t j) {
          Int key = Int{} + static_cast<int32_t>(j);
          return select((key < until) & (key >= from), load(x + j * kPanel), splat(-kInf));
        });
      }
      store(m + i * kLanes, top), store(l + i * kLanes, sum);
    }
  }

  void finish_reference() {
    for (int64_t s = 0; s < task.num; ++s) {
      for (int64_t r = 0; r < task.R; ++r) {
        int64_t at = slot(s, r);
        if (task.seen[s * task.R + r] == 0 || m[at] == -kInf) continue;  // it wants nothing
        reference[at] = task.reference == Reference::kMaxOfAnchor ? m[at] : m[at] + __builtin_logf(l[at]);
      }
    }
  }

  // -- theta from the mass that is kept

  // mass[s][n]: by the least theta n * kThetaStep at which a superblock's speakers keep it for each other;
  // what only infinity keeps is left out, since only sums up to kThetaSteps are looked at.
  void measure(double (*mass)[kThetaSteps + 1]) {
    alignas(64) int32_t wanted[kPanel] = {};
    for (int64_t s = 0; s < task.num; ++s) wanted[s] = task.measured[s] ? -1 : 0;
    for (int64_t v = 0; v < width; ++v) {
      if (!lane_bits(load_int(wanted + v * kLanes))) continue;
      add_anchor(v, mass + v * kLanes);
      for_offered([&](int64_t first, int64_t a, int64_t z, const float* chunk) {
        add_offered(v, load_int(wanted + v * kLanes), first, a, z, chunk, mass + v * kLanes);
      });
    }
  }

  // The anchor's mass is always kept.
  void add_anchor(int64_t v, double (*mass)[kThetaSteps + 1]) {
    Int from = load_int(stop + v * kLanes);
    for (int64_t i = v; i < vectors; i += width) {
      Int until = load_int(seen + i * kLanes);
      Vec base = load(reference + i * kLanes), sum = {};
      auto add = [&](int64_t a, int64_t z) {
        for (int64_t j = a; j < z; ++j) {
          int64_t first = j / kChunk * kChunk;
          Vec x = load(column(chunk_at(first), i) + (j - first) * kPanel) - base;
          Int key = Int{} + static_cast<int32_t>(j);
          Int in_anchor = (key < until) & ((key < Int{} + static_cast<int32_t>(task.begin)) | (key >= from));
          sum += exp_nonpositive(select(in_anchor, x, splat(-kInf)));
        }
      };
      add(0, task.begin);
      add(least_stop, end);
      for (int s = 0; s < kLanes; ++s) mass[s][0] += sum[s];
    }
  }

  // For the speaker that wants a key most the second best speaks, for all others the best. Only the measured
  // lanes, and of them the keys that some finite theta keeps, come as far as an exponential.
  void add_offered(int64_t v, Int wanted, int64_t first, int64_t a, int64_t z, const float* chunk,
                   double (*mass)[kThetaSteps + 1]) {
    alignas(64) float best[kChunk * kLanes], second[kChunk * kLanes];
    for (int64_t i = v; i < vectors; i += width) {
      const float* x = column(chunk, i);
      Vec base = load(reference + i * kLanes);
      for (int64_t j = a - first; j < z - first; ++j) {
        Vec y = load(x + j * kPanel) - base, most = splat(-kInf), next = most;
        if (i != v) most = load(best + j * kLanes), next = load(second + j * kLanes);
        store(second + j * kLanes, max(select(y > most, most, y), next));
        store(best + j * kLanes, max(y, most));
      }
    }
    for (uint32_t lanes = lane_bits(wanted); lanes; lanes &= lanes - 1) {
      int s = __builtin_ctz(lanes);
      int64_t until = min64(z, stop[v * kLanes + s]);
      add_lane(v, s, a - first, until - first, chunk, best + s, second + s, mass[s]);
    }
  }

  void add_lane(int64_t v, int s, int64_t a, int64_t z, const float* chunk, const float* best,
                const float* second, double* mass) {
    int32_t keys[kChunk + 1];  // the keys of the chunk that count
    alignas(64) float y[kChunk] = {}, top[kChunk] = {}, total[kChunk] = {};
    int count = 0;
    for (int64_t j = a; j < z; ++j) {
      keys[count] = static_cast<int32_t>(j);
      count += best[j * kLanes] >= -kThetaStep * kThetaSteps;
    }
    for (int64_t i = v; i < vectors; i += width) {
      const float* x = column(chunk, i) + s;
      float base = reference[i * kLanes + s];
      for (int t = 0; t < count; ++t) y[t] = x[keys[t] * kPanel] - base;
      for (int t = 0; t < count; t += kLanes) {
        Vec weight = exp_nonpositive(load(y + t));
        store(total + t, load(total + t) + weight);
        store(top + t, max(weight, load(top + t)));
      }
    }
    for (int t = 0; t < count; ++t) {
      float next = second[keys[t] * kLanes];
      mass[least_theta(best[keys[t] * kLanes])] += total[t] - top[t];
      if (next >= -kThetaStep * kThetaSteps) mass[least_theta(next)] += top[t];
    }
  }

  // The number of the least theta with y >= -theta.
  static int least_theta(float y) {
    float steps = y * (-1 / kThetaStep);
    int whole = static_cast<int>(steps);
    whole += static_cast<float>(whole) < steps;
    return whole < 0 ? 0 : whole;
  }

  void choose_thetas(const double (*mass)[kThetaSteps + 1]) {
    KeptMass& kept = *task.kept;
    for (int64_t s = 0; s < task.num; ++s) {
      if (task.measured[s]) {
        for (int n = 0; n <= kThetaSteps; ++n) kept.mass[n] += mass[s][n];
        kept.speakers += counts[s];
      }
      double sum = 0;
      int n = 0;
      for (; n <= kThetaSteps; ++n) {
        sum += kept.mass[n];
        if (sum >= task.recall * kept.speakers) break;
      }
      least[s] = n > kThetaSteps ? -kInf : -kThetaStep * static_cast<float>(n);
    }
  }

  // -- hits

  // wants[j]: the superblocks, by bit, of which a speaker wants key j, for a <= j < z.
  void mark(int64_t first, int64_t a, int64_t z, const float* chunk) {
    alignas(64) float best[kChunk * kLanes];
    for (int64_t v = 0; v < width; ++v) {
      Vec enough = load(least + v * kLanes);
      for (int64_t i = v; i < vectors; i += width) {
        const float* x = column(chunk, i);
        Vec base = load(reference + i * kLanes);
        for (int64_t j = a - first; j < z - first; ++j) {
          Vec y = load(x + j * kPanel) - base;
          store(best + j * kLanes, max(y, i == v ? splat(-kInf) : load(best + j * kLanes)));
        }
      }
      for (int64_t j = a; j < z; ++j) {
        uint32_t bits = lane_bits(load(best + (j - first) * kLanes) >= enough) << (v * kLanes);
        task.wants[j] = v == 0 ? bits : task.wants[j] | bits;
      }
    }
  }
};

}  // namespace
}  // namespace sparse_attn
