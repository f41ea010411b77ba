#include "dense3x3.h"

#include <cstdlib>
#include <cstring>

namespace esr {

bool use_winograd(int64_t cin, int64_t cout) {
  const char* setting = std::getenv("ESR_KERNELS_CPU_WINOGRAD");
  if (setting != nullptr && std::strcmp(setting, "0") == 0) return false;
  return cin >= 16 && cout >= 16;
}

Dense3x3::Dense3x3(const Weight& w, const float* bias, const Kernels& kernels)
    : kernels_(&kernels), cout_(w.shape[0]), cin_(w.shape[1]) {
  winograd_ = use_winograd(cin_, cout_);
  weights_ = pack_conv3x3(w, kernels.lanes);
  if (winograd_) winograd_weights_ = pack_winograd(w, kernels.lanes);
  bias_ = pack_vector(bias, cout_, kernels.lanes);
}

void Dense3x3::convolve(const Map& in, const Epilogue& epilogue, const MapLayout& target, float* out, int64_t first_row,
                        float* scratch, int64_t y0, int64_t y1) const {
  if (winograd_) {
    WinogradArgs a;
    a.in = in.pixels();
    a.in_pitch = in.layout.pitch;
    a.in_step = in.layout.step;
    a.cin = cin_;
    a.out = out;
    a.out_first_row = first_row;
    a.out_pitch = target.pitch;
    a.out_step = target.step;
    a.width = target.width;
    a.height = target.height;
    a.out_vectors = target.step / kernels_->lanes;
    a.weights = winograd_weights_.data();
    a.direct_weights = weights_.data();
    a.bias = bias_.data();
    a.scratch = scratch;
    a.epilogue = epilogue;
    kernels_->winograd(a, y0 / 4, ceil_div(y1, 4));
    return;
  }
  Conv3x3Args a;
  a.in = in.ring;
  a.in_pitch = a.in_row_step = in.layout.pitch;
  a.in_step = a.in_pixel_step = in.layout.step;
  a.cin = cin_;
  a.out = out;
  a.out_first_row = first_row;
  a.out_pitch = target.pitch;
  a.out_step = target.step;
  a.width = target.width;
  a.out_vectors = target.step / kernels_->lanes;
  a.weights = weights_.data();
  a.bias = bias_.data();
  a.epilogue = epilogue;
  kernels_->conv3x3(a, y0, y1);
}

}  // namespace esr
