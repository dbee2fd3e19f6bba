// The tile instructions in plain C++, so that code made of them is tested where the CPU has none.
#pragma once

#include "vec.h"

namespace cpu::emulated {
struct Tile {
  alignas(64) char rows[16][64];
};
inline Tile& tile(int i) {
  static thread_local Tile all[8];
  return all[i];
}
inline void load(int i, const void* p, long stride) {
  for (int r = 0; r < 16; r++) std::memcpy(tile(i).rows[r], static_cast<const char*>(p) + r * stride, 64);
}
inline void store(int i, void* p, long stride) {
  for (int r = 0; r < 16; r++) std::memcpy(static_cast<char*>(p) + r * stride, tile(i).rows[r], 64);
}
inline void multiply(int c, int a, int b) {
  auto entry = [](int t, int r, int i) {
    bf16 x;
    std::memcpy(&x, tile(t).rows[r] + 2 * i, 2);
    return to_float(x);
  };
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float total;
      std::memcpy(&total, tile(c).rows[m] + 4 * n, 4);
      for (int k = 0; k < 32; k++) total += entry(a, m, k) * entry(b, k / 2, 2 * n + k % 2);
      std::memcpy(tile(c).rows[m] + 4 * n, &total, 4);
    }
}
}  // namespace cpu::emulated

#define _tile_loadconfig(p) ((void)(p))
#define _tile_release() ((void)0)
#define _tile_zero(i) std::memset(&cpu::emulated::tile(i), 0, sizeof(cpu::emulated::Tile))
#define _tile_loadd(i, p, stride) cpu::emulated::load(i, p, stride)
#define _tile_stored(i, p, stride) cpu::emulated::store(i, p, stride)
#define _tile_dpbf16ps(c, a, b) cpu::emulated::multiply(c, a, b)
