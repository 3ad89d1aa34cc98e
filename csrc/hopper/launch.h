// The launcher of one kernel instance; each head size and dtype is compiled in its own file of instances/.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "config.h"
#include "params.h"

namespace sparse_attn::hopper {

struct TensorMaps {
  CUtensorMap q, k, v, o;
};

enum class Variant { kBlocks, kTall, kHalves, kSkip, kSkipHalves, kColumns };

template <typename Element, int HEAD_DIM, int KEY_BLOCK, Variant VARIANT>
void launch(const AttendFwdParams& p, const TensorMaps& maps, int blocks, cudaStream_t stream);

}  // namespace sparse_attn::hopper
