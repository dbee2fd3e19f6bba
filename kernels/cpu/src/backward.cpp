// Gradients of inputs, weights, norms and activations; backward/gradient_tile.py says what is due on a gradient.
#include "rows.h"

namespace cpu {

constexpr long CHUNK = 32;  // rows whose sums are added up first: the order does not depend on threads

struct Upstream {
  Strided x, sums;
  Source rows;
  Keep keep;
  bool norm, dropout;
  long tile;

  explicit Upstream(Reader& in) {
    in.tuple(5);
    in.skip(1);  // columns that may be loaded
    x = strided(in), sums = strided(in), rows = source(in), keep = keeping(in);
  }
  void due(Reader& in) {
    in.tuple(7);
    norm = in.integer(), tile = in.integer();
    in.skip(1);
    rows.tile = in.integer();
    in.skip(1);
    rows.members = in.integer(), dropout = in.integer();
  }
  // Writes dL/dy of a row to out; adds what it gives dβ, dγ and db to the three vectors of `shares`, if given.
  void finished(long g, Place at, long width, float* out, float* shares = nullptr) const {
    Tensor d = row(x, g, at);
    if (norm) {
      Norm by = merged(row(rows.stats, g, at).as<float>(), width, rows.tile);
      const float *s = row(sums, g, at).as<float>(), *gamma = rows.gamma + rows.slab.of(g, rows.members) * width;
      float s1 = 0, s2 = 0;
      for (long t = 0; t * tile < width; t++) s1 += s[2 * t], s2 += s[2 * t + 1];
      s1 /= float(width), s2 /= float(width);
      Tensor before = row(rows.x, g, at);
      each(width, [&](long i, auto count) {
        vf h = load(d, i, count), xhat = (load(before, i, count) - by.mean) * by.rstd;
        if (shares) {
          store(shares + i, load(shares + i, count) + h, count);
          store(shares + width + i, load(shares + width + i, count) + h * xhat, count);
        }
        store(out + i, by.rstd * (h * load(gamma + i, count) - s1 - xhat * s2), count);
      });
    } else {
      each(width, [&](long i, auto count) { store(out + i, load(d, i, count), count); });
    }
    if (dropout) drop(keep, g, at, out, width);
    if (shares)
      each(width, [&](long i, auto count) {
        float* bias = shares + 2 * width + i;
        store(bias, load(bias, count) + load(out + i, count), count);
      });
  }
};

// Stores h, given the gradient d of act(LN(below)), a row with room for whole vectors, and sums of its tiles.
inline void through_activation(float* d, const Source& below, long g, Place at, long width, Tensor y, float* sums, long tile) {
  Norm by = merged(row(below.stats, g, at).as<float>(), width, below.tile);
  long slab = below.slab.of(g, below.members);
  const float *gamma = below.gamma + slab * width, *beta = below.beta + slab * width;
  Tensor x = row(below.x, g, at);
  auto tiles = [&](auto V, auto room) {  // V is 0 for Mish
    long together = V ? vectors_of(V) : 1;
    for (long t = 0; t * tile < width; t++) {
      vf s1 = {}, s2 = {};
      long first = t * tile, last = std::min(width, first + tile);
      each(first, last, together, [&](long i, auto count) __attribute__((always_inline)) {
        vf xhat[room()], z[room()], h[room()];
        for (int j = 0; j < together; j++) {
          long k = i + j * W;
          xhat[j] = (load(x, k, count) - by.mean) * by.rstd;
          z[j] = xhat[j] * load(gamma + k, count) + load(beta + k, count);
          h[j] = load(d + k, count);
        }
        if (V) {
          simnorm(z, V);
          simnorm_gradient(h, z, V);
        } else {
          h[0] = h[0] * mish_gradient(z[0]);
        }
        for (int j = 0; j < together; j++) {
          long k = i + j * W;
          store(y, k, h[j], count);
          vf scaled = h[j] * load(gamma + k, count);  // 0 beyond the row
          s1 += scaled, s2 += scaled * xhat[j];
        }
      });
      sums[2 * t] = sum(s1), sums[2 * t + 1] = sum(s2);
    }
  };
  if (below.act == MISH) tiles(constant<0>(), constant<1>());
  else with_group(below.V, tiles);
}

struct InputGradient : Kernel {
  Upstream up;
  Weights w;
  Strided add, y, sums;
  Source below;
  long m, n, d, k, first, width, groups, written;
  bool members, has_add;
  Product tile;
  std::vector<Tensor> packed;

