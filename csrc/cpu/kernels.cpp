// The kernels of one instruction set. Compiled once for each (sparse_attn/build.py gives the flags and
// defines SPARSE_ATTN_ISA); attend.cpp picks a set at run time.
#include "backward.h"
#include "forward_tiles.h"
#include "select.h"

#define SPARSE_ATTN_JOIN_(a, b) a##b
#define SPARSE_ATTN_JOIN(a, b) SPARSE_ATTN_JOIN_(a, b)
#define SPARSE_ATTN_TEXT_(a) #a
#define SPARSE_ATTN_TEXT(a) SPARSE_ATTN_TEXT_(a)

namespace sparse_attn {
namespace {

void pack(const RawRows& source, int64_t first, int64_t count, int width, float* target, int64_t stride) {
  for (int64_t i = first; i < first + count; ++i) {
    widen(row_of(source, i), source.dtype, width, target + i * stride);
  }
}

// -- forward -----------------------------------------------------------------------------------------------

#if defined(SPARSE_ATTN_TILES)
constexpr int kGroupKeys = kTileKeys;

int64_t group_items(const Shape& shape) { return GroupShape(shape).items(); }
int64_t group_scratch(const Shape& shape) { return pack_floats(shape); }

bool pack_group(const Shape& shape, const RawRows& k, const RawRows& v, int64_t group, float* scratch,
                uint16_t* target) {
  int64_t first = group * kTileKeys;
  return pack_group(shape, k, v, nullptr, first, min64(kTileKeys, shape.S - first), scratch, target);
}

// Calls use(TileForward of the call's dtype).
template <class F>
auto with_tiles(const Shape& shape, const ForwardTask& task, float* scratch, const F& use) {
  switch (pieces_of(shape.dtype)) {
    case 1: return use(TileForward<1>(shape, task, scratch));
    case 2: return use(TileForward<2>(shape, task, scratch));
    default: return use(TileForward<3>(shape, task, scratch));
  }
}
#else
constexpr int kGroupKeys = 0;
constexpr auto group_items = nullptr, group_scratch = nullptr, pack_group = nullptr;
#endif

int64_t forward_scratch(const Shape& shape, int64_t num_queries, bool has_skip) {
  ForwardTask task{};
  task.num_queries = num_queries;
  task.has_skip = has_skip;
  int64_t floats = Forward(shape, task, nullptr).scratch_floats;
#if defined(SPARSE_ATTN_TILES)
  task.keys.num_columns = 1;
  auto scratch_of = [](const auto& tiles) { return tiles.scratch_floats; };
  floats = max64(floats, with_tiles(shape, task, nullptr, scratch_of));
#endif
  return floats;
}

bool forward(const Shape& shape, const ForwardTask& task) {
#if defined(SPARSE_ATTN_TILES)
  if (task.groups) return with_tiles(shape, task, task.scratch, [](auto&& tiles) { return tiles.run(); });
#endif
  Forward(shape, task, task.scratch).run();
  return true;
}

// -- backward, selection -----------------------------------------------------------------------------------

int64_t backward_scratch(const Shape& shape, int64_t lanes) {
  BackwardQueryTask query_task{};
  BackwardKeyTask key_task{};
  query_task.num_queries = key_task.num_keys = lanes;
  int64_t for_queries = BackwardQuery(shape, query_task, nullptr).scratch_floats;
  return max64(for_queries, BackwardKey(shape, key_task, nullptr).scratch_floats);
}

void backward_query(const Shape& shape, const BackwardQueryTask& task) {
  BackwardQuery(shape, task, task.scratch).run();
}

void backward_key(const Shape& shape, const BackwardKeyTask& task) {
  BackwardKey(shape, task, task.scratch).run();
}

int64_t pool_scratch(const Shape& shape, int64_t num_queries) {
  PoolTask task{};
  task.num_queries = num_queries;
  return Pool(shape, task, nullptr).scratch_floats;
}

void pool(const Shape& shape, const PoolTask& task) {
  Pool(shape, task, task.scratch).run();
}

int64_t list_scratch(const ListTask& task) {
  return Lister(task, nullptr).scratch_floats;
}

void list(const ListTask& task) {
  Lister(task, task.scratch).run();
}

}  // namespace

extern const Kernels SPARSE_ATTN_JOIN(kernels_, SPARSE_ATTN_ISA) = {
    SPARSE_ATTN_TEXT(SPARSE_ATTN_ISA), kPanel, kGroupKeys, group_items, group_scratch, pack_group, pack,
    forward_scratch, forward, backward_scratch, backward_query, backward_key, pool_scratch, pool,
    list_scratch, list,
};

}  // namespace sparse_attn
