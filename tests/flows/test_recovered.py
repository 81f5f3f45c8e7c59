"""What is said of a fine-tune, from synthetic results: words, columns, and nothing where none was.

python -m pytest tests/flows/test_recovered.py
"""

import csv
import io
from typing import Any

import pytest

from flows.comparison import _recovered, _table
from flows.figures import figures
from flows.leaderboard import _csv, _words
from flows.recovered import conclusion, print_sides, recovery_of
from flows.report import build_report, render
from flows.summary import print_summary
from infra.records import RecoveryRecord, TrialResult
from tasks.model_card import model_card
from tests.flows.test_report import make_model, make_run, make_spec

RECORD = RecoveryRecord(
    method="lora",
    steps=3,
    tokens=3000,
    trained_params=7,
    zeros_before=50,
    zeros_after=50,
    losses=[5.0, 4.0, 3.0],
    seconds=61.0,
)


def tuned(results: list[TrialResult], uniform: float, best: float) -> list[TrialResult]:
    """The finals of the first seed with every window's loss lower by so much, but for a ripple."""
    found = []
    for result in results:
        if result.spec.stage == "final" and not result.spec.calibration.seed and result.losses:
            lower = uniform if result.spec.prune.is_uniform else best
            after = [x - lower - 1e-3 * (i % 2) for i, x in enumerate(result.losses)]
            update: dict[str, Any] = {"recovered_losses": after, "recovery": RECORD}
            result = result.model_copy(update=update)
        found.append(result)
    return found


def report_of(uniform: float, best: float) -> dict[str, Any]:
    spec = make_spec(recovery={"steps": 3})
    return build_report(spec, make_model(), tuned(make_run(), uniform, best), 1.0)


def test_what_is_left_of_the_gain_is_paired() -> None:
    plain = report_of(0, 0)["recovery"]["gain"]
    assert report_of(1, 1)["recovery"]["gain"]["mean"] == pytest.approx(plain["mean"])
    less = report_of(1, 0.9)["recovery"]
    assert less["gain"]["mean"] == pytest.approx(plain["mean"] - 0.1)
    assert less["uniform"]["gained"]["mean"] == pytest.approx(1 + 5e-4, abs=1e-3)
    assert "is left" in report_of(1, 1)["recovery"]["conclusion"]
    assert "Uniform is then ahead" in report_of(3, 1)["recovery"]["conclusion"]


def test_a_model_made_worse_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    said = report_of(-1, 1)["recovery"]["conclusion"]
    first, second = said.split(" (best)")
    assert "worse" not in first and "worse than before by" in second and "chance" not in second
    sides = report_of(-1, -2)["recovery"]
    said = conclusion(sides["best"])
    assert "worse than before by 1.99" in said and said.endswith(
        " nats/token; all 50 zeros stayed."
    )
    assert "zeros" not in conclusion(sides["best"] | {"zeros_after": 0})
    unsure = sides["best"]["gained"] | {"mean": -0.1, "high": 0.1}
    assert "which may be chance" in conclusion(sides["best"] | {"gained": unsure})
    print_sides({"checkpoint": sides["best"]})
    assert "nats/token" in capsys.readouterr().out


def test_a_page_without_a_checkpoint_names_none() -> None:
    report = report_of(1, 1)
    assert report["recovery"]["saved"] == ("best/ holds the\n    fine" in render(report))
    report["recovery"]["saved"] = not report["recovery"]["saved"]
    assert report["recovery"]["saved"] == ("best/ holds the\n    fine" in render(report))


def test_a_page_a_terminal_and_a_card_show_both(capsys: pytest.CaptureFixture[str]) -> None:
    report = report_of(1, 1)
    page, card = render(report), model_card(report)
    print_summary(report, "runs/none")
    printed = capsys.readouterr().out
    said = report["recovery"]["conclusion"]
    assert said in page and said in card and " ".join(said.split()) in " ".join(printed.split())
    for name in ("uniform", "best"):
        assert page.count(f'</span>{name}</td><td class="word">after') == 1
    assert "recovery.steps = 3" in card and "all 50 zeros stayed" in printed
    assert figures(report)["recovery"]["data"][1]["y"] == [5.0, 4.0, 3.0]


def test_nothing_is_said_where_nothing_was_done() -> None:
    report = build_report(make_spec(), make_model(), make_run(), 1.0)
    assert report["recovery"] is None and _recovered(report) == {}
    assert ">Recovery</h2>" not in render(report)
    assert "fine-tuned" not in model_card(report) and "recovery" not in model_card(report)
    finals = [r for r in make_run() if r.spec.stage == "final"]
    assert recovery_of(finals, finals, objective="loss", unit="token") is None


def test_tables_have_a_column_only_where_any_was_fine_tuned() -> None:
    report = report_of(1, 1)
    after = report["recovery"]["best"]["after"]["perplexity"]
    row = {
        **dict.fromkeys(("cell", "model", "method", "allocation", "label", "cause"), "x"),
        "state": "complete",
        "verdict": "gain",
        "asked": True,
        "goal": "60 % sparsity",
        "sparsity": 0.6,
        "rates": [0.5, 0.7],
        "relative_loss": None,
        "search_cost": 1.0,
        "trials": 3,
        "used_s": 1.0,
        "peak_memory_bytes": 0,
        "headline": "perplexity",
        "gain": report["gain"],
    }
    without = row | {"metrics": report["best"]["metrics"]}
    with_it = row | {"metrics": report["best"]["metrics"] | _recovered(report)}
    columns, (first, second) = _table([with_it, without])
    place = columns.index("recovered perplexity")
    assert first[place] and not second[place]
    assert "recovered perplexity" not in _table([without])[0]
    assert _words(with_it, True)["recovered"] == first[place]
    assert "recovered" not in _words(without, False)
    rows = list(csv.DictReader(io.StringIO(_csv([with_it, without]))))
    assert float(rows[0]["recovered"]) == after["mean"] and rows[1]["recovered"] == ""
    assert "recovered" not in _csv([without])
