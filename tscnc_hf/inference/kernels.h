// Products of sparse weights with dense activations in float32. Nothing of torch here: the fuzz test compiles this alone.
//
// A weight that is not zero is an entry: where its input lies in a tile of activations, and its value. A tile lies in
// scratch memory that stays in cache; for one output (a row) a few vectors are summed up in registers while all entries
// of the row are walked: one broadcast of the value, then one multiply-add a vector with an operand in memory.
// Rows are ordered by length within groups, so that the end of a row is seldom mispredicted.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

namespace tscnc {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 16;  // half of what AVX-512 has: addresses and values take the others
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 12;  // of 16
#else
constexpr int LANES = 4, REGISTERS = 16;  // NEON has 32
#endif
constexpr int BYTES = LANES * 4;
constexpr int LINEAR_VECTORS = 8;

typedef float vec __attribute__((vector_size(BYTES)));
typedef float vec_at __attribute__((vector_size(BYTES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(BYTES)));
typedef int32_t ivec_at __attribute__((vector_size(BYTES), aligned(4)));

struct Entry {
  int32_t offset;  // bytes into the tile
  float value;
};
struct Row {
  int32_t output, begin, end;  // entries [begin, end)
};
// Input channels in blocks whose part of a tile is walked at a time; rows lie block after block.
struct Matrix {
  const Entry* entries;
  const Row* rows;
  int64_t blocks, block_channels, inputs, outputs;
  int64_t count;   // of entries
  uint32_t limit;  // the largest offset that lies inside a tile: no entry is followed further, and no row
  const float* bias;  // of `outputs`, or null
};

enum Activation : int64_t { NONE, RELU, GELU, SILU };

inline vec load(const float* p) { return *reinterpret_cast<const vec_at*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<vec_at*>(p) = v; }
inline vec broadcast(float x) { return x - vec{}; }

inline vec load_some(const float* p, int64_t count) {
  if (count >= LANES) return load(p);
  alignas(BYTES) float lanes[LANES] = {};
  std::memcpy(lanes, p, count * sizeof(float));
  return load(lanes);
}
inline void store_some(float* p, vec v, int64_t count) {
  if (count >= LANES) return store(p, v);
  alignas(BYTES) float lanes[LANES];
  store(lanes, v);
  std::memcpy(p, lanes, count * sizeof(float));
}

inline vec maximum(vec a, vec b) { return a > b ? a : b; }
inline vec minimum(vec a, vec b) { return a < b ? a : b; }

// Relative error 2e-7 where the result is a normal number; below -87 the smallest of them.
inline vec exponential(vec x) {
  x = minimum(maximum(x, broadcast(-87.0f)), broadcast(88.0f));
  vec n = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the rounded integer
  ivec bits = (ivec)n;
  n -= 12582912.0f;
  vec r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  ivec exponent = (bits - 0x4B400000 + 127) << 23;
  return p * (vec)exponent;
}

// x / 2 + |x / 2| erf(|x| / sqrt 2). The second term is x^2 times a function of x^2, here a polynomial of degree 14 that
// was fitted to it for |x| < 5.2; beyond that it is |x / 2|. Absolute error 7e-7, without an exponential or a division.
inline vec gelu(vec x) {
  constexpr float END = 5.2f * 5.2f;
  constexpr float TERMS[] = {0.000174247616f, -0.00054188777f, 0.000687494234f, -0.00103880744f, 0.00255947048f,
                             -0.00499979546f, 0.00806930289f,  -0.0123891393f,  0.0181169417f,   -0.0247544069f,
                             0.0319645591f,   -0.0399263576f,  0.0500260033f,   -0.0677437782f,  0.135949984f};
  vec square = x * x, half = 0.5f * x;
  vec s = square * (2.0f / END) - 1.0f;
  vec p = broadcast(TERMS[0]);
#pragma GCC unroll 16
  for (int i = 1; i < 15; ++i) p = p * s + TERMS[i];
  return half + (square < END ? square * p : maximum(half, -half));
}

inline vec activate(vec v, int64_t activation) {
  switch (activation) {
    case RELU: return v < 0.0f ? vec{} : v;  // not a number stays what it is
    case GELU: return gelu(v);
    case SILU: return v / (1.0f + exponential(-v));
    default: return v;
  }
}

// `count` vectors in memory: not inlined into every kernel, and called once for all of a row.
inline __attribute__((noinline)) void activate_rare(vec* v, int64_t count, int64_t activation) {
  if (activation == GELU)
    for (int64_t i = 0; i < count; ++i) v[i] = gelu(v[i]);
  else
    for (int64_t i = 0; i < count; ++i) v[i] = activate(v[i], activation);
}

// One branch for all of them: asked for each vector it would cost as much as a short row.
template <int NY, int NX>
inline __attribute__((always_inline)) void activate_all(vec (&sums)[NY][NX], int64_t activation) {
  if (activation == NONE) return;
  if (activation == RELU) {
#pragma GCC unroll 16
    for (int y = 0; y < NY; ++y)
#pragma GCC unroll 16
      for (int x = 0; x < NX; ++x) sums[y][x] = activate(sums[y][x], RELU);
  } else {
    vec copy[NY * NX];  // `sums` themselves stay in registers
#pragma GCC unroll 16
    for (int i = 0; i < NY * NX; ++i) copy[i] = sums[i / NX][i % NX];
    activate_rare(copy, NY * NX, activation);
#pragma GCC unroll 16
    for (int i = 0; i < NY * NX; ++i) sums[i / NX][i % NX] = copy[i];
  }
}

// Memory of one thread that grows and is kept.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > size_) {
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64)));
      size_ = memory_ ? floats : 0;
      if (!memory_) throw std::bad_alloc();
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

