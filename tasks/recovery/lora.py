"""LoRA through peft, as a layer whose update is masked: x (W + scaling (B A) on the mask)^T.

    with Lora(modality, spec) as trained:
        ...                        # trained.tensors are the factors A and B, in float32

When it ends, peft merges the layers; the merged weight is the one that every forward multiplied.
LoRA: Hu et al. 2021 (arXiv 2106.09685), equation 3.
"""

from __future__ import annotations

import re
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from infra.errors import UserError
from infra.recovery_spec import RecoverySpec
from modalities.base import Modality

ADAPTER = "recovery"


class MaskedLinear(nn.Module, LoraLayer):
    """peft's LoRA layer around an nn.Linear, with an update that leaves zeros alone."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        config: LoraConfig,
        r: int,
        lora_alpha: int,
        **options: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)
        self.lora_A.float()
        self.lora_B.float()

    def merged_weight(self) -> Tensor:
        """The weight with the update: out x in, in its own precision."""
        second: Any = self.lora_B[ADAPTER].weight
        update = self.scaling[ADAPTER] * (second @ self.lora_A[ADAPTER].weight)
        return masked_sum(self.base_layer.weight, update)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """x times the merged weight."""
        return F.linear(x, self.merged_weight(), self.base_layer.bias)  # type: ignore[arg-type]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Keep the merged weight; called by peft."""
        self.base_layer.weight.copy_(self.merged_weight())  # type: ignore[operator]


def masked_sum(weight: Tensor, update: Tensor) -> Tensor:
    """weight + update where weight is not zero, summed in float32, in the precision of weight.

    Both are out x in. A weight that would become zero keeps its value.
    """
    moved = (weight.float() + update).to(weight.dtype)
    return torch.where((weight != 0) & (moved != 0), moved, weight)


class Lora:
    """The factors of every prunable matrix; `tensors` are all A and B."""

    def __init__(self, modality: Modality, spec: RecoverySpec) -> None:
        self._modality = modality
        names = [
            f"{block.name}.{matrix.parameter}".removesuffix(".weight")
            for block in modality.blocks
            for matrix in block.matrices
        ]
        config = LoraConfig(
            r=spec.rank,
            lora_alpha=spec.alpha,  # type: ignore[arg-type]  # any number will do
            target_modules="|".join(map(re.escape, names)),  # a list would match ends of names
        )
        config._register_custom_module({nn.Linear: MaskedLinear})
        with torch.random.fork_rng():
            torch.manual_seed(spec.seed)
            self._peft = LoraModel(modality.model, {ADAPTER: config}, ADAPTER)
        factors = {n: p for n, p in modality.model.named_parameters() if p.requires_grad}
        self._names = list(factors)
        self.tensors: list[nn.Parameter] = list(factors.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._peft.merge_and_unload()
        else:
            self._peft.unload()
        self._modality.model.requires_grad_(False)

    def check_gradients(self) -> None:
        """A model that takes the weight of a layer and multiplies by itself passes LoRA by."""
        for name, tensor in zip(self._names, self.tensors, strict=True):
            if tensor.grad is None:
                layer = name.partition(".lora_")[0]
                raise UserError(
                    f"recovery.method='lora' does not reach {layer}, whose layer is not called: "
                    "set recovery.method=full"
                )

    def settle(self) -> None:
        """The forward merges the factors itself."""


def refuse_other_layers(modality: Modality) -> None:
    """Raise UserError where a prunable matrix is not the weight of an nn.Linear."""
    for block in modality.blocks:
        for matrix in block.matrices:
            owner, _, name = matrix.parameter.rpartition(".")
            layer = block.module.get_submodule(owner)
            if not isinstance(layer, nn.Linear) or name != "weight":
                raise UserError(
                    f"recovery.method='lora' is for linear layers, {block.name}.{matrix.name} is "
                    f"of {type(layer).__name__}: set recovery.method=full"
                )
