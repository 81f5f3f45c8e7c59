"""Sweeps over small models that do what few do: experts in lists, contexts, side effects, skips.

python -m pytest tests/tasks/test_sweep_toys.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.errors import UserError
from infra.weights import MappedWeights, save_mapped
from modalities.base import Batch, HeldWeights, Modality
from modalities.blocks import find_blocks
from tests.tasks.sweeps import PAUSES, TILTED, check_zeros, kept, plain, sweep

WIDTH, TOKENS = 8, 50
CPU = torch.device("cpu")


class Toy(Modality):
    """A model of token ids with the loss of a language model."""

    def run(self, batch: Batch) -> Any:
        return self.model(batch.ids)

    def losses(self, batch: Batch) -> list[float]:
        logits: Tensor = self.run(batch)
        return [
            float(F.cross_entropy(row[:-1], ids[1:]))
            for row, ids in zip(logits, batch.ids, strict=True)
        ]

    def scored_tokens(self, batch: Batch) -> list[int]:
        return [batch.ids.shape[1] - 1] * batch.ids.shape[0]

    def facts(self) -> dict[str, Any]:
        return {"context": 100, "adds_bos": False}


class Net(nn.Module):
    """Embedding, three blocks and a head; `after` is what it does to the output of a block."""

    def __init__(self, block: Callable[[], nn.Module], after: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(WIDTH, TOKENS)
        self.after = after or (lambda x: x)
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = self.after(layer(x))
        return self.head(x)


def toy(tmp_path: Path, block: Callable[[], nn.Module], after: Any = None) -> Toy:
    model = Net(block, after).eval()
    save_mapped(model, tmp_path / "weights.safetensors")
    weights = MappedWeights(tmp_path / "weights.safetensors")
    weights.attach(model, "", CPU)
    ids = torch.arange(TOKENS).reshape(2, -1)
    with torch.no_grad():
        return Toy(model, find_blocks(model, lambda: model(ids)), weights, CPU)


def some(*shapes: tuple[int, int]) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [Batch(torch.randint(0, TOKENS, s, generator=generator), (0,) * s[0]) for s in shapes]


EVALUATION = some((2, 7), (1, 12))
CALIBRATION = some((2, 9), (1, 1), (1, 1), (1, 2))  # several see a few of the experts only


class Expert(nn.Module):
    """One of several feed-forward networks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Mixture(nn.Module):
    """Six experts in a list; every token goes to one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 6, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for number in chosen.unique().tolist():
            out[chosen == number] = self.experts[number](x[chosen == number])
        return x + out


@pytest.mark.parametrize("pause", PAUSES)
def test_experts_in_lists_that_batches_reach_in_part(tmp_path: Path, pause: Any) -> None:
    """Every batch calls other experts; in the order of their numbers, none is pruned too early."""
    modality = toy(tmp_path, Mixture)
    names = [f"experts.{e}.{x}.weight" for e in range(6) for x in ("up", "down")]
    assert [[m.name for m in block.matrices] for block in modality.blocks] == [names] * 3
    with kept(modality):
        outcome = sweep(
            modality,
            TILTED,
            method="wanda",
            pause_at=pause,
            calibration=CALIBRATION,
            evaluation=EVALUATION,
            keep=True,
        )
        assert outcome.losses == plain(modality, EVALUATION)
        check_zeros(modality, outcome, TILTED)


class Block(nn.Module):
    """Two products; subclasses add what is unusual."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class InInference(Block):
    """Runs in contexts of its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


@pytest.mark.parametrize("pause", PAUSES)
def test_contexts_inside_blocks(tmp_path: Path, pause: Any) -> None:
    modality = toy(tmp_path, InInference)
    with kept(modality):
        outcome = sweep(
            modality,
            TILTED,
            method="wanda",
            pause_at=pause,
            calibration=CALIBRATION,
            evaluation=EVALUATION,
            keep=True,
        )
        assert outcome.losses == plain(modality, EVALUATION)


class Writing(Block):
    """Changes what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x += 0.5
        return super().forward(x)


