"""Errors that are about the machine and not about the arguments."""

from __future__ import annotations


class CompileError(RuntimeError):
    """A kernel did not compile, or not within what it declares. ``log`` is the compiler's."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(f"{message}\n{log}" if log else message)
        self.log = log


class CudaError(RuntimeError):
    """The CUDA driver, a GPU or NVRTC is missing, or a driver call failed."""
