"""Proposals as a pure function of their arguments, and the Optuna view of finished trials."""

import math
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend

from infra.errors import UserError
from infra.records import TrialResult
from infra.samplers import FIRST_TILTS, SAMPLERS, StudyMirror, Values, grid, propose

BOUND = 0.0276
FIRST = [tilt * BOUND for tilt in FIRST_TILTS]
LIGHT = sorted(set(SAMPLERS) - {"gp"})  # gp imports torch


def loss(beta: float, best: float) -> float:
    """Flat at the best, steep far away, as measured losses are."""
    tilt = (beta - best) / BOUND
    return 4.2 + 2.5 * tilt**2 + 2 * max(tilt, 0) ** 4


def ask(
    sampler: str,
    history: Sequence[tuple[float, float | None]],
    count: int = 4,
    seed: int = 1,
    low: float = -BOUND,
    high: float = BOUND,
) -> list[float]:
    """Proposals for one number."""
    proposed = propose(
        sampler=sampler,
        seed=seed,
        wave=4,
        count=count,
        bounds={"beta": (low, high)},
        history=[({"beta": beta}, loss) for beta, loss in history],
    )
    return [values["beta"] for values in proposed]


def search(sampler: str, best: float, waves: int, failing: int = -1) -> list[float]:
    history: list[tuple[float, float | None]] = []
    for _ in range(waves):
        history += [
            (beta, None if len(history) + i == failing else loss(beta, best))
            for i, beta in enumerate(ask(sampler, history))
        ]
    return [beta for beta, _ in history]


@pytest.mark.parametrize("sampler", [*LIGHT, pytest.param("gp", marks=pytest.mark.slow)])
def test_contract_of_every_sampler(sampler: str) -> None:
    betas = search(sampler, best=0.01, waves=3, failing=6)
    assert betas[:4] == FIRST and betas[0] == 0.0
    assert len(set(betas)) == 12  # the candidates of one wave differ as well
    assert all(-BOUND < beta < BOUND for beta in betas)
    optuna.samplers.RandomSampler().reseed_rng()  # no state outside the arguments
    assert search(sampler, best=0.01, waves=3, failing=6) == betas
    given = [(beta, loss(beta, 0.01)) for beta in betas]
    other = {seed: ask(sampler, given, count=2, seed=seed) for seed in (1, 2)}
    assert (other[1] == other[2]) == (sampler == "bracket")


@pytest.mark.parametrize("tilt", [-0.7, -0.1, 0.0, 0.29, 0.58, 0.95])
def test_bracket_closes_in_wherever_the_minimum_is(tilt: float) -> None:
    best = tilt * BOUND
    betas = search("auto", best, waves=3)
    assert min(abs(beta - best) for beta in betas) < 0.07 * BOUND


def test_bracket_goes_on_around_failures_and_never_repeats_them() -> None:
    betas = search("bracket", best=0.012, waves=4, failing=5)
    assert betas.count(betas[5]) == 1
    assert min(abs(beta - 0.012) for beta in betas) < 0.04 * BOUND
    asked = ask("bracket", [(beta, None) for beta in FIRST])
    assert len({*asked, *FIRST}) == 8


def test_first_wave_of_any_size_begins_with_uniform_and_keeps_to_the_bounds() -> None:
    for count in (1, 3, 9):
        for low in (-0.001, 0.0):
            betas = ask("bracket", [], count=count, low=low, high=0.03)
            assert len(set(betas)) == count and betas[0] == 0.0
            assert all(low <= beta < 0.03 for beta in betas)
    assert ask("tpe", [(0.0, 4.5)], count=3) == FIRST[1:]


def test_a_number_that_uniform_is_the_lowest_of_is_found() -> None:
    """As OWL's lambda, which is 0 for uniform and never less."""
    history: list[tuple[float, float | None]] = []
    for _ in range(3):
        history += [(x, (x - 0.13) ** 2) for x in ask("bracket", history, low=0.0, high=0.4)]
    assert min(abs(x - 0.13) for x, _ in history) < 0.02


def many(history: Sequence[tuple[Values, float | None]], count: int, numbers: int) -> Any:
    bounds = {f"block_{i}": (-0.2, 0.2) for i in range(numbers)}
    return propose(sampler="auto", seed=3, wave=6, count=count, bounds=bounds, history=history)


def test_many_numbers_are_searched_from_uniform_and_again_alike() -> None:
    history: list[tuple[Values, float | None]] = []
    while len(history) < 91:
        wave = many(history, 6, numbers=8)
        assert wave == many(history, 6, numbers=8)
        losses = [sum((x - 0.02 * i) ** 2 for i, x in enumerate(v.values())) for v in wave]
        if len(history) == 7:
            losses[2] = None
        history += zip(wave, losses, strict=True)
    assert set(history[0][0].values()) == {0.0} and len(many([], 6, numbers=8)) == 1
    told = [loss for _, loss in history if loss is not None]
    assert min(told[60:]) < 0.6 * told[0]


