// Thin wrappers over the sm_90a instructions that the kernels use. One instruction each.
#pragma once
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace sparse_attn::hopper {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// -- mbarriers --------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(barrier)), "r"(arrivals));
}

__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_expect_bytes(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(barrier)) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier, int times) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(barrier)), "r"(times) : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, int phase) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n"
      "}\n" ::"r"(smem_address(barrier)),
      "r"(phase)
      : "memory");
}

// Whether the phase is over already; the same for a whole warp.
__device__ __forceinline__ bool mbarrier_test(uint64_t* barrier, int phase) {
  int done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.s32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(smem_address(barrier)), "r"(phase)
      : "memory");
  return __all_sync(0xffffffff, done);
}

// Whether the phases of both are over already.
__device__ __forceinline__ bool mbarriers_test(uint64_t* a, int phase_a, uint64_t* b, int phase_b) {
  int done;
  asm volatile(
      "{\n"
      ".reg .pred a, b;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 a, [%1], %2;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 b, [%3], %4;\n"
      "and.pred a, a, b;\n"
      "selp.s32 %0, 1, 0, a;\n"
      "}\n"
      : "=r"(done)
      : "r"(smem_address(a)), "r"(phase_a), "r"(smem_address(b)), "r"(phase_b)
      : "memory");
  return __all_sync(0xffffffff, done);
}

// The same, and before that whether `number` has come to `least`, without which a parity may be that of two phases before.
__device__ __forceinline__ bool mbarriers_test(uint64_t* a, int phase_a, uint64_t* b, int phase_b, const unsigned* number,
                                               unsigned least) {
  int done;
  asm volatile(
      "{\n"
      ".reg .pred a, b;\n"
      ".reg .s32 number;\n"
      "ld.volatile.shared::cta.s32 number, [%5];\n"
      "sub.s32 number, number, %6;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 a, [%1], %2;\n"
      "setp.ge.and.s32 a, number, 0, a;\n"
      "mov.pred b, a;\n"
      "@a mbarrier.test_wait.parity.shared::cta.b64 b, [%3], %4;\n"
      "selp.s32 %0, 1, 0, b;\n"
      "}\n"
      : "=r"(done)
      : "r"(smem_address(a)), "r"(phase_a), "r"(smem_address(b)), "r"(phase_b), "r"(smem_address(number)), "r"(least)
      : "memory");
  return __all_sync(0xffffffff, done);
}

// -- numbers in shared memory that another warp looks at ------------------------------------------------
// Without release and acquire, which would cost a memory barrier each: what they tell of, wgmma's reads, is over when
// its wait returns, before the number is written.

__device__ __forceinline__ void store_note(unsigned* where, unsigned x) {
  asm volatile("st.volatile.shared::cta.u32 [%0], %1;" ::"r"(smem_address(where)), "r"(x) : "memory");
}
// The same without a branch, by the threads for which `is_mine`.
__device__ __forceinline__ void store_note_if(bool is_mine, unsigned* where, unsigned x) {
  asm volatile("{\n.reg .pred mine;\nsetp.ne.s32 mine, %2, 0;\n@mine st.volatile.shared::cta.u32 [%0], %1;\n}\n" ::"r"(
                   smem_address(where)),
               "r"(x), "r"(int(is_mine))
               : "memory");
}
__device__ __forceinline__ unsigned load_note(const unsigned* where) {
  unsigned x;
  asm volatile("ld.volatile.shared::cta.u32 %0, [%1];" : "=r"(x) : "r"(smem_address(where)) : "memory");
  return x;
}

__device__ __forceinline__ void wait_for_note(const unsigned* where, unsigned least) {
  while (int(load_note(where) - least) < 0);
}

// -- named barriers ---------------------------------------------------------------------------------

__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Whether all 128 threads that meet at a barrier say so; for each warp in a uniform predicate.
__device__ __forceinline__ bool all_of_group(int id, bool x) {
  int all;
  asm volatile(
      "{\n"
      ".reg .pred own, all;\n"
      "setp.ne.s32 own, %2, 0;\n"
      "bar.red.and.pred all, %1, 128, own;\n"
      "selp.s32 %0, 1, 0, all;\n"
      "}\n"
      : "=r"(all)
      : "r"(id), "r"(int(x))
      : "memory");
  return __all_sync(0xffffffff, all);
}

// -- the bulk tensor copy engine --------------------------------------------------------------------

// What createpolicy.fractional.L2 makes of "evict first" and "evict last" for all of the data.
constexpr uint64_t kEvictFirst = 0x12F0000000000000, kEvictLast = 0x14F0000000000000;

__device__ __forceinline__ void tma_load(void* destination, const CUtensorMap* map, uint64_t* barrier, int d, int row,
                                         int head, int batch, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(
          smem_address(destination)),
      "l"(map), "r"(smem_address(barrier)), "r"(d), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* source, int d, int row, int head,
                                          int batch, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], %6;" ::"l"(map),
      "r"(smem_address(source)), "r"(d), "r"(row), "r"(head), "r"(batch), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until the engine has read the shared memory of all stores committed by this thread.
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// Orders what was written with ordinary stores and cp.async before what the copy engine and wgmma read.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// -- 16-byte copies, for gathered keys --------------------------------------------------------------

__device__ __forceinline__ void copy_16_bytes(uint32_t destination, uint64_t source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}
__device__ __forceinline__ void copy_16_bytes_or_zeros(uint32_t destination, uint64_t source, bool is_used) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(is_used ? 16 : 0)
               : "memory");
}

// Arrives when all earlier copies of this thread have landed.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier)) : "memory");
}

