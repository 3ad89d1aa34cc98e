// What the operators (attend.cpp) hand to the kernels: plain structs, no torch, no C++ library. The
// kernels are compiled once per instruction set, so nothing here may be an inline function of the
// standard library: the linker keeps one copy of those, perhaps one that this machine cannot run.
//
// Letters: L, S query and key length; D, Dv query/key and value head size.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparse_attn {

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// Rows of one head in an input's own dtype.
struct RawRows {
  const void* base;  // [rows][width], last stride 1
  int64_t stride;    // elements from row to row
  DType dtype;
};

// Rows of one head in float32: the input itself, or a packed copy of it.
struct Rows {
  const float* base;  // [rows][width], last stride 1
  int64_t stride;
};

// What all passes of one call share.
struct Shape {
  int64_t L, S;
  int64_t block_m, block_n;
  int D, Dv;
  bool is_causal;  // query i sees keys j <= i + S - L
  float scale;
  DType dtype;  // of the inputs and of the results
};

// The keys that one query block reads: visible entries only.
struct KeyList {
  const int32_t* blocks;
  int64_t num_blocks;
  const int32_t* columns;  // null: none
  int64_t num_columns;
};

// One query block, or a part of one where no vote joins its queries.
struct ForwardTask {
  RawRows q;  // the whole head
  Rows k, v;
  int64_t first_query, num_queries;
  KeyList keys;
  const uint16_t* groups;  // the head's keys and values as packed by pack_group; null: k and v are read
  RawRows raw_k, raw_v;    // beside them: where columns are gathered from
  bool has_skip;
  float skip_below;  // natural log of lambda
  void* out;         // [L][Dv] of the head
  int64_t out_stride;
  float* lse;      // [L] of the head
  uint8_t* kept;   // [Sb] of the query block, zeroed; null: not asked
  float* scratch;  // forward_scratch floats, 64-byte aligned
};

// dq of one query block, or of a part of one.
struct BackwardQueryTask {
  RawRows q, grad_out;
  Rows k, v;
  int64_t first_query, num_queries;
  KeyList keys;
  const float* lse;
  const float* delta;   // [L] of the head
  const uint8_t* kept;  // [Sb] of the query block; null: all
  void* dq;             // [L][D] of the head
  int64_t dq_stride;
  float* scratch;
};

// The query blocks of one head that read some keys.
struct QuerySource {
  Rows q, grad_out;
  const float* lse;
  const float* delta;
  const int32_t* blocks;  // query-block numbers; null: first_block, first_block + 1, ...
  int64_t first_block, num_blocks;
  const uint8_t* kept;  // entry [i * kept_stride] for query block i; null: all
  int64_t kept_stride;
};

// dk and dv of a run of keys, summed over the query heads that share them.
struct BackwardKeyTask {
  RawRows k, v;          // the whole head
  const int32_t* keys;   // key positions; null: first_key, first_key + 1, ...
  int64_t first_key, num_keys;
  const QuerySource* sources;
  int64_t num_sources;
  void* dk;  // [S][D] of the head in the inputs' dtype; unused where `accumulate` is set
  int64_t dk_stride;
  void* dv;
  int64_t dv_stride;
  float* dk_sum;    // float32 [S][D] of the head; null: none. Added to, or added in
  float* dv_sum;    // float32 [S][Dv] of the head
  bool accumulate;  // add the result to the sums instead of writing sums + result to dk and dv
  float* scratch;
};

// -- AnchorAttention's selection ---------------------------------------------------------------------------

// What the logits of the anchor come to for one query block, and its mean query.
struct PoolTask {
  RawRows q;  // the whole head
  Rows k;
  int64_t first_query, num_queries;
  int64_t init_end, local;  // the anchor: keys below init_end, and from local up to the diagonal
  bool is_lse;              // else the maximum
  float* anchor;            // one number: the mean over the queries, -inf if one sees no key
  float* mean;              // [D], times the scale
  float* scratch;           // pool_scratch floats
};

enum class Reference : int { kGiven, kMaxOfAnchor, kLseOfAnchor, kLseOfAll };

constexpr float kThetaStep = 0.5f;  // `recall` chooses theta from 0, 0.5 .. 16, then infinity
constexpr int kThetaSteps = 32;

// Of one head, so far: mass of its speakers by the number of the least theta that keeps it.
struct KeptMass {
  double mass[kThetaSteps + 1];
  double speakers;
};

// Which keys the speakers of some superblocks of one head want: a key j, begin <= j < stop, for which one of
// them has reference - logit <= theta.
struct ListTask {
  Rows k;
  int64_t S, num, R;  // superblocks: at most `lanes` where R is 1, else half as many; R speakers each
  int D;
  const float* speakers;  // [num][R][D], times the scale
  const int64_t* seen;    // [num][R]: a speaker sees keys below this; 0: it is none
  const int64_t* stop;    // [num], ascending, above begin
  int64_t begin;          // keys below it, and from `stop` on, are the anchor
  Reference reference;
  const float* given;       // [num][R], for kGiven
  const float* theta;       // [num]; null: from `recall` (0 for kGiven)
  double recall;            // share of the speakers' mass that is to be kept
  const uint8_t* measured;  // [num]: superblocks whose mass counts
  KeptMass* kept;           // of the superblocks before; updated
  uint32_t* wants;          // out: [S], bit s: superblock s wants the key. Set from begin to the last stop
  float* scratch;           // list_scratch floats
};

// The entry points of one instruction set.
struct Kernels {
  const char* name;
  int lanes;       // queries (or keys) that a panel holds
  int group_keys;  // keys that pack_group packs for `forward`; 0: it packs none
  int64_t (*group_items)(const Shape&);   // 16-bit elements of a packed group
  int64_t (*group_scratch)(const Shape&);  // floats
  // Packs the keys and values of a group; false where one of them cannot be packed exactly.
  bool (*pack_group)(const Shape&, const RawRows& k, const RawRows& v, int64_t group, float* scratch,
                     uint16_t* target);
  // Copies `count` rows of `width` elements into float32 rows.
  void (*pack)(const RawRows& source, int64_t first, int64_t count, int width, float* target, int64_t stride);
  int64_t (*forward_scratch)(const Shape&, int64_t num_queries, bool has_skip);  // floats
  // False, and nothing written, where groups are given and the queries cannot be packed exactly.
  bool (*forward)(const Shape&, const ForwardTask&);
  int64_t (*backward_scratch)(const Shape&, int64_t lanes);
  void (*backward_query)(const Shape&, const BackwardQueryTask&);
  void (*backward_key)(const Shape&, const BackwardKeyTask&);
  int64_t (*pool_scratch)(const Shape&, int64_t num_queries);
  void (*pool)(const Shape&, const PoolTask&);
  int64_t (*list_scratch)(const ListTask&);  // by S, R, D and reference
  void (*list)(const ListTask&);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_amx;
#endif

}  // namespace sparse_attn
