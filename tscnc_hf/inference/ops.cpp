// The operators `tscnc::*`: arguments checked, threads of torch. Python's lock is not held here: the dispatcher's
// binding releases it.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "attention.h"
#include "kernels.h"

namespace {

using at::Tensor;
using std::optional;
using namespace tscnc;

template <class F>
void parallel(int64_t tasks, F f) {
  // parallel_for would give a thread that is new to this library the number of threads that others were given
  if (at::get_num_threads() == 1) return f(0, tasks);
  at::parallel_for(0, tasks, 1, f);
}

void check_activations(const char* name, const Tensor& x) {
  TORCH_CHECK(x.device().is_cpu(), name, " is on ", x.device(), "; sparse layers run on the CPU");
  TORCH_CHECK(x.scalar_type() == at::kFloat, name, " is ", x.scalar_type(), "; sparse layers take float32");
  TORCH_CHECK(x.numel() > 0, name, " of shape ", x.sizes(), " is empty");
}

void check_activation(int64_t activation) {
  TORCH_CHECK(activation >= NONE && activation <= SILU, "activation ", activation, " is none of 0 to 3");
}

// What a walk through the entries and rows of a matrix has found.
struct Found {
  c10::weak_intrusive_ptr<c10::StorageImpl> entries, rows;  // while these are kept, no others get their addresses
  const void *first_entry, *first_row;
  int64_t entries_version, rows_version, count, blocks, outputs;
  uint32_t furthest;
};

// The largest offset, as an unsigned number; an error where rows are not right.
uint32_t walked(const Tensor& entries, const Tensor& rows) {
  const int64_t blocks = rows.size(0), outputs = rows.size(1), count = entries.size(0);
  const auto* entry = reinterpret_cast<const Entry*>(entries.const_data_ptr<int32_t>());
  const auto* row = reinterpret_cast<const Row*>(rows.const_data_ptr<int32_t>());
  uint32_t furthest = 0;  // a negative offset is a large one here
  for (int64_t i = 0; i < count; ++i) furthest = std::max(furthest, static_cast<uint32_t>(entry[i].offset));
  std::vector<bool> seen(outputs);
  for (int64_t block = 0; block < blocks; ++block, row += outputs) {
    seen.assign(outputs, false);
    for (int64_t i = 0; i < outputs; ++i) {
      TORCH_CHECK(row[i].output >= 0 && row[i].output < outputs && !seen[row[i].output],
                  "rows do not name each of ", outputs, " outputs once");
      TORCH_CHECK(row[i].begin >= 0 && row[i].begin <= row[i].end && row[i].end <= count,
                  "a row's entries are not among the ", count);
      seen[row[i].output] = true;
    }
  }
  return furthest;
}

// As walked(), but once for tensors that have not changed since, as far as torch knows. It does not know of all: that no
// memory is touched that is not a tile's or the output's does not rest on this, the kernels see to it (`limit`).
uint32_t furthest_of(const Tensor& entries, const Tensor& rows) {
  if (entries.is_inference() || rows.is_inference()) return walked(entries, rows);  // these have no version
  static std::mutex mutex;
  static std::unordered_map<const c10::StorageImpl*, Found> known;
  const auto* key = entries.storage().unsafeGetStorageImpl();
  const auto* other = rows.storage().unsafeGetStorageImpl();
  const void *first_entry = entries.const_data_ptr(), *first_row = rows.const_data_ptr();
  const int64_t entries_version = entries._version(), rows_version = rows._version();
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto at = known.find(key); at != known.end()) {
    const Found& f = at->second;
    if (f.rows._unsafe_get_target() == other && f.first_entry == first_entry && f.first_row == first_row &&
        f.entries_version == entries_version && f.rows_version == rows_version && f.count == entries.size(0) &&
        f.blocks == rows.size(0) && f.outputs == rows.size(1))
      return f.furthest;
  }
  const uint32_t furthest = walked(entries, rows);
  for (auto at = known.begin(); at != known.end();)
    at = at->second.entries.expired() || at->second.rows.expired() || at->first == key ? known.erase(at) : ++at;
  known.emplace(key, Found{entries.storage().getWeakStorageImpl(), rows.storage().getWeakStorageImpl(), first_entry,
                           first_row, entries_version, rows_version, entries.size(0), rows.size(0), rows.size(1),
                           furthest});
  return furthest;
}

