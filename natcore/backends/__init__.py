"""The core's real interface: pointers in, work enqueued. All front doors end here.

A backend turns a `Call` (problem and strides) into an `Executable` once; running the executable
again with other pointers costs microseconds. `prepare` picks the backend by device and remembers
the executables.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from natcore.problem import Call
from natcore.views import Device

if TYPE_CHECKING:
    from natcore.planning import Config


class Executable(Protocol):
    """One prepared call. Safe to run from many threads at once."""

    #: Scratch memory that the caller must hand in, in bytes, 256-byte aligned; often 0.
    workspace_bytes: int

    def __call__(self, pointers: Sequence[int], scale: float, stream: int = 0, workspace: int = 0) -> None:
        """Run on these addresses, in the order of ``OPERANDS[call.direction]``, 0 where absent.

        On CUDA the work is enqueued on ``stream`` (a raw cudaStream_t / CUstream) and the call
        returns at once; on the CPU the results are there when it returns. Every element of every
        present result is written, also when the batch is empty (sums over nothing are 0).
        """
        ...


class Backend(Protocol):
    """Makes executables for one kind of device."""

    def prepare(self, call: Call, device: Device, config: Config | None = None) -> Executable:
        """Raises NotImplementedError, naming the nearest supported case, for what it cannot run."""
        ...


def backend_of(device_type: str) -> Backend:
    """The backend for "cpu" or "cuda", imported on first use."""
    if device_type == "cpu":
        from natcore.backends import cpu

        return cpu.BACKEND
    if device_type == "cuda":
        from natcore.backends import cuda

        return cuda.BACKEND
    raise NotImplementedError(f"no backend for device type {device_type!r}; there are cpu and cuda.")


@lru_cache(maxsize=4096)
def prepare(call: Call, device: Device, config: Config | None = None) -> Executable:
    """The executable of a call on a device, remembered."""
    return backend_of(device.type).prepare(call, device, config)
