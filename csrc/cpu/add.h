// Elementwise sum. Included after vec.h in every path_*.cpp.

inline void add_rows(const AddArgs& a, int64_t y0, int64_t y1) {
  for (int64_t y = y0; y < y1; ++y) {
    const int64_t row = y * a.pitch;
    for (int64_t i = 0; i < a.floats; i += kLanes) {
      store(a.out + row + i, add(load(a.a + row + i), load(a.b + row + i)));
    }
  }
}
