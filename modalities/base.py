"""What every modality offers to the work on a model; `modalities.load` gives one.

    modality = load(spec.model, torch.device("cpu"))
    batches = modality.calibration_batches(spec.data, spec.calibration)
    modality.run(batches[0])

The weights are mapped (infra/weights.py); the parameters outside the blocks sit on the device,
those of a block only between `attach_block` and `release_block`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from infra.errors import UserError
from infra.records import MatrixRecord, ModelRecord, Split
from infra.recovery_spec import RecoverySpec
from infra.specs import CalibrationSpec, DataSpec, ModelSpec
from modalities.blocks import Block
from modalities.units import Units, find_units


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward: windows of text are rows of `ids`, with `bytes` of scored text each.

    Other modalities extend it; `ids` then holds pixels or what else has a row per window.
    """

    ids: Tensor
    bytes: tuple[int, ...]

    @property
    def windows(self) -> int:
        """How many windows there are: texts, images or questions."""
        return self.ids.shape[0]

    @property
    def tokens(self) -> int:
        """Tokens that pass every block."""
        return self.ids.numel()

    def rows(self, start: int, stop: int) -> Self:
        """Some of the windows."""
        return replace(self, ids=self.ids[start:stop], bytes=self.bytes[start:stop])

    def pick(self, numbers: Sequence[int]) -> Self:
        """Some of the windows, by number; copies."""
        some = tuple(self.bytes[i] for i in numbers)
        return replace(self, ids=self.ids[list(numbers)], bytes=some)


@dataclass(frozen=True)
class ExampleBatch(Batch):
    """Windows that are images or questions: a plan counts each as one."""

    @property
    def tokens(self) -> int:
        """Images or questions."""
        return self.windows


@dataclass(frozen=True)
class Measured:
    """Of each window: nats per scored unit, scores by name (the higher the better), and in words
    what the model answers and what was expected, where it does."""

    losses: list[float]
    scores: dict[str, list[float]] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)


class Weights(Protocol):
    """Where a model's blocks get their weights from: a mapped file, or what they hold."""

    sha256: str

    def read(self, prefix: str = "") -> dict[str, Tensor]:
        """The dense weights under a prefix."""

    def attach(self, module: nn.Module, prefix: str, device: torch.device) -> None:
        """Bring a block's weights to a device."""

    def release(self, module: nn.Module, prefix: str) -> None:
        """Free the device of them."""


class HeldWeights:
    """Of a model whose modules hold their own weights."""

    sha256 = ""

    def read(self, prefix: str = "") -> dict[str, Tensor]:
        """There is nothing to compare with."""
        return {}

    def attach(self, module: nn.Module, prefix: str, device: torch.device) -> None:
        """Move a block's weights to a device."""
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = tensor.data.to(device)

    def release(self, module: nn.Module, prefix: str) -> None:
        """Move them back."""
        self.attach(module, prefix, torch.device("cpu"))


