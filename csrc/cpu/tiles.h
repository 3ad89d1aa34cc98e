// The two matrix products of attention on AMX tiles, as exact as float32: every operand is the sum of
// bfloat16 pieces (three hold all 24 bits of a float32), and of the products of pieces only those are left
// out that lie below 2^-24 of the whole. The tiles add in float32.
//
// C[16][16] += A[16][32] B[32][16]: A holds rows of K (or of V transposed), B the panel's lanes (queries, or
// their weights), with two neighbours of the summed dimension in each 32-bit element.
#pragma once

#include "panels.h"

namespace sparse_attn {
namespace {

#if defined(__AMX_BF16__)
#define SPARSE_ATTN_TILES 1

constexpr int kTileKeys = 32;     // keys of a group: two A tiles of scores, one step of a value product
constexpr int kTileItems = 512;   // 16-bit elements of a tile
static_assert(kPanel == 32, "a panel is two tiles of lanes");

// Pieces of a query, key or value. float16 has 11 bits.
constexpr int pieces_of(DType dtype) {
  return dtype == DType::kBFloat16 ? 1 : dtype == DType::kFloat16 ? 2 : 3;
}

// Pieces of a weight. Where results have 8 or 11 bits, 16 of a weight are enough.
constexpr int weight_pieces(int pieces) { return pieces == 3 ? 3 : 2; }

inline int64_t ceil_to(int64_t x, int64_t unit) { return (x + unit - 1) / unit; }

// A group of 32 keys: K as [32 of D][piece][key half] tiles of [16 keys][32 of D], V as
// [32 of Dv][piece][half of those] tiles of [16 of Dv][32 keys]. Padded with zeros.
struct GroupShape {
  int pieces;
  int64_t d_tiles, c_tiles;

  explicit GroupShape(const Shape& shape)
      : pieces(pieces_of(shape.dtype)), d_tiles(ceil_to(shape.D, 32)), c_tiles(ceil_to(shape.Dv, 16)) {}

  int64_t key_items() const { return pieces * d_tiles * 2 * kTileItems; }
  int64_t value_items() const { return pieces * c_tiles * kTileItems; }
  int64_t items() const { return key_items() + value_items(); }
};

// -- pieces ----------------------------------------------------------------------------------------------

// Takes the leading piece off x: its 8 leading bits, rounded (so that what is left has a random sign and
// half the size) or cut off.
template <bool kRound>
inline Int take_piece(Vec& x) {
  Int bits = (Int)x;
  if constexpr (kRound) bits += 0x8000;
  bits &= static_cast<int32_t>(0xffff0000u);
  x -= (Vec)bits;
  return bits;
}

// Two values a lane, as pairs of 16-bit pieces: target[i * piece_stride] for piece i.
template <int kPieces, bool kRound>
inline void split_pair(Vec low, Vec high, uint16_t* target, int64_t piece_stride) {
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i) {
    Int a = take_piece<kRound>(low), b = take_piece<kRound>(high);
    Int pair = (Int)((__v16su)a >> 16) | b;
    store(reinterpret_cast<float*>(target + i * piece_stride), (Vec)pair);
  }
}

// Whether numbers have pieces whose products neither overflow nor fall below the normal numbers, which tiles
// take for 0: of scores those from 2^-100 up to 2^58 (queries and keys are multiplied), of values up to 2^116;
// and 0, but not NaN.
struct Plain {
  static constexpr float kScores = 0x1p58f, kValues = 0x1p116f, kLeast = 0x1p-100f;
  __m512i largest = _mm512_setzero_si512(), least = _mm512_set1_epi32(-1);  // of the magnitudes; least less 1

  void see(Vec x) {
    __m512i bits = _mm512_and_epi32((__m512i)x, _mm512_set1_epi32(0x7fffffff));
    largest = _mm512_max_epu32(largest, bits);
    least = _mm512_min_epu32(least, _mm512_sub_epi32(bits, _mm512_set1_epi32(1)));  // 0 counts as the largest
  }

