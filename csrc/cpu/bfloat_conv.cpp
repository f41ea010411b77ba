#include "../common/half.h"
#include "operator.h"

namespace esr {
namespace {

constexpr int64_t kChunk = 32;           // channels
constexpr int64_t kChunkWeights = 1024;  // of a chunk and 32 results
constexpr int64_t kElementsPerFloat = 2;

// 3x3 convolution, or 1x1 convolution of a concatenation, of bfloat16 maps. The input of a 3x3 convolution that has
// none is converted strip by strip.
class BfloatConv final : public Operator {
 public:
  BfloatConv(const Layer& layer, const Kernels& kernels, const Weights& weights, std::vector<int64_t> channels)
      : Operator(layer, kernels),
        shuffles_(layer.op == Op::kConv3x3PixelShuffle),
        taps_(layer.op == Op::kConv1x1 ? 1 : 9),
        channels_(std::move(channels)) {
    const int64_t side = taps_ == 9 ? 3 : 1;
    const Weight& w = weight_of(layer, 0, weights, "weight", {-1, -1, side, side});
    cout_ = w.shape[0];
    cin_ = w.shape[1];
    pack(w);
    bias_ = bias_of(layer, 1, weights, "bias", cout_, kChunk);
  }

  Shape result(const std::vector<Shape>& in) const override {
    return taps_ == 9 ? conv3x3_result(layer_, cout_, cin_, in) : conv1x1_result(layer_, cout_, cin_, in);
  }

  bool reads_tensor(size_t) const override { return true; }
  bool reads_bfloat(size_t k) const override { return !(shuffles_ && k == 1); }
  bool writes_bfloat() const override { return !shuffles_; }
  bool exports_directly() const override { return true; }
  bool takes_enlarged_residual() const override { return shuffles_; }

  void run(const Run& run) const override {
    const MapLayout& m = run.inputs[0].layout;
    const int64_t cost = m.width * round_up(cout_, kChunk) * chunks_ * 4;
    parallel_ranges(m.height, cost, [&](int64_t first, int64_t last) {
      for (int64_t y = first; y < last; y += kStrip) run_strip(run, y, std::min(y + kStrip, last));
    });
  }

 private:
  static constexpr int64_t kStrip = 8;  // rows

  // [32 results][input][tap][32 channels][2][pair of channels][16 results][2]
  void pack(const Weight& w) {
    for (const int64_t c : channels_) chunks_ += taps_ * ceil_div(c, kChunk);
    const int64_t blocks = ceil_div(cout_, kChunk);
    weights_ = PackedFloats(blocks * chunks_ * kChunkWeights / kElementsPerFloat);
    uint16_t* chunk = reinterpret_cast<uint16_t*>(weights_.data());
    for (int64_t o0 = 0; o0 < blocks * kChunk; o0 += kChunk) {
      int64_t first = 0;  // channel of this input in the concatenation
      for (const int64_t channels : channels_) {
        for (int64_t tap = 0; tap < taps_; ++tap) {
          for (int64_t c0 = 0; c0 < channels; c0 += kChunk, chunk += kChunkWeights) {
            for (int64_t o = o0; o < std::min(o0 + kChunk, cout_); ++o) {
              for (int64_t c = c0; c < std::min(c0 + kChunk, channels); ++c) {
                const int64_t row = (c - c0) / 2, column = (o - o0) % 16;
                chunk[(o - o0) / 16 * 512 + row * 32 + column * 2 + (c - c0) % 2] =
                    float_to_bfloat(w.values[static_cast<size_t>((o * cin_ + first + c) * taps_ + tap)]);
              }
            }
          }
        }
        first += channels;
      }
    }
  }

