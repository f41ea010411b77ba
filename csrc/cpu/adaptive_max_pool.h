// Adaptive max pooling of outside tensors, in their own memory format. Included after layer_norm2d.h in every
// path_*.cpp.

// A NaN wins, as in PyTorch: vmax returns its second operand when one of them is NaN.
ESR_INLINE Vec larger(Vec a, Vec b) { return select_nan(a, a, vmax(a, b)); }
ESR_INLINE float larger(float a, float b) { return a > b || a != a ? a : b; }

// PyTorch's windows: of `count` along a side of `size`, the i-th; neighbours may overlap.
struct PoolWindow {
  int64_t first, end;

  static ESR_INLINE PoolWindow make(int64_t i, int64_t size, int64_t count) {
    return {i * size / count, ((i + 1) * size + count - 1) / count};
  }
};

// --- NCHW ------------------------------------------------------------------------------------------------------------

// A line of column maxima may be read so far behind its end.
ESR_INLINE int64_t pool_line_floats(const AdaptiveMaxPoolArgs& a) { return 2 * a.width + 2 * kLanes; }

inline int64_t adaptive_max_pool_planes_floats(const AdaptiveMaxPoolArgs& a) {
  return 2 * pool_line_floats(a) + a.out_width;
}

// A row of the result, as floats at the end of the scratch memory. The maxima of every column of the window are taken
// first, then, doubling the length, those of `length` columns from each on; two of these cover any window, since
// windows differ by one in width.
inline const float* pool_plane_row(const AdaptiveMaxPoolArgs& a, int64_t channel, int64_t out_y) {
  float* const line = a.scratch;
  float* const memory = line + pool_line_floats(a);
  float* const result = memory + pool_line_floats(a);
  const PoolWindow rows = PoolWindow::make(out_y, a.height, a.out_height);
  const bool direct = a.in.dtype == Dtype::kFloat32 && a.in.column_stride == 1;
  for (int64_t y = rows.first; y < rows.end; ++y) {
    const char* source = element(a.in, channel, y, 0);
    const float* row = reinterpret_cast<const float*>(source);
    if (!direct) {
      read_line(source, a.in.dtype, a.in.column_stride, a.width, memory);
      row = memory;
    }
    int64_t x = 0;
    if (y == rows.first) {
      for (; x + kLanes <= a.width; x += kLanes) store(line + x, load(row + x));
      for (; x < a.width; ++x) line[x] = row[x];
    } else {
      for (; x + kLanes <= a.width; x += kLanes) store(line + x, larger(load(row + x), load(line + x)));
      for (; x < a.width; ++x) line[x] = larger(row[x], line[x]);
    }
  }
  for (int64_t x = a.width; x < pool_line_floats(a); ++x) line[x] = -__builtin_inff();
  const int64_t narrowest = a.width / a.out_width + (a.width % a.out_width != 0 ? 1 : 0);
  int64_t length = 1;
  for (; 2 * length <= narrowest; length *= 2) {
    for (int64_t x = 0; x < a.width; x += kLanes) store(line + x, larger(load(line + x), load(line + x + length)));
  }
  for (int64_t i = 0; i < a.out_width; ++i) {
    const PoolWindow columns = PoolWindow::make(i, a.width, a.out_width);
    result[i] = larger(line[columns.first], line[columns.end - length]);
  }
  return result;
}

// Rows [r0, r1) of the result, counted through its channels.
inline void adaptive_max_pool_planes(const AdaptiveMaxPoolArgs& a, int64_t r0, int64_t r1) {
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t channel = r / a.out_height, y = r % a.out_height;
    const float* row = pool_plane_row(a, channel, y);
    write_line(row, a.out_width, element(a.out, channel, y, 0), a.out.dtype, a.out.column_stride);
  }
}

ESR_INLINE void add_element(const TensorView& t, int64_t channel, int64_t y, int64_t x, float value) {
  char* const p = element(t, channel, y, x);
  write_element(p, t.dtype, read_element(p, t.dtype) + value);
}

