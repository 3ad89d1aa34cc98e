// Included by the files of instances/ only.
#pragma once
#include "attend_fwd.cuh"
#include "launch.h"

namespace sparse_attn::hopper {

template <typename Element, int HEAD_DIM, int KEY_BLOCK>
void launch(const AttendFwdParams& p, const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v, int blocks,
            cudaStream_t stream) {
  auto* kernel = attend_fwd_kernel<Element, HEAD_DIM, KEY_BLOCK>;
  constexpr int bytes = sizeof(SharedStorage<Element, HEAD_DIM>) + 1024;  // to align it
  // A failure here shows as the launch error that the caller checks.
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<blocks, kThreads, bytes, stream>>>(p, q, k, v);
}

}  // namespace sparse_attn::hopper