// A row that names an output and entries that there are, whatever it says.
inline Row within(const Matrix& m, const Row& row) {
  const int32_t end = std::clamp<int32_t>(row.end, 0, m.count);
  return {std::clamp<int32_t>(row.output, 0, m.outputs - 1), std::clamp<int32_t>(row.begin, 0, end), end};
}

// sums[y][x] += value * the vector at tile + offset + y * pitch + x * step, over entries.
// `step` is a number or, where it is known when this is compiled, std::integral_constant: fewer registers hold addresses.
template <int NY, int NX, class Step>
inline __attribute__((always_inline)) void accumulate(const char* tile, uint32_t limit, int64_t pitch, Step step,
                                                      const Entry* e, const Entry* end, vec (&sums)[NY][NX]) {
  // few sums would wait for each other: several chains, added up in the end
  constexpr int CHAINS = NY * NX == 1 ? 4 : NY * NX <= 4 ? 2 : 1;
  vec chains[CHAINS][NY][NX];
#pragma GCC unroll 4
  for (int k = 0; k < CHAINS; ++k)
#pragma GCC unroll 16
    for (int y = 0; y < NY; ++y)
#pragma GCC unroll 16
      for (int x = 0; x < NX; ++x) chains[k][y][x] = k ? vec{} : sums[y][x];
  auto one = [&](int k, const Entry& entry) __attribute__((always_inline)) {
    const char* p = tile + std::min(static_cast<uint32_t>(entry.offset), limit);
    asm("" : "+r"(p));  // else compilers add the tile's address to each distance: more than there are registers
    const vec value = broadcast(entry.value);
#pragma GCC unroll 16
    for (int y = 0; y < NY; ++y)
#pragma GCC unroll 16
      for (int x = 0; x < NX; ++x)
        chains[k][y][x] += value * *reinterpret_cast<const vec_at*>(p + y * pitch + x * step);
  };
  if constexpr (CHAINS > 1)
    for (; end - e >= CHAINS; e += CHAINS)
#pragma GCC unroll 4
      for (int k = 0; k < CHAINS; ++k) one(k, e[k]);
  for (; e < end; ++e) one(0, *e);
#pragma GCC unroll 16
  for (int y = 0; y < NY; ++y)
#pragma GCC unroll 16
    for (int x = 0; x < NX; ++x) {
      sums[y][x] = chains[0][y][x];
#pragma GCC unroll 4
      for (int k = 1; k < CHAINS; ++k) sums[y][x] += chains[k][y][x];
    }
}

// All rows [first, last) of each block: fill(block) brings its channels into the tile, expect(block, next output) is
// called once a row, finish(output, sums) takes the finished sums. `partial` holds those of an output every
// `partial_pitch` floats while there are blocks to come.
constexpr auto nothing = [](auto...) {};

using Adjacent = std::integral_constant<int64_t, BYTES>;

template <int NY, int NX, class Step, class Fill, class Expect, class Finish>
inline __attribute__((always_inline)) void walk(const Matrix& m, int64_t first, int64_t last, const char* tile,
                                                int64_t pitch, Step step, float* partial, int64_t partial_pitch,
                                                Fill fill, Expect expect, Finish finish) {
  for (int64_t block = 0; block < m.blocks; ++block) {
    fill(block);
    const Row* rows = m.rows + block * m.outputs;
    for (int64_t i = first; i < last; ++i) {
      const Row row = within(m, rows[i]);
      expect(block, within(m, rows[i + 1 < last ? i + 1 : i]).output);
      float* kept = partial + row.output * partial_pitch;
      vec sums[NY][NX];
      const vec start = broadcast(m.bias ? m.bias[row.output] : 0.0f);
#pragma GCC unroll 16
      for (int y = 0; y < NY; ++y)
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) sums[y][x] = block ? load(kept + (y * NX + x) * LANES) : start;
      accumulate<NY, NX>(tile, m.limit, pitch, step, m.entries + row.begin, m.entries + row.end, sums);
      if (block + 1 == m.blocks) {
        finish(row.output, sums);
      } else {
#pragma GCC unroll 16
        for (int y = 0; y < NY; ++y)
#pragma GCC unroll 16
          for (int x = 0; x < NX; ++x) store(kept + (y * NX + x) * LANES, sums[y][x]);
      }
    }
  }
}

// ---- transposes ----

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Indices<I...> type;
};
template <int... I>
inline vec interleave_low(vec a, vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I % 2) * LANES)...);
}
template <int... I>
inline vec interleave_high(vec a, vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + LANES / 2 + (I % 2) * LANES)...);
}
template <int... I>
inline vec even_lanes(vec a, vec b, Indices<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}

// A square of LANES x LANES in registers: log2(LANES) perfect shuffles.
inline __attribute__((always_inline)) void transpose_square(vec (&r)[LANES]) {
  typename Count<LANES>::type indices;
#pragma GCC unroll 4
  for (int width = 1; width < LANES; width *= 2) {
    vec next[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; ++i) {
      next[2 * i] = interleave_low(r[i], r[i + LANES / 2], indices);
      next[2 * i + 1] = interleave_high(r[i], r[i + LANES / 2], indices);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) r[i] = next[i];
  }
}

