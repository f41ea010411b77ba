// Elementwise sum and product. Included after vec.h in every path_*.cpp.

template <typename F>
ESR_INLINE void pair_rows(const PairArgs& a, int64_t y0, int64_t y1, const F& f) {
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
