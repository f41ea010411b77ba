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

// Layers [first, last).
struct Group {
  size_t first, last;
  bool by_strips = false;       // they all run for a strip of rows before they run for the next; else there is one
  std::vector<size_t> imports;  // inputs that are brought into their maps strip by strip

  bool holds(int64_t layer) const { return static_cast<int64_t>(first) <= layer && layer < static_cast<int64_t>(last); }
};

// In the workspace, or in the memory of a tensor.
struct Place {
  int64_t room = -1;
  int64_t offset = 0;  // in floats
};

// The strips of a group.
struct Strips {
  int64_t rows = 0;    // of each
  int64_t floats = 0;  // of what a thread keeps of maps that are never whole
};

// Where everything lies, for one size of the inputs.
struct Geometry {
  std::vector<Shape> shapes;       // of every value
  std::vector<Strips> strips;      // of every group
  std::vector<Place> maps;         // of every value; of a map that is never whole, in the thread's memory
  std::vector<Place> temporaries;  // of every layer
  int64_t floats = 0;              // of the workspace
};

// Floats, a cache line. Not a power of two pages: maps that are read together should not fall on the same cache sets.
constexpr int64_t kAlignment = 16;

// Addresses of bytes; the end is not included.
struct Memory {
  uintptr_t begin, end;

  bool meets(const Memory& other) const { return begin < other.end && other.begin < end; }
};

// From the first to the last element of all images.
Memory extent(const Batch& b) {
  const TensorView& v = b.first;
  const Shape& s = b.shape;
  const auto begin = reinterpret_cast<uintptr_t>(v.data);
  if (b.images * s.channels * s.height * s.width == 0) return {begin, begin};
  const int64_t last = (b.images - 1) * b.image_stride + (s.channels - 1) * v.channel_stride +
                       (s.height - 1) * v.row_stride + (s.width - 1) * v.column_stride;
  return {begin, begin + static_cast<uintptr_t>((last + 1) * bytes_of(v.dtype))};
}

// Whether every image fills its memory, as planes or as pixels with all their channels.
bool has_no_gaps(const Batch& b) {
  const TensorView& v = b.first;
  const Shape& s = b.shape;
  const auto is = [](int64_t size, int64_t stride, int64_t wanted) { return size == 1 || stride == wanted; };
  const bool planes = is(s.width, v.column_stride, 1) && is(s.height, v.row_stride, s.width) &&
                      is(s.channels, v.channel_stride, s.height * s.width);
  const bool pixels = is(s.channels, v.channel_stride, 1) && is(s.width, v.column_stride, s.channels) &&
                      is(s.height, v.row_stride, s.width * s.channels);
  return (planes || pixels) && (b.images == 1 || b.image_stride >= s.channels * s.height * s.width);
}

// Bytes from a tensor's first element to the end of its storage.
int64_t bytes_to_end(const Tensor& t) {
  int64_t all = 0, offset = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &all));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  return all - offset * static_cast<int64_t>(t.element_size());
}

// A tensor whose memory holds maps while nobody needs what is in it: an output until it is written, an input that
// nobody reads afterwards once it has been read, and between the two what is both.
struct Lender {
  const Batch* tensor;
  Room room;  // in floats, from the first aligned address of an image

