// Included by the files of instances/ only.
#pragma once
#include "attend_fwd.cuh"
#include "launch.h"

namespace sparse_attn::hopper {

template <typename Element, int HEAD_DIM, int KEY_BLOCK, Variant VARIANT>
void launch(const AttendFwdParams& p, const TensorMaps& maps, int blocks, cudaStream_t stream) {
  using K = Kernel<Element, HEAD_DIM, KEY_BLOCK, VARIANT == Variant::kHalves || VARIANT == Variant::kSkipHalves,
                   VARIANT == Variant::kSkip || VARIANT == Variant::kSkipHalves, VARIANT == Variant::kColumns, VARIANT == Variant::kTall ? 3 : 2>;
  auto* kernel = attend_fwd_kernel<K>;
  constexpr int bytes = sizeof(SharedStorage<K>) + 1024;  // to align it
  // A failure here shows as the launch error that the caller checks.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<blocks, K::kThreads, bytes, stream>>>(p, maps.q, maps.k, maps.v, maps.o);
}

}  // namespace sparse_attn::hopper

#define SPARSE_ATTN_INSTANCE(ELEMENT, HEAD_DIM, KEY_BLOCK, VARIANT)                        \
  template void sparse_attn::hopper::launch<ELEMENT, HEAD_DIM, KEY_BLOCK,                  \
                                            sparse_attn::hopper::Variant::VARIANT>(        \
      const sparse_attn::hopper::AttendFwdParams&, const sparse_attn::hopper::TensorMaps&, int, cudaStream_t)