// to[j * to_pitch + i] = from[i * from_pitch + j], i < height, j < width. Lanes of `to` up to the next multiple of LANES
// are written as zeros if `pad`, which they must have room for; else not at all. `change(i0, j, v)` sees each vector.
template <class Change>
inline void transpose(const float* from, int64_t from_pitch, int64_t height, int64_t width, float* to,
                      int64_t to_pitch, bool pad, Change change) {
  for (int64_t i = 0; i < height; i += LANES)
    for (int64_t j = 0; j < width; j += LANES) {
      const int64_t down = std::min<int64_t>(LANES, height - i), across = std::min<int64_t>(LANES, width - j);
      const float* source = from + i * from_pitch + j;
      float* target = to + j * to_pitch + i;
      vec square[LANES];
      if (down == LANES && across == LANES) {
#pragma GCC unroll 16
        for (int k = 0; k < LANES; ++k) square[k] = load(source + k * from_pitch);
      } else {
        for (int k = 0; k < LANES; ++k)
          square[k] = k < down ? load_some(source + k * from_pitch, across) : vec{};
      }
      transpose_square(square);
      if (down == LANES && across == LANES) {
#pragma GCC unroll 16
        for (int k = 0; k < LANES; ++k) store(target + k * to_pitch, change(i, j + k, square[k]));
      } else {
        for (int k = 0; k < across; ++k)
          store_some(target + k * to_pitch, change(i, j + k, square[k]), pad ? LANES : down);
      }
    }
}
inline vec unchanged(int64_t, int64_t, vec v) { return v; }

// ---- linear: tokens as vectors ----

// Tokens, each with its features side by side; `pitch` floats from one to the next.
struct Tokens {
  const float* at;
  int64_t pitch;
};
struct TokensOut {
  float* at;
  int64_t pitch;
  const float* residual;  // pitch as of `at`, or null
  int64_t activation;
};

// `sums` gets (outputs [first, last), V vectors of tokens) of the product with a tile (inputs, V vectors); `pitch` floats
// from one output to the next. An output's place holds its partial sum until its last block.
template <int V>
inline void linear_rows(const Matrix& m, const float* tile, int64_t first, int64_t last, float* sums, int64_t pitch,
                        int64_t activation) {
  walk<1, V>(m, first, last, reinterpret_cast<const char*>(tile), 0, Adjacent(), sums, pitch, nothing, nothing,
             [=](int64_t output, vec (&v)[1][V]) {
               activate_all(v, activation);
#pragma GCC unroll 16
               for (int x = 0; x < V; ++x) store(sums + output * pitch + x * LANES, v[0][x]);
             });
}

// f(number), with a number from 1 to MOST that the compiler knows.
template <int MOST, class Function>
inline void with_constant(int64_t number, const Function& f) {
  if constexpr (MOST > 1)
    if (number < MOST) return with_constant<MOST - 1>(number, f);
  f(std::integral_constant<int, MOST>());
}

// How tokens are cut into tiles of at most `most` vectors, all of about one size.
struct Tiling {
  int64_t count, each, tiles;
  Tiling(int64_t count, int64_t most) : count(count) {
    const int64_t vectors = (count + LANES - 1) / LANES;
    tiles = (vectors + most - 1) / most;
    each = (vectors + tiles - 1) / tiles;
    tiles = (vectors + each - 1) / each;
  }
  int64_t begin(int64_t tile) const { return tile * each * LANES; }
  int64_t size(int64_t tile) const { return std::min(each * LANES, count - begin(tile)); }
  int64_t vectors(int64_t tile) const { return (size(tile) + LANES - 1) / LANES; }
};

// Part `part` of `parts` of the rows, in whole groups.
inline int64_t part_of(int64_t rows, int64_t group, int64_t part, int64_t parts) {
  const int64_t groups = (rows + group - 1) / group;
  return std::min(rows, groups * part / parts * group);
}

inline void write_tokens(const float* sums, int64_t pitch, int64_t first, int64_t last, int64_t begin, int64_t count,
                         const TokensOut& out) {
  float* to = out.at + begin * out.pitch + first;
  const float* residual = out.residual ? out.residual + begin * out.pitch + first : nullptr;
  const int64_t width = last - first;
  transpose(sums + first * pitch, pitch, width, count, to, out.pitch, false, [&](int64_t i, int64_t j, vec v) {
    if (residual) v += load_some(residual + j * out.pitch + i, width - i);
    return activate(v, out.activation);
  });
}

// A layer norm of the tokens in a tile, before the product: of `weight` and `bias` for each input, or none (null).
struct Norm {
  const float *weight, *bias;
  float eps;
};

inline void normalise(float* tile, int64_t pitch, int64_t inputs, int64_t vectors, const Norm& norm) {
  if (!norm.weight) return;
  constexpr int CHAINS = 4;  // one sum alone would wait for itself
  for (int64_t x = 0; x < vectors; ++x) {
    float* at = tile + x * LANES;
    auto mean_of = [&](auto term) {
      vec sums[CHAINS] = {};
      int64_t i = 0;
      for (; i + CHAINS <= inputs; i += CHAINS)
        for (int k = 0; k < CHAINS; ++k) sums[k] += term(load(at + (i + k) * pitch));
      for (; i < inputs; ++i) sums[0] += term(load(at + i * pitch));
      return ((sums[0] + sums[1]) + (sums[2] + sums[3])) / static_cast<float>(inputs);
    };
    const vec mean = mean_of([](vec v) { return v; });
    vec scale = mean_of([&](vec v) { return (v - mean) * (v - mean); }) + norm.eps;
    for (int lane = 0; lane < LANES; ++lane) scale[lane] = 1 / std::sqrt(scale[lane]);
    for (int64_t i = 0; i < inputs; ++i)
      store(at + i * pitch, (load(at + i * pitch) - mean) * scale * norm.weight[i] + norm.bias[i]);
  }
}