  InputGradient(const Grid& grid, Reader& in) : up(in), written(grid[1]) {
    w = weights(in), add = strided(in), below = source(in), y = strided(in), sums = strided(in);
    m = in.integer(), n = rows = in.integer(), d = in.integer(), k = in.integer();
    first = in.integer(), width = in.integer(), groups = in.integer();
    up.due(in);
    members = in.integer(), has_add = in.integer();
    below.due(in);
    tile = product(in);
  }
  void prepare(Panels& panels) override {
    packed.clear();
    for (long g = 0; g < groups * written; g++)
      packed.push_back(panels.of({w.w.at(w.slab.of(g, members) * d * k), d, k, true, first, width}));
  }
  void run() override { walk_all(*this, m); }
  void walk(long m0, long m1) override {
    if (w.w.type == BF16) walk_as<bf16>(m0, m1);
    else walk_as<float>(m0, m1);
  }
  template <class T> void walk_as(long m0, long m1) {
    long lda = operand_stride<T>(d), ldc = result_width(width), count = m1 - m0, room = padded(count, ROOM);
    T* a = scratch<T>(INPUT, room * lda);
    float *c = scratch<float>(OUTPUT, room * ldc), *dy = scratch<float>(ROW, padded(d, W));
    for (long own = 0; own < written; own++) {
      for (long g = own; g < own + groups; g++) {
        for (long i = m0; i < m1; i++) {
          T* out = a + (i - m0) * lda;
          up.finished(g, Place(i, n), d, dy);
          each(d, [&](long j, auto count) { store(out + j, load(dy + j, count), count); });
          std::memset(static_cast<void*>(out + d), 0, (depth_of(d, out) - d) * sizeof(T));
        }
        multiply(a, lda, count, packed[g].as<T>(), d, ldc / NR, c, ldc, g > own);
      }
      for (long i = m0; i < m1; i++) {
        Place at(i, n);
        float* out = c + (i - m0) * ldc;
        if (has_add) {
          Tensor more = row(add, own, at);
          each(width, [&](long j, auto count) { store(out + j, load(out + j) + load(more, j, count)); });
        }
        Tensor to = row(y, own, at);
        if (below.act != PLAIN) {
          through_activation(out, below, own, at, width, to, row(sums, own, at).as<float>(), tile.bn);
        } else {
          each(width, [&](long j, auto count) { store(to, j, load(out + j), count); });
        }
      }
    }
  }
};

struct ActivationGradient : Kernel {
  Strided d, y, sums;
  Source below;
  long groups, m, n, width, tile;

  ActivationGradient(const Grid& grid, Reader& in) {
    d = strided(in), below = source(in), y = strided(in), sums = strided(in);
    m = in.integer(), n = rows = in.integer(), width = in.integer();
    below.due(in);
    in.skip(1);
    tile = in.integer();
    in.skip(1);
    groups = grid[2];
  }
  void run() override { walk_all(*this, m); }
  void walk(long m0, long m1) override {
    float* in = scratch<float>(ROW, padded(width, W));
    for (long g = 0; g < groups; g++)
      for (long i = m0; i < m1; i++) {
        Place at(i, n);
        for (long j = 0; j < width; j += W) store(in + j, load(row(d, g, at), j, width - j));
        through_activation(in, below, g, at, width, row(y, g, at), row(sums, g, at).as<float>(), tile);
      }
  }
};

struct NormGradient : Kernel {
  Upstream up;
  float* vectors;
  long sums_g, sums_e, n, d, chunks, groups, envs, per_chunk;
  bool wanted;

