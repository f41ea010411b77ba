// Gradients of the depthwise convolution, group by group in one pass through the rows: what the forward pass did not
// keep is computed again. Included after depthwise_conv.h and derivative.h in every path_*.cpp.

// Of act(a) * b, for a gradient g to it.
template <Activation A>
void gate_derivative(const float* a, const float* b, const float* g, float* to_a, float* to_b, int64_t floats,
                     Vec slope) {
  for (int64_t i = 0; i < floats; i += kLanes) {
    const Vec x = load(a + i), grad = load(g + i);
    store(to_a + i, differentiate<A>(x, mul(grad, load(b + i)), slope));
    store(to_b + i, mul(grad, activate<A>(x, slope)));
  }
}

// Adds the sums over a line of what every tap sees times g; K taps in a row.
template <typename L, int K>
void add_tap_sums(const DepthwiseConvArgs& a, const float* const* rows, const float* g, int64_t width, float* sums) {
  // Of planes the last vector may be partial: what lies behind a line is not to be multiplied, not even with zero.
  const int64_t count = L::kStep == 1 ? width / kLanes : width;
  const int rest = L::kStep == 1 ? static_cast<int>(width % kLanes) : 0;
  const int64_t shift = a.dilation * L::kStep;
  for (int64_t ky = 0; ky < a.kernel_height; ++ky) {
    for (int v = 0; v < L::kVectors; ++v) {
      const float* x = rows[ky] + v * kLanes;
      const float* grad = g + v * kLanes;
      Vec even[K], odd[K];
      ESR_UNROLL for (int k = 0; k < K; ++k) even[k] = odd[k] = zero();
      int64_t i = 0;
      for (; i + 2 <= count; i += 2) {
        const Vec g0 = load(grad + i * L::kStride), g1 = load(grad + (i + 1) * L::kStride);
        ESR_UNROLL for (int k = 0; k < K; ++k) {
          even[k] = fma(load(x + i * L::kStride + k * shift), g0, even[k]);
          odd[k] = fma(load(x + (i + 1) * L::kStride + k * shift), g1, odd[k]);
        }
      }
      if (i < count) {
        const Vec g0 = load(grad + i * L::kStride);
        ESR_UNROLL for (int k = 0; k < K; ++k) even[k] = fma(load(x + i * L::kStride + k * shift), g0, even[k]);
      }
      if (rest > 0) {
        const int64_t last = count * L::kStride;
        const Vec g0 = load_partial(grad + last, rest);
        ESR_UNROLL for (int k = 0; k < K; ++k) { odd[k] = fma(load_partial(x + last + k * shift, rest), g0, odd[k]); }
      }
      for (int k = 0; k < K; ++k) {
        float* sum = sums + (ky * K + k) * L::kVectors * kLanes + v * kLanes;
        store(sum, add(load(sum), add(even[k], odd[k])));
      }
    }
  }
}

template <typename L>
void add_weight_sums(const DepthwiseConvArgs& a, const float* const* rows, const float* g, int64_t width, float* sums) {
  switch (a.kernel_width) {
    case 1:
      return add_tap_sums<L, 1>(a, rows, g, width, sums);
    case 3:
      return add_tap_sums<L, 3>(a, rows, g, width, sums);
    case 5:
      return add_tap_sums<L, 5>(a, rows, g, width, sums);
    default:
      return add_tap_sums<L, 7>(a, rows, g, width, sums);
  }
}

// Adds the sums over a line, whose end is filled up with zeros.
template <typename L>
void add_line_sums(const float* g, int64_t width, float* sums) {
  const int64_t count = L::strides(width);
  for (int v = 0; v < L::kVectors; ++v) {
    Vec total = zero();
    for (int64_t i = 0; i < count; ++i) total = add(total, load(g + i * L::kStride + v * kLanes));
    store(sums + v * kLanes, add(load(sums + v * kLanes), total));
  }
}

// The rows that are alive at a time, of x and of the gradient to the convolution's result.
template <typename L>
int64_t gradient_floats(const DepthwiseConvArgs& a) {
  const int64_t up = reach(a.kernel_height, a.dilation), pad = reach(a.kernel_width, a.dilation);
  const int64_t rings = (3 * up + 2 + 2 * up + 2) * ring_pitch<L>(a.width, pad);
  return (a.gated ? 2 : 1) * rings + 3 * line_floats<L>(a.width);
}