// An input's vectors lie `most` vectors apart in a tile, whatever the number of tokens: entries know that distance.
template <class Parallel>
void linear(const Matrix& m, int64_t group, Tokens in, const Norm& norm, int64_t count, TokensOut out, int64_t most,
            int64_t threads, Parallel parallel) {
  const Tiling tiling(count, most);
  const int64_t groups = (m.outputs + group - 1) / group, pitch = most * LANES;
  const int64_t wanted = tiling.tiles >= 4 * threads ? 1 : (4 * threads + tiling.tiles - 1) / tiling.tiles;
  const int64_t parts = threads == 1 ? 1 : std::min(groups, wanted);
  parallel(tiling.tiles * parts, [&](int64_t from, int64_t to) {
    thread_local Scratch tile_memory, sums_memory;
    float* tile = tile_memory.get(m.inputs * pitch);
    float* sums = sums_memory.get(m.outputs * pitch);
    int64_t there = -1;
    for (int64_t task = from; task < to; ++task) {
      const int64_t t = task / parts, part = task % parts;
      const int64_t first = part_of(m.outputs, group, part, parts), last = part_of(m.outputs, group, part + 1, parts);
      if (t != there) {
        transpose(in.at + tiling.begin(t) * in.pitch, in.pitch, tiling.size(t), m.inputs, tile, pitch, true, unchanged);
        normalise(tile, pitch, m.inputs, tiling.vectors(t), norm);
        there = t;
      }
      with_constant<LINEAR_VECTORS>(tiling.vectors(t), [&](auto vectors) {
        linear_rows<decltype(vectors)::value>(m, tile, first, last, sums, pitch, NONE);
      });
      write_tokens(sums, pitch, first, last, tiling.begin(t), tiling.size(t), out);
    }
  });
}

// Two layers with an activation between them; what lies between stays in cache. `between` is the first one's.
template <class Parallel>
void mlp(const Matrix& one, int64_t between, const Matrix& two, Tokens in, const Norm& norm, int64_t count,
         TokensOut out, int64_t most, Parallel parallel) {
  const Tiling tiling(count, most);
  const int64_t pitch = most * LANES;
  parallel(tiling.tiles, [&](int64_t from, int64_t to) {
    thread_local Scratch tile_memory, hidden_memory, sums_memory;
    float* tile = tile_memory.get(one.inputs * pitch);
    float* hidden = hidden_memory.get(one.outputs * pitch);
    float* sums = sums_memory.get(two.outputs * pitch);
    for (int64_t t = from; t < to; ++t) {
      transpose(in.at + tiling.begin(t) * in.pitch, in.pitch, tiling.size(t), one.inputs, tile, pitch, true, unchanged);
      normalise(tile, pitch, one.inputs, tiling.vectors(t), norm);
      with_constant<LINEAR_VECTORS>(tiling.vectors(t), [&](auto vectors) {
        constexpr int V = decltype(vectors)::value;
        linear_rows<V>(one, tile, 0, one.outputs, hidden, pitch, between);
        linear_rows<V>(two, hidden, 0, two.outputs, sums, pitch, NONE);
      });
      write_tokens(sums, pitch, 0, two.outputs, tiling.begin(t), tiling.size(t), out);
    }
  });
}

// ---- convolution ----

struct Shape {
  int64_t images, channels, height, width;           // of the input
  int64_t kernel_height, kernel_width;               // of the weights
  int64_t stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x;
  int64_t out_height, out_width;
};
// Strides in floats, of images (n), channels (c), rows (y) and columns (x).
struct Strides {
  int64_t n, c, y, x;
};

// -- pixels as vectors: output pixels of one image, row after row, in vectors. Each channel's plane is copied once for
// each column of the kernel, shifted by it and cut to the width of the output, and into its phases of rows where the
// stride is more than 1, so that a weight is one offset and nothing but the last vector is wasted.

struct Planes {
  int64_t phases, rows, plane, channel;  // floats of one plane, and of all planes of a channel
  explicit Planes(const Shape& s) {
    phases = std::min(s.stride_y, s.kernel_height == 1 ? int64_t(1) : s.stride_y);
    rows = s.out_height + (s.kernel_height - 1) * s.dilation_y / s.stride_y;
    plane = rows * s.out_width;
    channel = s.kernel_width * phases * plane;
  }
  int64_t offset(const Shape& s, int64_t channel_index, int64_t ky, int64_t kx) const {
    const int64_t down = ky * s.dilation_y;
    return channel_index * channel + (kx * phases + down % s.stride_y) * plane + down / s.stride_y * s.out_width;
  }
  // Floats of one image's planes, with what a last vector may read beyond them.
  int64_t size(const Shape& s) const { return s.channels * channel + (REGISTERS + 1) * LANES; }
};

// Fills planes of one image, of its rows only those that are asked for; may write more after them, up to the planes' end.
class PlaneFiller {
 public:
  PlaneFiller(const Shape& shape, const Strides& strides) : s(shape), planes(shape), in(strides) {
    const bool plain = in.x == 1 && in.y == s.width && in.c == s.height * s.width;
    flat_ = plain && s.stride_y == 1 && s.stride_x == 1 && s.out_width == s.width;
    halved_ = plain && s.stride_x == 2;
    if (!flat_ && !halved_) return;
    // which columns are inside, for each column of the kernel and each place where a vector may begin in a row
    period_ = flat_ ? s.width / std::gcd<int64_t>(s.width, LANES) : (s.out_width + LANES - 1) / LANES;
    masks_.resize(s.kernel_width * period_ * LANES);
    for (int64_t kx = 0; kx < s.kernel_width; ++kx)
      for (int64_t i = 0; i < period_ * LANES; ++i) {
        const int64_t x = (flat_ ? i % s.width : i * 2) + shift(kx);
        masks_[kx * period_ * LANES + i] = x >= 0 && x < s.width ? -1 : 0;
      }
  }

