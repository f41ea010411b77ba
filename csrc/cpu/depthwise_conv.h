// Depthwise convolution of outside tensors, in their own memory format. Included after boundary.h in every path_*.cpp.
//
// A line is one row of a group of channels as floats, with zeros beside it. In NCHW a group is a channel and a line its
// pixels; in channels_last a group is up to kDepthwiseGroup channels, and a line has V vectors for every pixel.

struct PlanarLines {
  static constexpr int64_t kStep = 1;         // floats of a pixel
  static constexpr int64_t kStride = kLanes;  // from a vector to the next one that has the same weights
  static constexpr int kVectors = 1;          // with weights of their own
  static constexpr int64_t kTap = 1;          // floats of weights for a tap

  static ESR_INLINE Vec weight(const float* w) { return set1(*w); }
  static ESR_INLINE int64_t strides(int64_t width) { return (width + kLanes - 1) / kLanes; }
  static void read(const TensorView& t, int64_t channel, int64_t, int64_t y, int64_t x, int64_t width, float* line) {
    read_line(element(t, channel, y, x), t.dtype, t.column_stride, width, line);
  }
  static void write(const float* line, const TensorView& t, int64_t channel, int64_t, int64_t y, int64_t x,
                    int64_t width) {
    write_line(line, width, element(t, channel, y, x), t.dtype, t.column_stride);
  }
};

template <int V>
struct PixelLines {
  static constexpr int64_t kStep = V * kLanes, kStride = V * kLanes;
  static constexpr int kVectors = V;
  static constexpr int64_t kTap = kDepthwiseGroup;

  static ESR_INLINE Vec weight(const float* w) { return load(w); }
  static ESR_INLINE int64_t strides(int64_t width) { return width; }
  static void read(const TensorView& t, int64_t channel, int64_t count, int64_t y, int64_t x, int64_t width,
                   float* line) {
    const char* pixel = element(t, channel, y, x);
    const int64_t bytes = t.column_stride * element_bytes(t.dtype), vector = kLanes * element_bytes(t.dtype);
    const int rest = static_cast<int>(count - (V - 1) * kLanes);
    for (int64_t i = 0; i < width; ++i, pixel += bytes, line += kStep) {
      ESR_UNROLL for (int v = 0; v < V - 1; ++v) {
        store(line + v * kLanes, load_elements(pixel + v * vector, t.dtype, kLanes));
      }
      store(line + (V - 1) * kLanes, load_elements(pixel + (V - 1) * vector, t.dtype, rest));
    }
  }
  static void write(const float* line, const TensorView& t, int64_t channel, int64_t count, int64_t y, int64_t x,
                    int64_t width) {
    char* pixel = element(t, channel, y, x);
    const int64_t bytes = t.column_stride * element_bytes(t.dtype), vector = kLanes * element_bytes(t.dtype);
    const int rest = static_cast<int>(count - (V - 1) * kLanes);
    for (int64_t i = 0; i < width; ++i, pixel += bytes, line += kStep) {
      ESR_UNROLL for (int v = 0; v < V - 1; ++v) {
        store_elements(pixel + v * vector, t.dtype, load(line + v * kLanes), kLanes);
      }
      store_elements(pixel + (V - 1) * vector, t.dtype, load(line + (V - 1) * kLanes), rest);
    }
  }
};

// Calls f with the lines of a group of `count` channels in channels_last.
template <typename F>
ESR_INLINE void with_pixel_lines(int64_t count, const F& f) {
  static_assert(kDepthwiseGroup <= 2 * kLanes);
  if constexpr (kDepthwiseGroup > kLanes) {
    if (count > kLanes) return f(PixelLines<2>{});
  }
  f(PixelLines<1>{});
}

// Whole vectors of a line of `width` pixels.
template <typename L>
ESR_INLINE int64_t line_floats(int64_t width) {
  return L::strides(width) * L::kStride;
}

// The latest lines of an image, with `pad` pixels on both sides; behind them one of zeros.
struct LineRing {
  float* data = nullptr;
  int64_t pitch = 0, lines = 0, height = 0;

  float* line(int64_t y) const { return data + y % lines * pitch; }
  const float* padded(int64_t y) const { return y < 0 || y >= height ? data + lines * pitch : line(y); }
};

template <typename L>
ESR_INLINE int64_t ring_pitch(int64_t width, int64_t pad) {
  return line_floats<L>(width) + 2 * pad * L::kStep;
}

