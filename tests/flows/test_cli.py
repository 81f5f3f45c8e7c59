"""The command line: quick where it can be, and one line for what the user can put right.

python -m pytest tests/flows/test_cli.py
"""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.evaluate import evaluate
from infra.errors import UserError
from tests.flows.commands import ROOT, run, write_project
from tests.models import VOCAB


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a command that the user has to put right."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("sparseramp: ")
    assert "Traceback" not in done.stdout + done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "command",
    ["", "search", "prune", "compare", "check", "evaluate", "pack", "report", "dashboard"],
)
def test_help_imports_nothing_heavy(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows.cli", *command.split(), "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("usage: sparseramp")
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "transformers", "ray", "optuna", "mlflow", "pydantic"}


def test_help_takes_less_than_a_second(cache: Path) -> None:
    """Of the processor, since the machine may be busy with other things."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run("--help", cache=cache).returncode == 0
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize(
    "override, message",
    [
        ("search.scuots=3", "unknown key 'search.scuots': did you mean 'scouts'?"),
        ("sparsity=0.7", "unknown key 'sparsity': did you mean prune.sparsity?"),
        (
            "data.classes=cat,dog",
            """data.classes=cat,dog is no list: write data.classes='["cat", "dog"]'""",
        ),
        ("prune.sparsity=much", "prune.sparsity='much': "),
        ("prune.sparsity=1", "prune.sparsity=1: "),
        ("prune.sparsity", "'prune.sparsity' is not an override"),
        ("search.protocol=paper", "needs prune.pause='block'"),
        ("prune.sparsity=0", "prunes nothing"),
    ],
)
def test_a_wrong_spec(spec: Path, cache: Path, override: str, message: str) -> None:
    assert message in refusal(run("search", spec, override, cache=cache))
    assert not (spec.parent / "run").exists()


def test_no_spec_no_run_no_checkpoint(tmp_path: Path, cache: Path) -> None:
    missing = tmp_path / "missing"
    assert f"cannot read spec {missing}" in refusal(run("search", missing, cache=cache))
    assert f"{missing} is not a run directory" in refusal(run("report", missing, cache=cache))
    assert f"{missing} is no checkpoint" in refusal(run("evaluate", missing, cache=cache))


def test_a_run_directory_that_cannot_be_written(spec: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refusal(run("search", spec, f"run.dir={tmp_path / 'file' / 'run'}", cache=cache))
    assert f"{tmp_path / 'file' / 'run'}" in line


@pytest.mark.skipif(os.getuid() == 0, reason="root writes anywhere")
def test_a_read_only_run_directory(spec: Path, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir(mode=0o555)
    line = refusal(run("search", spec, f"run.dir={folder / 'run'}", cache=cache))
    assert "Permission denied" in line


def test_a_folder_of_something_else(spec: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    line = refusal(run("search", spec, f"run.dir={tmp_path}", cache=cache))
    assert "holds 'thesis.tex': choose another run.dir" in line


def test_no_such_ray_address(spec: Path, cache: Path, tmp_path: Path) -> None:
    options = ("cluster.address=127.0.0.1:1", f"run.dir={tmp_path / 'run'}")
    line = refusal(run("search", spec, *options, cache=cache))
    assert "no Ray cluster answers at 127.0.0.1:1 (Connection refused)" in line


def test_no_such_model(spec: Path, cache: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    line = refusal(run("check", spec, f"model.source={missing}", cache=cache))
    assert str(missing) in line


def test_a_checkpoint_that_could_execute_code(spec: Path, cache: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in (spec.parent / "model").iterdir():
        if file.suffix == ".json":
            (model / file.name).write_bytes(file.read_bytes())
    torch.save({"lm_head.weight": torch.zeros(VOCAB, 32)}, model / "pytorch_model.bin")
    line = refusal(run("check", spec, f"model.source={model}", cache=cache))
    assert "model.allow_pickle" in line


def test_a_beta_that_is_not_given(spec: Path, cache: Path) -> None:
    assert "give the common difference" in refusal(run("prune", spec, cache=cache))
    assert not (spec.parent / "run").exists()


def test_an_infeasible_beta(spec: Path, cache: Path, tmp_path: Path) -> None:
    """Known when the number of blocks is known, and before any trial."""
    options = ("prune.beta=0.6", f"run.dir={tmp_path / 'run'}")
    line = refusal(run("prune", spec, *options, cache=cache))
    assert "beta=0.6 is too large for 3 blocks at sparsity 0.5: at most 0.4999" in line
    assert not list((tmp_path / "run" / "trials").glob("*"))


FACTS = {
    "dtype": "float32",
    "data": {"source": "text.txt"},
    "evaluation": {"context": 16},
    "calibration": {"seed": 0},
}


@pytest.mark.parametrize(
    "facts, message",
    [
        ('{"data": ', "sparsity.json is damaged (JSONDecodeError: "),
        ("[]", "sparsity.json is damaged (TypeError: "),
        (json.dumps({"data": {}, "evaluation": {}}), "is damaged (KeyError: 'dtype')"),
        (json.dumps(FACTS | {"data": 7}), "sparsity.json is damaged (TypeError: "),
        (json.dumps(FACTS | {"evaluation": {"contexts": 16}}), "unknown key 'evaluation.contexts'"),
    ],
)
def test_a_damaged_sparsity_file(tmp_path: Path, facts: str, message: str) -> None:
    (tmp_path / "sparsity.json").write_text(facts)
    with pytest.raises(UserError) as refused:
        evaluate(tmp_path, [])
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_value_for_a_section_of_evaluate(tmp_path: Path) -> None:
    (tmp_path / "sparsity.json").write_text(json.dumps(FACTS))
    with pytest.raises(UserError, match=r"is no section: write model\.key=value"):
        evaluate(tmp_path, ["model=y"])


@pytest.mark.parametrize("override", ["prune.bits=4", "prune=0.5", "recovery.steps=3"])
def test_a_checkpoint_is_measured_as_it_is(tmp_path: Path, override: str) -> None:
    """Otherwise it would be rounded or fine-tuned in passing, and reported as the checkpoint."""
    (tmp_path / "sparsity.json").write_text(json.dumps(FACTS))
    with pytest.raises(UserError, match=f"^{override}: .* is taken as it is; leave this out$"):
        evaluate(tmp_path, [override])


def test_a_reader_that_has_enough(spec: Path, cache: Path) -> None:
    command = [sys.executable, "-m", "flows.cli", "doctor"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_checkpoint_that_overflows(spec: Path, cache: Path, tmp_path: Path) -> None:
    """What a trial calls a failure is a line for the user where there is only one trial."""
    model = tmp_path / "model"
    shutil.copytree(spec.parent / "model", model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    options = (f"data.source={spec.parent / 'text.txt'}", "evaluation.context=16")
    line = refusal(run("evaluate", model, *options, "evaluation.report_windows=4", cache=cache))
    assert f"{model} cannot be measured: RuntimeError: the loss is nan" in line
    line = refusal(
        run("search", spec, f"model.source={model}", f"run.dir={tmp_path / 'run'}", cache=cache)
    )
    assert "describe_model failed: RuntimeError: " in line


def test_a_checkpoint_is_measured(spec: Path, cache: Path) -> None:
    """Any checkpoint, given text."""
    model = spec.parent / "model"
    assert "add data.source=..." in refusal(run("evaluate", model, cache=cache))
    options = ("evaluation.context=16", "evaluation.report_windows=4")
    text = f"data.source={spec.parent / 'text.txt'}"
    done = run("evaluate", model, text, *options, "--json", cache=cache)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert (answer["checkpoint"], answer["context"]) == (str(model), 16)
    assert answer["metrics"]["perplexity"]["mean"] > 1
    assert answer["metrics"]["perplexity"]["n"] == 4
    assert answer["metrics"]["bits_per_byte"]["unit"] == "bits/byte"


def test_lists_that_are_not_compared_are_told(spec: Path, cache: Path) -> None:
    done = run("prune", spec, 'compare.methods=["wanda"]', cache=cache)  # no beta: ends at once
    first, _ = done.stderr.splitlines()
    assert first.startswith("sparseramp: prune ignores the lists of [compare]: sparseramp compare")
