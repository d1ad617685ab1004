# make demo       what frozen_bn does for you, on real input
# make test       what a change can break
# make test-all   that, and the long sweeps: those marked `long`, both packages, mutations
#
# All make a virtual environment in .venv first, install torch there, and build the extension: with
# its CUDA half where there are an nvcc and a CUDA torch, for the GPU here or just one architecture.

SHELL := bash -o pipefail

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.14.1 torchvision==0.29.1

# What the wheel, built against that torch, is tested under: one without CUDA, the same, the oldest.
TORCH_cpu    ?= torch==2.13.0
TORCH_same   ?= $(TORCH)
TORCH_oldest ?= torch==2.10.0

# Test processes at once, of one thread each.
JOBS ?= 2

# For ninja: without it on PATH, torch compiles one file after the other, and all of them every time.
export PATH := $(abspath $(VENV))/bin:$(PATH)

# Which architectures to compile for where there is no GPU: just one. (dist: all.)
export FROZEN_BN_CUDA_ARCHS ?= one

RUN   := $(VENV)/bin/python
# Python compiles what is imported; pip would compile all of it, in most of its time.
PIP   := $(RUN) -m pip install --quiet --disable-pip-version-check --no-compile
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

# A file by one process: what its tests share is made once.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# Of what a build prints: how far it is, and what went wrong.
PROGRESS := sed --unbuffered --silent --regexp-extended \
	-e 's|^ *(\[[0-9]+/[0-9]+\]) .* -c [^ ]*(csrc/[^ ]*) .*|\1 \2|p' \
	-e '/^ *frozen_bn: /p' -e '/(error|fatal).*:/Ip'

.PHONY: build demo test test-all sanitize dist wheel test-sdist checkstyle bench bench-model roofline compiled
.PHONY: mutations coverage every-model gpu-check docs pictures clean
.DELETE_ON_ERROR:
.PRECIOUS: .venv-%/.torch

build: $(VENV)/.built

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools ninja pybind11 $(TORCH)
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(RUN) -m pip install --verbose --disable-pip-version-check --no-compile --no-build-isolation \
		--editable '.[test,benchmark,dev,docs]' 2>&1 | tee $(VENV)/build.log | $(PROGRESS)
	$(RUN) -m frozen_bn
	touch $@

demo: build
	$(RUN) -m benchmarks.demo

test: build
	$(PYTEST) -m 'not long'

test-all: build test-sdist test-wheel-cpu mutations every-model
	$(PYTEST)

bench: build
	$(RUN) -m benchmarks op

# Whole networks, by the side of the same without BatchNorm, and of mmcv's way to freeze it.
bench-model: build
	$(PIP) mmcv-lite
	$(RUN) -m benchmarks model

# Memory traffic of the CUDA kernels and their peers, counted without a GPU.
roofline: build
	$(RUN) -m benchmarks roofline

# Registers, occupancy and access widths, read off the compiled kernels.
compiled: build
	$(RUN) -m benchmarks.compiled

# Breaks the CUDA sources one way after the other: the tests have to notice (15 minutes).
mutations: build
	cd tests && $(abspath $(RUN)) -m emulator.mutate

# Which lines of the package the tests go through, on the CPU: at least 95 % of them.
coverage: build
	$(PYTEST) -k 'not emulat' --cov=frozen_bn --cov-report=term-missing:skip-covered --cov-fail-under=95

# Fusing every model of torchvision, not just one a family (five minutes, 21 GB for the largest).
every-model: build
	$(RUN) -m pytest tests/every_model.py

# On a machine with a GPU: all tests there, and the benchmarks, into gpu-report.md.
gpu-check: build
	$(RUN) -m benchmarks.gpu_check

# Into build/site; `make test` does the same elsewhere.
docs: build
	$(RUN) -m mkdocs build --strict

# docs/images, from the tables of docs/results.md.
pictures: build
	$(RUN) -m benchmarks.published

# Both from here, not the wheel from the sdist: so it takes what is compiled already.
dist: export FROZEN_BN_CUDA_ARCHS = all
dist: build
	rm -rf dist
	$(RUN) -m build --sdist --wheel --no-isolation --outdir dist . > /dev/null
	$(RUN) -m twine check --strict dist/*

# Both packages, tested where they were installed, away from the sources.
wheel: test-sdist test-wheel-cpu test-wheel-same test-wheel-oldest

.venv-%/.torch:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --no-compile $(TORCH_$*) numpy pytest pytest-xdist hypothesis expecttest
	touch $@

# What is compiled under another torch than here.
test-sdist: dist .venv-cpu/.torch
	.venv-cpu/bin/python -m pip install --quiet --upgrade setuptools ninja pybind11
	.venv-cpu/bin/python -m pip install --quiet --no-deps --no-build-isolation --force-reinstall dist/*.tar.gz
	.venv-cpu/bin/python -P -m frozen_bn
	OMP_NUM_THREADS=1 .venv-cpu/bin/python -P -m pytest tests/test_modules.py tests/test_operators.py -k 'not emulat'

# All tests but of the emulated kernels, which are compiled from the sources; or just WHEEL_TESTS.
WHEEL_TESTS ?= tests

test-wheel-%: dist .venv-%/.torch
	.venv-$*/bin/python -m pip install --quiet --no-deps --force-reinstall dist/*.whl
	.venv-$*/bin/python -P -m frozen_bn
	OMP_NUM_THREADS=1 .venv-$*/bin/python -P -m pytest -n $(JOBS) $(WHEEL_TESTS) -k 'not emulat' \
		--ignore=tests/test_roofline.py --ignore=tests/test_compiled.py

SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g
# Their libraries have to be the first of the process.
SANITIZED  = LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell gcc -print-file-name=lib$(name).so))" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitized $(RUN) -P

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer (three minutes to build).
# First of all, they have to notice a tensor whose memory has been taken away.
sanitize: dist
	rm -rf build/sanitized
	FROZEN_BN_CUDA=0 CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" \
		$(PIP) --no-deps --no-build-isolation --target build/sanitized dist/*.tar.gz
	! $(SANITIZED) -c "$$OVERRUN" 2> build/sanitized/overrun.txt
	grep --quiet heap-buffer-overflow build/sanitized/overrun.txt
	$(SANITIZED) -m pytest -k 'not emulat' tests/test_ops.py tests/test_pair.py \
		tests/test_properties.py tests/test_errors.py tests/test_exact_gradients.py

define OVERRUN
import torch, frozen_bn
x, ones = torch.randn(1, 4, 10, 10), torch.ones(4)
x.untyped_storage().resize_(64)
frozen_bn.frozen_batch_norm(x, ones, ones)
endef
export OVERRUN

checkstyle: build
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

clean:
	rm -rf build dist *.egg-info frozen_bn/*.so $(VENV) .venv-*