  // Rows [first, last) of all planes.
  void fill(const float* image, int64_t first, int64_t last, float* to) const {
    for (int64_t c = 0; c < s.channels; ++c)
      for (int64_t kx = 0; kx < s.kernel_width; ++kx)
        for (int64_t phase = 0; phase < planes.phases; ++phase, to += planes.plane)
          if (flat_)
            fill_flat(image, c, kx, first, last, to);
          else if (halved_)
            fill_halved(image, c, kx, phase, first, last, to);
          else
            fill_rows(image + c * in.c, kx, phase, first, last, to);
  }

 private:
  int64_t shift(int64_t kx) const { return kx * s.dilation_x - s.padding_x; }  // input column of output column 0

  // Row upon row is one copy, a little to the left or right, with zeros where a row's neighbours would come in.
  void fill_flat(const float* image, int64_t c, int64_t kx, int64_t first, int64_t last, float* to) const {
    const int64_t y0 = std::clamp<int64_t>(first - s.padding_y, 0, s.height);
    const int64_t y1 = std::clamp<int64_t>(last - s.padding_y, y0, s.height);
    const int64_t begin = std::max(first, std::min(last, y0 + s.padding_y)) * s.width;  // of what is no padding
    for (int64_t i = first * s.width; i < begin; i += LANES) store(to + i, vec{});
    const int64_t all = s.channels * in.c, count = (y1 - y0) * s.width;
    int64_t from = c * in.c + y0 * s.width + shift(kx);
    const int32_t* mask = masks_.data() + kx * period_ * LANES;
    for (int64_t i = 0, at = 0; i < count; i += LANES, from += LANES, at = at + 1 == period_ ? 0 : at + 1) {
      vec v{};
      if (from >= 0 && from + LANES <= all)
        v = load(image + from);
      else
        for (int lane = 0; lane < LANES; ++lane)
          if (from + lane >= 0 && from + lane < all) v[lane] = image[from + lane];
      store(to + begin + i, (vec)((ivec)v & *reinterpret_cast<const ivec_at*>(mask + at * LANES)));
    }
    for (int64_t i = begin + count; i < last * s.width; i += LANES) store(to + i, vec{});
  }

  // Every second column: the even ones of two vectors. What is more than a row is written over by the next one.
  void fill_halved(const float* image, int64_t c, int64_t kx, int64_t phase, int64_t first, int64_t last,
                   float* to) const {
    const int64_t all = s.channels * in.c;
    const int32_t* mask = masks_.data() + kx * period_ * LANES;
    for (int64_t row = first; row < last; ++row) {
      const int64_t y = row * s.stride_y + phase - s.padding_y;
      float* target = to + row * s.out_width;
      int64_t from = c * in.c + y * s.width + shift(kx);
      for (int64_t x = 0; x < s.out_width; x += LANES, from += 2 * LANES) {
        vec v{};
        if (y >= 0 && y < s.height) {
          if (from >= 0 && from + 2 * LANES <= all)
            v = even_lanes(load(image + from), load(image + from + LANES), typename Count<LANES>::type());
          else
            for (int lane = 0; lane < LANES; ++lane)
              if (from + 2 * lane >= 0 && from + 2 * lane < all) v[lane] = image[from + 2 * lane];
        }
        store(target + x, (vec)((ivec)v & *reinterpret_cast<const ivec_at*>(mask + x)));
      }
    }
  }

  void fill_rows(const float* channel, int64_t kx, int64_t phase, int64_t first, int64_t last, float* to) const {
    const int64_t left = shift(kx), step = s.stride_x * in.x;
    const int64_t low = left >= 0 ? 0 : std::min(s.out_width, (-left + s.stride_x - 1) / s.stride_x);
    const int64_t high =
        left >= s.width ? low : std::max(low, std::min(s.out_width, (s.width - 1 - left) / s.stride_x + 1));
    for (int64_t row = first; row < last; ++row) {
      float* target = to + row * s.out_width;
      const int64_t y = row * s.stride_y + phase - s.padding_y;
      if (y < 0 || y >= s.height) {
        std::fill(target, target + s.out_width, 0.0f);
        continue;
      }
      const float* source = channel + y * in.y + left * in.x;
      std::fill(target, target + low, 0.0f);
      if (step == 1)
        std::copy(source + low, source + high, target + low);
      else
        for (int64_t x = low; x < high; ++x) target[x] = source[x * step];
      std::fill(target + high, target + s.out_width, 0.0f);
    }
  }

  const Shape s;
  const Planes planes;
  const Strides in;
  bool flat_, halved_;
  int64_t period_ = 0;
  std::vector<int32_t> masks_;
};

