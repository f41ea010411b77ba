#include "operator.h"

namespace esr {
namespace {

std::string to_string(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  }
  return text + "]";
}

}  // namespace

const Weight& weight_of(const Layer& layer, size_t k, const Weights& weights, const char* what,
                        const std::vector<int64_t>& shape) {
  const Weight& w = weights[static_cast<size_t>(layer.weights[k])];
  bool fits = w.shape.size() == shape.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = shape[i] < 0 ? w.shape[i] >= 1 : w.shape[i] == shape[i];
  }
  STD_TORCH_CHECK(fits, layer.name(), ": ", what, " has shape ", to_string(w.shape), ", must be ", to_string(shape));
  return w;
}

PackedFloats bias_of(const Layer& layer, size_t k, const Weights& weights, const char* what, int64_t channels,
                     int64_t lanes) {
  const float* values = layer.weights[k] < 0 ? nullptr : weight_of(layer, k, weights, what, {channels}).values.data();
  return pack_vector(values, channels, lanes);
}

void export_rows(const Kernels& kernels, const std::vector<TensorView>& tensors, const MapLayout& layout,
                 const float* rows, int64_t first_row, int64_t y0, int64_t y1) {
  if (tensors.empty()) return;
  const Workspace scratch(kernels.lanes * layout.width);
  ExportArgs a;
  a.in = rows;
  a.first_row = first_row;
  a.pitch = layout.pitch;
  a.step = layout.step;
  a.channels = layout.channels;
  a.width = layout.width;
  a.scratch = scratch.data();
  for (const TensorView& t : tensors) {
    a.tensor = t;
    kernels.export_rows(a, y0, y1);
  }
}

void export_shuffled(const Kernels& kernels, const Layer& layer, const Run& run, const MapLayout& layout,
                     const float* pixels, int64_t first_row, int64_t y0, int64_t y1) {
  const int64_t r = layer.upscale_factor;
  const int64_t line_floats = round_up(2 * layout.width * r, kernels.lanes);
  const int64_t strip_floats = run.enlarger == nullptr ? 0 : run.enlarger->strip_floats(run.inputs[1], y1 - y0);
  const Workspace scratch(line_floats + strip_floats);
  ShuffleArgs a;
  a.in = pixels;
  a.first_row = first_row;
  a.pitch = layout.pitch;
  a.step = layout.step;
  a.colours = layout.channels / (r * r);
  a.width = layout.width;
  a.factor = r;
  if (run.enlarger != nullptr) {
    a.residual = run.enlarger->enlarge(run.inputs[1], y0, y1, scratch.data() + line_floats);
  } else if (layer.has_residual) {
    a.residual = run.inputs[1].view();
  }
  a.scratch = scratch.data();
  for (const TensorView& t : run.exports) {
    a.tensor = t;
    kernels.shuffle_rows(a, y0, y1);
  }
}

void complete_rows(const Kernels& kernels, const Run& run, int64_t y0, int64_t y1) {
  zero_ring(run.output, y0, y1);
  export_rows(kernels, run.exports, run.output.layout, run.output.pixels(), 0, y0, y1);
}

void import_strip(const Kernels& kernels, const TensorView& from, const MapLayout& layout, float* out, int64_t y0,
                  int64_t y1) {
  const Workspace scratch(std::max(kernels.lanes, layout.channels) * layout.width);
  ImportArgs a;
  a.tensor = from;
  a.channels = layout.channels;
  a.width = layout.width;
  a.out = out - y0 * layout.pitch;
  a.pitch = layout.pitch;
  a.step = layout.step;
  a.scratch = scratch.data();
  kernels.import_rows(a, y0, y1);
}

void Operator::run(const Run& run) const {
  parallel_ranges(run.output.layout.height, row_cost(run), [&](int64_t y0, int64_t y1) { run_rows(run, y0, y1); });
}

void import_map_rows(const Kernels& kernels, const TensorView& from, const float* shift, const float* scale,
                     const Map& map, const std::vector<TensorView>& exports, int64_t y0, int64_t y1) {
  const MapLayout& m = map.layout;
  const Workspace scratch(std::max(kernels.lanes, m.channels) * m.width);
  ImportArgs a;
  a.tensor = from;
  a.channels = m.channels;
  a.width = m.width;
  a.shift = shift;
  a.scale = scale;
  a.out = map.pixels();
  a.pitch = m.pitch;
  a.step = m.step;
  a.scratch = scratch.data();
  kernels.import_rows(a, y0, y1);
  zero_ring(map, y0, y1);
  export_rows(kernels, exports, m, map.pixels(), 0, y0, y1);
}

void import_map(const Kernels& kernels, const TensorView& from, const Map& map,
                const std::vector<TensorView>& exports) {
  parallel_ranges(map.layout.height, import_cost(map.layout), [&](int64_t y0, int64_t y1) {
    import_map_rows(kernels, from, nullptr, nullptr, map, exports, y0, y1);
  });
}

}  // namespace esr