  NormGradient(const Grid& grid, Reader& in) : up(in) {
    vectors = in.tensor().as<float>(), sums_g = in.integer(), sums_e = in.integer();
    n = in.integer(), d = in.integer(), chunks = in.integer();
    up.due(in);
    wanted = in.integer(), per_chunk = in.integer();
    in.skip(3);
    envs = grid[0] / chunks, groups = grid[2];
  }
  void run() override {
    parallel(groups * envs * chunks, [&](long i) {
      long g = i / (envs * chunks), e = i / chunks % envs, chunk = i % chunks;
      float *dy = scratch<float>(ROW, padded(d, W)), *shares = scratch<float>(OTHER, 3 * d);
      std::memset(shares, 0, 3 * d * sizeof(float));
      for (long r = chunk * per_chunk; r < std::min(n, (chunk + 1) * per_chunk); r++) {
        Place at(e * n + r, n);
        up.finished(g, at, d, dy, wanted ? shares : nullptr);
        for (long j = 0; j < d; j += W) store(row(up.x, g, at), j, load(dy + j), d - j);
      }
      if (!wanted) return;
      float* out = vectors + g * sums_g + e * sums_e + chunk * 3 * d;
      std::memcpy(out, shares + 2 * d, d * sizeof(float));
      std::memcpy(out + d, shares + d, d * sizeof(float));
      std::memcpy(out + 2 * d, shares, d * sizeof(float));
    });
  }
};

struct AddUp : Kernel {
  const float* sums;
  float *bias, *gamma, *beta;
  long sums_g, sums_e, out_g, envs, d, chunks, groups;

  AddUp(const Grid& grid, Reader& in) {
    sums = in.floats(), sums_g = in.integer(), sums_e = in.integer();
    bias = in.floats(), gamma = in.floats(), beta = in.floats();
    out_g = in.integer(), envs = in.integer(), d = in.integer(), chunks = in.integer();
    in.skip(2);
    groups = grid[1];
  }
  void run() override {
    parallel(groups * 3, [&](long i) {
      long g = i / 3, which = i % 3;
      float* out = (which == 0 ? bias : which == 1 ? gamma : beta) + g * out_g;
      for (long j = 0; j < d; j += W) {
        vf total = {};
        for (long e = 0; e < envs; e++)
          for (long chunk = 0; chunk < chunks; chunk++)
            total += load(sums + g * sums_g + e * sums_e + (chunk * 3 + which) * d + j, d - j);
        store(out + j, total, d - j);
      }
    });
  }
};

struct WeightGradient : Kernel {
  Upstream up;
  Source x;
  float *w, *bias, *gamma, *beta;
  long w_g, vector_g, m, n, d, k, groups;
  bool has_bias, as_bf16;
  // Both operands of the product over rows: dL/dy as (d, row), x as panels; sums of chunks of rows.
  std::vector<Memory<char>> left, right;
  Memory<float> shares;