// `out` and `residual` (or null) are contiguous (images, outputs, out_height, out_width). Each thread has planes of its
// own, with the rows that its tiles need.
template <class Parallel>
void conv_pixels(const Matrix& m, int64_t group, const Shape& s, const float* in, const Strides& strides, float* out,
                 const float* residual, int64_t activation, int64_t threads, Parallel parallel) {
  const Planes planes(s);
  const PlaneFiller filler(s, strides);
  const int64_t pixels = s.out_height * s.out_width, groups = (m.outputs + group - 1) / group;
  const int64_t reach = (s.kernel_height - 1) * s.dilation_y / s.stride_y;  // rows that a pixel needs below its own
  const Tiling tiling(pixels, REGISTERS);
  auto rows = [&](const float* filled, int64_t image, int64_t tile, int64_t first, int64_t last) {
    with_constant<REGISTERS>(tiling.vectors(tile), [&](auto vectors) {
      constexpr int V = decltype(vectors)::value;
      thread_local Scratch partial_memory;
      float* partial = m.blocks > 1 ? partial_memory.get(m.outputs * V * LANES) : nullptr;
      const int64_t begin = tiling.begin(tile), size = tiling.size(tile);
      const char* start = reinterpret_cast<const char*>(filled + begin);
      auto finish = [&](int64_t output, vec (&v)[1][V]) {
        const int64_t at = (image * m.outputs + output) * pixels + begin;
        if (residual) {
#pragma GCC unroll 16
          for (int x = 0; x < V; ++x)
            v[0][x] += x + 1 < V ? load(residual + at + x * LANES)
                                 : load_some(residual + at + x * LANES, size - x * LANES);
        }
        activate_all(v, activation);
#pragma GCC unroll 16
        for (int x = 0; x < V - 1; ++x) store(out + at + x * LANES, v[0][x]);
        store_some(out + at + (V - 1) * LANES, v[0][V - 1], size - (V - 1) * LANES);
      };
      walk<1, V>(m, first, last, start, 0, Adjacent(), partial, V * LANES, nothing, nothing, finish);
    });
  };
  const int64_t size = planes.size(s), tiles = s.images * tiling.tiles;
  const int64_t parts = threads == 1 || s.images >= 2 * threads
                            ? 1
                            : std::min(groups, (4 * threads + tiles - 1) / tiles);
  // whole images where there are enough of them; else tiles, and parts of the outputs
  const int64_t unit = s.images >= 2 * threads ? tiling.tiles : 1;
  parallel(tiles * parts / unit, [&](int64_t begin, int64_t end) {
    thread_local Scratch planes_memory;
    float* filled = planes_memory.get(size);
    int64_t there = -1;  // the image whose rows are filled
    for (int64_t task = begin * unit; task < end * unit; ++task) {
      const int64_t tile = task / parts, part = task % parts, image = tile / tiling.tiles;
      if (image != there) {
        const int64_t most = std::min((image + 1) * tiling.tiles, (end * unit - 1) / parts + 1) - image * tiling.tiles;
        const int64_t first = tiling.begin(tile % tiling.tiles) / s.out_width;
        const int64_t last = std::min(pixels - 1, tiling.begin(most) - 1) / s.out_width + reach + 1;
        filler.fill(in + image * strides.n, first, std::min(planes.rows, last), filled);
        there = image;
      }
      rows(filled, image, tile % tiling.tiles, part_of(m.outputs, group, part, parts),
           part_of(m.outputs, group, part + 1, parts));
    }
  });
}

// -- images as vectors: a tile is what NY x NX output pixels of LANES images need of a block of channels. Images lie
// innermost in memory, at stride 1: of the input, the output and the residual.

struct Window {
  int64_t height, width;  // of the input that a tile of output needs
  Window(const Shape& s, int64_t ny, int64_t nx) {
    height = (ny - 1) * s.stride_y + (s.kernel_height - 1) * s.dilation_y + 1;
    width = (nx - 1) * s.stride_x + (s.kernel_width - 1) * s.dilation_x + 1;
  }
  int64_t floats() const { return height * width * LANES; }
  int64_t offset(const Shape& s, int64_t channel_in_block, int64_t ky, int64_t kx) const {
    return channel_in_block * floats() + (ky * s.dilation_y * width + kx * s.dilation_x) * LANES;
  }
};

// Floats from one channel, row and column to the next; images are next to each other. Of a ring only the last `ring`
// rows are there, each in the place of the one so many before.
struct Layout {
  int64_t c, y, x, ring;
  int64_t row(int64_t index) const { return (ring ? index % ring : index) * y; }
};
struct From {
  const float* at;  // null: nothing is read
  Layout by;
};
struct To {
  float* at;
  Layout by;
};
// Output pixels at (y, x) of the images from n on.
struct Place {
  int64_t y, x, n;
};

// What a tile at `place` needs of the input: its corner, and the rows and columns of it that are inside.
struct Inside {
  int64_t x0, low, high, top, bottom, row;  // `row`: where the first one inside lies
  Inside(const Shape& s, const Window& window, const Layout& by, const Place& place) {
    const int64_t y0 = place.y * s.stride_y - s.padding_y;
    x0 = place.x * s.stride_x - s.padding_x;
    low = std::clamp<int64_t>(-x0, 0, window.width);
    high = std::clamp<int64_t>(s.width - x0, low, window.width);
    top = std::clamp<int64_t>(-y0, 0, window.height);
    bottom = std::clamp<int64_t>(s.height - y0, top, window.height);
    row = by.ring ? (y0 + top) % by.ring : y0 + top;
  }
};

// A channel's window, with zeros outside the image, of `count` images. `from` is the channel at the first of them.
inline void fill_window(const Window& window, const Inside& inside, const float* from, const Layout& by, int64_t count,
                        float* to) {
  const int64_t low = inside.low, high = inside.high;
  int64_t row = inside.row;
  for (int64_t y = 0; y < window.height; ++y, to += window.width * LANES) {
    if (y < inside.top || y >= inside.bottom) {
      for (int64_t x = 0; x < window.width; ++x) store(to + x * LANES, vec{});
      continue;
    }
    const float* source = from + row * by.y + inside.x0 * by.x;
    if (++row == by.ring) row = 0;
    for (int64_t x = 0; x < low; ++x) store(to + x * LANES, vec{});
    if (count == LANES)
      for (int64_t x = low; x < high; ++x) store(to + x * LANES, load(source + x * by.x));
    else
      for (int64_t x = low; x < high; ++x) store(to + x * LANES, load_some(source + x * by.x, count));
    for (int64_t x = high; x < window.width; ++x) store(to + x * LANES, vec{});
  }
}

