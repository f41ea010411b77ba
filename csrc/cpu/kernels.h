// The interface between the engine and the kernels of one instruction set: plain structures and functions over a range
// of rows, so that an executor may schedule rows in any order.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/activation.h"
#include "../common/resize.h"
#include "../common/statistic.h"

namespace esr {

enum class Dtype : int32_t { kFloat32, kFloat16, kBFloat16 };

// One image of an outside tensor; strides in elements.
struct TensorView {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t channel_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;
  int64_t filled = 0;  // of a bfloat16 map of the engine's: up to where a pixel's channels are filled up with zeros
};

struct Epilogue {
  Activation activation = Activation::kNone;
  ResidualMode mode = ResidualMode::kNone;
  float slope = 0.0f;
  bool product = false;             // only h * residual
  const float* residual = nullptr;  // pixel (0, 0); its pixels have the result's step
  int64_t residual_pitch = 0;
};

// A 3x3 convolution, also the strided one of ESA: output pixel (y, x) reads the 3x3 pixels from `in` + y * in_row_step
// + x * in_pixel_step on.
struct Conv3x3Args {
  const float* in = nullptr;
  int64_t in_pitch = 0, in_step = 0;
  int64_t in_row_step = 0, in_pixel_step = 0;
  int64_t cin = 0;
  float* out = nullptr;  // pixel 0 of row `out_first_row`
  int64_t out_first_row = 0;
  int64_t out_pitch = 0, out_step = 0;
  int64_t width = 0;
  int64_t out_vectors = 0;
  const float* weights = nullptr;  // [block][3 * 3][cin][vectors of the block * lanes]
  const float* bias = nullptr;     // [out_vectors * lanes]
  Epilogue epilogue;
};

// The same convolution (stride 1) by Winograd F(4x4, 3x3), over rows of 4x4 tiles.
struct WinogradArgs {
  const float* in = nullptr;  // pixel (0, 0)
  int64_t in_pitch = 0, in_step = 0;
  int64_t cin = 0;
  float* out = nullptr;  // pixel 0 of row `out_first_row`
  int64_t out_first_row = 0;
  int64_t out_pitch = 0, out_step = 0;
  int64_t width = 0, height = 0;
  int64_t out_vectors = 0;
  const float* weights = nullptr;         // [block][36][cin][vectors of the block * lanes]
  const float* direct_weights = nullptr;  // [block][9][cin][vectors of the block * lanes]
  const float* bias = nullptr;
  float* scratch = nullptr;  // winograd_scratch_floats()
  Epilogue epilogue;
};

struct Conv1x1Args {
  static constexpr int64_t kMaxInputs = 64;
  int64_t inputs = 0;
  const float* in[kMaxInputs] = {};  // pixel (0, 0) of each
  int64_t in_pitch[kMaxInputs] = {}, in_step[kMaxInputs] = {}, cin[kMaxInputs] = {};
  float* out = nullptr;
  int64_t out_pitch = 0, out_step = 0;
  int64_t width = 0;
  int64_t out_vectors = 0;
  const float* weights = nullptr;  // [block][sum of cin][vectors of the block * lanes]
  const float* bias = nullptr;
  Epilogue epilogue;
};

// 32 channels of what a convolution of bfloat16 maps reads.
struct BfloatChunk {
  const uint16_t* in = nullptr;  // for pixel (0, 0) of the result
  int64_t pitch = 0, step = 0;
};

// A convolution of bfloat16 maps, 3x3 or 1x1. Behind the last pixel that a row reads lie 31 more that may be read.
struct BfloatConvArgs {
  const BfloatChunk* chunks = nullptr;
  int64_t count = 0;
  const uint16_t* weights = nullptr;  // [32 results][chunk][2][pair of channels][16 results][2]
  const float* bias = nullptr;        // filled up to whole blocks of 32
  int64_t channels = 0, width = 0;    // of the result
  // One of the two is given: pixel 0 of row `out_first_row`.
  float* out = nullptr;
  uint16_t* bfloat_out = nullptr;
  int64_t out_first_row = 0;
  int64_t out_pitch = 0, out_step = 0;
  Epilogue epilogue;
  // The residual's map if that is bfloat16: pixel (0, 0), instead of epilogue.residual.
  const uint16_t* bfloat_residual = nullptr;
  int64_t residual_step = 0;  // of either
};

// A 1x1 convolution from planes to planes.
struct Planar1x1Args {
  static constexpr int64_t kMostChannels = 256;
  static constexpr int64_t kTile = 64;  // pixels
  const float* in[kMostChannels];       // a plane each
  int64_t cin = 0;
  float* out = nullptr;
  int64_t cout = 0;
  int64_t pixels = 0;  // of a plane
  int64_t plane = 0;   // floats from a plane of `out` and of `residual` to the next
  ResidualMode mode = ResidualMode::kNone;
  const float* residual = nullptr;
  const float* weights = nullptr;  // [block][cin][planar_rows]
  const float* bias = nullptr;     // [cout]
  Activation activation = Activation::kNone;
  float slope = 0.0f;
};

// Products of a gradient and an input in planes, summed over pixels.
struct PlanarProductsArgs {
  const float* x = nullptr;  // [cin], `stride` floats apart
  int64_t cin = 0;
  const float* g = nullptr;  // [cout]
  int64_t cout = 0;
  int64_t stride = 0;
  int64_t pixels = 0;       // a multiple of the lanes
  float* sums = nullptr;    // [cout][cin][lanes], added to
  float* totals = nullptr;  // [cout][lanes]: of g alone, added to; null where nobody wants them
};

struct MaxPoolArgs {  // window 7, stride 3, no padding
  const float* in = nullptr;
  int64_t in_pitch = 0;
  float* out = nullptr;
  int64_t out_pitch = 0;
  int64_t step = 0;
  int64_t width = 0;
};

// The last pass of ESA: bilinear enlargement of `small`, + conv_f(c1) or + c1, conv4, sigmoid, times x.
struct EsaGateArgs {
  const float* small = nullptr;
  int64_t small_pitch = 0, small_height = 0, small_width = 0;
  const float* c1 = nullptr;
  int64_t c1_pitch = 0;
  int64_t mid = 0, mid_step = 0;     // channels of small and c1
  const float* weights_f = nullptr;  // null: c1 is added as it is
  const float* bias_f = nullptr;
  const float* weights_4 = nullptr;
  const float* bias_4 = nullptr;
  const float* x = nullptr;
  int64_t x_pitch = 0, x_step = 0;
  float* out = nullptr;
  int64_t out_pitch = 0;
  int64_t height = 0, width = 0;
  float* scratch = nullptr;  // (small_width + 2 * width) * mid_step
};

// Depthwise 3x3 over one row, each of the three input rows given by itself.
struct DepthwiseArgs {
  const float* rows[3] = {};  // the pixel left of pixel 0
  int64_t step = 0;
  int64_t width = 0;
  const float* weights = nullptr;  // [3 * 3][step]
  const float* bias = nullptr;     // [step]
  float* out = nullptr;
  Epilogue epilogue;
};

struct PairArgs {
  const float* a = nullptr;
  const float* b = nullptr;
  float* out = nullptr;
  int64_t pitch = 0;                // of `a` and `out`
  int64_t floats = 0;               // in a row, without the ring
  int64_t channels = 0, step = 0;   // of `a`
  int64_t b_pitch = 0, b_step = 0;  // both 0: `b` has one pixel, for all of `a`
  bool one_channel = false;         // `b` has one, for all of `a`
};

struct ActivateArgs {
  const float* x = nullptr;
  const float* low = nullptr;  // [step], as `high`
  const float* high = nullptr;
  float* out = nullptr;
  int64_t pitch = 0, step = 0;  // of both
  int64_t width = 0;
  Function function = Function::kNone;
};

struct ImportArgs {
  TensorView tensor;
  int64_t channels = 0, width = 0;
  const float* shift = nullptr;  // both null, or [step]: (x - shift) * scale
  const float* scale = nullptr;
  float* out = nullptr;
  int64_t pitch = 0, step = 0;
  float* scratch = nullptr;  // lanes * width floats, or width * channels for channels_last
};

struct ExportArgs {
  const float* in = nullptr;  // pixel 0 of row `first_row`
  int64_t first_row = 0;
  int64_t pitch = 0, step = 0;
  int64_t channels = 0, width = 0;
  TensorView tensor;
  float* scratch = nullptr;  // lanes * width floats
};

// Channel c * r * r + i * r + j of pixel (y, x) goes to colour c, row y * r + i, column x * r + j.
struct ShuffleArgs {
  const float* in = nullptr;  // pixel 0 of row `first_row`
  int64_t first_row = 0;
  int64_t pitch = 0, step = 0;
  int64_t colours = 0, width = 0, factor = 0;
  TensorView tensor;
  TensorView residual;       // data null: none; of the enlarged size
  float* scratch = nullptr;  // 2 * width * factor floats
};

// Channel c * r * r + i * r + j of pixel (y, x) comes from colour c, row y * r + i, column x * r + j.
struct UnshuffleArgs {
  TensorView tensor;
  int64_t colours = 0, width = 0, factor = 0;
  float* out = nullptr;  // pixel (0, 0)
  int64_t pitch = 0, step = 0;
  float* scratch = nullptr;  // width * factor floats
};

// How a gradient passes an epilogue whose convolution gave h, for `floats` values (whole vectors).
struct DerivativeArgs {
  Activation activation = Activation::kNone;
  ResidualMode mode = ResidualMode::kNone;
  float slope = 0.0f;
  const float* h = nullptr;
  const float* grad = nullptr;
  const float* residual = nullptr;  // of "pre" and "attention"
  float* out = nullptr;             // the gradient to h; may be grad
  float* to_residual = nullptr;     // of "attention", which has another than `out`; or null
  int64_t floats = 0;
};

// Sums over pixels of x, seen through each tap of a filter, times g: the gradient of a convolution's weight.
struct WeightGradientArgs {
  const float* x = nullptr;  // the pixel under the filter's corner for pixel (0, 0) of g
  int64_t x_pitch = 0, x_step = 0;
  int64_t x_row_step = 0, x_pixel_step = 0;  // from what a pixel of g sees to what its neighbour sees
  int64_t cin = 0;
  const float* g = nullptr;  // pixel (0, 0)
  int64_t g_pitch = 0, g_step = 0;
  int64_t width = 0, height = 0;
  int64_t side = 3;          // of the filter: 3 or 1; Winograd is for 3
  float* out = nullptr;      // [side * side][cin][g_step], overwritten
  float* scratch = nullptr;  // winograd_weight_scratch_floats()
};

// Sums over pixels of x, seen through each tap of a 3x3 filter, times g, channel by channel.
struct DepthwiseGradientArgs {
  const float* x = nullptr;  // the pixel under the filter's corner for pixel (0, 0) of g
  int64_t x_pitch = 0;
  const float* g = nullptr;  // pixel (0, 0)
  int64_t g_pitch = 0;
  int64_t step = 0, width = 0;
  float* out = nullptr;  // [3 * 3][step], overwritten
};

// `in` is what max_pool read, `grad` the gradient to its result.
struct MaxPoolGradientArgs {
  const float* in = nullptr;
  int64_t in_pitch = 0;
  const float* grad = nullptr;
  int64_t grad_pitch = 0;
  float* out = nullptr;  // of the size of `in`; added to
  int64_t out_pitch = 0;
  int64_t step = 0;
  int64_t height = 0, width = 0;  // of `grad`
};

// The last pass of ESA again, row by row, and the gradients of its product x * sigmoid(z).
struct EsaGateGradientArgs {
  EsaGateArgs gate;       // without `out`
  float* sum = nullptr;   // takes what conv4 reads
  float* grad = nullptr;  // to ESA's result; replaced by what of it goes straight to x
  float* to_z = nullptr;  // takes the gradient to conv4's result
  int64_t sum_pitch = 0, grad_pitch = 0, to_z_pitch = 0;
};

// The bilinear enlargement's transpose.
struct ShrinkArgs {
  const float* in = nullptr;
  int64_t in_pitch = 0, height = 0, width = 0;
  float* out = nullptr;  // overwritten
  int64_t out_pitch = 0, small_height = 0, small_width = 0;
  int64_t step = 0;
  float* scratch = nullptr;  // small_width * step
};

// Channels of a channels_last tensor that the depthwise convolution computes at once: a cache line of floats.
inline constexpr int64_t kDepthwiseGroup = 16;
// The longest side of its filter.
inline constexpr int64_t kDepthwiseMostTaps = 7;

// Depthwise convolution of one image as it is in memory. Weights are those of all `channels` of the result, with a gate
// followed by those of the channels that multiply them: in NCHW [channel][taps], in channels_last in groups,
// [group][taps][kDepthwiseGroup].
struct DepthwiseConvArgs {
  TensorView in, out;
  int64_t channels = 0;  // of the result
  int64_t height = 0, width = 0;
  int64_t kernel_height = 0, kernel_width = 0, dilation = 1;
  const float* weights = nullptr;
  const float* bias = nullptr;
  Activation activation = Activation::kNone;
  float slope = 0.0f;
  bool gated = false;        // act(first half) * second half
  float* scratch = nullptr;  // depthwise_*_floats(); of the engine's maps none
};

struct DepthwiseConvGradientArgs {
  DepthwiseConvArgs conv;  // without `out`
  TensorView grad;
  TensorView to_x;                 // data null: not wanted
  const float* turned = nullptr;   // `weights` with the taps in reverse
  const float* no_bias = nullptr;  // kDepthwiseGroup zeros
  bool wants_weight = false, wants_bias = false;
  // Of a channel [taps + 1][lanes], sums to be added over the lanes; of a group [taps + 1][whole vectors of channels].
  // The last is for the bias. With a gate a second such block follows.
  float* sums = nullptr;
};

// Most pixels that the layer normalisation of planes takes at once.
inline constexpr int64_t kNormPixels = 64;

// Layer normalisation over the channels of one image as it is in memory.
struct LayerNormArgs {
  TensorView in, out;
  int64_t channels = 0;
  const float* weight = nullptr;  // both filled up to whole vectors
  const float* bias = nullptr;
  float eps = 0.0f;
  float* scratch = nullptr;  // channels * kNormPixels
};

struct LayerNormGradientArgs {
  LayerNormArgs norm;  // without `out` and `bias`; scratch of twice the size
  TensorView grad;
  TensorView to_x;        // data null: not wanted
  float* sums = nullptr;  // added to
};

// Steps of a scan that go through the states together; what they need lies in scratch memory.
inline constexpr int64_t kScanSteps = 64;

// A selective scan over the tokens of one image, which are the pixels of one row with adjacent channels.
struct SelectiveScanArgs {
  TensorView u, delta, b, c, out;
  TensorView z;  // data null: without a gate
  int64_t length = 0, channels = 0, states = 0;
  const float* a = nullptr;  // [vector of channels][state][lanes]
  const float* d = nullptr;  // this and delta_bias: filled up to whole vectors
  const float* delta_bias = nullptr;
  bool delta_softplus = false;
  float* scratch = nullptr;  // selective_scan_floats()
};

// Adaptive max pooling of one image as it is in memory.
struct AdaptiveMaxPoolArgs {
  TensorView in, out;
  int64_t channels = 0;
  int64_t height = 0, width = 0;  // of `in`
  int64_t out_height = 0, out_width = 0;
  float* scratch = nullptr;  // adaptive_max_pool_planes_floats()
};

struct AdaptiveMaxPoolGradientArgs {
  AdaptiveMaxPoolArgs pool;  // without `out`
  TensorView grad;
  TensorView to_x;  // added to
};

// Attention inside the windows of one image as it is in memory.
struct WindowAttentionArgs {
  TensorView q, k, v, residual, out;  // residual: data null without one
  int64_t height = 0, width = 0;
  int64_t window_height = 0, window_width = 0;
  int64_t shift_y = 0, shift_x = 0;  // the first window begins there
  int64_t heads = 0, depth = 0;      // channels of a head
  const float* scales = nullptr;     // of each head, times log2(e)
  const float* bias = nullptr;       // [heads][keys][window_attention_stride()], times log2(e); may be null
  float mask = 0.0f;                 // times log2(e)
  bool cosine = false;
  float* scratch = nullptr;  // window_attention_floats()
};

// For every pixel of a side the two it lies between on another side, and the weight of the second.
struct ResizeTable {
  const int64_t* low = nullptr;
  const int64_t* high = nullptr;
  const float* weight = nullptr;
};

struct ModulateMapArgs {
  TensorView map;
  int64_t height = 0, width = 0;
  bool resized = false;  // else of the size of x, without tables
  ResizeTable rows, columns;
};

// x * act(sum of maps, each resized to x) of one image as it is in memory.
struct ModulateArgs {
  TensorView x, out;
  int64_t channels = 0, height = 0, width = 0;
  bool planar = true;
  int64_t step = 1;  // channels of a line
  int64_t count = 0;
  ModulateMapArgs maps[kMostModulateMaps];
  bool blend = false;  // bilinear
  Activation activation = Activation::kNone;
  float slope = 0.0f;
  float* scratch = nullptr;  // modulate_*floats()
};

struct ModulateGradientArgs {
  ModulateArgs forward;  // without `out`
  TensorView grad;
  TensorView to_x;  // data null: not wanted, here and below
  TensorView to_maps[kMostModulateMaps];
};

// An image, as it is in memory, enlarged by a whole factor.
struct ResizePlanesArgs {
  TensorView in;
  int64_t channels = 0;
  int64_t height = 0, width = 0;  // of `in`
  int64_t factor = 1;
  const ResizeTaps* taps = nullptr;  // of every phase
  float* out = nullptr;              // planes of the rows that are asked for, from the first on
  int64_t plane = 0;                 // floats from a plane to the next
  float* scratch = nullptr;          // resize_planes_floats()
};

// The same for a map in the internal layout; the rows are those of the result.
struct ResizeMapArgs {
  const float* in = nullptr;  // pixel (0, 0), as `out`
  int64_t in_pitch = 0;
  int64_t height = 0, width = 0;  // of `in`
  int64_t step = 0;               // of both
  float* out = nullptr;
  int64_t out_pitch = 0;
  int64_t factor = 1;
  const ResizeTaps* taps = nullptr;
};

// Pixels of a row that a statistic takes together, with float32 sums.
inline constexpr int64_t kStatisticPixels = 128;

// Vectors of `step` floats that a block leaves: its sum, its maximum, or a number near its mean and the sums of the
// deviations from that number and of their squares.
constexpr int64_t statistic_parts(Statistic s) { return s == Statistic::kMean || s == Statistic::kMaximum ? 1 : 3; }

struct StatisticArgs {
  const float* in = nullptr;  // pixel (0, 0)
  int64_t pitch = 0, step = 0;
  int64_t width = 0;
  int64_t row_blocks = 0;  // in a row
  Statistic statistic = Statistic::kMean;
  float* partials = nullptr;  // [block][statistic_parts()][step]
};

struct SliceArgs {
  const float* in = nullptr;  // the first of the channels of pixel (0, 0)
  int64_t in_pitch = 0, in_step = 0;
  float* out = nullptr;
  int64_t out_pitch = 0, out_step = 0;
  int64_t channels = 0;
  int64_t width = 0;
};

struct Kernels {
  const char* name;
  int64_t lanes;
  int64_t planar_rows;  // channels of a block of planar1x1's weights
  void (*conv3x3)(const Conv3x3Args&, int64_t y0, int64_t y1);
  void (*winograd)(const WinogradArgs&, int64_t tile_row0, int64_t tile_row1);
  int64_t (*winograd_scratch_floats)(int64_t in_step, int64_t width);
  void (*conv1x1)(const Conv1x1Args&, int64_t y0, int64_t y1);
  void (*bfloat_conv)(const BfloatConvArgs&, int64_t y0, int64_t y1);  // null: without AMX
  void (*planar1x1)(const Planar1x1Args&, int64_t tile0, int64_t tile1);
  void (*planar1x1_tile)(const Planar1x1Args&, const float* tile, int64_t stride, int64_t pixel, int64_t pixels);
  void (*planar1x1_products)(const PlanarProductsArgs&);
  void (*max_pool)(const MaxPoolArgs&, int64_t y0, int64_t y1);
  void (*esa_gate)(const EsaGateArgs&, int64_t y0, int64_t y1);
  void (*depthwise)(const DepthwiseArgs&, int64_t y);
  void (*add)(const PairArgs&, int64_t y0, int64_t y1);
  void (*multiply)(const PairArgs&, int64_t y0, int64_t y1);
  void (*activate)(const ActivateArgs&, int64_t y0, int64_t y1);
  void (*import_rows)(const ImportArgs&, int64_t y0, int64_t y1);
  void (*export_rows)(const ExportArgs&, int64_t y0, int64_t y1);
  void (*shuffle_rows)(const ShuffleArgs&, int64_t y0, int64_t y1);
  void (*unshuffle_rows)(const UnshuffleArgs&, int64_t y0, int64_t y1);
  void (*derivative)(const DerivativeArgs&);
  // silu(h) to `a`, its derivative to `d`, which may be h.
  void (*silu_parts)(const float* h, float* a, float* d, int64_t floats);
  void (*add_product)(const float* a, const float* b, float* inout, int64_t floats);  // (a + b) * inout
  void (*sum_rows)(const float* in, int64_t pitch, int64_t step, int64_t width, float* out, int64_t y0, int64_t y1);
  void (*weight_gradient)(const WeightGradientArgs&, int64_t y0, int64_t y1);
  void (*winograd_weight_gradient)(const WeightGradientArgs&, int64_t tile_row0, int64_t tile_row1);
  int64_t (*winograd_weight_scratch_floats)(int64_t cin, int64_t x_step, int64_t g_step, int64_t width);
  void (*depthwise_gradient)(const DepthwiseGradientArgs&, int64_t y0, int64_t y1);
  void (*add_to)(float* sums, const float* values, int64_t floats);
  void (*max_pool_gradient)(const MaxPoolGradientArgs&);
  void (*esa_gate_gradient)(const EsaGateGradientArgs&, int64_t y0, int64_t y1);
  void (*shrink)(const ShrinkArgs&);
  void (*depthwise_planes)(const DepthwiseConvArgs&, int64_t row0, int64_t row1);
  int64_t (*depthwise_planes_floats)(const DepthwiseConvArgs&);
  void (*depthwise_pixels)(const DepthwiseConvArgs&, int64_t y0, int64_t y1);
  int64_t (*depthwise_pixels_floats)(const DepthwiseConvArgs&);
  void (*depthwise_map)(const DepthwiseConvArgs&, const float* const* rows, int64_t y);
  void (*depthwise_plane_gradient)(const DepthwiseConvGradientArgs&, int64_t channel);
  int64_t (*depthwise_plane_gradient_floats)(const DepthwiseConvArgs&);
  void (*depthwise_pixels_gradient)(const DepthwiseConvGradientArgs&, int64_t group);
  int64_t (*depthwise_pixels_gradient_floats)(const DepthwiseConvArgs&);
  // Pixels x .. x + n - 1 of row y; of planes at most kNormPixels.
  void (*norm_planes)(const LayerNormArgs&, int64_t y, int64_t x, int64_t n);
  void (*norm_pixels)(const LayerNormArgs&, int64_t y, int64_t x, int64_t n);
  void (*norm_planes_gradient)(const LayerNormGradientArgs&, int64_t y, int64_t x, int64_t n);
  void (*norm_pixels_gradient)(const LayerNormGradientArgs&, int64_t y, int64_t x, int64_t n);
  void (*selective_scan)(const SelectiveScanArgs&, int64_t channel);  // a vector of channels
  int64_t (*selective_scan_floats)(const SelectiveScanArgs&);
  int64_t (*adaptive_max_pool_planes_floats)(const AdaptiveMaxPoolArgs&);
  void (*adaptive_max_pool_planes)(const AdaptiveMaxPoolArgs&, int64_t row0, int64_t row1);
  void (*adaptive_max_pool_pixels)(const AdaptiveMaxPoolArgs&, int64_t y0, int64_t y1);
  void (*adaptive_max_pool_plane_gradient)(const AdaptiveMaxPoolGradientArgs&, int64_t channel);
  void (*adaptive_max_pool_pixels_gradient)(const AdaptiveMaxPoolGradientArgs&, int64_t first, int64_t count);
  int64_t (*modulate_floats)(const ModulateArgs&);
  void (*modulate_rows)(const ModulateArgs&, int64_t row0, int64_t row1);
  int64_t (*modulate_gradient_floats)(const ModulateArgs&);
  void (*modulate_gradient)(const ModulateGradientArgs&, int64_t channel);
  int64_t (*resize_planes_floats)(const ResizePlanesArgs&, int64_t rows);
  void (*resize_planes)(const ResizePlanesArgs&, int64_t y0, int64_t y1);
  void (*resize_map)(const ResizeMapArgs&, int64_t y0, int64_t y1);
  int64_t (*window_attention_stride)(const WindowAttentionArgs&);
  int64_t (*window_attention_floats)(const WindowAttentionArgs&);
  void (*window_attention)(const WindowAttentionArgs&, int64_t window, int64_t head);
  void (*slice_rows)(const SliceArgs&, int64_t y0, int64_t y1);
  void (*statistic_blocks)(const StatisticArgs&, int64_t block0, int64_t block1);
};

// Null where the compiler's target has no such instructions; whether this CPU has them is not asked here.
const Kernels* kernels_amx();
const Kernels* kernels_avx512();
const Kernels* kernels_avx2();
const Kernels* kernels_plain();

}  // namespace esr
