// A float32 as the sum of two tf32 numbers, so that three products of those are as exact as one of float32.
#pragma once

#include "device.h"

namespace esr::cuda {

// An infinity has nothing left over, and must not meet the zeros that other numbers leave over: it would be a NaN.
ESR_DEVICE uint32_t finite_or_zero(uint32_t bits) { return (bits & 0x7f800000u) == 0x7f800000u ? 0 : bits; }

// What `high`, the nearest tf32, lacks of v.
ESR_DEVICE uint32_t left_over(float v, uint32_t high) {
  return finite_or_zero(device::round_tf32(v - device::bits_float(high)));
}

}  // namespace esr::cuda
