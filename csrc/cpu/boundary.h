// Between outside tensors (any strides, float32, float16 or bfloat16) and the internal layout.
// Included after vec.h in every path_*.cpp.

ESR_INLINE int64_t element_bytes(Dtype d) { return d == Dtype::kFloat32 ? 4 : 2; }

ESR_INLINE char* element(const TensorView& t, int64_t channel, int64_t row, int64_t column) {
  const int64_t offset = channel * t.channel_stride + row * t.row_stride + column * t.column_stride;
  return static_cast<char*>(t.data) + offset * element_bytes(t.dtype);
}

ESR_INLINE float read_element(const char* p, Dtype d) {
  if (d == Dtype::kFloat32) return *reinterpret_cast<const float*>(p);
  const uint16_t bits = *reinterpret_cast<const uint16_t*>(p);
  return d == Dtype::kFloat16 ? half_to_float(bits) : bfloat_to_float(bits);
}

ESR_INLINE void write_element(char* p, Dtype d, float x) {
  if (d == Dtype::kFloat32) {
    *reinterpret_cast<float*>(p) = x;
  } else {
    *reinterpret_cast<uint16_t*>(p) = d == Dtype::kFloat16 ? float_to_half(x) : float_to_bfloat(x);
  }
}

// n <= kLanes adjacent elements; zeros in the other lanes.
ESR_INLINE Vec load_elements(const char* p, Dtype d, int n) {
  const float* floats = reinterpret_cast<const float*>(p);
  const uint16_t* bits = reinterpret_cast<const uint16_t*>(p);
  if (n == kLanes)
    return d == Dtype::kFloat32 ? load(floats) : d == Dtype::kFloat16 ? load_half(bits) : load_bfloat(bits);
  if (d == Dtype::kFloat32) return load_partial(floats, n);
  alignas(64) float values[kLanes] = {};
  for (int i = 0; i < n; ++i) values[i] = d == Dtype::kFloat16 ? half_to_float(bits[i]) : bfloat_to_float(bits[i]);
  return load(values);
}

ESR_INLINE void store_elements(char* p, Dtype d, Vec v, int n) {
  float* floats = reinterpret_cast<float*>(p);
  uint16_t* bits = reinterpret_cast<uint16_t*>(p);
  if (d == Dtype::kFloat32) {
    if (n == kLanes) {
      store(floats, v);
    } else {
      store_partial(floats, v, n);
    }
    return;
  }
  alignas(64) uint16_t values[kLanes];
  uint16_t* const to = n == kLanes ? bits : values;
  if (d == Dtype::kFloat16) {
    store_half(to, v);
  } else {
    store_bfloat(to, v);
  }
  if (n < kLanes) __builtin_memcpy(bits, values, sizeof(uint16_t) * static_cast<size_t>(n));
}

// n elements, `stride` elements apart, to floats.
inline void read_line(const char* p, Dtype d, int64_t stride, int64_t n, float* out) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) {
      const uint16_t* bits = reinterpret_cast<const uint16_t*>(p) + i;
      store(out + i, d == Dtype::kFloat32   ? load(reinterpret_cast<const float*>(p) + i)
                     : d == Dtype::kFloat16 ? load_half(bits)
                                            : load_bfloat(bits));
    }
  }
  if (d == Dtype::kFloat32) {
    const float* const from = reinterpret_cast<const float*>(p);
    // The parts of complex numbers: with a known stride the compiler makes vectors of them.
    for (; stride == 2 && i < n; ++i) out[i] = from[2 * i];
    for (; i < n; ++i) out[i] = from[stride * i];
    return;
  }
  const int64_t bytes = stride * element_bytes(d);
  for (; i < n; ++i) out[i] = read_element(p + i * bytes, d);
}

inline void write_line(const float* in, int64_t n, char* p, Dtype d, int64_t stride) {
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= n; i += kLanes) {
      if (d == Dtype::kFloat32) {
        store(reinterpret_cast<float*>(p) + i, load(in + i));
      } else if (d == Dtype::kFloat16) {
        store_half(reinterpret_cast<uint16_t*>(p) + i, load(in + i));
      } else {
        store_bfloat(reinterpret_cast<uint16_t*>(p) + i, load(in + i));
      }
    }
  }
  const int64_t bytes = stride * element_bytes(d);
  for (; i < n; ++i) write_element(p + i * bytes, d, in[i]);
}

ESR_INLINE Vec normalize(const ImportArgs& a, int64_t channel, Vec x) {
  return a.scale == nullptr ? x : mul(sub(x, load(a.shift + channel)), load(a.scale + channel));
}

