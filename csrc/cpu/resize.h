// Enlargement by a whole factor, without aligned corners: along rows, then down columns. Included after modulate.h in
// every path_*.cpp.

// Positions beyond the ends of a row that a filter reads.
inline constexpr int64_t kResizeReach = 2;

ESR_INLINE int64_t within(int64_t i, int64_t size) { return i < 0 ? 0 : i < size ? i : size - 1; }

// A row with kResizeReach more positions at both ends, and the enlarged rows that rows [y0, y1) of the input need.
inline int64_t resize_planes_floats(const ResizePlanesArgs& a, int64_t rows) {
  return a.width + 2 * kResizeReach + (rows + 2 * kResizeReach) * a.width * a.factor;
}

template <int kCount>
void enlarge_row(const ResizePlanesArgs& a, const float* row, float* out) {
  for (int64_t phase = 0; phase < a.factor; ++phase) {
    const float* from = row + a.taps[phase].first;
    float* to = out + phase;
    for (int64_t x = 0; x < a.width; ++x, to += a.factor) {
      float sum = a.taps[phase].weights[0] * from[x];
      ESR_UNROLL for (int k = 1; k < kCount; ++k) sum += a.taps[phase].weights[k] * from[x + k];
      *to = sum;
    }
  }
}

// What rows [y0, y1) of the input become, in planes of floats.
inline void resize_planes(const ResizePlanesArgs& a, int64_t y0, int64_t y1) {
  const int64_t n = a.width * a.factor;
  float* const row = a.scratch + kResizeReach;
  float* const lines = row + a.width + kResizeReach;
  const int64_t low = within(y0 - kResizeReach, a.height), high = within(y1 - 1 + kResizeReach, a.height);
  for (int64_t c = 0; c < a.channels; ++c) {
    for (int64_t y = low; y <= high; ++y) {
      read_line(element(a.in, c, y, 0), a.in.dtype, a.in.column_stride, a.width, row);
      for (int64_t i = 0; i < kResizeReach; ++i) {
        row[-1 - i] = row[0];
        row[a.width + i] = row[a.width - 1];
      }
      float* line = lines + (y - low) * n;
      if (a.taps[0].count == 1) {
        enlarge_row<1>(a, row, line);
      } else if (a.taps[0].count == 2) {
        enlarge_row<2>(a, row, line);
      } else {
        enlarge_row<4>(a, row, line);
      }
    }
    float* out = a.out + c * a.plane;
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t phase = 0; phase < a.factor; ++phase, out += n) {
        const ResizeTaps& taps = a.taps[phase];
        const float* from[4];
        for (int k = 0; k < 4; ++k) from[k] = lines + (within(y + taps.first + k, a.height) - low) * n;
        for_vectors(n, [&](int64_t i, int count) {
          const auto part = [&](int k) {
            return count == kLanes ? load(from[k] + i) : load_partial(from[k] + i, count);
          };
          Vec sum = mul(set1(taps.weights[0]), part(0));
          for (int k = 1; k < taps.count; ++k) sum = fma(set1(taps.weights[k]), part(k), sum);
          if (count == kLanes) {
            store(out + i, sum);
          } else {
            store_partial(out + i, sum, count);
          }
        });
      }
    }
  }
}

// Rows [y0, y1) of the enlarged map, from a map in the internal layout to another.
inline void resize_map(const ResizeMapArgs& a, int64_t y0, int64_t y1) {
  for (int64_t y = y0; y < y1; ++y) {
    const ResizeTaps& down = a.taps[y % a.factor];
    const float* rows[4];
    for (int k = 0; k < 4; ++k) rows[k] = a.in + within(y / a.factor + down.first + k, a.height) * a.in_pitch;
    float* out = a.out + y * a.out_pitch;
    for (int64_t x = 0; x < a.width; ++x) {
      for (int64_t phase = 0; phase < a.factor; ++phase, out += a.step) {
        const ResizeTaps& across = a.taps[phase];
        int64_t at[4];
        for (int k = 0; k < 4; ++k) at[k] = within(x + across.first + k, a.width) * a.step;
        for (int64_t c = 0; c < a.step; c += kLanes) {
          Vec sum = zero();
          for (int j = 0; j < down.count; ++j) {
            Vec line = mul(set1(across.weights[0]), load(rows[j] + at[0] + c));
            for (int k = 1; k < across.count; ++k) line = fma(set1(across.weights[k]), load(rows[j] + at[k] + c), line);
            sum = fma(set1(down.weights[j]), line, sum);
          }
          store(out + c, sum);
        }
      }
    }
  }
}

// Some channels of pixels, in the internal layout, with zeros behind them.
inline void slice_rows(const SliceArgs& a, int64_t y0, int64_t y1) {
  for (int64_t y = y0; y < y1; ++y) {
    const float* in = a.in + y * a.in_pitch;
    float* out = a.out + y * a.out_pitch;
    for (int64_t x = 0; x < a.width; ++x, in += a.in_step, out += a.out_step) {
      for (int64_t c = 0; c < a.out_step; c += kLanes) {
        const int64_t left = a.channels - c;
        store(out + c, left >= kLanes ? load(in + c) : load_partial(in + c, static_cast<int>(left)));
      }
    }
  }
}
