#include "engine.h"

#include <mutex>
#include <utility>

#include "../common/placement.h"
#include "../common/registry.h"
#include "capability.h"
#include "operator.h"
#include "planar.h"
#include "tensors.h"

namespace esr {
namespace {

using torch::stable::Tensor;

// Layers [first, last), which all run for a strip of rows before they run for the next.
struct Group {
  size_t first, last;
  int64_t rows = 0;             // of a strip; 0: there is one layer, which runs as a whole
  int64_t floats = 0;           // of what a thread keeps of maps that are never whole
  std::vector<size_t> imports;  // inputs that are brought into their maps strip by strip
};

// Where everything lies in the workspace, for one size of the inputs.
struct Geometry {
  std::vector<Shape> shapes;         // of every value
  std::vector<Group> groups;         // of all layers, in their order
  std::vector<bool> strips;          // of every value: its map is never whole
  std::vector<int64_t> offsets;      // of every value's map, in floats; of a strip in the thread's memory
  std::vector<int64_t> temporaries;  // of every layer
  int64_t floats = 0;
};

// Floats, a cache line. Not a power of two pages: maps that are read together should not fall on the same cache sets.
constexpr int64_t kAlignment = 16;

class CompiledPlan {
 public:
  // `bfloat`: feature maps may be held in bfloat16.
  CompiledPlan(Program program, const Weights& weights, const Kernels& kernels, bool bfloat)
      : program_(std::move(program)), kernels_(kernels) {
    bfloat = bfloat && kernels_.bfloat_conv != nullptr;
    for (const Layer& layer : program_.layers) operators_.push_back(make_operator(layer, weights, bfloat));
    // Channels that are known before the plan runs must fit.
    const std::vector<Shape> shapes = infer(std::vector<Shape>(static_cast<size_t>(program_.inputs)));
    count_readers();
    find_producers();
    bfloat_.assign(static_cast<size_t>(program_.values()), false);
    if (bfloat) use_bfloat(weights, shapes);
    for (size_t k = 0; k < operators_.size(); ++k) {
      sources_.push_back(is_done_elsewhere(k) ? std::vector<Source>{} : sources_of(k));
    }
    find_uses();
    planar_ = PlanarPlan::make(program_, weights, kernels_);
  }

