#include "engine.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "../common/placement.h"
#include "../common/registry.h"
#include "chain.h"
#include "pointwise.h"
#include "step.h"
#include "switches.h"
#include "tensors.h"

namespace esr::cuda {
namespace {

using device::AllowedMemory;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A chain for one size of the inputs.
struct SizedChain {
  Chain chain;
  std::vector<bool> maps;       // whether a link's result is one, for others or for a layer of the chain's own
  int64_t ring = 0, flags = 0;  // in the workspace
};

// Where everything lies in the workspace, for one size of the inputs.
struct Geometry {
  Shapes shapes;                                    // of every value
  std::vector<int64_t> offsets;                     // of every value's map
  std::vector<int64_t> temporaries;                 // of every layer
  std::vector<std::unique_ptr<SizedChain>> chains;  // null: its layers are launches of their own
  int64_t bytes = 0;
};

class CompiledPlan {
 public:
  CompiledPlan(Program program, const Weights& weights, const std::vector<int64_t>& input_channels, Precision precision,
               bool network)
      : program_(std::move(program)), precision_(precision), network_(network) {
    STD_TORCH_CHECK(static_cast<int64_t>(input_channels.size()) == program_.inputs, "compile_plan: channels of ",
                    input_channels.size(), " inputs given, the plan has ", program_.inputs);
    Shapes shapes;
    for (const int64_t c : input_channels) {
      STD_TORCH_CHECK(c >= 1 && c < INT32_MAX / 64, "compile_plan: an input of ", c, " channels is not supported");
      shapes.push_back({c, 0, 0});
    }
    for (const Layer& layer : program_.layers) {
      steps_.push_back(make_step(layer, weights, shapes_of(layer, shapes)));
      shapes.push_back(steps_.back()->result(shapes_of(layer, shapes)));
    }
    weight_count_ = weights.size();
    find_uses();
    for (size_t k = 0; k < steps_.size(); ++k) {
      packed_at_.push_back(packed_bytes_);
      if (!done_before(k)) packed_bytes_ += round_up(steps_[k]->packed_bytes(), kAlignment);
    }
  }

  int64_t packed_bytes() const { return packed_bytes_; }

  // What happens to each layer, a line each.
  std::string describe() const {
    std::string text;
    const bool blocks = switched_on(kSpabSwitch), persistent = switched_on(kPersistentSwitch);
    for (size_t k = 0; k < steps_.size(); ++k) {
      const Use& use = uses_[static_cast<size_t>(program_.inputs) + k];
      text += steps_[k]->layer().name();
      if (!steps_[k]->way().empty()) text += ": " + steps_[k]->way();
      if (use.absorbed) text += ": applied by its readers";
      if (use.passed_on) text += ": in the launch of layer " + std::to_string(k + 1);
      if (blocks && place_in_block(k) < 2)
        text += ": in the launch of layer " + std::to_string(k + 2 - place_in_block(k));
      for (const LayerChain& c : chains_) {
        if (persistent && k >= c.first && k <= c.last) {
          text += ": in one launch with layers " + std::to_string(c.first) + " to " + std::to_string(c.last) +
                  " where their tiles are resident at once";
        }
      }
      text += "\n";
    }
    return text;
  }

  void pack(const Weights& weights, unsigned char* packed, device::Stream stream) const {
    STD_TORCH_CHECK(weights.size() == weight_count_, weights.size(), " weights given, the plan has ", weight_count_);
    for (size_t k = 0; k < steps_.size(); ++k) {
      if (!done_before(k) && steps_[k]->packed_bytes() > 0) steps_[k]->pack(weights, packed + packed_at_[k], stream);
    }
  }

