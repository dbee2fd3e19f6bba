// Rows with a LayerNorm and an activation due, as layers/rows.py describes them, and products of them.
#pragma once

#include "gemm.h"

namespace cpu {

enum Activation : long { PLAIN, MISH, SIMNORM };

constexpr float LAYER_NORM_EPS = 1e-5f;

struct Source {
  Strided x, stats;
  const float *gamma, *beta;
  Slab slab;
  // Constants: what is due, columns of a SimNorm group, width of the tiles of `stats`, whether slabs are drawn.
  long act, V, tile;
  bool members;
  void due(Reader& in) {
    in.tuple(6);
    act = in.integer(), V = in.integer(), tile = in.integer();
    in.skip(1);
    members = in.integer();
    in.skip(1);  // READY: operands are what the buffer holds
    if (V > MOST_GROUP) throw std::runtime_error("simnorm_dim: more than 64 columns");
  }
};

// Whether groups read different rows, or the same ones each through a LayerNorm of its own.
inline bool apart(const Source& s) { return s.x.g || (s.act != PLAIN && s.slab.step); }

inline Source source(Reader& in) {
  in.tuple(5);
  Source s{};
  s.gamma = in.tensor().as<float>(), s.beta = in.tensor().as<float>();
  s.x = strided(in), s.stats = strided(in), s.slab = slab(in);
  return s;
}

struct Product {
  long bn;  // columns of a tile: statistics are of these
};

inline Product product(Reader& in) {
  // BM, BN, BK, EVEN_K; `DOT` and `INTERPRETED` say nothing here.
  in.tuple(6);
  in.skip(1);
  long bn = in.integer();
  in.skip(4);
  return {bn};
}

// A row among all of the environments.
struct Place {
  long e, r;
  Place(long m, long n) : e(m / n), r(m % n) {}
};
inline Tensor row(const Strided& s, long g, Place at) { return s.row(g, at.e, at.r); }

struct Norm {
  float mean, rstd;
};

// Statistics of a row from those of its column tiles (device/statistics.py).
inline Norm merged(const float* stats, long width, long tile) {
  float mean = 0, m2 = 0;
  for (long t = 0; t * tile < width; t++) mean += float(std::min(tile, width - t * tile)) * stats[2 * t];
  mean /= float(width);
  for (long t = 0; t * tile < width; t++) {
    float off = stats[2 * t] - mean;
    m2 += stats[2 * t + 1] + float(std::min(tile, width - t * tile)) * off * off;
  }
  return {mean, 1.0f / std::sqrt(m2 / float(width) + LAYER_NORM_EPS)};
}

template <class T, class Use> void activated_as(const Source& s, long g, Place at, long width, Use&& use) {
  const T* x = row(s.x, g, at).as<T>();
  if (s.act == PLAIN) return each(width, [&](long i, auto count) { use(i, load(x + i, count), count); });
  Norm norm = merged(row(s.stats, g, at).as<float>(), width, s.tile);
  long slab = s.slab.of(g, s.members);
  const float *gamma = s.gamma + slab * width, *beta = s.beta + slab * width;
  auto normed = [&](long i, auto count) {
    vf y = (load(x + i, count) - norm.mean) * norm.rstd;
    return y * load(gamma + i, count) + load(beta + i, count);
  };
  if (s.act == MISH) return each(width, [&](long i, auto count) { use(i, mish(normed(i, count)), count); });
  with_group(s.V, [&](auto V, auto room) {
    long together = vectors_of(V);
    each(0, width, together, [&](long i, auto count) {
      vf y[room()];
      for (int j = 0; j < together; j++) y[j] = normed(i + j * W, count);
      simnorm(y, V);
      for (int j = 0; j < together; j++) use(i + j * W, y[j], count);
    });
  });
}

// Calls use(i, act(LN(x)), count) for each vector of a row: columns i to i + count.
template <class Use> void activated(const Source& s, long g, Place at, long width, Use&& use) {
  if (s.x.t.type == BF16) activated_as<bf16>(s, g, at, width, use);
  else activated_as<float>(s, g, at, width, use);
}

// Puts rows m0 to m1 as operands into `out`, operand_stride(width) apart; zeros where bfloat16 is padded.
template <class T> void take(const Source& s, long g, long m0, long m1, long n, long width, T* out) {
  for (long m = m0; m < m1; m++, out += operand_stride<T>(width)) {
    activated(s, g, Place(m, n), width, [&](long i, vf x, auto count) { store(out + i, x, count); });
    std::memset(static_cast<void*>(out + width), 0, (depth_of(width, out) - width) * sizeof(T));
  }
}

struct Weights {
  Tensor w, side;
  const float* bias;
  long bias_s, bias_e;
  Slab slab;
};

inline Weights weights(Reader& in) {
  in.tuple(8);
  Weights x{};
  x.w = in.tensor(), x.side = in.tensor();
  x.bias = in.floats();
  x.bias_s = in.integer(), x.bias_e = in.integer();
  in.floats(), in.floats();  // of the LayerNorm after it
  x.slab = slab(in);
  return x;
}

// Dropout: which entries stay.
struct Keep {
  Strided rows;
  float scale;
  long first;
};

inline Keep keeping(Reader& in) {
  in.tuple(3);
  Keep k{};
  k.scale = float(in.number());
  k.first = in.integer();
  k.rows = strided(in);
  return k;
}

// Sets entries of a row of group g to 0 or multiplies them, in groups that drop at all.
inline void drop(const Keep& keep, long g, Place at, float* x, long width) {
  if (g < keep.first) return;
  const uint8_t* kept = row(keep.rows, g - keep.first, at).as<uint8_t>();
  for (long i = 0; i < width; i++) x[i] = kept[i] ? x[i] * keep.scale : 0.0f;
}

inline long result_width(long columns) { return padded(columns, NR); }

// Stores a row in the type of the buffer, and mean and squared deviations of its column tiles, of what is stored.
template <class T> void store_with_statistics(const float* x, T* y, float* stats, long width, long tile) {
  for (long t = 0; t * tile < width; t++) {
    long first = t * tile, last = std::min(first + tile, width);
    vf total = {}, squares = {};
    each(first, last, [&](long i, auto count) {
      vf v = load(x + i, count);
      store(y + i, v, count);
      total += sizeof(T) == 2 ? rounded_to_bf16(v) : v;
    });
    float mean = sum(total) / float(last - first);
    each(first, last, [&](long i, auto count) {
      vf off = load(y + i, count) - mean;
      if (count < W) off = load((const float*)&off, count);
      squares += off * off;
    });
    stats[2 * t] = mean, stats[2 * t + 1] = sum(squares);
  }
}
inline void store_with_statistics(const float* x, Tensor y, float* stats, long width, long tile) {
  if (y.type == BF16) store_with_statistics(x, y.as<bf16>(), stats, width, tile);
  else store_with_statistics(x, y.as<float>(), stats, width, tile);
}

// Calls `use(g, c, ldc)` with the logits, bias included, of all groups of a last layer for rows m0 to m1.
class LastLayer {
 public:
  Source x;
  Weights w;
  long groups, n, d, k;
  bool members;

