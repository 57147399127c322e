"""Which windows of a calibration text are used: those that come first, or a coreset (``--calibration-select``).

random    the first windows of the shuffled documents
coreset   four times as many windows (or twice, where the text gives no more) are run through the model once; of their
          mean hidden states the kernel walk keeps a quarter whose mean, in the eyes of a Gaussian kernel, is that of
          all (theory/kernel_walk.py). That costs one forward pass a window: about as much as a DiscQuant run over the
          windows that are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from dq_runtime.data.windows import Windows
from dq_runtime.errors import DataError, DQError, SpecError
from dq_runtime.theory.kernel_walk import coreset, gaussian_kernel

SELECTIONS = ("random", "coreset")
POOLS = (4, 2)  # how many windows are looked at for each that is kept: as many as the text gives
BATCH = 2048  # tokens run at once, so that short windows do not read all weights one by one

Progress = Callable[[int, int], object]


class Pack(Protocol):
    """:func:`dq_runtime.data.pack_windows` with all but ``count`` decided."""

    def __call__(self, *, count: int) -> Windows: ...


def check_selection(select: str, calibration: str | None) -> str:
    """``select`` if there is such a selection and, where it needs one, a text to select from."""
    if select not in SELECTIONS:
        raise SpecError(f"calibration_select must be one of {', '.join(SELECTIONS)}, got {select!r}")
    if select == "coreset" and calibration is None:
        raise SpecError(
            "calibration_select 'coreset' chooses windows of a text: give calibration text, or use 'random'"
        )
    return select


def select_windows(pack: Pack, count: int, select: str, seed: int, features: Callable[[Tensor], Tensor]) -> Windows:
    """``count`` windows. ``features`` maps token ids [P, T] to what they are judged by, [P, H]; it is asked only by
    ``coreset``, which raises :class:`DataError` where the text does not give twice the windows that are kept."""
    if select == "random" or count == 0:
        return pack(count=count)
    pool = _pool(pack, count)
    chosen = coreset(gaussian_kernel(features(pool.tokens).double().numpy()), count, seed)
    source = f"{pool.source}, {count} of {len(pool.tokens)} windows chosen by a kernel walk"
    return Windows(pool.tokens[torch.from_numpy(chosen)], source)


def _pool(pack: Pack, count: int) -> Windows:
    for times in POOLS:
        try:
            return pack(count=times * count)
        except DataError as error:
            short = error
    raise DataError(
        f"calibration_select 'coreset' keeps {count} of at least {POOLS[-1] * count} windows: {short}, or use 'random'"
    )


@torch.inference_mode()
def mean_hidden_states(model: Any, windows: Tensor, stage: Callable[[str], Progress]) -> Tensor:
    """The last hidden states of a transformers causal LM, averaged over each window: [P, T] -> float32 [P, H]."""
    device = model.get_input_embeddings().weight.device
    show, means = stage("Choosing windows"), []
    for part in torch.split(windows, max(1, BATCH // windows.shape[1])):
        hidden = model.base_model(input_ids=part.to(device), use_cache=False).last_hidden_state
        means.append(hidden.float().mean(1).cpu())
        show(sum(len(m) for m in means), len(windows))
    found = torch.cat(means)
    if not bool(torch.isfinite(found).all()):
        raise DQError("the model's hidden states hold NaN or infinity, so no window can be judged by them")
    return found
