// AnchorAttention's selection: sparse_attn_cpu::anchor_pool and anchor_lists, the counterparts of
// pool_anchor, and of fill_columns and fill_sampled, in sparse_attn/methods/anchor_select.py and _sampled.py.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <iterator>
#include <tuple>

#include "call.h"
#include "packing.h"

namespace sparse_attn {
namespace {

using torch::headeronly::ScalarType;

// Packs the keys of key heads from .. to-1 where the kernels cannot read them in place.
void pack_whole_heads(const Kernels& kernels, const PackedHeads& packed, const Heads& k, int64_t from,
                      int64_t to, int64_t num_threads) {
  if (!packed.packs()) return;
  int64_t parts = ceil_div(k.length, kTile);
  for_tasks((to - from) * parts, num_threads, [&](int64_t, int64_t task) {
    int64_t slot = task / parts, head = from + slot, first = task % parts * kTile;
    packed.pack(kernels, head / k.H, head % k.H, slot, first, std::min(kTile, k.length - first));
  });
}

// -- the anchor of every query block -----------------------------------------------------------------------

void anchor_pool(const Tensor& q, const Tensor& k, const Tensor& init_end, const Tensor& local,
                 int64_t block, double scale, bool is_lse, const Tensor& anchor, const Tensor& mean) {
  const Heads queries(q), keys(k);
  const Kernels& kernels = choose_kernels();
  Shape shape{queries.length, keys.length, block, block, queries.width, queries.width, true,
              static_cast<float>(scale), queries.dtype};
  int64_t B = q.size(0), Hq = queries.H, group = Hq / keys.H, Lb = ceil_div(shape.L, block);
  STD_TORCH_CHECK(init_end.numel() == Lb && local.numel() == Lb,
                  "cpu engine: one anchor for each query block.");
  const int64_t* ends = init_end.const_data_ptr<int64_t>();
  const int64_t* locals = local.const_data_ptr<int64_t>();
  float* anchors = static_cast<float*>(anchor.data_ptr());
  float* means = static_cast<float*>(mean.data_ptr());

  int64_t num_threads = torch::stable::get_num_threads(), num_heads = B * keys.H;
  int64_t at_once = heads_at_once(num_heads, group * Lb, PackedHeads::head_bytes(keys), num_threads);
  PackedHeads packed(keys, at_once);
  int64_t scratch_floats = round_up(kernels.pool_scratch(shape, std::min(block, shape.L)));
  Buffer scratch(num_threads * scratch_floats);
  for (int64_t from = 0; from < num_heads; from += at_once) {
    int64_t to = std::min(from + at_once, num_heads);
    pack_whole_heads(kernels, packed, keys, from, to, num_threads);
    for_tasks((to - from) * group * Lb, num_threads, [&](int64_t worker, int64_t number) {
      int64_t head = from * group + number / Lb, i = number % Lb, b = head / Hq, hq = head % Hq;
      PoolTask task{};
      task.q = queries.raw(b, hq);
      task.k = packed.rows(b, hq / group, head / group - from);
      task.first_query = i * block, task.num_queries = std::min(block, shape.L - i * block);
      task.init_end = ends[i], task.local = locals[i];
      task.is_lse = is_lse;
      task.anchor = anchors + head * Lb + i, task.mean = means + (head * Lb + i) * shape.D;
      task.scratch = scratch.data() + worker * scratch_floats;
      kernels.pool(shape, task);
    });
  }
}

// -- the lists ---------------------------------------------------------------------------------------------

struct KeyLists {
  std::vector<std::vector<int32_t>> rows;

  // One row for each `group` rows that stand G apart: their union.
  void unite(int64_t group, int64_t G) {
    std::vector<std::vector<int32_t>> united(rows.size() / group);
    for (int64_t row = 0; row < static_cast<int64_t>(united.size()); ++row) {
      for (int64_t member = 0; member < group; ++member) {
        const std::vector<int32_t>& own = rows[(row / G * group + member) * G + row % G];
        std::vector<int32_t> both;
        std::set_union(united[row].begin(), united[row].end(), own.begin(), own.end(),
                       std::back_inserter(both));
        united[row] = std::move(both);
      }
    }
    rows = std::move(united);
  }

  std::tuple<Tensor, Tensor> tensors(const Tensor& like) const {
    int64_t num_rows = rows.size(), total = 0;
    Tensor offsets = torch::stable::new_empty(like, {num_rows + 1}, ScalarType::Long);
    int64_t* starts = static_cast<int64_t*>(offsets.data_ptr());
    for (int64_t row = 0; row < num_rows; ++row) starts[row] = total, total += rows[row].size();
    starts[num_rows] = total;
    Tensor indices = torch::stable::new_empty(like, {std::max<int64_t>(total, 1)}, ScalarType::Int);
    int32_t* target = static_cast<int32_t*>(indices.data_ptr());
    *target = 0;
    for (int64_t row = 0; row < num_rows; ++row) {
      if (!rows[row].empty()) std::memcpy(target + starts[row], rows[row].data(), 4 * rows[row].size());
    }
    return {offsets, indices};
  }
};

struct Selection {
  const Kernels& kernels;
  int64_t Hq, G, R, first, batch, every;  // superblocks from `first` on are offered keys
  bool by_recall;
  ListTask common;
  const float *speakers, *given, *theta;
  const int64_t *seen, *stop;

  int64_t num_batches() const { return ceil_div(G - first, batch); }

