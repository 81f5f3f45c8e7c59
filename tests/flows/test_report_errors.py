"""The report's words about error curves, and what became of single matrices, on the page.

python -m pytest tests/flows/test_report_errors.py
"""

from typing import Any

from markupsafe import escape

from flows.report import build_report, render
from tests.flows.test_report import make_model, make_result, make_run, make_spec


def test_the_error_curves_are_explained() -> None:
    report = build_report(make_spec(), make_model(), make_run(), 431.0)
    text = report["explanation"]
    assert "error is amplified 4.12 times while the hidden state grows 3.12 times" in text
    assert "Best ends lower" in text and "less in the first half, which" in text
    page = render(report)
    assert escape(text) in page
    assert "damping raised to 0.1" in page and "best, notes" in page
    assert "uniform, notes" not in page and "no calibration token" not in page
    won = build_report(make_spec(), make_model(), make_run(best=0.0), 1.0)
    assert won["explanation"].endswith("so there is nothing to compare.")


def test_what_became_of_matrices_is_shown_for_both_sides() -> None:
    found: dict[str, Any] = {"fallbacks": [f"layers.{i}.experts[3]" for i in range(5)]}
    finals = [
        make_result(0, "final", 1, 0.0, **found),
        make_result(1, "final", 1, 0.01, clamped=4, errors=[]),
    ]
    report = build_report(make_spec(), make_model(), finals, 1.0)
    assert (report["explanation"], report["errors"]["damage_rates"]) == ("", [])
    page = render(report)
    assert "uniform, no calibration token" in page and "3 more" in page
    assert "best, clamped" in page and "4 of 90 rates" in page
    assert "Shares are of squared errors" not in page