// `reach`: bytes of a tile from an entry's offset that are read; `size`: bytes of a whole tile.
Matrix checked(const Tensor& entries, const Tensor& rows, const optional<Tensor>& bias, int64_t inputs,
               int64_t block_channels, int64_t reach, int64_t size) {
  TORCH_CHECK(entries.device().is_cpu() && entries.scalar_type() == at::kInt && entries.dim() == 2 &&
                  entries.size(1) == 2 && entries.is_contiguous(),
              "entries: a contiguous int32 (n, 2) on the CPU is needed");
  TORCH_CHECK(rows.device().is_cpu() && rows.scalar_type() == at::kInt && rows.dim() == 3 && rows.size(2) == 3 &&
                  rows.is_contiguous() && rows.size(0) > 0 && rows.size(1) > 0,
              "rows: a contiguous int32 (blocks, outputs, 3) on the CPU is needed");
  const int64_t blocks = rows.size(0), outputs = rows.size(1), count = entries.size(0);
  TORCH_CHECK(block_channels > 0 && (blocks - 1) * block_channels < inputs && blocks * block_channels >= inputs,
              blocks, " blocks of ", block_channels, " channels are not those of ", inputs);
  if (bias)
    TORCH_CHECK(bias->device().is_cpu() && bias->scalar_type() == at::kFloat && bias->is_contiguous() &&
                    bias->dim() == 1 && bias->size(0) == outputs,
                "bias: a contiguous float32 (", outputs, ") on the CPU is needed, this is ", bias->sizes());
  TORCH_CHECK(size >= reach && size <= INT32_MAX, "a tile of ", size, " bytes is too large or too small");
  const uint32_t limit = static_cast<uint32_t>(size - reach);
  TORCH_CHECK(furthest_of(entries, rows) <= limit, "an offset lies outside the tile of ", size, " bytes");
  return {reinterpret_cast<const Entry*>(entries.const_data_ptr<int32_t>()),
          reinterpret_cast<const Row*>(rows.const_data_ptr<int32_t>()), blocks, block_channels, inputs, outputs, count,
          limit, bias ? bias->const_data_ptr<float>() : nullptr};
}

void check_group(int64_t group) { TORCH_CHECK(group > 0, "group ", group, " is not positive"); }

Matrix checked_linear(const Tensor& entries, const Tensor& rows, const optional<Tensor>& bias, int64_t inputs,
                      int64_t block_channels, int64_t vectors) {
  TORCH_CHECK(vectors >= 1 && vectors <= LINEAR_VECTORS, "vectors ", vectors, " is none of 1 to ", LINEAR_VECTORS);
  TORCH_CHECK(inputs > 0 && inputs <= INT32_MAX / (vectors * BYTES), inputs, " inputs are too many or too few");
  return checked(entries, rows, bias, inputs, block_channels, vectors * BYTES, inputs * vectors * BYTES);
}

// What is added, as large as the output that it is added to: a bias of each place, say, is the same for all images.
optional<Tensor> spread(const optional<Tensor>& residual, at::IntArrayRef sizes) {
  if (!residual) return std::nullopt;
  check_activations("residual", *residual);
  if (residual->sizes() == sizes) return residual;
  const int64_t lacking = static_cast<int64_t>(sizes.size()) - residual->dim();
  bool fits = lacking >= 0;
  for (int64_t i = 0; fits && i < residual->dim(); ++i)
    fits = residual->size(i) == 1 || residual->size(i) == sizes[i + lacking];
  TORCH_CHECK(fits, "residual is ", residual->sizes(), ", the output ", sizes);
  return residual->expand(sizes);
}

struct Flat {
  Tensor x, y;
  optional<Tensor> residual;
  int64_t tokens;
};

Flat flat(const Tensor& x, int64_t inputs, int64_t outputs, const optional<Tensor>& residual) {
  check_activations("x", x);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == inputs, "x of shape ", x.sizes(), " has not ", inputs, " features");
  auto sizes = x.sizes().vec();
  sizes.back() = outputs;
  const optional<Tensor> other = spread(residual, sizes);
  return {x.contiguous(), at::empty(sizes, x.options().memory_format(at::MemoryFormat::Contiguous)),
          other ? optional<Tensor>(other->contiguous()) : std::nullopt, x.numel() / inputs};
}

