"""Gradients of the dense model's loss with respect to its prunable matrices.

gradients = matrix_gradients(modality, calibration_batches)
gradients[modality.blocks[0].matrices[0]]     # out x in, on the host
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modalities.base import Batch, Modality
from modalities.products import Matrix

Key = tuple[int, str]


def matrix_gradients(modality: Modality, batches: Sequence[Batch]) -> dict[Matrix, Tensor]:
    """The root of the summed squared gradients of every window's loss, in float32 on the host.

    One forward and backward per window, with the weights of all blocks on the device at once; a
    block keeps its input only and is run again on the way back. Zero where no window reached an
    expert.
    """
    sums: dict[Key, Tensor] = {}
    wanted = {(i, m.parameter) for i, block in enumerate(modality.blocks) for m in block.matrices}
    with ExitStack() as stack:
        for index in range(len(modality.blocks)):
            stack.callback(modality.release_block, index)
            modality.attach_block(index)
        stack.enter_context(run_again([block.module for block in modality.blocks]))
        for parameter in modality.model.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        for key in wanted:
            parameter = modality.blocks[key[0]].module.get_parameter(key[1])
            parameter.requires_grad_(True)
            hook = parameter.register_post_accumulate_grad_hook(partial(_take, sums, key))
            stack.callback(hook.remove)
        stack.enter_context(torch.enable_grad())
        for batch in batches:
            for row in range(batch.windows):
                for loss in modality.window_losses(batch.rows(row, row + 1)):
                    _refuse_overflow(modality, loss)
                    loss.backward()
    for total in sums.values():
        total.sqrt_()
    return {
        matrix: (
            matrix.of(sums[index, matrix.parameter])
            if (index, matrix.parameter) in sums
            else torch.zeros_like(matrix.weight(), dtype=torch.float32, device="cpu")
        )
        for index, block in enumerate(modality.blocks)
        for matrix in block.matrices
    }


@contextmanager
def run_again(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What each of these computes inside is forgotten, and computed again for its gradients."""
    held = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = partial(
                checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
            )
        yield
    finally:
        for module, forward in zip(modules, held, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:  # accelerate keeps its hook there
                module.forward = forward


def _refuse_overflow(modality: Modality, loss: Tensor) -> None:
    if torch.isfinite(loss):
        return
    for block in modality.blocks:
        for matrix in block.matrices:
            if not torch.isfinite(matrix.weight().sum(dtype=torch.float32)):
                raise RuntimeError(f"{block.name}.{matrix.name} holds NaN or infinity")
    raise RuntimeError("the loss of the dense model is NaN or infinity, so it has no gradients")


def _take(sums: dict[Key, Tensor], key: Key, parameter: nn.Parameter) -> None:
    """Square a gradient as soon as it is there and free the device of it."""
    assert parameter.grad is not None
    squares = parameter.grad.float().square_().cpu()
    parameter.grad = None
    sums[key] = sums[key].add_(squares) if key in sums else squares