// Takes its memory, all zeros, from `free`.
template <typename L>
LineRing make_ring(int64_t width, int64_t height, int64_t pad, int64_t lines, float*& free) {
  const LineRing ring{free, ring_pitch<L>(width, pad), lines, height};
  const int64_t floats = (lines + 1) * ring.pitch;
  __builtin_memset(free, 0, sizeof(float) * static_cast<size_t>(floats));
  free += floats;
  return ring;
}

// A filter of `height` x `width` taps, each `dilation` pixels from the next.
ESR_INLINE int64_t reach(int64_t side, int64_t dilation) { return side / 2 * dilation; }

ESR_INLINE void rows_around(const DepthwiseConvArgs& a, const LineRing& ring, int64_t y, const float** rows) {
  for (int64_t k = 0; k < a.kernel_height; ++k) rows[k] = ring.padded(y + (k - a.kernel_height / 2) * a.dilation);
}

template <typename L, int P>
ESR_INLINE void convolve_run(const DepthwiseConvArgs& a, const float* const* rows, int64_t offset, const float* weights,
                             Vec bias, float* out) {
  Vec sum[P];
  ESR_UNROLL for (int i = 0; i < P; ++i) sum[i] = bias;
  for (int64_t ky = 0; ky < a.kernel_height; ++ky) {
    const float* in = rows[ky] + offset;
    for (int64_t kx = 0; kx < a.kernel_width; ++kx) {
      const Vec w = L::weight(weights);
      ESR_UNROLL for (int i = 0; i < P; ++i) sum[i] = fma(load(in + i * L::kStride), w, sum[i]);
      in += a.dilation * L::kStep;
      weights += L::kTap;
    }
  }
  ESR_UNROLL for (int i = 0; i < P; ++i) store(out + i * L::kStride, sum[i]);
}

// `rows` begin at the pixel under the filter's corner for pixel 0 of `out`.
template <typename L>
void convolve_line(const DepthwiseConvArgs& a, const float* const* rows, const float* weights, const float* bias,
                   int64_t width, float* out) {
  constexpr int P = kPixels1;
  const int64_t count = L::strides(width);
  for (int v = 0; v < L::kVectors; ++v, weights += kLanes, bias += kLanes) {
    const Vec b = L::weight(bias);
    int64_t i = 0;
    const auto run = [&](auto pixels) {
      constexpr int kCount = decltype(pixels)::kValue;
      for (; i + kCount <= count; i += kCount) {
        const int64_t offset = i * L::kStride + v * kLanes;
        convolve_run<L, kCount>(a, rows, offset, weights, b, out + offset);
      }
    };
    run(Constant<int, P>{});
    run(Constant<int, P / 4>{});
    if (P / 4 > 1) run(Constant<int, 1>{});
  }
}

// The activation, and the gate where there is one, in place.
template <Activation A>
void finish_line_of(float* h, const float* gate, int64_t floats, Vec slope) {
  if (gate == nullptr) {
    if (A == Activation::kNone) return;
    for (int64_t i = 0; i < floats; i += kLanes) store(h + i, activate<A>(load(h + i), slope));
  } else {
    for (int64_t i = 0; i < floats; i += kLanes) store(h + i, mul(activate<A>(load(h + i), slope), load(gate + i)));
  }
}

inline void finish_line(const DepthwiseConvArgs& a, float* h, const float* gate, int64_t floats) {
  const Vec slope = set1(a.slope);
  with_activation(a.activation,
                  [&](auto activation) { finish_line_of<decltype(activation)::kValue>(h, gate, floats, slope); });
}

// A group of the result's channels on its way through the rows of a tile; with a gate, also the second half's.
struct DepthwiseGroup {
  int64_t channel = 0, count = 0;
  int64_t next = 0;  // the next row to read
  LineRing rings[2];
  const float* weights[2] = {};
  const float* bias[2] = {};
};

// Pixels [x0, x1) of every row.
struct DepthwiseTile {
  int64_t x0 = 0, x1 = 0;
  int64_t width() const { return x1 - x0; }
};

template <typename L>
int64_t group_floats(const DepthwiseConvArgs& a, int64_t width) {
  const int64_t lines = 2 * reach(a.kernel_height, a.dilation) + 1, pad = reach(a.kernel_width, a.dilation);
  return (a.gated ? 2 : 1) * (lines + 1) * ring_pitch<L>(width, pad);
}

