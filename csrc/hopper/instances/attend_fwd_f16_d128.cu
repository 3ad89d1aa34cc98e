#include "../launch.cuh"

SPARSE_ATTN_INSTANCE(__half, 128, 128, kBlocks);
SPARSE_ATTN_INSTANCE(__half, 128, 64, kBlocks);
SPARSE_ATTN_INSTANCE(__half, 128, 16, kBlocks);
SPARSE_ATTN_INSTANCE(__half, 128, 128, kHalves);
SPARSE_ATTN_INSTANCE(__half, 128, 64, kHalves);
SPARSE_ATTN_INSTANCE(__half, 128, 16, kHalves);
SPARSE_ATTN_INSTANCE(__half, 128, 128, kSkip);
SPARSE_ATTN_INSTANCE(__half, 128, 128, kSkipHalves);
SPARSE_ATTN_INSTANCE(__half, 128, 128, kColumns);
SPARSE_ATTN_INSTANCE(__half, 128, 64, kColumns);
