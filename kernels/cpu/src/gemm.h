// Products of rows with packed panels of a weight: the only place where multiplications are counted.
//
// A panel is NR columns of the right operand, in the order in which they are read: float32 as (k, column), bfloat16 as
// (pair of k, column, which of the pair), with zeros beyond the columns and to a whole number of STEP of the depth.
// One call of `block` keeps MR rows by NR columns of the result in registers.
#pragma once

#include "vec.h"
#if defined(EMULATE_AMX)
#include "amx_emulated.h"
#endif

namespace cpu {

constexpr int NV = 2, NR = NV * W;
#if defined(__AVX512F__)
constexpr int MR = 14;
#elif defined(__aarch64__)
constexpr int MR = 12;
#else
constexpr int MR = 6;
#endif
constexpr long SUMMED = 256;     // products added up before their sum is: fewer roundings of a large sum
constexpr int STEP = 32;         // of the depth of bfloat16 products: a row of an AMX tile
constexpr int ROOM = 32;         // rows of operands and results are padded to this, so that tiles may be whole

#if defined(EMULATE_AMX) || (defined(__AMX_BF16__) && defined(__AMX_TILE__))
#define HAVE_AMX 1
#endif

inline long depth_of(long k, const float*) { return k; }
inline long depth_of(long k, const bf16*) { return padded(k, STEP); }
// How far rows of an operand are apart in memory: not a power of two, where many rows would share a few cache lines.
template <class T> long operand_stride(long k) {
  long depth = depth_of(k, (T*)nullptr);
  return depth * long(sizeof(T)) % 512 ? depth : depth + 64 / long(sizeof(T));
}
template <class T> long panel_size(long k) { return depth_of(k, (T*)nullptr) * NR; }

// Whether tiles are usable: the operating system grants them on request.
bool have_amx();

// The first `count` entries as words, zeros after them.
template <class T> vf words_of(const T* x, long count) {
  vf words = {};
  if (count >= long(sizeof words / sizeof(T))) std::memcpy(&words, x, sizeof words);
  else std::memcpy(&words, x, count * sizeof(T));
  return words;
}

// As `pack_panel` of a matrix whose columns are rows in memory, `stride` apart; of bfloat16 by pairs of k.
template <class T> void pack_turned(const T* x, long stride, long depth, long columns, float* out) {
  constexpr long EACH = 4 / sizeof(T);
  long words = cdiv(depth, EACH);
  for (long k0 = 0; k0 < words; k0 += W)
    for (long j0 = 0; j0 < NR; j0 += W) {
      vf rows[W];
      const T* from = x + j0 * stride + k0 * EACH;
      long count = depth - k0 * EACH;
#pragma GCC unroll 16
      for (long j = 0; j < W; j++) rows[j] = j0 + j < columns ? words_of(from + j * stride, count) : vf{};
      transpose(rows);
#pragma GCC unroll 16
      for (long k = 0; k < W; k++)
        if (k0 + k < words) store(out + (k0 + k) * NR + j0, rows[k]);
    }
}

// Packs columns 0 to `columns` <= NR of the matrix (k, column) with these strides; one of the two is 1.
inline void pack_panel(const float* x, long k_stride, long stride, long depth, long columns, float* out) {
  if (stride == 1) {
    for (long k = 0; k < depth; k++)
      for (long j = 0; j < NR; j += W) store(out + k * NR + j, columns > j ? load(x + k * k_stride + j, columns - j) : vf{});
    return;
  }
  pack_turned(x, stride, depth, columns, out);
}

inline void pack_panel(const bf16* x, long k_stride, long stride, long depth, long columns, bf16* out) {
  if (stride != 1) {
    // Pairs are words, which change places as floats do.
    pack_turned(x, stride, depth, columns, reinterpret_cast<float*>(out));
    long pairs = cdiv(depth, 2);
    std::memset(out + pairs * 2 * NR, 0, (padded(depth, STEP) - pairs * 2) * NR * sizeof(bf16));
    return;
  }
  for (long k = 0; k < padded(depth, STEP); k += 2)
    for (long j = 0; j < NR; j += W) {
      auto row = [&](long k) { return k < depth && j < columns ? load(x + k * k_stride + j, columns - j) : vf{}; };
      // A bfloat16 is the upper half of a float.
      store(reinterpret_cast<float*>(out + k * NR) + j, (vf)((vu)row(k) >> 16 | (vu)row(k + 1)));
    }
}

template <int R> inline void block(const float* a, long lda, const float* b, long depth, float* c, long ldc, bool add) {
  vf acc[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
    for (int j = 0; j < NV; j++) acc[i][j] = vf{};
  for (long k = 0; k < depth; k++) {
    vf b0 = load(b + k * NR), b1 = load(b + k * NR + W);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      vf x = all(a[i * lda + k]);
      acc[i][0] += x * b0;
      acc[i][1] += x * b1;
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
    for (int j = 0; j < NV; j++) {
      float* to = c + i * ldc + j * W;
      store(to, add ? load(to) + acc[i][j] : acc[i][j]);
    }
}

#if defined(__AVX512BF16__)
template <int R> inline void block(const bf16* a, long lda, const bf16* b, long depth, float* c, long ldc, bool add) {
  __m512 acc[R][NV];
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
    for (int j = 0; j < NV; j++) acc[i][j] = _mm512_setzero_ps();
  for (long k = 0; k < padded(depth, STEP); k += 2) {
    __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + k * NR), b1 = (__m512bh)_mm512_loadu_si512(b + k * NR + 2 * W);
#pragma GCC unroll 16
    for (int i = 0; i < R; i++) {
      int32_t pair;
      std::memcpy(&pair, a + i * lda + k, 4);
      __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
      acc[i][0] = _mm512_dpbf16_ps(acc[i][0], x, b0);
      acc[i][1] = _mm512_dpbf16_ps(acc[i][1], x, b1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; i++)
    for (int j = 0; j < NV; j++) {
      float* to = c + i * ldc + j * W;
      store(to, add ? load(to) + (vf)acc[i][j] : (vf)acc[i][j]);
    }
}
#else
// Right, and slow: a CPU without such products is not offered bfloat16.
template <int R> inline void block(const bf16* a, long lda, const bf16* b, long depth, float* c, long ldc, bool add) {
  for (int i = 0; i < R; i++)
    for (int j = 0; j < NR; j++) {
      float total = add ? c[i * ldc + j] : 0.0f;
      for (long k = 0; k < depth; k++) total += to_float(a[i * lda + k]) * to_float(b[(k / 2 * NR + j) * 2 + k % 2]);
      c[i * ldc + j] = total;
    }
}
#endif

template <int R, class T>
void blocks(const T* a, long lda, long rows, const T* b, long depth, float* c, long ldc, bool add) {
  if constexpr (R == MR)
    for (; rows >= MR; rows -= MR, a += MR * lda, c += MR * ldc) block<MR>(a, lda, b, depth, c, ldc, add);
  if (rows == R) return block<R>(a, lda, b, depth, c, ldc, add);
  if constexpr (R > 1) blocks<R - 1>(a, lda, rows, b, depth, c, ldc, add);
}

#if defined(HAVE_AMX)
// 32 rows by 32 columns in four tiles, whatever the rows: operands and result have room for whole tiles.
inline void tiles(const bf16* a, long lda, long rows, const bf16* b, long depth, long panels, float* c, long ldc, bool add) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } shape;
  static_assert(sizeof shape == 64 && NR == 32);
  // The compiler does not know what tile instructions read: what was written so far has to be in memory.
  asm volatile("" : : "r"(&shape) : "memory");
  _tile_loadconfig(&shape);
  const long up = lda * 2, across = ldc * 4, step = NR * 4;
  for (long p = 0; p < panels; p++) {
    const bf16* panel = b + p * panel_size<bf16>(depth);
    for (long m = 0; m < rows; m += 32) {
      const bf16* x = a + m * lda;
      float *top = c + m * ldc + p * NR, *bottom = top + 16 * ldc;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (add) {
        _tile_loadd(0, top, across);
        _tile_loadd(1, top + 16, across);
        _tile_loadd(2, bottom, across);
        _tile_loadd(3, bottom + 16, across);
      }
      for (long k = 0; k < padded(depth, STEP); k += STEP) {
        _tile_loadd(4, x + k, up);
        _tile_loadd(5, x + 16 * lda + k, up);
        _tile_loadd(6, panel + k * NR, step);
        _tile_loadd(7, panel + k * NR + 32, step);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, top, across);
      _tile_stored(1, top + 16, across);
      _tile_stored(2, bottom, across);
      _tile_stored(3, bottom + 16, across);
    }
  }
  _tile_release();
  asm volatile("" : : : "memory");
}
#endif

// c (rows, panels NR) = a (rows, depth) times panels, or c plus that. Rows are padded to ROOM in memory.
template <class T>
void multiply(const T* a, long lda, long rows, const T* b, long depth, long panels, float* c, long ldc, bool add) {
#if defined(HAVE_AMX)
  if constexpr (sizeof(T) == 2)
    if (have_amx()) return tiles(a, lda, rows, b, depth, panels, c, ldc, add);
#endif
  for (long p = 0; p < panels; p++)
    for (long k = 0; k == 0 || k < depth; k += SUMMED)
      blocks<MR>(a + k, lda, rows, b + p * panel_size<T>(depth) + k * NR, std::min(SUMMED, depth - k), c + p * NR, ldc,
                 add || k > 0);
}

// Which panels of which weight: of its rows as outputs, or of some columns.
struct Weight {
  Tensor w;        // (D, K), contiguous
  long d, k;
  bool inputs;     // the product is over D, with columns `first` to `first` + `width`
  long first = 0, width = 0;
  long columns() const { return inputs ? width : d; }
  long depth() const { return inputs ? d : k; }
  long panels() const { return cdiv(columns(), NR); }
  auto key() const { return std::make_tuple(w.p, w.type, d, k, inputs, first, width); }
};

// Packed weights, each once, until they are written anew.
class Panels {
 public:
  // Returns where the panels are, or will be after `pack`.
  Tensor of(const Weight& weight) {
    auto found = held_.find(weight.key());
    if (found == held_.end()) {
      long size = weight.panels() * (weight.w.type == BF16 ? panel_size<bf16>(weight.depth()) * 2 : panel_size<float>(weight.depth()) * 4);
      found = held_.emplace(weight.key(), Held{allocate<char>(size), false}).first;
    }
    if (!found->second.packed) {
      found->second.packed = true;
      for (long p = 0; p < weight.panels(); p++) due_.push_back({weight, found->second.memory.get(), p});
    }
    return {found->second.memory.get(), weight.w.type};
  }
  // Pack what has been asked for and is not there.
  void pack() {
    parallel(long(due_.size()), [&](long i) {
      const auto& [weight, memory, p] = due_[i];
      if (weight.w.type == BF16) one<bf16>(weight, memory, p);
      else one<float>(weight, memory, p);
    });
    due_.clear();
  }
  void stale() {
    for (auto& [_, held] : held_) held.packed = false;
  }

 private:
  struct Held {
    Memory<char> memory;
    bool packed;
  };
  struct Due {
    Weight weight;
    char* memory;
    long panel;
  };
  template <class T> void one(const Weight& x, char* memory, long p) {
    T* out = reinterpret_cast<T*>(memory) + p * panel_size<T>(x.depth());
    const T* w = x.w.as<T>();
    long columns = std::min<long>(NR, x.columns() - p * NR);
    if (x.inputs) pack_panel(w + x.first + p * NR, x.k, 1, x.d, columns, out);
    else pack_panel(w + p * NR * x.k, 1, x.k, x.k, columns, out);
  }

  std::map<decltype(std::declval<Weight>().key()), Held> held_;
  std::vector<Due> due_;
};

}  // namespace cpu
