// The parts of ESA that are not convolutions: pooling, and the last pass. Included after conv1x1.h in every path_*.cpp.

inline void max_pool(const MaxPoolArgs& a, int64_t y0, int64_t y1) {
  for (int64_t y = y0; y < y1; ++y) {
    for (int64_t x = 0; x < a.width; ++x) {
      const float* window = a.in + 3 * y * a.in_pitch + 3 * x * a.step;
      float* out = a.out + y * a.out_pitch + x * a.step;
      for (int64_t c = 0; c < a.step; c += kLanes) {
        Vec best = load(window + c);
        for (int i = 0; i < 7; ++i) {
          for (int j = 0; j < 7; ++j) {
            const Vec value = load(window + i * a.in_pitch + j * a.step + c);
            // A NaN wins, as in PyTorch: vmax returns its second operand when one of them is NaN.
            best = select_nan(best, best, vmax(best, value));
          }
        }
        store(out + c, best);
      }
    }
  }
}

// PyTorch's rule for align_corners = False.
struct BilinearIndex {
  int64_t low, high;
  float weight;  // of high

  static ESR_INLINE BilinearIndex make(int64_t target, float scale, int64_t size) {
    float source = scale * (static_cast<float>(target) + 0.5f) - 0.5f;
    if (source < 0.0f) source = 0.0f;
    BilinearIndex i;
    i.low = static_cast<int64_t>(source);
    if (i.low > size - 1) i.low = size - 1;
    i.high = i.low + (i.low < size - 1 ? 1 : 0);
    i.weight = source - static_cast<float>(i.low);
    if (i.weight > 1.0f) i.weight = 1.0f;
    return i;
  }
};

// One row of the enlarged map; `column` takes the row after the vertical interpolation.
inline void enlarge_row(const EsaGateArgs& a, int64_t y, float* column, float* out) {
  const BilinearIndex v =
      BilinearIndex::make(y, static_cast<float>(a.small_height) / static_cast<float>(a.height), a.small_height);
  const float* low = a.small + v.low * a.small_pitch;
  const float* high = a.small + v.high * a.small_pitch;
  const Vec wy = set1(v.weight), one_minus_wy = set1(1.0f - v.weight);
  for (int64_t i = 0; i < a.small_width * a.mid_step; i += kLanes) {
    store(column + i, fma(wy, load(high + i), mul(one_minus_wy, load(low + i))));
  }
  const float scale = static_cast<float>(a.small_width) / static_cast<float>(a.width);
  for (int64_t x = 0; x < a.width; ++x) {
    const BilinearIndex h = BilinearIndex::make(x, scale, a.small_width);
    const Vec wx = set1(h.weight), one_minus_wx = set1(1.0f - h.weight);
    const float* left = column + h.low * a.mid_step;
    const float* right = column + h.high * a.mid_step;
    for (int64_t c = 0; c < a.mid_step; c += kLanes) {
      store(out + x * a.mid_step + c, fma(wx, load(right + c), mul(one_minus_wx, load(left + c))));
    }
  }
}

// What ends a row of ESA: s = enlarged map + skip, then conv4 of it with an epilogue (the gate, or nothing).
struct EsaRows {
  const EsaGateArgs& a;
  float *column, *enlarged;
  Conv1x1Args skip, gate;
  FinishFunction finish_skip, finish_gate;

  EsaRows(const EsaGateArgs& args, ResidualMode mode)
      : a(args), column(a.scratch), enlarged(column + a.small_width * a.mid_step) {
    skip.inputs = 1;
    skip.in_step[0] = skip.out_step = a.mid_step;
    skip.cin[0] = a.mid;
    skip.width = a.width;
    skip.out_vectors = a.mid_step / kLanes;
    skip.weights = a.weights_f;
    skip.bias = a.bias_f;
    skip.epilogue.mode = ResidualMode::kPost;
    skip.epilogue.residual = enlarged;
    gate.inputs = 1;
    gate.in_step[0] = a.mid_step;
    gate.cin[0] = a.mid;
    gate.width = a.width;
    gate.out_step = a.x_step;
    gate.out_vectors = a.x_step / kLanes;
    gate.weights = a.weights_4;
    gate.bias = a.bias_4;
    gate.epilogue.mode = mode;
    finish_skip = finish_function(skip.epilogue);
    finish_gate = finish_function(gate.epilogue);
  }

  // Row y of s to `sum`, of the result to `out`.
  void run(int64_t y, float* sum, float* out) const {
    enlarge_row(a, y, column, enlarged);
    const float* c1 = a.c1 + y * a.c1_pitch;
    if (a.weights_f != nullptr) {
      Conv1x1Args s = skip;
      s.in[0] = c1;
      s.out = sum;
      conv1x1_row(s, 0, finish_skip);
    } else {
      for (int64_t i = 0; i < a.width * a.mid_step; i += kLanes) store(sum + i, add(load(enlarged + i), load(c1 + i)));
    }
    Conv1x1Args g = gate;
    g.in[0] = sum;
    g.out = out;
    g.epilogue.residual = g.epilogue.mode == ResidualMode::kGate ? a.x + y * a.x_pitch : nullptr;
    conv1x1_row(g, 0, finish_gate);
  }
};

inline void esa_gate(const EsaGateArgs& a, int64_t y0, int64_t y1) {
  const EsaRows rows(a, ResidualMode::kGate);
  float* sum = rows.enlarged + a.width * a.mid_step;
  for (int64_t y = y0; y < y1; ++y) rows.run(y, sum, a.out + y * a.out_pitch);
}