  void execute(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const {
    STD_TORCH_CHECK(static_cast<int64_t>(inputs.size()) == program_.inputs, "execute_plan: ", inputs.size(),
                    " inputs given, the plan has ", program_.inputs);
    STD_TORCH_CHECK(outputs.size() == program_.outputs.size(), "execute_plan: ", outputs.size(),
                    " outputs given, the plan has ", program_.outputs.size());
    std::vector<Batch> in, out;
    std::vector<Shape> shapes;
    for (size_t i = 0; i < inputs.size(); ++i) {
      in.push_back(read_batch(inputs[i], false, "input", static_cast<int64_t>(i)));
      shapes.push_back(in[i].shape);
      STD_TORCH_CHECK(in[i].images == in[0].images, "input ", i, " has ", in[i].images, " images, input 0 has ",
                      in[0].images);
    }
    const std::shared_ptr<const Geometry> geometry = geometry_for(shapes);
    for (size_t i = 0; i < outputs.size(); ++i) {
      out.push_back(read_batch(outputs[i], true, "output", static_cast<int64_t>(i)));
      const Shape &got = out[i].shape, &want = geometry->shapes[static_cast<size_t>(program_.outputs[i])];
      const bool fits = out[i].images == in[0].images && got.channels == want.channels && got.height == want.height &&
                        got.width == want.width;
      STD_TORCH_CHECK(fits, "output ", i, " is [", out[i].images, ", ", got.channels, ", ", got.height, ", ", got.width,
                      "], must be [", in[0].images, ", ", want.channels, ", ", want.height, ", ", want.width, "]");
    }
    for (const Shape& s : geometry->shapes) {
      if (s.height == 0 || s.width == 0) return;
    }
    if (in[0].images == 0) return;
    if (planar_ != nullptr && planar_->takes(in, out)) {
      for (int64_t n = 0; n < in[0].images; ++n) planar_->run(in, out, n);
      return;
    }
    const Workspace workspace(geometry->floats);
    for (int64_t n = 0; n < in[0].images; ++n) run_image(*geometry, in, out, n, workspace.data());
  }

 private:
  std::unique_ptr<Operator> make_operator(const Layer& layer, const Weights& weights, bool bfloat) const {
    switch (layer.op) {
      case Op::kNormalize:
        return make_normalize(layer, kernels_);
      case Op::kConv1x1:
        return make_conv1x1(layer, kernels_, weights);
      case Op::kEsa:
        return make_esa(layer, kernels_, weights);
      case Op::kBsconv:
        return make_bsconv(layer, kernels_, weights);
      case Op::kAdd:
      case Op::kMultiply:
        return make_pair(layer, kernels_);
      case Op::kActivate:
        return make_activate(layer, kernels_);
      case Op::kDepthwiseConv:
        return make_depthwise_conv(layer, kernels_, weights);
      case Op::kLayerNorm2d:
        return make_layer_norm2d(layer, kernels_, weights);
      case Op::kSlice:
        return make_slice(layer, kernels_);
      case Op::kResize:
        return make_resize(layer, kernels_);
      case Op::kAdaptiveMaxPool:
        return make_adaptive_max_pool(layer, kernels_);
      case Op::kModulate:
        return make_modulate(layer, kernels_);
      case Op::kStatistic:
        return make_statistic(layer, kernels_);
      default: {
        auto conv = bfloat ? make_bfloat_conv(layer, kernels_, weights, {}) : nullptr;
        return conv != nullptr ? std::move(conv) : make_conv3x3(layer, kernels_, weights);
      }
    }
  }

  // Shapes of all values from those of the inputs.
  std::vector<Shape> infer(std::vector<Shape> shapes) const {
    for (const auto& op : operators_) {
      const Shape result = op->result(shapes_of(*op, shapes));
      shapes.push_back(result);
    }
    return shapes;
  }

  static std::vector<Shape> shapes_of(const Operator& op, const std::vector<Shape>& shapes) {
    std::vector<Shape> result;
    for (const int64_t v : op.layer().inputs) result.push_back(shapes[static_cast<size_t>(v)]);
    return result;
  }

  // How often layers read each value.
  void count_readers() {
    readers_.resize(static_cast<size_t>(program_.values()));
    for (const Layer& layer : program_.layers) {
      for (const int64_t v : layer.inputs) ++readers_[static_cast<size_t>(v)];
    }
  }

  // Parts of maps that all readers read where they are, layers whose only reader comes next and takes their rows one by
  // one, and enlargements whose only reader makes them strip by strip.
  void find_producers() {
    viewed_.assign(operators_.size(), false);
    produces_.assign(operators_.size(), false);
    enlarges_.assign(operators_.size(), false);
    for (size_t k = 0; k + 1 < operators_.size(); ++k) {
      const int64_t value = program_.inputs + static_cast<int64_t>(k);
      const auto& outputs = program_.outputs;
      if (std::find(outputs.begin(), outputs.end(), value) != outputs.end()) continue;
      const Operator &op = *operators_[k], &next = *operators_[k + 1];
      viewed_[k] = op.is_view() && can_be_view(value);
      if (viewed_[k] || readers_[static_cast<size_t>(value)] != 1) continue;
      if (next.layer().inputs == std::vector<int64_t>{value}) {
        produces_[k] = op.computes_rows() && next.takes_rows();
      }
      if (!op.enlarges()) continue;
      for (const auto& reader : operators_) {
        const bool adds = reader->layer().has_residual && reader->layer().inputs.back() == value;
        if (adds && reader->takes_enlarged_residual()) enlarges_[k] = true;
      }
    }
  }

  bool can_be_view(int64_t value) const {
    if (readers_[static_cast<size_t>(value)] == 0) return false;
    for (const auto& reader : operators_) {
      const std::vector<int64_t>& inputs = reader->layer().inputs;
      for (size_t i = 0; i < inputs.size(); ++i) {
        if (inputs[i] == value && !reader->reads_view(i)) return false;
      }
    }
    return true;
  }

  // Whether layer k has no map and is not run: others do its work.
  bool is_done_elsewhere(size_t k) const { return viewed_[k] || produces_[k] || enlarges_[k]; }

  // The layer that has made a value, or null.
  const Operator* maker_of(int64_t value, const std::vector<bool>& some) const {
    const int64_t k = value - program_.inputs;
    return k >= 0 && some[static_cast<size_t>(k)] ? operators_[static_cast<size_t>(k)].get() : nullptr;
  }

  // The layer that makes a value for its reader strip by strip, or null.
  const Operator* enlarger_of(int64_t value) const { return maker_of(value, enlarges_); }

  // What the work of layer k reads, whether it can read the tensor that a value came in, or a bfloat16 map, as such or
  // at all, whether it reads the rows that it computes only, and of which a value is a part.
  struct Source {
    int64_t value;
    bool in_tensor = false, in_strips = false, as_bfloat = false, from_bfloat = false;
    bool in_rows = false;
    const Layer* part = nullptr;
  };
  std::vector<Source> sources_of(size_t k) const {
    const Operator* const producer = producer_of(k);
    const Operator& op = producer != nullptr ? *producer : *operators_[k];
    std::vector<Source> sources;
    for (size_t i = 0; i < op.layer().inputs.size(); ++i) {
      const int64_t v = op.layer().inputs[i];
      Source s{v};
      s.in_rows = producer == nullptr && op.reads_rows(i);
      if (const Operator* const enlarger = enlarger_of(v)) {
        s = {enlarger->layer().inputs[0]};
        s.in_tensor = true;
      } else if (const Operator* const part = maker_of(v, viewed_)) {
        s.value = part->layer().inputs[0];
        s.part = &part->layer();
      } else {
        s.in_tensor = op.reads_tensor(i);
        s.in_strips = op.reads_strips(i) && readers_[static_cast<size_t>(v)] == 1;
        s.as_bfloat = op.reads_bfloat(i);
        s.from_bfloat = s.as_bfloat || s.in_tensor || op.reads_strips(i);
      }
      sources.push_back(s);
    }
    return sources;
  }

  // The layer before that computes rows for layer k, or null.
  const Operator* producer_of(size_t k) const { return k > 0 && produces_[k - 1] ? operators_[k - 1].get() : nullptr; }

  // Takes 1x1 convolutions to bfloat16 where no rows are computed for the next layer and all inputs have such maps:
  // they are too little work for a conversion.
  void use_bfloat(const Weights& weights, const std::vector<Shape>& shapes) {
    std::vector<std::unique_ptr<Operator>> replaced(operators_.size());
    for (size_t k = 0; k < operators_.size(); ++k) {
      const Layer& layer = program_.layers[k];
      if (layer.op != Op::kConv1x1 || is_done_elsewhere(k)) continue;
      std::vector<int64_t> channels;
      for (size_t i = 0; i < layer.operands(); ++i) {
        channels.push_back(shapes[static_cast<size_t>(layer.inputs[i])].channels);
      }
      if (std::find(channels.begin(), channels.end(), -1) != channels.end()) continue;
      if (auto conv = make_bfloat_conv(layer, kernels_, weights, std::move(channels))) {
        replaced[k] = std::exchange(operators_[k], std::move(conv));
      }
    }
    for (bool changed = true; changed;) {
      find_bfloat_maps();
      changed = false;
      for (size_t k = 0; k < operators_.size(); ++k) {
        if (replaced[k] == nullptr) continue;
        const Layer& layer = program_.layers[k];
        const auto end = layer.inputs.begin() + static_cast<std::ptrdiff_t>(layer.operands());
        const auto has_map = [&](int64_t v) { return bfloat_[static_cast<size_t>(v)]; };
        if (std::all_of(layer.inputs.begin(), end, has_map)) continue;
        operators_[k] = std::move(replaced[k]);
        changed = true;
      }
    }
  }

  // Maps in bfloat16 are those that some layer reads as such and all others, and the one that writes it, can do with.
  void find_bfloat_maps() {
    for (size_t k = 0; k < operators_.size(); ++k) {
      const int64_t value = program_.inputs + static_cast<int64_t>(k);
      const auto& outputs = program_.outputs;
      const bool returned = std::find(outputs.begin(), outputs.end(), value) != outputs.end();
      const bool writes = operators_[k]->writes_bfloat() || operators_[k]->exports_directly();
      bfloat_[static_cast<size_t>(value)] = !is_done_elsewhere(k) && !returned && writes && reads_bfloat(value);
    }
  }

  bool reads_bfloat(int64_t value) const {
    bool wanted = false;
    for (size_t k = 0; k < operators_.size(); ++k) {
      if (is_done_elsewhere(k)) continue;
      for (const Source& s : sources_of(k)) {
        if (s.value != value) continue;
        if (!s.from_bfloat) return false;
        wanted = wanted || s.as_bfloat;
      }
    }
    return wanted;
  }

  // For every value: whether it needs a map, and the first and last layer during which the map must exist.
  void find_uses() {
    const int64_t layers = static_cast<int64_t>(operators_.size());
    uses_.resize(static_cast<size_t>(program_.values()));
    const auto use = [&](Use& u, int64_t layer) {
      u.first = u.needs_map ? u.first : layer;
      u.last = layer;
      u.needs_map = true;
    };
    for (int64_t k = 0; k < layers; ++k) {
      for (const Source& s : sources_[static_cast<size_t>(k)]) {
        if (s.value >= program_.inputs || !(s.in_tensor || s.in_strips)) use(uses_[static_cast<size_t>(s.value)], k);
      }
    }
    for (size_t i = 0; i < program_.outputs.size(); ++i) {
      const int64_t v = program_.outputs[i];
      Use& u = uses_[static_cast<size_t>(v)];
      u.exports.push_back(i);
      // An input that is returned is copied by way of a map, while the first layer that needs it (or any) runs.
      if (v < program_.inputs && !u.needs_map) use(u, 0);
    }
    for (int64_t k = 0; k < layers; ++k) {
      Use& u = uses_[static_cast<size_t>(program_.inputs + k)];
      u.first = k;
      u.last = std::max(u.last, k);
      const bool exports_directly = operators_[static_cast<size_t>(k)]->exports_directly();
      u.needs_map = u.needs_map || !(exports_directly || is_done_elsewhere(static_cast<size_t>(k)));
    }
  }

  std::shared_ptr<const Geometry> geometry_for(const std::vector<Shape>& inputs) const {
    std::vector<int64_t> key;
    for (const Shape& s : inputs) key.insert(key.end(), {s.channels, s.height, s.width});
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& [known, geometry] : geometries_) {
        if (known == key) return geometry;
      }
    }
    auto geometry = std::make_shared<Geometry>();
    geometry->shapes = infer(inputs);
    find_groups(*geometry);
    place(*geometry);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (geometries_.size() >= kMostGeometries) geometries_.erase(geometries_.begin());
    geometries_.emplace_back(std::move(key), geometry);
    return geometry;
  }

