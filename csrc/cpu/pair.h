// Elementwise sum and product. Included after vec.h in every path_*.cpp.

// Of a `b` whose pixels are not those of `a`: with one channel for all, or one pixel for all.
template <bool kOneChannel, typename F>
void pair_rows_broadcast(const PairArgs& a, int64_t y0, int64_t y1, const F& f) {
  for (int64_t y = y0; y < y1; ++y) {
    const float* b = a.b + y * a.b_pitch;
    const int64_t row = y * a.pitch;
    for (int64_t x = 0; x < a.floats; x += a.step, b += a.b_step) {
      for (int64_t c = 0; c < a.step; c += kLanes) {
        const Vec result = f(load(a.a + row + x + c), kOneChannel ? set1(b[0]) : load(b + c));
        const int64_t rest = a.channels - c;
        store(a.out + row + x + c, kOneChannel && rest < kLanes ? keep_lanes(result, static_cast<int>(rest)) : result);
      }
    }
  }
}

template <typename F>
ESR_INLINE void pair_rows(const PairArgs& a, int64_t y0, int64_t y1, const F& f) {
  if (a.one_channel) return pair_rows_broadcast<true>(a, y0, y1, f);
  if (a.b_step == 0) return pair_rows_broadcast<false>(a, y0, y1, f);
  for (int64_t y = y0; y < y1; ++y) {
    const int64_t row = y * a.pitch;
    for (int64_t i = 0; i < a.floats; i += kLanes) {
      store(a.out + row + i, f(load(a.a + row + i), load(a.b + row + i)));
    }
  }
}

inline void add_rows(const PairArgs& a, int64_t y0, int64_t y1) {
  pair_rows(a, y0, y1, [](Vec x, Vec y) { return add(x, y); });
}

inline void multiply_rows(const PairArgs& a, int64_t y0, int64_t y1) {
  pair_rows(a, y0, y1, [](Vec x, Vec y) { return mul(x, y); });
}