template <typename L>
void depthwise_group_gradient(const DepthwiseConvGradientArgs& args, DepthwiseGroup g, const float* const* turned) {
  const DepthwiseConvArgs& a = args.conv;
  const int64_t up = reach(a.kernel_height, a.dilation), pad = reach(a.kernel_width, a.dilation);
  const int64_t floats = line_floats<L>(a.width);
  const int halves = a.gated ? 2 : 1;
  const bool again = a.gated || a.activation != Activation::kNone;
  const bool reads_x = again || args.wants_weight;
  const DepthwiseTile tile{0, a.width};
  float* const grad = a.scratch;
  float* const h[2] = {grad + floats, grad + 2 * floats};
  float* free = grad + 3 * floats;
  LineRing to_h[2];
  for (int k = 0; k < halves; ++k) {
    if (reads_x) g.rings[k] = make_ring<L>(a.width, a.height, pad, 3 * up + 1, free);
    to_h[k] = make_ring<L>(a.width, a.height, pad, 2 * up + 1, free);
  }
  const float* rows[kDepthwiseMostTaps];
  const int64_t sums = (taps(a) + 1) * L::kVectors * kLanes;
  __builtin_memset(args.sums, 0, sizeof(float) * static_cast<size_t>(halves * sums));
  const Vec slope = set1(a.slope);

  // Row `y + up` of the gradient to the convolution's result, then row y of what needs the rows around it.
  for (int64_t y = -up; y < a.height; ++y) {
    const int64_t r = y + up;
    if (r < a.height) {
      for (; reads_x && g.next <= r + up && g.next < a.height; ++g.next) {
        for (int k = 0; k < halves; ++k) {
          read_tile_line<L>(a, a.in, k * a.channels + g.channel, g.count, g.next, tile, g.rings[k].line(g.next));
        }
      }
      float* const to[2] = {to_h[0].line(r) + pad * L::kStep, a.gated ? to_h[1].line(r) + pad * L::kStep : nullptr};
      L::read(args.grad, g.channel, g.count, r, 0, a.width, again ? grad : to[0]);
      if (again) {
        for (int k = 0; k < halves; ++k) {
          rows_around(a, g.rings[k], r, rows);
          convolve_line<L>(a, rows, g.weights[k], g.bias[k], a.width, h[k]);
        }
        with_activation(a.activation, [&](auto activation) {
          constexpr Activation kActivation = decltype(activation)::kValue;
          if (a.gated) {
            gate_derivative<kActivation>(h[0], h[1], grad, to[0], to[1], floats, slope);
          } else {
            for (int64_t i = 0; i < floats; i += kLanes) {
              store(to[0] + i, differentiate<kActivation>(load(h[0] + i), load(grad + i), slope));
            }
          }
        });
        const size_t behind = static_cast<size_t>(floats - a.width * L::kStep) * sizeof(float);
        for (int k = 0; k < halves; ++k) __builtin_memset(to[k] + a.width * L::kStep, 0, behind);
      }
    }
    if (y < 0) continue;
    for (int k = 0; k < halves; ++k) {
      const float* own = to_h[k].line(y) + pad * L::kStep;
      float* const total = args.sums + k * sums;
      if (args.wants_weight) {
        rows_around(a, g.rings[k], y, rows);
        add_weight_sums<L>(a, rows, own, a.width, total);
      }
      if (args.wants_bias) add_line_sums<L>(own, a.width, total + sums - L::kVectors * kLanes);
      if (args.to_x.data == nullptr) continue;
      rows_around(a, to_h[k], y, rows);
      convolve_line<L>(a, rows, turned[k], args.no_bias, a.width, h[0]);
      L::write(h[0], args.to_x, k * a.channels + g.channel, g.count, y, 0, a.width);
    }
  }
}

inline int64_t depthwise_plane_gradient_floats(const DepthwiseConvArgs& a) { return gradient_floats<PlanarLines>(a); }

// Channel c of the result, in NCHW.
inline void depthwise_plane_gradient(const DepthwiseConvGradientArgs& args, int64_t c) {
  const float* turned[2] = {};
  const DepthwiseGroup g = plane_group(args.conv, c);
  for (int k = 0; k < (args.conv.gated ? 2 : 1); ++k) {
    turned[k] = args.turned + (k * args.conv.channels + c) * taps(args.conv);
  }
  depthwise_group_gradient<PlanarLines>(args, g, turned);
}

inline int64_t depthwise_pixels_gradient_floats(const DepthwiseConvArgs& a) { return gradient_floats<WidestLines>(a); }

// Group k of the result's channels, in channels_last.
inline void depthwise_pixels_gradient(const DepthwiseConvGradientArgs& args, int64_t k) {
  const DepthwiseGroup g = pixel_group(args.conv, k);
  const float* turned[2] = {};
  for (int half = 0; half < (args.conv.gated ? 2 : 1); ++half) {
    const int64_t packed = half * depthwise_groups(args.conv) + k;
    turned[half] = args.turned + packed * taps(args.conv) * kDepthwiseGroup;
  }
  with_pixel_lines(g.count, [&](auto lines) { depthwise_group_gradient<decltype(lines)>(args, g, turned); });
}
