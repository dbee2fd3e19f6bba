// Layers: products with what is due before them, last layers of heads down to scalars, actions or losses.
#include "rows.h"

namespace cpu {

struct GroupedLayer : Kernel {
  Source x;
  Weights w;
  Strided a, y, stats;
  Keep keep;
  long groups, m, n, d, k, side;
  bool has_x, has_side, env_bias, members, dropout;
  Product tile;
  std::vector<Tensor> packed, packed_side;

  GroupedLayer(const Grid& grid, Reader& in) {
    x = source(in), w = weights(in), a = strided(in), y = strided(in), stats = strided(in);
    strided(in), strided(in), in.skip(1);  // the activation, as it is, and a last layer behind it
    m = in.integer(), n = rows = in.integer(), d = in.integer(), k = in.integer(), side = in.integer();
    keep = keeping(in);
    has_x = in.integer(), has_side = in.integer(), env_bias = in.integer();
    x.due(in);
    members = in.integer(), dropout = in.integer();
    in.tuple(7);
    in.skip(1);
    if (in.integer() != PLAIN) throw std::runtime_error("finish: a layer's readers activate it here");
    in.skip(5);
    in.tuple(5);
    if (in.integer()) throw std::runtime_error("ends: a layer does not end a head here");
    in.skip(4);
    tile = product(in);
    in.skip(2);  // BA, LINES
    groups = grid[1];
  }
  void prepare(Panels& panels) override {
    packed.clear(), packed_side.clear();
    for (long g = 0; g < groups; g++) {
      long slab = w.slab.of(g, members);
      if (has_x) packed.push_back(panels.of({w.w.at(slab * d * k), d, k, false}));
      if (has_side) packed_side.push_back(panels.of({w.side.at(slab * d * side), d, side, false}));
    }
  }
  void run() override { walk_all(*this, m); }
  void walk(long m0, long m1) override {
    if (w.w.type == BF16) walk_as<bf16>(m0, m1);
    else walk_as<float>(m0, m1);
  }
  template <class T> void walk_as(long m0, long m1) {
    long ldc = result_width(d), count = m1 - m0, room = padded(count, ROOM);
    float* c = scratch<float>(OUTPUT, room * ldc);
    long lds = operand_stride<T>(side), lda = operand_stride<T>(k);
    T* small = nullptr;
    if (has_side) {
      small = scratch<T>(SIDE, room * lds);
      Source plain{};
      plain.x = a;
      take(plain, 0, m0, m1, n, side, small);
    }
    T* input = has_x ? scratch<T>(INPUT, room * lda) : nullptr;
    for (long g = 0; g < groups; g++) {
      if (has_side) multiply(small, lds, count, packed_side[g].as<T>(), side, ldc / NR, c, ldc, false);
      if (has_x) {
        if (g == 0 || apart(x)) take(x, g, m0, m1, n, k, input);
        multiply(input, lda, count, packed[g].as<T>(), k, ldc / NR, c, ldc, has_side);
      }
      const float* bias = w.bias + w.slab.of(g, members) * w.bias_s;
      for (long i = m0; i < m1; i++) {
        Place at(i, n);
        float* out = c + (i - m0) * ldc;
        const float* own = env_bias ? bias + at.e * w.bias_e : bias;
        each(d, [&](long j, auto count) { store(out + j, load(out + j) + load(own + j, count)); });
        if (dropout) drop(keep, g, at, out, d);
        store_with_statistics(out, row(y, g, at), row(stats, g, at).as<float>(), d, tile.bn);
      }
    }
  }
};

struct Activate : Kernel {
  Source x;
  Strided y, exact;
  long groups, m, n, d;
  bool stored, stored_exact;