  // `weights`: to be packed into the workspace first; null: `packed` holds them.
  void execute(const Weights* weights, const Tensor* packed, const std::vector<Tensor>& inputs,
               const std::vector<Tensor>& outputs, AllowedMemory& memory) const {
    STD_TORCH_CHECK(static_cast<int64_t>(inputs.size()) == program_.inputs, "execute_plan: ", inputs.size(),
                    " inputs given, the plan has ", program_.inputs);
    STD_TORCH_CHECK(outputs.size() == program_.outputs.size(), "execute_plan: ", outputs.size(),
                    " outputs given, the plan has ", program_.outputs.size());
    std::vector<Outside> in, out;
    Shapes shapes;
    for (size_t i = 0; i < inputs.size(); ++i) {
      in.push_back(read_outside(inputs[i], "input", i, precision_, Access::kRead, memory));
      shapes.push_back(in[i].shape);
      STD_TORCH_CHECK(in[i].batch == in[0].batch, "input ", i, " has ", in[i].batch, " images, input 0 has ",
                      in[0].batch);
    }
    const int64_t batch = in[0].batch;
    const std::shared_ptr<const Geometry> geometry = geometry_for(shapes, batch);
    for (size_t i = 0; i < outputs.size(); ++i) {
      out.push_back(read_outside(outputs[i], "output", i, precision_, Access::kWrite, memory));
      const Shape &got = out[i].shape, &want = geometry->shapes[static_cast<size_t>(program_.outputs[i])];
      const bool fits = out[i].batch == batch && got.channels == want.channels && got.height == want.height &&
                        got.width == want.width;
      STD_TORCH_CHECK(fits, "output ", i, " is [", out[i].batch, ", ", got.channels, ", ", got.height, ", ", got.width,
                      "], must be [", batch, ", ", want.channels, ", ", want.height, ", ", want.width, "]");
    }
    for (const Shape& s : geometry->shapes) {
      if (s.height == 0 || s.width == 0) return;
    }
    if (batch == 0) return;

    const DeviceScope scope(inputs[0]);
    const int64_t own = weights == nullptr ? 0 : packed_bytes_, bytes = own + geometry->bytes;
    std::optional<Tensor> workspace;
    unsigned char* base = nullptr;
    if (bytes > 0) {
      workspace = torch::stable::new_empty(inputs[0], {bytes}, ScalarType::Byte);
      base = static_cast<unsigned char*>(workspace->mutable_data_ptr());
      memory.add(base + own, geometry->bytes, true, "the workspace");
    }
    const unsigned char* weights_at = base;
    if (weights != nullptr) {
      // Written here only: later launches read weights before the launches before them have finished.
      AllowedMemory packing;
      packing.add(base, own, true, "the packed weights");
      pack(*weights, base, scope.stream());
    } else {
      STD_TORCH_CHECK(packed->numel() == packed_bytes_ && packed->scalar_type() == ScalarType::Byte,
                      "the packed weights are not this plan's");
      weights_at = static_cast<const unsigned char*>(packed->const_data_ptr());
    }
    memory.add(weights_at, packed_bytes_, false, "the packed weights");
    run(*geometry, in, out, weights_at, base + own, scope.stream());
  }

 private:
  struct Use {
    bool needs_map = false;       // some layer reads it, and it is not an input
    int64_t last = 0;             // the last layer that does
    bool absorbed = false;        // a normalisation that its readers apply
    bool passed_on = false;       // the next layer alone reads it, and its work is done in the same launch
    std::vector<size_t> outputs;  // indices of the outputs it is
    int64_t reads = 0;            // how many inputs of layers it is
    bool starts_block = false;    // its layer and the two behind it can be one launch
  };

  std::unique_ptr<Step> make_step(const Layer& layer, const Weights& weights, const Shapes& inputs) const {
    switch (layer.op) {
      case Op::kNormalize:
      case Op::kActivate:
        return make_table(layer, precision_);
      case Op::kEsa:
        return make_esa(layer, precision_, weights, inputs);
      case Op::kAdd:
      case Op::kMultiply:
      case Op::kSlice:
      case Op::kResize:
      case Op::kAdaptiveMaxPool:
      case Op::kModulate:
      case Op::kStatistic:
        return make_weightless(layer, precision_);
      case Op::kDepthwiseConv:
      case Op::kLayerNorm2d:
        return make_channelwise(layer, precision_, weights, inputs);
      default:
        return make_convolution(layer, precision_, weights, inputs, network_);
    }
  }

  static Shapes shapes_of(const Layer& layer, const Shapes& shapes) {
    Shapes result;
    for (const int64_t v : layer.inputs) result.push_back(shapes[static_cast<size_t>(v)]);
    return result;
  }

