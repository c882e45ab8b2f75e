// What the marching kernels make of a geometry's defines, callable from Python.
#include "shim.h"

#include "common/strips.cuh"

extern "C" int shared_bytes() { return SHARED_BYTES; }