const float* data(const optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; }

// `norm`: (2, inputs), weights and biases.
Norm checked_norm(const optional<Tensor>& norm, double eps, int64_t inputs) {
  if (!norm) return {nullptr, nullptr, 0};
  check_activations("norm", *norm);
  TORCH_CHECK(norm->dim() == 2 && norm->size(0) == 2 && norm->size(1) == inputs && norm->is_contiguous(),
              "norm of shape ", norm->sizes(), " is not two rows of ", inputs);
  const float* at = norm->const_data_ptr<float>();
  return {at, at + inputs, static_cast<float>(eps)};
}

Tensor sparse_linear(const Tensor& x, const Tensor& entries, const Tensor& rows, const optional<Tensor>& bias,
                     const optional<Tensor>& residual, const optional<Tensor>& norm, double eps, int64_t inputs,
                     int64_t block_channels, int64_t group, int64_t vectors, int64_t activation) {
  check_activation(activation);
  check_group(group);
  const Matrix m = checked_linear(entries, rows, bias, inputs, block_channels, vectors);
  const Flat f = flat(x, inputs, m.outputs, residual);
  linear(m, group, {f.x.const_data_ptr<float>(), inputs}, checked_norm(norm, eps, inputs), f.tokens,
         {f.y.data_ptr<float>(), m.outputs, data(f.residual), activation}, vectors, at::get_num_threads(),
         [](int64_t n, auto g) { parallel(n, g); });
  return f.y;
}

Tensor sparse_mlp(const Tensor& x, const Tensor& entries, const Tensor& rows, const optional<Tensor>& bias,
                  const Tensor& entries2, const Tensor& rows2, const optional<Tensor>& bias2,
                  const optional<Tensor>& residual, const optional<Tensor>& norm, double eps, int64_t inputs,
                  int64_t block_channels, int64_t block_channels2, int64_t vectors, int64_t activation) {
  check_activation(activation);
  const Matrix one = checked_linear(entries, rows, bias, inputs, block_channels, vectors);
  const Matrix two = checked_linear(entries2, rows2, bias2, one.outputs, block_channels2, vectors);
  const Flat f = flat(x, inputs, two.outputs, residual);
  mlp(one, activation, two, {f.x.const_data_ptr<float>(), inputs}, checked_norm(norm, eps, inputs), f.tokens,
      {f.y.data_ptr<float>(), two.outputs, data(f.residual), NONE}, vectors,
      [](int64_t n, auto g) { parallel(n, g); });
  return f.y;
}

// q: (images, heads, queries, size), k and v: (images, heads, keys, size).
Tensor attention_(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  for (const auto& [name, x] : {std::tuple("q", &q), std::tuple("k", &k), std::tuple("v", &v)}) {
    check_activations(name, *x);
    TORCH_CHECK(x->dim() == 4 && x->size(0) == q.size(0) && x->size(1) == q.size(1) &&
                    x->size(2) == (x == &q ? q : k).size(2) && x->size(3) == q.size(3),
                name, " of shape ", x->sizes(), " does not go with q of shape ", q.sizes(), " and k of shape ",
                k.sizes());
  }
  TORCH_CHECK(q.size(3) % LANES == 0, "heads of ", q.size(3), " features are no multiple of ", LANES);
  auto plain = [](const Tensor& x) { return x.stride(3) == 1 ? x : x.contiguous(); };
  const Tensor a = plain(q), b = plain(k), c = plain(v);
  auto heads = [](const Tensor& x) { return Heads{x.const_data_ptr<float>(), x.stride(0), x.stride(1), x.stride(2)}; };
  const auto contiguous = q.options().memory_format(at::MemoryFormat::Contiguous);
  Tensor y = at::empty({q.size(0), q.size(2), q.size(1), q.size(3)}, contiguous);
  attention(heads(a), heads(b), heads(c), q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), scale,
            y.data_ptr<float>(), [](int64_t n, auto g) { parallel(n, g); });
  return y.transpose(1, 2);
}

