// MPPI: how a plan begins, and the end of an iteration (plan/mppi_begin.py, plan/mppi_refine.py).
#include <algorithm>
#include <cfloat>
#include <numeric>

#include "rows.h"

namespace cpu {

struct Samples {
  float *actions, *mean, *std;
  explicit Samples(Reader& in) {
    in.tuple(3);
    actions = in.floats(), mean = in.floats(), std = in.floats();
  }
};

// In [-1, 1]; NaN stays NaN.
inline vf clamped(vf x) { return most(least(x, all(1.0f)), all(-1.0f)); }

// Draws clamp(mean + std noise, -1, 1), times the mask, for one row of a sample's action dims.
inline void draw(float* out, const float* noise, const float* mean, const float* std, const float* mask, long dims) {
  for (long j = 0; j < dims; j += W) {
    long count = dims - j;
    vf x = clamped(load(mean + j, count) + load(std + j, count) * load(noise + j, count));
    store(out + j, mask ? x * load(mask + j, count) : x, count);
  }
}

struct Begin : Kernel {
  const float *prev, *noise, *mask;
  const uint8_t* t0;
  float *actions, *mean, *std, max_std;
  long envs, h, n, p, dims;

  Begin(const Grid& grid, Reader& in) : envs(grid[0]) {
    prev = in.floats(), t0 = in.tensor(U8).as<uint8_t>(), noise = in.floats(), mask = in.floats();
    actions = in.floats(), mean = in.floats(), std = in.floats();
    max_std = float(in.number());
    h = in.integer(), n = in.integer(), p = in.integer(), dims = in.integer();
    in.skip(3);
  }
  void run() override {
    parallel(envs * h, [&](long i) {
      long e = i / h, t = i % h;
      for (long a = 0; a < dims; a++) {
        mean[i * dims + a] = t + 1 < h && !t0[e] ? prev[(i + 1) * dims + a] : 0.0f;
        std[i * dims + a] = max_std;
      }
      for (long s = p; s < n; s++)
        draw(actions + (i * n + s) * dims, noise + (i * (n - p) + s - p) * dims, mean + i * dims, std + i * dims,
             mask ? mask + e * dims : nullptr, dims);
    });
  }
};

struct Refine : Kernel {
  Strided scalars, termination{};
  const float *discount, *mask, *noise;
  Samples samples;
  float *returns, *scores;
  int64_t *best, *in_order;
  struct Choice {
    const float *elite_noise, *action_noise;
    const uint8_t* eval_mode;
    float *action, *prev_mean, *chosen;
    int64_t *picked, *counter;
  } choice{};
  float temperature, min_std, max_std, sum_eps;
  long envs, n, p, dims, k, h;
  bool episodic, masked, next, chooses, counts;

