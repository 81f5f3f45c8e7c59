"""The run directory under kill -9, a second driver, another spec and a disk that refuses."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.errors import UserError
from infra.records import ModelRecord, TrialResult
from infra.spec_files import load_spec
from infra.specs import RunSpec, Spec
from infra.store import TEMP_PREFIX, VERSION, RunStore, write_atomic

MakeSpec = Callable[..., Spec]
MakeResult = Callable[..., TrialResult]

# Goes on where it was killed; acknowledges every trial and event once it is written.
WRITER = """
import sys
from infra.records import TrialResult
from infra.spec_files import load_spec
from infra.store import RunStore
with RunStore.open(load_spec(sys.argv[1])) as store:
    result = TrialResult.model_validate_json(open(sys.argv[2]).read())
    number = max(store.numbers(), default=-1)
    while True:
        number += 1
        spec = result.spec.model_copy(update={"number": number})
        store.write_wave(number, [spec])
        store.write_result(result.model_copy(update={"spec": spec}))
        store.event("trial", number=number, padding="x" * 500)
        print(number, flush=True)
"""


def on_one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_everything_written_is_read_back(make_spec: MakeSpec, make_result: MakeResult) -> None:
    results = {n: make_result(n, 0.001 * n) for n in (10, 2, 100_000)}
    results[3] = make_result(3, state="failed")
    model = ModelRecord(
        source="org/model", architecture="Llama", dtype="float32", sha256="ab", blocks=["0"],
        matrices=[], total_params=1, context=8, adds_bos=False,
    )  # fmt: skip
    with RunStore.open(make_spec()) as store:
        assert store.results() == {} and store.waves() == [] and store.model() is None
        for result in results.values():
            store.write_result(result)
        store.write_wave(0, [results[2].spec, results[3].spec])
        store.write_wave(1, [results[10].spec])
        store.write_model(model)
        store.event("note", text="naïve")

    reader = RunStore.read(store.dir)
    assert reader.results() == results
    assert list(reader.results()) == [2, 3, 10, 100_000]
    assert reader.waves() == [[results[2].spec, results[3].spec], [results[10].spec]]
    assert reader.model() == model
    assert [e["event"] for e in reader.events()] == ["created", "note"]
    assert reader.spec == make_spec() and reader.id == store.id
    with pytest.raises(RuntimeError, match="for reading"):
        reader.write_result(results[2])


def test_written_spec_starts_the_same_run(make_spec: MakeSpec) -> None:
    odd = 'a "quoted" \\ päth\twith\x7f 𝄞'
    spec = make_spec(data={"source": odd}, prune={"beta": 1e-05})
    RunStore.open(spec).close()
    assert load_spec(Path(spec.run.dir) / "spec.toml") == spec


def test_resume_takes_what_may_change(make_spec: MakeSpec, make_result: MakeResult) -> None:
    with RunStore.open(make_spec()) as first:
        first.write_wave(0, [make_result(0).spec])
    header = json.loads(first.path("run.json").read_text())
    del header["identity"]["prune"]["bits"]  # as of a version that did not know the key
    first.path("run.json").write_text(json.dumps(header))
    with RunStore.open(make_spec(cluster={"parallel": 7})) as second:
        assert second.id == first.id
    assert RunStore.read(first.dir).spec.cluster.parallel == 7
    assert [e["event"] for e in second.events()] == ["created", "resumed"]


def test_changed_spec_is_refused_by_key_once_a_wave_is_planned(
    make_spec: MakeSpec, make_result: MakeResult
) -> None:
    RunStore.open(make_spec(prune={"sparsity": 0.5})).close()
    with RunStore.open(make_spec()) as store:
        store.write_wave(0, [make_result(0).spec])
    with pytest.raises(UserError, match=r"prune\.sparsity \(was 0\.6, is 0\.7\)") as error:
        RunStore.open(make_spec(prune={"sparsity": 0.7}))
    assert "prune.method" not in on_one_line(error)
    RunStore.open(make_spec()).close()  # the refused one let go of the lock


def test_resume_takes_another_storage(make_spec: MakeSpec, make_result: MakeResult) -> None:
    """Optuna's is a view of the files, and told of them anew."""
    with RunStore.open(make_spec()) as store:
        store.write_wave(0, [make_result(0).spec])
    RunStore.open(make_spec(search={"storage": "sqlite:///other.db"})).close()
    with pytest.raises(UserError, match=r"search\.seed \(was 0, is 1\)"):
        RunStore.open(make_spec(search={"seed": 1}))


