// What an update computes of rows beside products: consistency, TD target, the policy's sample and gradients, the scale.
#include <algorithm>

#include "rows.h"

namespace cpu {

struct Consistency : Kernel {
  Strided z, goal, d;
  const float* weight;
  float* loss;
  long m, added, n, width;

  Consistency(const Grid&, Reader& in) {
    z = strided(in), goal = strided(in), weight = in.floats(), loss = in.floats(), d = strided(in);
    m = in.integer(), added = in.integer(), n = rows = in.integer(), width = in.integer();
    in.skip(2);
  }
  void run() override { walk_all(*this, m); }
  void walk(long m0, long m1) override {
    for (long i = m0; i < m1; i++) {
      Place at(i, n);
      Tensor x = row(z, 0, at), y = row(goal, 0, at), out = row(d, 0, at);
      float twice = 2.0f * weight[at.e];
      vf total = {};
      for (long j = 0; j < width; j += W) {
        vf off = load(x, j, width - j) - load(y, j, width - j);
        total += off * off;
        vf before = i < added ? load(out, j, width - j) : vf{};
        store(out, j, before + twice * off, width - j);
      }
      loss[i] = sum(total) / float(width);
    }
  }
};

struct TdTarget : Kernel {
  const float *q, *reward, *terminated;
  Strided discount;
  float* out;
  long m, n;

  TdTarget(const Grid&, Reader& in) {
    q = in.floats(), reward = in.floats(), terminated = in.floats(), discount = strided(in), out = in.floats();
    m = in.integer(), n = in.integer();
    in.skip(1);
  }
  void run() override {
    for (long i = 0; i < m; i++) {
      float a = q[i], b = q[m + i], least = a != a || a < b ? a : b;
      out[i] = reward[i] + scalar(row(discount, 0, Place(i, n))) * (1.0f - terminated[i]) * least;
    }
  }
};

// Ones in the first `count` lanes, zeros after them.
inline vf first(long count) {
  vf x = {};
  for (int l = 0; l < W; l++) x[l] = l < count ? 1.0f : 0.0f;
  return x;
}

// The policy's sample on one vector of a row's action dims, all that its gradients need.
struct Drawn {
  vf mean, log_std, squashed, noise, live, std, action;
};

struct Sample {
  Strided logits, eps, mask;
  long m, n, dims;
  float low, high;
  bool masked;

  void drawn(Reader& in) {
    in.tuple(3);
    logits = strided(in), eps = strided(in), mask = strided(in);
  }
  void sizes(Reader& in) {
    m = in.integer(), n = in.integer(), dims = in.integer();
    low = float(in.number()), high = float(in.number());
  }
  Drawn at(long i, long j) const {
    Place at(i, n);
    long count = std::min<long>(W, dims - j);
    Tensor x = row(logits, 0, at);
    Drawn s;
    s.mean = load(x, j, count), s.squashed = tanh(load(x, dims + j, count));
    s.noise = load(row(eps, 0, at), j, count);
    s.live = masked ? load(row(mask, 0, at), j, count) : first(count);
    s.mean = s.mean * s.live, s.noise = s.noise * s.live;
    s.log_std = (low + 0.5f * (high - low) * (s.squashed + 1.0f)) * s.live;
    s.std = exp(s.log_std);
    s.action = tanh(s.mean + s.noise * s.std);
    return s;
  }
  // Gaussian log-probability, squash correction and live dims of a row.
  struct Logs {
    float gaussian, correction, live;
  };
  Logs logs(long i) const {
    vf gaussian = {}, correction = {}, live = {};
    for (long j = 0; j < dims; j += W) {
      Drawn s = at(i, j);
      vi in = first(dims - j) > 0.5f;
      gaussian += pick(in, -0.5f * s.noise * s.noise - s.log_std - 0.9189385175704956f, vf{});
      correction += pick(in, log(most(1.0f - s.action * s.action, vf{}) + 1e-6f), vf{});
      live += s.live;
    }
    return {sum(gaussian), sum(correction), sum(live)};
  }
  // Stores the gradients of both logits of a row, given those of its action, log-probability and scaled entropy.
  template <class ToAction> void store_gradient(long i, ToAction&& to_action, float to_log_prob, float to_entropy, Tensor d) const {
    Logs of = logs(i);
    float corrected = of.gaussian - of.correction, shifted = corrected + 1e-8f;
    // scaled entropy = -c g k / (c + 1e-8) with c = g - correction: its derivatives to g and to c
    float to_corrected = -of.gaussian * of.live * 1e-8f / (shifted * shifted);
    float to_gaussian = to_corrected - corrected * of.live / shifted;
    for (long j = 0; j < dims; j += W) {
      Drawn s = at(i, j);
      long count = dims - j;
      vf room = 1.0f - s.action * s.action;
      vf bent = pick(room > 0.0f, 2.0f * s.action / (most(room, vf{}) + 1e-6f), vf{});
      vf to_sample = (to_action(j, count) + (to_log_prob + to_entropy * to_corrected) * bent) * room;
      vf to_log_std = to_sample * s.noise * s.std - (to_log_prob + to_entropy * to_gaussian);
      store(d, j, to_sample * s.live, count);
      store(d, dims + j, to_log_std * s.live * (0.5f * (high - low)) * (1.0f - s.squashed * s.squashed), count);
    }
  }
};

struct PolicySample : Kernel {
  Sample s;
  Strided action, log_prob, entropy;
  bool has_entropy;