  void run_strip(const Run& run, int64_t y0, int64_t y1) const {
    const Map& in = run.inputs[0];
    const bool to_ring = run.output.ring != nullptr, to_bfloat = run.output.bfloat != nullptr;
    MapLayout out = MapLayout::make(cout_, in.layout.height, in.layout.width, kernels_.lanes);
    if (!to_ring) out.pitch = out.width * out.step;
    const Map* residual = layer_.has_residual && !shuffles_ ? &run.inputs.back() : nullptr;
    const bool imports_residual = residual != nullptr && residual->bfloat == nullptr && residual->ring == nullptr;

    const int64_t in_floats = in.bfloat == nullptr ? converted_floats(in, y1 - y0) : 0;
    const int64_t residual_floats = imports_residual ? (y1 - y0) * residual->layout.pitch : 0;
    const Workspace workspace(in_floats + residual_floats + (to_ring || to_bfloat ? 0 : (y1 - y0) * out.pitch));
    float* const residual_rows = workspace.data() + in_floats;

    std::vector<BfloatChunk> chunks;
    chunks.reserve(static_cast<size_t>(chunks_));
    for (size_t i = 0; i < layer_.operands(); ++i) {
      const MapLayout m = bfloat_layout(run.inputs[i].layout);
      const uint16_t* pixels = run.inputs[i].bfloat;
      if (pixels == nullptr) pixels = convert(in, reinterpret_cast<uint16_t*>(workspace.data()), y0, y1);
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int64_t offset = taps_ == 9 ? (tap / 3 - 1) * m.pitch + (tap % 3 - 1) * m.step : 0;
        for (int64_t c = 0; c < m.channels; c += kChunk) chunks.push_back({pixels + offset + c, m.pitch, m.step});
      }
    }
    BfloatConvArgs a;
    a.chunks = chunks.data();
    a.count = chunks_;
    a.weights = reinterpret_cast<const uint16_t*>(weights_.data());
    a.bias = bias_.data();
    a.channels = cout_;
    a.width = out.width;
    a.epilogue.activation = layer_.activation;
    a.epilogue.slope = layer_.slope;
    if (residual != nullptr) {
      const MapLayout m = residual->bfloat != nullptr ? bfloat_layout(residual->layout) : residual->layout;
      a.epilogue.mode = layer_.residual_mode;
      a.epilogue.residual_pitch = m.pitch;
      a.residual_step = m.step;
      a.bfloat_residual = residual->bfloat;
      if (imports_residual) {
        import_strip(kernels_, residual->tensor, m, residual_rows, y0, y1);
        a.epilogue.residual = residual_rows - y0 * m.pitch;
      } else if (residual->ring != nullptr) {
        a.epilogue.residual = residual->pixels();
      }
    }
    if (to_bfloat) {
      const MapLayout m = bfloat_layout(run.output.layout);
      a.bfloat_out = run.output.bfloat;
      a.out_pitch = m.pitch;
      a.out_step = m.step;
    } else {
      a.out = to_ring ? run.output.pixels() : residual_rows + residual_floats;
      a.out_first_row = to_ring ? 0 : y0;
      a.out_pitch = out.pitch;
      a.out_step = out.step;
    }
    kernels_.bfloat_conv(a, y0, y1);
    if (to_bfloat) return;
    if (to_ring) zero_ring(run.output, y0, y1);
    if (shuffles_) {
      export_shuffled(kernels_, layer_, run, out, a.out, a.out_first_row, y0, y1);
    } else {
      export_rows(kernels_, run.exports, out, a.out, a.out_first_row, y0, y1);
    }
  }

  // Of a strip of `rows` rows and, as in Conv3x3, two more on both sides: what the filter reads, and a ring beyond it.
  static int64_t converted_floats(const Map& in, int64_t rows) {
    const MapLayout m = bfloat_layout(in.layout);
    return round_up((rows + 4) * m.pitch + kBfloatOverread * m.step, 2 * kChunk) / kElementsPerFloat;
  }

  // The rows that rows [y0, y1) of the result read, as a part of a bfloat16 map; its pixel (0, 0).
  const uint16_t* convert(const Map& in, uint16_t* strip, int64_t y0, int64_t y1) const {
    const MapLayout m = bfloat_layout(in.layout);
    uint16_t* const pixels = strip + m.step - (y0 - 2) * m.pitch;
    const TensorView to{pixels, Dtype::kBFloat16, 1, m.pitch, m.step, m.step};
    const int64_t first = std::max<int64_t>(y0 - 1, 0), last = std::min(y1 + 1, m.height);
    if (in.ring != nullptr) {
      export_rows(kernels_, {to}, in.layout, in.pixels(), 0, first, last);
    } else {
      const Workspace rows((last - first) * in.layout.pitch);
      import_strip(kernels_, in.tensor, in.layout, rows.data(), first, last);
      export_rows(kernels_, {to}, in.layout, rows.data(), first, first, last);
    }
    zero_ring(pixels, m, first, last);
    return pixels;
  }

  const bool shuffles_;
  const int64_t taps_;
  const std::vector<int64_t> channels_;  // of the operands
  int64_t cout_ = 0, cin_ = 0, chunks_ = 0;
  PackedFloats weights_, bias_;
};

}  // namespace

std::unique_ptr<Operator> make_bfloat_conv(const Layer& layer, const Kernels& kernels, const Weights& weights,
                                           std::vector<int64_t> channels) {
  constexpr int64_t kLeast = 8;  // of fewer input channels a chunk is mostly zeros
  const Weight& w = weights[static_cast<size_t>(layer.weights[0])];
  if (layer.one_pixel || w.shape.size() != 4 || w.shape[1] < kLeast) return nullptr;
  if (layer.op != Op::kConv1x1) channels = {w.shape[1]};
  return std::make_unique<BfloatConv>(layer, kernels, weights, std::move(channels));
}

}  // namespace esr