def test_a_block_that_writes_to_its_arguments(tmp_path: Path) -> None:
    modality = toy(tmp_path, Writing)
    options: Any = {"method": "wanda", "calibration": CALIBRATION, "evaluation": EVALUATION}
    dense = plain(modality, EVALUATION)
    with pytest.raises(UserError, match=r"layers\.0 changes its arguments .*prune.pause=linear"):
        sweep(modality, TILTED, pause_at="block", **options)
    assert plain(modality, EVALUATION) == dense
    with kept(modality):
        outcome = sweep(modality, TILTED, pause_at="linear", keep=True, **options)
        assert outcome.losses == plain(modality, EVALUATION)


class Repeating(Block):
    """Multiplies one of its matrices twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def test_a_matrix_that_is_multiplied_twice(tmp_path: Path) -> None:
    """Its later inputs are not there when it is pruned at the first product."""
    modality = toy(tmp_path, Repeating)
    options: Any = {"method": "wanda", "calibration": CALIBRATION, "evaluation": EVALUATION}
    with pytest.raises(UserError, match=r"^layers\.0\.up\.weight is multiplied .*pause=block"):
        sweep(modality, TILTED, pause_at="linear", **options)
    with kept(modality):
        outcome = sweep(modality, TILTED, pause_at="block", keep=True, **options)
        assert outcome.losses == plain(modality, EVALUATION)


def test_error_curves_of_outputs_that_the_model_writes_to(tmp_path: Path) -> None:
    """The model adds to a block's output in place, after the curve has seen it."""
    modality = toy(tmp_path, Block, after=lambda x: x.add_(1.0))
    outcome = sweep(
        modality,
        [0.0, 0.0, 0.5],
        method="wanda",
        pause_at="linear",
        calibration=CALIBRATION,
        evaluation=EVALUATION,
        dense=True,
    )
    assert [error.relative for error in outcome.errors][:2] == [0.0, 0.0]
    assert outcome.errors[2].relative > 0


def test_a_matrix_that_no_batch_reaches(tmp_path: Path) -> None:
    """A block that all batches pass by was not pruned: the sweep says so."""
    modality = toy(tmp_path, Block)
    model = modality.model
    last = model.layers.pop(2)
    modality.model.skipped = last
    with pytest.raises(RuntimeError, match="4 of 6 matrices were reached"):
        sweep(
            modality,
            TILTED,
            method="wanda",
            pause_at="linear",
            calibration=CALIBRATION,
            evaluation=EVALUATION,
        )


def test_streaming_has_one_block_on_the_device_at_a_time(tmp_path: Path) -> None:
    calls: list[tuple[str, int]] = []

    class Noting(Toy):
        def attach_block(self, index: int) -> None:
            calls.append(("attach", index))
            super().attach_block(index)

        def release_block(self, index: int) -> None:
            calls.append(("release", index))
            super().release_block(index)

    made = toy(tmp_path, Block)
    modality = Noting(made.model, made.blocks, made.weights, CPU)
    expected = [(what, index) for index in range(3) for what in ("attach", "release")]
    for forwards in (1, 2):
        with torch.no_grad(), modality.streaming():
            for _ in range(forwards):
                modality.losses(EVALUATION[0])
        assert calls == expected * forwards
        calls.clear()
    plain(modality, EVALUATION)
    assert calls == []  # its hooks are gone
    sweep(
        modality,
        TILTED,
        method="wanda",
        pause_at="linear",
        calibration=CALIBRATION,
        evaluation=EVALUATION,
        dense=True,
    )
    assert calls == expected


def test_held_weights_stay_what_they_are() -> None:
    block = Block()
    before = {name: p.clone() for name, p in block.named_parameters()}
    held = HeldWeights()
    held.attach(block, "", CPU)
    held.release(block, "")
    assert held.read() == {}
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
