// Launches that are listed instead of started.
#pragma once

#include <string>

#include "launch.h"

namespace esr::device {

// Until it ends, this thread's launches are listed, properties() tells of a device that need not be there, and tensors
// may be anywhere.
void begin_rehearsal(const Properties& device);
// A line for every launch: name, instance, threads, rows, blocks, bytes of shared memory.
std::string end_rehearsal();

}  // namespace esr::device
