// What the operators' gradients have in common. Each works image by image in the internal layout: what the forward
// pass did not keep is computed again, and a thread takes whole images where there are enough.
//
// Every gradient comes out the same, bit for bit, whatever the number of threads: sums over pixels are cut into parts
// by the images' sizes alone, and the parts are added in order.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "dense3x3.h"
#include "tensors.h"

namespace esr {

// Convolutions of an image (or of a part of one) that gradients have computed since the process began: counted, so that
// a test can tell that nothing is computed for a gradient that nobody wants.
enum class Pass { kAgain, kData, kWeight };
void count_pass(Pass pass);
std::vector<int64_t> passes();  // in the order of Pass

// The tensors of one call. A gradient that is not wanted is an empty tensor.
class Gradients {
 public:
  Gradients(const char* name, const std::vector<torch::stable::Tensor>& gradients, size_t count);

  bool wants(size_t k) const { return gradients_[k].numel() > 0; }
  Batch read(const torch::stable::Tensor& t, const char* what);
  Batch read(const torch::stable::Tensor& t, const char* what, const Shape& shape);
  // Where gradient k goes; with a null pointer when it is not wanted.
  Batch target(size_t k, const char* what, const Shape& shape);
  Weight weight(const torch::stable::Tensor& t, const char* what, const std::vector<int64_t>& shape) const;
  // Empty without a bias.
  std::vector<float> bias(const std::optional<torch::stable::Tensor>& t, const char* what, int64_t channels) const;
  void write(size_t k, const char* what, const std::vector<float>& values) const;
  // The activation of an operator, for the kernels.
  DerivativeArgs epilogue(int64_t activation, double slope) const;
  // For a gradient that is another one.
  void copy(size_t k, const torch::stable::Tensor& from) const;
  int64_t images() const { return images_; }

 private:
  const char* name_;
  const std::vector<torch::stable::Tensor>& gradients_;
  int64_t images_ = -1;
};

// f(n) for every image: by whole images in parallel when there are enough of them for all threads.
template <typename F>
void for_images(int64_t images, const F& f) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  if (threads > 1 && (images % threads == 0 || images >= 4 * threads)) {
    draw_ranges(images, 1, threads, [&](int64_t n, int64_t) { f(n); });
  } else {
    for (int64_t n = 0; n < images; ++n) f(n);
  }
}

// Maps of one image, in one block of memory.
class Maps {
 public:
  explicit Maps(const std::vector<MapLayout>& layouts);
  const Map& operator[](size_t k) const { return maps_[k]; }

 private:
  static int64_t floats(const std::vector<MapLayout>& layouts);
  Workspace workspace_;
  std::vector<Map> maps_;
};

// Gradients to a convolution's weight and bias, summed over the pixels of all images.
class WeightSums {
 public:
  // A filter of `side` 1 or 3 that moves by `stride`; `winograd`: as Dense3x3 computes it; `depthwise`: cin is 1, and
  // each output channel has an input of its own.
  struct Filter {
    int64_t side = 3, stride = 1;
    bool winograd = false, depthwise = false;
  };
  // `images`: how many sums are kept apart until the end, in order.
  WeightSums(const Kernels& kernels, const Filter& filter, int64_t cin, int64_t cout, int64_t images, bool weight,
             bool bias);

  // `first` is the pixel of x under the filter's corner for pixel (0, 0) of g.
  void add(int64_t image, const Map& x, const float* first, const Map& g);

  std::vector<float> weight() const;  // [cout, cin, side, side]
  std::vector<float> bias() const;    // [cout]

 private:
  std::vector<float> total(int64_t offset, int64_t count) const;

  const Kernels& kernels_;
  const Filter filter_;
  const int64_t cin_, cout_, step_, images_;
  const bool wants_weight_, wants_bias_;
  int64_t floats_ = 0;  // of one part: [side * side][cin][step], then [step] for the bias
  PackedFloats parts_;  // of every image
};

// The filter of the data gradient: input and output channels exchanged, the taps turned around.
Weight adjoint(const Weight& w);

inline MapLayout layout_for(const Kernels& kernels, const Shape& s) {
  return MapLayout::make(s.channels, s.height, s.width, kernels.lanes);
}

// The gradients in rows [y0, y1) of a map, brought through an activation in place; `h`, and the epilogue's residual if
// it has one, are dense rows from y0 on.
void differentiate_rows(const Kernels& kernels, DerivativeArgs epilogue, const float* h, const Map& grad, int64_t y0,
                        int64_t y1);

// f(y0, y1) for strips of up to 8 rows, in parallel; `cost` is the number of multiply-adds of a row.
template <typename F>
void for_strips(int64_t height, int64_t cost, const F& f) {
  parallel_ranges(height, cost, [&](int64_t first, int64_t last) {
    for (int64_t y = first; y < last; y += 8) f(y, std::min<int64_t>(y + 8, last));
  });
}

// A 1x1 convolution of one map or of several, ready to run.
class Dense1x1 {
 public:
  Dense1x1() = default;
  // `bias` is null or has a value for each output channel.
  Dense1x1(const Weight& w, const float* bias, const Kernels& kernels);
  // Rows [y0, y1); `out` is pixel 0 of row y0.
  void convolve(const std::vector<Map>& in, const Epilogue& epilogue, float* out, int64_t pitch, int64_t y0,
                int64_t y1) const;
  int64_t row_cost(int64_t width) const { return width * step_ * cin_; }

 private:
  const Kernels* kernels_ = nullptr;
  int64_t cin_ = 0, step_ = 0;
  PackedFloats weights_, bias_;
};

// Output channels [first, first + count) of a weight.
Weight slice(const Weight& w, int64_t first, int64_t count);

inline const float* data_or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

// The data gradient of a 1x1 convolution, strip by strip, to a tensor of `channels`.
void export_data_gradient(const Kernels& kernels, const Dense1x1& adjoint, const Map& g, const Epilogue& epilogue,
                          const TensorView& to, int64_t channels);

// The whole data gradient of a dense 3x3 convolution, strip by strip, to `exports`.
void export_data_gradient(const Kernels& kernels, const Dense3x3& adjoint, const Map& g, const Epilogue& epilogue,
                          const TensorView& to);

}  // namespace esr
