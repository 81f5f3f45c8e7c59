"""Models that someone holds in memory: what they need, and that they stay as they are.

python -m pytest tests/modalities/test_held.py
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infra.errors import UserError
from modalities.held import HeldModality
from tests.models import build


class Net(nn.Module):
    """Three blocks over states that are given as they are, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8))
            for _ in range(3)
        )

    def forward(self, states: Tensor, *, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            states = states + layer(states) * scale
        return states


def test_a_module_of_ones_own_with_keyword_inputs() -> None:
    net = Net()
    net.layers[1].eval()
    inputs = {"states": torch.ones(2, 5, 8), "scale": 0.5}
    with HeldModality(net, [inputs]) as held:
        assert [block.name for block in held.blocks] == ["layers.0", "layers.1", "layers.2"]
        assert [m.name for m in held.blocks[0].matrices] == ["0.weight", "3.weight"]
        assert not any(module.training for module in net.modules())
        assert torch.equal(held.run(held.calibration[0]), held.run(held.calibration[0]))
        with pytest.raises(UserError, match="Net gives no loss for this calibration"):
            held.losses(held.calibration[0])
    assert net.training and net.layers[0].training and not net.layers[1].training


def test_blocks_are_put_back_and_only_what_was_kept_stays() -> None:
    net = Net()
    dense = [layer[0].weight.detach().clone() for layer in net.layers]
    with HeldModality(net, [{"states": torch.ones(1, 2, 8)}]) as held:
        for index in range(3):
            held.attach_block(index)
            held.blocks[index].matrices[0].weight().zero_()
        held.release_block(0)
        held.park_block(1)
    assert torch.equal(net.layers[0][0].weight, dense[0])
    assert not net.layers[1][0].weight.any()
    assert torch.equal(net.layers[2][0].weight, dense[2])  # at the end of the with


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_losses_are_those_of_the_model(family: str) -> None:
    model: Any = build(family)
    ids = torch.arange(1, 13).reshape(2, 6)
    with HeldModality(model, [ids, {"input_ids": ids, "labels": ids}]) as held, torch.no_grad():
        losses = held.losses(held.calibration[0])
        with_labels = held.losses(held.calibration[1])
        expected = [float(model(row[None], labels=row[None]).loss) for row in ids]
    assert losses == pytest.approx(expected, rel=1e-5)
    assert with_labels == pytest.approx([sum(expected) / 2] * 2, rel=1e-5)


def test_dummy_inputs_find_the_blocks_without_calibration() -> None:
    with HeldModality(build("mixtral")) as held:
        assert len(held.matrices()) == 3 * (4 + 4 * 2)
        assert held.calibration == []


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(UserError, match="give calibration: Net has no inputs of its own"):
        HeldModality(Net())
    with pytest.raises(UserError, match="calibration holds str: give input_ids"):
        HeldModality(Net().train(), ["text"])
    with pytest.raises(UserError, match="the weights are on meta: bring the model to one device"):
        HeldModality(Net().to("meta"), [torch.ones(1, 2)])


def test_a_model_that_cannot_be_run_is_left_as_it_was() -> None:
    net = Net()
    with pytest.raises(TypeError):
        HeldModality(net, [{"unknown": torch.ones(1, 2, 8)}])
    assert net.training
