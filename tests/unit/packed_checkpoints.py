"""Packed checkpoints for tests in a third of a second: nearest rounding, nothing measured."""

from __future__ import annotations

from pathlib import Path

import torch

from dq_runtime.grids import GRIDS
from dq_runtime.modules.quant_linear import QuantLinear
from dq_runtime.modules.surgery import bias_of, linears, replace_module, weight_of
from dq_runtime.packing import PackedWeight, pack_codes
from dq_runtime.packing.checkpoint import write_sums
from dq_runtime.runtime.dense import load_dense
from dq_runtime.runtime.save import write_model
from dq_runtime.spec import QuantSpec


def pack_model(source: Path, output: Path, spec: QuantSpec) -> Path:
    """``source`` (a dense Hugging Face directory) on the grids of ``spec``, every weight at its nearest code."""
    lm = load_dense(str(source))
    packed, grids = {}, {}
    for name, module in linears(lm.model).items():
        grid_spec = spec.grid_for(name)
        if grid_spec is None:
            continue
        grid = GRIDS.get(grid_spec.name)(grid_spec)
        weight = weight_of(module).detach()
        scales = grid.fit(weight)
        codes = pack_codes(grid.nearest(weight, scales), grid_spec.bits)
        packed[name] = PackedWeight(
            codes, scales.scale, scales.zero, grid_spec.bits, weight.shape[1], grid.decode_form.name
        )
        grids[name] = grid_spec
        replace_module(lm.model, name, QuantLinear(packed[name], bias_of(module)))
    output.mkdir(parents=True)
    write_model(output, lm, packed, grids, False, getattr(torch, spec.grid.scale_dtype))
    write_sums(output)
    return output