class Modality(ABC):
    """A model, its blocks and its loss: what a sweep works on."""

    def __init__(
        self, model: nn.Module, blocks: list[Block], weights: Weights, device: torch.device
    ) -> None:
        self.model, self.blocks, self.weights, self.device = model, blocks, weights, device
        self._units: list[list[Units]] = []
        inside = {id(p) for block in blocks for p in block.module.parameters()}
        self._outside = [n for n, p in model.named_parameters() if id(p) not in inside]
        for parameter in map(model.get_parameter, self._outside):
            parameter.data = parameter.data.to(device)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)

    @abstractmethod
    def run(self, batch: Batch) -> Any:
        """One forward without cache, for calibration; its output does not matter."""

    def probe(self) -> Any:
        """One forward of something small, to see how the model is built."""
        raise UserError(f"prune.pattern=structured is not for {type(self.model).__name__}")

    def units(self) -> list[list[Units]]:
        """The channels and heads of every block that can go as a whole.

        Raises UserError for a model that does not work without some of them.
        """
        if not self._units:
            with torch.no_grad(), self.streaming():
                self._units = find_units(self.blocks, self.probe)
        return self._units

    @abstractmethod
    def losses(self, batch: Batch) -> list[float]:
        """One forward; nats per scored token of each window."""

    def measure(self, batch: Batch) -> Measured:
        """One forward; `losses`, and what else is known of each window."""
        return Measured(self.losses(batch))

    def window_losses(self, batch: Batch) -> list[Tensor]:
        """`losses` as tensors, for what asks for their gradients."""
        raise UserError(f"{type(self).__name__} gives no gradients: use another prune.method")

    @abstractmethod
    def scored_tokens(self, batch: Batch) -> list[int]:
        """Tokens of each window that `losses` averages over."""

    def attach_block(self, index: int) -> None:
        """Bring a block's dense weights to the device; on the CPU they are mapped already."""
        if self.device.type != "cpu":
            block = self.blocks[index]
            self.weights.attach(block.module, f"{block.name}.", self.device)

    def park_block(self, index: int) -> None:
        """Free the device of a block's weights and keep what was done to them."""
        for parameter in self.blocks[index].module.parameters():
            parameter.data = parameter.data.cpu()

    def release_block(self, index: int) -> None:
        """Forget what was done to a block's weights and free the device's copy."""
        block = self.blocks[index]
        self.weights.release(block.module, f"{block.name}.")

    def states_limit_bytes(self) -> float:
        """How much of the hidden states may wait on the device; more than that waits on the host.

        A quarter of the device's memory, so that two trials may share one.
        """
        if self.device.type == "cpu":
            return math.inf
        return torch.cuda.get_device_properties(self.device).total_memory / 4

    @contextmanager
    def streaming(self) -> Iterator[None]:
        """A plain forward works inside: each block is on the device while it is called."""
        with self._around_blocks(self.attach_block, self.release_block):
            yield

    @contextmanager
    def resident(self, *, whole: bool = False) -> Iterator[None]:
        """Plain forwards work inside, on the weights as they stand, which are parked afterwards.

        All blocks are on the device where they take at most half of what is free there, or where
        the `whole` model must be, for a backward; otherwise each is while it is called.
        """
        if self.device.type == "cpu":
            yield
            return

        def fetch(index: int) -> None:
            for parameter in self.blocks[index].module.parameters():
                parameter.data = parameter.data.to(self.device)

        parameters = [p for block in self.blocks for p in block.module.parameters()]
        free_bytes, _ = torch.cuda.mem_get_info(self.device)
        size_bytes = sum(p.numel() * p.element_size() for p in parameters)
        if size_bytes > free_bytes / 2 and not whole:
            with self._around_blocks(fetch, self.park_block):
                yield
            return
        try:
            for index in range(len(self.blocks)):
                fetch(index)
            yield
        finally:
            for index in range(len(self.blocks)):
                self.park_block(index)

    @contextmanager
    def _around_blocks(
        self, before: Callable[[int], None], after: Callable[[int], None]
    ) -> Iterator[None]:
        handles = []
        for index, block in enumerate(self.blocks):
            handles += [
                block.module.register_forward_pre_hook(lambda *_, i=index: before(i)),
                block.module.register_forward_hook(lambda *_, i=index: after(i)),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def check_untouched(self, index: int | None) -> None:
        """Compare everything not prunable with the file: of a block, or outside all blocks.

        Raises RuntimeError naming the parameter that changed.
        """
        if index is None:
            dense = self.weights.read()
            current = {n: self.model.get_parameter(n) for n in self._outside}
        else:
            block = self.blocks[index]
            dense = self.weights.read(f"{block.name}.")
            prunable = {matrix.parameter for matrix in block.matrices}
            parameters = block.module.named_parameters()
            current = {n: p for n, p in parameters if n not in prunable}
        for name, parameter in current.items():
            if name in dense and not torch.equal(parameter.detach().cpu(), dense[name]):
                raise RuntimeError(f"{name} was changed although it is not prunable")

    def matrices(self) -> list[MatrixRecord]:
        """Every prunable matrix, in the order of its use."""
        return [
            MatrixRecord(block=index, matrix=matrix.name, params=matrix.params, tower=block.tower)
            for index, block in enumerate(self.blocks)
            for matrix in block.matrices
        ]

    def record(self, source: str) -> ModelRecord:
        """What the model is made of."""
        return ModelRecord(
            source=source,
            architecture=type(self.model).__name__,
            dtype=str(next(self.model.parameters()).dtype).removeprefix("torch."),
            sha256=self.weights.sha256,
            blocks=[block.name for block in self.blocks],
            matrices=self.matrices(),
            total_params=sum(p.numel() for p in self.model.parameters()),
            inner=max(max(m.weight().shape) for b in self.blocks for m in b.matrices),
            unseen=[f"{b.name}.{name}" for b in self.blocks for name in b.unseen],
            **self.facts(),
        )

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The fields of ModelRecord that only the modality knows: context, width, licence..."""


class LoadedModality(Modality):
    """A model that a spec names, with its data, and how it is saved: what a trial works on.

    `writer` is the tokenizer, or the processor, of a model that continues a text; None of others.
    """

    writer: Any = None

    @classmethod
    @abstractmethod
    def load(cls, spec: ModelSpec, device: torch.device) -> LoadedModality:
        """Convert a checkpoint where this node has not yet, then map it."""

    @abstractmethod
    def calibration_batches(
        self, data: DataSpec, calibration: CalibrationSpec, *, divisor: int = 1
    ) -> list[Batch]:
        """What the pruner sees; `divisor` makes batches smaller, never fewer samples."""

    @abstractmethod
    def evaluation_batches(
        self, data: DataSpec, split: Split, windows: int, context: int, *, divisor: int = 1
    ) -> list[Batch]:
        """What measures the model."""

    def training_windows(self, data: DataSpec, recovery: RecoverySpec) -> Batch:
        """All windows that a recovery trains on, on the host; UserError where there are none."""
        raise UserError(f"recovery: {type(self.model).__name__} is not trained here, set steps=0")

    def training_loss(self, batch: Batch) -> Tensor:
        """The summed loss of some of these windows, on the device."""
        return torch.stack(self.window_losses(batch)).sum()

    def num_scored(self, batch: Batch) -> int:
        """What that is the sum over."""
        return batch.windows

    def num_together(self, batch: Batch) -> int:
        """How many of these windows pass the model at once."""
        return batch.windows

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model as it stands, in the form its own library loads."""

    @abstractmethod
    def reopen(self, folder: Path) -> LoadedModality:
        """A saved model that holds its own weights, with the data of this one."""


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the device multiplies it natively (twice as fast), else float32."""
    if name == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            units = torch.cpu.get_capabilities()
            native = any(units.get(unit) for unit in ("avx512_bf16", "amx_bf16"))
        return torch.bfloat16 if native else torch.float32
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
