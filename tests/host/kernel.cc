// One kernel as a library. `launch` takes its parameters as cuLaunchKernel does.
#ifdef WHOLE_BLOCKS
#include "block.h"
#include "warp.h"
#else
#include "thread.h"
#endif

#include KERNEL_FILE

#ifdef WHOLE_BLOCKS
extern "C" void set_readable(const size_t* bounds, int count) {
  host::readable.clear();
  for (int i = 0; i < count; ++i) host::readable.push_back({bounds[2 * i], bounds[2 * i + 1]});
}
extern "C" const char* launch(const unsigned* grid, unsigned threads, unsigned shared_bytes, unsigned order,
                              void** params) {
  return host::launch_blocks(KERNEL, {grid[0], grid[1], grid[2]}, threads, shared_bytes, order, params);
}
#else
extern "C" void launch(unsigned blocks, void** params) { launch_all(KERNEL, blocks, params); }
#endif
extern "C" int parameter_sizes(int* sizes) { return sizes_of(KERNEL, sizes); }