  bool all(float limit) const {
    return _mm512_reduce_max_epu32(largest) <= to_bits(limit) &&
           _mm512_reduce_min_epu32(least) >= to_bits(kLeast) - 1;
  }
};

// -- packing -----------------------------------------------------------------------------------------------

// The group's rows in float32, `width` rounded up to 32: as they lie in memory where that can be, else
// copied to `rows`, padded with zeros.
inline RowRun group_rows(const RawRows& source, const int32_t* index, int64_t first, int64_t count, int width,
                         float* rows) {
  if (source.dtype == DType::kFloat32 && count == kTileKeys && width % 32 == 0) {
    return {static_cast<const float*>(row_of(source, index ? 0 : first)), source.stride, index};
  }
  int64_t padded = ceil_to(width, 32) * 32;
  for (int64_t i = 0; i < kTileKeys; ++i) {
    float* row = rows + i * padded;
    int filled = i < count ? width : 0;
    if (filled) widen(row_of(source, index ? index[i] : first + i), source.dtype, width, row);
    memset(row + filled, 0, sizeof(float) * (padded - filled));
  }
  return {rows, padded, nullptr};
}

template <int kPieces>
inline bool pack_keys(const RowRun& rows, const GroupShape& group, uint16_t* target) {
  Plain plain;
  for (int64_t key = 0; key < kTileKeys; ++key) {
    const float* row = rows[key];
    for (int64_t d = 0; d < group.d_tiles; ++d) {
      Vec x[2] = {load(row + d * 32), load(row + d * 32 + kLanes)};
      plain.see(x[0]), plain.see(x[1]);
#pragma GCC unroll 3
      for (int i = 0; i < kPieces; ++i) {
        uint16_t* to = target + ((d * kPieces + i) * kTileKeys + key) * 32;
        for (int half = 0; half < 2; ++half) {
          Int bits = (Int)((__v16su)take_piece<true>(x[half]) >> 16);
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half * 16),
                              _mm512_cvtepi32_epi16((__m512i)bits));
        }
      }
    }
  }
  return plain.all(Plain::kScores);
}

template <int kPieces>
inline bool pack_values(const RowRun& rows, const GroupShape& group, uint16_t* target) {
  alignas(64) uint16_t pairs[kPieces][kTileItems];
  Plain plain;
  for (int64_t c = 0; c < group.c_tiles; ++c) {
    for (int64_t pair = 0; pair < 16; ++pair) {
      Vec low = load(rows[2 * pair] + c * 16), high = load(rows[2 * pair + 1] + c * 16);
      plain.see(low), plain.see(high);
      split_pair<kPieces, true>(low, high, pairs[0] + pair * 32, kTileItems);
    }
    for (int i = 0; i < kPieces; ++i) {
      int64_t pair = c / 2, tiles = min64(2, group.c_tiles - pair * 2);
      float* to = reinterpret_cast<float*>(target + (pair * 2 * kPieces + i * tiles + c % 2) * kTileItems);
      transpose(reinterpret_cast<const float*>(pairs[i]), 16, 16, 16, to, 16);
    }
  }
  return plain.all(Plain::kValues);
}

inline int64_t pack_floats(const Shape& shape) {
  return kTileKeys * 32 * ceil_to(shape.D > shape.Dv ? shape.D : shape.Dv, 32);
}

// Packs up to 32 keys; rows: scratch of pack_floats. False where a value is not plain.
inline bool pack_group(const Shape& shape, const RawRows& k, const RawRows& v, const int32_t* index,
                       int64_t first, int64_t count, float* rows, uint16_t* target) {
  const GroupShape group(shape);
  uint16_t* values = target + group.key_items();
  if (!index) prefetch_rows<false>(v, first, count, shape.Dv);
  auto pack = [&]<int kPieces>() {
    bool plain = pack_keys<kPieces>(group_rows(k, index, first, count, shape.D, rows), group, target);
    RowRun value_rows = group_rows(v, index, first, count, shape.Dv, rows);
    return pack_values<kPieces>(value_rows, group, values) && plain;
  };
  if (group.pieces == 1) return pack.template operator()<1>();
  return group.pieces == 2 ? pack.template operator()<2>() : pack.template operator()<3>();
}

// -- products ------------------------------------------------------------------------------------------------

// The compiler does not know what tile instructions read and write.
inline void settle_memory() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void open_tiles() {
  TileConfig config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
  settle_memory();
  _tile_loadconfig(&config);
}

inline void close_tiles() { _tile_release(); }

// Tiles 0 .. 3: C, two of A's by two of B's. 4, 5: A. 6, 7: B.
inline void clear_products() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <bool kTwo>
inline void load_left(const uint16_t* tiles) {
  _tile_loadd(4, tiles, 64);
  if constexpr (kTwo) _tile_loadd(5, tiles + kTileItems, 64);
}

inline void load_right(const uint16_t* both) {
  _tile_loadd(6, both, 64);
  _tile_loadd(7, both + kTileItems, 64);
}

template <bool kTwo>
inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if constexpr (kTwo) {
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Pieces (of A, of B) that are multiplied, least first; from one to the next, one side stays loaded.
constexpr int kPairs[6][2] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};

constexpr int num_pairs(int left, int right) {
  int count = 0;
  for (const int* pair : kPairs) count += pair[0] < left && pair[1] < right;
  return count;
}

