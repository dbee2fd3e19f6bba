// Philox and what is made of its words (device/philox.py, device/draw.py); slices of a replay (update/replay_gather.py).
#include "rows.h"

namespace cpu {

enum Law : long { NORMAL, EXPONENTIAL, PAIRS, KEEP, INTEGER };

typedef uint64_t vq __attribute__((vector_size(4 * W)));

// High and low words of the products of 32-bit lanes with `by`.
inline void multiply(vu x, uint32_t by, vu& high, vu& low) {
#if defined(__AVX512F__)
  vq even = (vq)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi32(int(by)));
  vq odd = (vq)_mm512_mul_epu32((__m512i)((vq)x >> 32), _mm512_set1_epi32(int(by)));
#elif defined(__AVX2__)
  vq even = (vq)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi32(int(by)));
  vq odd = (vq)_mm256_mul_epu32((__m256i)((vq)x >> 32), _mm256_set1_epi32(int(by)));
#else
  vq even = ((vq)x & 0xffffffffu) * uint64_t(by), odd = ((vq)x >> 32) * uint64_t(by);
#endif
  // Little-endian: the low word of a 64-bit lane is the even one of the two it holds.
  low = (vu)((even & 0xffffffffu) | (odd << 32));
  high = (vu)((even >> 32) | (odd & ~vq{} << 32));
}

