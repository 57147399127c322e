"""What vLLM will do with layers on a table: nf4 and fp4 through our plugin, mxfp4 and nvfp4 by itself.

vLLM 0.33.0: layers/quantization/compressed_tensors/compressed_tensors.py (``_get_scheme_from_parts``), its schemes
w4a4_mxfp4 and w4a4_nvfp4 (with ``use_a16`` where activations are not quantized), and ``init_mxfp4_linear_kernel`` and
``init_nvfp4_linear_kernel`` of kernels/linear/__init__.py, which have no kernel for CPUs. Those were read, not run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, entry_points, version

from dq_runtime.levels import LEVELS
from dq_runtime.packing import PackedWeight
from dq_runtime.packing.checkpoint import Checkpoint
from dq_runtime.packing.quant_config import FLOAT_FORMATS
from dq_runtime.spec import PER_ROW

TABLES_OF_OURS = frozenset(LEVELS) - frozenset(FLOAT_FORMATS)
PLUGINS, PLUGIN = "vllm.general_plugins", "dq"
_CODES = 8  # in a word of 32 bits


def table_in_vllm(
    source: Checkpoint, weights: Mapping[str, PackedWeight], uneven: str, cuts: int
) -> tuple[bool, str, str]:
    """(loads, how, change) of the layers that vLLM multiplies as one matrix, all of one table. ``uneven``: why ranks
    cannot share it; ``cuts``: ranks that share its inputs."""
    first = next(iter(weights.values()))
    groups = {source.layers[name].group_size for name in weights}
    if len(groups) > 1:
        return False, "", "fused layers must share their groups; quantize them alike"
    if uneven:
        return False, "", uneven
    k, group = first.k // cuts, groups.pop()
    if (group != PER_ROW and k % group) or (cuts > 1 and k % _CODES):
        unit = f"words of {_CODES} codes" if group == PER_ROW else f"groups of {group}"
        return False, "", f"{k} inputs a rank are no whole {unit}; serve with fewer, or quantize with smaller groups"
    if first.form in TABLES_OF_OURS:
        return True, "our plugin: Triton from sm_80 on, C++ on CPUs", ""
    if first.form == "mxfp4":
        return (
            True,
            "CUDA from sm_80 on: Marlin; from sm_100 on FlashInfer, which rounds activations to mxfp4 as well",
            "",
        )
    shared = {float(source.array(f"{name}.weight_global_scale").values.reshape(())) for name in weights}
    if len(shared) > 1:
        return (
            False,
            "",
            "fused layers are all read by the largest of their global scales: export to compressed-tensors",
        )
    return True, "CUDA: Marlin, Humming or FlashInfer by the chip, weights only", ""


def plugin_note() -> str:
    """Whether the vLLM of this environment, if there is one, will find our plugin."""
    needed = f"nf4 and fp4 need our plugin in vLLM's environment (pip install dq_runtime there; entry point {PLUGINS})"
    try:
        here = f"vLLM {version('vllm')} is installed here"
    except PackageNotFoundError:
        return f"{needed}; vLLM is not installed here, so this was not looked at"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return f"{needed}; {here}, but VLLM_PLUGINS={allowed} keeps it from loading {PLUGIN!r}"
    if not any(found.value.startswith("dq_runtime.") for found in entry_points(group=PLUGINS)):
        return f"{needed}; {here} and does not find it"
    return f"{needed}; {here} and finds it"
