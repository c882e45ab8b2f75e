"""Tests of the PyTorch front-end."""

import pytest

pytest.importorskip("torch")
