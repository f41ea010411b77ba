// Plans of a single 1x1 convolution, and perhaps a residual, for images in planes.
#pragma once

#include <memory>
#include <vector>

#include "operator.h"
#include "tensors.h"

namespace esr {

// Runs such a plan without bringing maps into the internal layout, which would take longer than the convolution.
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
  int64_t residual_ = -1;  // the input that is added
  int64_t cout_ = 0, cin_ = 0;
  PackedFloats weights_, bias_;
};

}  // namespace esr