  Refine(const Grid& grid, Reader& in) : scalars(strided(in)), discount(in.floats()), samples(after(in)) {
    mask = in.floats();
    in.tuple(4);
    returns = in.floats(), best = in.integers(), scores = in.floats(), in_order = in.integers();
    noise = in.floats();
    if (in.given()) {
      in.tuple(8);
      choice.elite_noise = in.floats(), choice.action_noise = in.floats();
      choice.eval_mode = in.tensor(U8).as<uint8_t>(), choice.action = in.floats(), choice.prev_mean = in.floats();
      choice.picked = in.integers(), choice.chosen = in.floats(), choice.counter = in.integers();
    }
    temperature = float(in.number()), min_std = float(in.number()), max_std = float(in.number());
    n = in.integer(), p = in.integer(), dims = in.integer(), k = in.integer(), h = in.integer();
    episodic = in.integer(), masked = in.integer(), next = in.integer(), chooses = in.integer(), counts = in.integer();
    sum_eps = float(in.number());
    in.skip(3);
    envs = grid[0];
  }
  Samples after(Reader& in) {
    if (in.given()) termination = strided(in);
    return Samples(in);
  }
  void run() override {
    parallel(envs, [&](long e) { one(e); });
    if (counts) choice.counter[1] += 1;
  }
  void one(long e) {
    std::vector<float> value(n), score(k);
    for (long i = 0; i < n; i++) {
      float total = 0, weight = 1;
      for (long t = 0; t < h; t++) {
        total += weight * scalar(scalars.row(t, e, i));
        weight *= discount[e];
        // sigmoid(logit) <= 0.5, rounded alike; false for NaN
        if (episodic && !(1.0f + std::exp(-scalar(termination.row(t, e, i))) >= 2.0f)) weight = 0;
      }
      float q = scalar(scalars.row(h, e, i)) + scalar(scalars.row(h + 1, e, i));
      total += weight * (q * 0.5f);
      returns[e * n + i] = total;
      // As nan_to_num(0).
      value[i] = total != total ? 0.0f : std::min(std::max(total, -FLT_MAX), FLT_MAX);
    }
    std::vector<long> order(n);
    std::iota(order.begin(), order.end(), 0L);
    auto before = [&](long a, long b) { return value[a] != value[b] ? value[a] > value[b] : a < b; };
    std::partial_sort(order.begin(), order.begin() + k, order.end(), before);
    double total = 0;
    for (long i = 0; i < k; i++) total += score[i] = std::exp(temperature * (value[order[i]] - value[order[0]]));
    double norm = 0;
    for (long i = 0; i < k; i++) {
      norm += score[i] = float(score[i] / total);
      best[e * k + i] = order[i], scores[e * k + i] = score[i];
    }
    std::partial_sort_copy(order.begin(), order.begin() + k, in_order + e * k, in_order + (e + 1) * k);
    norm += sum_eps;
    long pick = chooses ? picked(e, score) : 0;
    const float* live = masked ? mask + e * dims : nullptr;
    for (long t = 0; t < h; t++) {
      long at = (e * h + t) * dims;
      const float* actions = samples.actions + (e * h + t) * n * dims;
      float *mean = samples.mean + at, *std = samples.std + at;
      for (long a = 0; a < dims; a++) {
        double first = 0, second = 0;
        for (long i = 0; i < k; i++) first += double(score[i]) * actions[order[i] * dims + a];
        double center = first / norm;
        for (long i = 0; i < k; i++) {
          double off = actions[order[i] * dims + a] - center;
          second += double(score[i]) * off * off;
        }
        float spread = float(std::sqrt(second / norm));
        if (spread == spread) spread = std::min(std::max(spread, min_std), max_std);
        mean[a] = float(center) * (live ? live[a] : 1.0f), std[a] = spread * (live ? live[a] : 1.0f);
        if (chooses) {
          float x = actions[order[pick] * dims + a];
          choice.chosen[at + a] = x, choice.prev_mean[at + a] = mean[a];
          if (t == 0) {
            if (!choice.eval_mode[e]) x += choice.action_noise[e * dims + a] * std[a];
            choice.action[e * dims + a] = x != x ? x : std::min(std::max(x, -1.0f), 1.0f);
          }
        }
      }
      if (next)
        for (long i = p; i < n; i++)
          draw(samples.actions + ((e * h + t) * n + i) * dims, noise + ((e * h + t) * (n - p) + i - p) * dims, mean,
               std, live, dims);
    }
    if (chooses) choice.picked[e] = pick;
  }
  // By the Gumbel trick; a score of 0 is never picked, not even where its draw is 0 too.
  long picked(long e, const std::vector<float>& score) const {
    long pick = 0;
    float most = -INFINITY;
    for (long i = 0; i < k; i++) {
      float key = std::log(score[i]) - std::log(choice.elite_noise[e * k + i]);
      if (score[i] > 0 && key > most) most = key, pick = i;
    }
    return pick;
  }
};

static Known<Begin> begin("begin_kernel");
static Known<Refine> refine("refine_kernel");

}  // namespace cpu
