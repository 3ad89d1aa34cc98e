// The operators of the CPU engine: sparse_attn_cpu::attend_fwd and attend_bwd. They check the lists, cut
// the call into tasks and run the kernels of the chosen instruction set on torch's threads.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "call.h"
#include "packing.h"

namespace sparse_attn {
namespace {

// -- forward ---------------------------------------------------------------------------------------------------

struct QueryTask {
  int64_t head;  // number of the key head among those worked on
  int64_t b, hq, block, first_query, num_queries, work;
};

// Query blocks of key heads `from .. to-1` (counted over batch and heads), cut into parts of at most
// `part` queries.
std::vector<QueryTask> query_tasks(const Call& call, int64_t from, int64_t to, int64_t part) {
  std::vector<QueryTask> tasks;
  for (int64_t head = from; head < to; ++head) {
    for (int64_t g = 0; g < call.gqa_group; ++g) {
      int64_t b = head / call.Hkv, hq = head % call.Hkv * call.gqa_group + g;
      for (int64_t block = 0; block < call.Lb; ++block) {
        KeyList keys = call.keys(b, hq, block);
        int64_t num_keys = keys.num_blocks * call.shape.block_n + keys.num_columns;
        int64_t first = block * call.shape.block_m;
        int64_t end = std::min(first + call.shape.block_m, call.shape.L);
        for (; first < end; first += part) {
          int64_t count = std::min(part, end - first);
          tasks.push_back({head - from, b, hq, block, first, count, count * num_keys});
        }
      }
    }
  }
  longest_first(tasks);
  return tasks;
}

// Which key blocks of a head some query block reads, by block or (where `columns` is set) by column.
std::vector<char> used_key_blocks(const Call& call, int64_t b, int64_t hkv, bool columns) {
  std::vector<char> used(call.Sb, 0);
  int64_t before = -1;
  for (int64_t g = 0; g < call.gqa_group; ++g) {
    int64_t hq = hkv * call.gqa_group + g, head = call.layout_head(b, hq);
    if (head == before) continue;
    before = head;
    for (int64_t block = 0; block < call.Lb; ++block) {
      KeyList keys = call.keys(b, hq, block);
      for (int64_t t = 0; t < keys.num_blocks; ++t) used[keys.blocks[t]] = 1;
      if (!columns) continue;
      for (int64_t t = 0; t < keys.num_columns; ++t) used[keys.columns[t] / call.shape.block_n] = 1;
    }
  }
  return used;
}

// Packs the used key blocks of key heads from .. to-1.
void pack_keys(const Call& call, const PackedHeads& k, const PackedHeads& v, int64_t from, int64_t to,
               int64_t num_threads) {
  if (!k.packs() && !v.packs()) return;
  std::vector<std::vector<char>> used;
  for (int64_t head = from; head < to; ++head) {
    used.push_back(used_key_blocks(call, head / call.Hkv, head % call.Hkv, true));
  }
  for_tasks((to - from) * call.Sb, num_threads, [&](int64_t, int64_t task) {
    int64_t slot = task / call.Sb, block = task % call.Sb, head = from + slot;
    if (!used[slot][block]) return;
    int64_t first = block * call.shape.block_n;
    int64_t count = std::min(call.shape.block_n, call.shape.S - first);
    k.pack(call.kernels, head / call.Hkv, head % call.Hkv, slot, first, count);
    v.pack(call.kernels, head / call.Hkv, head % call.Hkv, slot, first, count);
  });
}

// The forward of a call. Where the kernels pack keys in groups, a head's tasks read those; rows are packed
// for what is left: heads with few queries, and values that groups cannot hold.
struct ForwardRun {
  const Call& call;
  const Heads& result;
  float* lse;           // [B, Hq, L]
  uint8_t* kept;        // [B, Hq, Lb, Sb] or null
  const float* limits;  // [B * Hq] or null
  bool for_gradients;   // the backward's scores are those of rows, and lse must be theirs to the last bit
  int64_t num_threads, part, at_once = 0, scratch_floats = 0;
  std::unique_ptr<Buffer> scratch, groups;
  std::unique_ptr<PackedHeads> packed_k, packed_v;