@pytest.mark.parametrize("key", ["id", "identity", "provenance"])
def test_incomplete_header_is_refused(
    make_spec: MakeSpec, make_result: MakeResult, key: str
) -> None:
    spec = make_spec()
    with RunStore.open(spec) as store:
        store.write_wave(0, [make_result(0).spec])
    path = store.path("run.json")
    header = json.loads(path.read_text())
    del header[key]
    path.write_text(json.dumps(header))
    for attempt in (lambda: RunStore.open(spec), lambda: RunStore.read(spec.run.dir)):
        with pytest.raises(UserError, match=f"run.json is damaged .no '{key}'.") as error:
            attempt()
        on_one_line(error)


def test_other_version_is_refused(make_spec: MakeSpec) -> None:
    spec = make_spec()
    RunStore.open(spec).close()
    path = Path(spec.run.dir) / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    for attempt in (lambda: RunStore.open(spec), lambda: RunStore.read(spec.run.dir)):
        with pytest.raises(UserError, match=r"version 2 .*version 1") as error:
            attempt()
        on_one_line(error)


def test_what_is_no_run_directory_is_refused_and_left_alone(
    make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec()
    with pytest.raises(UserError, match="is not a run directory"):
        RunStore.read(spec.run.dir)
    folder = Path(spec.run.dir)
    folder.mkdir(parents=True)
    (folder / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match=r"holds 'thesis.doc'"):
        RunStore.open(spec)
    assert [p.name for p in folder.iterdir()] == ["thesis.doc"]


def test_damaged_trial_is_named(make_spec: MakeSpec, make_result: MakeResult) -> None:
    with RunStore.open(make_spec()) as store:
        store.write_result(make_result(3))
        path = store.path("trials/00003.json")
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match=r"trials/00003\.json is damaged") as error:
            store.results()
    on_one_line(error)


def test_missing_wave_is_noticed(make_spec: MakeSpec, make_result: MakeResult) -> None:
    with RunStore.open(make_spec()) as store:
        for index in range(3):
            store.write_wave(index, [make_result(index).spec])
        store.path("waves/0001.json").unlink()
        with pytest.raises(UserError, match="waves has a gap") as error:
            store.waves()
        on_one_line(error)


