// Weights in the order in which the kernels read them. All results are padded with zeros to whole vectors.
#pragma once

#include <cstdint>
#include <vector>

namespace esr {

// A weight tensor as contiguous floats.
struct Weight {
  std::vector<int64_t> shape;
  std::vector<float> values;
};

// Floats aligned to a cache line.
class PackedFloats {
 public:
  PackedFloats() = default;
  explicit PackedFloats(int64_t count);
  PackedFloats(PackedFloats&&) = default;
  PackedFloats& operator=(PackedFloats&&) = default;
  const float* data() const { return aligned_; }
  float* data() { return aligned_; }

 private:
  std::vector<float> storage_;
  float* aligned_ = nullptr;
};

// [block][3 * 3][cin][vectors of the block * lanes], from [cout, cin, 3, 3].
PackedFloats pack_conv3x3(const Weight& w, int64_t lanes);

// [block][6 * 6][cin][vectors of the block * lanes]: G w G^T of Winograd F(4x4, 3x3), computed in double.
PackedFloats pack_winograd(const Weight& w, int64_t lanes);

// [block][cin][vectors of the block * lanes], from [cout, cin, 1, 1].
PackedFloats pack_conv1x1(const Weight& w, int64_t lanes);

// [block][cin][rows], from [cout, cin, 1, 1]: blocks of `rows` output channels.
PackedFloats pack_rows(const Weight& w, int64_t rows);

// [3 * 3][channels], from [channels, 1, 3, 3].
PackedFloats pack_depthwise(const Weight& w, int64_t lanes);

// [channels]; zeros when there is no vector.
PackedFloats pack_vector(const float* values, int64_t channels, int64_t lanes);

}  // namespace esr