  // Superblocks of batch `number` of query head `head`. `own`: scratch of this thread.
  void run(int64_t head, int64_t number, const Rows& k, KeptMass* kept, float* own, uint32_t* wants,
           int32_t* row, KeyLists& lists) const {
    int64_t g = first + number * batch, num = std::min(batch, G - g), at = head * G + g;
    uint8_t measured[64] = {};
    for (int64_t s = 0; s < num; ++s) measured[s] = (g + s - first) % every == 0;
    ListTask task = common;
    task.k = k, task.num = num;
    task.speakers = speakers + at * R * common.D;
    task.seen = seen + g * R, task.stop = stop + g;
    task.given = given ? given + at * R : nullptr;
    task.theta = theta ? theta + at : nullptr;
    task.measured = measured, task.kept = kept;
    task.wants = wants, task.scratch = own;
    kernels.list(task);
    for (int64_t s = 0; s < num; ++s) {
      int64_t count = 0;
      for (int64_t j = common.begin; j < task.stop[s]; ++j) {
        row[count] = static_cast<int32_t>(j);
        count += wants[j] >> s & 1;
      }
      lists.rows[at + s].assign(row, row + count);
    }
  }
};

std::tuple<Tensor, Tensor> anchor_lists(const Tensor& speakers, const Tensor& seen, const Tensor& stop,
                                        const Tensor& k, int64_t begin, int64_t first, int64_t reference,
                                        const MaybeTensor& given, const MaybeTensor& theta,
                                        std::optional<double> recall, int64_t every, bool share) {
  const Heads keys(k);
  const Kernels& kernels = choose_kernels();
  int64_t B = speakers.size(0), Hq = speakers.size(1), G = speakers.size(2), R = speakers.size(3);
  int64_t group = Hq / keys.H, batch = R == 1 ? kernels.lanes : kernels.lanes / 2;
  STD_TORCH_CHECK(seen.numel() == G * R && stop.numel() == G && speakers.size(4) == keys.width,
                  "cpu engine: the speakers, what they see and the keys do not go together.");
  ListTask common{};
  common.S = keys.length, common.R = R, common.D = keys.width, common.begin = begin;
  common.reference = static_cast<Reference>(reference), common.recall = recall.value_or(0);
  Selection selection{kernels, Hq, G, R, first, batch, every, recall.has_value(), common,
                      speakers.const_data_ptr<float>(), given ? given->const_data_ptr<float>() : nullptr,
                      theta ? theta->const_data_ptr<float>() : nullptr, seen.const_data_ptr<int64_t>(),
                      stop.const_data_ptr<int64_t>()};
  KeyLists lists;
  lists.rows.resize(B * Hq * G);

  // By recall a superblock needs what those before it kept: a head is then one task, otherwise a batch is.
  int64_t batches = selection.num_batches(), tasks_a_head = selection.by_recall ? 1 : batches;
  int64_t num_threads = torch::stable::get_num_threads(), num_heads = B * keys.H;
  int64_t parts = std::max<int64_t>(group * batches, 1);
  int64_t at_once = heads_at_once(num_heads, parts, PackedHeads::head_bytes(keys), num_threads);
  PackedHeads packed(keys, at_once);
  int64_t scratch_floats = round_up(kernels.list_scratch(common));
  int64_t row_ints = round_up(keys.length + 1);
  Buffer scratch(num_threads * scratch_floats);
  std::vector<uint32_t> wants(num_threads * row_ints);
  std::vector<int32_t> rows(num_threads * row_ints);
  for (int64_t from = 0; from < num_heads && batches > 0; from += at_once) {
    int64_t to = std::min(from + at_once, num_heads);
    pack_whole_heads(kernels, packed, keys, from, to, num_threads);
    int64_t heads_now = (to - from) * group;
    for_tasks(heads_now * tasks_a_head, num_threads, [&](int64_t worker, int64_t number) {
      int64_t head = from * group + number % heads_now, b = head / Hq, hkv = head % Hq / group;
      Rows k_rows = packed.rows(b, hkv, head / group - from);
      KeptMass kept{};
      auto run = [&](int64_t batch_number) {
        selection.run(head, batch_number, k_rows, &kept, scratch.data() + worker * scratch_floats,
                      wants.data() + worker * row_ints, rows.data() + worker * row_ints, lists);
      };
      if (selection.by_recall) {
        for (int64_t n = 0; n < batches; ++n) run(n);
      } else {
        run(batches - 1 - number / heads_now);  // later superblocks have more keys
      }
    });
  }
  if (share) lists.unite(group, G);
  return lists.tensors(speakers);
}

}  // namespace
}  // namespace sparse_attn

STABLE_TORCH_LIBRARY_FRAGMENT(sparse_attn_cpu, m) {
  m.def(
      "anchor_pool(Tensor q, Tensor k, Tensor init_end, Tensor local, int block, float scale, bool is_lse, "
      "Tensor(a!) anchor, Tensor(b!) mean) -> ()");
  m.def(
      "anchor_lists(Tensor speakers, Tensor seen, Tensor stop, Tensor k, int begin, int first, "
      "int reference, Tensor? given, Tensor? theta, float? recall, int every, bool share) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(sparse_attn_cpu, CPU, m) {
  m.impl("anchor_pool", TORCH_BOX(&sparse_attn::anchor_pool));
  m.impl("anchor_lists", TORCH_BOX(&sparse_attn::anchor_lists));
}
