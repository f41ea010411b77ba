// A dense 3x3 convolution, stride 1 and zero padding 1, ready to run: by Winograd F(4x4, 3x3) or directly.
#pragma once

#include "operator.h"

namespace esr {

class Dense3x3 {
 public:
  Dense3x3() = default;
  // `bias` is null or has a value for each output channel.
  Dense3x3(const Weight& w, const float* bias, const Kernels& kernels);

  int64_t cin() const { return cin_; }
  int64_t cout() const { return cout_; }

  // Rows [y0, y1) of the convolution of `in`; `out` is pixel 0 of row first_row, and y0 a multiple of 4.
  void convolve(const Map& in, const Epilogue& epilogue, const MapLayout& target, float* out, int64_t first_row,
                float* scratch, int64_t y0, int64_t y1) const;

  // Calls f(y0, y1, rows, scratch) for strips of up to kStrip rows in parallel: `rows` is room for kStrip times
  // `row_floats`, `scratch` what `convolve` needs.
  static constexpr int64_t kStrip = 8;
  template <typename F>
  void for_strips(const MapLayout& in, int64_t row_floats, const F& f) const {
    const int64_t unit = winograd_ ? 4 : 1;  // rows that are computed together
    const int64_t cost = unit * in.width * round_up(cout_, kernels_->lanes) * cin_ * (winograd_ ? 4 : 9);
    parallel_ranges(ceil_div(in.height, unit), cost, [&](int64_t first, int64_t last) {
      const Workspace rows(kStrip * row_floats);
      const Workspace scratch(winograd_ ? kernels_->winograd_scratch_floats(in.step, in.width) : 0);
      const int64_t end = std::min(last * unit, in.height);
      for (int64_t y = first * unit; y < end; y += kStrip) f(y, std::min(y + kStrip, end), rows.data(), scratch.data());
    });
  }

 private:
  const Kernels* kernels_ = nullptr;
  bool winograd_ = false;
  int64_t cout_ = 0, cin_ = 0;
  PackedFloats weights_, winograd_weights_, bias_;
};

// Whether a convolution runs as Winograd F(4x4, 3x3): a function of the layer alone, never of the image, so that a tile
// of an image (cut at multiples of 4 pixels) gives the bits of the whole. With fewer channels the transforms cost more
// than they save. ESR_KERNELS_CPU_WINOGRAD=0, read when a plan is compiled, keeps every convolution direct: 3x to 10x
// less rounding error and about half the speed.
bool use_winograd(int64_t cin, int64_t cout);

}  // namespace esr