template <typename L>
void start_group(const DepthwiseConvArgs& a, DepthwiseGroup& g, int64_t width, int64_t y0, float*& free) {
  const int64_t up = reach(a.kernel_height, a.dilation), pad = reach(a.kernel_width, a.dilation);
  for (int k = 0; k < (a.gated ? 2 : 1); ++k) {
    g.rings[k] = make_ring<L>(width, a.height, pad, 2 * up + 1, free);
  }
  g.next = y0 > up ? y0 - up : 0;
}

// Reads row y of the tile and what the filter sees beside it.
template <typename L>
void read_tile_line(const DepthwiseConvArgs& a, const TensorView& t, int64_t channel, int64_t count, int64_t y,
                    const DepthwiseTile& tile, float* line) {
  const int64_t pad = reach(a.kernel_width, a.dilation);
  const int64_t left = tile.x0 < pad ? tile.x0 : pad, right = a.width - tile.x1 < pad ? a.width - tile.x1 : pad;
  L::read(t, channel, count, y, tile.x0 - left, left + tile.width() + right, line + (pad - left) * L::kStep);
}

template <typename L>
void depthwise_row(const DepthwiseConvArgs& a, DepthwiseGroup& g, const DepthwiseTile& tile, int64_t y, float* line,
                   float* gate) {
  const int64_t up = reach(a.kernel_height, a.dilation), width = tile.width();
  const float* rows[kDepthwiseMostTaps];
  for (; g.next <= y + up && g.next < a.height; ++g.next) {
    read_tile_line<L>(a, a.in, g.channel, g.count, g.next, tile, g.rings[0].line(g.next));
    if (!a.gated) continue;
    read_tile_line<L>(a, a.in, a.channels + g.channel, g.count, g.next, tile, g.rings[1].line(g.next));
  }
  if (a.gated) {
    rows_around(a, g.rings[1], y, rows);
    convolve_line<L>(a, rows, g.weights[1], g.bias[1], width, gate);
  }
  rows_around(a, g.rings[0], y, rows);
  convolve_line<L>(a, rows, g.weights[0], g.bias[0], width, line);
  finish_line(a, line, a.gated ? gate : nullptr, line_floats<L>(width));
  L::write(line, a.out, g.channel, g.count, y, tile.x0, width);
}

inline int64_t taps(const DepthwiseConvArgs& a) { return a.kernel_height * a.kernel_width; }

// --- NCHW ------------------------------------------------------------------------------------------------------------

inline int64_t depthwise_planes_floats(const DepthwiseConvArgs& a) {
  return group_floats<PlanarLines>(a, a.width) + 2 * line_floats<PlanarLines>(a.width);
}

inline DepthwiseGroup plane_group(const DepthwiseConvArgs& a, int64_t channel) {
  DepthwiseGroup g;
  g.channel = channel;
  g.count = 1;
  for (int half = 0; half < (a.gated ? 2 : 1); ++half) {
    g.weights[half] = a.weights + (half * a.channels + channel) * taps(a);
    g.bias[half] = a.bias + half * a.channels + channel;
  }
  return g;
}

// Rows [r0, r1) of the result, counted through its channels.
inline void depthwise_planes(const DepthwiseConvArgs& a, int64_t r0, int64_t r1) {
  const DepthwiseTile tile{0, a.width};
  float* line = a.scratch;
  float* gate = line + line_floats<PlanarLines>(a.width);
  while (r0 < r1) {
    DepthwiseGroup g = plane_group(a, r0 / a.height);
    const int64_t y0 = r0 % a.height, y1 = y0 + (r1 - r0) < a.height ? y0 + (r1 - r0) : a.height;
    float* free = gate + line_floats<PlanarLines>(a.width);
    start_group<PlanarLines>(a, g, a.width, y0, free);
    for (int64_t y = y0; y < y1; ++y) depthwise_row<PlanarLines>(a, g, tile, y, line, gate);
    r0 += y1 - y0;
  }
}

// --- channels_last ---------------------------------------------------------------------------------------------------

using WidestLines = PixelLines<kDepthwiseGroup / kLanes>;

// Groups whose lines are kept at once.
constexpr int64_t kMostGroups = 8;

inline int64_t depthwise_groups(const DepthwiseConvArgs& a) {
  return (a.channels + kDepthwiseGroup - 1) / kDepthwiseGroup;
}

inline int64_t groups_at_once(const DepthwiseConvArgs& a) {
  const int64_t groups = depthwise_groups(a);
  return groups < kMostGroups ? groups : kMostGroups;
}

