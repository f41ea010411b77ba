// What a layer can take of all pixels of a channel.
#pragma once

#include <cstdint>

namespace esr {

enum class Statistic : int32_t {
  kMean = 0,
  kVariance = 1,
  kStd = 2,
  kContrast = 3,  // the standard deviation plus the mean
  kMaximum = 4,
};
inline constexpr int64_t kStatisticCount = 5;

}  // namespace esr