def test_second_driver_is_refused_and_kill_releases(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec()
    RunStore.open(spec).close()
    script = (
        "import sys, time\n"
        "from infra.spec_files import load_spec\nfrom infra.store import RunStore\n"
        "store = RunStore.open(load_spec(sys.argv[1])); print('open', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(Path(spec.run.dir) / "spec.toml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == "open\n"
        try:
            with pytest.raises(UserError, match=rf"in use by pid {driver.pid} on ") as error:
                RunStore.open(spec)
            assert os.uname().nodename in on_one_line(error)
            assert "started 0:00:0" in str(error.value)
            assert RunStore.read(spec.run.dir).results() == {}  # a reader needs no lock
        finally:
            driver.send_signal(signal.SIGKILL)
    RunStore.open(spec).close()


@pytest.mark.parametrize("how", ["deleted", "written"])
def test_stale_driver_that_lost_its_lock_writes_nothing(
    make_spec: MakeSpec, make_result: MakeResult, how: str
) -> None:
    """As one that was stopped for a night, on a file system that lets go of its locks."""
    spec = make_spec()
    stale = RunStore.open(spec)
    lock = stale.path("lock")
    if how == "deleted":
        lock.unlink()
        owner = RunStore.open(spec)
    else:  # by a machine that the lock did not reach
        lock.write_text(json.dumps({"host": "node7", "pid": 12, "start": "2026-01-01T00:00:00Z"}))
    before = {path: path.read_bytes() for path in stale.dir.rglob("*.json*")}
    for write in (
        lambda: stale.write_result(make_result(0)),
        lambda: stale.write_wave(0, [make_result(0).spec]),
        lambda: stale.event("trial", number=0),
    ):
        with pytest.raises(UserError, match=r"was taken over by pid \d+ on ") as error:
            write()
        on_one_line(error)
    assert {path: path.read_bytes() for path in stale.dir.rglob("*.json*")} == before
    if how == "deleted":
        owner.write_result(make_result(0))


SAMPLE = Path(__file__).parents[1] / "data" / f"run_version_{VERSION}"


def test_run_of_this_version_opens(tmp_path: Path) -> None:
    """A sample was kept when the version was new: a change that cannot read it needs another."""
    kept = json.loads((SAMPLE / "report.json").read_text())
    run = Path(shutil.copytree(SAMPLE, tmp_path / "run"))
    with RunStore.open(RunStore.read(run).spec.model_copy(update={"run": RunSpec(dir=str(run))})):
        pass  # the spec means what it meant, or it would be another one
    store = RunStore.read(run)
    model = store.model()
    assert model is not None and len(model.blocks) == 3
    assert [spec.number for wave in store.waves() for spec in wave] == list(range(12))
    losses = {number: result.loss for number, result in store.results().items()}
    assert losses == pytest.approx({each["number"]: each["loss"] for each in kept["trials"]})
    assert [event["event"] for event in store.events()][-2:] == ["finished", "resumed"]


def test_kill_at_any_moment_loses_and_tears_nothing(
    make_spec: MakeSpec, make_result: MakeResult, tmp_path: Path
) -> None:
    spec = make_spec()
    RunStore.open(spec).close()
    folder = Path(spec.run.dir)
    result = tmp_path / "result.json"
    result.write_text(make_result(0).model_dump_json())
    command = [sys.executable, "-c", WRITER, str(folder / "spec.toml"), str(result)]
    acknowledged: set[int] = set()
    chance = random.Random(0)
    for _ in range(8):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            acknowledged.add(int(writer.stdout.readline()))
            time.sleep(chance.uniform(0, 0.15))
            writer.kill()
            # a line that was torn in the pipe would acknowledge a smaller number: no harm
            acknowledged |= {int(line) for line in writer.stdout if line.strip()}
        store = RunStore.read(folder)
        numbers = list(store.results())
        assert acknowledged <= set(numbers)
        assert numbers == list(range(len(numbers)))  # none twice, none skipped
        assert len(store.waves()) - len(numbers) in (0, 1)
        seen = [e["number"] for e in store.events() if e["event"] == "trial"]
        assert acknowledged <= set(seen)
    assert len(acknowledged) > 16
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"time": "2026-')
    (folder / "trials" / f"{TEMP_PREFIX}x").write_text("half")
    (folder / f"{TEMP_PREFIX}best").mkdir()
    (folder / f"{TEMP_PREFIX}best" / "model.safetensors").write_text("half")
    with RunStore.open(spec) as store:
        store.event("after")
    lines = (folder / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines][-2:] == ["resumed", "after"]
    assert not list(folder.rglob(f"{TEMP_PREFIX}*"))


def test_folder_in_the_way_and_unwritable_place(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"cannot write {place}") as error:
            RunStore.open(make_spec(run={"dir": str(place)}))
        on_one_line(error)


@pytest.mark.skipif(not shutil.which("unshare"), reason="mounts a small disk")
@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_disk_that_refuses_costs_no_finished_trial(
    fault: str, make_result: MakeResult, make_spec: MakeSpec, tmp_path: Path
) -> None:
    result = tmp_path / "result.json"
    result.write_text(make_result(0).model_dump_json())
    spec = tmp_path / "spec.toml"
    with RunStore.open(make_spec()) as store:
        spec.write_bytes(store.path("spec.toml").read_bytes())
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f"""
import subprocess, sys
from infra.errors import UserError
from infra.records import TrialResult
from infra.spec_files import load_spec
from infra.store import RunStore
result = TrialResult.model_validate_json(open({str(result)!r}).read())
store = RunStore.open(load_spec({str(spec)!r}, ["run.dir={disk}/run"]))
for number in range(1000):
    if number == 5 and {fault!r} == "read-only":
        for how in (["--bind", {str(disk)!r}], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *how, {str(disk)!r}], check=True)
    try:
        trial = result.spec.model_copy(update={{"number": number}})
        store.write_result(result.model_copy(update={{"spec": trial}}))
    except UserError as error:
        print(error)
        break
assert list(RunStore.read(store.dir).results()) == list(range(number)) and number >= 5
try:
    store.event("stopped", padding="x" * 100_000)
except UserError as error:
    print(error)
"""
    mount = f'mount -t tmpfs -o size=128k none {disk} || exit 77; exec {sys.executable} -c "$0"'
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, script], capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no right to mount here")
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    reason = {"full": "No space left on device", "read-only": "Read-only file system"}[fault]
    assert len(messages) == 2
    assert f"{disk}/run/trials/" in messages[0] and reason in messages[0]
    assert f"{disk}/run/events.jsonl" in messages[1] and reason in messages[1]


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_atomic(path, b"old")
    path.with_name(f"{TEMP_PREFIX}report.json-{os.getpid()}").mkdir()  # the write cannot begin
    with pytest.raises(UserError, match=r"cannot write .*report\.json"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
