// What a kernel computes with: its defines ELEMENT and RPB, the type of the bias (undefined = no bias).
#pragma once

#include "common/types.cuh"

using Element = ELEMENT;
#ifdef RPB
using BiasElement = RPB;
constexpr bool BIASED = true;
#else
using BiasElement = float32;  // of a null pointer
constexpr bool BIASED = false;
#endif