  // Groups are as long as can be: what only one of them uses is never whole, and what a layer hands on is read while it
  // is in the cache.
  void find_groups(Geometry& g) const {
    g.strips.assign(uses_.size(), false);
    for (size_t first = 0; first < operators_.size(); first = g.groups.back().last) {
      Group group{first, first + 1};
      if (has_strips(first)) {
        while (group.last < operators_.size() && joins(g, first, group.last)) ++group.last;
        find_strips(g, group);
      }
      g.groups.push_back(std::move(group));
    }
  }

  // Whether layer k can run strip by strip.
  bool has_strips(size_t k) const {
    const size_t value = static_cast<size_t>(program_.inputs) + k;
    if (is_done_elsewhere(k) || !operators_[k]->has_rows() || producer_of(k) != nullptr || bfloat_[value]) return false;
    return std::all_of(sources_[k].begin(), sources_[k].end(), [&](const Source& s) {
      const bool keeps_rows = s.value < program_.inputs && s.in_strips && !s.in_tensor;
      return !keeps_rows && !bfloat_[static_cast<size_t>(s.value)];
    });
  }

  // Whether layer k can be in the group of those from `first` on: of their results it reads the rows it computes.
  bool joins(const Geometry& g, size_t first, size_t k) const {
    if (is_done_elsewhere(k)) return true;
    const size_t inputs = static_cast<size_t>(program_.inputs);
    return has_strips(k) && g.shapes[inputs + k].height == g.shapes[inputs + first].height &&
           std::all_of(sources_[k].begin(), sources_[k].end(), [&](const Source& s) {
             return s.in_rows || s.value < program_.inputs + static_cast<int64_t>(first);
           });
  }