  void run() {
    const Shape& shape = call.shape;
    int64_t num_heads = call.B * call.Hkv, tasks_per_head = call.gqa_group * ceil_div(shape.L, part);
    int64_t bytes = has_groups() ? 2 * head_items()
                                 : PackedHeads::head_bytes(call.k) + PackedHeads::head_bytes(call.v);
    at_once = heads_at_once(num_heads, tasks_per_head, bytes, num_threads);
    scratch_floats = call.kernels.forward_scratch(shape, part, limits != nullptr);
    if (has_groups()) scratch_floats = std::max(scratch_floats, call.kernels.group_scratch(shape));
    scratch_floats = round_up(scratch_floats);
    scratch = std::make_unique<Buffer>(num_threads * scratch_floats);
    for (int64_t from = 0; from < num_heads; from += at_once) {
      run_heads(from, std::min(from + at_once, num_heads));
    }
  }

  void run_heads(int64_t from, int64_t to) {
    std::vector<QueryTask> tasks = query_tasks(call, from, to, part);
    if (has_groups()) {
      std::vector<char> packed = pack_groups(from, to, tasks), done(tasks.size(), 0);
      for_tasks(tasks.size(), num_threads, [&](int64_t worker, int64_t number) {
        if (packed[tasks[number].head]) done[number] = attend(tasks[number], worker, true);
      });
      size_t left = 0;
      for (size_t i = 0; i < tasks.size(); ++i) {
        if (!done[i]) tasks[left++] = tasks[i];
      }
      tasks.resize(left);
      if (tasks.empty()) return;
    }
    if (!packed_k) {
      packed_k = std::make_unique<PackedHeads>(call.k, at_once);
      packed_v = std::make_unique<PackedHeads>(call.v, at_once);
    }
    pack_keys(call, *packed_k, *packed_v, from, to, num_threads);
    for_tasks(tasks.size(), num_threads,
              [&](int64_t worker, int64_t number) { attend(tasks[number], worker, false); });
  }

  bool attend(const QueryTask& t, int64_t worker, bool from_groups) const {
    int64_t hkv = t.hq / call.gqa_group, head = t.b * call.Hq + t.hq;
    ForwardTask task{};
    task.q = call.q.raw(t.b, t.hq);
    if (from_groups) {
      task.groups = head_groups(t.head);
      task.raw_k = call.k.raw(t.b, hkv), task.raw_v = call.v.raw(t.b, hkv);
    } else {
      task.k = packed_k->rows(t.b, hkv, t.head);
      task.v = packed_v->rows(t.b, hkv, t.head);
    }
    task.first_query = t.first_query, task.num_queries = t.num_queries;
    task.keys = call.keys(t.b, t.hq, t.block);
    task.has_skip = limits != nullptr;
    task.skip_below = limits ? limits[head] : 0.f;
    task.out = result.head(t.b, t.hq), task.out_stride = result.stride_row;
    task.lse = lse + head * call.shape.L;
    task.kept = kept ? kept + (head * call.Lb + t.block) * call.Sb : nullptr;
    task.scratch = scratch->data() + worker * scratch_floats;
    return call.kernels.forward(call.shape, task);
  }

  // -- groups

  bool has_groups() const { return call.kernels.group_keys > 0 && !for_gradients; }
  int64_t groups_per_head() const { return ceil_div(call.shape.S, call.kernels.group_keys); }
  int64_t head_items() const { return groups_per_head() * call.kernels.group_items(call.shape); }
  uint16_t* head_groups(int64_t slot) const {
    return reinterpret_cast<uint16_t*>(groups->data()) + slot * head_items();
  }