  PolicySample(const Grid&, Reader& in) {
    s.drawn(in);
    action = strided(in), log_prob = strided(in), entropy = strided(in);
    s.sizes(in);
    rows = s.n;
    s.masked = in.integer(), has_entropy = in.integer();
    in.skip(3);
  }
  void run() override { walk_all(*this, s.m); }
  void walk(long m0, long m1) override {
    for (long i = m0; i < m1; i++) {
      Place at(i, s.n);
      for (long j = 0; j < s.dims; j += W) store(row(action, 0, at), j, s.at(i, j).action, s.dims - j);
      if (!has_entropy) continue;
      Sample::Logs of = s.logs(i);
      float corrected = of.gaussian - of.correction;
      set(row(log_prob, 0, at), 0, corrected);
      set(row(entropy, 0, at), 0, -corrected * (of.gaussian * of.live / (corrected + 1e-8f)));
    }
  }
};

struct PolicyGradient : Kernel {
  Sample s;
  Strided d_action, d;
  const float *weight, *scale;
  float entropy_coef;

  PolicyGradient(const Grid&, Reader& in) {
    s.drawn(in);
    d_action = strided(in), weight = in.floats(), scale = in.floats(), d = strided(in);
    s.sizes(in);
    rows = s.n;
    entropy_coef = float(in.number());
    s.masked = in.integer();
    in.skip(3);
  }
  void run() override { walk_all(*this, s.m); }
  void walk(long m0, long m1) override {
    for (long i = m0; i < m1; i++) {
      Place at(i, s.n);
      float share = -weight[at.e], by = share * 0.5f / *scale;  // the mean of two critics, over the running scale
      auto to_action = [&](long j, long count) { return load(row(d_action, 0, at), j, count) * by; };
      s.store_gradient(i, to_action, 0.0f, share * entropy_coef, row(d, 0, at));
    }
  }
};

struct PolicySampleGradient : Kernel {
  Sample s;
  Strided d_action, d_log_prob, d_entropy, d;

  PolicySampleGradient(const Grid&, Reader& in) {
    s.drawn(in);
    d_action = strided(in), d_log_prob = strided(in), d_entropy = strided(in), d = strided(in);
    s.sizes(in);
    rows = s.n;
    s.masked = in.integer();
    in.skip(3);
  }
  void run() override { walk_all(*this, s.m); }
  void walk(long m0, long m1) override {
    for (long i = m0; i < m1; i++) {
      Place at(i, s.n);
      auto to_action = [&](long j, long count) { return load(row(d_action, 0, at), j, count); };
      s.store_gradient(i, to_action, scalar(row(d_log_prob, 0, at)), scalar(row(d_entropy, 0, at)), row(d, 0, at));
    }
  }
};

struct RunningScale : Kernel {
  const float *q, *value;
  float* out;
  long groups, group, stride, b, place5, next5, place95, next95;
  float tau, low5, high5, low95, high95;

  RunningScale(const Grid&, Reader& in) {
    q = in.floats(), value = in.floats(), out = in.floats(), group = in.integer();
    stride = in.integer(), b = in.integer(), tau = float(in.number());
    place5 = in.integer(), next5 = in.integer(), place95 = in.integer(), next95 = in.integer();
    low5 = float(in.number()), high5 = float(in.number()), low95 = float(in.number()), high95 = float(in.number());
    groups = in.integer();
    in.skip(2);
  }
  void run() override {
    std::vector<float> sorted(b);
    bool nan = false;
    for (long i = 0; i < b; i++) {
      for (long g = 0; g < groups; g++) sorted[i] += q[g * group + i * stride];
      sorted[i] /= float(groups), nan |= sorted[i] != sorted[i];
    }
    float scale = NAN;
    if (!nan) {
      std::sort(sorted.begin(), sorted.end());
      // Rounded as torch rounds: products first, then their sum.
      volatile float a = sorted[place95] * low95, c = sorted[next95] * high95, e = sorted[place5] * low5, f = sorted[next5] * high5;
      volatile float high = a + c, low = e + f;
      scale = std::max(high - low, 1.0f);
      if (high - low != high - low) scale = NAN;
    }
    volatile float off = scale - *value, part = tau < 0.5f ? tau * off : off * (1.0f - tau);
    *out = tau < 0.5f ? *value + part : scale - part;
  }
};

struct Summary : Kernel {
  const float *losses, *mix, *new_scale;
  float *means, *metrics, *scale;
  const int64_t* flag;
  int64_t* counter;
  long r, b, mixed, value, entropy;

  Summary(const Grid&, Reader& in) {
    losses = in.floats(), mix = in.floats(), means = in.floats(), metrics = in.floats();
    in.tuple(4);
    flag = in.integers(), scale = in.floats(), new_scale = in.floats(), counter = in.integers();
    r = in.integer(), b = in.integer(), mixed = in.integer(), value = in.integer(), entropy = in.integer();
    in.skip(3);
  }
  void run() override {
    for (long i = 0; i < r; i++) {
      vf total = {};
      for (long j = 0; j < b; j += W) total += load(losses + i * b + j, b - j);
      means[i] = sum(total) / float(b);
    }
    for (long m = 0; m < mixed; m++) {
      float metric = 0;
      for (long i = 0; i < r; i++) metric += mix[m * r + i] * means[i];
      metrics[m] = metric;
    }
    metrics[mixed] = metrics[entropy] - metrics[value] / *new_scale;
    metrics[mixed + 1] = *new_scale;
    if (*flag == 0) *scale = *new_scale, *counter += 1;
  }
};

static Known<Consistency> consistency("consistency_kernel");
static Known<TdTarget> td_target("td_target_kernel");
static Known<PolicySample> policy_sample("policy_sample_kernel");
static Known<PolicyGradient> policy_gradient("policy_gradient_kernel");
static Known<PolicySampleGradient> policy_sample_gradient("policy_sample_gradient_kernel");
static Known<RunningScale> running_scale("running_scale_kernel");
static Known<Summary> summary("summary_kernel");

}  // namespace cpu