  float* memory(int64_t n) const {
    constexpr uintptr_t kBytes = kAlignment * sizeof(float);
    const auto address = reinterpret_cast<uintptr_t>(tensor->image(n).data);
    return reinterpret_cast<float*>((address + kBytes - 1) / kBytes * kBytes);
  }
};

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
    find_groups();
    find_spans();
    planar_ = PlanarPlan::make(program_, weights, kernels_);
  }

  std::vector<int64_t> spans() const {
    std::vector<int64_t> result = read_last_;
    result.insert(result.end(), written_first_.begin(), written_first_.end());
    for (size_t i = 0; i < written_first_.size(); ++i) {
      for (size_t v = 0; v < read_last_.size(); ++v) result.push_back(can_take(i, v) ? 1 : 0);
    }
    return result;
  }

  void execute(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs, const Ownership& owned) const {
    STD_TORCH_CHECK(static_cast<int64_t>(inputs.size()) == program_.inputs, "execute_plan: ", inputs.size(),
                    " inputs given, the plan has ", program_.inputs);
    STD_TORCH_CHECK(outputs.size() == program_.outputs.size(), "execute_plan: ", outputs.size(),
                    " outputs given, the plan has ", program_.outputs.size());
    std::vector<Batch> in, out, lent;
    std::vector<Shape> shapes;
    for (size_t i = 0; i < inputs.size(); ++i) {
      in.push_back(read_batch(inputs[i], false, "input", static_cast<int64_t>(i)));
      shapes.push_back(in[i].shape);
      STD_TORCH_CHECK(in[i].images == in[0].images, "input ", i, " has ", in[i].images, " images, input 0 has ",
                      in[0].images);
    }
    for (size_t i = 0; i < outputs.size(); ++i) {
      out.push_back(read_batch(outputs[i], true, "output", static_cast<int64_t>(i)));
    }
    const std::vector<Lender> lenders = find_lenders(inputs, in, outputs, out, owned, lent);
    const std::shared_ptr<const Geometry> geometry = geometry_for(shapes, lenders);
    for (size_t i = 0; i < outputs.size(); ++i) {
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
    for (int64_t n = 0; n < in[0].images; ++n) {
      std::vector<float*> rooms;
      for (const Lender& l : lenders) rooms.push_back(l.memory(n));
      run_image(*geometry, in, out, n, workspace.data(), rooms);
    }
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

  // The tensors whose memory can hold maps. What overlaps another tensor cannot.
  std::vector<Lender> find_lenders(const std::vector<Tensor>& inputs, const std::vector<Batch>& in,
                                   const std::vector<Tensor>& outputs, const std::vector<Batch>& out,
                                   const Ownership& owned, std::vector<Batch>& lent) const {
    std::vector<Memory> all;
    for (const Batch& b : in) all.push_back(extent(b));
    for (const Batch& b : out) all.push_back(extent(b));
    for (size_t i = 0; i < owned.lent.size(); ++i) {
      lent.push_back(read_batch(owned.lent[i], true, "lent", static_cast<int64_t>(i)));
      all.push_back(extent(lent[i]));
    }
    const int64_t layers = static_cast<int64_t>(operators_.size());
    std::vector<Lender> lenders;
    const auto lend = [&](const Tensor& t, const Batch& b, int64_t tensors, int64_t first, int64_t last) {
      if (first > last || !has_no_gaps(b)) return;
      Memory memory = extent(b);
      int64_t bytes = bytes_of(b.first.dtype) * b.shape.channels * b.shape.height * b.shape.width;
      if (owned.storages && b.images == 1) {
        bytes = bytes_to_end(t);
        memory.end = memory.begin + static_cast<uintptr_t>(bytes);
      }
      const int64_t floats = (bytes / static_cast<int64_t>(sizeof(float)) / kAlignment - 1) * kAlignment;
      const auto meets = [&](const Memory& other) { return memory.meets(other); };
      if (floats < kLeastRoom || std::count_if(all.begin(), all.end(), meets) > tensors) return;
      lenders.push_back({&b, {floats, first, last}});
    };
    std::vector<int64_t> from(out.size(), 0);  // above 0: it is a spent input
    for (const int64_t v : owned.spent) {
      STD_TORCH_CHECK(v >= 0 && v < program_.inputs, "execute_plan: there is no input ", v, " to be spent");
      const size_t s = static_cast<size_t>(v);
      int64_t until = layers;
      for (size_t i = 0; i < out.size(); ++i) {
        if (in[s].first.data != out[i].first.data) continue;
        STD_TORCH_CHECK(can_take(i, s), "execute_plan: output ", i, " is input ", v,
                        ", which is read after the output is written");
        from[i] = until = read_last_[s] + 1;
      }
      lend(inputs[s], in[s], 1, read_last_[s] + 1, until - 1);
    }
    for (size_t i = 0; i < out.size(); ++i) {
      lend(outputs[i], out[i], from[i] > 0 ? 2 : 1, from[i], written_first_[i] - 1);
    }
    for (size_t i = 0; i < lent.size(); ++i) {
      if (lent[i].images == in[0].images) lend(owned.lent[i], lent[i], 1, 0, layers - 1);
    }
    return lenders;
  }

  std::shared_ptr<const Geometry> geometry_for(const std::vector<Shape>& inputs,
                                               const std::vector<Lender>& lenders) const {
    std::vector<int64_t> key;
    for (const Shape& s : inputs) key.insert(key.end(), {s.channels, s.height, s.width});
    for (const Lender& l : lenders) key.insert(key.end(), {l.room.size, l.room.first, l.room.last});
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& [known, geometry] : geometries_) {
        if (known == key) return geometry;
      }
    }
    auto geometry = std::make_shared<Geometry>();
    geometry->shapes = infer(inputs);
    place(*geometry, lenders);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (geometries_.size() >= kMostGeometries) geometries_.erase(geometries_.begin());
    geometries_.emplace_back(std::move(key), geometry);
    return geometry;
  }

  // Groups are as long as can be: what only one of them uses is never whole, and what a layer hands on is read while it
  // is in the cache.
  void find_groups() {
    const std::vector<int64_t> sizes = find_sizes();
    partial_.assign(uses_.size(), false);
    for (size_t first = 0; first < operators_.size(); first = groups_.back().last) {
      Group group{first, first + 1};
      if (has_strips(first)) {
        while (group.last < operators_.size() && joins(sizes, first, group.last)) ++group.last;
        find_strips(group);
      }
      groups_.push_back(std::move(group));
    }
  }

  // A number for every value: those with the same are equally high and wide, whatever the size of the inputs.
  std::vector<int64_t> find_sizes() const {
    std::vector<int64_t> sizes(static_cast<size_t>(program_.values()));
    for (size_t v = 0; v < sizes.size(); ++v) sizes[v] = static_cast<int64_t>(v);
    for (size_t k = 0; k < operators_.size(); ++k) {
      const Operator& op = *operators_[k];
      if (!op.has_rows()) continue;
      const size_t result = static_cast<size_t>(program_.inputs) + k;
      const std::vector<int64_t>& inputs = op.layer().inputs;
      for (size_t i = 0; i < inputs.size(); ++i) {
        if (i > 0 && !op.reads_rows(i)) continue;
        const int64_t old = sizes[static_cast<size_t>(inputs[i])];
        std::replace(sizes.begin(), sizes.end(), old, sizes[result]);
      }
    }
    return sizes;
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
  bool joins(const std::vector<int64_t>& sizes, size_t first, size_t k) const {
    if (is_done_elsewhere(k)) return true;
    const size_t inputs = static_cast<size_t>(program_.inputs);
    return has_strips(k) && sizes[inputs + k] == sizes[inputs + first] &&
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

  void find_strips(Group& group) {
    for (size_t v = 0; v < uses_.size(); ++v) {
      const Use& u = uses_[v];
      const bool input = v < static_cast<size_t>(program_.inputs);
      if (!u.needs_map || !group.holds(u.first) || (input && !is_read_by_rows(group, v))) continue;
      if (input) group.imports.push_back(v);
      partial_[v] = group.holds(u.last);
      group.by_strips = group.by_strips || input || partial_[v];
    }
    for (size_t k = group.first + 1; k < group.last; ++k) group.by_strips = group.by_strips || !is_done_elsewhere(k);
  }

  // For every input the last layer during which its tensor is read, for every output the first during which it is
  // written; those of a group run together.
  void find_spans() {
    for (const Group& group : groups_) {
      begins_.insert(begins_.end(), group.last - group.first, static_cast<int64_t>(group.first));
      ends_.insert(ends_.end(), group.last - group.first, static_cast<int64_t>(group.last) - 1);
    }
    const auto begin = [&](int64_t layer) { return begins_[static_cast<size_t>(layer)]; };
    const auto end = [&](int64_t layer) { return ends_[static_cast<size_t>(layer)]; };
    read_last_.assign(static_cast<size_t>(program_.inputs), -1);
    written_first_.assign(program_.outputs.size(), 0);
    for (size_t v = 0; v < uses_.size(); ++v) {
      // Inputs are written when they are brought into maps.
      for (const size_t i : uses_[v].exports) written_first_[i] = begin(uses_[v].first);
      if (v < read_last_.size() && uses_[v].needs_map) read_last_[v] = end(uses_[v].first);
    }
    for (size_t k = 0; k < operators_.size(); ++k) {
      for (const Source& s : sources_[k]) {
        if (s.value >= program_.inputs || !(s.in_tensor || s.in_strips)) continue;
        int64_t& last = read_last_[static_cast<size_t>(s.value)];
        last = std::max(last, end(static_cast<int64_t>(k)));
      }
    }
  }

  // Whether output i may be the tensor of input v, the same elements at the same addresses: all of it is read before
  // any of it is written, or every row.
  bool can_take(size_t i, size_t v) const {
    if (read_last_[v] < written_first_[i]) return true;
    const size_t value = static_cast<size_t>(program_.outputs[i]);
    if (value < read_last_.size()) return false;
    const int64_t writer = static_cast<int64_t>(value - read_last_.size());
    const size_t first = static_cast<size_t>(begins_[static_cast<size_t>(writer)]);
    const auto group = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.first == first; });
    if (!group->by_strips || read_last_[v] >= static_cast<int64_t>(group->last)) return false;
    if (!is_read_by_rows(*group, v)) return false;
    for (size_t k = static_cast<size_t>(writer) + 1; k < group->last; ++k) {
      for (const Source& s : sources_[k]) {
        const bool imported = std::find(group->imports.begin(), group->imports.end(), v) != group->imports.end();
        if (s.value == static_cast<int64_t>(v) && (s.in_tensor || !imported)) return false;
      }
    }
    return true;
  }

  void place(Geometry& g, const std::vector<Lender>& lenders) const {
    std::vector<Part> parts;
    for (size_t v = 0; v < uses_.size(); ++v) {
      const Use& u = uses_[v];
      const size_t first = static_cast<size_t>(u.first), last = static_cast<size_t>(u.last);
      const int64_t floats = u.needs_map && !partial_[v] ? floats_of(g, v) : 0;
      parts.push_back({floats, begins_[first], ends_[last]});
    }
    for (size_t k = 0; k < operators_.size(); ++k) {
      const int64_t layer = static_cast<int64_t>(k);
      parts.push_back({operators_[k]->temporary_floats(shapes_of(*operators_[k], g.shapes)), layer, layer});
    }
    const std::vector<size_t> owners = share(parts);
    std::vector<Room> rooms;
    for (const Lender& l : lenders) rooms.push_back(l.room);
    const Spread spread = spread_parts(parts, rooms, kAlignment);
    const auto place_of = [&](size_t p) { return Place{spread.rooms[p], spread.offsets[p]}; };
    g.floats = spread.size;
    for (const size_t owner : owners) g.maps.push_back(place_of(owner));
    for (size_t p = uses_.size(); p < parts.size(); ++p) g.temporaries.push_back(place_of(p));
    for (const Group& group : groups_) g.strips.push_back(place_strips(g, group));
  }

  Strips place_strips(Geometry& g, const Group& group) const {
    if (!group.by_strips) return {};
    constexpr int64_t kStripPixels = 768;
    const Shape& shape = g.shapes[static_cast<size_t>(program_.inputs) + group.first];
    const int64_t most = kStripPixels / std::max<int64_t>(shape.width, 1);
    Strips strips{std::clamp<int64_t>(most, 1, std::max<int64_t>(shape.height, 1))};
    std::vector<Part> parts;
    std::vector<size_t> values;
    for (size_t v = 0; v < uses_.size(); ++v) {
      if (!partial_[v] || !group.holds(uses_[v].first)) continue;
      // Imports come before all layers.
      const bool input = v < static_cast<size_t>(program_.inputs);
      const int64_t first = input ? static_cast<int64_t>(group.first) : uses_[v].first;
      parts.push_back({(strips.rows + 2) * layout_of(g, v).pitch, first, uses_[v].last});
      values.push_back(v);
    }
    const Placement placement = place_parts(parts, kAlignment);
    strips.floats = placement.size;
    for (size_t i = 0; i < values.size(); ++i) g.maps[values[i]] = {-1, placement.offsets[i]};
    return strips;
  }

  // Gives results the parts of inputs that nobody reads afterwards, where the operator allows it; the value of whose
  // part each uses.
  std::vector<size_t> share(std::vector<Part>& parts) const {
    std::vector<size_t> owners(uses_.size());
    for (size_t v = 0; v < owners.size(); ++v) owners[v] = v;
    for (const Group& group : groups_) {
      for (size_t k = group.first; k < group.last; ++k) {
        const size_t result = static_cast<size_t>(program_.inputs) + k;
        const std::vector<int64_t>& inputs = operators_[k]->layer().inputs;
        for (size_t i = 0; i < inputs.size() && owners[result] == result; ++i) {
          const size_t v = static_cast<size_t>(inputs[i]);
          Part& owner = parts[owners[v]];
          const bool ends = uses_[v].needs_map && uses_[v].last == static_cast<int64_t>(k);
          if (!ends || !operators_[k]->overwrites(i) || owner.size != parts[result].size) continue;
          if (bfloat_[v] || bfloat_[result] || partial_[v] || partial_[result]) continue;
          if (group.by_strips && !is_read_by_rows(group, v)) continue;
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
                 float* workspace, const std::vector<float*>& rooms) const {
    const auto memory_at = [&](const Place& p) {
      return (p.room < 0 ? workspace : rooms[static_cast<size_t>(p.room)]) + p.offset;
    };
    const auto map_of = [&](size_t v) {
      Map map;
      map.value = static_cast<int64_t>(v);
      map.layout = layout_of(g, v);
      if (v < in.size()) map.tensor = in[v].image(n);
      if (bfloat_[v]) {
        const MapLayout m = bfloat_layout(map.layout);
        map.bfloat = reinterpret_cast<uint16_t*>(memory_at(g.maps[v])) + m.origin();
        map.tensor = {map.bfloat, Dtype::kBFloat16, 1, m.pitch, m.step, m.step};
      } else if (uses_[v].needs_map && !partial_[v]) {
        map.ring = memory_at(g.maps[v]);
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
      run.temporary = memory_at(g.temporaries[k]);
      return run;
    };
    for (size_t i = 0; i < groups_.size(); ++i) {
      const Group& group = groups_[i];
      for (size_t v = 0; v < in.size(); ++v) {
        const bool first = uses_[v].needs_map && group.holds(uses_[v].first);
        if (!first || std::find(group.imports.begin(), group.imports.end(), v) != group.imports.end()) continue;
        const Map map = map_of(v);
        import_map(kernels_, map.tensor, map, exports_of(v));
      }
      std::vector<Step> steps;
      for (const size_t v : group.imports) {
        Run run;
        run.output = map_of(v);
        run.exports = exports_of(v);
        steps.push_back({nullptr, std::move(run)});
      }
      for (size_t k = group.first; k < group.last; ++k) {
        if (!is_done_elsewhere(k)) steps.push_back({operators_[k].get(), run_of(k)});
      }
      if (group.by_strips) {
        run_strips(g, g.strips[i], steps);
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

  void run_strips(const Geometry& g, const Strips& strips, const std::vector<Step>& steps) const {
    int64_t cost = 0;
    for (const Step& step : steps) {
      cost += step.op == nullptr ? import_cost(step.run.output.layout) : step.op->row_cost(step.run);
    }
    const int64_t height = steps.back().run.output.layout.height;
    parallel_ranges(height, cost, [&](int64_t y0, int64_t y1) {
      const Workspace memory(strips.floats);
      std::vector<Step> mine = steps;
      const auto move_to = [&](Map& map, int64_t y) {
        if (map.value < 0 || !partial_[static_cast<size_t>(map.value)]) return;
        map.ring = memory.data() + g.maps[static_cast<size_t>(map.value)].offset - y * map.layout.pitch;
      };
      for (int64_t y = y0; y < y1; y += strips.rows) {
        const int64_t end = std::min(y + strips.rows, y1);
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
  // Floats. In tensors, whose pages are small, maps are slower to read and write than in the workspace, where less is
  // no matter.
  static constexpr int64_t kLeastRoom = int64_t{1} << 20;

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
  std::vector<Group> groups_;                 // of all layers, in their order
  std::vector<bool> partial_;                 // of every value: its map is never whole
  std::vector<int64_t> begins_, ends_;        // of every layer: the first and the last one of its group
  std::vector<int64_t> read_last_, written_first_;
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

void execute_plan(int64_t handle, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
                  const Ownership& owned) {
  Plans::instance().get(handle)->execute(inputs, outputs, owned);
}

std::vector<int64_t> plan_spans(int64_t handle) { return Plans::instance().get(handle)->spans(); }

void release_plan(int64_t handle) { Plans::instance().remove(handle); }

}  // namespace esr