  // Whether all layers of a group that read a value read the rows they compute.
  bool is_read_by_rows(const Group& group, size_t value) const {
    for (size_t k = group.first; k < group.last; ++k) {
      for (const Source& s : sources_[k]) {
        if (s.value == static_cast<int64_t>(value) && !s.in_rows) return false;
      }
    }
    return true;
  }

  void find_strips(Geometry& g, Group& group) const {
    constexpr int64_t kStripPixels = 768;
    const size_t inputs = static_cast<size_t>(program_.inputs);
    const Shape& shape = g.shapes[inputs + group.first];
    const int64_t rows =
        std::clamp<int64_t>(kStripPixels / std::max<int64_t>(shape.width, 1), 1, std::max<int64_t>(shape.height, 1));
    const auto holds = [&](int64_t layer) {
      return static_cast<int64_t>(group.first) <= layer && layer < static_cast<int64_t>(group.last);
    };
    std::vector<Part> parts(uses_.size(), Part{0, 0, 0});
    for (size_t v = 0; v < uses_.size(); ++v) {
      const Use& u = uses_[v];
      if (!u.needs_map || !holds(u.first) || (v < inputs && !is_read_by_rows(group, v))) continue;
      if (v < inputs) group.imports.push_back(v);
      if (!holds(u.last)) continue;
      g.strips[v] = true;
      // Imports come before all layers.
      const int64_t first = v < inputs ? static_cast<int64_t>(group.first) : u.first;
      parts[v] = {(rows + 2) * layout_of(g, v).pitch, first, u.last};
    }
    int64_t layers = 0;
    for (size_t k = group.first; k < group.last; ++k) layers += is_done_elsewhere(k) ? 0 : 1;
    const bool has_parts = std::any_of(parts.begin(), parts.end(), [](const Part& part) { return part.size > 0; });
    if (layers == 1 && group.imports.empty() && !has_parts) return;
    group.rows = rows;
    const Placement placement = place_parts(parts, kAlignment);
    group.floats = placement.size;
    g.offsets.resize(uses_.size());
    for (size_t v = 0; v < uses_.size(); ++v) {
      if (parts[v].size > 0) g.offsets[v] = placement.offsets[v];
    }
  }