  Activate(const Grid& grid, Reader& in) {
    x = source(in), y = strided(in), exact = strided(in);
    m = in.integer(), n = rows = in.integer(), d = in.integer();
    x.due(in);
    stored = in.integer(), stored_exact = in.integer();
    in.skip(2);
    product(in);
    groups = grid[2];
  }
  void run() override { walk_all(*this, m); }
  void walk(long m0, long m1) override {
    for (long g = 0; g < groups; g++)
      for (long i = m0; i < m1; i++) {
        Tensor out = row(y, g, Place(i, n)), beside = row(exact, g, Place(i, n));
        activated(x, g, Place(i, n), d, [&](long j, vf v, auto count) {
          if (stored) store(out, j, v, count);
          if (stored_exact) store(beside, j, v, count);
        });
      }
  }
};

// Two-hot codes of `bins` bins from vmin to vmax, in symlog space.
struct Bins {
  long count;
  float vmin, vmax;
  // From the nearer end, as torch.linspace: both ends and the middle are exact.
  float value(long i) const {
    float width = (vmax - vmin) / float(count - 1);
    return i < count / 2 ? vmin + width * float(i) : vmax - width * float(count - 1 - i);
  }
};

// Writes exp(logits - max) over the logits, 0 beyond d; returns the maximum and the sum.
inline std::pair<float, float> exponentials(float* logits, long d) {
  vf top = all(-INFINITY);
  bool nan = false;
  for (long i = 0; i < d; i += W) {
    vf x = load(logits + i, d - i);
    if (d - i < W)
      for (long j = d - i; j < W; j++) x[j] = -INFINITY;
    top = larger(x, top);
    store(logits + i, x);
    for (int j = 0; j < W; j++) nan |= x[j] != x[j];
  }
  float most = nan ? NAN : largest(top);
  vf total = {};
  for (long i = 0; i < d; i += W) {
    vf p = exp(load(logits + i) - most);
    store(logits + i, p);
    total += p;
  }
  return {most, sum(total)};
}

struct ScalarHead : Kernel {
  LastLayer layer;
  Strided y, d;
  Bins bins;
  long m, kind;
  bool gradient;
  std::vector<float> values;

  ScalarHead(const Grid& grid, Reader& in) {
    layer.x = source(in), layer.w = weights(in);
    y = strided(in);
    m = in.integer(), layer.n = rows = in.integer(), layer.d = in.integer(), layer.k = in.integer();
    float vmin = float(in.number()), vmax = float(in.number());
    bins = {layer.d, vmin, vmax};
    d = strided(in);
    layer.x.due(in);
    layer.members = in.integer(), kind = in.integer(), gradient = in.integer();
    product(in);
    layer.groups = grid[1];
    values.resize(padded(layer.d, W));
    if (kind > 1)
      for (long i = 0; i < layer.d; i++) values[i] = bins.value(i);
  }
  void prepare(Panels& panels) override { layer.prepare(panels); }
  void run() override { walk_all(*this, m); }
  void walk(long m0, long m1) override {
    layer.walk(m0, m1, [&](long g, long i, float* logits) {
      Place at(i, layer.n);
      float x = logits[0], slope = 1.0f;
      if (kind > 1) {
        float total = exponentials(logits, layer.d).second;
        vf met = {};
        for (long j = 0; j < layer.d; j += W) met += load(logits + j) * load(values.data() + j);
        x = sum(met) / total;
        slope = std::exp(std::fabs(x));
        if (gradient)
          for (long j = 0; j < layer.d; j += W)
            store(row(d, g, at), j, slope * (load(logits + j) / total) * (load(values.data() + j) - x), layer.d - j);
      } else if (kind == 1) {
        slope = std::exp(std::fabs(x));
      }
      if (kind <= 1 && gradient) set(row(d, g, at), 0, slope);
      if (kind >= 1) x = std::copysign(std::exp(std::fabs(x)) - 1.0f, x);
      set(row(y, g, at), 0, x);
    });
  }
};

struct TwoHotLoss : Kernel {
  LastLayer layer;
  Strided target, loss, d;
  const float* weight;
  Bins bins;
  long targets, m, envs, kind;

  TwoHotLoss(const Grid& grid, Reader& in) {
    layer.x = source(in), layer.w = weights(in);
    target = strided(in), targets = in.integer(), weight = in.floats(), loss = strided(in), d = strided(in);
    m = in.integer(), layer.n = rows = in.integer(), envs = in.integer(), layer.d = in.integer(), layer.k = in.integer();
    float vmin = float(in.number()), vmax = float(in.number());
    bins = {layer.d, vmin, vmax};
    layer.x.due(in);
    layer.members = in.integer(), kind = in.integer();
    product(in);
    layer.groups = grid[1];
  }
  void prepare(Panels& panels) override { layer.prepare(panels); }
  void run() override { walk_all(*this, m); }

