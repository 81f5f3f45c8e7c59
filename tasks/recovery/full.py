"""Masked full fine-tuning: every weight that was kept is trained, through a copy in float32.

with Full(modality) as trained:
    loss.backward()            # gradients arrive at trained.tensors, zero where a weight is
    optimizer.step()
    trained.settle()           # into the model, in its own precision
"""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from modalities.base import Modality


class Trained(Protocol):
    """A model that is being trained: what the optimizer changes, and how that reaches the model."""

    tensors: list[nn.Parameter]

    def check_gradients(self) -> None:
        """Raise UserError where a gradient is missing that every backward gives."""

    def settle(self) -> None:
        """Bring what the optimizer did into the model."""


class Full:
    """The prunable parameters of all blocks; `tensors` are their copies in float32."""

    def __init__(self, modality: Modality) -> None:
        names = dict.fromkeys(
            (index, matrix.parameter)
            for index, block in enumerate(modality.blocks)
            for matrix in block.matrices
        )
        self._parameters = [modality.blocks[i].module.get_parameter(name) for i, name in names]
        self.tensors: list[nn.Parameter] = []

    def __enter__(self) -> Self:
        self._hooks = []
        for parameter in self._parameters:
            copy = nn.Parameter(parameter.detach().to(torch.float32, copy=True))
            self.tensors.append(copy)
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(partial(_take, copy))
            self._hooks.append(hook)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        for parameter in self._parameters:
            parameter.grad = None
            parameter.requires_grad_(False)

    def check_gradients(self) -> None:
        """An expert that no token reached has none."""

    @torch.no_grad()
    def settle(self) -> None:
        """Round into the model; a weight that would become zero keeps its value, in both."""
        for parameter, copy in zip(self._parameters, self.tensors, strict=True):
            moved = copy.to(parameter.dtype)
            lost = (moved == 0) & (parameter != 0)
            if lost.any():
                copy[lost] = parameter[lost].float()
                moved = copy.to(parameter.dtype)
            parameter.copy_(moved)


def _take(copy: nn.Parameter, parameter: Tensor) -> None:
    """Move a gradient to the copy as soon as it is there; none where a weight is zero."""
    assert parameter.grad is not None
    gradient = torch.where(parameter != 0, parameter.grad, 0).float()
    parameter.grad = None
    copy.grad = gradient if copy.grad is None else copy.grad.add_(gradient)
