// What the engine knows of an operator: one object per layer of a compiled plan.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../common/layout.h"
#include "../common/plan.h"
#include "kernels.h"
#include "packing.h"
#include "workspace.h"

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace esr {

// Channels -1: not known before the plan runs (a plan's input).
struct Shape {
  int64_t channels = -1;
  int64_t height = 0;
  int64_t width = 0;
};

// The layout of a bfloat16 map: the same with elements of two bytes, and a pixel in whole cache lines, which are the
// rows of AMX's tiles.
inline MapLayout bfloat_layout(const MapLayout& m) { return MapLayout::make(m.channels, m.height, m.width, 32); }
// Kernels read up to that many pixels behind the last one they need.
constexpr int64_t kBfloatOverread = 31;

// A value of a running plan: in the internal layout, in that of bfloat16 maps, or still in the tensor it came in.
struct Map {
  int64_t value = -1;          // its number
  float* ring = nullptr;       // null: only in `tensor`
  uint16_t* bfloat = nullptr;  // pixel (0, 0) of a bfloat16 map, which then is `tensor`
  MapLayout layout;
  int64_t first = 0;  // of some of a map's channels, layout.channels of them: the first one
  TensorView tensor;

  float* pixels() const { return ring + layout.origin() + first; }

  // The value as something with strides, wherever it is.
  TensorView view() const {
    if (ring == nullptr) return tensor;
    return TensorView{pixels(), Dtype::kFloat32, 1, layout.pitch, layout.step};
  }
};

class Operator;

// One layer's work on one image.
struct Run {
  std::vector<Map> inputs;
  // The layer before, of which no map is made: its rows are computed as they are needed, and `inputs` are its own.
  const Operator* producer = nullptr;
  // Enlarges the last input, a residual, to the size of the result.
  const Operator* enlarger = nullptr;
  Map output;                       // its ring is null when no later layer reads it
  std::vector<TensorView> exports;  // the outside tensors that take the result
  float* temporary = nullptr;       // Operator::temporary_floats()
};

inline void check_channels(const Layer& layer, const Shape& s, int64_t channels, const char* what) {
  STD_TORCH_CHECK(s.channels < 0 || s.channels == channels, layer.name(), ": ", what, " has ", s.channels,
                  " channels, must have ", channels);
}
inline void check_same_size(const Layer& layer, const Shape& a, const Shape& b, const char* what) {
  STD_TORCH_CHECK(a.height == b.height && a.width == b.width, layer.name(), ": ", what, " is ", b.height, "x", b.width,
                  ", must be ", a.height, "x", a.width);
}

class Operator {
 public:
  Operator(const Layer& layer, const Kernels& kernels) : layer_(layer), kernels_(kernels) {}
  virtual ~Operator() = default;
  Operator(const Operator&) = delete;
  Operator& operator=(const Operator&) = delete;

  const Layer& layer() const { return layer_; }
  // The result's shape; checks the inputs' as far as they are known. Sizes are 0 while only channels are known.
  virtual Shape result(const std::vector<Shape>& inputs) const = 0;
  virtual int64_t temporary_floats(const std::vector<Shape>&) const { return 0; }
  // Whether input k can be read from the tensor it came in.
  virtual bool reads_tensor(size_t) const { return false; }
  // Whether input k, if no other layer reads it, is better brought in strip by strip than as a whole.
  virtual bool reads_strips(size_t) const { return false; }
  // Whether input k can be read from, and the result be written to, a bfloat16 map as such.
  virtual bool reads_bfloat(size_t) const { return false; }
  virtual bool writes_bfloat() const { return false; }
  // Whether the result may lie where input k does: every element is read before its own is written.
  virtual bool overwrites(size_t) const { return false; }
  // Whether the result may be exported without having a map of its own.
  virtual bool exports_directly() const { return false; }
  // Whether its result can be computed row by row, and whether it can work on such rows of the layer before.
  virtual bool computes_rows() const { return false; }
  virtual bool takes_rows() const { return false; }
  // Writes row y of a result of this layout, from pixel 0 on; `scratch` has row_floats().
  virtual int64_t row_floats(const std::vector<Map>&) const { return 0; }
  virtual void compute_row(const std::vector<Map>&, const MapLayout&, int64_t, float*, float*) const {}
  // Whether its result is some channels of its input, which can be read where they are, and whether input k can be
  // such.
  virtual bool is_view() const { return false; }
  virtual bool reads_view(size_t) const { return false; }
  // Whether it enlarges its input, and whether it can do with an enlarged residual that is made strip by strip.
  virtual bool enlarges() const { return false; }
  virtual bool takes_enlarged_residual() const { return false; }
  // What rows [y0, y1) of the input become, as planes in `memory` of strip_floats(); addressed like the whole result.
  virtual int64_t strip_floats(const Map&, int64_t) const { return 0; }
  virtual TensorView enlarge(const Map&, int64_t, int64_t, float*) const { return {}; }
  // Whether run_rows() computes any rows of the result, and whether for them it reads no other rows of input k.
  virtual bool has_rows() const { return false; }
  virtual bool reads_rows(size_t) const { return has_rows(); }
  // Computes rows [y0, y1). What a row costs, in multiply-adds.
  virtual void run_rows(const Run&, int64_t, int64_t) const {}
  virtual int64_t row_cost(const Run&) const { return 0; }
  virtual void run(const Run& run) const;

 protected:
  void check_channels(const Shape& s, int64_t channels, const char* what) const {
    esr::check_channels(layer_, s, channels, what);
  }
  void check_same_size(const Shape& a, const Shape& b, const char* what) const {
    esr::check_same_size(layer_, a, b, what);
  }

  Layer layer_;
  const Kernels& kernels_;
};

using Weights = std::vector<Weight>;

// The layer's k-th weight, which must have this shape (-1: any).
const Weight& weight_of(const Layer& layer, size_t k, const Weights& weights, const char* what,
                        const std::vector<int64_t>& shape);
// The layer's k-th weight as a packed vector of `channels`, zeros when there is none.
PackedFloats bias_of(const Layer& layer, size_t k, const Weights& weights, const char* what, int64_t channels,
                     int64_t lanes);

// Shapes of results; the inputs are checked as far as they are known.
Shape conv3x3_result(const Layer& layer, int64_t cout, int64_t cin, const std::vector<Shape>& in);
Shape conv1x1_result(const Layer& layer, int64_t cout, int64_t cin, const std::vector<Shape>& in);

std::unique_ptr<Operator> make_normalize(const Layer&, const Kernels&);
std::unique_ptr<Operator> make_conv3x3(const Layer&, const Kernels&, const Weights&);
std::unique_ptr<Operator> make_conv1x1(const Layer&, const Kernels&, const Weights&);
// The same convolutions in bfloat16, of inputs with so many channels; null where that does not pay. All inputs of a 1x1
// convolution have bfloat16 maps when it runs.
std::unique_ptr<Operator> make_bfloat_conv(const Layer&, const Kernels&, const Weights&, std::vector<int64_t> channels);
std::unique_ptr<Operator> make_esa(const Layer&, const Kernels&, const Weights&);
std::unique_ptr<Operator> make_bsconv(const Layer&, const Kernels&, const Weights&);
std::unique_ptr<Operator> make_depthwise_conv(const Layer&, const Kernels&, const Weights&);
std::unique_ptr<Operator> make_layer_norm2d(const Layer&, const Kernels&, const Weights&);
std::unique_ptr<Operator> make_adaptive_max_pool(const Layer&, const Kernels&);
std::unique_ptr<Operator> make_modulate(const Layer&, const Kernels&);
std::unique_ptr<Operator> make_resize(const Layer&, const Kernels&);
std::unique_ptr<Operator> make_slice(const Layer&, const Kernels&);
std::unique_ptr<Operator> make_statistic(const Layer&, const Kernels&);
std::unique_ptr<Operator> make_pair(const Layer&, const Kernels&);
std::unique_ptr<Operator> make_activate(const Layer&, const Kernels&);

// Tells ThreadSanitizer that threads begin after begin() and end before end(): OpenMP's library, which sees to it, is
// not compiled for the sanitizer. Nothing in other builds. The marks are global: a thread reads nothing before it
// passed.
struct ThreadOrder {
#ifdef __SANITIZE_THREAD__
  static inline char begun = 0, ended = 0;
  static void begin() { __tsan_release(&begun); }
  static void thread_begins() { __tsan_acquire(&begun); }
  static void thread_ends() { __tsan_release(&ended); }
  static void end() { __tsan_acquire(&ended); }
#else
  static void begin() {}
  static void thread_begins() {}
  static void thread_ends() {}
  static void end() {}
#endif
};

// f(first, last) over ranges of 0 .. count - 1, `size` each, in parallel. Threads draw ranges until none is left: cores
// are not always equally fast, or equally free.
template <typename F>
void draw_ranges(int64_t count, int64_t size, int64_t threads, const F& f) {
  std::atomic<int64_t> next{0};
  const auto draw = [&](int64_t, int64_t) {
    ThreadOrder::thread_begins();
    for (int64_t first = next.fetch_add(size); first < count; first = next.fetch_add(size)) {
      f(first, std::min(first + size, count));
    }
    ThreadOrder::thread_ends();
  };
  ThreadOrder::begin();
  torch::stable::parallel_for(0, threads, 1, draw);
  ThreadOrder::end();
}

// f(first, last) over ranges of 0 .. count - 1, in parallel where it pays; `cost` is in multiply-adds, of one.
template <typename F>
void parallel_ranges(int64_t count, int64_t cost, const F& f) {
  // A range should be some tens of microseconds of work, and a thread get a few of them.
#ifdef __SANITIZE_THREAD__
  constexpr int64_t kLeast = 1;  // the smallest test is to run on every thread
#else
  constexpr int64_t kLeast = 1000000;
#endif
  constexpr int64_t kRangesPerThread = 4;
  const int64_t least = std::max<int64_t>(1, kLeast / std::max<int64_t>(1, cost));
  const int64_t threads =
      std::min<int64_t>(static_cast<int64_t>(torch::stable::get_num_threads()), ceil_div(count, least));
  if (threads <= 1) {
    f(int64_t{0}, count);
    return;
  }
  draw_ranges(count, std::max(least, ceil_div(count, threads * kRangesPerThread)), threads, f);
}

// f(image, row0, row1) for items [first, last) of images that have `rows` items each.
template <typename F>
void for_image_rows(int64_t rows, int64_t first, int64_t last, const F& f) {
  while (first < last) {
    const int64_t n = first / rows, end = std::min(last, (n + 1) * rows);
    f(n, first - n * rows, end - n * rows);
    first = end;
  }
}

// Zeroes the ring around rows [y0, y1) of a map: left and right, and above and below at the image's ends.
template <typename T>
void zero_ring(T* pixels, const MapLayout& m, int64_t y0, int64_t y1) {
  const auto zero_row = [&](int64_t y) { std::fill_n(pixels + y * m.pitch - m.step, m.pitch, T{0}); };
  if (y0 == 0) zero_row(-1);
  if (y1 == m.height) zero_row(m.height);
  for (int64_t y = y0; y < y1; ++y) {
    T* const row = pixels + y * m.pitch;
    std::fill_n(row - m.step, m.step, T{0});
    std::fill_n(row + m.width * m.step, m.step, T{0});
  }
}
inline void zero_ring(const Map& map, int64_t y0, int64_t y1) { zero_ring(map.pixels(), map.layout, y0, y1); }

// Writes rows [y0, y1) to every outside tensor; `rows` is pixel 0 of row `first_row`.
void export_rows(const Kernels& kernels, const std::vector<TensorView>& tensors, const MapLayout& layout,
                 const float* rows, int64_t first_row, int64_t y0, int64_t y1);

// Writes rows [y0, y1) of a convolution with upscale_factor, shuffled and with the run's residual (its second input)
// added, to the outside tensors; `pixels` is pixel 0 of row `first_row`.
void export_shuffled(const Kernels& kernels, const Layer& layer, const Run& run, const MapLayout& layout,
                     const float* pixels, int64_t first_row, int64_t y0, int64_t y1);

// What follows the computation of rows [y0, y1) of the output map.
void complete_rows(const Kernels& kernels, const Run& run, int64_t y0, int64_t y1);

// The tensor from row y on.
inline TensorView rows_from(TensorView view, int64_t y) {
  view.data = static_cast<char*>(view.data) + y * view.row_stride * (view.dtype == Dtype::kFloat32 ? 4 : 2);
  return view;
}

// Whether rows of `width` pixels lie one after another, so that several are one long row.
inline bool one_row(const TensorView& view, int64_t width) { return view.row_stride == width * view.column_stride; }

// Brings rows [y0, y1) of a tensor to `out`, pixel 0 of row y0.
void import_strip(const Kernels& kernels, const TensorView& from, const MapLayout& layout, float* out, int64_t y0,
                  int64_t y1);

// Brings rows [y0, y1) of a value into its map, normalised where shift and scale are given, and exports them.
void import_map_rows(const Kernels& kernels, const TensorView& from, const float* shift, const float* scale,
                     const Map& map, const std::vector<TensorView>& exports, int64_t y0, int64_t y1);
inline int64_t import_cost(const MapLayout& m) { return m.width * m.step * 8; }  // of a row

// Brings a value into its map.
void import_map(const Kernels& kernels, const TensorView& from, const Map& map,
                const std::vector<TensorView>& exports = {});

}  // namespace esr
