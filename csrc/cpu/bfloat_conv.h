// Convolutions of bfloat16 maps, sums and epilogues in float32. Included after epilogue.h in path_amx.cpp.
//
// A pixel's result is a sum over chunks of 32 channels: the taps of a filter, or the inputs of a 1x1 convolution. It is
// computed for 32 pixels and 32 channels at a time, and while the sums of one such block are computed, the epilogue
// turns those of the block before it into results. Pixels behind the end of a row are computed and not stored.

// For results that are rounded to bfloat16: relative error 1.4e-4.
ESR_INLINE Vec quick_exp2(Vec x) {
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  Vec p = fma(set1(0.07802452f), f, set1(0.22606716f));
  p = fma(p, f, set1(0.69583356f));
  p = fma(p, f, set1(0.9999252f));
  return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}
ESR_INLINE Vec quick_sigmoid(Vec x) { return _mm512_rcp14_ps(add(set1(1.0f), quick_exp2(mul(x, set1(-1.44269504f))))); }

// The epilogue F with the quick sigmoid.
template <typename F>
struct Quick : F {};
template <>
struct Quick<Finish<Activation::kSilu, ResidualMode::kNone>> : Finish<Activation::kSilu, ResidualMode::kNone> {
  static ESR_INLINE Vec apply(Vec h, Vec, Vec) { return mul(h, quick_sigmoid(h)); }
};
template <>
struct Quick<Finish<Activation::kSilu, ResidualMode::kPre>> : Finish<Activation::kSilu, ResidualMode::kPre> {
  static ESR_INLINE Vec apply(Vec h, Vec r, Vec) { return mul(add(h, r), quick_sigmoid(add(h, r))); }
};
template <>
struct Quick<Finish<Activation::kSilu, ResidualMode::kPost>> : Finish<Activation::kSilu, ResidualMode::kPost> {
  static ESR_INLINE Vec apply(Vec h, Vec r, Vec) { return fma(h, quick_sigmoid(h), r); }
};
template <>
struct Quick<Finish<Activation::kNone, ResidualMode::kAttention>>
    : Finish<Activation::kNone, ResidualMode::kAttention> {
  static ESR_INLINE Vec apply(Vec h, Vec r, Vec) { return mul(add(h, r), sub(quick_sigmoid(h), set1(0.5f))); }
};
template <>
struct Quick<Finish<Activation::kNone, ResidualMode::kGate>> : Finish<Activation::kNone, ResidualMode::kGate> {
  static ESR_INLINE Vec apply(Vec h, Vec r, Vec) { return mul(r, quick_sigmoid(h)); }
};

constexpr int kBlockPixels = 32, kBlockChannels = 32;

ESR_INLINE Vec read_map(const float* p) { return load(p); }
ESR_INLINE Vec read_map(const uint16_t* p) { return load_bfloat(p); }

// The first `channels` of two vectors; in a bfloat16 map all 32, zeros behind the first `channels`.
ESR_INLINE void write_map(uint16_t* p, Vec low, Vec high, int channels) {
  const __mmask32 kept = static_cast<__mmask32>((uint64_t{1} << channels) - 1);
  _mm512_storeu_si512(p, (__m512i)_mm512_maskz_cvtne2ps_pbh(kept, high, low));
}
ESR_INLINE void write_map(float* p, Vec low, Vec high, int channels) {
  const auto mask = [](int n) { return static_cast<__mmask16>((1u << (n < 0 ? 0 : n)) - 1u); };
  _mm512_mask_storeu_ps(p, mask(channels < 16 ? channels : 16), low);
  _mm512_mask_storeu_ps(p + kLanes, mask(channels - 16), high);
}

// Takes the sums of one block to results, some pixels at a time.
template <typename F, typename Out, typename Residual>
struct Finisher {
  const float* sums = nullptr;  // [kBlockPixels][kBlockChannels]
  Out* out = nullptr;
  const Residual* residual = nullptr;
  int64_t step = 0, residual_step = 0;
  int channels = 0, left = 0;
  Vec slope;

  ESR_INLINE void advance(int pixels) {
    for (int n = pixels < left ? pixels : left; n > 0; --n, --left) {
      const bool both = channels > kLanes;
      const Residual* const r = residual;
      const auto finish = [&](int first) {
        const Vec h = load(sums + first);
        return F::apply(h, F::kReadsResidual ? read_map(r + first) : h, slope);
      };
      write_map(out, finish(0), both ? finish(kLanes) : zero(), channels);
      if constexpr (F::kReadsResidual) residual += residual_step;
      sums += kBlockChannels;
      out += step;
    }
  }
};