  // Packs the keys of heads from .. to-1 that are read often enough. Returns which heads can be used.
  std::vector<char> pack_groups(int64_t from, int64_t to, const std::vector<QueryTask>& tasks) {
    if (!groups) groups = std::make_unique<Buffer>(at_once * head_items() / 2);
    int64_t count = groups_per_head(), heads = to - from;
    std::vector<std::vector<char>> used;
    for (int64_t head = from; head < to; ++head) used.push_back(used_groups(head));
    std::vector<char> packed = often_read(used, tasks);
    std::vector<char> failed(heads * count, 0);
    for_tasks(heads * count, num_threads, [&](int64_t worker, int64_t task) {
      int64_t slot = task / count, group = task % count, head = from + slot;
      if (!packed[slot] || !used[slot][group]) return;
      int64_t b = head / call.Hkv, hkv = head % call.Hkv;
      uint16_t* target = head_groups(slot) + group * call.kernels.group_items(call.shape);
      float* own = scratch->data() + worker * scratch_floats;
      failed[task] =
          !call.kernels.pack_group(call.shape, call.k.raw(b, hkv), call.v.raw(b, hkv), group, own, target);
    });
    for (int64_t i = 0; i < heads * count; ++i) {
      if (failed[i]) packed[i / count] = 0;
    }
    return packed;
  }

  std::vector<char> used_groups(int64_t head) const {
    std::vector<char> used(groups_per_head(), 0);
    std::vector<char> blocks = used_key_blocks(call, head / call.Hkv, head % call.Hkv, false);
    for (int64_t block = 0; block < call.Sb; ++block) {
      if (!blocks[block]) continue;
      int64_t first = block * call.shape.block_n, end = std::min(first + call.shape.block_n, call.shape.S);
      int64_t group_keys = call.kernels.group_keys;
      std::fill(used.begin() + first / group_keys, used.begin() + ceil_div(end, group_keys), 1);
    }
    return used;
  }

  // Packing a key costs about what some 30 lanes of its products save.
  std::vector<char> often_read(const std::vector<std::vector<char>>& used,
                               const std::vector<QueryTask>& tasks) const {
    constexpr int64_t kLanesAKey = 64;
    std::vector<int64_t> gain(used.size(), 0);
    for (const QueryTask& t : tasks) {
      int64_t lanes = ceil_div(t.num_queries, call.kernels.lanes) * call.kernels.lanes;
      gain[t.head] += std::min(t.work / t.num_queries, call.shape.S) * lanes;
    }
    std::vector<char> often;
    for (size_t slot = 0; slot < used.size(); ++slot) {
      int64_t keys = std::count(used[slot].begin(), used[slot].end(), 1) * call.kernels.group_keys;
      often.push_back(gain[slot] >= kLanesAKey * keys);
    }
    return often;
  }
};

void attend_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                const Tensor& indices, const Tensor& bounds, const MaybeTensor& column_offsets,
                const MaybeTensor& column_indices, const MaybeTensor& column_bounds,
                const MaybeTensor& skip_below, int64_t batch, int64_t heads, int64_t block_m, int64_t block_n,
                int64_t column_group, bool is_causal, double scale, const Tensor& out, const Tensor& lse,
                const MaybeTensor& kept, bool for_gradients) {
  Call call = make_call(q, k, v, offsets, indices, bounds, column_offsets, column_indices, column_bounds,
                        batch, heads, block_m, block_n, column_group, is_causal, scale);
  const Heads result(out);
  ForwardRun run{call, result, static_cast<float*>(lse.data_ptr()),
                 kept ? static_cast<uint8_t*>(kept->data_ptr()) : nullptr,
                 skip_below ? skip_below->const_data_ptr<float>() : nullptr, for_gradients,
                 static_cast<int64_t>(torch::stable::get_num_threads()),
                 skip_below ? block_m : std::min(block_m, kTile)};
  run.run();
}

// -- backward --------------------------------------------------------------------------------------------------

struct Backward {
  const Call& call;
  Heads grad_out, dq, dk, dv;
  const float *lse, *delta;   // [B, Hq, L]
  const uint8_t* kept;        // [B, Hq, Lb, Sb] or null
  int64_t num_threads;

  // Packed rows of the heads worked on, and float32 sums that columns add to.
  PackedHeads packed_k, packed_v, packed_q, packed_grad;
  std::unique_ptr<Buffer> dk_sum, dv_sum;
  Buffer scratch;
  int64_t scratch_floats;

