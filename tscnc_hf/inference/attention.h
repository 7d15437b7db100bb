// Attention among few tokens, without a mask: softmax(scale q k') v, one head after the other. Its keys lie turned in
// cache, features down and keys across, so that both products are sums of rows in registers.
#pragma once

#include "kernels.h"

namespace tscnc {

// Floats from one image, head and token to the next; features are side by side.
struct Heads {
  const float* at;
  int64_t image, head, token;
};

// R rows and C vectors of a product: a (R, count) by b (count, C vectors). `finish(row, vector, sum)` gets each.
template <int R, int C, class Finish>
inline __attribute__((always_inline)) void product(const float* a, int64_t a_pitch, const float* b, int64_t b_pitch,
                                                   int64_t count, Finish finish) {
  vec sums[R][C] = {};
  for (int64_t i = 0; i < count; ++i) {
    vec across[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) across[c] = load(b + i * b_pitch + c * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c) sums[r][c] += a[r * a_pitch + i] * across[c];
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c) finish(r, c, sums[r][c]);
}

// exp(scale (x - the largest x)) in place, and the sum of these. What follows the `count` first is written over.
inline float exponentials(float* x, int64_t count, float scale) {
  vec most = broadcast(-HUGE_VALF);
  const int64_t last = (count - 1) / LANES * LANES;
  for (int64_t i = 0; i < last; i += LANES) most = maximum(load(x + i), most);
  float largest = -HUGE_VALF;
  for (int lane = 0; lane < LANES; ++lane) largest = std::max(largest, most[lane]);
  for (int64_t i = last; i < count; ++i) largest = std::max(largest, x[i]);
  vec sums{};
  for (int64_t i = 0; i <= last; i += LANES) {
    vec v = (load(x + i) - largest) * scale;
    v = v == v ? exponential(v) : v;  // what is not a number stays so
    if (i == last)
      for (int64_t lane = count - last; lane < LANES; ++lane) v[lane] = 0;
    store(x + i, v);
    sums += v;
  }
  float sum = 0;
  for (int lane = 0; lane < LANES; ++lane) sum += sums[lane];
  return sum;
}

// `out` is contiguous (images, queries, heads, size); `size`, the features of a head, is a multiple of LANES.
template <class Parallel>
void attention(const Heads& q, const Heads& k, const Heads& v, int64_t images, int64_t heads, int64_t queries,
               int64_t keys, int64_t size, float scale, float* out, Parallel parallel) {
  constexpr int ROWS = 4, MOST = REGISTERS / ROWS;
  const Tiling tiling(keys, MOST);
  const int64_t pitch = (keys + LANES - 1) / LANES * LANES;
  parallel(images * heads, [&](int64_t begin, int64_t end) {
    thread_local Scratch turned_memory, scores_memory;
    float* turned = turned_memory.get(size * pitch);
    float* scores = scores_memory.get(ROWS * pitch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads;
      auto part = [&](const Heads& of) { return of.at + image * of.image + head * of.head; };
      transpose(part(k), k.token, keys, size, turned, pitch, true, unchanged);
      for (int64_t first = 0; first < queries; first += ROWS)
        with_constant<ROWS>(std::min<int64_t>(ROWS, queries - first), [&](auto rows) {
          constexpr int R = decltype(rows)::value;
          for (int64_t t = 0; t < tiling.tiles; ++t)
            with_constant<MOST>(tiling.vectors(t), [&](auto vectors) {
              float* to = scores + tiling.begin(t);
              product<R, decltype(vectors)::value>(
                  part(q) + first * q.token, q.token, turned + tiling.begin(t), pitch, size,
                  [&](int r, int c, vec sum) { store(to + r * pitch + c * LANES, sum); });
            });
          float parts[R];
          for (int r = 0; r < R; ++r) parts[r] = 1 / exponentials(scores + r * pitch, keys, scale);
          for (int64_t f = 0; f < size; f += MOST * LANES)
            with_constant<MOST>(std::min<int64_t>(MOST, (size - f) / LANES), [&](auto vectors) {
              float* to = out + ((image * queries + first) * heads + head) * size + f;
              product<R, decltype(vectors)::value>(
                  scores, pitch, part(v) + f, v.token, keys,
                  [&](int r, int c, vec sum) { store(to + r * heads * size + c * LANES, sum * parts[r]); });
            });
        });
    }
  });
}

}  // namespace tscnc
