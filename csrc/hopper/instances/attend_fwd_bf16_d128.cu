#include "../launch.cuh"

namespace sparse_attn::hopper {
template void launch<__nv_bfloat16, 128, 64>(const AttendFwdParams&, const CUtensorMap&, const CUtensorMap&,
                                   const CUtensorMap&, int, cudaStream_t);
template void launch<__nv_bfloat16, 128, 128>(const AttendFwdParams&, const CUtensorMap&, const CUtensorMap&,
                                   const CUtensorMap&, int, cudaStream_t);
}  // namespace sparse_attn::hopper
