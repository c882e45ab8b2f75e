"""Tests marked gpu are skipped where the driver shows no GPU."""

import os

import pytest

from natcore.device import device_count

# PyTorch, JAX and natcore share one GPU: JAX must not take most of its memory at the start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if device_count():
        return
    skip = pytest.mark.skip(reason="the CUDA driver shows no GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