  static float symlog(float x) { return std::copysign(std::log(1.0f + std::fabs(x)), x); }

  void walk(long m0, long m1) override {
    layer.walk(m0, m1, [&](long g, long i, float* logits) {
      Place at(i, layer.n);
      float goal = scalar(row(target, std::min(g, targets - 1), at));
      float share = weight[g * envs + at.e], value, slope, x = logits[0];
      Tensor out = row(d, g, at);
      if (kind > 1) {
        value = cross_entropy(logits, goal, share, out);
      } else {
        if (kind == -1) {
          float e = std::exp(-std::fabs(x));
          value = std::max(x, 0.0f) - x * goal + std::log1p(e);
          if (x != x) value = x;
          slope = (x < 0 ? e : 1.0f) / (1.0f + e) - goal;
        } else {
          float off = x - (kind == 1 ? symlog(goal) : goal);
          value = off * off, slope = 2.0f * off;
        }
        set(out, 0, share * slope);
      }
      set(row(loss, g, at), 0, value);
    });
  }
  // Writes the weighted gradient and returns the loss.
  float cross_entropy(float* logits, float goal, float share, Tensor out) const {
    float at = symlog(goal);
    float position = (std::min(std::max(at, bins.vmin), bins.vmax) - bins.vmin) / ((bins.vmax - bins.vmin) / float(bins.count - 1));
    // NaN stays in the weight of the upper bin, where the loss shows it, and has no bin.
    bool fine = at == at;
    if (!fine) position = 0.0f;
    long lower = long(position), upper = (lower + 1) % bins.count;
    float over = fine ? position - float(lower) : at, under = 1.0f - over;
    float at_lower = logits[lower], at_upper = logits[upper];
    auto [most, total] = exponentials(logits, bins.count);
    float met = 0;
    if (under != 0) met += under * (at_lower - most);
    if (over != 0) met += over * (at_upper - most);
    for (long j = 0; j < bins.count; j += W) store(logits + j, load(logits + j) / total);
    logits[lower] -= under;
    // The neighbour of the last bin is the first, with no weight.
    logits[upper] -= over;
    for (long j = 0; j < bins.count; j += W) store(out, j, share * load(logits + j), bins.count - j);
    return std::log(total) - met;
  }
};

struct PolicyLayer : Kernel {
  LastLayer layer;
  Strided eps, y;
  const float* mask;
  long m, dims;
  float low, high;
  bool masked;

  PolicyLayer(const Grid&, Reader& in) {
    layer.x = source(in), layer.w = weights(in);
    eps = strided(in), mask = in.floats(), y = strided(in);
    m = in.integer(), layer.n = rows = in.integer(), layer.k = in.integer(), dims = in.integer();
    low = float(in.number()), high = float(in.number());
    masked = in.integer();
    layer.x.due(in);
    product(in);
    layer.d = 2 * dims, layer.groups = 1, layer.members = false;
  }
  void prepare(Panels& panels) override { layer.prepare(panels); }
  void run() override { walk_all(*this, m); }
  void walk(long m0, long m1) override {
    layer.walk(m0, m1, [&](long, long i, float* logits) {
      Place at(i, layer.n);
      const float* noise = row(eps, 0, at).as<float>();
      Tensor out = row(y, 0, at);
      for (long j = 0; j < dims; j += W) {
        long count = std::min<long>(W, dims - j);
        vf mean = {}, log_std = {};
        for (long l = 0; l < count; l++) mean[l] = logits[2 * (j + l)], log_std[l] = logits[2 * (j + l) + 1];
        log_std = low + 0.5f * (high - low) * (tanh(log_std) + 1.0f);
        vf drawn = load(noise + j, count);
        if (masked) {
          vf live = load(mask + at.e * dims + j, count);
          mean = mean * live, log_std = log_std * live, drawn = drawn * live;
        }
        store(out, j, tanh(mean + drawn * exp(log_std)), count);
      }
    });
  }
};

static Known<GroupedLayer> grouped_layer("grouped_layer_kernel");
static Known<Activate> activate("activate_kernel");
static Known<ScalarHead> scalar_head("scalar_head_kernel");
static Known<TwoHotLoss> two_hot_loss("two_hot_loss_kernel");
static Known<PolicyLayer> policy_layer("policy_layer_kernel");

}  // namespace cpu
