"""A fine-tune lowers the loss and moves no zero; an interrupted one ends with the same bits.

python -m pytest tests/tasks/test_recovery.py
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import progress
from infra.errors import UserError
from infra.records import TrialResult, TrialSpec
from infra.recovery_spec import RecoverySpec
from infra.specs import CalibrationSpec, DataSpec, ModelSpec, PruneSpec
from tasks import recovery, trial
from tasks.recovery.lora import masked_sum
from tests.models import load, write_checkpoint

Made = Callable[..., TrialSpec]


@pytest.fixture
def make(tmp_path: Path, cache: Path, text: DataSpec) -> Iterator[Made]:
    """A final trial of a family that is fine-tuned for a few steps."""

    def spec(family: str = "llama", dtype: Any = "float32", **how: Any) -> TrialSpec:
        folder = tmp_path / family
        if not folder.exists():
            write_checkpoint(family, folder)
        short = {"steps": 6, "batch": 3, "length": 24, "learning_rate": 3e-3, "rank": 4}
        return TrialSpec(
            number=0,
            stage="final",
            model=ModelSpec(source=str(folder), dtype=dtype),
            data=text,
            calibration=CalibrationSpec(samples=4, length=16),
            prune=PruneSpec(sparsity=0.6, beta=0.1),
            split="report",
            windows=6,
            context=24,
            checkpoint=True,
            recovery=RecoverySpec(**short | how),
        )

    yield spec
    trial._loaded.clear()


def mean(losses: list[float]) -> float:
    return sum(losses) / len(losses)


def saved(result: TrialResult) -> dict[str, torch.Tensor]:
    model = load(Path(result.checkpoint)).model
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_sum_is_the_plain_sum_on_the_mask(dtype: torch.dtype) -> None:
    """Against float64 loops; a weight that the update cancels keeps its value."""
    torch.manual_seed(0)
    weight = torch.randn(7, 5).to(dtype)
    weight[torch.rand(7, 5) < 0.5] = 0
    update = torch.randn(7, 5)
    weight[0, 0], update[0, 0] = 0.5, -0.5
    got = masked_sum(weight, update)
    for i in range(7):
        for j in range(5):
            old, total = float(weight[i, j]), float(weight[i, j]) + float(update[i, j])
            if old == 0 or (i, j) == (0, 0):
                assert float(got[i, j]) == old
            else:
                assert float(got[i, j]) == pytest.approx(total, rel=1e-2, abs=1e-6)
    assert torch.equal(got == 0, weight == 0)


@pytest.mark.parametrize(
    ("family", "method", "dtype"),
    [
        ("llama", "lora", "float32"),
        ("llama", "lora", "bfloat16"),
        ("opt", "lora", "float32"),
        ("llama-tied", "full", "bfloat16"),
        ("gpt2", "full", "float32"),
        ("mixtral", "full", "float32"),
        ("gpt-oss", "full", "bfloat16"),
        ("jamba", "full", "float32"),
    ],
)
def test_loss_falls_and_every_zero_stays(make: Made, family: str, method: str, dtype: str) -> None:
    spec = make(family, dtype, method=method, steps=30)
    pruned = trial.run_trial(spec.model_copy(update={"recovery": None}))
    result = trial.run_trial(spec)
    assert result.losses == pruned.losses
    assert mean(result.recovered_losses) < mean(result.losses)
    assert result.recovery and result.recovery.zeros_before == result.recovery.zeros_after
    assert len(result.recovery.losses) == 30
    before, after = saved(pruned), saved(result)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    modality = trial.loaded(spec.model)
    assert changed == {f"{b.name}.{m.parameter}" for b in modality.blocks for m in b.matrices}
    for name in changed:
        assert torch.equal(before[name] == 0, after[name] == 0), name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_model_is_dense_again_for_the_next_trial(make: Made, method: str) -> None:
    spec = make(method=method)
    modality = trial.loaded(spec.model)
    before = {name: p.detach().clone() for name, p in modality.model.named_parameters()}
    forwards = [block.module.__dict__.get("forward") for block in modality.blocks]
    trial.run_trial(spec)
    after = dict(modality.model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in after.values())
    assert forwards == [block.module.__dict__.get("forward") for block in modality.blocks]
    assert not hasattr(modality.model, "peft_config")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_interrupted_ends_with_the_same_bits(
    make: Made, monkeypatch: pytest.MonkeyPatch, cache: Path, method: str, dtype: str
) -> None:
    spec = make(dtype=dtype, method=method, steps=7, save_every=2)
    undisturbed = trial.run_trial(spec)
    taken, step = [], recovery._step

    def stops(*args: Any) -> float:
        if len(taken) == 5:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*args)

    monkeypatch.setattr(recovery, "_step", stops)
    with pytest.raises(KeyboardInterrupt):
        trial.run_trial(spec)
    states = list((cache / "recovery").iterdir())
    assert len(states) == 1
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(progress, "SHORTEST_S", 0.0)
    monkeypatch.setattr(progress, "_listeners", [told.append])
    trial._loaded.clear()  # as in another process
    taken.clear()
    resumed = trial.run_trial(spec.model_copy(update={"number": 3}))
    assert len(taken) == 3  # steps 4, 5 and 6
    assert [facts["step"] for facts in told] == [4, 5, 6, 7]
    assert {(f["trial"], f["begun"], f["steps"]) for f in told} == {(3, 4, 7)}
    assert resumed.recovery and [f["loss"] for f in told] == resumed.recovery.losses[3:]
    assert resumed.recovered_losses == undisturbed.recovered_losses
    assert undisturbed.recovery
    assert resumed.recovery.losses == undisturbed.recovery.losses
    first, second = saved(undisturbed), saved(resumed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list((cache / "recovery").iterdir())


def test_gradients_are_those_of_the_masked_product(make: Made) -> None:
    """One step of plain gradient descent on float64 weights, written out, against the layer's."""
    from peft import LoraConfig
    from torch import nn

    from tasks.recovery.lora import ADAPTER, MaskedLinear

    torch.manual_seed(0)
    plain = nn.Linear(5, 7).requires_grad_(False)
    plain.weight[torch.rand(7, 5) < 0.5] = 0
    config = LoraConfig(r=2, lora_alpha=3)
    layer = MaskedLinear(plain, ADAPTER, config=config, r=2, lora_alpha=3)
    nn.init.normal_(layer.lora_B[ADAPTER].weight)
    x = torch.randn(4, 5)
    layer(x).square().sum().backward()
    first = layer.lora_A[ADAPTER].weight.detach().double().requires_grad_()
    second = layer.lora_B[ADAPTER].weight.detach().double().requires_grad_()
    mask = (plain.weight != 0).double()
    weight = plain.weight.double() + 1.5 * (second @ first) * mask
    (x.double() @ weight.T + plain.bias.double()).square().sum().backward()
    for mine, theirs in (("lora_A", first), ("lora_B", second)):
        assert theirs.grad is not None
        torch.testing.assert_close(getattr(layer, mine)[ADAPTER].weight.grad, theirs.grad.float())
    layer.merge()
    torch.testing.assert_close(plain.weight, weight.detach().float())
    assert torch.equal(plain.weight != 0, mask.bool())


