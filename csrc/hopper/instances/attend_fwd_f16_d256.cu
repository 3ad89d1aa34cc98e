#include "../launch.cuh"

SPARSE_ATTN_INSTANCE(__half, 256, 64, kBlocks);
SPARSE_ATTN_INSTANCE(__half, 256, 16, kBlocks);
SPARSE_ATTN_INSTANCE(__half, 256, 64, kHalves);
SPARSE_ATTN_INSTANCE(__half, 256, 16, kHalves);
