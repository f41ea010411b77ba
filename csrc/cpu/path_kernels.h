// The kernels of one instruction set. A path_*.cpp includes this file as it would path_core.h, once.

#include "path_core.h"

namespace esr {
namespace ESR_PATH {

// Each of these uses the ones before it.
// clang-format off
#include "multiply.h"
#include "conv3x3.h"
#include "winograd.h"
#include "conv1x1.h"
#include "planar1x1.h"
#include "esa.h"
#include "bsconv.h"
#include "pair.h"
#include "activate.h"
#include "boundary.h"
#include "derivative.h"
#include "weight_gradient.h"
#include "bsconv_gradient.h"
#include "esa_gradient.h"
#include "depthwise_conv.h"
#include "depthwise_conv_gradient.h"
#include "layer_norm2d.h"
#include "selective_scan.h"
#include "adaptive_max_pool.h"
#include "statistic.h"
#include "modulate.h"
#include "resize.h"
#include "window_attention.h"
// clang-format on

constexpr Kernels make_kernels(const char* name) {
  return Kernels{name,
                 kLanes,
                 kPlanarRows,
                 conv3x3,
                 winograd,
                 winograd_scratch_floats,
                 conv1x1,
                 nullptr,
                 planar1x1,
                 planar1x1_tile,
                 planar1x1_products,
                 max_pool,
                 esa_gate,
                 depthwise,
                 add_rows,
                 multiply_rows,
                 activate_rows,
                 import_rows,
                 export_rows,
                 shuffle_rows,
                 unshuffle_rows,
                 derivative,
                 silu_parts,
                 add_product,
                 sum_rows,
                 weight_gradient,
                 winograd_weight_gradient,
                 winograd_weight_scratch_floats,
                 depthwise_gradient,
                 add_to,
                 max_pool_gradient,
                 esa_gate_gradient,
                 shrink,
                 depthwise_planes,
                 depthwise_planes_floats,
                 depthwise_pixels,
                 depthwise_pixels_floats,
                 depthwise_map,
                 depthwise_plane_gradient,
                 depthwise_plane_gradient_floats,
                 depthwise_pixels_gradient,
                 depthwise_pixels_gradient_floats,
                 norm_planes,
                 norm_pixels,
                 norm_planes_gradient,
                 norm_pixels_gradient,
                 selective_scan,
                 selective_scan_floats,
                 adaptive_max_pool_planes_floats,
                 adaptive_max_pool_planes,
                 adaptive_max_pool_pixels,
                 adaptive_max_pool_plane_gradient,
                 adaptive_max_pool_pixels_gradient,
                 modulate_floats,
                 modulate_rows,
                 modulate_gradient_floats,
                 modulate_gradient,
                 resize_planes_floats,
                 resize_planes,
                 resize_map,
                 window_attention_stride,
                 window_attention_floats,
                 window_attention,
                 slice_rows,
                 statistic_blocks};
}

}  // namespace ESR_PATH
}  // namespace esr
