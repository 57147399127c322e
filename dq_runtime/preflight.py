"""Everything a quantization can be refused for, asked before the work begins."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dq_runtime.data import Text, Windows
from dq_runtime.errors import DQError, SpecError
from dq_runtime.grids import GRIDS
from dq_runtime.levels import INT
from dq_runtime.modules.surgery import weight_of
from dq_runtime.packing.run_state import Claim
from dq_runtime.ranks import Ranks
from dq_runtime.request import Request
from dq_runtime.rounding import ROUNDINGS, Rounding
from dq_runtime.spec import GridSpec, QuantSpec
from dq_runtime.transforms import Needs as TransformNeeds
from dq_runtime.transforms import Transform


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an existing output unless it is a checkpoint and may be replaced."""
    if not output.exists():
        return
    if not overwrite:
        raise SpecError(f"{output} exists; choose another output directory or add --overwrite")
    if not (output / "config.json").exists():
        raise SpecError(f"{output} exists and is not a checkpoint; it will not be overwritten")


def check_continued(count: int, calibration: str | None, blockwise: bool) -> None:
    """:class:`SpecError` where the model cannot add ``count`` windows to those of the calibration text."""
    if count < 0:
        raise SpecError(f"continued_windows must be 0 or more, got {count}")
    if count and calibration is None:
        raise SpecError("continued_windows goes on from windows of a text: add calibration text, or leave it out")
    if count and blockwise:
        raise SpecError("--blockwise does not let the model write text, token by token; leave out --continued-windows")


def check_processes(spec: QuantSpec, rounding: Rounding, transform: Transform, ranks: Ranks) -> None:
    """:class:`SpecError` for what several processes cannot do together."""
    if ranks.mesh is None:
        return
    check = getattr(rounding, "check_processes", None)
    if check is None:
        able = ", ".join(name for name in ROUNDINGS if hasattr(ROUNDINGS.get(name), "check_processes"))
        raise SpecError(
            f"rounding {spec.rounding.name!r} runs in one process: leave torchrun away (of all methods {able} knows "
            "how to share its work)"
        )
    if spec.target is not None:
        raise SpecError(
            "bits per layer are measured in one process: leave torchrun away, or give --override what a run chose"
        )
    if TransformNeeds.OBJECTIVE in transform.needs:
        raise SpecError(f"transform {spec.transform!r} learns in one process: leave torchrun away, or use hadamard")
    check(ranks.world)


def check_weights(model: Any) -> None:
    """Refuse NaN and infinity anywhere in the model, quantized or not."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise DQError(f"{name} of the model holds NaN or infinity; the model is damaged")


def plan(modules: Mapping[str, Any], spec: QuantSpec) -> dict[str, GridSpec]:
    """The grid of every layer that will be quantized; everything that can be refused is refused here."""
    if not modules:
        raise SpecError("the model has no linear layers to quantize")
    for override in spec.overrides:
        matched = [name for name in modules if fnmatchcase(name, override.pattern)]
        if not matched:
            raise SpecError(
                f"override pattern {override.pattern!r} matches no layer; the first layer is {next(iter(modules))}"
            )
        if override.bits and all(any(fnmatchcase(name, p) for p in spec.ignore) for name in matched):
            raise SpecError(
                f"override pattern {override.pattern!r} matches only {matched[0]}, which --ignore leaves dense"
            )
    plan = {}
    for name, module in modules.items():
        grid = spec.grid_for(name)
        if grid is None:
            continue
        weight = weight_of(module)
        try:
            grid.groups(weight.shape[1])
        except SpecError as e:
            raise SpecError(f"{name}: {e} (--override '{name}=BITS:GROUP')") from None
        plan[name] = grid
    if not plan:
        raise SpecError("no linear layer is left to quantize; check --ignore and --override")
    return plan


def fingerprint(weights: Iterable[Tensor]) -> str:
    """Hash of the largest magnitude of every row of the weights [N, K] that will be quantized: the same model gives the
    same, a fine-tuned one does not."""
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.detach().float().abs().amax(1).cpu().numpy().tobytes())
    return digest.hexdigest()


def claim(
    request: Request, texts: tuple[Text | None, Text | None], windows: tuple[Windows, Windows], model: str
) -> Claim:
    """What a run is known by; ``model``: its :func:`fingerprint`.

    A run that diverged or ran out of memory may go on with another lr, dtype or batch, where the method's state does
    not depend on those, and with shorter windows of the same documents. Anything else would make another checkpoint.
    """
    spec = request.full_spec
    options = spec["rounding"]["options"]
    adjustable = {name: value for name, value in options.items() if name in request.rounding.adjustable}
    kept = {name: value for name, value in options.items() if name not in adjustable}
    read = dict(zip(("calibration text", "held-out text"), zip(texts, windows, strict=True), strict=True))
    return Claim(
        fixed={
            "spec": {**spec, "rounding": {"name": spec["rounding"]["name"], "options": kept}},
            "count of calibration or held-out windows": [len(w.tokens) for w in windows],
            **{name: None if text is None else text.fingerprint() for name, (text, _) in read.items()},
            "way to hold the model (--blockwise)": request.blockwise,
            "model": model,
        },
        windows={name: cut.fingerprint() for name, (_, cut) in read.items()},
        window_length=request.length,
        adjustable={**adjustable, "compute dtype": str(request.dtype).removeprefix("torch.")},
    )


def check_grid(spec: QuantSpec, rounding: Rounding) -> None:
    """:class:`SpecError` for a grid that there is not, or on which the method cannot round."""
    GRIDS.get(spec.grid.name)
    if spec.grid.name != INT and not rounding.any_grid:
        able = ", ".join(name for name in ROUNDINGS if ROUNDINGS.get(name).any_grid)
        raise SpecError(
            f"rounding {spec.rounding.name!r} works on evenly spaced levels, which grid {spec.grid.name} has not; use "
            f"one of {able}"
        )
