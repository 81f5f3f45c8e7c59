"""The report of synthetic runs: the shape of report.json, its words, and the page in a browser."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from flows.report import build_report, render, write_report
from infra.errors import UserError
from infra.records import BlockError, Cost, MatrixRecord, ModelRecord, TrialResult, TrialSpec
from infra.spec_files import parse_spec
from infra.specs import Spec
from infra.store import RunStore

NUM_BLOCKS = 30
SIZES = {"q_proj": 331776, "up_proj": 884736, "down_proj": 884736}


def make_spec(**sections: Any) -> Spec:
    raw = {"model": {"source": "pypi:tiny==1/t.gguf"}, "data": {"source": "texts"}, **sections}
    return parse_spec(raw, "test.toml")


def make_model() -> ModelRecord:
    return ModelRecord(
        source="pypi:tiny==1/t.gguf",
        architecture="LlamaForCausalLM",
        dtype="float32",
        sha256="5f" * 32,
        blocks=[f"model.layers.{i}" for i in range(NUM_BLOCKS)],
        matrices=[
            MatrixRecord(block=i, matrix=name, params=params)
            for i in range(NUM_BLOCKS)
            for name, params in SIZES.items()
        ],
        total_params=134_515_008,
        context=8192,
        adds_bos=False,
        licence="apache-2.0",
    )


def loss_at(beta: float) -> float:
    """Near what was measured on SmolLM2-135M at 60 %."""
    return 4.237 + 3200 * ((beta - 0.0083) ** 2 - 0.0083**2 * 0.1)


def make_errors(rates: list[float]) -> list[BlockError]:
    """What a block makes grows as exp(6 * rate), and by 5 % in later blocks; the stream by 4 %."""
    errors, before = list[BlockError](), 0.0
    for i, rate in enumerate(rates):
        made, carried, size = math.exp(6 * rate) * 1e-3, 1.1025 * before, 1.0816**i * 9
        before = made + carried
        errors.append(
            BlockError(
                block=i,
                absolute=before,
                relative=math.sqrt(before / size),
                cosine=0.9,
                made=made,
                carried=carried,
                gain=1.05 if i else 0.0,
                damage=made / size,
            )
        )
    return errors


def make_result(number: int, stage: Any, rung: int, beta: float, seed: int = 0, **more: Any) -> Any:
    """A finished trial: windows differ much from each other, candidates little on one window."""
    spec = make_spec(prune={"beta": beta})
    num_windows = {0: 4, 1: 32}[rung]
    windows = np.random.default_rng([rung, stage == "final"]).normal(0, 0.35, num_windows)
    noise = np.random.default_rng(number).normal(0, 0.04, num_windows)
    rates = [0.6 + beta * (i - (NUM_BLOCKS - 1) / 2) for i in range(NUM_BLOCKS)]
    curve = stage == "final" and seed == 0
    fields: dict[str, Any] = {
        "tilt": beta / (0.8 / 29),
        "losses": (loss_at(beta) + windows + noise).tolist(),
        "tokens": [511] * num_windows,
        "bytes": [2044] * num_windows,
        "dense_losses": (2.99 + windows * 0.6).tolist() if curve else [],
        "block_rates": rates,
        "matrices": [
            MatrixRecord(block=i, matrix=m, params=n, rate=rates[i], zeros=round(rates[i] * n))
            for i in range(NUM_BLOCKS)
            for m, n in SIZES.items()
        ],
        "errors": make_errors(rates) if curve else [],
        "notes": ["layers.3.down_proj: damping raised to 0.1 of the mean"] if beta else [],
        "cost": Cost(total_s=11.0 * 8**rung, token_passes=3000 * 8**rung),
        "device": "cpu",
    }
    return TrialResult(
        spec=TrialSpec(
            number=number,
            stage=stage,
            rung=rung,
            model=spec.model,
            data=spec.data,
            calibration=spec.calibration.model_copy(update={"seed": seed}),
            prune=spec.prune,
            split="report" if stage == "final" else "selection",
            windows=num_windows,
            context=512,
        ),
        **{"state": "complete", **fields, **more},
    )


def make_run(best: float = 0.0083) -> list[TrialResult]:
    scouts = [0.0, 0.0226, -0.0121, 0.0083, 0.0052, 0.0137, 0.0101, 0.0031]
    results = [make_result(n, "search", 0, beta) for n, beta in enumerate(scouts)]
    nothing: dict[str, Any] = {
        "losses": [],
        "tokens": [],
        "bytes": [],
        "block_rates": [],
        "matrices": [],
    }
    results[1] = make_result(1, "search", 0, 0.0226, state="failed", **nothing, attempts=2,
                             cause="worker lost twice: node 10.0.0.7 died")  # fmt: skip
    results += [make_result(8 + n, "search", 1, b) for n, b in enumerate([0, 0.0083, 0.0101])]
    finals = [(seed, beta) for seed in range(3) for beta in dict.fromkeys([0.0, best])]
    return results + [
        make_result(11 + n, "final", 1, beta, seed) for n, (seed, beta) in enumerate(finals)
    ]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    provenance = {"python": "3.12.3", "sparseramp": "0.1.0"}
    return build_report(make_spec(), make_model(), make_run(), 431.0, provenance)


def test_shape_that_programs_rely_on(report: dict[str, Any]) -> None:
    for side in ("dense", "uniform", "best"):
        assert next(iter(report[side]["metrics"])) == "perplexity"
        for metric in report[side]["metrics"].values():
            assert metric.keys() == {"mean", "stderr", "n", "unit"}
            assert metric["n"] == 32 and metric["stderr"] > 0
    for side, beta in (("uniform", 0), ("best", 0.0083)):
        assert report[side]["beta"] == beta
        assert report[side]["tilt"] == pytest.approx(beta / (0.8 / 29))
        assert len(report[side]["block_rates"]) == NUM_BLOCKS
        assert report[side]["rates"][0].keys() == {"block", "matrix", "params", "rate"}
        assert report[side]["sparsity"] == pytest.approx(0.6, abs=1e-5)
        assert len(report["errors"][side]) == NUM_BLOCKS
        assert {"made", "carried", "cross", "gain", "damage"} < report["errors"][side][0].keys()
        assert (report[side]["fallbacks"], report[side]["clamped"]) == ([], 0)
    rates = report["errors"]["damage_rates"]
    assert (rates[0], rates[29]) == pytest.approx((6, 6))
    assert [i for i, rate in enumerate(rates) if rate is None] == [14, 15]  # 0.004 from uniform
    assert [trial["number"] for trial in report["trials"]] == list(range(17))
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_gain_is_the_paired_difference_of_the_headline_losses(report: dict[str, Any]) -> None:
    gain = report["gain"]
    losses = [report[side]["metrics"]["loss"] for side in ("uniform", "best")]
    assert gain["mean"] == pytest.approx(losses[0]["mean"] - losses[1]["mean"])
    assert gain["low"] < gain["mean"] < gain["high"]
    assert (gain["n"], gain["n_seeds"], gain["seeds"]) == (32, 3, [0, 1, 2])
    assert gain["stderr"] < losses[0]["stderr"] / 5  # pairing removes what windows share
    perplexity = gain["perplexity"]
    assert perplexity["best"] / perplexity["uniform"] == pytest.approx(perplexity["ratio"])


def test_failed_trials_are_listed_with_their_cause(report: dict[str, Any]) -> None:
    failed = [trial for trial in report["trials"] if trial["state"] == "failed"]
    assert [(t["number"], t["loss"], t["stderr"]) for t in failed] == [(1, None, None)]
    assert failed[0]["cause"] in render(report)
    assert (report["cost"]["trials"], report["cost"]["failed"]) == (17, 1)


def test_conclusion_names_the_gain(report: dict[str, Any]) -> None:
    text = report["gain"]["conclusion"]
    assert report["gain"]["verdict"] == "gain"
    assert text.startswith("At 60 % sparsity, beta = 0.0083 (tilt 0.30) brings perplexity from ")
    assert "dense 20.7" in text and "32 windows and 3 calibration seeds" in text


def test_uniform_that_won_is_said_to_be_no_gain() -> None:
    report = build_report(make_spec(), make_model(), make_run(best=0.0), 1.0)
    assert (report["gain"]["mean"], report["best"]["beta"]) == (0, 0)
    assert report["gain"]["conclusion"].startswith("No gain at 60 % sparsity: no candidate beat")
    assert report["best"] == report["uniform"]
    assert ">no gain</span>" in render(report)


@pytest.mark.parametrize(("shift", "words"), [(0.0, "may be chance"), (0.2, "is worse than")])
def test_interval_that_holds_no_gain_is_said_so(shift: float, words: str) -> None:
    finals = [make_result(n, "final", 1, 0.0, n) for n in range(3)]
    for n, uniform in enumerate(finals[:3]):
        noise = np.random.default_rng(n).normal(shift, 0.05, 32)
        losses = (np.array(uniform.losses) + noise).tolist()
        finals.append(make_result(9 + n, "final", 1, 0.01, n, losses=losses))
    report = build_report(make_spec(), make_model(), finals, 1.0)
    assert report["gain"]["verdict"] == "no gain"
    assert report["gain"]["low"] < 0
    assert report["gain"]["conclusion"].startswith("No gain") and words in render(report)


def test_single_prune_compares_the_given_beta_with_uniform() -> None:
    finals = [make_result(n, "final", 1, beta) for n, beta in enumerate([0.0, 0.0083])]
    report = build_report(make_spec(), make_model(), finals, 1.0)
    assert (report["command"], report["best"]["beta"]) == ("prune", 0.0083)
    assert "With one calibration seed" in report["gain"]["conclusion"]
    page = render(report)
    assert "sparseramp prune spec.toml" in page and 'id="loss"' not in page


def test_seeds_without_both_sides_are_left_out() -> None:
    results = make_run()[:-1]  # the best of seed 2 is missing
    assert build_report(make_spec(), make_model(), results, 1.0)["gain"]["seeds"] == [0, 1]


def test_trial_of_one_window_has_a_loss_without_a_standard_error() -> None:
    one: dict[str, Any] = {"losses": [4.5], "tokens": [511], "bytes": [2044]}
    results = [make_result(20, "search", 0, 0.0, **one), *make_run()[8:]]
    report = build_report(make_spec(), make_model(), results, 1.0)
    row = report["trials"][-1]
    assert (row["loss"], row["stderr"], row["gain"]) == (4.5, None, None)
    assert "4.5000" in render(report)


def test_perplexities_that_are_no_numbers_are_null() -> None:
    finals = [make_result(n, "final", 1, beta) for n, beta in enumerate([0.0, 0.0083])]
    for n, shift in enumerate((2000.0, 1000.0)):
        losses = [loss + shift for loss in finals[n].losses]
        finals[n] = finals[n].model_copy(update={"losses": losses})
    report = build_report(make_spec(), make_model(), finals, 1.0)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["best"]["metrics"]["perplexity"]["mean"] is None
    assert report["gain"]["mean"] == pytest.approx(1000, abs=1)
    assert "from over 1e304 (uniform) to over 1e304" in report["gain"]["conclusion"]
    report = build_report(make_spec(), make_model(), finals[::-1], 1.0)
    page = render(report)
    assert "over 1e304" in page and "In perplexity" in page
    worse = [
        f.model_copy(update={"losses": g.losses}) for f, g in zip(finals, finals[::-1], strict=True)
    ]
    report = build_report(make_spec(), make_model(), worse, 1.0)
    assert report["gain"]["perplexity"]["ratio"] is None
    assert "In perplexity" not in render(report)


def test_run_without_a_final_stage_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"no final comparison yet \(10 trials finished"):
        build_report(make_spec(), make_model(), make_run()[:11], 1.0)


def test_report_is_made_from_the_files_of_a_run_alone(tmp_path: Path) -> None:
    spec = make_spec(run={"dir": str(tmp_path / "run")})
    with RunStore.open(spec) as store:
        with pytest.raises(UserError, match=r"no model\.json yet: give the command"):
            write_report(store.dir)
        store.write_model(make_model())
        for result in make_run():
            store.write_result(result)
    lines = [("2026-01-01T00:00:00", "created"), ("2026-01-01T00:05:00", "trial")]
    lines += [("2026-01-02T09:00:00", "resumed"), ("2026-01-02T09:01:30", "trial")]
    events = [json.dumps({"time": f"{time}.000+00:00", "event": kind}) for time, kind in lines]
    store.path("events.jsonl").write_text("\n".join([*events, ""]))
    report = write_report(store.dir)
    assert report["cost"]["seconds"] == 390  # the night between is not counted
    assert json.loads(store.path("report.json").read_text()) == report
    assert report["gain"]["conclusion"][:40] in store.path("report.html").read_text()
    assert report["provenance"] == store.provenance
    before = store.path("report.html").read_bytes()
    write_report(store.dir)
    assert store.path("report.html").read_bytes() == before


def test_reporting_needs_no_torch() -> None:
    code = "import sys, flows.report, flows.live; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_paper_protocol_is_said_wherever_a_number_stands() -> None:
    spec = make_spec(search={"protocol": "paper", "sampler": "grid"}, prune={"pause": "block"})
    report = build_report(spec, make_model(), make_run(), 1.0)
    assert report["protocol"] == "paper"
    assert "selected on the text it is reported on" in report["gain"]["conclusion"]
    for section in render(report).split("<section>")[1:]:
        if any(plot in section for plot in ("<table>", 'class="plot"')):
            assert "paper protocol" in section
    assert "aper protocol" not in render(build_report(make_spec(), make_model(), make_run(), 1.0))


def test_page_is_one_file_that_escapes_what_it_shows(report: dict[str, Any]) -> None:
    report = {**report, "provenance": {"commit": "</script><script>alert(1)</script>"}}
    page = render(report)
    assert "<script>alert(1)" not in page
    assert page.count("<script") == 2 + page.count("\\u003cscript")
    assert "default-src 'none'" in page


def test_figures_are_valid_and_hold_the_numbers(report: dict[str, Any]) -> None:
    page = render(report)
    line = next(x for x in page.splitlines() if x.startswith("const figures = "))
    figures = json.loads(line.removeprefix("const figures = ").removesuffix(";"))
    for figure in figures.values():
        go.Figure(figure)  # raises for an attribute that plotly does not know
    scouts, dearer, uniform, best = figures["loss"]["data"]
    assert len(scouts["x"]) == 7 and len(dearer["x"]) == 3
    assert (uniform["x"], best["x"]) == ([0, 0], [0.0083, 0.0083])
    assert dearer["error_y"]["array"][dearer["x"].index(0)] == 0
    assert [trace["name"] for trace in figures["errors"]["data"]] == ["uniform", "best"]
    assert [trace["name"] for trace in figures["split"]["data"]] == [
        "uniform, made", "uniform, carried", "best, made", "best, carried",
    ]  # fmt: skip
    both = zip(*(trace["y"] for trace in figures["split"]["data"][:2]), strict=True)
    whole = figures["errors"]["data"][0]["y"]
    assert [math.hypot(made, carried or 0) for made, carried in both] == pytest.approx(whole)
    assert figures["rates"]["data"][1]["y"] == report["best"]["block_rates"]
