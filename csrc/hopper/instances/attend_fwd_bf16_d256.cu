#include "../launch.cuh"

SPARSE_ATTN_INSTANCE(__nv_bfloat16, 256, 64, kBlocks);
SPARSE_ATTN_INSTANCE(__nv_bfloat16, 256, 16, kBlocks);
SPARSE_ATTN_INSTANCE(__nv_bfloat16, 256, 64, kHalves);
SPARSE_ATTN_INSTANCE(__nv_bfloat16, 256, 16, kHalves);