@pytest.mark.parametrize(
    ("family", "how", "said"),
    [
        ("gpt2", {}, "h.0.attn.c_attn.weight is of Conv1D: set recovery.method=full"),
        ("mixtral", {}, "set recovery.method=full"),
        ("llama", {"length": 4096}, "recovery.length=4096: the model's context is 128"),
        (
            "llama",
            {"learning_rate": 1e30, "method": "full"},
            "set a smaller recovery.learning_rate",
        ),
        ("llama", {"source": "nowhere.txt"}, "nowhere.txt"),
        ("llama", {"messages": "chat"}, "no column 'chat'"),
        ("llama", {"workers": 4}, "recovery.workers=4 share a batch of 3"),
    ],
)
def test_refusals_say_what_to_do(
    make: Made, tmp_path: Path, family: str, how: dict[str, Any], said: str
) -> None:
    if "messages" in how:
        (tmp_path / "chat.jsonl").write_text('{"text": "a b c"}\n')
        how = how | {"source": str(tmp_path / "chat.jsonl")}
    spec = make(family, **how)
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        trial.run_trial(spec)
    modality = trial.loaded(spec.model)
    after = modality.evaluation_batches(spec.data, "report", 2, 16)
    assert modality.losses(after[0])  # the model is whole


def test_text_that_measures_is_refused(make: Made, text: DataSpec, tmp_path: Path) -> None:
    from infra.documents import documents

    report = documents(text, "report")
    (tmp_path / "other.txt").write_text("\n\n".join(["another", *report[:3]]))
    with pytest.raises(UserError, match="training on the report split: 3 documents"):
        trial.run_trial(make(source=str(tmp_path / "other.txt")))


def test_a_source_that_measures_is_dealt_out(make: Made, text: DataSpec) -> None:
    """The same file for everything: what is trained on is the part that calibrates."""
    named = trial.run_trial(make(source=text.source))
    assert named.recovered_losses == trial.run_trial(make()).recovered_losses
