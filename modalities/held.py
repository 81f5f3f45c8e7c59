"""A model that its owner holds in memory: any nn.Module with blocks, as it stands.

    with HeldModality(model, [input_ids]) as held:
        held.blocks, held.matrices()

Nothing of the model is changed for good: a block that was pruned or perturbed is put back when it
is released, and what is set for the duration (eval mode, visible experts) when the `with` ends.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from infra.errors import UserError
from modalities.base import Batch, HeldWeights, Modality
from modalities.blocks import find_blocks


@dataclass(frozen=True)
class HeldBatch(Batch):
    """Keyword arguments of one forward; `ids` is what stands for its size."""

    inputs: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> HeldBatch:
        """All of it: what of the inputs belongs to a window is not known."""
        return self


class HeldModality(Modality):
    """A plain model and its inputs; use it in a `with`.

    `calibration` is a list of input_ids, windows x tokens or tokens, or of keyword arguments;
    without any, a transformers model's own dummy inputs are what finds the blocks.
    """

    def __init__(self, model: nn.Module, calibration: Sequence[Any] | None = None) -> None:
        devices = {p.device for p in model.parameters()}
        if len(devices) != 1 or torch.device("meta") in devices:
            where = ", ".join(sorted(map(str, devices))) or "nowhere"
            raise UserError(f"the weights are on {where}: bring the model to one device")
        self._keywords = set(inspect.signature(model.forward).parameters)
        self._dense: dict[int, dict[str, Tensor]] = {}
        self._training = [module for module in model.modules() if module.training]
        config = getattr(model, "config", None)
        self._experts = getattr(config, "_experts_implementation", None)
        (device,) = devices
        dummy = getattr(model, "dummy_inputs", None)
        if not calibration and dummy is None:
            raise UserError(f"give calibration: {type(model).__name__} has no inputs of its own")
        self.model = model
        self._enter()
        try:
            probe = [_batch(each, device) for each in (calibration or [dummy])]
            self.calibration = probe if calibration else []
            with torch.no_grad():
                blocks = find_blocks(model, lambda: self.run(probe[0]))
        except BaseException:
            self.close()
            raise
        super().__init__(model, blocks, HeldWeights(), device)
        self._first = probe[0]

    def __enter__(self) -> HeldModality:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _enter(self) -> None:
        self.model.eval()
        if self._experts is not None:
            # Fused kernels hide the products of experts.
            self.model.set_experts_implementation("eager")  # type: ignore[operator]

    def close(self) -> None:
        """Everything as it was before."""
        for index in list(self._dense):
            self.release_block(index)
        for module in self._training:
            module.training = True
        if self._experts is not None:
            self.model.set_experts_implementation(self._experts)  # type: ignore[operator]

    def attach_block(self, index: int) -> None:
        """Remember a block's prunable weights."""
        block = self.blocks[index]
        self._dense[index] = {
            name: block.module.get_parameter(name).detach().clone()
            for name in dict.fromkeys(matrix.parameter for matrix in block.matrices)
        }

    def park_block(self, index: int) -> None:
        """Keep what was done to a block."""
        self._dense.pop(index, None)

    def release_block(self, index: int) -> None:
        """Put a block's weights back."""
        for name, dense in self._dense.pop(index, {}).items():
            self.blocks[index].module.get_parameter(name).data.copy_(dense)

    def run(self, batch: Batch) -> Any:
        """One forward without a cache, where the model knows of one."""
        assert isinstance(batch, HeldBatch)
        inputs = dict(batch.inputs)
        if "use_cache" in self._keywords:
            inputs["use_cache"] = False
        return self.model(**inputs)

    def probe(self) -> Any:
        """The first of the inputs."""
        return self.run(self._first)

    def losses(self, batch: Batch) -> list[float]:
        """The model's own loss where the inputs hold labels, else nats per token after the first.

        Raises UserError where there is neither a loss nor logits of tokens.
        """
        assert isinstance(batch, HeldBatch)
        output = self.run(batch)
        if "labels" in batch.inputs and getattr(output, "loss", None) is not None:
            return [float(output.loss)] * batch.ids.shape[0]
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if logits is None or logits.shape[:2] != batch.ids.shape or batch.ids.shape[1] < 2:
            raise UserError(
                f"{type(self.model).__name__} gives no loss for this calibration: give input_ids "
                "of two tokens or more, or keyword arguments with labels"
            )
        return [
            float(F.cross_entropy(row[:-1].float(), ids[1:]).double())
            for row, ids in zip(logits, batch.ids, strict=True)
        ]

    def scored_tokens(self, batch: Batch) -> list[int]:
        """All tokens of a window but its first."""
        return [batch.ids.shape[1] - 1] * batch.ids.shape[0]

    def facts(self) -> dict[str, Any]:
        """Nothing is known of its context."""
        return {"context": 0, "adds_bos": False}


def _batch(given: Any, device: torch.device) -> HeldBatch:
    if isinstance(given, Tensor):
        given = {"input_ids": given[None] if given.ndim == 1 else given}
    if not isinstance(given, Mapping) or not given:
        raise UserError(
            f"calibration holds {type(given).__name__}: give input_ids, or keyword arguments"
        )
    inputs = tree_map_only(Tensor, lambda tensor: tensor.to(device), dict(given))
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    ids = inputs["input_ids"] if "input_ids" in inputs else (tensors or [torch.empty(1, 0)])[0]
    return HeldBatch(ids, (0,) * ids.shape[0], inputs)
