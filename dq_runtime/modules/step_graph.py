"""One DiscQuant step's forward and backward passes as one CUDA graph: thousands of launches for the price of one.

A step of a 1B model launches some 5,000 kernels. Everything about it but its tokens is the same every time, so it is
recorded once and replayed: on a machine with an H100, 84 ms a step instead of the 170 to 210 that Python takes to
launch it (benchmarks/discquant_step.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class StepGraph:
    """Records ``step(tokens)``, which runs backward and returns the loss, for tokens of one shape.

    ``parameters`` receive their gradients in tensors of the graph's own memory, which the next replay overwrites. Their
    ``grad`` must be None when recording. ``step`` must have run before (kernels compile, libraries initialise) and may
    not wait for the device. Recording runs nothing.
    """

    def __init__(
        self, step: Callable[[Tensor], Tensor], tokens: Tensor, parameters: Sequence[nn.Parameter], device: torch.device
    ) -> None:
        self.tokens = tokens.to(device, copy=True)
        self.parameters = parameters
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(self.graph):
            self.loss = step(self.tokens)
        self.grads: list[Tensor] = []
        for parameter in parameters:
            assert parameter.grad is not None
            self.grads.append(parameter.grad)
            parameter.grad = None

    def replay(self, tokens: Tensor) -> Tensor:
        """The loss for ``tokens``; gradients are added to those that the parameters have."""
        earlier = [None if parameter.grad is None else parameter.grad.clone() for parameter in self.parameters]
        self.tokens.copy_(tokens)
        self.graph.replay()
        for parameter, grad, before in zip(self.parameters, self.grads, earlier, strict=True):
            parameter.grad = grad if before is None else grad.add_(before)
        return self.loss.clone()
