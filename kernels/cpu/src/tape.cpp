// What Python calls: run one kernel now, or keep many as a tape and replay it.
#include "rows.h"

#if defined(HAVE_AMX) && !defined(EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cpu {

bool have_amx() {
#if defined(EMULATE_AMX)
  return true;
#elif defined(HAVE_AMX)
  // ARCH_REQ_XCOMP_PERM for tile data; the state of tiles is large, so a process has to ask.
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
#else
  return false;
#endif
}

// Kernels in order. Those of one segment work on the same rows, one block of rows after the other: what a block's
// kernels pass to each other stays in the cache, and threads meet once a segment.
class Tape {
 public:
  // segment: 0, or the number of samples of an environment; first: the sample that the kernel's row 0 is.
  void add(std::unique_ptr<Kernel> kernel, long envs, long segment, long first) {
    steps_.push_back({std::move(kernel), envs, segment, first});
  }
  void run(bool stale) {
    if (stale) panels_.stale();
    for (size_t i = 0; i < steps_.size();) {
      size_t end = i + 1;
      if (steps_[i].segment)
        while (end < steps_.size() && steps_[end].segment == steps_[i].segment && steps_[end].envs == steps_[i].envs) end++;
      for (size_t j = i; j < end; j++) steps_[j].kernel->prepare(panels_);
      panels_.pack();
      if (steps_[i].segment) walk(i, end);
      else steps_[i].kernel->run();
      if (steps_[i].kernel->writes_weights()) panels_.stale();
      i = end;
    }
  }

 private:
  struct Step {
    std::unique_ptr<Kernel> kernel;
    long envs, segment, first;
  };
  void walk(size_t begin, size_t end) {
    long samples = steps_[begin].segment, envs = steps_[begin].envs;
    long block = block_of(samples * envs), blocks = cdiv(samples, std::min(block, samples));
    block = cdiv(samples, blocks);
    parallel(envs * blocks, [&](long i) {
      long e = i / blocks, s0 = i % blocks * block, s1 = std::min(samples, s0 + block);
      for (size_t j = begin; j < end; j++) {
        const Step& step = steps_[j];
        long n = step.kernel->rows, r0 = std::max(0L, s0 - step.first), r1 = std::min(n, s1 - step.first);
        if (r0 < r1) step.kernel->walk(e * n + r0, e * n + r1);
      }
    });
  }
  std::vector<Step> steps_;
  Panels panels_;
};

static thread_local std::string why;

template <class F> const char* guarded(F&& work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& e) {
    why = e.what();
    return why.c_str();
  }
}

static std::unique_ptr<Kernel> made(const char* name, const int64_t* grid, const int64_t* words, long count) {
  auto maker = kernels().find(name);
  if (maker == kernels().end()) throw std::runtime_error(std::string("no such kernel for a CPU: ") + name);
  Grid sizes = {long(grid[0]), long(grid[1]), long(grid[2])};
  Reader in(words, words + count);
  auto kernel = maker->second(sizes, in);
  in.end();
  return kernel;
}

}  // namespace cpu

using namespace cpu;

// All return null, or what went wrong.
extern "C" {
#pragma GCC visibility push(default)
const char* cpu_run(const char* name, const int64_t* grid, const int64_t* words, long count, int threads) {
  return guarded([&] {
    static thread_local Panels panels;
    static thread_local long uses = 0;
    team() = threads;
    auto kernel = made(name, grid, words, count);
    // Weights of the last call may have been written since; those of long ago need no room.
    if (++uses % 64 == 0) panels = Panels();
    panels.stale();
    kernel->prepare(panels);
    panels.pack();
    kernel->run();
  });
}
void* cpu_tape() { return new Tape(); }
void cpu_tape_free(void* tape) { delete static_cast<Tape*>(tape); }
const char* cpu_tape_add(void* tape, const char* name, const int64_t* grid, const int64_t* words, long count, long envs,
                         long segment, long first) {
  return guarded([&] { static_cast<Tape*>(tape)->add(made(name, grid, words, count), envs, segment, first); });
}
const char* cpu_tape_run(void* tape, bool stale, int threads) {
  return guarded([&] {
    team() = threads;
    static_cast<Tape*>(tape)->run(stale);
  });
}
// What products of bfloat16 are made by: AMX, AVX512-BF16, or none.
const char* cpu_bfloat16() {
  if (have_amx()) return "AMX";
#if defined(__AVX512BF16__)
  return "AVX512-BF16";
#else
  return "";
#endif
}
long cpu_width() { return W; }
void cpu_threads(void* run) { run_team() = reinterpret_cast<Team>(run); }
#pragma GCC visibility pop
}
