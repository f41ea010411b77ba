// The namespace of the operators registered with PyTorch; the emulator has its own, so that both can be loaded.
#pragma once

#ifdef ESR_EMULATOR
#define ESR_LIBRARY esr_emulator
#else
#define ESR_LIBRARY esr_native_cuda
#endif
