# make demo   set up .venv, then chat with the small built-in model
# make test   set up .venv, then lint and all CPU tests
# make gpu    set up .venv, then ten minutes of tests and measurements on an NVIDIA GPU, into gpu-results/
# On a machine without an NVIDIA GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes of CUDA.

PYTHON ?= python3
TORCH_INDEX ?=
# Compiling all modules of all packages takes longer than compiling those that are imported, once.
PIP = .venv/bin/pip install --quiet --no-compile --constraint constraints.txt

# For the browser tests, where that is quick and allowed; without it they are skipped.
CHROMIUM = test "$$(id -u)" = 0 && timeout 60 apt-get update && DEBIAN_FRONTEND=noninteractive timeout 240 apt-get \
	install -y --no-install-recommends chromium chromium-driver fonts-noto-cjk fonts-noto-color-emoji

# Without bytecode every test that starts a process would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test gpu clean

demo: .venv/installed
	@.venv/bin/python cli_demo.py --checkpoint-path demo

test: .venv/installed-dev
	@command -v chromedriver >/dev/null || ($(CHROMIUM)) >/dev/null 2>&1 || echo "no Chromium: browser tests are skipped" >&2
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile

gpu: .venv/installed-dev
	.venv/bin/python benchmarks/bench_gpu.py --output gpu-results

# torch goes first: left to others, pip might choose another version of it than the one pinned.
.venv/installed: requirements.txt constraints.txt
	@echo "Setting up .venv (once; some minutes) ..." >&2
	@$(PYTHON) -m venv .venv
	@$(PIP) torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) >&2
	@$(PIP) --requirement requirements.txt >&2
	@touch $@

.venv/installed-dev: .venv/installed requirements_dev.txt requirements_eval.txt requirements_openai_api.txt requirements_web_demo.txt
	@$(PIP) --requirement requirements_dev.txt >&2
	@touch $@

clean:
	rm -rf .venv
