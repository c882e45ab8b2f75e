# `make demo` and `make test` set up .venv themselves, once. Python 3.11+ is needed: make demo PYTHON=python3.12
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Which build of PyTorch and JAX: cuda13 where a driver that runs CUDA 13 (580 or newer) shows a GPU,
# else cpu. `make demo BUILD=cpu` decides by hand.
DRIVER := $(shell { nvidia-smi --query-gpu=driver_version --format=csv,noheader || \
	{ test -e /dev/nvidia0 && cat /proc/driver/nvidia/version; }; } 2>/dev/null | grep -oE '[0-9]{3,}\.[0-9]+' | head -n 1)
BUILD ?= $(shell [ "0$(firstword $(subst ., ,$(DRIVER)))" -ge 580 ] && echo cuda13 || echo cpu)

TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints/$(BUILD).txt
READY := $(VENV)/ready-$(BUILD)
ARCHS := sm_80 sm_90a sm_100a sm_120

.PHONY: help setup demo test lint types compile clean
help:
	@echo "make demo     train a small NAT on digits in PyTorch, run it in JAX, draw a picture (runs/demo)"
	@echo "make test     run the tests"
	@echo "make lint types compile   ruff; pyright; every CUDA kernel for $(ARCHS)"

setup: $(READY)

demo: $(READY)
	$(BIN)/python examples/demo.py

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

compile: $(READY)
	$(BIN)/python -m natcore compile --check $(addprefix --arch ,$(ARCHS))

clean:
	rm -rf $(VENV) runs

$(READY): pyproject.toml constraints/common.txt constraints/$(BUILD).txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("natcore needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.12")'
	@echo "Setting up $(VENV), $(BUILD) build ($(if $(DRIVER),NVIDIA driver $(DRIVER),no NVIDIA GPU found))"
	$(PYTHON) -m venv $(VENV)
ifeq ($(BUILD),cpu)
	@# PyTorch's own index has the CPU build; elsewhere 2.13.0 may bring CUDA libraries, which do no harm.
	@if $(BIN)/python -c "import urllib.request; urllib.request.urlopen('$(TORCH_CPU_INDEX)/torch/', timeout=5)" 2>/dev/null; \
	then index="--extra-index-url $(TORCH_CPU_INDEX)"; \
	else index=; echo "$(TORCH_CPU_INDEX) does not answer: PyTorch comes from pip's own index."; fi; \
	set -x; $(INSTALL) $$index torch
	$(INSTALL) -e '.[dev,cuda13]'
else
	$(INSTALL) -e '.[dev,$(BUILD)]' 'jax[$(BUILD)]'
endif
	@touch $@
