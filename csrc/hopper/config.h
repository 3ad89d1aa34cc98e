// Sizes of the Hopper kernels, each with the reason for it. Measured on an H100 80GB HBM3.
#pragma once

namespace sparse_attn::hopper {

constexpr int BLOCK_M = 128;   // queries of a tile: two warpgroups of 64, the rows of one matrix instruction
constexpr int BLOCK_N = 128;   // keys of a stage: a layout block, or several small ones packed
constexpr int kStages = 2;     // K and V tiles in flight, each: 160 KB with Q at head size 128
constexpr int kThreads = 384;  // one producer and two consumer warpgroups
constexpr int kConsumers = 256;
constexpr int kChunk = 64;     // 16-bit elements of a 128-byte swizzled row

// 40 for the producer: with 24 it spilled 12 to 20 bytes of its index window.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

}  // namespace sparse_attn::hopper
