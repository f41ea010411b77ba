#include "backward.h"
#include "capability.h"
#include "direct.h"

namespace esr {
namespace {

using torch::stable::Tensor;

constexpr const char* kName = "window_attention";
constexpr float kLog2E = 1.44269504f;  // of weights as powers of two

// [heads][queries][keys] as the kernels read it.
PackedFloats packed_bias(const Weight& w, int64_t heads, int64_t tokens, int64_t stride) {
  PackedFloats packed(heads * tokens * stride);
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t i = 0; i < tokens; ++i) {
      const float* from = w.values.data() + (h * tokens + i) * tokens;
      for (int64_t j = 0; j < tokens; ++j) packed.data()[(h * tokens + j) * stride + i] = from[j] * kLog2E;
    }
  }
  return packed;
}

}  // namespace

void window_attention(const WindowAttention& call, const Tensor& out) {
  const Kernels& kernels = active_kernels();
  const std::vector<Tensor> results{out};
  Gradients t(kName, results, 1);
  const Batch q = t.read(call.q, "q");
  const Shape& shape = q.shape;
  const Batch k = t.read(call.k, "k", shape), v = t.read(call.v, "v", shape);
  t.read(out, "the result", shape);
  const Batch to = t.target(0, "the result", shape);
  const std::vector<int64_t>&window = call.window, &shift = call.shift;
  STD_TORCH_CHECK(window.size() == 2 && window[0] >= 1 && window[1] >= 1, kName,
                  ": window must be two numbers of at least 1");
  STD_TORCH_CHECK(shape.height % window[0] == 0 && shape.width % window[1] == 0, kName, ": maps of ", shape.height, "x",
                  shape.width, " pixels are no whole windows of ", window[0], "x", window[1]);
  STD_TORCH_CHECK(shift.size() == 2 && shift[0] >= 0 && shift[1] >= 0 && shift[0] < window[0] && shift[1] < window[1],
                  kName, ": shift must be two numbers of at least 0 and less than the window's sides");
  STD_TORCH_CHECK(call.heads >= 1 && shape.channels % call.heads == 0, kName, ": ", shape.channels,
                  " channels are no whole number for each of ", call.heads, " heads");
  if (q.images == 0) return;

  WindowAttentionArgs a;
  a.height = shape.height;
  a.width = shape.width;
  a.window_height = window[0];
  a.window_width = window[1];
  a.shift_y = shift[0];
  a.shift_x = shift[1];
  a.heads = call.heads;
  a.depth = shape.channels / call.heads;
  a.mask = static_cast<float>(call.mask) * kLog2E;
  a.cosine = call.cosine;
  std::vector<float> scales(static_cast<size_t>(call.heads), static_cast<float>(call.scale));
  if (call.scales.has_value()) scales = t.weight(*call.scales, "scale", {call.heads}).values;
  for (float& scale : scales) scale *= kLog2E;
  a.scales = scales.data();
  const int64_t tokens = window[0] * window[1];
  PackedFloats bias;
  if (call.bias.has_value()) {
    const Weight w = t.weight(*call.bias, "bias", {call.heads, tokens, tokens});
    bias = packed_bias(w, call.heads, tokens, kernels.window_attention_stride(a));
    a.bias = bias.data();
  }
  Batch residual;
  if (call.residual.has_value()) residual = t.read(*call.residual, "residual", shape);

  // Windows side by side come one after the other, head by head: they share cache lines.
  const int64_t columns = shape.width / window[1], strip = columns * call.heads;
  const int64_t items = shape.height / window[0] * strip;
  const int64_t floats = kernels.window_attention_floats(a), cost = tokens * tokens * (2 * a.depth + 16);
  parallel_ranges(q.images * items, cost, [&](int64_t first, int64_t last) {
    const Workspace scratch(floats);
    WindowAttentionArgs mine = a;
    mine.scratch = scratch.data();
    for_image_rows(items, first, last, [&](int64_t n, int64_t item0, int64_t item1) {
      mine.q = q.image(n);
      mine.k = k.image(n);
      mine.v = v.image(n);
      mine.out = to.image(n);
      if (call.residual.has_value()) mine.residual = residual.image(n);
      for (int64_t i = item0; i < item1; ++i) {
        kernels.window_attention(mine, i / strip * columns + i % columns, i % strip / columns);
      }
    });
  });
}

}  // namespace esr