// A row whose channels are adjacent in memory.
inline void import_interleaved(const ImportArgs& a, int64_t y, float* out) {
  const TensorView& t = a.tensor;
  const float* in = reinterpret_cast<const float*>(element(t, 0, y, 0));
  int64_t in_step = t.column_stride;
  if (t.dtype != Dtype::kFloat32) {
    if (in_step == a.channels) {
      read_line(element(t, 0, y, 0), t.dtype, 1, a.width * a.channels, a.scratch);
    } else {
      for (int64_t x = 0; x < a.width; ++x) {
        read_line(element(t, 0, y, x), t.dtype, 1, a.channels, a.scratch + x * a.channels);
      }
    }
    in = a.scratch;
    in_step = a.channels;
  }
  for (int64_t x = 0; x < a.width; ++x) {
    int64_t c = 0;
    for (; c + kLanes <= a.channels; c += kLanes) {
      store(out + x * a.step + c, normalize(a, c, load(in + x * in_step + c)));
    }
    if (c < a.channels) {
      const Vec rest = load_partial(in + x * in_step + c, static_cast<int>(a.channels - c));
      store(out + x * a.step + c, normalize(a, c, rest));
    }
  }
}

// A row of planes: kLanes channels at a time, transposed in blocks of kLanes pixels.
inline void import_planar(const ImportArgs& a, int64_t y, float* out) {
  const TensorView& t = a.tensor;
  const bool direct = t.dtype == Dtype::kFloat32 && t.column_stride == 1;
  for (int64_t c = 0; c < a.step; c += kLanes) {
    const int count = static_cast<int>(a.channels - c < kLanes ? a.channels - c : kLanes);
    const float* line[kLanes];
    for (int k = 0; k < count; ++k) {
      const char* source = element(t, c + k, y, 0);
      line[k] = reinterpret_cast<const float*>(source);
      if (!direct) {
        read_line(source, t.dtype, t.column_stride, a.width, a.scratch + k * a.width);
        line[k] = a.scratch + k * a.width;
      }
    }
    for (int64_t x = 0; x < a.width; x += kLanes) {
      const int pixels = static_cast<int>(a.width - x < kLanes ? a.width - x : kLanes);
      Vec block[kLanes];
      for (int k = 0; k < kLanes; ++k) {
        block[k] = k >= count ? zero() : (pixels == kLanes ? load(line[k] + x) : load_partial(line[k] + x, pixels));
      }
      transpose(block);
      for (int p = 0; p < pixels; ++p) store(out + (x + p) * a.step + c, normalize(a, c, block[p]));
    }
  }
}

inline void import_rows(const ImportArgs& a, int64_t y0, int64_t y1) {
  for (int64_t y = y0; y < y1; ++y) {
    float* out = a.out + y * a.pitch;
    if (a.tensor.channel_stride == 1 && a.tensor.column_stride != 1) {
      import_interleaved(a, y, out);
    } else {
      import_planar(a, y, out);
    }
  }
}

inline void export_interleaved(const ExportArgs& a, int64_t y, const float* in) {
  const TensorView& t = a.tensor;
  for (int64_t x = 0; x < a.width; ++x) {
    char* target = element(t, 0, y, x);
    const float* pixel = in + x * a.step;
    if (t.dtype == Dtype::kFloat32) {
      float* out = reinterpret_cast<float*>(target);
      int64_t c = 0;
      for (; c + kLanes <= a.channels; c += kLanes) store(out + c, load(pixel + c));
      if (c < a.channels) store_partial(out + c, load(pixel + c), static_cast<int>(a.channels - c));
    } else if (t.filled > 0) {
      uint16_t* out = reinterpret_cast<uint16_t*>(target);
      for (int64_t c = 0; c < t.filled; c += kLanes) {
        const int64_t left = a.channels - c;
        const Vec v = left > 0 ? load(pixel + c) : zero();
        store_bfloat(out + c, left >= kLanes || left <= 0 ? v : keep_lanes(v, static_cast<int>(left)));
      }
    } else {
      write_line(pixel, a.channels, target, t.dtype, 1);
    }
  }
}

