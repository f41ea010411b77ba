// Statistics of all pixels of a channel: mean, variance, standard deviation, contrast or maximum.
#pragma once

#include <cstdint>

#include "../common/statistic.h"
#include "launch.h"
#include "teams.h"
#include "view.h"

namespace esr::cuda {

struct StatisticArgs {
  View input, output;  // the output has one pixel
  int32_t height, width, channels;
  Statistic kind;
  int32_t correction;  // squares are divided by the pixels less that
  // Filled in by the launch.
  Teams teams;
  int64_t pixels;  // of an image
  int64_t pixels_of_part;
  int32_t parts;    // of an image; neighbouring pixels
  int64_t windows;  // parts of all images, or images
  float* partial;   // [image][unit of eight channels][part][set][8], what was gathered of parts
};
// Of the workspace that the launch takes; the image may have no pixels.
int64_t statistic_bytes(const StatisticArgs& args, int64_t batch);
// Of images that have pixels. One launch for each part of an image, and one that brings the parts together in order:
// the same bits for an image in every run, whatever else is in its batch.
void launch_statistic(StatisticArgs args, Precision precision, int64_t batch, unsigned char* workspace,
                      device::Stream stream, bool overlap);

}  // namespace esr::cuda