  // Whether every reader of a normalisation can apply it while loading. Only one of an input: a map may be written
  // again before its readers run.
  bool absorbable(const Layer& layer, int64_t value) const {
    if (layer.op != Op::kNormalize || layer.inputs[0] >= program_.inputs) return false;
    if (std::count(program_.outputs.begin(), program_.outputs.end(), value) > 0) return false;
    return std::all_of(program_.layers.begin(), program_.layers.end(), [&](const Layer& reader) {
      const auto reads = std::count(reader.inputs.begin(), reader.inputs.end(), value);
      const bool can = reader.op == Op::kConv3x3 || reader.op == Op::kConv3x3PixelShuffle;
      return reads == 0 || (can && reads == 1 && reader.inputs[0] == value);
    });
  }

  void find_uses() {
    uses_.resize(static_cast<size_t>(program_.values()));
    for (const Layer& layer : program_.layers) {
      for (const int64_t v : layer.inputs) {
        Use& u = uses_[static_cast<size_t>(v)];
        u.needs_map = v >= program_.inputs;
        u.last = layer.index;
        ++u.reads;
      }
    }
    for (size_t i = 0; i < program_.outputs.size(); ++i)
      uses_[static_cast<size_t>(program_.outputs[i])].outputs.push_back(i);
    for (const Layer& layer : program_.layers) {
      Use& u = uses_[static_cast<size_t>(program_.inputs + layer.index)];
      u.absorbed = absorbable(layer, program_.inputs + layer.index);
      // A result that nobody reads is computed nevertheless; the plan's maker is to leave such layers out.
      if (u.absorbed) u.needs_map = false;
      if (!u.absorbed && !u.needs_map && u.outputs.empty()) {
        u.needs_map = true;
        u.last = layer.index;
      }
    }
    merge();
    find_blocks();
    find_chains();
  }

  // Whether the layer before does layer k's work.
  bool done_before(size_t k) const { return k > 0 && uses_[static_cast<size_t>(program_.inputs) + k - 1].passed_on; }

  // Lets layers do the work of their only readers.
  void merge() {
    for (size_t k = 0; k + 1 < steps_.size(); ++k) {
      const int64_t value = program_.inputs + static_cast<int64_t>(k);
      Use& use = uses_[static_cast<size_t>(value)];
      const std::vector<int64_t>& next = program_.layers[k + 1].inputs;
      if (use.reads != 1 || next[0] != value || !use.outputs.empty() || done_before(k)) continue;
      if (!steps_[k]->take_over(*steps_[k + 1])) continue;
      use.passed_on = true;
      use.needs_map = false;
      // Its inputs are read when the next layer's turn has come.
      for (const int64_t v : program_.layers[k].inputs) {
        Use& input = uses_[static_cast<size_t>(v)];
        input.last = std::max(input.last, static_cast<int64_t>(k) + 1);
      }
    }
  }

  // SPAN's blocks: silu(conv(x)), silu(conv) of that, which nobody else reads, and conv of that with x as its residual.
  // Whether each is one launch is decided when a plan runs, for its maps and weights are the same.
  void find_blocks() {
    for (size_t k = 0; k + 2 < steps_.size(); ++k) {
      const auto value = [&](size_t i) { return program_.inputs + static_cast<int64_t>(i); };
      const auto use = [&](size_t i) -> const Use& { return uses_[static_cast<size_t>(value(i))]; };
      const Layer &first = program_.layers[k], &second = program_.layers[k + 1], &third = program_.layers[k + 2];
      if (second.inputs != std::vector<int64_t>{value(k)} ||
          third.inputs != std::vector<int64_t>{value(k + 1), first.inputs[0]}) {
        continue;
      }
      const bool inner = use(k + 1).reads == 1 && use(k + 1).outputs.empty();
      const bool merged = done_before(k) || use(k).passed_on || use(k + 1).passed_on || use(k + 2).passed_on;
      if (inner && !merged) {
        uses_[static_cast<size_t>(value(k))].starts_block = steps_[k]->starts_block(*steps_[k + 1], *steps_[k + 2]);
      }
    }
  }

