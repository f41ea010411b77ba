// Mamba's recurrence over tokens. A vector is kLanes channels, each of which has states of its own: nothing is summed
// over lanes. Included after layer_norm2d.h in every path_*.cpp.

inline int64_t selective_scan_floats(const SelectiveScanArgs& args) {
  return kScanSteps * (3 * kLanes + 2 * args.states) + args.states * kLanes;
}

// What a block of steps has in scratch memory: a vector for each step, of b and c all states.
struct ScanBlock {
  float *delta = nullptr, *input = nullptr, *y = nullptr;  // `input` is delta u
  float *b = nullptr, *c = nullptr;
  int64_t steps = 0, states = 0;
};

// Brings kStates states, the first of which is `first`, through a block, and adds what they have in y.
template <int kStates>
ESR_INLINE void scan_states(const ScanBlock& block, const float* a, int64_t first, float* states) {
  a += first * kLanes;
  states += first * kLanes;
  const float *b = block.b + first, *c = block.c + first;
  Vec state[kStates];
  ESR_UNROLL for (int s = 0; s < kStates; ++s) state[s] = load(states + s * kLanes);
  for (int64_t t = 0; t < block.steps; ++t) {
    const Vec delta = load(block.delta + t * kLanes), input = load(block.input + t * kLanes);
    Vec y = load(block.y + t * kLanes);
    Vec decay[kStates];
    ESR_UNROLL for (int s = 0; s < kStates; ++s) decay[s] = mul(delta, load(a + s * kLanes));
    exp(decay);
    ESR_UNROLL for (int s = 0; s < kStates; ++s) state[s] = fma(decay[s], state[s], mul(input, set1(b[s])));
    ESR_UNROLL for (int s = 0; s < kStates; ++s) y = fma(state[s], set1(c[s]), y);
    store(block.y + t * kLanes, y);
    b += block.states;
    c += block.states;
  }
  ESR_UNROLL for (int s = 0; s < kStates; ++s) store(states + s * kLanes, state[s]);
}

// The whole length, for a vector of channels from `channel` on.
inline void selective_scan(const SelectiveScanArgs& args, int64_t channel) {
  const int n = lanes_left(args.channels - channel);
  const Vec bias = load(args.delta_bias + channel), d = load(args.d + channel);
  const float* a = args.a + channel * args.states;
  ScanBlock block;
  block.states = args.states;
  block.delta = args.scratch;
  block.input = block.delta + kScanSteps * kLanes;
  block.y = block.input + kScanSteps * kLanes;
  block.b = block.y + kScanSteps * kLanes;
  block.c = block.b + kScanSteps * args.states;
  float* const states = block.c + kScanSteps * args.states;
  for (int64_t s = 0; s < args.states; ++s) store(states + s * kLanes, zero());

  const auto read = [&](const TensorView& t, int64_t token) {
    return load_elements(element(t, channel, 0, token), t.dtype, n);
  };
  for (int64_t start = 0; start < args.length; start += kScanSteps) {
    block.steps = args.length - start < kScanSteps ? args.length - start : kScanSteps;
    for (int64_t t = 0; t < block.steps; ++t) {
      Vec delta = add(read(args.delta, start + t), bias);
      if (args.delta_softplus) delta = softplus(delta);
      const Vec u = read(args.u, start + t);
      store(block.delta + t * kLanes, delta);
      store(block.input + t * kLanes, mul(delta, u));
      store(block.y + t * kLanes, mul(d, u));
      const TensorView &b = args.b, &c = args.c;
      read_line(element(b, 0, 0, start + t), b.dtype, 1, args.states, block.b + t * args.states);
      read_line(element(c, 0, 0, start + t), c.dtype, 1, args.states, block.c + t * args.states);
    }
    int64_t s = 0;
    for (; s + kScanStates <= args.states; s += kScanStates) scan_states<kScanStates>(block, a, s, states);
    for (; s < args.states; ++s) scan_states<1>(block, a, s, states);
    for (int64_t t = 0; t < block.steps; ++t) {
      Vec y = load(block.y + t * kLanes);
      if (args.z.data != nullptr) y = mul(y, silu(read(args.z, start + t)));
      store_elements(element(args.out, channel, 0, start + t), args.out.dtype, y, n);
    }
  }
}
