#include "../launch.cuh"

SPARSE_ATTN_INSTANCE(__half, 64, 128, kBlocks);
SPARSE_ATTN_INSTANCE(__half, 64, 64, kBlocks);
SPARSE_ATTN_INSTANCE(__half, 64, 16, kBlocks);
SPARSE_ATTN_INSTANCE(__half, 64, 128, kTall);
SPARSE_ATTN_INSTANCE(__half, 64, 128, kHalves);
SPARSE_ATTN_INSTANCE(__half, 64, 64, kHalves);
SPARSE_ATTN_INSTANCE(__half, 64, 16, kHalves);
SPARSE_ATTN_INSTANCE(__half, 64, 128, kSkip);
SPARSE_ATTN_INSTANCE(__half, 64, 128, kSkipHalves);
SPARSE_ATTN_INSTANCE(__half, 64, 128, kColumns);
SPARSE_ATTN_INSTANCE(__half, 64, 64, kColumns);