  void place(Geometry& g) const {
    const int64_t layers = static_cast<int64_t>(operators_.size());
    std::vector<Part> parts;
    // What a group uses exists from its first to its last layer.
    std::vector<int64_t> begins, ends;
    for (const Group& group : g.groups) {
      begins.insert(begins.end(), group.last - group.first, static_cast<int64_t>(group.first));
      ends.insert(ends.end(), group.last - group.first, static_cast<int64_t>(group.last) - 1);
    }
    for (size_t v = 0; v < uses_.size(); ++v) {
      const int64_t floats = uses_[v].needs_map && !g.strips[v] ? floats_of(g, v) : 0;
      parts.push_back({floats, begins[static_cast<size_t>(uses_[v].first)], ends[static_cast<size_t>(uses_[v].last)]});
    }
    for (int64_t k = 0; k < layers; ++k) {
      const Operator& op = *operators_[static_cast<size_t>(k)];
      parts.push_back({op.temporary_floats(shapes_of(op, g.shapes)), k, k});
    }
    const std::vector<size_t> owners = share(g, parts);
    const Placement placement = place_parts(parts, kAlignment);
    g.floats = placement.size;
    g.offsets.resize(uses_.size());
    for (size_t v = 0; v < owners.size(); ++v) {
      if (!g.strips[v]) g.offsets[v] = placement.offsets[owners[v]];
    }
    g.temporaries.assign(placement.offsets.begin() + static_cast<std::ptrdiff_t>(uses_.size()),
                         placement.offsets.end());
  }

