// What the tiled backward kernels make of a geometry's defines, callable from Python.
#include "shim.h"

#include "common/tiled_boxes.cuh"

extern "C" int shared_bytes() { return SHARED_BYTES; }