// Asks for what fill_window will read, so that it comes while sums are made.
inline void expect_window(const Inside& inside, const float* from, const Layout& by) {
  int64_t row = inside.row;
  for (int64_t y = inside.top; y < inside.bottom; ++y) {
    const float* source = from + row * by.y + inside.x0 * by.x;
    if (++row == by.ring) row = 0;
    for (int64_t x = inside.low; x < inside.high; ++x) __builtin_prefetch(source + x * by.x, 0, 2);
  }
}

// Rows [first, last) of the outputs of one tile. `next` is the tile whose input is asked for meanwhile. `tile` and
// `partial` are memory for the windows of a block, and for sums if there are more blocks than one.
template <int NY, int NX, class Step>
__attribute__((noinline)) void conv_tile(const Matrix& matrix, const Shape& shape, Step step, const From& in,
                                         const To& out, const From& residual, int64_t activation, const Place& place,
                                         const Place& next, int64_t first, int64_t last, float* tile, float* partial) {
  const Matrix m = matrix;  // copies, which a store to memory can not change: they stay in registers
  const Shape s = shape;
  const Window window(s, NY, NX);
  const Inside here(s, window, in.by, place), there(s, window, in.by, next);
  const int64_t count = std::min<int64_t>(LANES, s.images - place.n);
  const int64_t high = std::min<int64_t>(NY, s.out_height - place.y);
  const int64_t wide = std::min<int64_t>(NX, s.out_width - place.x);
  const bool whole = count == LANES && high == NY && wide == NX;
  int64_t to[NY], add[NY];  // where the tile's rows lie
  for (int y = 0; y < NY; ++y) {
    const int64_t row = place.y + std::min<int64_t>(y, high - 1);
    to[y] = out.by.row(row) + place.x * out.by.x + place.n;
    add[y] = residual.by.row(row) + place.x * residual.by.x + place.n;
  }
  const int64_t across = out.by.x, added = residual.by.x;
  auto fill = [&](int64_t block) {
    const int64_t c0 = block * m.block_channels, c1 = std::min(s.channels, c0 + m.block_channels);
    for (int64_t c = c0; c < c1; ++c)
      fill_window(window, here, in.at + place.n + c * in.by.c, in.by, count, tile + (c - c0) * window.floats());
  };
  // the next channels, spread over this tile's rows
  int64_t expected = 0, done = 0;
  const int64_t all = (last - first) * m.blocks;
  auto expect = [&](int64_t block, int64_t output) {
    if (whole && block + 1 == m.blocks) {  // what the next row adds to, and where it goes
      float* target = out.at + output * out.by.c;
      const float* other = residual.at + output * residual.by.c;
#pragma GCC unroll 16
      for (int y = 0; y < NY; ++y)
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) {
          __builtin_prefetch(target + to[y] + x * across, 1, 3);
          if (residual.at) __builtin_prefetch(other + add[y] + x * added, 0, 3);
        }
    }
    const bool same = block + 1 < m.blocks;
    const int64_t c0 = same ? (block + 1) * m.block_channels : 0, c1 = std::min(s.channels, c0 + m.block_channels);
    for (++done; expected * all < done * s.channels; ++expected)
      if (const int64_t c = c0 + expected % m.block_channels; c < c1)
        expect_window(same ? here : there, in.at + (same ? place.n : next.n) + c * in.by.c, in.by);
  };
  auto finish = [&](int64_t output, vec (&v)[NY][NX]) {
    float* target = out.at + output * out.by.c;
    const float* other = residual.at + output * residual.by.c;
    if (whole) {
      if (residual.at) {
#pragma GCC unroll 16
        for (int y = 0; y < NY; ++y)
#pragma GCC unroll 16
          for (int x = 0; x < NX; ++x) v[y][x] += load(other + add[y] + x * added);
      }
      activate_all(v, activation);
#pragma GCC unroll 16
      for (int y = 0; y < NY; ++y)
#pragma GCC unroll 16
        for (int x = 0; x < NX; ++x) store(target + to[y] + x * across, v[y][x]);
    } else {
      vec copy[NY * NX];  // `v` itself stays in registers where tiles are whole
#pragma GCC unroll 16
      for (int i = 0; i < NY * NX; ++i) copy[i] = v[i / NX][i % NX];
      for (int64_t y = 0; y < high; ++y)
        for (int64_t x = 0; x < wide; ++x) {
          vec sum = copy[y * NX + x];
          if (residual.at) sum += load_some(other + add[y] + x * added, count);
          store_some(target + to[y] + x * across, activate(sum, activation), count);
        }
    }
  };
  const int64_t pitch = s.stride_y * window.width * BYTES;
  walk<NY, NX>(m, first, last, reinterpret_cast<const char*>(tile), pitch, step, partial, NY * NX * LANES, fill, expect,
               finish);
}

// f(step), with a step between the columns of a tile that the compiler knows where it is 1.
template <class Function>
inline void with_step(const Shape& s, const Function& f) {
  if (s.stride_x == 1)
    f(Adjacent());
  else
    f(s.stride_x * BYTES);
}

inline Layout innermost_layout(int64_t height, int64_t width, int64_t images) {
  return {height * width * images, width * images, images, 0};
}

