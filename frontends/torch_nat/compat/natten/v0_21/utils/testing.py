"""Decorators by which NATTEN's callers skip unittest methods."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from torch_nat.compat.natten.v0_21.utils.device import get_device_cc, is_cuda
from torch_nat.compat.natten.v0_21.utils.environment import parse_env_flag


def skip_unless(condition: Callable[[], bool], reason: str) -> Callable:
    """A decorator of unittest methods; the condition is asked when the test runs."""

    def decorator(method: Callable) -> Callable:
        @wraps(method)
        def wrapper(self, *args, **kwargs):
            if not condition():
                self.skipTest(reason)
            return method(self, *args, **kwargs)

        return wrapper

    return decorator


def skip_if_cuda_is_not_supported() -> Callable:
    return skip_unless(torch.cuda.is_available, "CUDA is not available.")


def skip_if_libnatten_is_not_supported() -> Callable:
    """Kernels are always there, but NATTEN skips these tests without a GPU too."""
    return skip_unless(torch.cuda.is_available, "CUDA is not available.")


def skip_if_flex_is_not_supported() -> Callable:
    return skip_unless(lambda: get_device_cc() >= 70, "Flex needs a GPU of compute capability 7.0.")


def skip_if_flex_compile_is_not_supported() -> Callable:
    return skip_unless(lambda: get_device_cc() >= 70, "Compiled Flex needs a GPU of compute capability 7.0.")


def skip_if_not_running_extended_tests() -> Callable:
    return skip_unless(lambda: parse_env_flag("NATTEN_RUN_EXTENDED_TESTS", False), "Extended tests are off.")


def skip_if_hopper_kernels_not_supported() -> Callable:
    return skip_unless(lambda: get_device_cc() == 90, "Not a Hopper GPU.")


def skip_if_blackwell_kernels_not_supported() -> Callable:
    return skip_unless(lambda: get_device_cc() in (100, 103), "Not a data-centre Blackwell GPU.")


def supports_float16(device: torch.device) -> bool:
    return not is_cuda(device) or get_device_cc(device) >= 50


def supports_bfloat16(device: torch.device) -> bool:
    """On the CPU too, where NATTEN said no."""
    return not is_cuda(device) or get_device_cc(device) >= 80