  // Layers `first` to `last`, each an input's convolution of the one before.
  struct LayerChain {
    struct Link {
      size_t step;
      ChainStage stage;
      int64_t value;     // -1: the next link's layer is in the same step
      int64_t residual;  // a value of the plan, -1: none
    };
    size_t first = 0, last = 0;
    std::vector<Link> links;
    ChainPlan plan;

    int64_t input(const Program& program) const { return program.layers[first].inputs[0]; }
    // The chain's value that a value of the plan is, kNoResidual: none.
    int find(const Program& program, int64_t value) const {
      if (value == input(program)) return 0;
      for (size_t i = 0; i < links.size(); ++i) {
        if (links[i].value == value) return static_cast<int>(i) + 1;
      }
      return ChainPlan::kNoResidual;
    }
  };

  // Runs of convolutions that can be one launch. Whether each is, sizes decide and the switch.
  void find_chains() {
    for (size_t k = 0; k < steps_.size();) {
      LayerChain c;
      c.first = k;
      while (k < steps_.size() && extend(c, k)) k = c.last + 1;
      if (c.links.empty()) {
        ++k;
      } else if (c.links.front().step != c.links.back().step) {
        chains_.push_back(std::move(c));
      }
    }
  }

  // Appends step k, and the one whose work it does, to a chain that ends before it.
  bool extend(LayerChain& c, size_t k) const {
    const Layer& layer = program_.layers[k];
    const std::vector<ChainStage> stages = steps_[k]->chain_stages();
    if (stages.empty() || done_before(k) || c.links.size() + stages.size() > kMostChainLayers) return false;
    const auto value = [&](size_t i) { return program_.inputs + static_cast<int64_t>(i); };
    int residual = ChainPlan::kNoResidual;
    if (!c.links.empty()) {
      if (layer.inputs[0] != value(c.last) || !chain_together(c.links[0].stage.packing, stages[0].packing))
        return false;
    }
    if (layer.has_residual) {
      // An input's layout may be any.
      if (layer.inputs.back() < program_.inputs) return false;
      residual = c.links.empty() ? ChainPlan::kOutside : c.find(program_, layer.inputs.back());
      if (residual == ChainPlan::kNoResidual) residual = ChainPlan::kOutside;
    }
    const bool merged = uses_[static_cast<size_t>(value(k))].passed_on;
    c.last = merged ? k + 1 : k;
    for (size_t i = 0; i < stages.size(); ++i) {
      const bool last = i + 1 == stages.size();
      c.plan.entries[c.links.size()] = {stages[i].packing, i == 0 ? residual : ChainPlan::kNoResidual};
      c.links.push_back(
          {k, stages[i], last ? value(c.last) : -1, i == 0 && layer.has_residual ? layer.inputs.back() : int64_t{-1}});
    }
    c.plan.count = static_cast<int>(c.links.size());
    return true;
  }

  // The chain that begins with layer k and is one launch at this size.
  std::optional<size_t> chain_at(const Geometry& g, size_t k) const {
    for (size_t i = 0; i < chains_.size(); ++i) {
      if (chains_[i].first == k && g.chains[i] != nullptr) return i;
    }
    return std::nullopt;
  }

  // Of the maps through which a chain's borders travel: channels in whole units.
  Shape ring_shape(const Geometry& g, const LayerChain& c) const {
    Shape shape = g.shapes[static_cast<size_t>(c.input(program_))];
    shape.channels = c.links[0].stage.packing.padded_channels();
    return shape;
  }