  struct KeyTask {
    int64_t head, b, hkv, block, first_key, num_keys, work;
  };

  void run_heads(int64_t from, int64_t to) {
    pack(from, to);
    if (call.lists.columns) add_columns(from, to);
    std::vector<QueryTask> queries = query_tasks(call, from, to, std::min(call.shape.block_m, kTile));
    std::vector<KeyTask> keys = key_tasks(from, to);
    int64_t num_queries = queries.size();
    for_tasks(num_queries + keys.size(), num_threads, [&](int64_t worker, int64_t number) {
      float* own = scratch.data() + worker * scratch_floats;
      if (number < num_queries) {
        run_queries(queries[number], own);
      } else {
        run_keys(keys[number - num_queries], own);
      }
    });
  }

  void pack(int64_t from, int64_t to) {
    pack_keys(call, packed_k, packed_v, from, to, num_threads);
    if (!packed_q.packs() && !packed_grad.packs()) return;
    int64_t group = call.gqa_group;
    for_tasks((to - from) * group * call.Lb, num_threads, [&](int64_t, int64_t task) {
      int64_t slot = task / call.Lb, first = task % call.Lb * call.shape.block_m;
      int64_t count = std::min(call.shape.block_m, call.shape.L - first);
      int64_t head = from * group + slot, b = head / call.Hq, hq = head % call.Hq;
      packed_q.pack(call.kernels, b, hq, slot, first, count);
      packed_grad.pack(call.kernels, b, hq, slot, first, count);
    });
  }

  void run_queries(const QueryTask& t, float* own) const {
    int64_t hkv = t.hq / call.gqa_group, head = t.b * call.Hq + t.hq;
    BackwardQueryTask task{};
    task.q = call.q.raw(t.b, t.hq), task.grad_out = grad_out.raw(t.b, t.hq);
    task.k = packed_k.rows(t.b, hkv, t.head), task.v = packed_v.rows(t.b, hkv, t.head);
    task.first_query = t.first_query, task.num_queries = t.num_queries;
    task.keys = call.keys(t.b, t.hq, t.block);
    task.lse = lse + head * call.shape.L, task.delta = delta + head * call.shape.L;
    task.kept = kept ? kept + (head * call.Lb + t.block) * call.Sb : nullptr;
    task.dq = dq.head(t.b, t.hq), task.dq_stride = dq.stride_row;
    task.scratch = own;
    call.kernels.backward_query(call.shape, task);
  }

  // Transposed row of key block `block` for a query head: the entries that see any of its keys.
  std::pair<const int32_t*, int64_t> query_blocks(int64_t b, int64_t hq, int64_t block) const {
    const List& lists = call.lists.transposed;
    int64_t row = call.layout_head(b, hq) * call.Sb + block, length = lists.length(row);
    int64_t skip = std::clamp<int64_t>(lists.bounds[2 * row], 0, length);
    return {lists.indices + lists.offsets[row] + skip, length - skip};
  }

  QuerySource source(int64_t b, int64_t hq, int64_t slot) const {
    int64_t head = b * call.Hq + hq, query_slot = slot * call.gqa_group + hq % call.gqa_group;
    QuerySource from{};
    from.q = packed_q.rows(b, hq, query_slot), from.grad_out = packed_grad.rows(b, hq, query_slot);
    from.lse = lse + head * call.shape.L, from.delta = delta + head * call.shape.L;
    return from;
  }

  std::vector<KeyTask> key_tasks(int64_t from, int64_t to) const {
    std::vector<KeyTask> tasks;
    for (int64_t head = from; head < to; ++head) {
      int64_t b = head / call.Hkv, hkv = head % call.Hkv;
      for (int64_t block = 0; block < call.Sb; ++block) {
        int64_t num_queries = 0;
        for (int64_t g = 0; g < call.gqa_group; ++g) {
          num_queries += query_blocks(b, hkv * call.gqa_group + g, block).second * call.shape.block_m;
        }
        int64_t first = block * call.shape.block_n;
        int64_t end = std::min(first + call.shape.block_n, call.shape.S);
        for (; first < end; first += kTile) {
          int64_t count = std::min(kTile, end - first);
          tasks.push_back({head - from, b, hkv, block, first, count, count * num_queries});
        }
      }
    }
    longest_first(tasks);
    return tasks;
  }

