// One attention call as the operators see it: checked tensors, the layout's lists, and the choice of
// instruction set. Host side only; the kernels see params.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "params.h"

namespace sparse_attn {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kTile = 128;  // queries or keys of one task, where no vote joins more

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// -- instruction sets ------------------------------------------------------------------------------------

// Whether the processor has AMX tiles for bfloat16, and the system lets this process use them (Linux asks
// for that once: the tiles make the state that it saves larger).
inline bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Widest first, only those that this machine runs.
inline std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> sets;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512 && has_tiles()) sets.push_back(&kernels_amx);
  if (avx2 && avx512) sets.push_back(&kernels_avx512);
  if (avx2) sets.push_back(&kernels_avx2);
#endif
  sets.push_back(&kernels_baseline);
  return sets;
}

// The widest set, or the one that SPARSE_ATTN_CPU_ISA names.
inline const Kernels& choose_kernels() {
  static const std::vector<const Kernels*> sets = runnable_kernels();
  const char* wanted = std::getenv("SPARSE_ATTN_CPU_ISA");
  if (!wanted || !*wanted) return *sets.front();
  std::string names;
  for (const Kernels* set : sets) {
    if (std::string(set->name) == wanted) return *set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  STD_TORCH_CHECK(false, "cpu engine: SPARSE_ATTN_CPU_ISA is '", wanted, "'; this machine runs: ", names, ".");
}

// -- tensors -----------------------------------------------------------------------------------------------

inline DType dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, "cpu engine: it takes float32, bfloat16 and float16 tensors.");
  }
}

// A [B, H, length, width] tensor with a last stride of 1.
struct Heads {
  char* base = nullptr;
  int64_t H = 0, length = 0, stride_b = 0, stride_h = 0, stride_row = 0;
  int width = 0;
  DType dtype = DType::kFloat32;

  explicit Heads(const Tensor& x)
      : base(static_cast<char*>(x.data_ptr())), H(x.size(1)), length(x.size(2)), stride_b(x.stride(0)),
        stride_h(x.stride(1)), stride_row(x.stride(2)), width(static_cast<int>(x.size(3))),
        dtype(dtype_of(x)) {
    STD_TORCH_CHECK(width == 1 || x.stride(3) == 1, "cpu engine: the last stride must be 1.");
  }

  int element_size() const { return dtype == DType::kFloat32 ? 4 : 2; }
  char* head(int64_t b, int64_t h) const { return base + (b * stride_b + h * stride_h) * element_size(); }
  RawRows raw(int64_t b, int64_t h) const { return {head(b, h), stride_row, dtype}; }
};

// One list of the layout. Every index is checked against `width`, so that no layout, however it was
// made, can make a kernel read outside its tensors.
struct List {
  const int64_t* offsets = nullptr;
  const int32_t* indices = nullptr;
  const int32_t* bounds = nullptr;

  List() = default;
  List(const char* name, const Tensor& offsets_, const Tensor& indices_, const Tensor& bounds_, int64_t rows,
       int64_t width)
      : offsets(offsets_.const_data_ptr<int64_t>()), indices(indices_.const_data_ptr<int32_t>()),
        bounds(bounds_.const_data_ptr<int32_t>()) {
    bool good = offsets_.numel() == rows + 1 && offsets[0] >= 0 && offsets[rows] <= indices_.numel();
    for (int64_t r = 0; good && r < rows; ++r) {
      int64_t before = -1;
      good = offsets[r] <= offsets[r + 1];
      for (int64_t t = offsets[r]; good && t < offsets[r + 1]; ++t) {
        good = indices[t] > before && indices[t] < width;
        before = indices[t];
      }
    }
    STD_TORCH_CHECK(good, "cpu engine: the layout's ", name,
                    " are not valid: call layout.check() to see which invariant is broken.");
  }

  explicit operator bool() const { return offsets != nullptr; }
  int64_t length(int64_t row) const { return offsets[row + 1] - offsets[row]; }
};

// -- the call ------------------------------------------------------------------------------------------------

struct Lists {
  List blocks, columns, transposed;
  int64_t batch, heads, column_group;
};

struct Call {
  Heads q, k, v;
  Shape shape;
  int64_t B, Hq, Hkv, Lb, Sb, gqa_group;
  Lists lists;
  const Kernels& kernels;

  int64_t layout_head(int64_t b, int64_t hq) const {
    int64_t head = lists.heads == 1 ? 0 : lists.heads == Hq ? hq : hq / gqa_group;
    return (lists.batch == 1 ? 0 : b) * lists.heads + head;
  }

  int64_t column_rows() const { return ceil_div(Lb, lists.column_group); }

  int64_t column_row(int64_t head, int64_t block) const {
    return head * column_rows() + block / lists.column_group;
  }

  // The visible keys of one query block.
  KeyList keys(int64_t b, int64_t hq, int64_t block) const {
    int64_t head = layout_head(b, hq), row = head * Lb + block;
    const List& blocks = lists.blocks;
    KeyList keys{blocks.indices + blocks.offsets[row],
                 std::min<int64_t>(blocks.bounds[2 * row + 1], blocks.length(row)), nullptr, 0};
    if (lists.columns) {
      int64_t list_row = column_row(head, block);
      keys.columns = lists.columns.indices + lists.columns.offsets[list_row];
      keys.num_columns =
          std::min<int64_t>(lists.columns.bounds[2 * row + 1], lists.columns.length(list_row));
    }
    return keys;
  }
};

inline Call make_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets,
                      const Tensor& indices, const Tensor& bounds, const MaybeTensor& column_offsets,
                      const MaybeTensor& column_indices, const MaybeTensor& column_bounds, int64_t batch,
                      int64_t heads, int64_t block_m, int64_t block_n, int64_t column_group, bool is_causal,
                      double scale) {
  Heads hq(q), hk(k), hv(v);
  Shape shape{hq.length, hk.length, block_m, block_n, hq.width, hv.width, is_causal,
              static_cast<float>(scale), hq.dtype};
  Call call{hq, hk, hv, shape, q.size(0), hq.H, hk.H, ceil_div(hq.length, block_m),
            ceil_div(hk.length, block_n), hq.H / hk.H, {}, choose_kernels()};
  call.lists.batch = batch, call.lists.heads = heads, call.lists.column_group = column_group;
  int64_t all_heads = batch * heads;
  call.lists.blocks = List("blocks", offsets, indices, bounds, all_heads * call.Lb, call.Sb);
  if (column_offsets) {
    call.lists.columns = List("columns", *column_offsets, *column_indices, *column_bounds,
                              all_heads * call.column_rows(), shape.S);
  }
  return call;
}

// -- memory and threads ------------------------------------------------------------------------------------

// 64-byte aligned floats, not initialised.
class Buffer {
 public:
  explicit Buffer(int64_t floats)
      : data_(static_cast<float*>(::operator new(sizeof(float) * std::max<int64_t>(floats, 1), kAlign))) {}
  ~Buffer() { ::operator delete(data_, kAlign); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{64};
  float* data_;
};

inline int64_t round_up(int64_t floats) { return ceil_div(floats, 16) * 16; }

// Calls run(worker, task) for every task on torch's threads; a free worker takes the next task. Each task
// writes what is its own, so the result does not depend on the number of threads.
template <class F>
void for_tasks(int64_t num_tasks, int64_t num_workers, const F& run) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t task = next++; task < num_tasks; task = next++) run(worker, task);
    }
  });
}

// Task numbers, most work first, so that the last one to end is a short one.
template <class Task>
void longest_first(std::vector<Task>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
}

}  // namespace sparse_attn