// A's and B's tiles for one span of the summed dimension: piece i of A's two tiles (one, without kTwo), then
// piece i + 1 of both; so for B.
template <int kLeft, int kRight, bool kTwo>
struct Operands {
  static constexpr int kLeftTiles = kTwo ? 2 : 1, kCount = num_pairs(kLeft, kRight);
  static constexpr int kLines = kLeft * kLeftTiles * kTileItems / 32;  // cache lines of A
  const uint16_t *left, *right;

  // The n-th of those pairs of pieces that there are, in the order of kPairs.
  static constexpr int pair(int n) {
    int at = 0;
    while (kPairs[at][0] >= kLeft || kPairs[at][1] >= kRight || n-- > 0) ++at;
    return at;
  }

  // Loads what pair N needs and the pair before had not.
  template <int N>
  __attribute__((always_inline)) void load() const {
    constexpr int i = kPairs[pair(N)][0], j = kPairs[pair(N)][1], before = N > 0 ? pair(N - 1) : 0;
    if constexpr (N == 0 || kPairs[before][0] != i) load_left<kTwo>(left + i * kLeftTiles * kTileItems);
    if constexpr (N == 0 || kPairs[before][1] != j) load_right(right + j * 2 * kTileItems);
  }
};

// C += A B over all pairs of pieces; the tiles of the first pair are loaded. Loads come a pair ahead, those of
// `next` (null: none) at the end, and beside() is called while the tiles multiply: it is what vectors do
// meanwhile. `later`: A's tiles of the step after, which come from the second-level cache or farther.
template <int N, class Step, class F>
__attribute__((always_inline)) inline void add_pieces(const Step& now, const Step* next, const uint16_t* later,
                                                      const F& beside) {
  multiply_tiles<Step::kLeftTiles == 2>();
  if constexpr (N + 1 < Step::kCount) {
    now.template load<N + 1>();
  } else if (next) {
    next->template load<0>();
  }
  constexpr int kLines = Step::kLines / Step::kCount;
#pragma GCC unroll 32
  for (int i = 0; i < kLines; ++i) __builtin_prefetch(later + (N * kLines + i) * 32, 0, 3);
  beside();
  if constexpr (N + 1 < Step::kCount) add_pieces<N + 1>(now, next, later, beside);
}

// C to rows of panels; its second half of rows `down` floats further.
template <bool kTwo>
inline void store_products(float* target, int64_t down) {
  constexpr int64_t kStride = sizeof(float) * kPanel;
  _tile_stored(0, target, kStride);
  _tile_stored(1, target + 16, kStride);
  if constexpr (kTwo) {
    _tile_stored(2, target + down, kStride);
    _tile_stored(3, target + down + 16, kStride);
  }
}

// scores[key][lane] of `count` groups against a panel of queries, [32 of D][piece][lane half] tiles.
// stored(g) is called when the scores of group g can be read without waiting.
template <int kPieces, class F, class G>
__attribute__((always_inline)) inline void score_groups(const GroupShape& group, const uint16_t* keys,
                                                        int64_t count, const uint16_t* queries, float* scores,
                                                        const F& beside, const G& stored) {
  using Step = Operands<kPieces, kPieces, true>;
  constexpr int64_t kStep = kPieces * 2 * kTileItems;
  Step now{keys, queries};
  now.template load<0>();
  for (int64_t g = 0; g < count; ++g) {
    clear_products();
    for (int64_t d = 0; d < group.d_tiles; ++d) {
      bool last = d + 1 == group.d_tiles;
      Step next{last ? keys + (g + 1) * group.items() : now.left + kStep, last ? queries : now.right + kStep};
      add_pieces<0>(now, last && g + 1 == count ? nullptr : &next, next.left, beside);
      now = next;
    }
    store_products<true>(scores + g * kTileKeys * kPanel, 16 * kPanel);
    settle_memory();
    if (g > 0) stored(g - 1);
  }
  stored(count - 1);
}

// sums[c][lane] = values of `count` groups times weights [group][piece][lane half], for 32 (16) of Dv.
template <int kPieces, bool kTwo, class F>
__attribute__((always_inline)) inline void sum_values(const GroupShape& group, const uint16_t* values,
                                                      int64_t count, const uint16_t* weights, float* sums,
                                                      const F& beside) {
  using Step = Operands<kPieces, weight_pieces(kPieces), kTwo>;
  Step now{values, weights};
  now.template load<0>();
  clear_products();
  for (int64_t g = 0; g < count; ++g) {
    Step next{now.left + group.items(), now.right + weight_pieces(kPieces) * 2 * kTileItems};
    add_pieces<0>(now, g + 1 == count ? nullptr : &next, next.left, beside);
    now = next;
  }
  store_products<kTwo>(sums, 16 * kPanel);
}

#endif

}  // namespace
}  // namespace sparse_attn