  BackwardKeyTask key_task(int64_t b, int64_t hkv, int64_t slot, float* own) const {
    BackwardKeyTask task{};
    task.k = call.k.raw(b, hkv), task.v = call.v.raw(b, hkv);
    task.dk = dk.head(b, hkv), task.dk_stride = dk.stride_row;
    task.dv = dv.head(b, hkv), task.dv_stride = dv.stride_row;
    if (dk_sum) {
      task.dk_sum = dk_sum->data() + slot * call.shape.S * call.shape.D;
      task.dv_sum = dv_sum->data() + slot * call.shape.S * call.shape.Dv;
    }
    task.scratch = own;
    return task;
  }

  void run_keys(const KeyTask& t, float* own) const {
    std::vector<QuerySource> sources;
    for (int64_t g = 0; g < call.gqa_group; ++g) {
      int64_t hq = t.hkv * call.gqa_group + g, head = t.b * call.Hq + hq;
      QuerySource from = source(t.b, hq, t.head);
      std::tie(from.blocks, from.num_blocks) = query_blocks(t.b, hq, t.block);
      if (kept) from.kept = kept + head * call.Lb * call.Sb + t.block, from.kept_stride = call.Sb;
      sources.push_back(from);
    }
    BackwardKeyTask task = key_task(t.b, t.hkv, t.head, own);
    task.first_key = t.first_key, task.num_keys = t.num_keys;
    task.sources = sources.data(), task.num_sources = sources.size();
    call.kernels.backward_key(call.shape, task);
  }

  // dk and dv of the columns, into the sums. A task owns a range of keys of one head and adds to them in
  // the order of heads and column rows.
  void add_columns(int64_t from, int64_t to) {
    constexpr int64_t kRange = 512;
    int64_t ranges = ceil_div(call.shape.S, kRange), count = (to - from) * call.shape.S;
    std::memset(dk_sum->data(), 0, sizeof(float) * count * call.shape.D);
    std::memset(dv_sum->data(), 0, sizeof(float) * count * call.shape.Dv);
    for_tasks((to - from) * ranges, num_threads, [&](int64_t worker, int64_t number) {
      int64_t slot = number / ranges, head = from + slot, b = head / call.Hkv, hkv = head % call.Hkv;
      int32_t first = static_cast<int32_t>(number % ranges * kRange);
      int32_t end = static_cast<int32_t>(std::min<int64_t>(first + kRange, call.shape.S));
      BackwardKeyTask task = key_task(b, hkv, slot, scratch.data() + worker * scratch_floats);
      task.accumulate = true;
      for (int64_t g = 0; g < call.gqa_group; ++g) {
        add_column_rows(task, b, hkv * call.gqa_group + g, slot, first, end);
      }
    });
  }