// The lines of a tile should stay in the second-level cache, better in the first.
inline int64_t tile_width(const DepthwiseConvArgs& a) {
  constexpr int64_t kFloats = 16384, kLeast = 16, kMost = 64;
  const int64_t lines = groups_at_once(a) * (a.gated ? 2 : 1) * (2 * reach(a.kernel_height, a.dilation) + 1);
  const int64_t width = kFloats / (lines * kDepthwiseGroup);
  return width < kLeast ? kLeast : (width > kMost ? kMost : width);
}

inline int64_t depthwise_pixels_floats(const DepthwiseConvArgs& a) {
  const int64_t width = tile_width(a);
  return groups_at_once(a) * group_floats<WidestLines>(a, width) + 2 * line_floats<WidestLines>(width);
}

inline DepthwiseGroup pixel_group(const DepthwiseConvArgs& a, int64_t k) {
  DepthwiseGroup g;
  g.channel = k * kDepthwiseGroup;
  g.count = a.channels - g.channel < kDepthwiseGroup ? a.channels - g.channel : kDepthwiseGroup;
  for (int half = 0; half < (a.gated ? 2 : 1); ++half) {
    const int64_t packed = half * depthwise_groups(a) + k;
    g.weights[half] = a.weights + packed * taps(a) * kDepthwiseGroup;
    g.bias[half] = a.bias + packed * kDepthwiseGroup;
  }
  return g;
}

// Rows [y0, y1) of all channels, the groups of a row one after another: memory is read once, in order.
inline void depthwise_pixels(const DepthwiseConvArgs& a, int64_t y0, int64_t y1) {
  const int64_t most = tile_width(a), groups = depthwise_groups(a);
  float* line = a.scratch;
  float* gate = line + line_floats<WidestLines>(most);
  float* const rings = gate + line_floats<WidestLines>(most);
  for (int64_t x0 = 0; x0 < a.width; x0 += most) {
    const DepthwiseTile tile{x0, x0 + most < a.width ? x0 + most : a.width};
    for (int64_t first = 0; first < groups; first += kMostGroups) {
      const int64_t count = groups - first < kMostGroups ? groups - first : kMostGroups;
      DepthwiseGroup at_once[kMostGroups];
      float* free = rings;
      for (int64_t k = 0; k < count; ++k) {
        at_once[k] = pixel_group(a, first + k);
        with_pixel_lines(at_once[k].count,
                         [&](auto lines) { start_group<decltype(lines)>(a, at_once[k], tile.width(), y0, free); });
      }
      for (int64_t y = y0; y < y1; ++y) {
        for (int64_t k = 0; k < count; ++k) {
          with_pixel_lines(at_once[k].count,
                           [&](auto lines) { depthwise_row<decltype(lines)>(a, at_once[k], tile, y, line, gate); });
        }
      }
    }
  }
}

// --- rows of the engine's maps: channels last in whole vectors, beside a row one pixel of zeros ----------------------

// The part of the filter that lies in the image.
struct MapTaps {
  const float* rows[kDepthwiseMostTaps];  // pixel 0 of each row that there is
  int64_t row_count = 0;
  int64_t pixel = 0, columns = 0;  // floats to what the first column of taps sees of the first pixel, and columns
  int64_t column = 0;              // floats from a column's pixel to the next one's
  int64_t weights = 0, weights_row = 0;
};

// Adds P pixels, `step` floats apart, of a vector of channels.
template <int P>
ESR_INLINE void sum_taps(const MapTaps& t, int64_t channel, int64_t step, const float* weights, Vec (&sum)[P]) {
  // One pointer for three pixels, as in multiply.h.
  constexpr int kPointers = (P + 2) / 3;
  for (int64_t ky = 0; ky < t.row_count; ++ky, weights += t.weights_row) {
    const float* group[kPointers];
    ESR_UNROLL for (int g = 0; g < kPointers; ++g) group[g] = t.rows[ky] + t.pixel + channel + 3 * g * step;
    const float* w = weights;
    for (int64_t kx = 0; kx < t.columns; ++kx, w += kDepthwiseGroup) {
      const Vec weight = load(w);
      ESR_UNROLL for (int p = 0; p < P; ++p) sum[p] = fma(load(group[p / 3] + p % 3 * step), weight, sum[p]);
      ESR_UNROLL for (int g = 0; g < kPointers; ++g) group[g] += t.column;
    }
  }
}