def test_a_sampler_of_one_number_refuses_two() -> None:
    bounds = {"beta": (-1.0, 1.0), "bend": (-1.0, 1.0)}
    with pytest.raises(UserError, match="searches one number, not beta, bend: use auto"):
        propose(sampler="bracket", seed=0, wave=4, count=4, bounds=bounds, history=[])


def test_grids() -> None:
    assert grid("beta", 0.0051) == [0.0, 0.002, 0.004]
    assert grid("beta", 0.004) == [0.0, 0.002]  # the bound would delete a block
    asked = ask("grid", [(0.0, 1.0)], count=9, low=-0.01, high=0.0101)
    assert asked == [0.002, 0.004, 0.006, 0.008, 0.01]
    assert grid("lambda", 0.4) == pytest.approx([0.04 * i for i in range(10)])


def test_unknown_sampler_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'bracket'"):
        ask("braket", [])


def test_default_sampler_leaves_torch_alone() -> None:
    code = (
        "import sys; from infra.samplers import propose\n"
        "assert 'optuna' not in sys.modules\n"
        "h = [({'b': x}, (x - .3) ** 2) for x in (0.0, 0.25, 0.5, -.2)]\n"
        "propose(sampler='auto', seed=0, wave=4, count=4, bounds={'b': (-1, 1)}, history=h)\n"
        "assert 'optuna' in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


Make = Callable[..., TrialResult]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.samplers.mirror.CLOSE_S", 60.0)  # the machine may be busy


def mirrored(
    folder: Path, results: list[TrialResult], *, url: str = "", run: str = "a" * 32
) -> int:
    """Start, rebuild from files and stop; how many trials remain untold."""
    folder.mkdir(exist_ok=True, parents=True)
    mirror = StudyMirror(folder, run, url, {"beta": (-BOUND, BOUND)})
    mirror.rebuild(results)
    return mirror.close()


def study(journal: Path, name: str) -> optuna.Study:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(journal)))
    return optuna.load_study(study_name=name, storage=storage)


def trials(journal: Path, name: str) -> list[optuna.trial.FrozenTrial]:
    return study(journal, name).trials


def test_mirror_tells_each_trial_once_and_rungs_apart(make_result: Make, tmp_path: Path) -> None:
    results = [
        make_result(0),
        make_result(1, 0.01, loss=4.0),
        make_result(2, 0.02, state="failed"),
        make_result(3, 0.01, loss=3.9, rung=1),
    ]
    mirror = StudyMirror(tmp_path, "a" * 32, "", {"beta": (-BOUND, BOUND)})
    for result in [*results, *results]:
        mirror.record(result)
    assert mirror.close() == 0 and mirror.problem == ""
    assert mirrored(tmp_path, results) == 0  # the driver was killed and starts again
    low = trials(tmp_path / "optuna.log", f"{tmp_path.name}/rung0")
    high = trials(tmp_path / "optuna.log", f"{tmp_path.name}/rung1")
    assert [(t.state.name, t.params["beta"]) for t in low] == [
        ("COMPLETE", 0.0), ("COMPLETE", 0.01), ("FAIL", 0.02)
    ]  # fmt: skip
    assert low[1].user_attrs == {
        "number": 1, "tilt": pytest.approx(0.01 / BOUND), "loss": pytest.approx(4),
        "perplexity": pytest.approx(math.exp(4)),
    }  # fmt: skip
    assert [(t.value, t.user_attrs["number"]) for t in high] == [(pytest.approx(3.9), 3)]


def test_the_best_in_the_mirror_is_the_best_of_what_is_searched(
    make_result: Make, tmp_path: Path
) -> None:
    """Of images, which have no perplexity: the one that recognises more has the higher loss."""
    images = {"tokens": [1, 1], "bytes": [0, 0]}
    results = [
        make_result(0, loss=0.5, scores={"top1": [1.0, 0.0]}, **images),
        make_result(1, 0.01, loss=0.9, scores={"top1": [1.0, 1.0]}, **images),
    ]
    mirror = StudyMirror(tmp_path, "a" * 32, "", {"beta": (-BOUND, BOUND)}, "top1")
    mirror.rebuild(results)
    assert mirror.close() == 0
    best = study(tmp_path / "optuna.log", f"{tmp_path.name}/rung0").best_trial
    assert (best.params["beta"], best.value) == (0.01, 1.0)
    assert best.user_attrs.keys() == {"number", "tilt", "loss", "top1"}


def test_mirror_takes_a_loss_whose_perplexity_is_no_number(
    make_result: Make, tmp_path: Path
) -> None:
    assert mirrored(tmp_path, [make_result(0, loss=800.0), make_result(1, 0.01)]) == 0
    high, low = trials(tmp_path / "optuna.log", f"{tmp_path.name}/rung0")
    assert high.value == pytest.approx(800.0) and "perplexity" not in high.user_attrs
    assert "perplexity" in low.user_attrs


def test_mirror_is_rebuilt_after_its_file_was_deleted(make_result: Make, tmp_path: Path) -> None:
    results = [make_result(n, 0.001 * n) for n in range(3)]
    assert mirrored(tmp_path, results[:2]) == 0
    (tmp_path / "optuna.log").unlink()
    assert mirrored(tmp_path, results) == 0
    told = trials(tmp_path / "optuna.log", f"{tmp_path.name}/rung0")
    assert [t.user_attrs["number"] for t in told] == [0, 1, 2]