// The four words of W groups from `group` on.
inline void philox(const int64_t* state, uint32_t group, uint32_t stream, uint32_t (&out)[4][W]) {
  uint64_t seed = uint64_t(state[0]), counter = uint64_t(state[1]);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  vu c[4] = {vu{} + group, vu{} + stream, vu{} + uint32_t(counter), vu{} + uint32_t(counter >> 32)};
  for (int l = 0; l < W; l++) c[0][l] += l;
  for (int round = 0; round < 10; round++) {
    vu high0, low0, high2, low2;
    multiply(c[0], 0xD2511F53u, high0, low0), multiply(c[2], 0xCD9E8D57u, high2, low2);
    c[0] = high2 ^ c[1] ^ k0, c[1] = low2, c[2] = high0 ^ c[3] ^ k1, c[3] = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  std::memcpy(out, c, sizeof out);
}

inline vf words(const uint32_t (&w)[W]) {
  vu x;
  std::memcpy(&x, w, sizeof x);
  return __builtin_convertvector(x, vf);
}
// Strictly inside (0, 1).
inline vf uniform(const uint32_t (&w)[W]) {
  return least(words(w) * 0x1p-32f + 0x1p-33f, all(1.0f - 0x1p-24f));
}

// cos(pi x) and sin(pi x) for x in [-1, 1].
inline void cosine_and_sine(vf x, vf& cos, vf& sin) {
  vf shifted = 2.0f * x + 0.5f, quarter = rounded(shifted);
  quarter = quarter - pick(quarter > shifted, all(1.0f), vf{});  // rounded down
  x = x - 0.5f * quarter;
  vi q = __builtin_convertvector(quarter, vi);
  vf s = x * x;
  vf c = ((0.23314662f * s - 1.33524f) * s + 4.0587134f) * s - 4.934802f;
  c = c * s + 1.0f;
  vf d = (-0.59161663f * s + 2.5499854f) * s - 5.1677122f;
  d = (x * s) * d + x * 3.1415927f;
  vi even = (q & 1) == 0, ahead = (q & 2) == 0;
  cos = pick(even, c, -d), sin = pick(even, d, c);
  cos = pick(ahead, cos, -cos), sin = pick(ahead, sin, -sin);
}

inline void normal_pair(const uint32_t (&w0)[W], const uint32_t (&w1)[W], float* even, float* odd) {
  vf r = most(-2.0f * log(uniform(w0)), vf{}), angle;
  for (int l = 0; l < W; l++) r[l] = std::sqrt(r[l]), angle[l] = float(int32_t(w1[l]));
  vf cos, sin;
  cosine_and_sine(angle * 0x1p-31f, cos, sin);
  store(even, r * cos), store(odd, r * sin);
}

struct Draw : Kernel {
  const int64_t* state;
  struct Run {
    Tensor out;
    long size, pitch, law, stream, limit;
  };
  std::vector<Run> runs;

  Draw(const Grid&, Reader& in) {
    state = in.integers();
    runs.resize(in.tuple());
    for (Run& run : runs) {
      in.tuple(5);
      run.out = in.tensor(), run.size = in.integer(), run.pitch = in.integer();
      in.skip(2);
    }
    in.tuple(long(runs.size()));
    for (Run& run : runs) {
      in.tuple(3);
      run.law = in.integer(), run.stream = in.integer(), run.limit = in.integer();
    }
    in.skip(1);
  }
  void run() override {
    constexpr long PART = 1024;  // groups a task
    std::vector<std::pair<const Run*, long>> parts;
    for (const Run& run : runs)
      for (long group = 0; 4 * group < run.size; group += PART) parts.push_back({&run, group});
    parallel(long(parts.size()), [&](long i) {
      auto [run, first] = parts[i];
      for (long group = first; group < first + PART && 4 * group < run->size; group += W) fill(*run, group);
    });
  }
  void fill(const Run& run, long group) const {
    uint32_t w[4][W];
    philox(state, uint32_t(group), uint32_t(run.stream), w);
    long element = 4 * group, count = std::min<long>(4 * W, run.size - element);
    float x[4][W];
    switch (run.law) {
      case NORMAL:
        normal_pair(w[0], w[1], x[0], x[1]), normal_pair(w[2], w[3], x[2], x[3]);
        for (long i = 0; i < count; i++) run.out.as<float>()[element + i] = x[i & 3][i >> 2];
        break;
      case EXPONENTIAL:
        for (int j = 0; j < 4; j++) store(x[j], most(-log(uniform(w[j])), all(0x1p-24f)));
        for (long i = 0; i < count; i++) run.out.as<float>()[element + i] = x[i & 3][i >> 2];
        break;
      case PAIRS:
        for (long i = 0; i < count; i += 2) {
          int64_t* out = run.out.as<int64_t>() + (element + i) / 2 * run.pitch;
          int64_t a = share(w[i & 3][i >> 2], run.limit), b = share(w[(i & 3) + 1][i >> 2], run.limit - 1);
          out[0] = a;
          if (i + 1 < count) out[1] = b + (b >= a);
        }
        break;
      case KEEP: {
        uint32_t kept[W];  // four bytes a group, in their order on a little-endian machine
        for (int l = 0; l < W; l++) {
          auto one = [&](int j) { return uint32_t(w[j][l] >= uint64_t(run.limit)) << 8 * j; };
          kept[l] = one(0) | one(1) | one(2) | one(3);
        }
        std::memcpy(run.out.as<uint8_t>() + element, kept, count);
        break;
      }
      default:
        for (long i = 0; i < count; i++) run.out.as<int64_t>()[element + i] = share(w[i & 3][i >> 2], run.limit);
    }
  }
  static int64_t share(uint32_t word, long limit) { return int64_t(uint64_t(word) * uint64_t(limit) >> 32); }
};

struct DrawSlices : Kernel {
  const int64_t *state, *table, *first, *count, *starts;
  Tensor obs, action, reward, terminated, task;
  const int64_t* repeats;  // none of observations of one frame
  Strided to_obs, to_action, to_reward, to_terminated;
  int64_t* to_task;
  long frames, c, f, r, b, h, width, dims;
  bool drawn, tasks;

  DrawSlices(const Grid& grid, Reader& in) {
    state = in.integers(), table = in.integers(), first = in.integers(), count = in.integers(), starts = in.integers();
    in.tuple(6);
    obs = in.tensor(), action = in.tensor(), reward = in.tensor(), terminated = in.tensor(), task = in.tensor();
    repeats = in.integers();
    in.tuple(5);
    to_task = in.integers();
    to_obs = strided(in), to_action = strided(in), to_reward = strided(in), to_terminated = strided(in);
    c = in.integer(), f = in.integer(), r = in.integer(), b = in.integer(), h = in.integer();
    width = in.integer(), frames = grid[2] / in.integer(), dims = in.integer();
    drawn = in.integer(), tasks = in.integer();
    in.skip(5);
  }
  static uint64_t share(uint32_t high, uint32_t low, uint64_t count) {
    return (high * count + (low * count >> 32)) >> 32;
  }
  void run() override {
    parallel(cdiv(b, W), [&](long part) {
      uint32_t w[4][W];
      philox(state, uint32_t(part * W), 22, w);
      for (long l = 0, i = part * W; l < W && i < b; l++, i++) {
        long start;
        if (drawn) {
          long at = long((*first + share(w[0][l], w[1][l], *count)) % r);
          start = table[2 * at] + long(share(w[2][l], w[3][l], table[2 * at + 1] - h));
        } else {
          start = starts[i];
        }
        for (long t = 0; t <= h; t++) copy(i, t, start + t);
      }
    });
  }
  void copy(long i, long t, long number) const {
    long step = number % c;
    for (long k = 0; k < frames; k++) {
      long row = repeats ? (number + std::max<long>(k, repeats[step])) % f : step;
      Tensor x = obs.at(row * width), y = to_obs.row(t, i, 0).at(k * width);
      if (y.type == U8) std::memcpy(y.p, x.p, width);
      else for (long j = 0; j < width; j += W) store(y, j, load(x, j, width - j), width - j);
    }
    if (t == 0) {
      if (tasks) to_task[i] = task.as<int64_t>()[step];
      return;
    }
    Tensor a = action.at(step * dims), to = to_action.row(t - 1, i, 0);
    for (long j = 0; j < dims; j += W) store(to, j, load(a, j, dims - j), dims - j);
    set(to_reward.row(t - 1, i, 0), 0, reward.as<float>()[step]);
    set(to_terminated.row(t - 1, i, 0), 0, terminated.as<uint8_t>()[step]);
  }
};

static Known<Draw> draw_kernel("draw_kernel");
static Known<DrawSlices> draw_slices("draw_slices_kernel");

}  // namespace cpu
