"""The state of a fine-tune on this node: what an interrupted one goes on from, to the same bits.

    state = State("9f2c...")                 # a digest of all that decides the weights
    begun, losses, seconds = state.restore(tensors, optimizer)
    state.save(tensors, optimizer, losses, seconds)

It is one file, written by temp file, fsync and rename, so that a kill leaves the one before it.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from contextlib import suppress

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from infra.cache import cache_dir, remove_older
from infra.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")
Begun = tuple[int, list[float], float]  # steps done, the loss of each, seconds


class State:
    """The file of one fine-tune."""

    def __init__(self, key: str) -> None:
        self.path = cache_dir() / "recovery" / f"{key}.safetensors"

    def restore(self, tensors: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> Begun:
        """Where to go on; all zero where there is no state."""
        try:
            with safe_open(self.path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = json.loads(file.metadata()["facts"])
        except FileNotFoundError:
            return 0, [], 0.0
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.path} cannot be read: {error}; remove it") from error
        step = len(facts["losses"])
        for number, tensor in enumerate(tensors):
            tensor.data.copy_(found[f"{number}.value"])
            optimizer.state[tensor] = {
                "step": torch.tensor(float(step)),
                **{name: found[f"{number}.{name}"].to(tensor.device) for name in MOMENTS},
            }
        return step, facts["losses"], facts["seconds"]

    def save(
        self,
        tensors: Sequence[nn.Parameter],
        optimizer: torch.optim.Optimizer,
        losses: Sequence[float],
        seconds: float,
    ) -> None:
        """Replace the state; raises UserError where it cannot be written."""
        found = {}
        for number, tensor in enumerate(tensors):
            found[f"{number}.value"] = tensor.data
            found |= {f"{number}.{name}": optimizer.state[tensor][name] for name in MOMENTS}
        facts = json.dumps({"losses": list(losses), "seconds": seconds})
        temporary = self.path.with_name(f".{uuid.uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            remove_older(self.path.parent, days=30)  # of runs that nobody took up again
            save_file(found, temporary, metadata={"facts": facts})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"cannot write {self.path}: {reason}") from error

    def remove(self) -> None:
        """After success."""
        self.path.unlink(missing_ok=True)