  // Gives results the parts of inputs that nobody reads afterwards, where the operator allows it; the value of whose
  // part each uses.
  std::vector<size_t> share(const Geometry& g, std::vector<Part>& parts) const {
    std::vector<size_t> owners(uses_.size());
    for (size_t v = 0; v < owners.size(); ++v) owners[v] = v;
    for (const Group& group : g.groups) {
      for (size_t k = group.first; k < group.last; ++k) {
        const size_t result = static_cast<size_t>(program_.inputs) + k;
        const std::vector<int64_t>& inputs = operators_[k]->layer().inputs;
        for (size_t i = 0; i < inputs.size() && owners[result] == result; ++i) {
          const size_t v = static_cast<size_t>(inputs[i]);
          Part& owner = parts[owners[v]];
          const bool ends = uses_[v].needs_map && uses_[v].last == static_cast<int64_t>(k);
          if (!ends || !operators_[k]->overwrites(i) || owner.size != parts[result].size) continue;
          if (bfloat_[v] || bfloat_[result] || g.strips[v] || g.strips[result]) continue;
          if (group.rows > 0 && !is_read_by_rows(group, v)) continue;
          owner.last = parts[result].last;
          parts[result].size = 0;
          owners[result] = owners[v];
        }
      }
    }
    return owners;
  }

  MapLayout layout_of(const Geometry& g, size_t v) const {
    const Shape& s = g.shapes[v];
    return MapLayout::make(s.channels, s.height, s.width, kernels_.lanes);
  }

  int64_t floats_of(const Geometry& g, size_t v) const {
    const MapLayout m = layout_of(g, v), b = bfloat_layout(m);
    return bfloat_[v] ? ceil_div(b.floats() + kBfloatOverread * b.step, 2) : m.floats();
  }

  void run_image(const Geometry& g, const std::vector<Batch>& in, const std::vector<Batch>& out, int64_t n,
                 float* workspace) const {
    const auto map_of = [&](size_t v) {
      Map map;
      map.value = static_cast<int64_t>(v);
      map.layout = layout_of(g, v);
      if (v < in.size()) map.tensor = in[v].image(n);
      if (bfloat_[v]) {
        const MapLayout m = bfloat_layout(map.layout);
        map.bfloat = reinterpret_cast<uint16_t*>(workspace + g.offsets[v]) + m.origin();
        map.tensor = {map.bfloat, Dtype::kBFloat16, 1, m.pitch, m.step, m.step};
      } else if (uses_[v].needs_map && !g.strips[v]) {
        map.ring = workspace + g.offsets[v];
      }
      return map;
    };
    const auto exports_of = [&](size_t v) {
      std::vector<TensorView> tensors;
      for (const size_t i : uses_[v].exports) tensors.push_back(out[i].image(n));
      return tensors;
    };
    const auto run_of = [&](size_t k) {
      Run run;
      run.producer = producer_of(k);
      run.enlarger = enlarger_of(operators_[k]->layer().inputs.back());
      for (const Source& s : sources_[k]) {
        run.inputs.push_back(map_of(static_cast<size_t>(s.value)));
        Map& input = run.inputs.back();
        if (s.part != nullptr) {
          input.first = s.part->start;
          input.layout.channels = s.part->channels;
        }
        // The map of an input may be filled for a later layer only.
        if (s.value < program_.inputs && s.in_tensor) {
          input.ring = nullptr;
          input.value = -1;
        }
      }
      run.output = map_of(in.size() + k);
      run.exports = exports_of(in.size() + k);
      if (bfloat_[in.size() + k]) {
        zero_ring(run.output.bfloat, bfloat_layout(run.output.layout), 0, run.output.layout.height);
        if (!operators_[k]->writes_bfloat()) run.exports.push_back(run.output.tensor);
      }
      run.temporary = workspace + g.temporaries[k];
      return run;
    };
    for (const Group& group : g.groups) {
      for (size_t v = 0; v < in.size(); ++v) {
        const bool first = uses_[v].needs_map && static_cast<int64_t>(group.first) <= uses_[v].first &&
                           uses_[v].first < static_cast<int64_t>(group.last);
        if (!first || std::find(group.imports.begin(), group.imports.end(), v) != group.imports.end()) continue;
        const Map map = map_of(v);
        import_map(kernels_, map.tensor, map, exports_of(v));
      }
      std::vector<Step> steps;
      if (group.rows > 0) {
        for (const size_t v : group.imports) {
          Run run;
          run.output = map_of(v);
          run.exports = exports_of(v);
          steps.push_back({nullptr, std::move(run)});
        }
      }
      for (size_t k = group.first; k < group.last; ++k) {
        if (!is_done_elsewhere(k)) steps.push_back({operators_[k].get(), run_of(k)});
      }
      if (group.rows > 0) {
        run_strips(g, group, steps);
      } else {
        for (const Step& step : steps) step.op->run(step.run);
      }
    }
  }

