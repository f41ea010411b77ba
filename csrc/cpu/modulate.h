// x times an activation of the sum of maps that are enlarged to its size, on outside tensors in their own memory
// format; no enlarged map is ever in memory. Included after adaptive_max_pool.h in every path_*.cpp.
//
// A line is a part of a row as floats: in NCHW its pixels of one channel, in channels_last those of `step` channels.
// Every row of a map is enlarged along the row once, for all the rows of x that it reaches.

// Pixels of a line: few enough for all lines to stay in the first-level or second-level cache.
ESR_INLINE int64_t modulate_tile(const ModulateArgs& a) {
  constexpr int64_t kFloats = 2048, kLeast = 16;
  const int64_t pixels = kFloats / a.step < kLeast ? kLeast : kFloats / a.step;
  return a.width < pixels ? a.width : pixels;
}

ESR_INLINE int64_t modulate_line_floats(const ModulateArgs& a) { return modulate_tile(a) * a.step + kLanes; }

// The longest row of a map.
ESR_INLINE int64_t modulate_row_floats(const ModulateArgs& a) {
  int64_t most = modulate_tile(a);
  for (int64_t m = 0; m < a.count; ++m) {
    if (a.maps[m].resized && a.maps[m].width > most) most = a.maps[m].width;
  }
  return most * a.step + kLanes;
}

// Sum, x and result; two rows of each map; a row as it is.
inline int64_t modulate_floats(const ModulateArgs& a) {
  return (3 + 2 * a.count) * modulate_line_floats(a) + modulate_row_floats(a);
}

// Whether a line of the tensor is floats in a row.
ESR_INLINE bool is_line(const TensorView& t, bool planar, int64_t step) {
  return t.dtype == Dtype::kFloat32 && t.column_stride == (planar ? 1 : step);
}

// `n` pixels of a row from `x` on, where they are or in `memory`.
inline const float* modulate_line(const ModulateArgs& a, const TensorView& t, int64_t channel, int64_t y, int64_t x,
                                  int64_t n, float* memory) {
  const char* source = element(t, channel, y, x);
  if (is_line(t, a.planar, a.step)) return reinterpret_cast<const float*>(source);
  if (a.planar) {
    read_line(source, t.dtype, t.column_stride, n, memory);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      read_line(element(t, channel, y, x + i), t.dtype, 1, a.step, memory + i * a.step);
    }
  }
  return memory;
}

inline void write_modulated(const ModulateArgs& a, const float* line, const TensorView& t, int64_t channel, int64_t y,
                            int64_t x, int64_t n) {
  if (a.planar) return write_line(line, n, element(t, channel, y, x), t.dtype, t.column_stride);
  for (int64_t i = 0; i < n; ++i) write_line(line + i * a.step, a.step, element(t, channel, y, x + i), t.dtype, 1);
}

// A row of a map along the row of x: pixels [x0, x0 + n).
inline void enlarge_line(const ResizeTable& columns, bool blend, const float* row, int64_t step, int64_t x0, int64_t n,
                         float* out) {
  if (blend && step == 1) {
    for (int64_t i = 0; i < n; ++i) {
      const float weight = columns.weight[x0 + i];
      out[i] = (1.0f - weight) * row[columns.low[x0 + i]] + weight * row[columns.high[x0 + i]];
    }
    return;
  }
  for (int64_t i = 0; i < n; ++i, out += step) {
    const float* low = row + columns.low[x0 + i] * step;
    if (!blend) {
      if (step == 1) {
        *out = *low;
      } else {
        __builtin_memcpy(out, low, sizeof(float) * static_cast<size_t>(step));
      }
      continue;
    }
    const float* high = row + columns.high[x0 + i] * step;
    const float weight = columns.weight[x0 + i], rest = 1.0f - weight;
    for (int64_t c = 0; c < step; ++c) out[c] = rest * low[c] + weight * high[c];
  }
}

// Two lines that belong to rows of a map.
struct MapLines {
  float* line[2] = {};
  int64_t row[2] = {-1, -1};

  // Line 0 for row `low` and line 1 for row `high`; `take(k, row)` makes line k that of another row.
  template <typename F>
  ESR_INLINE void turn_to(int64_t low, int64_t high, const F& take) {
    if (row[0] != low) {
      if (row[1] == low) {
        float* const other = line[0];
        line[0] = line[1];
        line[1] = other;
        row[1] = row[0];
        row[0] = low;
      } else {
        take(0, low);
        row[0] = low;
      }
    }
    if (high != low && row[1] != high) {
      take(1, high);
      row[1] = high;
    }
  }
};

// What a tile of x needs of the maps.
struct ModulateTile {
  int64_t channel = 0, x0 = 0, pixels = 0;
  MapLines maps[kMostModulateMaps];
};