  WeightGradient(const Grid& grid, Reader& in) : up(in) {
    x = source(in);
    w = in.floats(), w_g = in.integer();
    bias = in.tensor().as<float>(), gamma = in.tensor().as<float>(), beta = in.tensor().as<float>();
    vector_g = in.integer(), m = in.integer(), n = in.integer(), d = in.integer(), k = in.integer();
    up.due(in), x.due(in);
    has_bias = in.integer(), as_bf16 = in.integer();
    product(in);
    groups = grid[1];
  }
  void run() override {
    if (as_bf16) run_as<bf16>();
    else run_as<float>();
  }
  template <class T> void run_as() {
    long lda = operand_stride<T>(m), chunks = cdiv(m, CHUNK), panels = cdiv(k, NR), inputs = apart(x) ? groups : 1;
    if (left.empty()) {
      for (long g = 0; g < groups; g++) left.push_back(allocate<char>(padded(d, ROOM) * lda * sizeof(T)));
      for (long g = 0; g < inputs; g++) right.push_back(allocate<char>(panels * panel_size<T>(m) * sizeof(T)));
      shares = allocate<float>(groups * chunks * 3 * d);
    }
    parallel((groups + inputs) * chunks, [&](long i) {
      long g = i / chunks, chunk = i % chunks, m0 = chunk * CHUNK, m1 = std::min(m, m0 + CHUNK);
      if (g < groups) turn<T>(g, m0, m1, lda, shares.get() + i * 3 * d);
      else spread<T>(g - groups, m0, m1);
    });
    long most = have_amx() && sizeof(T) == 2 ? ROOM : 2 * MR, strips = cdiv(d, most);  // whole tiles, or blocks
    parallel(groups * strips + groups, [&](long i) {
      if (i >= groups * strips) return add_up(i - groups * strips, chunks);
      long g = i / strips, first = i % strips * most, count = std::min(d - first, most), ldc = panels * NR;
      float* c = scratch<float>(OUTPUT, padded(count, ROOM) * ldc);
      const T* a = reinterpret_cast<const T*>(left[g].get()) + first * lda;
      const T* b = reinterpret_cast<const T*>(right[inputs > 1 ? g : 0].get());
      multiply(a, lda, count, b, m, panels, c, ldc, false);
      for (long j = 0; j < count; j++) std::memcpy(w + g * w_g + (first + j) * k, c + j * ldc, k * sizeof(float));
    });
  }
  // Puts dL/dy of some rows where each column's are neighbours.
  template <class T> void turn(long g, long m0, long m1, long lda, float* sums) {
    long wide = padded(d, W);
    float* dy = scratch<float>(INPUT, CHUNK * wide);
    std::memset(sums, 0, 3 * d * sizeof(float));
    for (long i = m0; i < m1; i++) up.finished(g, Place(i, n), d, dy + (i - m0) * wide, sums);
    T* out = reinterpret_cast<T*>(left[g].get());
    long end = m1 == m ? depth_of(m, out) : m1;
    for (long j0 = 0; j0 < d; j0 += W)
      for (long i = m0; i < end; i += W) {
        vf columns[W] = {};
        for (long l = 0; l < std::min<long>(W, m1 - i); l++) columns[l] = load(dy + (i - m0 + l) * wide + j0);
        transpose(columns);
        for (long l = 0; l < std::min<long>(W, d - j0); l++) store(out + (j0 + l) * lda + i, columns[l], end - i);
      }
  }
  template <class T> void spread(long g, long m0, long m1) {
    static_assert(CHUNK % STEP == 0, "a chunk is padded as the whole is");
    long stride = operand_stride<T>(k);
    T *rows = scratch<T>(INPUT, CHUNK * stride), *out = reinterpret_cast<T*>(right[g].get()) + m0 * NR;
    take(x, g, m0, m1, n, k, rows);
    for (long p = 0; p * NR < k; p++)
      pack_panel(rows + p * NR, stride, 1, m1 - m0, std::min<long>(NR, k - p * NR), out + p * panel_size<T>(m));
  }
  void add_up(long g, long chunks) {
    float* outs[] = {up.norm ? beta : nullptr, up.norm ? gamma : nullptr, has_bias ? bias : nullptr};
    for (int which = 0; which < 3; which++) {
      if (!outs[which]) continue;
      for (long j = 0; j < d; j += W) {
        vf total = {};
        for (long chunk = 0; chunk < chunks; chunk++)
          total += load(shares.get() + ((g * chunks + chunk) * 3 + which) * d + j, d - j);
        store(outs[which] + g * vector_g + j, total, d - j);
      }
    }
  }
};

static Known<InputGradient> input_gradient("input_gradient_kernel");
static Known<ActivationGradient> activation_gradient("activation_gradient_kernel");
static Known<NormGradient> norm_gradient("norm_gradient_kernel");
static Known<AddUp> add_up("add_up_kernel");
static Known<WeightGradient> weight_gradient("weight_gradient_kernel");

}  // namespace cpu
