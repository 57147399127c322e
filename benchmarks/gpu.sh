#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: check the Triton kernels, and only if they are right, time them.
#
#   benchmarks/gpu.sh [options of benchmarks/qmm_gpu.py]        PYTHON=... chooses the interpreter
#
# Nothing of this project needs to be installed: it needs torch with CUDA, triton and pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=.:kernels
unset TRITON_INTERPRET DQ_BACKEND

if ! reason=$("$python" -c 'from dq_runtime.backends.triton_cuda import TritonCuda; print(TritonCuda().available() or "")'); then
    echo "benchmarks/gpu.sh: $python cannot import dq_runtime (the traceback is above)" >&2
    exit 2
fi
if [ -n "$reason" ]; then
    echo "benchmarks/gpu.sh: nothing was tested or timed, the Triton backend is unavailable here: $reason" >&2
    exit 2
fi
if ! "$python" -c 'import pytest' 2>/dev/null; then
    echo "benchmarks/gpu.sh: nothing was timed, because pytest is missing and unchecked kernels are not timed" >&2
    exit 2
fi

# -c /dev/null: pyproject.toml's strict configuration names plugins that a bare machine may lack.
"$python" -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning \
    -q --maxfail=20 -m gpu tests/gpu
exec "$python" benchmarks/qmm_gpu.py "$@"