  // What is done in a group: the work of a layer, or the import of an input into the run's output.
  struct Step {
    const Operator* op;
    Run run;
  };

  void run_strips(const Geometry& g, const Group& group, const std::vector<Step>& steps) const {
    int64_t cost = 0;
    for (const Step& step : steps) {
      cost += step.op == nullptr ? import_cost(step.run.output.layout) : step.op->row_cost(step.run);
    }
    const int64_t height = steps.back().run.output.layout.height;
    parallel_ranges(height, cost, [&](int64_t y0, int64_t y1) {
      const Workspace memory(group.floats);
      std::vector<Step> mine = steps;
      const auto move_to = [&](Map& map, int64_t y) {
        if (map.value < 0 || !g.strips[static_cast<size_t>(map.value)]) return;
        map.ring = memory.data() + g.offsets[static_cast<size_t>(map.value)] - y * map.layout.pitch;
      };
      for (int64_t y = y0; y < y1; y += group.rows) {
        const int64_t end = std::min(y + group.rows, y1);
        for (Step& step : mine) {
          for (Map& input : step.run.inputs) move_to(input, y);
          Map& output = step.run.output;
          move_to(output, y);
          if (step.op != nullptr) {
            step.op->run_rows(step.run, y, end);
          } else {
            import_map_rows(kernels_, output.tensor, nullptr, nullptr, output, step.run.exports, y, end);
          }
        }
      }
    });
  }

  struct Use {
    bool needs_map = false;
    int64_t first = 0, last = 0;
    std::vector<size_t> exports;  // indices of outputs
  };

  static constexpr size_t kMostGeometries = 8;

  const Program program_;
  const Kernels& kernels_;
  std::vector<std::unique_ptr<Operator>> operators_;
  std::vector<int64_t> readers_;              // of every value: how often layers read it
  std::vector<bool> viewed_;                  // of every layer: its readers read a part of its input
  std::vector<bool> produces_;                // of every layer: the next one takes its rows one by one
  std::vector<bool> enlarges_;                // of every layer: its only reader enlarges strip by strip
  std::unique_ptr<PlanarPlan> planar_;        // null: the program is none of those it runs
  std::vector<bool> bfloat_;                  // of every value: its map is in bfloat16
  std::vector<std::vector<Source>> sources_;  // of every layer that runs
  std::vector<Use> uses_;
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<std::vector<int64_t>, std::shared_ptr<const Geometry>>> geometries_;
};

using Plans = Registry<CompiledPlan>;

}  // namespace

int64_t compile_plan(const std::vector<int64_t>& program, const std::vector<double>& constants,
                     const std::vector<Tensor>& weights) {
  Program parsed = ProgramReader(program, constants, static_cast<int64_t>(weights.size())).read();
  Weights values;
  bool bfloat = !weights.empty();
  for (size_t i = 0; i < weights.size(); ++i) {
    values.push_back(read_weight(weights[i], "weight", static_cast<int64_t>(i)));
    bfloat = bfloat && weights[i].scalar_type() == torch::headeronly::ScalarType::BFloat16;
  }
  return Plans::instance().add(std::make_shared<CompiledPlan>(std::move(parsed), values, active_kernels(), bfloat));
}

void execute_plan(int64_t handle, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
  Plans::instance().get(handle)->execute(inputs, outputs);
}

void release_plan(int64_t handle) { Plans::instance().remove(handle); }

}  // namespace esr
