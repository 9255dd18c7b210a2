# make demo        train a small GPT on two ranks, plain and compressed, and compare
# make test        run every test that this machine can run
# make help        the other targets
#
# Everything is installed into .venv. `make test PYTHON=python3` uses the packages of that Python instead.

VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
ifeq ($(origin PYTHON), undefined)
  PYTHON := $(VENV)/bin/python
  ENVIRONMENT := $(VENV)/.environment
  INSTALLED := $(VENV)/.installed
else
  INSTALLED := build
  export PYTHONPATH := $(CURDIR)/python$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
SYSTEM_PYTHON ?= python3
CLANG_FORMAT := $(patsubst ./%,%,$(dir $(PYTHON))clang-format)
TORCH := $(shell sed -n 's/^ *"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
BUILD_TOOLS := 'scikit-build-core>=0.10' 'pybind11>=2.12' 'cmake>=3.24' 'ninja>=1.10'
# CUDA is compiled where there is a GPU to run it, and for that GPU. CMAKE_ARGS= compiles it for all where there is an nvcc.
GPU := $(shell nvidia-smi -L 2> /dev/null | grep GPU)
export CMAKE_ARGS ?= $(if $(GPU),-DCMAKE_CUDA_ARCHITECTURES=native,-DSMALLREDUCE_CUDA=OFF)
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python -type f -not -name '*.so' -not -name '*.pyc')
CXX_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test build lint format gpu-check clean help

demo: $(INSTALLED)
	$(PYTHON) examples/demo.py

test: $(INSTALLED)
	$(PYTHON) -m pytest $(PYTEST_ARGS)

# The native module, built in build/inplace and put beside the Python sources: PYTHONPATH=python imports it.
build: $(ENVIRONMENT)
	cmake -S . -B build/inplace -DPython_EXECUTABLE="$$($(PYTHON) -c 'import sys; print(sys.executable)')" \
	  -Dpybind11_DIR="$$($(PYTHON) -m pybind11 --cmakedir)" $(CMAKE_ARGS)
	cmake --build build/inplace --parallel $$(nproc)
	cmake --install build/inplace --prefix python

lint: $(INSTALLED)
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_SOURCES)

format: $(INSTALLED)
	$(PYTHON) -m ruff check --fix
	$(PYTHON) -m ruff format
	$(CLANG_FORMAT) -i $(CXX_SOURCES)

# Neither network nor virtual environment: the packages, nvcc and GPU of the Python that is on the PATH.
gpu-check:
	$(SYSTEM_PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf build dist demo gpu-check-report .mypy_cache .pytest_cache .ruff_cache .hypothesis python/smallreduce/_C*.so
	find python tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo 'make build       rebuild the native module in place, for PYTHONPATH=python'
	@echo 'make lint        ruff, mypy and clang-format; make format repairs what it can'
	@echo 'make gpu-check   all that needs a GPU, offline, with the Python on the PATH'
	@echo 'make clean       remove what was built; .venv stays'

$(VENV)/.environment: pyproject.toml
	$(SYSTEM_PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or later is needed"'
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install '$(TORCH)'
	$(PYTHON) -m pip install $(BUILD_TOOLS)
	touch $@

# The build folder is kept, so that this compiles what has changed and no more.
$(VENV)/.installed: $(VENV)/.environment $(SOURCES)
	$(PYTHON) -m pip install --no-build-isolation --config-settings build-dir=build/install '.[dev]'
	touch $@