// `x`: sizes of a batch of images.
Shape shape_of(at::IntArrayRef x, int64_t channels, at::IntArrayRef kernel, at::IntArrayRef stride,
               at::IntArrayRef padding, at::IntArrayRef dilation) {
  TORCH_CHECK(x.size() == 4 && x[1] == channels, "x of shape ", x, " is no batch of images with ", channels,
              " channels");
  for (const auto& [name, pair, least] : {std::tuple("kernel", kernel, 1), std::tuple("stride", stride, 1),
                                          std::tuple("padding", padding, 0), std::tuple("dilation", dilation, 1)})
    TORCH_CHECK(pair.size() == 2 && std::min(pair[0], pair[1]) >= least && std::max(pair[0], pair[1]) <= 4096, name,
                " ", pair, " is not two numbers from ", least, " to 4096");
  Shape s{x[0],       x[1],       x[2],        x[3],        kernel[0],   kernel[1], stride[0],
          stride[1],  padding[0], padding[1],  dilation[0], dilation[1], 0,         0};
  const int64_t down = s.height + 2 * s.padding_y - (s.kernel_height - 1) * s.dilation_y - 1;
  const int64_t across = s.width + 2 * s.padding_x - (s.kernel_width - 1) * s.dilation_x - 1;
  TORCH_CHECK(down >= 0 && across >= 0, "images of ", s.height, " x ", s.width, " are smaller than the kernel");
  s.out_height = down / s.stride_y + 1;
  s.out_width = across / s.stride_x + 1;
  return s;
}

Shape shape_of(const Tensor& x, int64_t channels, at::IntArrayRef kernel, at::IntArrayRef stride,
               at::IntArrayRef padding, at::IntArrayRef dilation) {
  check_activations("x", x);
  return shape_of(x.sizes(), channels, kernel, stride, padding, dilation);
}

optional<Tensor> spread(const optional<Tensor>& residual, const Shape& s, int64_t outputs) {
  const int64_t sizes[] = {s.images, outputs, s.out_height, s.out_width};
  return spread(residual, at::IntArrayRef(sizes));
}

Tensor sparse_conv_pixels(const Tensor& x, const Tensor& entries, const Tensor& rows, const optional<Tensor>& bias,
                          const optional<Tensor>& residual, int64_t channels, at::IntArrayRef kernel,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t group,
                          int64_t activation) {
  check_activation(activation);
  check_group(group);
  const Shape s = shape_of(x, channels, kernel, stride, padding, dilation);
  const Planes planes(s);
  const int64_t reach = (s.out_height * s.out_width + LANES - 1) / LANES * BYTES;
  TORCH_CHECK(rows.dim() == 3 && rows.size(0) > 0, "rows: (blocks, outputs, 3) is needed");
  const Matrix m = checked(entries, rows, bias, channels, (channels + rows.size(0) - 1) / rows.size(0), reach,
                           planes.size(s) * 4);
  const optional<Tensor> all = spread(residual, s, m.outputs);
  const optional<Tensor> other = all ? optional<Tensor>(all->contiguous()) : std::nullopt;
  const Tensor y = at::empty({s.images, m.outputs, s.out_height, s.out_width}, x.options());
  conv_pixels(m, group, s, x.const_data_ptr<float>(), {x.stride(0), x.stride(1), x.stride(2), x.stride(3)},
              y.data_ptr<float>(), data(other), activation, at::get_num_threads(),
              [](int64_t n, auto g) { parallel(n, g); });
  return y;
}

// Convolutions of pixels, each of `x` (0) or of what the one before it so many returned (1, 2, ...), in one call.
// `tensors`: entries, rows and bias of each; `plan`: STEP numbers of each, as they are read here.
constexpr int64_t STEP = 13;

