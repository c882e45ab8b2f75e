#include "shim.h"

#include KERNEL_FILE

extern "C" void launch(unsigned blocks, void** params) { launch_all(KERNEL, blocks, params); }
extern "C" int parameter_sizes(int* sizes) { return sizes_of(KERNEL, sizes); }