// The sum of the maps along row y, for whole vectors.
inline void sum_maps(const ModulateArgs& a, ModulateTile& tile, int64_t y, float* memory, float* sum) {
  const int64_t n = tile.pixels * a.step;
  for (int64_t m = 0; m < a.count; ++m) {
    const ModulateMapArgs& map = a.maps[m];
    if (!map.resized) {
      const float* line = modulate_line(a, map.map, tile.channel, y, tile.x0, tile.pixels, memory);
      for_vectors(n, [&](int64_t i, int k) {
        const Vec value = k == kLanes ? load(line + i) : load_partial(line + i, k);
        store(sum + i, m == 0 ? value : add(load(sum + i), value));
      });
      continue;
    }
    MapLines& lines = tile.maps[m];
    const int64_t low = map.rows.low[y], high = a.blend ? map.rows.high[y] : low;
    lines.turn_to(low, high, [&](int k, int64_t row) {
      const float* values = modulate_line(a, map.map, tile.channel, row, 0, map.width, memory);
      enlarge_line(map.columns, a.blend, values, a.step, tile.x0, tile.pixels, lines.line[k]);
    });
    if (!a.blend) {
      for (int64_t i = 0; i < n; i += kLanes) {
        const Vec value = load(lines.line[0] + i);
        store(sum + i, m == 0 ? value : add(load(sum + i), value));
      }
    } else {
      // The last row is mixed with itself: zero times an infinity is NaN in PyTorch too.
      const float* const other = lines.line[high == low ? 0 : 1];
      const Vec weight = set1(map.rows.weight[y]), rest = set1(1.0f - map.rows.weight[y]);
      for (int64_t i = 0; i < n; i += kLanes) {
        const Vec value = fma(weight, load(other + i), mul(rest, load(lines.line[0] + i)));
        store(sum + i, m == 0 ? value : add(load(sum + i), value));
      }
    }
  }
}

// f(tile) for the tiles of a row, with memory for their lines from `free` on.
template <typename F>
ESR_INLINE void for_modulate_tiles(const ModulateArgs& a, int64_t channel, float* free, const F& f) {
  const int64_t most = modulate_tile(a), floats = modulate_line_floats(a);
  for (int64_t x0 = 0; x0 < a.width; x0 += most) {
    ModulateTile tile;
    tile.channel = channel;
    tile.x0 = x0;
    tile.pixels = a.width - x0 < most ? a.width - x0 : most;
    for (int64_t m = 0; m < a.count; ++m) {
      for (int k = 0; k < 2; ++k) tile.maps[m].line[k] = free + (2 * m + k) * floats;
    }
    f(tile);
  }
}

template <Activation A>
void modulate_line_of(const float* x, const float* sum, int64_t n, Vec slope, float* out) {
  for_vectors(n, [&](int64_t i, int k) {
    const Vec gate = activate<A>(load(sum + i), slope);
    if (k == kLanes) {
      store(out + i, mul(load(x + i), gate));
    } else {
      store_partial(out + i, mul(load_partial(x + i, k), gate), k);
    }
  });
}

// Rows [r0, r1) of the result: of a channel in NCHW, counted through the channels, of all channels in channels_last.
inline void modulate_rows(const ModulateArgs& a, int64_t r0, int64_t r1) {
  const int64_t floats = modulate_line_floats(a);
  float* const sum = a.scratch;
  float* const x_memory = sum + floats;
  float* const out_memory = x_memory + floats;
  float* const row_memory = out_memory + floats;
  float* const free = row_memory + modulate_row_floats(a);
  const Vec slope = set1(a.slope);
  while (r0 < r1) {
    const int64_t channel = a.planar ? r0 / a.height : 0, y0 = r0 - channel * a.height;
    const int64_t y1 = y0 + (r1 - r0) < a.height ? y0 + (r1 - r0) : a.height;
    for_modulate_tiles(a, channel, free, [&](ModulateTile& tile) {
      for (int64_t y = y0; y < y1; ++y) {
        sum_maps(a, tile, y, row_memory, sum);
        const float* x = modulate_line(a, a.x, channel, y, tile.x0, tile.pixels, x_memory);
        const bool direct = is_line(a.out, a.planar, a.step);
        float* out = direct ? reinterpret_cast<float*>(element(a.out, channel, y, tile.x0)) : out_memory;
        with_activation(a.activation, [&](auto activation) {
          modulate_line_of<decltype(activation)::kValue>(x, sum, tile.pixels * a.step, slope, out);
        });
        if (!direct) write_modulated(a, out, a.out, channel, y, tile.x0, tile.pixels);
      }
    });
    r0 += y1 - y0;
  }
}

// --- gradients -------------------------------------------------------------------------------------------------------

// Sum, x, the gradient and what of it goes to x and to the sum; of each map two rows as they are read and two that are
// gathered, and the gradient to the whole map; a row as it is.
inline int64_t modulate_gradient_floats(const ModulateArgs& a) {
  int64_t planes = 0;
  for (int64_t m = 0; m < a.count; ++m) planes += a.maps[m].resized ? a.maps[m].height * a.maps[m].width * a.step : 0;
  return (5 + 4 * a.count) * modulate_line_floats(a) + modulate_row_floats(a) + planes;
}

