// From here to the end of the file (clang: to the matching pop), functions are compiled for ESR_TARGET.

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(ESR_TARGET))), apply_to = function)
#else
// Undefined registers inside the intrinsics' own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define ESR_PRAGMA(words) _Pragma(#words)
#define ESR_TARGET_REGION(names) ESR_PRAGMA(GCC target(names))
ESR_TARGET_REGION(ESR_TARGET)
#endif
