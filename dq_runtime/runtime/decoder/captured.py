"""A decode step as one CUDA graph: hundreds of launches become one, which at batch 1 is most of a step's time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 2  # runs before the capture, in which Triton compiles and libraries allocate their workspaces


class CapturedStep:
    """Replays ``run(tokens)`` on fixed addresses. ``run`` takes ids int64 [B, 1] and returns logits [B, V]; it must
    read everything else from tensors that outlive this object. What it writes to ``state`` while it is warmed up is
    undone.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], batch: int, state: Tensor) -> None:
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=state.device)
        before = state.clone()
        side = torch.cuda.Stream(state.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(state.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run(self._tokens)
                state.copy_(before)
        torch.cuda.current_stream(state.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=side):  # the default one may be another GPU's
            self._logits = run(self._tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] for ids [b, 1], b <= B; rows beyond b are those of whatever ran there last."""
        self._tokens[: tokens.shape[0]].copy_(tokens)
        self._graph.replay()
        return self._logits.clone()  # the next replay overwrites it
