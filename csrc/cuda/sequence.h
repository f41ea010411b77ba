// A backward operator as a sequence of launches.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "step.h"
#include "tensors.h"
#include "weight_gradient.h"

namespace esr::cuda {

// One convolution. Inputs are read as one map of all their channels.
struct Convolve {
  std::vector<Map> inputs;
  WeightView weight, inner, bias;
  Composition composition = Composition::kPlain;
  int32_t stride = 1;
  int32_t padding = 0;
  bool reflect = false;
  Map output;
  View residual, given, second;
  Pass pass = Pass::kForward;
  Activation activation = Activation::kNone;
  float slope = 0.0f;
  ResidualMode mode = ResidualMode::kNone;
};

// What an operator is written with. Its code runs three times: to find out how much memory it needs, to pack weights,
// which convolutions read before the launches before them have finished, and for all other launches.
class Sequence {
 public:
  Sequence(Precision precision, int64_t batch) : precision_(precision), batch_(batch) {}

  Precision precision() const { return precision_; }
  int64_t batch() const { return batch_; }

  // A blocked map, and other memory, with nothing in it yet.
  Map map(const Shape& shape);
  unsigned char* take(int64_t bytes);

  void convolve(const Convolve& c);
  // The gradients of `c`'s convolution to weight and bias (data null: not wanted), `g` being the one to its result.
  // More than kMostInputs inputs are taken in turns.
  void weight_gradient(const Convolve& c, const Map& g, const WeightView& to_weight, const WeightView& to_bias);
  // `from` into `to`, whose size counts; read as the map whose pixel shuffle it is where `shuffle` is more than 1.
  void copy(const View& from, const Map& to, int32_t shuffle = 1);
  // Any other launch: launch(stream, overlap).
  template <typename Launch>
  void launch(const Launch& launch) {
    if (phase_ != Phase::kRun) return;
    launch(stream_, !first_);
    first_ = false;
  }

  // Runs `body(sequence)` for all of that, on the device of `like`.
  template <typename Body>
  static void run(const torch::stable::Tensor& like, Precision precision, int64_t batch, device::AllowedMemory& memory,
                  const Body& body) {
    const DeviceScope scope(like);
    Sequence s(precision, batch);
    s.stream_ = scope.stream();
    body(s);
    const torch::stable::Tensor packed = s.allocate(like, s.packed_bytes_), workspace = s.allocate(like, s.bytes());
    {
      device::AllowedMemory packing;
      s.start(Phase::kPack, packed, workspace, packing, memory);
      body(s);
    }
    s.start(Phase::kRun, packed, workspace, memory, memory);
    body(s);
  }

 private:
  enum class Phase { kMeasure, kPack, kRun };

  int64_t bytes() const { return used_ + temporary_bytes_; }
  static torch::stable::Tensor allocate(const torch::stable::Tensor& like, int64_t bytes);
  void start(Phase phase, const torch::stable::Tensor& packed, const torch::stable::Tensor& workspace,
             device::AllowedMemory& packed_memory, device::AllowedMemory& memory);
  // What one launch writes and the next ones read, no longer than one call of this class.
  unsigned char* temporary(int64_t bytes);

  const Precision precision_;
  const int64_t batch_;
  device::Stream stream_ = {};
  Phase phase_ = Phase::kMeasure;
  bool first_ = true;
  // While measuring no memory, but not null either, which would mean that something is not wanted.
  unsigned char* packed_ = reinterpret_cast<unsigned char*>(kAlignment);
  unsigned char* workspace_ = reinterpret_cast<unsigned char*>(kAlignment);
  int64_t packed_bytes_ = 0, used_ = 0, temporary_bytes_ = 0;
};

}  // namespace esr::cuda