Tensor sparse_chain(const Tensor& x, at::TensorList tensors, at::IntArrayRef plan) {
  const int64_t steps = tensors.size() / 3;
  TORCH_CHECK(steps > 0 && tensors.size() % 3 == 0 && static_cast<int64_t>(plan.size()) == steps * STEP,
              "a chain of ", tensors.size(), " tensors and ", plan.size(), " numbers: 3 and ", STEP,
              " for each convolution are needed");
  std::vector<Tensor> made{x};
  for (int64_t step = 0; step < steps; ++step) {
    const auto of = plan.slice(step * STEP, STEP);
    const int64_t input = of[0], residual = of[1];
    TORCH_CHECK(input >= 0 && input <= step && residual >= -1 && residual <= step, "convolution ", step,
                " of a chain takes ", input, " and ", residual, ", which are none before it");
    made.push_back(sparse_conv_pixels(made[input], tensors[step * 3], tensors[step * 3 + 1], tensors[step * 3 + 2],
                                      residual < 0 ? std::nullopt : optional<Tensor>(made[residual]), of[2],
                                      of.slice(3, 2), of.slice(5, 2), of.slice(7, 2), of.slice(9, 2), of[11], of[12]));
  }
  return made.back();
}

// (n, c, h, w) as it is called, with images innermost in memory.
Tensor empty_innermost(int64_t n, int64_t c, int64_t h, int64_t w, const Tensor& like) {
  return at::empty_strided({n, c, h, w}, {1, h * w * n, w * n, n}, like.options());
}

Tensor innermost(const Tensor& x) {
  const int64_t n = x.size(0), c = x.size(1), h = x.size(2), w = x.size(3);
  if (x.stride(0) == 1 && x.stride(1) == h * w * n && x.stride(2) == w * n && x.stride(3) == n) return x;
  const Tensor y = empty_innermost(n, c, h, w, x);
  const Tensor from = x.contiguous();
  const float* source = from.const_data_ptr<float>();
  float* target = y.data_ptr<float>();
  const int64_t all = c * h * w, chunk = 16 * LANES;
  parallel((all + chunk - 1) / chunk, [&](int64_t first, int64_t last) {
    const int64_t begin = first * chunk, end = std::min(all, last * chunk);
    transpose(source + begin, all, n, end - begin, target + begin * n, n, false, unchanged);
  });
  return y;
}

// What a convolution of images walks, checked, for tiles of NY x NX.
template <int NY, int NX>
Matrix checked_images(const Tensor& entries, const Tensor& rows, const optional<Tensor>& bias, const Shape& s,
                      int64_t block_channels) {
  const Window window(s, NY, NX);
  TORCH_CHECK(block_channels > 0 && block_channels <= INT32_MAX / (window.floats() * 4), "blocks of ", block_channels,
              " channels make tiles that are too large");
  const int64_t reach = ((NY - 1) * s.stride_y * window.width + (NX - 1) * s.stride_x + 1) * BYTES;
  return checked(entries, rows, bias, s.channels, block_channels, reach, block_channels * window.floats() * 4);
}

Tensor sparse_conv_images(const Tensor& x, const Tensor& entries, const Tensor& rows, const optional<Tensor>& bias,
                          const optional<Tensor>& residual, int64_t channels, at::IntArrayRef kernel,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                          at::IntArrayRef tile, int64_t block_channels, int64_t group, int64_t activation) {
  check_activation(activation);
  check_group(group);
  TORCH_CHECK(tile.size() == 2, "tile: two numbers are needed");
  const Shape s = shape_of(x, channels, kernel, stride, padding, dilation);
  Tensor y;
  const bool known = with_tile(tile[0], tile[1], [&](auto height, auto width) {
    constexpr int NY = decltype(height)::value, NX = decltype(width)::value;
    const Matrix m = checked_images<NY, NX>(entries, rows, bias, s, block_channels);
    const optional<Tensor> all = spread(residual, s, m.outputs);
    const Tensor in = innermost(x);
    const optional<Tensor> other = all ? optional<Tensor>(innermost(*all)) : std::nullopt;
    y = empty_innermost(s.images, m.outputs, s.out_height, s.out_width, x);
    conv_images<NY, NX>(m, group, s, in.const_data_ptr<float>(), y.data_ptr<float>(), data(other), activation,
                        at::get_num_threads(), [](int64_t n, auto g) { parallel(n, g); });
  });
  TORCH_CHECK(known, "tile ", tile, " is none that the kernels are built for");
  return y;
}

