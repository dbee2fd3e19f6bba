// Gradient norm, Adam and moving averages over flat buffers (update/optim.py); copies of many matrices.
#include "rows.h"

namespace cpu {

struct SquaredNorm : Kernel {
  const float* grad;
  float* partials;
  int64_t* step;
  long n, blocks, block, count;

  SquaredNorm(const Grid& grid, Reader& in) : count(grid[0]) {
    grad = in.floats(), partials = in.floats(), step = in.integers();
    n = in.integer(), blocks = in.integer(), block = in.integer();
  }
  void run() override {
    parallel(count, [&](long p) {
      long first = p * blocks * block, last = std::min(n, first + blocks * block);
      vf total[4] = {};
      long i = first;
      for (; i + 4 * W <= last; i += 4 * W)
        for (int j = 0; j < 4; j++) {
          vf g = load(grad + i + j * W);
          total[j] += g * g;
        }
      for (; i < last; i += W) {
        vf g = load(grad + i, last - i);
        total[0] += g * g;
      }
      partials[p] = sum((total[0] + total[1]) + (total[2] + total[3]));
    });
    *step += 1;
  }
};

inline vf lerp(vf start, vf end, float weight) {
  vf off = end - start;
  return weight < 0.5f ? start + weight * off : end - off * (1.0f - weight);
}

struct Adam : Kernel {
  float *param, *grad, *exp_avg, *exp_avg_sq, *partials, *target = nullptr, *norm;
  int64_t *step, *flag;
  Tensor shadow, target_shadow;
  long at = 0, code, n, count, target_n, head;
  float tau = 0, lr, head_lr, eps, max_norm;
  double beta1, beta2;

  Adam(const Grid&, Reader& in) {
    in.tuple(7);
    param = in.floats(), grad = in.floats(), exp_avg = in.floats(), exp_avg_sq = in.floats(), partials = in.floats();
    step = in.integers(), shadow = in.tensor();
    if (in.given()) {
      in.tuple(4);
      target = in.floats(), at = in.integer(), tau = float(in.number()), target_shadow = in.tensor();
    }
    in.tuple(3);
    flag = in.integers(), norm = in.floats(), code = in.integer();
    n = in.integer(), count = in.integer(), target_n = in.integer(), head = in.integer();
    lr = float(in.number()), head_lr = float(in.number()), eps = float(in.number()), max_norm = float(in.number());
    beta1 = in.number(), beta2 = in.number();
    in.number(), in.number();
    in.skip(6);
  }
  bool writes_weights() const override { return true; }
  void run() override {
    float total = 0;
    for (long p = 0; p < count; p++) total += partials[p];
    float size = *norm = std::sqrt(total);
    bool fails = !(size < INFINITY);
    if (fails && *flag == 0) *flag = code;
    if (fails || *flag != 0) return;
    float clip = std::min(max_norm / (size + 1e-6f), 1.0f);
    double correction1 = 1 - std::pow(beta1, double(*step)), correction2 = 1 - std::pow(beta2, double(*step));
    float rate = float(lr / correction1), head_rate = float(head_lr / correction1), root = float(std::sqrt(correction2));
    constexpr long PART = 16384;
    parallel(cdiv(n, PART), [&](long part) {
      long first = part * PART, last = std::min(n, first + PART);
      // The head ends, the target begins and ends inside a part at most: each piece is of one kind.
      while (first < last) {
        long end = last;
        for (long edge : {head, at, at + target_n})
          if (first < edge && edge < end) end = edge;
        bool moves = target && first >= at && first < at + target_n;
        piece(first, end, clip, first < head ? head_rate : rate, root, moves);
        first = end;
      }
    });
  }
  void piece(long first, long end, float clip, float rate, float root, bool moves) const {
    float b1 = float(1 - beta1), b2 = float(beta2), rest = float(1 - beta2);
    for (long i = first; i < end; i += W) {
      long left = end - i;
      vf g = load(grad + i, left) * clip, m = load(exp_avg + i, left), v = load(exp_avg_sq + i, left);
      m = m + (g - m) * b1;
      v = v * b2 + g * g * rest;
      vf deviation;
      for (int l = 0; l < W; l++) deviation[l] = std::sqrt(v[l]);
      vf x = load(param + i, left) - rate * (m / (deviation / root + eps));
      store(exp_avg + i, m, left), store(exp_avg_sq + i, v, left), store(param + i, x, left);
      if (shadow.p) store(shadow, i, x, left);
      if (!moves) continue;
      vf y = lerp(load(target + i - at, left), x, tau);
      store(target + i - at, y, left);
      if (target_shadow.p) store(target_shadow, i - at, y, left);
    }
  }
};

struct CopyTable : Kernel {
  const int64_t *table, *parts;
  long count, columns, block;

  CopyTable(const Grid& grid, Reader& in) : count(grid[0]) {
    table = in.integers(), parts = in.integers();
    columns = in.integer(), block = in.integer();
    in.skip(1);
  }
  bool writes_weights() const override { return true; }
  void run() override {
    parallel(count, [&](long part) {
      const int64_t* row = table + parts[2 * part] * columns;
      const float* from = reinterpret_cast<const float*>(row[0]);
      Tensor to{reinterpret_cast<char*>(row[1]), row[6] == 2 ? BF16 : F32};
      long width = row[2], last = std::min<long>(row[3], parts[2 * part + 1] + block);
      for (long i = parts[2 * part + 1]; i < last;) {
        long line = i / width, column = i % width, length = std::min(width - column, last - i);
        Tensor out = to.at(line * row[5] + column);
        const float* in = from + line * row[4] + column;
        for (long j = 0; j < length; j += W) store(out, j, load(in + j, length - j), length - j);
        i += length;
      }
    });
  }
};

static Known<SquaredNorm> squared_norm("squared_norm_kernel");
static Known<Adam> adam("adam_kernel");
static Known<CopyTable> copy_table("copy_table_kernel");

}  // namespace cpu