// Tiles of 16 pixels of 32 channels, of 32 channels of 16 results, and of 16 x 16 sums: all of 16 rows of 64 bytes.
struct alignas(64) TileConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfiguration kTileConfiguration;

// The sums of a block, of its first 16 pixels or of all; after each chunk `share` pixels of the block before.
template <bool kAll, typename Previous>
ESR_INLINE void sum_block(const BfloatConvArgs& a, int64_t y, int64_t x, const uint16_t* weights, const float* bias,
                          float* sums, Previous& previous, int share) {
  _tile_loadd(0, bias, 0);
  _tile_loadd(1, bias + kLanes, 0);
  if constexpr (kAll) {
    _tile_loadd(2, bias, 0);
    _tile_loadd(3, bias + kLanes, 0);
  }
  for (int64_t k = 0; k < a.count; ++k) {
    const BfloatChunk& c = a.chunks[k];
    const uint16_t* in = c.in + y * c.pitch + x * c.step;
    _tile_loadd(4, in, c.step * 2);
    _tile_loadd(6, weights, 64);
    _tile_loadd(7, weights + 512, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kAll) {
      _tile_loadd(5, in + 16 * c.step, c.step * 2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    weights += 2 * 512;
    previous.advance(share);
  }
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + kLanes, 128);
  if constexpr (kAll) {
    _tile_stored(2, sums + 16 * kBlockChannels, 128);
    _tile_stored(3, sums + 16 * kBlockChannels + kLanes, 128);
  }
}

template <typename F, typename Out, typename Residual>
void bfloat_conv_rows(const BfloatConvArgs& a, Out* out, const Residual* residual, int64_t y0, int64_t y1) {
  alignas(64) float sums[2][kBlockPixels * kBlockChannels];
  Finisher<F, Out, Residual> previous;
  int current = 0;
  const int share = static_cast<int>((kBlockPixels + a.count - 1) / a.count);
  _tile_loadconfig(&kTileConfiguration);
  for (int64_t c = 0; c < a.channels; c += kBlockChannels) {
    const uint16_t* weights = a.weights + c * a.count * kBlockChannels;
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t x = 0; x < a.width; x += kBlockPixels) {
        const int64_t pixels = a.width - x < kBlockPixels ? a.width - x : kBlockPixels;
        if (pixels > 16) {
          sum_block<true>(a, y, x, weights, a.bias + c, sums[current], previous, share);
        } else {
          sum_block<false>(a, y, x, weights, a.bias + c, sums[current], previous, share);
        }
        previous.advance(kBlockPixels);
        previous.sums = sums[current];
        previous.out = out + (y - a.out_first_row) * a.out_pitch + x * a.out_step + c;
        previous.step = a.out_step;
        if constexpr (F::kReadsResidual)
          previous.residual = residual + y * a.epilogue.residual_pitch + x * a.residual_step + c;
        previous.residual_step = a.residual_step;
        // A float map is filled up with the zeros' results, like those of other kernels.
        const int64_t left = (sizeof(Out) == 2 ? a.channels : (a.channels + kLanes - 1) / kLanes * kLanes) - c;
        previous.channels = static_cast<int>(left < kBlockChannels ? left : kBlockChannels);
        previous.left = static_cast<int>(pixels);
        previous.slope = set1(a.epilogue.slope);
        current = 1 - current;
      }
    }
  }
  previous.advance(kBlockPixels);
  _tile_release();  // other users of the tiles on this thread configure them anew
}

inline void bfloat_conv(const BfloatConvArgs& a, int64_t y0, int64_t y1) {
  with_finish(a.epilogue, [&](auto finish) {
    using F = Quick<decltype(finish)>;
    const auto with_residual = [&](auto* out) {
      if (!F::kReadsResidual || a.bfloat_residual != nullptr) {
        bfloat_conv_rows<F>(a, out, a.bfloat_residual, y0, y1);
      } else {
        bfloat_conv_rows<F>(a, out, a.epilogue.residual, y0, y1);
      }
    };
    if (a.bfloat_out != nullptr) {
      with_residual(a.bfloat_out);
    } else {
      with_residual(a.out);
    }
  });
}