Tensor sparse_conv_block(const Tensor& x, const Tensor& entries, const Tensor& rows, const optional<Tensor>& bias,
                         const Tensor& entries2, const Tensor& rows2, const optional<Tensor>& bias2,
                         const optional<Tensor>& residual, int64_t channels, at::IntArrayRef kernel,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                         at::IntArrayRef kernel2, at::IntArrayRef padding2, at::IntArrayRef dilation2,
                         at::IntArrayRef tile, int64_t block_channels, int64_t block_channels2, int64_t between,
                         int64_t activation) {
  check_activation(activation);
  check_activation(between);
  TORCH_CHECK(tile.size() == 2, "tile: two numbers are needed");
  const Shape one = shape_of(x, channels, kernel, stride, padding, dilation);
  TORCH_CHECK(rows.dim() == 3, "rows: (blocks, outputs, 3) is needed");
  const int64_t sizes[] = {one.images, rows.size(1), one.out_height, one.out_width};
  const Shape two = shape_of(sizes, rows.size(1), kernel2, {1, 1}, padding2, dilation2);
  Tensor y;
  const bool known = with_tile(tile[0], tile[1], [&](auto height, auto width) {
    constexpr int NY = decltype(height)::value, NX = decltype(width)::value;
    const Matrix m = checked_images<NY, NX>(entries, rows, bias, one, block_channels);
    const Matrix m2 = checked_images<NY, NX>(entries2, rows2, bias2, two, block_channels2);
    const optional<Tensor> all = spread(residual, two, m2.outputs);
    const Tensor in = innermost(x);
    const optional<Tensor> other = all ? optional<Tensor>(innermost(*all)) : std::nullopt;
    y = empty_innermost(two.images, m2.outputs, two.out_height, two.out_width, x);
    conv_block<NY, NX>(m, one, between, m2, two, in.const_data_ptr<float>(), y.data_ptr<float>(), data(other),
                       activation, at::get_num_threads(), [](int64_t n, auto g) { parallel(n, g); });
  });
  TORCH_CHECK(known, "tile ", tile, " is none that the kernels are built for");
  return y;
}

// {lanes of a vector, sums at a time, vectors of tokens at most}
std::vector<int64_t> sparse_machine() { return {LANES, REGISTERS, LINEAR_VECTORS}; }

}  // namespace

TORCH_LIBRARY(tscnc, m) {
  m.def(
      "linear(Tensor x, Tensor entries, Tensor rows, Tensor? bias, Tensor? residual, Tensor? norm, float eps, "
      "int inputs, int block_channels, int group, int vectors, int activation) -> Tensor");
  m.def(
      "mlp(Tensor x, Tensor entries, Tensor rows, Tensor? bias, Tensor entries2, Tensor rows2, Tensor? bias2, "
      "Tensor? residual, Tensor? norm, float eps, int inputs, int block_channels, int block_channels2, int vectors, "
      "int activation) -> Tensor");
  m.def(
      "conv_pixels(Tensor x, Tensor entries, Tensor rows, Tensor? bias, Tensor? residual, int channels, int[] kernel, "
      "int[] stride, int[] padding, int[] dilation, int group, int activation) -> Tensor");
  m.def("chain(Tensor x, Tensor[] tensors, int[] plan) -> Tensor");
  m.def(
      "conv_images(Tensor x, Tensor entries, Tensor rows, Tensor? bias, Tensor? residual, int channels, int[] kernel, "
      "int[] stride, int[] padding, int[] dilation, int[] tile, int block_channels, int group, int activation) -> "
      "Tensor");
  m.def(
      "conv_block(Tensor x, Tensor entries, Tensor rows, Tensor? bias, Tensor entries2, Tensor rows2, Tensor? bias2, "
      "Tensor? residual, int channels, int[] kernel, int[] stride, int[] padding, int[] dilation, int[] kernel2, "
      "int[] padding2, int[] dilation2, int[] tile, int block_channels, int block_channels2, int between, "
      "int activation) -> Tensor");
  m.def("attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
  m.def("machine() -> int[]", sparse_machine);
}

TORCH_LIBRARY_IMPL(tscnc, CPU, m) {
  m.impl("linear", sparse_linear);
  m.impl("mlp", sparse_mlp);
  m.impl("conv_pixels", sparse_conv_pixels);
  m.impl("chain", sparse_chain);
  m.impl("conv_images", sparse_conv_images);
  m.impl("conv_block", sparse_conv_block);
  m.impl("attention", attention_);
}
