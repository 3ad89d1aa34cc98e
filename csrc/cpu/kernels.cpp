// The kernels of one instruction set. Compiled once for each (sparse_attn/build.py gives the flags and
// defines SPARSE_ATTN_ISA); attend.cpp picks a set at run time.
#include "backward.h"
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

int64_t forward_scratch(const Shape& shape, int64_t num_queries, bool has_skip) {
  ForwardTask task{};
  task.num_queries = num_queries;
  task.has_skip = has_skip;
  return Forward(shape, task, nullptr).scratch_floats;
}

void forward(const Shape& shape, const ForwardTask& task) {
  Forward(shape, task, task.scratch).run();
}

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
    SPARSE_ATTN_TEXT(SPARSE_ATTN_ISA), kPanel, pack, forward_scratch, forward, backward_scratch,
    backward_query, backward_key, pool_scratch, pool, list_scratch, list,
};

}  // namespace sparse_attn
