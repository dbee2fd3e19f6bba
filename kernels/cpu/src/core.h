// What every kernel shares: its arguments as Python flattened them, rows with strides, threads, memory to work in.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace cpu {

enum Type : int64_t { F32 = 0, BF16 = 1, I64 = 2, U8 = 3 };

struct Tensor {
  char* p = nullptr;
  Type type = F32;
  template <class T> T* as() const { return reinterpret_cast<T*>(p); }
  long size() const { return type == I64 ? 8 : type == F32 ? 4 : type == BF16 ? 2 : 1; }
  Tensor at(long i) const { return {p + i * size(), type}; }
};

// Reads the arguments of a kernel in the order of its Python signature, and refuses one of another kind.
class Reader {
 public:
  enum Tag : int64_t { NONE, INT, FLOAT, TENSOR, TUPLE };

  Reader(const int64_t* words, const int64_t* end) : at_(words), end_(end) {}

  long integer() { return expect(INT, "an integer"), *at_++; }
  // Passes over integers that say nothing to a CPU: tile sizes and the like.
  void skip(int count) {
    for (int i = 0; i < count; i++) integer();
  }
  double number() {
    expect(FLOAT, "a float");
    double x;
    std::memcpy(&x, at_++, sizeof x);
    return x;
  }
  Tensor tensor() {
    if (!given()) return {};
    expect(TENSOR, "a tensor");
    Tensor t{reinterpret_cast<char*>(at_[0]), Type(at_[1])};
    at_ += 2;
    return t;
  }
  Tensor tensor(Type type) {
    Tensor t = tensor();
    if (t.p && t.type != type) fail("a tensor of another type");
    return t;
  }
  float* floats() { return tensor(F32).as<float>(); }
  int64_t* integers() { return tensor(I64).as<int64_t>(); }
  // The length of a tuple, whose entries follow.
  long tuple() { return expect(TUPLE, "a tuple"), *at_++; }
  void tuple(long length) {
    if (tuple() != length) fail("a tuple of another length");
  }
  // False, and the argument is read, where it is None.
  bool given() {
    ++read_;
    if (at_ < end_ && *at_ == NONE) return ++at_, false;
    return --read_, true;
  }
  void end() {
    if (at_ != end_) fail("more than the kernel takes");
  }

 private:
  void expect(Tag tag, const char* what) {
    ++read_;
    if (at_ >= end_ || *at_ != tag) fail(what);
    ++at_;
  }
  [[noreturn]] void fail(const char* what) {
    throw std::runtime_error("value " + std::to_string(read_) + " of the arguments is not what was expected: " + what);
  }

  const int64_t *at_, *end_;
  long read_ = 0;
};

// A buffer's rows: strides, in elements, over group, environment and row of that environment.
struct Strided {
  Tensor t;
  long g, e, r;
  Tensor row(long group, long env, long row) const { return t.at(group * g + env * e + row * r); }
};

inline Strided strided(Reader& in) {
  in.tuple(4);
  Tensor t = in.tensor();
  long g = in.integer(), e = in.integer(), r = in.integer();
  return {t, g, e, r};
}

// Which slab of a packed layer group g uses.
struct Slab {
  const int64_t* members;
  long base, step;
  long of(long g, bool drawn) const { return base + (drawn ? members[step * g] : step * g); }
};

inline Slab slab(Reader& in) {
  in.tuple(3);
  Tensor members = in.tensor();
  long base = in.integer(), step = in.integer();
  return {members.as<int64_t>(), base, step};
}

inline long cdiv(long a, long b) { return (a + b - 1) / b; }
inline long padded(long n, long to) { return cdiv(n, to) * to; }

// Threads that the kernels of this thread's call may use.
inline int& team() {
  static thread_local int threads = 1;
  return threads;
}

// How torch's OpenMP runtime runs a function on a team of threads; null where there is none.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);
inline Team& run_team() {
  static Team run = nullptr;
  return run;
}

// Calls task(0) to task(count - 1) on the team, each thread taking the next as it is free: on a busy machine the
// thread that is held up takes fewer. No result may depend on which thread a task is done by.
template <class F> void parallel(long count, F&& task) {
  struct Work {
    std::remove_reference_t<F>& task;
    long count;
    std::atomic<long> next{0};
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error{};
  } work{task, count};
  auto some = [](void* given) {
    Work& work = *static_cast<Work*>(given);
    try {
      for (long i; (i = work.next.fetch_add(1, std::memory_order_relaxed)) < work.count;) work.task(i);
    } catch (...) {  // no exception may leave the team
      work.next = work.count;
      if (!work.failed.test_and_set()) work.error = std::current_exception();
    }
  };
  long threads = std::min<long>(team(), count);
  if (threads > 1 && run_team()) run_team()(some, &work, unsigned(threads), 0);
  else some(&work);
  if (work.error) std::rethrow_exception(work.error);
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T> using Memory = std::unique_ptr<T[], Free>;

template <class T> Memory<T> allocate(size_t count) {
  void* p = std::aligned_alloc(64, padded(long(count * sizeof(T)) + 64, 64));
  if (!p) throw std::bad_alloc();
  return Memory<T>(static_cast<T*>(p));
}

// Memory of this thread for one task; a slot holds one thing at a time.
enum Slot { INPUT, SIDE, OUTPUT, ROW, OTHER, SLOTS };

template <class T> T* scratch(Slot slot, long count) {
  static thread_local Memory<char> held[SLOTS];
  static thread_local size_t room[SLOTS] = {};
  size_t bytes = size_t(count) * sizeof(T);
  if (room[slot] < bytes) {
    held[slot] = allocate<char>(bytes);
    room[slot] = bytes;
  }
  return reinterpret_cast<T*>(held[slot].get());
}

class Panels;

// One launch of a kernel, its arguments read.
class Kernel {
 public:
  virtual ~Kernel() = default;
  // Have the weights it will read packed; called before `run` and before its first `walk`.
  virtual void prepare(Panels&) {}
  virtual void run() = 0;
  // Where rows do not depend on each other: rows per environment, and the work on rows m0 to m1 of all.
  long rows = 0;
  virtual void walk(long, long) { throw std::logic_error("not a kernel that works row by row"); }
  // Whether weights are other ones afterwards.
  virtual bool writes_weights() const { return false; }
};

using Grid = long[3];
using Maker = std::unique_ptr<Kernel> (*)(const Grid&, Reader&);

inline std::map<std::string, Maker>& kernels() {
  static std::map<std::string, Maker> all;
  return all;
}

// Makes a kernel known by the name that its twin has in Python.
template <class K> struct Known {
  explicit Known(const char* name) {
    kernels()[name] = [](const Grid& grid, Reader& in) -> std::unique_ptr<Kernel> {
      return std::make_unique<K>(grid, in);
    };
  }
};

// How many rows a task takes: enough to use a weight often, few enough to stay in the cache, and all threads busy.
inline long block_of(long rows) {
  long tasks = cdiv(rows, 64);
  if (tasks < 4L * team()) tasks = std::min<long>(padded(tasks, team()), cdiv(rows, 8));
  return std::max<long>(cdiv(rows, std::max<long>(tasks, 1)), 1);
}

// Walks all rows of a kernel.
inline void walk_all(Kernel& kernel, long rows) {
  long block = block_of(rows);
  parallel(cdiv(rows, block), [&](long i) { kernel.walk(i * block, std::min(rows, (i + 1) * block)); });
}

}  // namespace cpu