  // The chain at this size, null: its tiles cannot all be resident at once. Its blocks are at different layers at a
  // time, so what it touches must exist from its beginning to its end.
  std::unique_ptr<SizedChain> size_chain(const LayerChain& c, const Geometry& g, int64_t batch,
                                         std::vector<Part>& parts) const {
    const Shape& shape = g.shapes[static_cast<size_t>(c.input(program_))];
    auto sized = std::make_unique<SizedChain>();
    if (shape.height == 0 || shape.width == 0 ||
        !prepare_chain(sized->chain, c.plan, shape.height, shape.width, batch)) {
      return nullptr;
    }
    const auto first = static_cast<int64_t>(c.first), last = static_cast<int64_t>(c.last);
    for (Part& part : parts) {
      if (part.last >= first && part.last <= last) part.last = last;
      if (part.first >= first && part.first <= last) part.first = first;
    }
    for (size_t i = 0; i < c.links.size(); ++i) {
      const int64_t value = c.links[i].value;
      const bool read = std::any_of(program_.layers.begin(), program_.layers.end(), [&](const Layer& reader) {
        return (reader.index < first || reader.index > last) &&
               std::find(reader.inputs.begin(), reader.inputs.end(), value) != reader.inputs.end();
      });
      sized->maps.push_back(value >= 0 && (read || sized->chain.stored[i + 1]));
      if (value >= 0 && !sized->maps[i]) parts[static_cast<size_t>(value)].size = 0;
    }
    parts.push_back({2 * blocked_bytes(precision_, ring_shape(g, c), batch), first, last});
    parts.push_back({sized->chain.flag_bytes(), first, last});
    return sized;
  }

  // Which layer of a block layer k is, kNoBlock: of none.
  static constexpr size_t kNoBlock = 3;
  size_t place_in_block(size_t k) const {
    for (size_t place = 0; place < kNoBlock && place <= k; ++place) {
      if (uses_[static_cast<size_t>(program_.inputs) + k - place].starts_block) return place;
    }
    return kNoBlock;
  }

  std::shared_ptr<const Geometry> geometry_for(const Shapes& inputs, int64_t batch) const {
    const bool persistent = switched_on(kPersistentSwitch);
    std::vector<int64_t> key = {batch, persistent ? 1 : 0};
    for (const Shape& s : inputs) key.insert(key.end(), {s.channels, s.height, s.width});
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& [known, geometry] : geometries_) {
        if (known == key) return geometry;
      }
    }
    auto g = std::make_shared<Geometry>();
    g->shapes = inputs;
    for (const auto& step : steps_) g->shapes.push_back(step->result(shapes_of(step->layer(), g->shapes)));
    std::vector<Part> parts;
    for (size_t v = 0; v < uses_.size(); ++v) {
      const int64_t first = static_cast<int64_t>(v) - static_cast<int64_t>(inputs.size());
      const bool made = first >= 0 && uses_[v].needs_map;
      parts.push_back(
          {made ? blocked_bytes(precision_, g->shapes[v], batch) : 0, first, std::max(uses_[v].last, first)});
    }
    for (size_t k = 0; k < steps_.size(); ++k) {
      const int64_t bytes = steps_[k]->temporary_bytes(shapes_of(steps_[k]->layer(), g->shapes), batch);
      parts.push_back({bytes, static_cast<int64_t>(k), static_cast<int64_t>(k)});
    }
    const size_t chain_parts = parts.size();
    for (const LayerChain& c : chains_) {
      g->chains.push_back(persistent && batch > 0 ? size_chain(c, *g, batch, parts) : nullptr);
    }
    Placement placement = place_parts(parts, kAlignment);
    g->bytes = placement.size;
    const auto begin = placement.offsets.begin() + static_cast<std::ptrdiff_t>(uses_.size());
    g->temporaries.assign(begin, begin + static_cast<std::ptrdiff_t>(steps_.size()));
    auto chain_offset = placement.offsets.begin() + static_cast<std::ptrdiff_t>(chain_parts);
    for (const auto& chain : g->chains) {
      if (chain == nullptr) continue;
      chain->ring = *chain_offset++;
      chain->flags = *chain_offset++;
    }
    g->offsets = std::move(placement.offsets);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (geometries_.size() >= kMostGeometries) geometries_.erase(geometries_.begin());
    geometries_.emplace_back(std::move(key), g);
    return g;
  }

