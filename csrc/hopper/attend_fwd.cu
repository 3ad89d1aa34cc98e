// Host side: tensor maps, launch, and the operator sparse_attn_hopper::attend_fwd.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cudaTypedefs.h>

#include "launch.h"

using torch::stable::Tensor;

namespace sparse_attn::hopper {
namespace {

void check(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, "sparse_attn hopper engine: ", what, ": ", cudaGetErrorString(status));
}

PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "finding cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encode;
}

int num_processors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "device attribute");
  return count;
}

// A [B, H, N, D] tensor as boxes of [box_rows, 64] elements with 128-byte swizzle; zeros past the edges.
CUtensorMap tensor_map(const Tensor& x, int box_rows) {
  CUtensorMap map;
  const bool is_bf16 = x.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  const cuuint64_t size[4] = {cuuint64_t(x.size(3)), cuuint64_t(x.size(2)), cuuint64_t(x.size(1)), cuuint64_t(x.size(0))};
  cuuint64_t stride[3];
  for (int i = 0; i < 3; ++i) {
    const int64_t bytes = x.stride(2 - i) * 2;
    stride[i] = bytes == 0 ? 16 : bytes;  // a dimension of size 1, whose stride is never used
  }
  const cuuint32_t box[4] = {kChunk, cuuint32_t(box_rows), 1, 1}, step[4] = {1, 1, 1, 1};
  const CUresult status = tensor_map_encoder()(
      &map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, x.data_ptr(), size, stride,
      box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(status == CUDA_SUCCESS, "sparse_attn hopper engine: cuTensorMapEncodeTiled failed with ", int(status));
  return map;
}

using Launch = void (*)(const AttendFwdParams&, const TensorMaps&, int, cudaStream_t);

// The instance for a call; null where there is none.
template <typename Element, int HEAD_DIM>
Launch find(int64_t key_block, Variant variant) {
  switch (variant) {
    case Variant::kBlocks:
      if constexpr (HEAD_DIM <= 128)
        if (key_block == 128) return launch<Element, HEAD_DIM, 128, Variant::kBlocks>;
      if (key_block == 64) return launch<Element, HEAD_DIM, 64, Variant::kBlocks>;
      if (key_block == 16) return launch<Element, HEAD_DIM, 16, Variant::kBlocks>;
      break;
    case Variant::kTall:
      if constexpr (HEAD_DIM == 64)
        if (key_block == 128) return launch<Element, HEAD_DIM, 128, Variant::kTall>;
      break;
    case Variant::kHalves:
      if constexpr (HEAD_DIM <= 128)
        if (key_block == 128) return launch<Element, HEAD_DIM, 128, Variant::kHalves>;
      if (key_block == 64) return launch<Element, HEAD_DIM, 64, Variant::kHalves>;
      if (key_block == 16) return launch<Element, HEAD_DIM, 16, Variant::kHalves>;
      break;
    case Variant::kSkip:
      if constexpr (HEAD_DIM <= 128)
        if (key_block == 128) return launch<Element, HEAD_DIM, 128, Variant::kSkip>;
      break;
    case Variant::kSkipHalves:
      if constexpr (HEAD_DIM <= 128)
        if (key_block == 128) return launch<Element, HEAD_DIM, 128, Variant::kSkipHalves>;
      break;
    case Variant::kColumns:
      if constexpr (HEAD_DIM <= 128) {
        if (key_block == 128) return launch<Element, HEAD_DIM, 128, Variant::kColumns>;
        if (key_block == 64) return launch<Element, HEAD_DIM, 64, Variant::kColumns>;
      }
      break;
  }
  return nullptr;
}

template <typename Element>
Launch find(int64_t head_dim, int64_t key_block, Variant variant) {
  if (head_dim == 64) return find<Element, 64>(key_block, variant);
  if (head_dim == 128) return find<Element, 128>(key_block, variant);
  if (head_dim == 256) return find<Element, 256>(key_block, variant);
  return nullptr;
}

template <typename T>
const T* pointer(const std::optional<Tensor>& x) {
  return x.has_value() ? static_cast<const T*>(x->data_ptr()) : nullptr;
}

void attend_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& offsets, const Tensor& indices,
                const Tensor& bounds, const Tensor& order, const std::optional<Tensor>& column_offsets,
                const std::optional<Tensor>& column_indices, const std::optional<Tensor>& column_bounds,
                const std::optional<Tensor>& skip_below, const Tensor& counter, Tensor out, Tensor lse,
                const std::optional<Tensor>& kept, int64_t batch, int64_t heads, int64_t query_block, int64_t key_block,
                int64_t column_group, int64_t first_row, int64_t heads_per_section, bool is_causal, double scale) {
  AttendFwdParams p = {};
  p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  p.kept = const_cast<uint8_t*>(pointer<uint8_t>(kept));
  p.skip_below = pointer<float>(skip_below);
  p.offsets = static_cast<const int64_t*>(offsets.data_ptr());
  p.indices = static_cast<const int32_t*>(indices.data_ptr());
  p.bounds = static_cast<const int32_t*>(bounds.data_ptr());
  p.order = static_cast<const int32_t*>(order.data_ptr());
  p.column_offsets = pointer<int64_t>(column_offsets);
  p.column_indices = pointer<int32_t>(column_indices);
  p.column_bounds = pointer<int32_t>(column_bounds);
  p.counter = static_cast<int*>(counter.data_ptr());
  p.k = k.data_ptr(), p.v = v.data_ptr();
  p.k_stride_b = k.stride(0) * 2, p.k_stride_h = k.stride(1) * 2, p.k_stride_n = k.stride(2) * 2;
  p.v_stride_b = v.stride(0) * 2, p.v_stride_h = v.stride(1) * 2, p.v_stride_n = v.stride(2) * 2;
  p.out_stride_b = out.stride(0), p.out_stride_h = out.stride(1), p.out_stride_m = out.stride(2);
  p.batch = q.size(0), p.q_heads = q.size(1), p.L = q.size(2), p.S = k.size(2);
  p.gqa_group = q.size(1) / k.size(1);
  p.list_stride_batch = batch == 1 ? 0 : heads;
  p.list_stride_head = heads == 1 ? 0 : 1;
  p.list_head_divisor = heads == q.size(1) || heads == 1 ? 1 : p.gqa_group;
  p.num_query_blocks = (p.L + query_block - 1) / query_block;
  p.num_key_blocks = (p.S + key_block - 1) / key_block;
  const bool is_halves = query_block == 64;
  const int blocks_per_tile = is_halves ? 2 : 1;
  p.num_tiles = (p.num_query_blocks + blocks_per_tile - 1) / blocks_per_tile;
  p.first_row = first_row;
  p.column_group = column_group;
  p.column_rows = (p.num_query_blocks + column_group - 1) / column_group;
  const int key_heads = p.batch * k.size(1), most = heads_per_section / p.gqa_group;  // of a section
  const int sections = (key_heads + most - 1) / most;
  p.heads_per_section = (key_heads + sections - 1) / sections * p.gqa_group;
  p.num_long_sections = key_heads % sections == 0 ? sections : key_heads % sections;
  p.num_items = p.num_tiles * p.batch * p.q_heads;
  p.is_causal = is_causal;
  p.scale = scale, p.scale_log2 = scale * 1.4426950408889634;
  p.headroom = 8 / p.scale_log2;

  const Variant variant = p.skip_below != nullptr      ? is_halves ? Variant::kSkipHalves : Variant::kSkip
                          : is_halves                  ? Variant::kHalves
                          : query_block == 192         ? Variant::kTall
                          : p.column_bounds != nullptr ? Variant::kColumns
                                                       : Variant::kBlocks;
  const bool is_bf16 = q.scalar_type() == torch::headeronly::ScalarType::BFloat16;
  const Launch instance = is_bf16 ? find<__nv_bfloat16>(q.size(3), key_block, variant)
                                  : find<__half>(q.size(3), key_block, variant);
  STD_TORCH_CHECK(instance != nullptr, "sparse_attn hopper engine: no kernel for head_dim ", q.size(3),
                  " and blocks of ", query_block, "x", key_block);
  int device = q.get_device_index();
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(device, &stream);
  const int processors = num_processors(device);
  const TensorMaps maps = {tensor_map(q, 64), tensor_map(k, key_block), tensor_map(v, key_block), tensor_map(out, 64)};
  instance(p, maps, p.num_items < processors ? p.num_items : processors, cudaStream_t(stream));
  check(cudaGetLastError(), "launch");
}

}  // namespace
}  // namespace sparse_attn::hopper

STABLE_TORCH_LIBRARY(sparse_attn_hopper, m) {
  m.def(
      "attend_fwd(Tensor q, Tensor k, Tensor v, Tensor offsets, Tensor indices, Tensor bounds, Tensor order, "
      "Tensor? column_offsets, Tensor? column_indices, Tensor? column_bounds, Tensor? skip_below, "
      "Tensor(a!) counter, Tensor(b!) out, Tensor(c!) lse, Tensor(d!)? kept, int batch, int heads, "
      "int query_block, int key_block, int column_group, int first_row, int heads_per_section, bool is_causal, "
      "float scale) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(sparse_attn_hopper, CUDA, m) {
  m.impl("attend_fwd", TORCH_BOX(&sparse_attn::hopper::attend_fwd));
}