template <int NY, int NX, class Parallel>
void conv_images(const Matrix& m, int64_t group, const Shape& s, const float* in, float* out, const float* residual,
                 int64_t activation, int64_t threads, Parallel parallel) {
  const Window window(s, NY, NX);
  const int64_t down = (s.out_height + NY - 1) / NY, across = (s.out_width + NX - 1) / NX;
  const int64_t batches = (s.images + LANES - 1) / LANES, tiles = down * across * batches;
  const int64_t groups = (m.outputs + group - 1) / group;
  const int64_t parts =
      threads == 1 || tiles >= 4 * threads ? 1 : std::min(groups, (4 * threads + tiles - 1) / tiles);
  const From from{in, innermost_layout(s.height, s.width, s.images)};
  const Layout by = innermost_layout(s.out_height, s.out_width, s.images);
  const To to{out, by};
  const From add{residual, by};
  parallel(tiles * parts, [&](int64_t begin, int64_t end) {
    thread_local Scratch tile_memory, partial_memory;
    float* tile = tile_memory.get(m.block_channels * window.floats());
    float* partial = m.blocks > 1 ? partial_memory.get(m.outputs * NY * NX * LANES) : nullptr;
    auto place_of = [&](int64_t task) {
      const int64_t place = task / parts / batches;
      return Place{place / across * NY, place % across * NX, task / parts % batches * LANES};
    };
    for (int64_t task = begin, after; task < end; task = after) {
      const int64_t part = task % parts;
      after = std::min(end, task - part + parts);  // all that is here of one tile: it is filled once
      const int64_t first = part_of(m.outputs, group, part, parts);
      const int64_t last = part_of(m.outputs, group, part + after - task, parts);
      with_step(s, [&](auto step) {
        conv_tile<NY, NX>(m, s, step, from, to, add, activation, place_of(task), place_of(std::min(after, end - 1)),
                          first, last, tile, partial);
      });
    }
  });
}

// Two convolutions, the second of stride 1, with an activation (`between`) between them, and a residual added to what
// comes out. A few rows at a time: what lies between stays in cache, in a ring of rows.
template <int NY, int NX, class Parallel>
void conv_block(const Matrix& one, const Shape& first, int64_t between, const Matrix& two, const Shape& second,
                const float* in, float* out, const float* residual, int64_t activation, int64_t threads,
                Parallel parallel) {
  const Window window_one(first, NY, NX), window_two(second, NY, NX);
  const int64_t batches = (second.images + LANES - 1) / LANES, down = (second.out_height + NY - 1) / NY;
  const int64_t parts = std::min(down, (threads + batches - 1) / batches);
  const int64_t reach = (second.kernel_height - 1) * second.dilation_y;
  const int64_t ring = 2 * NY - 1 + reach;
  const From from{in, innermost_layout(first.height, first.width, first.images)};
  const Layout by = innermost_layout(second.out_height, second.out_width, second.images);
  const To to{out, by};
  const From add{residual, by};
  Shape inner_one = first, inner_two = second;  // of one batch at a time: the ring holds no more
  parallel(batches * parts, [&](int64_t begin, int64_t end) {
    thread_local Scratch tile_memory, partial_memory, ring_memory;
    float* tile = tile_memory.get(std::max(one.block_channels * window_one.floats(),
                                           two.block_channels * window_two.floats()));
    const bool partly = one.blocks > 1 || two.blocks > 1;
    float* partial = partly ? partial_memory.get(std::max(one.outputs, two.outputs) * NY * NX * LANES) : nullptr;
    const Layout rows{ring * first.out_width * LANES, first.out_width * LANES, LANES, ring};
    float* kept = ring_memory.get(one.outputs * rows.c);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / parts * LANES, part = task % parts;
      const int64_t top = down * part / parts * NY;
      const int64_t bottom = std::min(second.out_height, down * (part + 1) / parts * NY);
      // each tensor as of this batch alone, but for the distances in it
      Shape a = inner_one, b = inner_two;
      a.images = b.images = std::min<int64_t>(LANES, second.images - n);
      const From given{from.at + n, from.by}, between_from{kept, rows};
      const From added{add.at ? add.at + n : nullptr, add.by};
      const To wanted{to.at + n, to.by}, between_to{kept, rows};
      const int64_t most = std::min(first.out_height, bottom - 1 + reach - second.padding_y + 1);
      int64_t made = std::max<int64_t>(0, top - second.padding_y);
      for (int64_t y = top; y < bottom; y += NY) {
        const int64_t needed = std::min(most, y + NY + reach - second.padding_y);
        for (; made < needed; made += NY)
          for (int64_t x = 0; x < first.out_width; x += NX) {
            const int64_t x_next = x + NX < first.out_width ? x + NX : 0;
            const Place next{std::min(x_next ? made : made + NY, first.out_height - 1), x_next, 0};
            with_step(first, [&](auto step) {
              conv_tile<NY, NX>(one, a, step, given, between_to, From{nullptr, rows}, between, Place{made, x, 0}, next,
                                0, one.outputs, tile, partial);
            });
          }
        for (int64_t x = 0; x < second.out_width; x += NX) {
          const Place next{y, x + NX < second.out_width ? x + NX : x, 0};
          conv_tile<NY, NX>(two, b, Adjacent(), between_from, wanted, added, activation, Place{y, x, 0}, next, 0,
                            two.outputs, tile, partial);
        }
      }
    }
  });
}

// The tiles that convolutions of images are built for: f(NY, NX); false where there is no such.
template <class Function>
inline bool with_tile(int64_t ny, int64_t nx, Function f) {
  switch (ny * 16 + nx) {
    case 0x11: f(std::integral_constant<int, 1>(), std::integral_constant<int, 1>()); return true;
    case 0x22: f(std::integral_constant<int, 2>(), std::integral_constant<int, 2>()); return true;
    case 0x24: f(std::integral_constant<int, 2>(), std::integral_constant<int, 4>()); return true;
    default: break;
  }
  if constexpr (REGISTERS >= 16) switch (ny * 16 + nx) {
      case 0x27: f(std::integral_constant<int, 2>(), std::integral_constant<int, 7>()); return true;
      case 0x28: f(std::integral_constant<int, 2>(), std::integral_constant<int, 8>()); return true;
      case 0x44: f(std::integral_constant<int, 4>(), std::integral_constant<int, 4>()); return true;
    }
  return false;
}

}  // namespace tscnc
