"""What is said of candidates whose windows are images, and of tasks beside text.

python -m pytest tests/flows/test_measures.py
"""

import plotly.graph_objects as go
import pytest

from flows.figures import figures
from flows.measures import gains_of, headline, metrics_of
from flows.report import build_report, render
from infra.records import TrialResult
from infra.specs import Spec
from tasks.statistics import label
from tests.flows.test_report import make_model, make_run, make_spec


def with_scores(result: TrialResult, right: int, dense: bool) -> TrialResult:
    """Of n images the first `right` are recognised."""
    if not (n := len(result.losses)):  # it failed
        return result
    scores = {"top1": [float(i < right) for i in range(n)], "top5": [1.0] * n}
    update = {"scores": scores, "tokens": [1] * n, "bytes": [0] * n}
    if dense and result.dense_losses:
        update["dense_scores"] = {"top1": [1.0] * n, "top5": [1.0] * n}
    return result.model_copy(update=update)


def image_run(objective: str = "loss") -> tuple[Spec, list[TrialResult]]:
    """A search in which uniform recognises 2 images and every other candidate 4."""
    spec = make_spec(search={"objective": objective})
    results = [
        with_scores(result, 2 if result.spec.prune.is_uniform else 4, dense=True)
        for result in make_run()
    ]
    return spec, results


def test_images_have_scores_and_no_perplexity() -> None:
    spec, results = image_run()
    model = make_model().model_copy(update={"unit": "image", "modality": "vision"})
    report = build_report(spec, model, results, 1.0)
    n = report["best"]["metrics"]["loss"]["n"]
    assert list(report["best"]["metrics"]) == ["top1", "top5", "loss"]
    assert report["best"]["metrics"]["top1"]["mean"] == pytest.approx(100 * 4 / n)
    assert report["best"]["metrics"]["loss"]["unit"] == "nats/image"
    assert report["dense"]["metrics"]["top1"]["mean"] == 100
    assert report["headline"] == "top1" and report["windows"] == "images"
    assert report["gain"]["unit"] == "nats/image" and "perplexity" not in report["gain"]
    assert report["gain"]["scores"]["top1"]["mean"] == pytest.approx(100 * 2 / n)
    assert f"top-1 from {100 * 2 / n:.3g}" in report["gain"]["conclusion"]
    page = render(report)
    assert "top-1, %" in page and "erplexity</th>" not in page
    axis = figures(report)["loss"]["layout"]["yaxis"]  # of what decides
    assert axis == {"title": {"text": "loss, nats/image"}}
    assert "below uniform" in page
    assert "the right class" in page and "calibrated on 32 images" in page
    assert "measures on more images than" in page and "scouts on few images" in page
    for word in ("next token", "other documents", "little text", "more text", "512 tokens"):
        assert word not in page


def test_a_score_that_is_searched_is_the_gain() -> None:
    _, results = image_run()
    finals = [result for result in results if result.spec.stage == "final"]
    uniform = [result for result in finals if result.spec.prune.is_uniform]
    best = [result for result in finals if not result.spec.prune.is_uniform]
    gain, unit, _ = gains_of(uniform, best, "top1", "image")
    assert unit == "points of top1"
    assert gain.mean == pytest.approx(100 * 2 / len(best[0].losses))
    assert headline(["top1", "loss"], "top5") == "top5"


def test_what_is_searched_is_drawn_with_its_own_bars() -> None:
    spec, results = image_run("top1")
    model = make_model().model_copy(update={"unit": "image", "modality": "vision"})
    report = build_report(spec, model, results, 1.0)
    scouts = [t for t in report["trials"] if t["rung"] == 0 and t["state"] == "complete"]
    uniform, other = scouts[:2]
    assert uniform["gain"] == {"mean": 0, "stderr": 0}
    assert other["gain"]["mean"] == pytest.approx(100 * 2 / 4)  # points of 4 images
    drawn = figures(report)["loss"]
    assert drawn["layout"]["yaxis"] == {"title": {"text": "top-1, %"}}
    bars = drawn["data"][0]["error_y"]["array"]
    assert sorted(bars) == [0, *[other["gain"]["stderr"]] * (len(scouts) - 1)] and bars[-1] > 1
    assert "above uniform, points: 50" in drawn["data"][0]["text"][-1]
    page = render(report)
    assert "<th>top-1, %</th><th>above uniform, points</th>" in page
    assert "below uniform" not in page and "top1 of best minus top1 of uniform" in page
    assert page.count('<td class="why" colspan="4">') == 1  # the failed trial


def test_a_task_that_is_searched_has_rows_not_windows() -> None:
    evaluation = {"tasks": ["boolq"], "task_rows": 4}
    spec = make_spec(search={"objective": "boolq/acc"}, evaluation=evaluation)
    results = [
        r.model_copy(update={"scores": {"boolq/acc": [1.0, 0.0, float(r.beta > 0), 1.0]}})
        for r in make_run()
    ]
    report = build_report(spec, make_model(), results, 1.0)
    assert "(95 % interval" in report["gain"]["conclusion"]
    assert ", 4 rows and 3 calibration seeds)" in report["gain"]["conclusion"]
    assert figures(report)["loss"]["data"][1]["name"] == "rung 1, 4 rows"
    assert "(n = 4 rows, 3 calibration seeds" in render(report)


def test_a_task_has_rows_of_its_own() -> None:
    result = make_run()[-1]
    result = result.model_copy(update={"scores": {"boolq/acc": [1.0, 0.0, 1.0, 1.0]}})
    metrics = metrics_of([result], "token")
    assert metrics["boolq/acc"]["mean"] == 75 and metrics["boolq/acc"]["n"] == 4
    assert label("boolq/acc", metrics["boolq/acc"]) == "boolq/acc, %"
    assert next(iter(metrics)) == "perplexity"
    local = result.model_copy(update={"spec": result.spec.model_copy(update={"task_data": "d"})})
    assert label("boolq/acc", metrics_of([local], "token")["boolq/acc"]) == (
        "boolq/acc, % (validation)"
    )


def test_towers_have_lines_of_their_own() -> None:
    model = make_model()
    matrices = [
        m.model_copy(update={"tower": "vision" if m.block < 10 else "language"})
        for m in model.matrices
    ]
    two = model.model_copy(update={"matrices": matrices})
    report = build_report(make_spec(), two, make_run(), 1.0)
    assert report["model"]["towers"] == ["vision"] * 10 + ["language"] * 20
    whole = build_report(make_spec(), model, make_run(), 1.0)
    assert whole["explanation"] and not report["explanation"]
    drawn = figures(report)["rates"]
    rates = report["best"]["block_rates"]
    assert drawn["data"][1]["y"] == [*rates[:10], None, *rates[10:]]
    assert drawn["data"][1]["text"][9:12] == ["model.layers.9", "", "model.layers.10"]
    names = [(mark["text"], mark["x"]) for mark in drawn["layout"]["annotations"]]
    assert names == [("vision", 4.5), ("language", 19.5)]
    assert drawn["layout"]["shapes"][0]["x0"] == 9.5
    for figure in figures(report).values():
        go.Figure(figure)  # raises for an attribute that plotly does not know