  void prepare(Panels& panels) {
    packed_.clear();
    for (long g = 0; g < groups; g++) {
      long slab = w.slab.of(g, members);
      packed_.push_back(panels.of({w.w.at(slab * d * k), d, k, false}));
    }
  }
  template <class Use> void walk(long m0, long m1, Use&& use) {
    if (w.w.type == BF16) walk_as<bf16>(m0, m1, use);
    else walk_as<float>(m0, m1, use);
  }

 private:
  std::vector<Tensor> packed_;

  template <class T, class Use> void walk_as(long m0, long m1, Use&& use) {
    long lda = operand_stride<T>(k), ldc = result_width(d), room = padded(m1 - m0, ROOM);
    T* a = scratch<T>(INPUT, room * lda);
    float* c = scratch<float>(OUTPUT, room * ldc);
    for (long g = 0; g < groups; g++) {
      if (g == 0 || apart(x)) take(x, g, m0, m1, n, k, a);
      multiply(a, lda, m1 - m0, packed_[g].as<T>(), k, ldc / NR, c, ldc, false);
      const float* bias = w.bias + w.slab.of(g, members) * w.bias_s;
      for (long m = m0; m < m1; m++) {
        float* logits = c + (m - m0) * ldc;
        for (long i = 0; i < d; i += W) store(logits + i, load(logits + i) + load(bias + i, d - i));
        use(g, m, logits);
      }
    }
  }
};

}  // namespace cpu
