"""Several workers that share every batch, in torch.distributed where somebody has set that up.

all_sum([loss, *gradients])        # of one worker alone: nothing happens
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tasks.recovery.states import MOMENTS, Begun


def num_workers() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def share(num_windows: int) -> range:
    """The places of a batch that are this worker's."""
    return range(dist.get_rank() if dist.is_initialized() else 0, num_windows, num_workers())


def all_sum(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all workers."""
    if num_workers() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def from_first(
    begun: Begun, tensors: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> Begun:
    """Where the first worker begins, its tensors and its optimizer's moments, for all workers."""
    if num_workers() == 1:
        return begun
    told: list[Begun] = [begun]
    dist.broadcast_object_list(told)
    steps = told[0][0]
    for tensor in tensors:
        dist.broadcast(tensor.data, 0)
        if steps:
            state = optimizer.state[tensor]
            if not state:
                state |= {"step": torch.tensor(float(steps))}
                state |= {name: torch.zeros_like(tensor.data) for name in MOMENTS}
            for name in MOMENTS:
                dist.broadcast(state[name], 0)
    return told[0]