def test_locked_storage_does_not_hold_up_the_search(
    make_result: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # optuna sleeps between its five tries, as long as chance will have it
    monkeypatch.setattr("optuna.storages._rdb.storage.random.random", lambda: 0.0)
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    assert mirrored(tmp_path, [make_result(0)], url=url) == 0
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    mirror = StudyMirror(tmp_path, "a" * 32, url, {"beta": (-BOUND, BOUND)})
    start = time.monotonic()
    for number in (1, 2):
        mirror.record(make_result(number, 0.001 * number))
    assert time.monotonic() - start < 1.0  # a try that fails takes two
    while not mirror.problem:
        assert time.monotonic() - start < 30
        time.sleep(0.02)
    assert "locked" in mirror.problem and "\n" not in mirror.problem
    other.execute("ROLLBACK")
    assert mirror.close() == 0 and mirror.problem == ""
    told = optuna.load_study(study_name=f"{tmp_path.name}/rung0", storage=url).trials
    assert [t.user_attrs["number"] for t in told] == [0, 1, 2]


def test_a_storage_that_never_answers_is_left_in_the_end(
    make_result: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a run that closes nor a process that ends waits for it."""
    monkeypatch.setattr("infra.samplers.mirror.CLOSE_S", 0.1)
    answers = threading.Event()
    tell = StudyMirror._add
    monkeypatch.setattr(
        StudyMirror, "_add", lambda mirror, result: answers.wait() and tell(mirror, result)
    )
    mirror = StudyMirror(tmp_path, "a" * 32, "", {"beta": (-BOUND, BOUND)})
    for number in (0, 1):
        mirror.record(make_result(number, 0.001 * number))
    assert mirror.close() == 2
    assert "did not answer" in mirror.problem
    assert mirror._thread.daemon
    answers.set()
    mirror._thread.join(60)
    assert mirrored(tmp_path, [make_result(n, 0.001 * n) for n in range(3)]) == 0
    told = trials(tmp_path / "optuna.log", f"{tmp_path.name}/rung0")
    assert [t.user_attrs["number"] for t in told] == [0, 1, 2]


def test_half_a_line_of_a_writer_that_was_killed_is_told_again(
    make_result: Make, tmp_path: Path
) -> None:
    """At whatever byte it was: the last line of the journal is a trial."""
    results = [make_result(n, 0.001 * n) for n in range(3)]
    assert mirrored(tmp_path, results) == 0
    whole = (tmp_path / "optuna.log").read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for length in range(len(whole) - last, len(whole), 97):
        (tmp_path / "optuna.log").write_bytes(whole[:length])
        assert mirrored(tmp_path, results) == 0
        told = trials(tmp_path / "optuna.log", f"{tmp_path.name}/rung0")
        assert [t.user_attrs["number"] for t in told] == [0, 1, 2]


def test_a_storage_that_is_spoiled_or_gone_stops_nothing(make_result: Make, tmp_path: Path) -> None:
    (tmp_path / "optuna.log").write_bytes(b"\x00\x00\n")
    mirror = StudyMirror(tmp_path, "a" * 32, "", {"beta": (-BOUND, BOUND)})
    mirror.record(make_result(0))
    assert mirror.close() == 1 and f"{tmp_path}/optuna.log cannot be" in mirror.problem
    (tmp_path / "optuna.log").unlink()
    (tmp_path / "optuna.log").mkdir()
    assert mirrored(tmp_path, [make_result(0)]) == 1
    assert mirrored(tmp_path, [make_result(0)], url="sqlite:////proc/none/optuna.db") == 1


def test_what_is_wrong_with_a_storage_is_said_without_its_password(
    make_result: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # no driver is needed here
    monkeypatch.setattr("infra.samplers.mirror._check_url", lambda url: None)
    mirror = StudyMirror(
        tmp_path, "a" * 32, "oracle9://me:secret@host/db", {"beta": (-BOUND, BOUND)}
    )
    mirror.record(make_result(0))
    assert mirror.close() == 1
    assert "host" in mirror.problem and "secret" not in mirror.problem


def test_runs_of_one_name_share_a_storage_without_mixing(make_result: Make, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    for folder, run in (("x", "a" * 32), ("y", "b" * 32)):
        assert mirrored(tmp_path / folder / "tiny", [make_result(0)], url=url, run=run) == 0
    for name in ("tiny/rung0", "tiny-bbbbbbbb/rung0"):
        assert len(optuna.load_study(study_name=name, storage=url).trials) == 1


@pytest.mark.parametrize(
    "url",
    ["no url", "oracle9://me:secret@host/db", "mysql+mysqldb://host/db", "sqlite://a:secret@b:c/d"],
)
def test_storage_that_cannot_be_used_is_refused_at_once(url: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search\.storage=") as error:
        StudyMirror(tmp_path, "a" * 32, url, {"beta": (-BOUND, BOUND)})
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