  void run(const Geometry& g, const std::vector<Outside>& in, const std::vector<Outside>& out,
           const unsigned char* packed, unsigned char* workspace, device::Stream stream) const {
    const int64_t batch = in[0].batch;
    std::vector<Map> maps;
    for (const Outside& o : in) maps.push_back({o.view, o.shape});
    bool first_launch = true;
    const auto export_value = [&](size_t v, size_t output) {
      PointwiseArgs a = {};
      a.a = maps[v].view;
      a.output = out[output].view;
      a.channels = static_cast<int32_t>(maps[v].shape.channels);
      a.height = static_cast<int32_t>(maps[v].shape.height);
      a.width = static_cast<int32_t>(maps[v].shape.width);
      launch_pointwise(a, precision_, batch, stream, !first_launch);
      first_launch = false;
    };
    for (size_t v = 0; v < in.size(); ++v) {
      for (const size_t i : uses_[v].outputs) export_value(v, i);
    }
    // Where a value goes: straight to an output where nobody reads it, or where readers find it as good as a map.
    struct Place {
      Map map;
      std::optional<size_t> output;
    };
    const auto place = [&](size_t value, bool needs_map) {
      const std::vector<size_t>& outputs = uses_[value].outputs;
      const auto direct =
          std::find_if(outputs.begin(), outputs.end(), [&](size_t i) { return !needs_map || out[i].view.blocked; });
      Place p;
      p.map.shape = g.shapes[value];
      if (direct != outputs.end()) {
        p.output = *direct;
        p.map.view = out[*direct].view;
      } else {
        p.map.view = blocked_view(workspace + g.offsets[value], precision_, p.map.shape);
      }
      return p;
    };
    const auto export_rest = [&](size_t value, const Place& p) {
      for (const size_t i : uses_[value].outputs) {
        if (i != p.output) export_value(value, i);
      }
    };
    const bool blocks = switched_on(kSpabSwitch);
    Place middle;
    for (size_t k = 0; k < steps_.size(); ++k) {
      if (const auto i = chain_at(g, k)) {
        const LayerChain& c = chains_[*i];
        const SizedChain& sized = *g.chains[*i];
        Chain chain = sized.chain;
        ChainArgs& a = chain.args;
        const Map& input = maps[static_cast<size_t>(c.input(program_))];
        a.input = input.view;
        a.shift = input.shift;
        a.scale = input.scale;
        a.ring = blocked_view(workspace + sized.ring, precision_, ring_shape(g, c));
        a.ring_bytes = blocked_bytes(precision_, ring_shape(g, c), batch);
        a.flags = reinterpret_cast<uint32_t*>(workspace + sized.flags);
        std::vector<std::pair<size_t, Place>> results;
        for (size_t n = 0; n < c.links.size(); ++n) {
          const auto& [step, stage, result, residual] = c.links[n];
          ChainLayer& layer = a.layers[n];
          layer.weights = packed + packed_at_[step] + stage.packed_at;
          layer.activation = stage.activation;
          layer.slope = stage.slope;
          layer.residual_mode = stage.residual_mode;
          if (residual >= 0 && layer.residual_at < 0) layer.residual = maps[static_cast<size_t>(residual)].view;
          if (result < 0) {
            maps.emplace_back();  // passed on
            continue;
          }
          const auto v = static_cast<size_t>(result);
          const bool is_map = sized.maps[n];
          Place p;
          p.map.shape = g.shapes[v];
          if (is_map || !uses_[v].outputs.empty()) p = place(v, is_map);
          layer.output = p.map.view;
          maps.push_back(p.map);
          results.emplace_back(v, p);
        }
        launch_chain(chain, stream, !first_launch);
        first_launch = false;
        for (const auto& [v, p] : results) export_rest(v, p);
        k = c.last;
        continue;
      }
      const size_t value = in.size() + k;
      const Use& use = uses_[value];
      const size_t in_block = blocks ? place_in_block(k) : kNoBlock;
      if (in_block == 0) middle = place(value, use.reads > 1);
      if (use.passed_on || in_block < 2) {
        maps.push_back(in_block == 0 ? middle.map : Map{});
        continue;
      }
      if (in_block == 2) {
        const Use& first = uses_[value - 2];
        const Place result = place(value, use.needs_map);
        Block block = {};
        block.input = maps[static_cast<size_t>(steps_[k]->layer().inputs[1])];
        block.output = result.map;
        if (first.reads > 1 || !first.outputs.empty()) block.middle = middle.map.view;
        for (size_t i = 0; i < 3; ++i) block.packed[i] = packed + packed_at_[k - 2 + i];
        block.batch = batch;
        block.stream = stream;
        block.overlap = !first_launch;
        steps_[k - 2]->run_block(block);
        first_launch = false;
        maps.push_back(result.map);
        export_rest(value - 2, middle);
        export_rest(value, result);
        continue;
      }
      const size_t own = done_before(k) ? k - 1 : k;  // the step that does the work
      Run run;
      for (const int64_t v : steps_[own]->layer().inputs) run.inputs.push_back(maps[static_cast<size_t>(v)]);
      run.packed = packed + packed_at_[own];
      if (use.absorbed) {
        Map map = run.inputs[0];
        map.view.blocked = false;  // its values pass through registers
        map.shift = reinterpret_cast<const float*>(run.packed);
        map.scale = map.shift + map.shape.channels;
        maps.push_back(map);
        continue;
      }
      const Place result = place(value, use.needs_map);
      run.output = result.map;
      run.temporary = workspace + g.temporaries[k];
      run.batch = batch;
      run.stream = stream;
      run.overlap = !first_launch;
      steps_[own]->run(run);
      first_launch = false;
      maps.push_back(result.map);
      export_rest(value, result);
    }
  }

