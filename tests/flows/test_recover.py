"""Recovery as a user sees it: in a search, of a checkpoint, resumed, and refused in one line.

python -m pytest tests/flows/test_recover.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from flows.plan import final_wave, token_passes
from flows.status import print_status, status
from infra.specs import Spec
from tests.flows.commands import run, write_project
from tests.flows.test_plan import at, make_spec

SMALL = ("evaluation.calibration_seeds=2", "--json")
SHORT = (
    "recovery.steps=12",
    "recovery.batch=3",
    "recovery.length=16",
    "recovery.learning_rate=0.003",
    "recovery.rank=4",
)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A project after a comparison with recovery, and the lines that it printed."""
    folder = tmp_path_factory.mktemp("project")
    spec = write_project(folder)
    beta = "prune.beta=0.1"  # a search of so small a model may end with uniform alone
    done = run("prune", spec, beta, *SHORT, *SMALL, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def zeros(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor == 0 for name, tensor in weights(folder).items() if tensor.ndim == 2}


def test_the_first_seed_of_both_is_fine_tuned() -> None:
    spec = make_spec(recovery={"steps": 10, "batch": 4, "length": 64})
    wave = final_wave(spec, at(spec, 0.006), {})
    assert [(t.calibration.seed, t.recovery is not None) for t in wave] == [
        (0, True),
        (0, True),
        (1, False),
        (1, False),
        (2, False),
        (2, False),
    ]
    without = wave[0].model_copy(update={"recovery": None})
    measured = wave[0].windows * wave[0].context
    assert token_passes(wave[0]) - token_passes(without) == 4 * 10 * 4 * 64 + measured


def test_only_what_decides_results_is_identity() -> None:
    plain, other = make_spec(), make_spec(recovery={"rank": 3})
    assert plain.identity() == other.identity() and "recovery" not in plain.identity()
    tuned = make_spec(recovery={"steps": 5})
    assert tuned.identity() != plain.identity()
    often: Spec = make_spec(recovery={"steps": 5, "save_every": 1})
    assert often.identity() == tuned.identity()


def test_the_report_shows_both_before_and_after(
    searched: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, lines = searched
    report = json.loads((folder / "run" / "report.json").read_text())
    recovery = report["recovery"]
    files = sorted((folder / "run" / "trials").iterdir())
    results = [json.loads(file.read_text()) for file in files]
    tuned = [result for result in results if result["recovery"]]
    assert len(tuned) == 2
    for result in tuned:
        name = "uniform" if result["spec"]["prune"]["allocation"] == "uniform" else "best"
        side = recovery[name]
        for when, losses in (("before", result["losses"]), ("after", result["recovered_losses"])):
            mean = sum(losses) / len(losses)
            assert side[when]["loss"]["mean"] == pytest.approx(mean)
            assert side[when]["loss"]["n"] == 4
        assert side["gained"]["mean"] > 0
        assert side["zeros_before"] == side["zeros_after"]
        assert (side["steps"], side["tokens"]) == (12, 12 * 3 * 16)
    assert recovery["conclusion"].startswith("12 steps of LoRA on 576 tokens take perplexity from")
    assert lines[-1]["recovery"]["conclusion"] == recovery["conclusion"]
    page = (folder / "run" / "report.html").read_text()
    assert recovery["conclusion"] in page and 'id="recovery"' in page
    assert "best/ holds the\n    fine-tuned weights" in page
    told = [line for line in lines if line["kind"] == "recovery"]
    assert {line["trial"] for line in told} <= {0, 1} and all(line["steps"] == 12 for line in told)


def test_the_checkpoint_is_the_fine_tuned_one(
    searched: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, _ = searched
    facts = json.loads((folder / "run" / "best" / "sparsity.json").read_text())
    assert facts["recovery"]["steps"] == 12 and facts["recovery"]["method"] == "lora"
    total = sum(int(mask.sum()) for mask in zeros(folder / "run" / "best").values())
    assert facts["recovery"]["zeros_after"] == sum(m["zeros"] for m in facts["matrices"]) == total
    card = (folder / "run" / "best" / "README.md").read_text()
    assert "fine-tuned after pruning" in card and "recovery.steps = 12" in card
    done = run("evaluate", folder / "run" / "best", "--json", cache=folder / "cache")
    report = json.loads((folder / "run" / "report.json").read_text())
    after = report["recovery"]["best"]["after"]
    assert json.loads(done.stdout)["metrics"]["loss"]["mean"] == pytest.approx(
        after["loss"]["mean"], rel=1e-6
    )


def test_a_checkpoint_is_recovered_and_the_command_repeats_nothing(
    searched: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = searched
    best = folder / "run" / "best"
    command = ("recover", best, *SHORT, "recovery.method=full", "--json")
    done = run(*command, cache=folder / "cache")
    assert done.returncode == 0, done.stderr
    line, recovered = json.loads(done.stdout), folder / "run-recovered"
    first, *more = done.stderr.splitlines()
    assert first == f"fine-tuning {best} into {recovered}: 12 steps"
    assert any(said.startswith("step ") and " of 12" in said for said in more)
    found = status(recovered)
    assert found["finished"] and found["recovery"] == line and "trials" not in found
    print_status(found)
    said = capsys.readouterr().out
    assert said.splitlines()[1] == line["conclusion"] and "none yet" not in said
    card = ModelCard((recovered / "best" / "README.md").read_text())
    assert line["conclusion"] in card.text and 'recovery.method = "full"' in card.text
    values = {r.metric_type: r.metric_value for r in card.data.get("eval_results")}
    assert values["perplexity"] == pytest.approx(line["after"]["perplexity"]["mean"], rel=1e-5)
    assert line == json.loads((recovered / "recovery.json").read_text())
    assert line["after"]["loss"]["mean"] < line["before"]["loss"]["mean"]
    report = json.loads((folder / "run" / "report.json").read_text())
    now = report["recovery"]["best"]["after"]["loss"]["mean"]
    assert line["before"]["loss"]["mean"] == pytest.approx(now, rel=1e-6)
    old, new = zeros(best), zeros(recovered / "best")
    assert all(torch.equal(old[name], new[name]) for name in old)
    facts = [json.loads((f / "sparsity.json").read_text()) for f in (best, recovered / "best")]
    assert facts[0]["beta"] == facts[1]["beta"] and facts[1]["recovery"]["method"] == "full"
    assert facts[0]["model"] == facts[1]["model"]
    trial = recovered / "trials" / "00000.json"
    written = trial.stat().st_mtime_ns
    # As if its driver had been killed before it fetched the checkpoint.
    (recovered / "best").rename(json.loads(trial.read_text())["checkpoint"])
    again = run(*command, cache=folder / "cache")
    assert json.loads(again.stdout)["after"] == line["after"]
    assert trial.stat().st_mtime_ns == written
    assert (recovered / "best" / "README.md").read_text() == str(card)
    shown = run("report", recovered, cache=folder / "cache")
    assert "zeros stayed" in shown.stdout and "nats/token" in shown.stdout
    assert f"sparseramp report {recovered}" in shown.stdout
    other = run("recover", best, "recovery.steps=3", cache=folder / "cache")
    assert other.returncode == 2 and "recovery.steps (was 12, is 3)" in other.stderr


@pytest.mark.parametrize(
    ("command", "override", "said"),
    [
        ("search", "recovery.workers=2", "a search recovers on one worker"),
        ("search", "recovery.question=q", "recovery.question and recovery.answer need each other"),
        ("search", "recovery.method=lorra", "recovery.method='lorra'"),
        ("recover", "recovery.steps=0", "recovery.steps=0 recovers nothing"),
        ("recover", "recovery.source=nowhere.txt", "nowhere.txt"),
    ],
)
def test_refusals_are_one_line(
    searched: tuple[Path, list[dict[str, Any]]], command: str, override: str, said: str
) -> None:
    folder, _ = searched
    what = folder / "tiny.toml" if command == "search" else folder / "run" / "best"
    other = f"run.dir={folder / 'refused'}"
    done = run(command, what, "recovery.steps=5", override, other, cache=folder / "cache")
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_one_worker_that_fails_ends_all(
    searched: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """The first cannot write its state; the second would wait for half an hour."""
    folder, _ = searched
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "recovery").touch()
    where = (f"run.dir={tmp_path / 'run'}", "recovery.workers=2", "recovery.save_every=4")
    command = ("recover", folder / "run" / "best", *SHORT, *where)
    done = run(*command, cache=tmp_path / "cache", timeout_s=200)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"cannot write {tmp_path / 'cache' / 'recovery'}" in done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(450)
def test_two_workers_end_where_one_does(
    searched: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, _ = searched
    found = {}
    for workers in (1, 2):
        where = (f"run.dir={folder / f'by{workers}'}", f"recovery.workers={workers}")
        command = ("recover", folder / "run" / "best", *SHORT, *where, "--json")
        done = run(*command, cache=folder / "cache", timeout_s=200)  # two more Pythons start
        assert done.returncode == 0, done.stderr
        found[workers] = json.loads(done.stdout)
    assert found[2]["losses"] == pytest.approx(found[1]["losses"], rel=1e-5)
    after = [found[workers]["after"]["loss"]["mean"] for workers in (1, 2)]
    assert after[0] == pytest.approx(after[1], rel=1e-5)
    first, second = (weights(folder / f"by{workers}" / "best") for workers in (1, 2))
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)
        assert torch.equal(first[name] == 0, second[name] == 0)
