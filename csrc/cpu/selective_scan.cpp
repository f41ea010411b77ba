#include "backward.h"
#include "capability.h"
#include "direct.h"

namespace esr {
namespace {

using torch::stable::Tensor;

constexpr const char* kName = "selective_scan";

void check_tokens(const Batch& b, const char* what) {
  STD_TORCH_CHECK(b.shape.height == 1 && b.can_be(false), kName, ": ", what,
                  " must have one row of tokens with adjacent channels");
}

// [channels][states] as [vector of channels][state][lanes].
PackedFloats pack_rates(const std::vector<float>& a, int64_t channels, int64_t states, int64_t lanes) {
  PackedFloats packed(round_up(channels, lanes) * states);
  for (int64_t c = 0; c < channels; ++c) {
    float* const to = packed.data() + c / lanes * lanes * states + c % lanes;
    for (int64_t s = 0; s < states; ++s) to[s * lanes] = a[static_cast<size_t>(c * states + s)];
  }
  return packed;
}

}  // namespace

void selective_scan(const Tensor& u, const Tensor& delta, const Tensor& a, const Tensor& b, const Tensor& c,
                    const std::optional<Tensor>& d, const std::optional<Tensor>& z,
                    const std::optional<Tensor>& delta_bias, bool delta_softplus, const Tensor& out) {
  const Kernels& kernels = active_kernels();
  const std::vector<Tensor> results{out};
  Gradients t(kName, results, 1);
  const Batch in = t.read(u, "u");
  const Shape shape = in.shape;
  const int64_t states = t.read(b, "b").shape.channels;
  const Batch of_delta = t.read(delta, "delta", shape), of_b = t.read(b, "b", {states, 1, shape.width}),
              of_c = t.read(c, "c", of_b.shape), of_z = z.has_value() ? t.read(*z, "z", shape) : Batch();
  const std::vector<float> rates = t.weight(a, "a", {shape.channels, states}).values;
  const std::vector<float> skip = t.bias(d, "d", shape.channels),
                           bias = t.bias(delta_bias, "delta_bias", shape.channels);
  if (out.numel() == 0) return;
  const Batch to = t.target(0, "the result", shape);
  check_tokens(in, "u");
  check_tokens(of_delta, "delta");
  check_tokens(of_b, "b");
  check_tokens(of_c, "c");
  check_tokens(to, "the result");
  if (z.has_value()) check_tokens(of_z, "z");

  const PackedFloats packed_rates = pack_rates(rates, shape.channels, states, kernels.lanes);
  const PackedFloats packed_skip = pack_vector(data_or_null(skip), shape.channels, kernels.lanes);
  const PackedFloats packed_bias = pack_vector(data_or_null(bias), shape.channels, kernels.lanes);
  SelectiveScanArgs args;
  args.length = shape.width;
  args.channels = shape.channels;
  args.states = states;
  args.a = packed_rates.data();
  args.d = packed_skip.data();
  args.delta_bias = packed_bias.data();
  args.delta_softplus = delta_softplus;
  const int64_t vectors = ceil_div(shape.channels, kernels.lanes);
  const int64_t cost = 16 * shape.width * states * kernels.lanes;
  parallel_ranges(in.images * vectors, cost, [&](int64_t first, int64_t last) {
    const Workspace scratch(kernels.selective_scan_floats(args));
    SelectiveScanArgs mine = args;
    mine.scratch = scratch.data();
    for_image_rows(vectors, first, last, [&](int64_t n, int64_t vector0, int64_t vector1) {
      mine.u = in.image(n);
      mine.delta = of_delta.image(n);
      mine.b = of_b.image(n);
      mine.c = of_c.image(n);
      mine.out = to.image(n);
      if (z.has_value()) mine.z = of_z.image(n);
      for (int64_t k = vector0; k < vector1; ++k) kernels.selective_scan(mine, k * kernels.lanes);
    });
  });
}

}  // namespace esr