// Adds a channel's gradient, which is that of the first maximum in a window, or of the last NaN.
inline void adaptive_max_pool_plane_gradient(const AdaptiveMaxPoolGradientArgs& g, int64_t channel) {
  const AdaptiveMaxPoolArgs& a = g.pool;
  for (int64_t i = 0; i < a.out_height; ++i) {
    const float* maxima = pool_plane_row(a, channel, i);
    const PoolWindow rows = PoolWindow::make(i, a.height, a.out_height);
    for (int64_t j = 0; j < a.out_width; ++j) {
      const PoolWindow columns = PoolWindow::make(j, a.width, a.out_width);
      const float most = maxima[j];
      int64_t at_y = rows.first, at_x = columns.first;
      bool found = false;
      for (int64_t y = rows.first; y < rows.end && !found; ++y) {
        for (int64_t x = columns.first; x < columns.end && !found; ++x) {
          const float value = read_element(element(a.in, channel, y, x), a.in.dtype);
          if (value == most || value != value) {
            at_y = y;
            at_x = x;
            found = value == most;
          }
        }
      }
      const float grad = read_element(element(g.grad, channel, i, j), g.grad.dtype);
      add_element(g.to_x, channel, at_y, at_x, grad);
    }
  }
}

// --- channels_last ---------------------------------------------------------------------------------------------------

// Rows [y0, y1) of the result.
inline void adaptive_max_pool_pixels(const AdaptiveMaxPoolArgs& a, int64_t y0, int64_t y1) {
  for (int64_t i = y0; i < y1; ++i) {
    const PoolWindow rows = PoolWindow::make(i, a.height, a.out_height);
    for (int64_t j = 0; j < a.out_width; ++j) {
      const PoolWindow columns = PoolWindow::make(j, a.width, a.out_width);
      for_vectors(a.channels, [&](int64_t c, int n) {
        Vec most = load_elements(element(a.in, c, rows.first, columns.first), a.in.dtype, n);
        for (int64_t y = rows.first; y < rows.end; ++y) {
          for (int64_t x = columns.first; x < columns.end; ++x) {
            most = larger(load_elements(element(a.in, c, y, x), a.in.dtype, n), most);
          }
        }
        store_elements(element(a.out, c, i, j), a.out.dtype, most, n);
      });
    }
  }
}

// Adds the gradient of channels [first, first + count).
inline void adaptive_max_pool_pixels_gradient(const AdaptiveMaxPoolGradientArgs& g, int64_t first, int64_t count) {
  const AdaptiveMaxPoolArgs& a = g.pool;
  alignas(64) float at_y[kLanes], at_x[kLanes], grads[kLanes];
  for (int64_t i = 0; i < a.out_height; ++i) {
    const PoolWindow rows = PoolWindow::make(i, a.height, a.out_height);
    for (int64_t j = 0; j < a.out_width; ++j) {
      const PoolWindow columns = PoolWindow::make(j, a.width, a.out_width);
      for_vectors(count, [&](int64_t k, int n) {
        const int64_t c = first + k;
        Vec most = load_elements(element(a.in, c, rows.first, columns.first), a.in.dtype, n);
        // Distances from the window's corner, small enough for a float.
        Vec down = zero(), across = zero();
        for (int64_t y = rows.first; y < rows.end; ++y) {
          for (int64_t x = columns.first; x < columns.end; ++x) {
            const Vec value = load_elements(element(a.in, c, y, x), a.in.dtype, n);
            const Vec dy = set1(static_cast<float>(y - rows.first)), dx = set1(static_cast<float>(x - columns.first));
            const Vec rise = sub(most, value);  // NaN where either is, and where both are the same infinity
            down = select_nan(value, dy, select_negative(rise, dy, down));
            across = select_nan(value, dx, select_negative(rise, dx, across));
            most = larger(value, most);
          }
        }
        store(at_y, down);
        store(at_x, across);
        store(grads, load_elements(element(g.grad, c, i, j), g.grad.dtype, n));
        for (int lane = 0; lane < n; ++lane) {
          add_element(g.to_x, c + lane, rows.first + static_cast<int64_t>(at_y[lane]),
                      columns.first + static_cast<int64_t>(at_x[lane]), grads[lane]);
        }
      });
    }
  }
}
