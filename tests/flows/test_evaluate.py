"""Checkpoints that searches have saved are measured again as what they are.

python -m pytest tests/flows/test_evaluate.py
"""

import json
from pathlib import Path
from typing import Any

import pytest

from flows.evaluate import evaluate
from infra.errors import UserError
from tasks import trial
from tests import models
from tests.flows.commands import SPEC, run
from tests.timm_models import png, write_images, write_timm
from tests.vlm import write_checkpoint

SMALL = ("search.scouts=2", "evaluation.calibration_seeds=1", "--json")


def search(folder: Path, model: Path, data: Path, **more: Any) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a search saves, and the trial that it is of."""
    spec = folder / "tiny.toml"
    spec.write_text(SPEC.format(model=model, text=data, run=folder / "run"))
    overrides = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in more.items()]
    done = run("search", spec, *overrides, *SMALL, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    results = [json.loads(file.read_text()) for file in (folder / "run" / "trials").iterdir()]
    return folder / "run" / "best", next(r for r in results if r["spec"]["checkpoint"])


def percent(scores: list[float]) -> float:
    return 100 * sum(scores) / len(scores)


@pytest.mark.parametrize("seed", [5, None])
def test_whose_numbers_they_are(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seed: int | None,
) -> None:
    """A report has means over calibration seeds, a checkpoint is of one; others are of none."""
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "cache"))
    checkpoint = models.write_checkpoint("llama", tmp_path / "model")
    models.write_text(tmp_path / "text.txt")
    if seed is not None:
        facts = {"dtype": "float32", "data": {}, "evaluation": {}, "calibration": {"seed": seed}}
        (checkpoint / "sparsity.json").write_text(json.dumps(facts))
    data = f"data.source={tmp_path / 'text.txt'}"
    small = ["evaluation.context=16", "evaluation.report_windows=4"]
    try:
        assert evaluate(checkpoint, [data, *small])["calibration_seed"] == seed
    finally:
        trial._loaded.clear()
    said = "pruned with calibration seed 5; a report has the mean over all such seeds"
    assert (said in capsys.readouterr().out) == (seed is not None)


@pytest.mark.timeout(300)
def test_a_model_of_images(tmp_path: Path) -> None:
    model = write_timm("vit", tmp_path / "model")
    write_images(tmp_path / "images")
    best, saved = search(tmp_path, model, tmp_path / "images", model__modality="vision")
    done = run("evaluate", best, "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "NaN" not in done.stdout
    answer = json.loads(done.stdout)
    assert (answer["modality"], answer["windows"], answer["context"]) == ("vision", "images", 0)
    assert list(answer["metrics"]) == ["top1", "top5", "loss"]
    assert answer["metrics"]["top1"]["mean"] == percent(saved["scores"]["top1"])
    assert answer["metrics"]["loss"]["mean"] == pytest.approx(sum(saved["losses"]) / 4)
    assert answer["metrics"]["loss"]["unit"] == "nats/image"
    assert answer["calibration_seed"] == saved["spec"]["calibration"]["seed"]
    words = run("evaluate", best, cache=tmp_path / "cache").stdout
    assert words.count("(n = 4 images)") == 3
    assert not any(word in words for word in ("lm-eval", "perplexity", "windows", "nan"))


@pytest.mark.timeout(300)
def test_a_model_of_images_and_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One tower of it was pruned, which an older checkpoint does not say."""
    lines = []
    for number in range(24):
        (tmp_path / f"{number}.png").write_bytes(png(number))
        row = {"image": f"{number}.png", "question": "What?", "kind": number % 2}
        lines.append(json.dumps(row | {"choices": ["cat", "dog"]}))
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(lines))
    model = write_checkpoint("llava", tmp_path / "model")
    columns = {"data__choices": "choices", "data__label": "kind"}
    kind = {"model__modality": "multimodal", "model__towers": ["language"]}
    best, saved = search(tmp_path, model, rows, **columns, **kind)
    monkeypatch.setenv("SPARSERAMP_CACHE", str(tmp_path / "cache"))
    try:
        answer = evaluate(best, [])
        assert list(answer["metrics"]) == ["accuracy", "loss"]
        assert answer["metrics"]["accuracy"]["mean"] == percent(saved["scores"]["accuracy"])
        assert answer["metrics"]["loss"]["mean"] == pytest.approx(sum(saved["losses"]) / 4)
        assert capsys.readouterr().out.count("(n = 4 questions)") == 2
        facts = json.loads((best / "sparsity.json").read_text())
        assert (facts.pop("modality"), facts.pop("towers")) == ("multimodal", ["language"])
        (best / "sparsity.json").write_text(json.dumps(facts))
        with pytest.raises(UserError):  # taken for a language model
            evaluate(best, [])
        assert evaluate(best, ["model.modality=multimodal"])["metrics"] == answer["metrics"]
    finally:
        trial._loaded.clear()
