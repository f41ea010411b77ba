#include "../common/half.h"
#include "operator.h"

namespace esr {
namespace {

constexpr int64_t kChunk = 32;           // channels
constexpr int64_t kChunkWeights = 1024;  // of a chunk and 32 results
constexpr int64_t kElementsPerFloat = 2;

// 3x3 convolution, or 1x1 convolution of a concatenation, of bfloat16 maps. What an input or the result has no such map
// for is converted strip by strip.
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

  int64_t halo() const { return taps_ == 9 ? 1 : 0; }

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

  // Elements of a strip of `rows` rows of an input that is converted.
  int64_t strip_elements(const MapLayout& m, int64_t rows) const {
    return (rows + 2 * halo()) * m.pitch + kBfloatOverread * m.step;
  }

  void run_strip(const Run& run, int64_t y0, int64_t y1) const {
    const MapLayout& size = run.inputs[0].layout;
    MapLayout out = MapLayout::make(cout_, size.height, size.width, kernels_.lanes);
    const bool to_ring = run.output.ring != nullptr, to_bfloat = run.output.bfloat != nullptr;
    if (!to_ring) out.pitch = out.width * out.step;
    const Map* residual = layer_.has_residual && !shuffles_ ? &run.inputs.back() : nullptr;
    const bool converts_residual = residual != nullptr && residual->bfloat == nullptr && residual->ring == nullptr;

    int64_t floats = to_ring || to_bfloat ? 0 : (y1 - y0) * out.pitch;
    for (size_t i = 0; i < layer_.operands(); ++i) {
      if (run.inputs[i].bfloat == nullptr) {
        floats += round_up(strip_elements(layout_of(run.inputs[i]), y1 - y0), 2 * kChunk) / kElementsPerFloat;
      }
    }
    if (converts_residual) floats += (y1 - y0) * residual->layout.pitch;
    const Workspace workspace(floats);
    float* free = workspace.data();

    BfloatConvArgs a;
    std::vector<BfloatChunk> chunks;
    chunks.reserve(static_cast<size_t>(chunks_));
    for (size_t i = 0; i < layer_.operands(); ++i) {
      const Map& in = run.inputs[i];
      const MapLayout m = layout_of(in);
      const uint16_t* pixels = in.bfloat;
      if (pixels == nullptr) {
        pixels = convert(in, m, reinterpret_cast<uint16_t*>(free), y0, y1);
        free += round_up(strip_elements(m, y1 - y0), 2 * kChunk) / kElementsPerFloat;
      }
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int64_t offset = taps_ == 9 ? (tap / 3 - 1) * m.pitch + (tap % 3 - 1) * m.step : 0;
        for (int64_t c = 0; c < m.channels; c += kChunk) chunks.push_back({pixels + offset + c, m.pitch, m.step});
      }
    }
    a.chunks = chunks.data();
    a.count = chunks_;
    a.weights = reinterpret_cast<const uint16_t*>(weights_.data());
    a.bias = bias_.data();
    a.channels = cout_;
    a.width = size.width;
    a.activation = layer_.activation;
    a.slope = layer_.slope;
    if (residual != nullptr) {
      a.mode = layer_.residual_mode;
      const MapLayout m = residual->bfloat != nullptr ? layout_of(*residual) : residual->layout;
      a.residual_pitch = m.pitch;
      a.residual_step = m.step;
      a.bfloat_residual = residual->bfloat;
      if (converts_residual) {
        import_strip(kernels_, residual->tensor, m, free, y0, y1);
        a.residual = free - y0 * m.pitch;
        free += (y1 - y0) * m.pitch;
      } else if (residual->ring != nullptr) {
        a.residual = residual->pixels();
      }
    }
    if (to_bfloat) {
      const MapLayout m = layout_of(run.output);
      a.bfloat_out = run.output.bfloat;
      a.out_pitch = m.pitch;
      a.out_step = m.step;
    } else {
      a.out = to_ring ? run.output.pixels() : free;
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

  static MapLayout layout_of(const Map& map) {
    return bfloat_layout(map.layout.channels, map.layout.height, map.layout.width);
  }

  // The rows of an input that rows [y0, y1) of the result read, as a part of a bfloat16 map; its pixel (0, 0).
  const uint16_t* convert(const Map& in, const MapLayout& m, uint16_t* strip, int64_t y0, int64_t y1) const {
    uint16_t* const pixels = strip + m.step - (y0 - halo()) * m.pitch;
    const int64_t first = std::max<int64_t>(y0 - halo(), 0), last = std::min(y1 + halo(), m.height);
    TensorView to{pixels, Dtype::kBFloat16, 1, m.pitch, m.step, m.step};
    const MapLayout& from = in.layout;
    if (in.ring != nullptr) {
      export_rows(kernels_, {to}, from, in.pixels(), 0, first, last);
    } else {
      const int64_t pitch = from.width * from.step;
      const Workspace row(pitch);
      MapLayout line = from;
      line.pitch = pitch;
      for (int64_t y = first; y < last; ++y) {
        import_strip(kernels_, in.tensor, line, row.data(), y, y + 1);
        export_rows(kernels_, {to}, line, row.data(), y, y, y + 1);
      }
    }
    if (halo() == 0) return pixels;
    const auto zero = [&](int64_t y, int64_t x, int64_t count) {
      std::fill_n(pixels + y * m.pitch + x * m.step, count * m.step, uint16_t{0});
    };
    for (int64_t y = first; y < last; ++y) {
      zero(y, -1, 1);
      zero(y, m.width, 1);
    }
    if (y0 == 0) zero(-1, -1, m.width + 2);
    if (y1 == m.height) zero(m.height, -1, m.width + 2);
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
                                           const std::vector<Shape>& inputs) {
  if (layer.op != Op::kConv3x3 && layer.op != Op::kConv1x1 && layer.op != Op::kConv3x3PixelShuffle) return nullptr;
  if (layer.one_pixel) return nullptr;
  const Weight& w = weights[static_cast<size_t>(layer.weights[0])];
  std::vector<int64_t> channels;
  for (size_t i = 0; i < layer.operands(); ++i) channels.push_back(inputs[i].channels);
  if (channels.size() == 1) channels[0] = w.shape[1];
  if (std::find(channels.begin(), channels.end(), -1) != channels.end()) return nullptr;
  // A chunk with few channels is mostly zeros.
  constexpr int64_t kLeast = 8;
  if (w.shape[1] < kLeast) return nullptr;
  return std::make_unique<BfloatConv>(layer, kernels, weights, std::move(channels));
}

}  // namespace esr
