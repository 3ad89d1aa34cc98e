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
  // Two lists as stages that both warpgroups read, then rounds of one stage for each.
  static constexpr bool ROUNDS = HALVES && !SKIP;
  // Two lists walked as one, whose entries say in two bits who reads them.
  static constexpr bool PAIRED = HALVES && SKIP;
  // The warpgroups take turns on the matrix unit where stages are their own or gathered: 662 TFLOPS, without turns 657 (S2
  // S32768). Elsewhere they do better without: lists of density 0.5 756 and 746, head size 64 519 and 499, the skip 27.1 ms and
  // 28.6 (S65536, 94 % left out). All but head size 64 on an H200.
  static constexpr bool TURNS = HEAD_DIM > 64 && (ROUNDS || COLUMNS);
  static constexpr int BLOCK_N = stage_keys(HEAD_DIM);
  static constexpr int kEntries = BLOCK_N / KEY_BLOCK;  // of a stage
  static constexpr int kKeyStages = key_stages(HEAD_DIM, SKIP), kValueStages = value_stages(HEAD_DIM, ROUNDS);
  // A warpgroup that does not wait for every V of a barrier cannot tell by parity which phase it sees, and looks at the number
  // of those brought first. With ROUNDS and more than one V stage, the wait for K sees to it.
  static constexpr bool COUNTS_V = SKIP || (ROUNDS && kValueStages == 1);
  static constexpr int kProducers = COLUMNS ? 128 : 32;  // threads
  static constexpr int kArrivals = COLUMNS ? 128 : 1;    // that fill a stage
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
  int rounds, masked_rounds;  // with ROUNDS, after those: two stages each
  int masked_columns;  // stages after those that hold columns
  int columns;         // leading stages that hold columns
  int visible, visible_columns;  // entries read
  int is_last;         // nothing to do: there are no more
  float skip_below;    // with SKIP: how far below the maximum a score counts for nothing, unscaled; -inf: never
  int64_t list, column_list;  // of the first entry in p.indices and p.column_indices
};

// Heads go in sections whose keys and values fit the L2 cache together, alike in size; inside a section the longest rows come
// first.
template <typename K>
__device__ __forceinline__ Work find_work(const AttendFwdParams& p, int item) {
  Work work = {};
  work.is_last = item >= p.num_items;
  if (work.is_last) return work;
  int heads = p.heads_per_section, first_head = 0;
  if (const int long_items = p.num_long_sections * heads * p.num_tiles; item >= long_items) {
    item -= long_items, first_head = p.num_long_sections * heads;
    heads -= p.gqa_group;
  }
  const int per_section = heads * p.num_tiles, rest = item % per_section;
  const int batch_head = first_head + item / per_section * heads + rest % heads;
  const int place = rest / heads;
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
    work.unmasked = p.bounds[row * 3], work.rounds = p.bounds[row * 3 + 1], work.masked_rounds = p.bounds[row * 3 + 2];
    work.count = work.unmasked + 2 * (work.rounds + work.masked_rounds);
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
    work.count += stages;
    work.unmasked += work.columns;
  }
  return work;
}

// The same, from shared memory, in uniform registers: what a consumer needs of it.
__device__ __forceinline__ Work read_work(const Work& shared, int group) {
  Work work = {};
  work.is_last = uniform(shared.is_last);
  work.batch = uniform(shared.batch), work.head = uniform(shared.head);
  work.first_query[0] = uniform(shared.first_query[group]);
  work.count = uniform(shared.count), work.unmasked = uniform(shared.unmasked);
  work.masked_columns = uniform(shared.masked_columns);
  work.rounds = uniform(shared.rounds), work.masked_rounds = uniform(shared.masked_rounds);
  work.skip_below = shared.skip_below;
  return work;
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
  int words[K::kKeyStages][K::kEntries];  // of the list, of each block in a K tile
  alignas(16) int columns[K::COLUMNS ? K::kKeyStages : 1][K::BLOCK_N];  // keys in a K tile of columns
};

}  // namespace sparse_attn::hopper