// a * b + c in one instruction, and here: left to itself, ptxas works out each address just before its copy.
__device__ __forceinline__ uint64_t multiply_add(uint32_t a, uint32_t b, uint64_t c) {
  uint64_t d;
  asm volatile("mad.wide.u32 %0, %1, %2, %3;" : "=l"(d) : "r"(a), "r"(b), "l"(c));
  return d;
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// -- warpgroup matrix multiply ----------------------------------------------------------------------

template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The same value in every lane, said so that the compiler keeps it, and all that follows from it, in uniform
// registers: matrix descriptors live there.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }
__device__ __forceinline__ bool same_in_warp(bool x) { return __any_sync(0xffffffff, x); }

// Costs nothing: tells the compiler that registers change here, so that it moves no use of them across.
template <int N>
__device__ __forceinline__ void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// Costs nothing: what the registers hold is not needed, so that nothing keeps it.
template <int N>
__device__ __forceinline__ void forget(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "=f"(registers[i]));
}

// What follows does not start before x >= 0 is known; the store never happens. ptxas moves waits up past arithmetic,
// but not past this.
__device__ __forceinline__ void hold_until(float x, void* somewhere) {
  asm volatile("{\n.reg .pred never;\nsetp.lt.f32 never, %0, 0f00000000;\n@never st.volatile.shared.f32 [%1], %0;\n}\n" ::"f"(x), "r"(smem_address(somewhere)) : "memory");
}

// Shared-memory matrix descriptor, 128-byte swizzle. Offsets in bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* tile, int leading_bytes, int stride_bytes) {
  uint64_t descriptor = (smem_address(tile) & 0x3FFFF) >> 4;
  descriptor |= static_cast<uint64_t>(leading_bytes >> 4) << 16;
  descriptor |= static_cast<uint64_t>(stride_bytes >> 4) << 32;
  return descriptor | (1ull << 62);
}

// D[64 x N] = A[64 x 16] B[16 x N] (+ D when accumulate != 0), D in N / 2 fp32 registers of each thread of a warpgroup.
//   shared_k_major     S = Q K^T: both operands in shared memory, K-major
//   registers_n_major  O += P V: A in registers, B with its N dimension contiguous in shared memory
template <typename Element, int N>
struct Wgmma;

// The operands of D: their places in the text, and the registers.
#define SPARSE_ATTN_PLACES_32                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"                                                 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPARSE_ATTN_PLACES_64                                                                                            \
  SPARSE_ATTN_PLACES_32                                                                                                  \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"                                     \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPARSE_ATTN_PLACES_128                                                                                           \
  SPARSE_ATTN_PLACES_64                                                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"                                     \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"                                     \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"                         \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SPARSE_ATTN_D_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SPARSE_ATTN_D_16(i) SPARSE_ATTN_D_4(i), SPARSE_ATTN_D_4(i + 4), SPARSE_ATTN_D_4(i + 8), SPARSE_ATTN_D_4(i + 12)
#define SPARSE_ATTN_D_32 SPARSE_ATTN_D_16(0), SPARSE_ATTN_D_16(16)
#define SPARSE_ATTN_D_64 SPARSE_ATTN_D_32, SPARSE_ATTN_D_16(32), SPARSE_ATTN_D_16(48)
#define SPARSE_ATTN_D_128 \
  SPARSE_ATTN_D_64, SPARSE_ATTN_D_16(64), SPARSE_ATTN_D_16(80), SPARSE_ATTN_D_16(96), SPARSE_ATTN_D_16(112)

// x0 to x5: the numbers of the operands after those `count` of D.
#define SPARSE_ATTN_WGMMA(Element, type, N, count, x0, x1, x2, x3, x4, x5)                                               \
  template <>                                                                                                            \
  struct Wgmma<Element, N> {                                                                                             \
    __device__ static __forceinline__ void shared_k_major(float (&d)[count], uint64_t a, uint64_t b, int accumulate) {   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #x2 ", 0;\n"                                                     \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type                                       \
                   " {" SPARSE_ATTN_PLACES_##count "}, %" #x0 ", %" #x1 ", p, 1, 1, 0, 0;\n}\n"                          \
                   : SPARSE_ATTN_D_##count                                                                               \
                   : "l"(a), "l"(b), "r"(accumulate));                                                                   \
    }                                                                                                                    \
    __device__ static __forceinline__ void registers_n_major(float (&d)[count], const uint32_t (&a)[4], uint64_t b,      \
                                                             int accumulate) {                                           \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #x5 ", 0;\n"                                                     \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type                                       \
                   " {" SPARSE_ATTN_PLACES_##count "}, {%" #x0 ", %" #x1 ", %" #x2 ", %" #x3 "}, %" #x4 ", p, 1, 1, 1;\n}\n"\
                   : SPARSE_ATTN_D_##count                                                                               \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                               \
    }                                                                                                                    \
  }

SPARSE_ATTN_WGMMA(__nv_bfloat16, "bf16", 64, 32, 32, 33, 34, 35, 36, 37);
SPARSE_ATTN_WGMMA(__nv_bfloat16, "bf16", 128, 64, 64, 65, 66, 67, 68, 69);
SPARSE_ATTN_WGMMA(__nv_bfloat16, "bf16", 256, 128, 128, 129, 130, 131, 132, 133);
SPARSE_ATTN_WGMMA(__half, "f16", 64, 32, 32, 33, 34, 35, 36, 37);
SPARSE_ATTN_WGMMA(__half, "f16", 128, 64, 64, 65, 66, 67, 68, 69);
SPARSE_ATTN_WGMMA(__half, "f16", 256, 128, 128, 129, 130, 131, 132, 133);

}  // namespace sparse_attn::hopper