// P pixels of all channels.
template <Activation A, bool kGated, int P>
void depthwise_map_pixels(const DepthwiseConvArgs& a, const MapTaps& t, float* out) {
  const int64_t step = a.in.column_stride, out_step = a.out.column_stride;
  const int64_t taps_in_group = taps(a) * kDepthwiseGroup;
  const int64_t half = depthwise_groups(a);  // groups before those of the second half
  const Vec slope = set1(a.slope);
  for (int64_t c = 0; c < a.channels; c += kLanes) {
    const int64_t group = c / kDepthwiseGroup, lane = c % kDepthwiseGroup;
    const auto sum_half = [&](int64_t k, Vec(&sum)[P]) {
      const Vec bias = load(a.bias + (k * half + group) * kDepthwiseGroup + lane);
      ESR_UNROLL for (int p = 0; p < P; ++p) sum[p] = bias;
      const float* weights = a.weights + (k * half + group) * taps_in_group + lane + t.weights;
      sum_taps<P>(t, k * a.channels + c, step, weights, sum);
    };
    Vec sum[P];
    sum_half(0, sum);
    if constexpr (kGated) {
      alignas(64) float h[P * kLanes];
      ESR_UNROLL for (int p = 0; p < P; ++p) store(h + p * kLanes, sum[p]);
      sum_half(1, sum);
      ESR_UNROLL for (int p = 0; p < P; ++p) sum[p] = mul(activate<A>(load(h + p * kLanes), slope), sum[p]);
    } else {
      ESR_UNROLL for (int p = 0; p < P; ++p) sum[p] = activate<A>(sum[p], slope);
    }
    if (a.channels - c < kLanes) {
      const int rest = static_cast<int>(a.channels - c);
      ESR_UNROLL for (int p = 0; p < P; ++p) sum[p] = keep_lanes(sum[p], rest);
    }
    ESR_UNROLL for (int p = 0; p < P; ++p) store(out + p * out_step + c, sum[p]);
  }
}

template <Activation A, bool kGated>
void depthwise_map_row(const DepthwiseConvArgs& a, const float* const* rows, float* out) {
  const int64_t step = a.in.column_stride, left = a.kernel_width / 2;
  MapTaps t;
  int64_t ky = 0;
  while (rows[ky] == nullptr) ++ky;  // the middle one is there
  t.column = a.dilation * step;
  t.weights_row = a.kernel_width * kDepthwiseGroup;
  const int64_t weights = ky * t.weights_row;
  for (; ky < a.kernel_height && rows[ky] != nullptr; ++ky) t.rows[t.row_count++] = rows[ky];
  const auto run = [&](auto pixels, int64_t x, int64_t kx, int64_t columns) {
    t.pixel = (x + (kx - left) * a.dilation) * step;
    t.weights = weights + kx * kDepthwiseGroup;
    t.columns = columns;
    depthwise_map_pixels<A, kGated, decltype(pixels)::kValue>(a, t, out + x * a.out.column_stride);
  };
  // Taps beyond the pixel of zeros are left out, pixel by pixel.
  const auto edge = [&](int64_t x0, int64_t x1) {
    for (int64_t x = x0; x < x1; ++x) {
      const int64_t before = x / a.dilation, behind = (a.width - 1 - x) / a.dilation;
      const int64_t kx = before < left ? left - before : 0;
      run(Constant<int, 1>{}, x, kx, (behind < left ? left + behind + 1 : a.kernel_width) - kx);
    }
  };
  constexpr int P = kPixels1;
  const int64_t side = left * a.dilation > 1 ? left * a.dilation - 1 : 0;
  const int64_t x0 = side < a.width ? side : a.width, x1 = a.width - x0 > x0 ? a.width - x0 : x0;
  edge(0, x0);
  int64_t x = x0;
  for (; x + P <= x1; x += P) run(Constant<int, P>{}, x, 0, a.kernel_width);
  if (x < x1 && x1 - x0 >= P) {
    run(Constant<int, P>{}, x1 - P, 0, a.kernel_width);  // some of them again
  } else {
    for (; x < x1; ++x) run(Constant<int, 1>{}, x, 0, a.kernel_width);
  }
  edge(x1, a.width);
}

// Row y of the result, in float32, from the input's rows under the filter, null beyond the image. What fills up the
// last vector of a pixel becomes zeros.
inline void depthwise_map(const DepthwiseConvArgs& a, const float* const* rows, int64_t y) {
  float* const out = static_cast<float*>(a.out.data) + y * a.out.row_stride;
  with_activation(a.activation, [&](auto activation) {
    constexpr Activation A = decltype(activation)::kValue;
    a.gated ? depthwise_map_row<A, true>(a, rows, out) : depthwise_map_row<A, false>(a, rows, out);
  });
}