  static constexpr size_t kMostGeometries = 16;

  const Program program_;
  const Precision precision_;
  const bool network_;
  std::vector<std::unique_ptr<Step>> steps_;
  std::vector<int64_t> packed_at_;
  int64_t packed_bytes_ = 0;
  size_t weight_count_ = 0;
  std::vector<Use> uses_;
  std::vector<LayerChain> chains_;
  mutable std::mutex mutex_;
  mutable std::vector<std::pair<std::vector<int64_t>, std::shared_ptr<const Geometry>>> geometries_;
};

using Plans = Registry<CompiledPlan>;

}  // namespace

int64_t compile_plan(const std::vector<int64_t>& program, const std::vector<double>& constants,
                     const std::vector<Tensor>& weights, const std::vector<int64_t>& input_channels, int64_t precision,
                     bool network) {
  STD_TORCH_CHECK(precision >= 0 && precision < kPrecisionCount, "compile_plan: precision is ", precision,
                  ", must be 0..", kPrecisionCount - 1);
  Program parsed = ProgramReader(program, constants, static_cast<int64_t>(weights.size())).read();
  AllowedMemory none;
  // Tiles depend on the device.
  std::optional<DeviceScope> scope;
  if (!weights.empty()) scope.emplace(weights[0]);
  return Plans::instance().add(
      std::make_shared<CompiledPlan>(std::move(parsed), read_weights(weights, Access::kShape, none), input_channels,
                                     static_cast<Precision>(precision), network));
}

Tensor pack_plan(int64_t handle, const std::vector<Tensor>& weights) {
  const auto plan = Plans::instance().get(handle);
  STD_TORCH_CHECK(!weights.empty(), "pack_plan: no weights");
  const DeviceScope scope(weights[0]);
  AllowedMemory memory;
  const Weights views = read_weights(weights, Access::kRead, memory);
  Tensor packed = torch::stable::new_empty(weights[0], {plan->packed_bytes()}, ScalarType::Byte);
  auto* data = static_cast<unsigned char*>(packed.mutable_data_ptr());
  memory.add(data, plan->packed_bytes(), true, "the packed weights");
  plan->pack(views, data, scope.stream());
  return packed;
}

void execute_plan(int64_t handle, const Tensor& packed, const std::vector<Tensor>& inputs,
                  const std::vector<Tensor>& outputs) {
  AllowedMemory memory;
  Plans::instance().get(handle)->execute(nullptr, &packed, inputs, outputs, memory);
}

void run_plan(int64_t handle, const std::vector<Tensor>& weights, const std::vector<Tensor>& inputs,
              const std::vector<Tensor>& outputs) {
  AllowedMemory memory;
  const Weights views = read_weights(weights, Access::kRead, memory);
  Plans::instance().get(handle)->execute(&views, nullptr, inputs, outputs, memory);
}

std::string describe_plan(int64_t handle) { return Plans::instance().get(handle)->describe(); }

void release_plan(int64_t handle) { Plans::instance().remove(handle); }

}  // namespace esr::cuda
