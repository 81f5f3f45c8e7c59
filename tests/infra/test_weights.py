"""Weights are mapped copy-on-write: shared by all processes, changed by none of them.

python -m pytest tests/infra/test_weights.py
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from infra.errors import UserError
from infra.sources import sha256_of
from infra.weights import MappedWeights, content_sha256, save_mapped

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


class Model(nn.Module):
    """Two blocks of half precision, tied embeddings, a scalar and a buffer of integers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(width, 3)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(11)).bfloat16()
        self.head = nn.Linear(width, 3, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("steps", torch.arange(5))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_mapped(Model(), tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors"


def test_what_was_saved_is_attached(path: Path) -> None:
    model, expected = Model(), Model()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    weights = MappedWeights(path)
    weights.attach(model, "", CPU)
    model.head.weight = model.embed.weight
    for name, value in expected.state_dict().items():
        assert model.state_dict()[name].dtype == value.dtype
        assert torch.equal(model.state_dict()[name], value), name
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert "head.weight" not in weights.names  # tied weights are written once


def test_the_fingerprint_is_that_of_the_contents(path: Path, tmp_path: Path) -> None:
    first = MappedWeights(path).sha256
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert save_mapped(Model(), tmp_path / "again") == first
    other = Model()
    with torch.no_grad():
        other.blocks[3].weight[1, 1] += 1
    assert save_mapped(other, tmp_path / "other") != first
    mapped = MappedWeights(path)
    state = {n: t for n, t in Model().state_dict().items() if n != "head.weight"}
    assert content_sha256(iter(state.items())) == mapped.sha256


def test_a_prefix_is_one_block_only(path: Path) -> None:
    """blocks.1 is not blocks.10."""
    assert set(MappedWeights(path).read("blocks.1.")) == {"weight", "bias"}
    assert len(MappedWeights(path).read("blocks.")) == 22


def test_pruning_in_place_never_reaches_the_file(path: Path) -> None:
    before = sha256_of(path)
    weights = MappedWeights(path)
    model, other = Model(), Model()
    weights.attach(model, "", CPU)
    weights.attach(other, "", CPU)
    dense = model.blocks[1].weight.clone()
    model.blocks[1].weight.zero_()
    model.blocks[2].bias.zero_()
    assert sha256_of(path) == before
    assert torch.equal(other.blocks[1].weight, dense)
    weights.release(model.blocks[1], "blocks.1.")
    assert torch.equal(model.blocks[1].weight, dense)
    assert not model.blocks[2].bias.any()  # another block keeps what was done to it


OTHER = """
import sys, torch
from pathlib import Path
from infra.weights import MappedWeights
tensor = MappedWeights(Path(sys.argv[1])).read()["weight"]
total = float(tensor.sum())
print(total, flush=True)
sys.stdin.readline()
if sys.argv[2] == "prune":
    tensor.zero_()
print(float(tensor.sum()), flush=True)
sys.stdin.readline()
"""


def process(path: Path, what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OTHER, str(path), what],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def tell(other: subprocess.Popen[str]) -> None:
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()


def line(other: subprocess.Popen[str]) -> float:
    assert other.stdout is not None
    return float(other.stdout.readline())


def memory(pid: int, path: Path) -> dict[str, int]:
    """Kilobytes of a process's mappings of a file, by kind."""
    sums: dict[str, int] = {}
    inside = False
    for text in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", text):
            inside = text.endswith(str(path))
        elif inside and (match := re.match(r"(\w+): +(\d+) kB", text)):
            sums[match[1]] = sums.get(match[1], 0) + int(match[2])
    return sums


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/smaps")
def test_two_processes_share_the_pages_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    size = 4096
    linear = nn.Linear(1024, size // 4, bias=False)  # 4 MiB
    save_mapped(linear, path)
    before = sha256_of(path)
    expected = float(linear.weight.detach().sum())
    processes = [process(path, "prune"), process(path, "read")]
    try:
        assert [line(other) for other in processes] == pytest.approx([expected] * 2)
        for other in processes:
            used = memory(other.pid, path)
            assert used["Rss"] >= size
            assert used["Private_Dirty"] <= 64
            assert used["Pss"] <= 0.6 * used["Rss"]  # half of it, with two that share
        tell(processes[0])
        assert line(processes[0]) == 0.0
        assert memory(processes[0].pid, path)["Private_Dirty"] >= 0.9 * size
        tell(processes[1])
        assert line(processes[1]) == pytest.approx(expected)
    finally:
        for other in processes:
            other.kill()
            other.wait()
    assert sha256_of(path) == before


@pytest.mark.parametrize("content", [None, b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      xx"])
def test_a_file_that_cannot_be_mapped_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"^cannot read weights {re.escape(str(path))}: "):
        MappedWeights(path)
