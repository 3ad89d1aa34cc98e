// The launcher of one kernel instance; each is compiled in its own file of instances/.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "config.h"
#include "params.h"

namespace sparse_attn::hopper {

template <typename Element, int HEAD_DIM, int KEY_BLOCK>
void launch(const AttendFwdParams& p, const CUtensorMap& q, const CUtensorMap& k, const CUtensorMap& v, int blocks,
            cudaStream_t stream);

}  // namespace sparse_attn::hopper
