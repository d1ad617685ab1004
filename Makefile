# make demo   what frozen_bn does for you, on real input
# make test   all tests
#
# Both make a virtual environment in .venv first, install torch there, and build the extension:
# with its CUDA half where there are an nvcc and a CUDA torch.

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.14.1 torchvision==0.29.1

# A second torch, for the wheel that was built against the first.
OTHER_VENV  ?= .venv-other
OTHER_TORCH ?= torch==2.13.0

RUN   := $(VENV)/bin/python
PIP   := $(RUN) -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: build demo test test-other-torch wheel checkstyle bench bench-model roofline compiled mutations
.PHONY: gpu-check clean
.DELETE_ON_ERROR:

build: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools ninja pybind11 $(TORCH)
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[test,benchmark,dev]'
	$(RUN) -m frozen_bn
	touch $@

demo: build
	$(RUN) -m benchmarks.demo

test: build
	$(RUN) -m pytest

bench: build
	$(RUN) -m benchmarks.bench_op

# Whole networks, by the side of the same without BatchNorm, and of mmcv's way to freeze it.
bench-model: build
	$(PIP) mmcv-lite
	$(RUN) -m benchmarks.bench_model

# Memory traffic of the CUDA kernels and their peers, counted without a GPU.
roofline: build
	$(RUN) -m benchmarks.roofline

# Registers, occupancy and access widths, read off the compiled kernels.
compiled: build
	$(RUN) -m benchmarks.compiled

# Breaks the CUDA sources one way after the other: the tests have to notice (15 minutes).
mutations: build
	cd tests && $(abspath $(RUN)) -m emulator.mutate

# On a machine with a GPU: all tests there, and the benchmarks, into gpu-report.md.
gpu-check: build
	$(RUN) -m benchmarks.gpu_check

wheel: build
	rm -rf dist
	$(RUN) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

# The wheel, as built against one torch, tested under another.
test-other-torch: wheel
	$(PYTHON) -m venv $(OTHER_VENV)
	$(OTHER_VENV)/bin/python -m pip install --quiet $(OTHER_TORCH) numpy pytest
	$(OTHER_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	$(OTHER_VENV)/bin/python -P -m frozen_bn
	$(OTHER_VENV)/bin/python -P -m pytest tests

checkstyle: build
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf build dist *.egg-info frozen_bn/*.so $(VENV) $(OTHER_VENV)