  void add_column_rows(BackwardKeyTask& task, int64_t b, int64_t hq, int64_t slot, int32_t first,
                       int32_t end) const {
    const List& columns = call.lists.columns;
    int64_t head = call.layout_head(b, hq), group = call.lists.column_group;
    for (int64_t row = 0; row < call.column_rows(); ++row) {
      const int32_t* begin = columns.indices + columns.offsets[head * call.column_rows() + row];
      const int32_t* stop = columns.indices + columns.offsets[head * call.column_rows() + row + 1];
      begin = std::lower_bound(begin, stop, first);
      stop = std::lower_bound(begin, stop, end);
      QuerySource from = source(b, hq, slot);
      from.first_block = row * group, from.num_blocks = std::min(group, call.Lb - row * group);
      task.sources = &from, task.num_sources = 1;
      for (; begin < stop; begin += kTile) {
        task.keys = begin, task.num_keys = std::min<int64_t>(kTile, stop - begin);
        call.kernels.backward_key(call.shape, task);
      }
    }
  }
};

void attend_bwd(const Tensor& lse, const Tensor& delta, const MaybeTensor& kept, const Tensor& grad_out,
                const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                const Tensor& indices, const Tensor& bounds, const MaybeTensor& column_offsets,
                const MaybeTensor& column_indices, const MaybeTensor& column_bounds, const Tensor& t_offsets,
                const Tensor& t_indices, const Tensor& t_bounds, int64_t batch, int64_t heads,
                int64_t block_m, int64_t block_n, int64_t column_group, bool is_causal, double scale,
                const Tensor& dq, const Tensor& dk, const Tensor& dv) {
  Call call = make_call(q, k, v, offsets, indices, bounds, column_offsets, column_indices, column_bounds,
                        batch, heads, block_m, block_n, column_group, is_causal, scale);
  call.lists.transposed =
      List("transposed blocks", t_offsets, t_indices, t_bounds, batch * heads * call.Sb, call.Lb);
  const Shape& shape = call.shape;
  const Heads grad(grad_out);
  int64_t num_threads = torch::stable::get_num_threads(), num_heads = call.B * call.Hkv;
  int64_t bytes = PackedHeads::head_bytes(call.k) + PackedHeads::head_bytes(call.v) +
                  call.gqa_group * (PackedHeads::head_bytes(call.q) + PackedHeads::head_bytes(grad));
  bool has_columns = static_cast<bool>(call.lists.columns);
  if (has_columns) bytes += 4 * shape.S * (shape.D + shape.Dv);
  int64_t tasks_per_head = call.gqa_group * ceil_div(shape.L, std::min(block_m, kTile));
  int64_t at_once = heads_at_once(num_heads, tasks_per_head, bytes, num_threads);
  int64_t lanes = std::min(kTile, std::max(block_m, has_columns ? kTile : block_n));
  int64_t scratch_floats = round_up(call.kernels.backward_scratch(shape, lanes));
  auto sums = [&](int64_t width) {
    return has_columns ? std::make_unique<Buffer>(at_once * shape.S * width) : nullptr;
  };
  Backward backward{call, grad, Heads(dq), Heads(dk), Heads(dv), lse.const_data_ptr<float>(),
                    delta.const_data_ptr<float>(), kept ? kept->const_data_ptr<uint8_t>() : nullptr,
                    num_threads, PackedHeads(call.k, at_once), PackedHeads(call.v, at_once),
                    PackedHeads(call.q, at_once * call.gqa_group),
                    PackedHeads(grad, at_once * call.gqa_group), sums(shape.D), sums(shape.Dv),
                    Buffer(num_threads * scratch_floats), scratch_floats};
  for (int64_t from = 0; from < num_heads; from += at_once) {
    backward.run_heads(from, std::min(from + at_once, num_heads));
  }
}

std::string instruction_set() { return choose_kernels().name; }

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY(sparse_attn_cpu, m) {
  m.def(
      "attend_fwd(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor indices, Tensor bounds, "
      "Tensor? column_offsets, Tensor? column_indices, Tensor? column_bounds, Tensor? skip_below, "
      "int batch, int heads, int block_m, int block_n, int column_group, bool is_causal, float scale, "
      "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? kept, bool for_gradients) -> ()");
  m.def(
      "attend_bwd(Tensor lse, Tensor delta, Tensor? kept, Tensor grad_out, Tensor q, Tensor k, Tensor v, "
      "Tensor offsets, Tensor indices, Tensor bounds, Tensor? column_offsets, Tensor? column_indices, "
      "Tensor? column_bounds, Tensor t_offsets, Tensor t_indices, Tensor t_bounds, int batch, int heads, "
      "int block_m, int block_n, int column_group, bool is_causal, float scale, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_attn_cpu, CPU, m) {
  m.impl("attend_fwd", TORCH_BOX(&sparse_attn::attend_fwd));
  m.impl("attend_bwd", TORCH_BOX(&sparse_attn::attend_bwd));
}

STABLE_TORCH_LIBRARY_IMPL(sparse_attn_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&sparse_attn::instruction_set));
}
