// A kernel that starts while the one before it in the stream still runs (sm_90 and later, where the launch allows it;
// elsewhere this does nothing, for nothing overlaps).
#pragma once

// Waits until the kernel before this one has ended and what it wrote is visible. Every block must, before it reads or
// writes anything that earlier kernels write or read: what comes after this kernel waits for this one only.
__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
