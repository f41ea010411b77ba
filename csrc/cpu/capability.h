// Which instruction set the kernels use.
#pragma once

#include <string>

#include "kernels.h"

namespace esr {

// Chooses among "amx", "avx512", "avx2" and "plain" for plans compiled from now on; an error when this CPU lacks it.
void set_cpu_capability(const std::string& name);

// The kernels in force: the best this CPU has, or what ESR_KERNELS_CPU_CAPABILITY or set_cpu_capability chose.
const Kernels& active_kernels();

}  // namespace esr
