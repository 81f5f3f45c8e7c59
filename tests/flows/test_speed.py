"""What is said of timings: medians, quartiles and paired ratios, and "no gain" where there is none.

python -m pytest tests/flows/test_speed.py
"""

import json
from pathlib import Path

import pytest

from flows.speed import conclusion, kept_speed, print_speed, summary, timings
from infra.errors import UserError
from infra.records import SpeedCase, SpeedEngine, SpeedLayer, SpeedRecord
from tests.flows.commands import run, write_project

LAYERS = [
    SpeedLayer(
        name="up", shape=(8, 4), sparsity=0.7, engine="bitmask", dense_bytes=128, encoded_bytes=44
    ),
    SpeedLayer(
        name="head",
        shape=(8, 4),
        sparsity=0.0,
        engine="dense",
        reason="a head",
        dense_bytes=128,
        encoded_bytes=128,
    ),
]


def record(bitmask: list[float], work: int = 0) -> SpeedRecord:
    """One case; the second dense engine is the faster one."""
    seconds = {"dense": [4.0] * 5, "onednn": [1.0, 2.0, 2.0, 2.0, 4.0], "bitmask": bitmask}
    return SpeedRecord(
        checkpoint="best",
        modality="language",
        architecture="Llama",
        dtype="float32",
        sparsity=0.7,
        stored_bytes=1000,
        device="CPU",
        threads=1,
        host="here",
        engines=[
            SpeedEngine(name="dense", baseline=True, resident_bytes=256),
            SpeedEngine(name="onednn", baseline=True, resident_bytes=256),
            SpeedEngine(name="bitmask", layers=LAYERS, resident_bytes=172),
            SpeedEngine(name="decode-gpu", refusal="decode-gpu runs on GPUs"),
        ],
        cases=[
            SpeedCase(
                kind="decode" if work else "prefill",
                batch=1,
                length=128,
                unit="tokens/s" if work else "ms",
                work=work,
                seconds=seconds,
            )
        ],
    )


def test_ratios_are_over_the_faster_dense_engine_timing_by_timing() -> None:
    given = record([0.5, 1.0, 1.0, 1.0, 2.0])  # the machine was slow in the last, for both
    dense, onednn, bitmask = timings(given.cases[0], given.engines)
    assert (dense.median, onednn.median, bitmask.median) == (4000, 2000, 1000)
    assert (bitmask.ratio_low, bitmask.ratio, bitmask.ratio_high) == (2, 2, 2)
    assert [timing.gain for timing in (dense, onednn, bitmask)] == [False, False, True]
    assert conclusion(given) == "faster than dense: prefill, 128 tokens 2.00x (bitmask)"


def test_throughput_is_units_a_second() -> None:
    given = record([0.5, 1.0, 1.0, 1.0, 2.0], work=16)
    assert [t.median for t in timings(given.cases[0], given.engines)] == [4, 8, 16]


def test_a_faster_median_alone_is_no_gain() -> None:
    given = record([0.8, 1.5, 2.1, 1.9, 4.5])
    bitmask = timings(given.cases[0], given.engines)[2]
    assert bitmask.ratio > 1 > bitmask.ratio_low
    assert not bitmask.gain
    assert conclusion(given) == "no gain: prefill, 128 tokens"


def test_programs_read_what_was_encoded() -> None:
    found = json.loads(json.dumps(summary(record([1.0] * 5)), allow_nan=False))
    bitmask = found["engines"][2]
    assert (bitmask["num_encoded"], bitmask["num_layers"]) == (1, 2)
    assert (bitmask["dense_bytes"], bitmask["encoded_bytes"]) == (128, 44)
    assert bitmask["kept_dense"] == {"head": "a head"}


def test_people_read_why_not(capsys: pytest.CaptureFixture[str]) -> None:
    print_speed(record([1.0] * 5))
    printed = " ".join(capsys.readouterr().out.split())
    assert "decode-gpu runs on GPUs" in printed
    assert "bitmask leaves head dense: a head" in printed
    assert "1 of 2" in printed


def test_a_damaged_record_is_one_line(tmp_path: Path) -> None:
    assert kept_speed(tmp_path) is None
    (tmp_path / "speed.json").write_text("{")
    with pytest.raises(UserError, match="measure again with sparseramp speed"):
        kept_speed(tmp_path)


@pytest.mark.timeout(300)
def test_a_search_ends_with_it_and_the_command_repeats_it(tmp_path: Path) -> None:
    spec = write_project(tmp_path)
    few = ["speed.prompts=[16]", "speed.new_tokens=2", "speed.runs=3", "speed.batches=[1]"]
    small = ["search.scouts=2", "evaluation.calibration_seeds=1", "--json"]
    done = run("search", spec, "speed.measure=true", *few, *small, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["speed"]["conclusion"]
    assert 'id="speed"' in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / "speed.json").unlink()
    best = tmp_path / "run" / "best"
    done = run("speed", best, *few, "speed.engines=['dense']", "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)
    assert (line["kind"], [engine["name"] for engine in line["engines"]]) == ("speed", ["dense"])
    assert line["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert (tmp_path / "run" / "speed.json").is_file()
    done = run("speed", best, "speed.engines=['dens']", cache=tmp_path / "cache")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
