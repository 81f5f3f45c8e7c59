"""A saved checkpoint is packed, and measured as it was before.

python -m pytest tests/flows/test_pack.py
"""

import json
from pathlib import Path

import pytest
import torch

from flows.cli import main
from flows.evaluate import evaluate
from flows.pack import pack_checkpoint
from infra.errors import UserError
from infra.records import TrialSpec
from infra.specs import CalibrationSpec, ModelSpec, PruneSpec
from tasks import trial
from tests.models import write_checkpoint, write_text


def test_a_packed_checkpoint_is_measured_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "cache"))
    model = write_checkpoint("llama", tmp_path / "model", dtype=torch.bfloat16)
    pruned = TrialSpec(
        number=0,
        stage="final",
        model=ModelSpec(source=str(model), dtype="bfloat16"),
        data=write_text(tmp_path / "text.txt"),
        calibration=CalibrationSpec(samples=4, length=16),
        prune=PruneSpec(sparsity=0.7),
        split="report",
        windows=3,
        context=16,
        checkpoint=True,
    )
    try:
        best = Path(trial.run_trial(pruned).checkpoint).rename(tmp_path / "best")
        answer = pack_checkpoint(best, as_json=True)
        (line,) = capsys.readouterr().out.splitlines()
        assert json.loads(line) == answer
        packed = tmp_path / "best-packed"
        assert (answer["checkpoint"], answer["packed"]) == (str(best), str(packed))
        assert answer["ratio"] <= 0.37
        assert answer["sparsity"] == pytest.approx(0.7, abs=1e-3)
        before, after = evaluate(best, []), evaluate(packed, [])
        assert after["metrics"] == before["metrics"]
    finally:
        trial._loaded.clear()
    capsys.readouterr()
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["pack", str(best), str(tmp_path / "elsewhere")])
    words = capsys.readouterr().out
    assert f"{best} packed into {tmp_path / 'elsewhere'}" in words
    assert f"{answer['num_packed']} packed tensors" in words
    assert f"{answer['file_ratio']:.3f} of dense" in words
    with pytest.raises(UserError, match="elsewhere exists"):
        pack_checkpoint(best, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a run: give "):
        pack_checkpoint(tmp_path)
    with pytest.raises(UserError, match="is no checkpoint folder"):
        pack_checkpoint(tmp_path / "nothing")
