// 1x1 convolutions of images in planes (NCHW), and their gradients, without the internal layout: bringing maps into it
// would take longer than the convolution.
#pragma once

#include <memory>
#include <vector>

#include "operator.h"
#include "tensors.h"

namespace esr {

// Whether images are float32 in planes whose rows follow each other.
bool in_planes(const Batch& b);

// A plan of a single 1x1 convolution, perhaps with a residual.
class PlanarPlan {
 public:
  // Null where the program is another.
  static std::unique_ptr<PlanarPlan> make(const Program& program, const Weights& weights, const Kernels& kernels);

  // Whether inputs and output are float32 in contiguous planes.
  bool takes(const std::vector<Batch>& in, const std::vector<Batch>& out) const;
  // Image n.
  void run(const std::vector<Batch>& in, const std::vector<Batch>& out, int64_t n) const;

 private:
  PlanarPlan(const Program& program, const Weights& weights, const Kernels& kernels);

  const Kernels& kernels_;
  Layer layer_;
  int64_t cout_ = 0, cin_ = 0;
  PackedFloats weights_, bias_;
};

// Gradients to the parameters of a 1x1 convolution; empty where they are not wanted.
struct PlanarGradients {
  std::vector<float> weight;  // [cout, cin]
  std::vector<float> bias;    // [cout]
};

// Gradients of act(conv1x1(cat(xs), w) + bias + residual) for a gradient to the result; those to the inputs are written
// to `to_x`, the residual's to `to_residual`, where a null pointer stands for one that is not wanted. `bias` has no
// values and `residual` no data without one. Sums over pixels are cut into parts by the images' size alone, and the
// parts are added in order.
PlanarGradients planar_gradients(const Kernels& kernels, const Weight& w, const std::vector<float>& bias,
                                 const DerivativeArgs& epilogue, const std::vector<Batch>& xs, const Batch& residual,
                                 const Batch& grad, const std::vector<Batch>& to_x, const Batch& to_residual,
                                 bool to_weight, bool to_bias);

}  // namespace esr
