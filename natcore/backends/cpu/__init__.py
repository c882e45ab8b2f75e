"""Neighbourhood attention on the host: numba kernels on tiles of sixteen queries, on all cores.

One design serves every valid problem, in float32 (which also serves the 16-bit dtypes) or float64:

    geometry.py    which sixteen queries make a tile, and the box of keys they share  (start here)
    simd.py        vectors of sixteen lanes for numba, and the one product everything is made of
    tables.py      the names of what Python tells the kernels
    memory.py      rows from and to the caller's memory: strides and dtypes end here
    bias.py        mask and bias, and the gradient of the bias
    tile.py        small helpers of the kernels
    forward.py     the forward of a tile
    backward.py    the backward of a tile
    unfused.py     scores and weighted sums of a tile, forward and backward
    places.py      the places of windows in memory; what dropout keeps
    sharing.py     tasks and their order, threads.py: who runs them
    executable.py  tables and scratch of a call; gradients.py: what the backward needs besides
    compiled.py    compilation, kept on disk

Workspace is a few hundred KB per thread, and, for a 16-bit backward, float32 sums of dk and dv of
the heads that are being worked on. Results do not depend on the number of threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from natcore.problem import Call
from natcore.views import Device

if TYPE_CHECKING:
    from natcore.backends.cpu.executable import Executable
    from natcore.planning import Config


class CpuBackend:
    def prepare(self, call: Call, device: Device, config: Config | None = None) -> Executable:
        """Compiles what the call needs, or reads it from numba's cache."""
        if config is not None:
            raise NotImplementedError(f"config {config!r}: the CPU has one kernel and takes no config; pass None.")
        if not call.direction.endswith("backward"):
            from natcore.backends.cpu.executable import Executable

            return Executable(call)
        from natcore.backends.cpu.gradients import BackwardExecutable

        return BackwardExecutable(call)


BACKEND = CpuBackend()
