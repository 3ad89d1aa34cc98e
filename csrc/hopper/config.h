// Sizes of the Hopper kernels, each with the reason for it. Measured on an H100 80GB HBM3.
#pragma once

namespace sparse_attn::hopper {

constexpr int kMostGroups = 3;  // consumer warpgroups: three at head size 64 where all rows read the same keys (582 TFLOPS for
                                // 543, full S16384 on an H200), else two, whose 128 queries are a block of the layouts
constexpr int kChunk = 64;     // 16-bit elements of a 128-byte swizzled row
// A block takes its next item when so many stages of those that it has are still to be filled; of rounds, where the note that
// says it costs the producer 0.5 to 4 % (64 x 64 lists), when the last item begins. With two items taken ahead, causal head size
// 64 kept the processors busy 90 % of the time (S16384).
constexpr int kLastStages = 8;

// Keys of a stage: a layout block, several small ones packed, or gathered columns. At head size 256 shared memory has room
// for two Q tiles and three of 64 keys.
constexpr int stage_keys(int head_dim) { return head_dim <= 128 ? 128 : 64; }

constexpr int kTiles = 2;      // Q tiles in flight: the next item's first product starts before this one's last

// K and V tiles in flight. At head size 128 shared memory holds five.
//   rounds  each warpgroup has its own, and V waits longest: 584 TFLOPS, with two of V 553 (64 x 64 lists, density 0.25)
//   skip    a stage that is left out needs K alone: 1061 TFLOPS, with two of K 1010 (all tiles left out)
// Else a third only costs: 750 of 765 TFLOPS (causal), 632 of 651 (columns).
constexpr int key_stages(int head_dim, bool skip) { return head_dim <= 64 ? 4 : skip ? 3 : 2; }
constexpr int value_stages(int head_dim, bool rounds) {
  return head_dim <= 64 ? 4 : head_dim > 128 ? 1 : rounds ? 3 : 2;
}

// Registers of a producer's thread; the consumers get the rest. The least without spills: the addresses of gathered
// keys take many. At most 168 x 384 in all, or 128 x 512.
constexpr int producer_registers(bool gathers, int groups) { return groups == 3 ? 32 : gathers ? 72 : 40; }
constexpr int consumer_registers(bool gathers, int groups) {
  return groups == 3 ? 160 : 252 - producer_registers(gathers, groups) / 2;
}

// P V of the stage before is waited for after half of a row's exponentials, so that the rest hides the packing and the
// rescaling. After a quarter, a half, three quarters and all: 1.018, 1.018, 0.997, 0.954 of FA3 (full H24 S32768 D128). At head
// size 64 with two warpgroups a quarter: 1.045 and 1.024 times as fast as half (lists of density 0.5 and 0.05 on an H200).
constexpr int finish_after(int head_dim, int groups) { return head_dim == 64 && groups == 2 ? 4 : 2; }
// The exponentials before that are held to come first (ptx.cuh, hold_until), but where three warpgroups have the matrix unit
// busy: full head size 64 is 1.041 times as fast without (S16384, H200), causal head size 128 0.990.
constexpr bool holds(int groups) { return groups == 2; }

// With SKIP, sleep between two looks of the warps that find work and write outputs, and of the one that brings V: 52.4 ms,
// without 53.4 (S65536, nothing skipped), where the card's power is the limit. The other kernels gain nothing.
constexpr unsigned kIdleNanoseconds = 1000, kValueNanoseconds = 100;
constexpr unsigned kFilledNanoseconds = 300;  // between looks at how many stages are filled, all kernels

// Numbers of the named barriers: 1 + g is warpgroup g's turn to issue products, the others its own.
constexpr int kTurnBarrier = 1, kGatherBarrier = 3, kProducerBarrier = 5, kVoteBarrier = 6, kPairBarrier = 8;
constexpr int kPassBarrier = 12;

}  // namespace sparse_attn::hopper
