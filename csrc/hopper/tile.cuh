// What one work item is: its queries, its list, and the shared memory it uses.
#pragma once
#include "config.h"
#include "params.h"
#include "ptx.cuh"

namespace sparse_attn::hopper {

// A kernel of the family.
//   HALVES   each warpgroup has a query block of 64 with a list of its own. Otherwise a block is the whole tile.
//   SKIP     BLASST: a tile whose scores all lie far below the running maxima of its queries is left out, by each warpgroup
//            for itself with HALVES, else by both together.
//   COLUMNS  single keys beside the blocks, gathered.
//   GROUPS   consumer warpgroups, each with the 64 rows of one matrix instruction.
template <typename Element_, int HEAD_DIM_, int KEY_BLOCK_, bool HALVES_, bool SKIP_, bool COLUMNS_, int GROUPS_>
struct Kernel {
  using Element = Element_;
  static constexpr int HEAD_DIM = HEAD_DIM_, KEY_BLOCK = KEY_BLOCK_;
  static constexpr bool HALVES = HALVES_, SKIP = SKIP_, COLUMNS = COLUMNS_;
  static constexpr int GROUPS = GROUPS_, BLOCK_M = 64 * GROUPS;
  static constexpr int kConsumers = 128 * GROUPS, kThreads = 128 + kConsumers;
  // Two lists as stages that both warpgroups read, then rounds of one stage for each. Elsewhere they are walked as one. In
  // both, two bits of an entry say who reads it.
  static constexpr bool ROUNDS = HALVES && !SKIP;
  // The warpgroups take turns on the matrix unit where stages are their own or gathered: 662 TFLOPS, without turns 657 (S2
  // S32768). Elsewhere they do better without: lists of density 0.5 756 and 746, head size 64 519 and 499, the skip 27.1 ms and
  // 28.6 (S65536, 94 % left out). All but head size 64 on an H200.
  static constexpr bool TURNS = HEAD_DIM > 64 && (ROUNDS || COLUMNS);
  // Tiles cut short come after all others; the warpgroups without queries leave then, and the last speaks for them. Under the
  // causal edge the first ones let the last stage pass, of which they see nothing.
  static constexpr bool LEAVES = GROUPS == 3;
  static constexpr int BLOCK_N = stage_keys(HEAD_DIM);
  static constexpr int kEntries = BLOCK_N / KEY_BLOCK;  // of a stage
  // Of the last stage, which needs a mask, a warpgroup may multiply half.
  static constexpr bool MAY_HALVE = BLOCK_N == 128 && ((ROUNDS && kEntries > 1) || COLUMNS || LEAVES);
  static constexpr int kKeyStages = key_stages(HEAD_DIM, SKIP), kValueStages = value_stages(HEAD_DIM, ROUNDS);
  // A warpgroup that does not wait for every V of a barrier cannot tell by parity which phase it sees, and looks at the number
  // of those brought first. With ROUNDS and more than one V stage, the wait for K sees to it.
  static constexpr bool COUNTS_V = SKIP || (ROUNDS && kValueStages == 1);
  // A warpgroup that goes ahead in rounds does not see the other's stages come, and so at the next stage n that both read may
  // take a parity of two phases before for its own. It looks at how far the other is: the second warpgroup, before K of n,
  // that the first has multiplied K of n - 2; after that the first, that the second has n - 1, for K of n + 1; and the second,
  // that the first has n, and so V of n - 2, for V of n + 2. With turns the other has multiplied before.
  static constexpr bool WATCHES = ROUNDS && !TURNS;
  static constexpr int kProducers = COLUMNS ? 128 : 32;  // threads
  static constexpr int kArrivals = COLUMNS ? 128 : 1;    // that fill a stage
  static constexpr int kFinishAfter = finish_after(HEAD_DIM, GROUPS);  // 1 / kFinishAfter of the exponentials
  static constexpr int kUnroll = GROUPS == 2 ? 2 : 1;    // stages a loop: two need 171 registers, and three warpgroups have 160
};

// A place in a ring of barriers: which of them, and the parity of its phase.
template <int STAGES>
struct Ring {
  unsigned at = 0, wraps = 0;
  __device__ __forceinline__ int slot() const { return at; }
  __device__ __forceinline__ int phase() const { return wraps & 1; }
  __device__ __forceinline__ void advance(unsigned by) {  // at most STAGES
    at += by;
    if (at >= STAGES) at -= STAGES, ++wraps;
  }
};
// A power of two divides with shifts.
template <int STAGES> requires((STAGES & (STAGES - 1)) == 0)
struct Ring<STAGES> {
  unsigned at = 0;
  __device__ __forceinline__ int slot() const { return at % STAGES; }
  __device__ __forceinline__ int phase() const { return (at / STAGES) & 1; }
  __device__ __forceinline__ void advance(unsigned by) { at += by; }
};

constexpr int kNoKey = 0x7fffffff;  // in a slot of a stage that holds no column

// One work item: 64 queries a warpgroup of one head, and the lists that they read. Stages run: columns, blocks, columns
// that need a mask, blocks that need a mask.
struct Work {
  int batch, head;
  int first_query[kMostGroups];  // of each warpgroup
  int count;           // stages
  int unmasked;        // leading stages that need no mask; with ROUNDS, that both warpgroups read
  int rounds, masked;  // with ROUNDS, after those: rounds of two stages, then rounds that need a mask, or
  int is_together;     // stages that need a mask and that both warpgroups read
  int masked_columns;  // stages after those that hold columns
  int columns;         // leading stages that hold columns
  int visible, visible_columns;  // entries read
  int last_is_half;    // the second half of the last stage, which needs a mask, holds nothing; with ROUNDS a bit a warpgroup
  int is_last;         // nothing to do: there are no more
  float skip_below;    // with SKIP: how far below the maximum a score counts for nothing, unscaled; -inf: never
  int64_t list, column_list;  // of the first entry in p.indices and p.column_indices
};

// Heads go in sections whose keys and values fit the L2 cache together, alike in size; inside a section the longest rows come
// first.
template <typename K>
__device__ __forceinline__ void find_work(const AttendFwdParams& p, int item, Work& work) {
  work.is_last = item >= p.num_items;
  if (work.is_last) return;
  const int tiles = p.num_tiles - (K::LEAVES && p.first_row < 0);
  const int cut_item = item - tiles * p.batch * p.q_heads;
  int heads = p.heads_per_section, first_head = 0;
  if (const int long_items = p.num_long_sections * heads * tiles; item >= long_items) {
    item -= long_items, first_head = p.num_long_sections * heads;
    heads -= p.gqa_group;
  }
  const int per_section = heads * tiles, rest = item % per_section;
  int batch_head = first_head + item / per_section * heads + rest % heads;
  int place = rest / heads;
  if (K::LEAVES && cut_item >= 0) batch_head = cut_item, place = tiles;
  work.batch = batch_head / p.q_heads;
  work.head = batch_head % p.q_heads;
  const int64_t group =
      work.batch * p.list_stride_batch + (work.head / p.list_head_divisor) * p.list_stride_head;
  const int32_t* order = p.order + group * p.num_query_blocks;
  int64_t row;
  if constexpr (K::HALVES) {
    row = group * p.num_tiles + place;
#pragma unroll
    for (int g = 0; g < 2; ++g)  // an odd last block has no neighbour: all its queries lie past the end
      work.first_query[g] = 64 * (2 * place + g < p.num_query_blocks ? order[2 * place + g] : p.num_query_blocks);
  } else {
    const int block = order[place];
    row = group * p.num_query_blocks + block;
#pragma unroll
    for (int g = 0; g < K::GROUPS; ++g) {
      const int query = p.first_row + block * K::BLOCK_M + 64 * g;
      work.first_query[g] = query < 0 ? p.L : query;  // the copy engine takes no rows before the first
    }
  }
  work.list = p.offsets[row];
  if constexpr (K::ROUNDS) {
    const int4 bounds = reinterpret_cast<const int4*>(p.bounds)[row];
    work.unmasked = bounds.x, work.rounds = bounds.y, work.masked = bounds.z;
    work.last_is_half = bounds.w & 3, work.is_together = bounds.w >> 2;
    work.count = work.unmasked + (work.rounds + work.masked) * (work.is_together ? 1 : 2);
    work.visible = work.count * K::kEntries;
  } else {
    work.unmasked = p.bounds[row * 2] / K::kEntries;
    work.visible = p.bounds[row * 2 + 1];
    work.count = (work.visible + K::kEntries - 1) / K::kEntries;
  }
  if constexpr (K::SKIP) work.skip_below = p.skip_below[batch_head] / p.scale;
  if constexpr (K::COLUMNS) {
    const int64_t block_row = group * p.num_query_blocks + work.first_query[0] / K::BLOCK_M;
    work.columns = p.column_bounds[block_row * 2] / K::BLOCK_N;
    work.visible_columns = p.column_bounds[block_row * 2 + 1];
    const int stages = (work.visible_columns + K::BLOCK_N - 1) / K::BLOCK_N;
    work.masked_columns = stages - work.columns;
    work.column_list =
        p.column_offsets[group * p.column_rows + work.first_query[0] / K::BLOCK_M / p.column_group];
    // Where the last stage holds columns, and the second half of it none.
    work.last_is_half = work.count == work.unmasked && work.masked_columns > 0 &&
                        (work.visible_columns - 1) % K::BLOCK_N < K::BLOCK_N / 2;
    work.count += stages;
    work.unmasked += work.columns;
  }
}

// What one consumer warpgroup needs of an item, in uniform registers.
struct Part {
  int is_last, batch, head, first_query;
  int count;   // stages of the item
  int visits;  // of its own, the first stage's and the last's among them
  int clear;   // visits without a mask
  int shared;  // leading stages that every warpgroup visits without a mask
  int alone;   // with ROUNDS: the stages after those are rounds
  int masked_columns;  // visits after the clear ones, of stages that hold columns
  int last_is_half;    // of the last visit, which needs a mask, the second half holds nothing
  int voices;          // for how many warpgroups it frees stages
  float skip_below;
};

template <typename K>
__device__ __forceinline__ Part read_work(const AttendFwdParams& p, const Work& work, int group) {
  Part part = {};
  part.is_last = uniform(work.is_last);
  part.batch = uniform(work.batch), part.head = uniform(work.head);
  part.first_query = uniform(work.first_query[group]);
  part.count = part.visits = uniform(work.count), part.shared = part.clear = uniform(work.unmasked);
  part.voices = 1;
  if constexpr (K::ROUNDS) {
    part.clear += uniform(work.rounds);
    part.visits = part.clear + uniform(work.masked);
    part.alone = 1 - uniform(work.is_together);
  }
  if constexpr (K::MAY_HALVE && !K::LEAVES) part.last_is_half = uniform(work.last_is_half) >> (K::ROUNDS ? group : 0) & 1;
  if constexpr (K::COLUMNS) part.masked_columns = uniform(work.masked_columns);
  if constexpr (K::SKIP) part.skip_below = work.skip_below;
  if constexpr (K::LEAVES) {
    part.is_last |= part.first_query >= p.L;
    if (group == K::GROUPS - 1 && uniform(work.first_query[0]) >= p.L) part.voices -= p.first_row / 64;
    if (p.is_causal) {
      const int end = part.first_query + 64 + p.S - p.L;  // of the keys that its queries see
      part.visits = max(1, min(part.count, (end - 1) / K::BLOCK_N + 1));
      part.last_is_half = part.visits > part.clear && min(end, p.S) - (part.visits - 1) * K::BLOCK_N <= K::BLOCK_N / 2;
    }
  }
  return part;
}

template <typename K>
struct alignas(1024) SharedStorage {
  using Element = typename K::Element;
  Element q[kTiles][K::BLOCK_M * K::HEAD_DIM];  // [GROUPS][HEAD_DIM / 64][64][64], swizzled; then O, the same
  Element k[K::kKeyStages][K::BLOCK_N * K::HEAD_DIM];    // [HEAD_DIM / 64][BLOCK_N][64], swizzled
  Element v[K::kValueStages][K::BLOCK_N * K::HEAD_DIM];
  uint64_t q_full[kTiles], o_full[kTiles], q_empty[kTiles];
  uint64_t k_full[K::kKeyStages], k_empty[K::kKeyStages], v_full[K::kValueStages], v_empty[K::kValueStages];
  uint64_t work_full[2], work_empty[2];
  Work work[2];  // the next item is found while the consumers are at the last
  float nothing;          // for hold_until
  unsigned filled;        // stages whose K was asked for, when few of an item are left; not with ROUNDS
  // With SKIP, of the last four stages: what each consumer warp voted, 2 * (1 + stage) + (it keeps the tile).
  alignas(16) unsigned votes[4][K::kConsumers / 32];
  unsigned done[2];       // with SKIP: stages whose V each warpgroup will not read again
  unsigned brought;       // with COUNTS_V: stages whose V was asked for, or left out
  unsigned passed[2];     // with WATCHES: stages before and with the last of a round, or first of an item, that each multiplied
  int words[K::kKeyStages][K::kEntries];  // of the list, of each block in a K tile
  alignas(16) int columns[K::COLUMNS ? K::kKeyStages : 1][K::BLOCK_N];  // keys in a K tile of columns
};

}  // namespace sparse_attn::hopper
