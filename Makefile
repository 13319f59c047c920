# Everything happens in .venv, which is made on first use and renewed when what it was made from changes.
# `make PYTHON=python3.12 test` takes another Python; only a new .venv takes notice of it.

PYTHON = python3
TORCH = 2.13.0
CPU_INDEX = https://download.pytorch.org/whl/cpu

VENV = .venv
PY = $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check
READY = $(VENV)/ready

.DEFAULT_GOAL = help
.PHONY: help install demo test lint typecheck wheel benchmark pycuda gige clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1~/p' $(firstword $(MAKEFILE_LIST)) | awk -F '~' '{printf "%-18s %s\n", $$1, $$2}'

install: $(READY)  ## make .venv with edgead, editable, and everything that the tests need

demo: $(READY)  ## train, export and check a detector on a made-up part; writes demo/
	$(PY) -m edgead demo --out demo

# Two files at a time with one thread each: many tests wait, and threads that share a core wait for each other.
# A crash ends the suite: with another process instead, xdist waits for ever for what the lost one had to do.
test: lint typecheck  ## lint, check the types and run the whole test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0

lint: $(READY)  ## ruff
	$(PY) -m ruff check .

# setuptools ships deleted modules from an old build/lib: remove it before each build.
typecheck: $(READY)  ## mypy on the built package (edgead.export and its siblings exist only there)
	rm -rf build
	$(PIP) install --quiet --no-deps --no-build-isolation --target build/typecheck .
	$(PY) -m mypy build/typecheck/edgead

wheel: $(READY)  ## build dist/edgead-*.whl and the source archive
	rm -rf build dist
	$(PY) -m build --no-isolation

benchmark: $(READY)  ## latency on this machine's CPU
	$(PY) -m edgead.benchmarks.cpu

pycuda: $(READY)  ## build pycuda into .venv where there is a CUDA toolkit, to test the second CUDA layer
	$(PY) tests/fake_cuda/build_pycuda.py

gige: $(READY)  ## link the system's PyGObject into .venv, to test GigE Vision cameras
	$(PY) tests/line/sources/link_gi.py

clean:  ## remove what the other targets made, all but .venv
	rm -rf build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# On Linux the torch of PyPI brings gigabytes of CUDA libraries. Without an NVIDIA GPU the CPU build is taken: from an
# index or folder that pip is configured with, otherwise from PyTorch's own index. Its dependencies follow from PyPI.
$(READY): setup.py pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "edgead needs Python 3.10 or newer, \
	$(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	    echo "$(PYTHON) cannot make virtual environments: install its venv package (apt install python3-venv)" >&2; exit 1; }
	@echo "installing torch $(TORCH) and the other requirements into $(VENV)"
	@if [ "$$(uname)" != Linux ] || nvidia-smi >/dev/null 2>&1; then \
	    $(PIP) install --no-deps torch==$(TORCH); \
	else \
	    $(PIP) install --quiet --no-deps torch==$(TORCH)+cpu 2>/dev/null || \
	    $(PIP) install --retries 1 --timeout 20 --no-deps --index-url $(CPU_INDEX) torch==$(TORCH) || { \
	        echo "no CPU build of torch $(TORCH), neither in pip's configured indexes nor at $(CPU_INDEX). To go on with" \
	            "PyPI's build (gigabytes of CUDA libraries): $(PIP) install torch==$(TORCH), then make again" >&2; exit 1; }; \
	fi
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	$(PIP) install --quiet --constraint $(VENV)/torch.txt --editable '.[dev]'
	@touch $@