inline void export_planar(const ExportArgs& a, int64_t y, const float* in) {
  const TensorView& t = a.tensor;
  const bool direct = t.dtype == Dtype::kFloat32 && t.column_stride == 1;
  for (int64_t c = 0; c < a.channels; c += kLanes) {
    const int count = static_cast<int>(a.channels - c < kLanes ? a.channels - c : kLanes);
    float* line[kLanes];
    for (int k = 0; k < count; ++k) {
      line[k] = direct ? reinterpret_cast<float*>(element(t, c + k, y, 0)) : a.scratch + k * a.width;
    }
    for (int64_t x = 0; x < a.width; x += kLanes) {
      const int pixels = static_cast<int>(a.width - x < kLanes ? a.width - x : kLanes);
      Vec block[kLanes];
      for (int p = 0; p < kLanes; ++p) block[p] = p < pixels ? load(in + (x + p) * a.step + c) : zero();
      transpose(block);
      for (int k = 0; k < count; ++k) {
        if (pixels == kLanes) {
          store(line[k] + x, block[k]);
        } else {
          store_partial(line[k] + x, block[k], pixels);
        }
      }
    }
    if (direct) continue;
    for (int k = 0; k < count; ++k) write_line(line[k], a.width, element(t, c + k, y, 0), t.dtype, t.column_stride);
  }
}

inline void export_rows(const ExportArgs& a, int64_t y0, int64_t y1) {
  for (int64_t y = y0; y < y1; ++y) {
    const float* in = a.in + (y - a.first_row) * a.pitch;
    if (a.tensor.channel_stride == 1 && a.tensor.column_stride != 1) {
      export_interleaved(a, y, in);
    } else {
      export_planar(a, y, in);
    }
  }
}

// `R` values of each of `width` pixels, `step` floats apart, to one line.
template <int R>
void gather_line(const float* in, int64_t step, int64_t width, float* out) {
  for (int64_t x = 0; x < width; ++x) __builtin_memcpy(out + x * R, in + x * step, sizeof(float) * R);
}

inline void shuffle_line(const float* in, int64_t step, int64_t width, int64_t factor, float* out) {
  switch (factor) {
    case 1:
      return gather_line<1>(in, step, width, out);
    case 2:
      return gather_line<2>(in, step, width, out);
    case 3:
      return gather_line<3>(in, step, width, out);
    case 4:
      return gather_line<4>(in, step, width, out);
    default:
      for (int64_t x = 0; x < width; ++x) {
        for (int64_t j = 0; j < factor; ++j) out[x * factor + j] = in[x * step + j];
      }
  }
}

inline void shuffle_rows(const ShuffleArgs& a, int64_t y0, int64_t y1) {
  const int64_t n = a.width * a.factor;
  const bool direct = a.tensor.dtype == Dtype::kFloat32 && a.tensor.column_stride == 1;
  for (int64_t y = y0; y < y1; ++y) {
    const float* in = a.in + (y - a.first_row) * a.pitch;
    for (int64_t colour = 0; colour < a.colours; ++colour) {
      for (int64_t i = 0; i < a.factor; ++i) {
        char* target = element(a.tensor, colour, y * a.factor + i, 0);
        float* line = direct ? reinterpret_cast<float*>(target) : a.scratch;
        shuffle_line(in + (colour * a.factor + i) * a.factor, a.step, a.width, a.factor, line);
        if (a.residual.data != nullptr) {
          const TensorView& r = a.residual;
          const char* source = element(r, colour, y * a.factor + i, 0);
          const float* values = reinterpret_cast<const float*>(source);
          if (r.dtype != Dtype::kFloat32 || r.column_stride != 1) {
            read_line(source, r.dtype, r.column_stride, n, a.scratch + n);
            values = a.scratch + n;
          }
          int64_t k = 0;
          for (; k + kLanes <= n; k += kLanes) store(line + k, add(load(line + k), load(values + k)));
          for (; k < n; ++k) line[k] += values[k];
        }
        if (!direct) write_line(line, n, target, a.tensor.dtype, a.tensor.column_stride);
      }
    }
  }
}

inline void unshuffle_rows(const UnshuffleArgs& a, int64_t y0, int64_t y1) {
  const int64_t n = a.width * a.factor, channels = a.colours * a.factor * a.factor;
  for (int64_t y = y0; y < y1; ++y) {
    float* out = a.out + y * a.pitch;
    if (channels < a.step) {
      for (int64_t x = 0; x < a.width; ++x) store(out + (x + 1) * a.step - kLanes, zero());
    }
    for (int64_t colour = 0; colour < a.colours; ++colour) {
      for (int64_t i = 0; i < a.factor; ++i) {
        const char* source = element(a.tensor, colour, y * a.factor + i, 0);
        const float* line = reinterpret_cast<const float*>(source);
        if (a.tensor.dtype != Dtype::kFloat32 || a.tensor.column_stride != 1) {
          read_line(source, a.tensor.dtype, a.tensor.column_stride, n, a.scratch);
          line = a.scratch;
        }
        float* to = out + (colour * a.factor + i) * a.factor;
        for (int64_t x = 0; x < a.width; ++x) {
          for (int64_t j = 0; j < a.factor; ++j) to[x * a.step + j] = line[x * a.factor + j];
        }
      }
    }
  }
}