template <Activation A>
void modulate_derivatives(const float* x, const float* sum, const float* grad, int64_t n, Vec slope, float* to_x,
                          float* to_sum) {
  for_vectors(n, [&](int64_t i, int k) {
    const Vec s = load(sum + i), g = k == kLanes ? load(grad + i) : load_partial(grad + i, k);
    const Vec value = k == kLanes ? load(x + i) : load_partial(x + i, k);
    store(to_x + i, mul(g, activate<A>(s, slope)));
    store(to_sum + i, differentiate<A>(s, mul(g, value), slope));
  });
}

// The transpose of enlarge_line, added to row `out`.
inline void shrink_line(const ResizeTable& columns, bool blend, const float* line, int64_t step, int64_t x0, int64_t n,
                        float* out) {
  for (int64_t i = 0; i < n; ++i, line += step) {
    float* low = out + columns.low[x0 + i] * step;
    if (!blend) {
      for (int64_t c = 0; c < step; ++c) low[c] += line[c];
      continue;
    }
    float* high = out + columns.high[x0 + i] * step;
    const float weight = columns.weight[x0 + i], rest = 1.0f - weight;
    for (int64_t c = 0; c < step; ++c) low[c] += rest * line[c];
    for (int64_t c = 0; c < step; ++c) high[c] += weight * line[c];
  }
}

// Gradients of an image for channels [channel, channel + a.step), all rows.
inline void modulate_gradient(const ModulateGradientArgs& g, int64_t channel) {
  const ModulateArgs& a = g.forward;
  const int64_t floats = modulate_line_floats(a);
  float* const sum = a.scratch;
  float* const x_memory = sum + floats;
  float* const grad_memory = x_memory + floats;
  float* const to_x = grad_memory + floats;
  float* const to_sum = to_x + floats;
  float* const row_memory = to_sum + floats;
  float* const lines = row_memory + modulate_row_floats(a);
  float* const gathered = lines + 2 * a.count * floats;
  float* free = gathered + 2 * a.count * floats;
  float* planes[kMostModulateMaps] = {};
  for (int64_t m = 0; m < a.count; ++m) {
    if (!a.maps[m].resized || g.to_maps[m].data == nullptr) continue;
    const int64_t size = a.maps[m].height * a.maps[m].width * a.step;
    planes[m] = free;
    __builtin_memset(free, 0, sizeof(float) * static_cast<size_t>(size));
    free += size;
  }
  const Vec slope = set1(a.slope);
  for_modulate_tiles(a, channel, lines, [&](ModulateTile& tile) {
    const int64_t n = tile.pixels * a.step;
    MapLines sums[kMostModulateMaps];
    const auto flush = [&](int64_t m, int k) {
      if (sums[m].row[k] < 0) return;
      float* row = planes[m] + sums[m].row[k] * a.maps[m].width * a.step;
      shrink_line(a.maps[m].columns, a.blend, sums[m].line[k], a.step, tile.x0, tile.pixels, row);
    };
    for (int64_t m = 0; m < a.count; ++m) {
      for (int k = 0; k < 2; ++k) sums[m].line[k] = gathered + (2 * m + k) * floats;
    }
    for (int64_t y = 0; y < a.height; ++y) {
      sum_maps(a, tile, y, row_memory, sum);
      const float* x = modulate_line(a, a.x, channel, y, tile.x0, tile.pixels, x_memory);
      const float* grad = modulate_line(a, g.grad, channel, y, tile.x0, tile.pixels, grad_memory);
      with_activation(a.activation, [&](auto activation) {
        modulate_derivatives<decltype(activation)::kValue>(x, sum, grad, n, slope, to_x, to_sum);
      });
      if (g.to_x.data != nullptr) write_modulated(a, to_x, g.to_x, channel, y, tile.x0, tile.pixels);
      for (int64_t m = 0; m < a.count; ++m) {
        const ModulateMapArgs& map = a.maps[m];
        if (g.to_maps[m].data == nullptr) continue;
        if (!map.resized) {
          write_modulated(a, to_sum, g.to_maps[m], channel, y, tile.x0, tile.pixels);
          continue;
        }
        const int64_t low = map.rows.low[y], high = a.blend ? map.rows.high[y] : low;
        sums[m].turn_to(low, high, [&](int k, int64_t) {
          flush(m, k);
          __builtin_memset(sums[m].line[k], 0, sizeof(float) * static_cast<size_t>(floats));
        });
        const float weight = high == low ? 0.0f : map.rows.weight[y];
        for (int k = 0; k < (high == low ? 1 : 2); ++k) {
          float* line = sums[m].line[k];
          const Vec w = set1(k == 0 ? 1.0f - weight : weight);
          for (int64_t i = 0; i < n; i += kLanes) store(line + i, fma(w, load(to_sum + i), load(line + i)));
        }
      }
    }
    for (int64_t m = 0; m < a.count; ++m) {
      if (planes[m] == nullptr) continue;
      for (int k = 0; k < 2; ++k) flush(m, k);
    }
  });
  for (int64_t m = 0; m < a.count; ++m) {
    if (planes[m] == nullptr) continue;
    const int64_t width = a.maps[m].width;
    for (int64_t y = 0; y < a.maps[m].height; ++y) {
      write_modulated(a, planes[m] + y * width * a.step, g.to_maps[m], channel, y, 0, width);
    }
  }
}
