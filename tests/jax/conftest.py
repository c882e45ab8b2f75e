"""Tests run on the CPU, also where there is a GPU; those marked gpu run on it."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    platform = "gpu" if "gpu" in request.keywords else "cpu"
    jax.config.update("jax_default_device", jax.local_devices(backend=platform)[0])
    yield
    jax.config.update("jax_default_device", None)
