"""Damaged and hostile inputs: each spoils a sandbox, and says which command is to refuse it.

    arguments = CASES["a pickle in place of the weights"](sandbox)

A sandbox holds `model` (a checkpoint), `text.txt`, `tiny.toml`, `run` (a finished run of an earlier
day) and `packed`. What would execute writes the file CANARY, which must never be there.
"""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.infra.packed_folders import manifest_of, rewrite
from tests.infra.test_packed_hostile import MANIFESTS

CANARY = "canary"
Case = Callable[[Path], list[str]]
NOISE = bytes(range(256)) * 8
DEEP = "[" * 100_000


def _bomb(sandbox: Path) -> bytes:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {sandbox / CANARY}",)

    return pickle.dumps(Bomb())


def _search(sandbox: Path, *overrides: str) -> list[str]:
    return ["search", str(sandbox / "tiny.toml"), f"run.dir={sandbox / 'new'}", *overrides]


def _code(sandbox: Path) -> str:
    return f"import pathlib\npathlib.Path({str(sandbox / CANARY)!r}).touch()\n"


def _content(path: str, content: bytes | str, command: str = "search") -> Case:
    """A file of other content."""

    def spoil(sandbox: Path) -> list[str]:
        file = sandbox / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return _command(sandbox, command)

    return spoil


def _json(path: str, command: str = "search", **changes: Any) -> Case:
    """Keys of a JSON object that say something else; None takes a key away."""

    def spoil(sandbox: Path) -> list[str]:
        held = json.loads((sandbox / path).read_text()) | changes
        held = {key: value for key, value in held.items() if value is not None}
        (sandbox / path).write_text(json.dumps(held))
        return _command(sandbox, command)

    return spoil


def _command(sandbox: Path, command: str) -> list[str]:
    if command == "search":
        return _search(sandbox)
    if command == "resume":
        return ["search", str(sandbox / "tiny.toml"), f"run.dir={sandbox / 'run'}"]
    folder = {"report": "run", "evaluate": "model", "packed": "packed"}[command]
    return ["evaluate" if command == "packed" else command, str(sandbox / folder)]


def _given(*overrides: str) -> Case:
    return lambda sandbox: _search(sandbox, *(each.format(sandbox) for each in overrides))


def _study(text: bytes | str, *overrides: str) -> Case:
    """A study file, whose cells are below `new`."""

    def spoil(sandbox: Path) -> list[str]:
        file = sandbox / "study.toml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        given = [f"study.dir={sandbox / 'new'}", *(each.format(sandbox) for each in overrides)]
        return ["study", str(file), *given]

    return spoil


def _reported_study(text: str) -> Case:
    def spoil(sandbox: Path) -> list[str]:
        header = json.loads((sandbox / "run" / "run.json").read_text())
        header["identity"]["command"] = "study"
        (sandbox / "run" / "run.json").write_text(json.dumps(header))
        (sandbox / "run" / "study.json").write_text(text)
        return _command(sandbox, "report")

    return spoil


def _packed(change: Callable[[dict[str, Any]], None]) -> Case:
    def spoil(sandbox: Path) -> list[str]:
        manifest = manifest_of(sandbox / "packed")
        change(manifest)
        rewrite(sandbox / "packed", manifest)
        return _command(sandbox, "packed")

    return spoil


def _pickled(name: str, *, alone: bool = True) -> Case:
    def spoil(sandbox: Path) -> list[str]:
        if alone:
            (sandbox / "model" / "model.safetensors").unlink()
        with zipfile.ZipFile(sandbox / "model" / name, "w") as file:
            file.writestr("archive/data.pkl", _bomb(sandbox))
        return _search(sandbox)

    return spoil


def _remote(sandbox: Path) -> list[str]:
    config = json.loads((sandbox / "model" / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Config"}}
    (sandbox / "model" / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    (sandbox / "model" / "own.py").write_text(_code(sandbox))
    return _search(sandbox)


def _remote_tokenizer(sandbox: Path) -> list[str]:
    path = sandbox / "model" / "tokenizer_config.json"
    held = json.loads(path.read_text())
    held |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    path.write_text(json.dumps(held))
    (sandbox / "model" / "own.py").write_text(_code(sandbox))
    (sandbox / "model" / "tokenizer.json").unlink()
    return _search(sandbox)


def _script(sandbox: Path) -> list[str]:
    (sandbox / "data").mkdir()
    (sandbox / "data" / "data.py").write_text(_code(sandbox))
    return _search(sandbox, f"data.source={sandbox / 'data'}")


def _data(name: str, content: bytes | str) -> Case:
    def spoil(sandbox: Path) -> list[str]:
        data = content.encode() if isinstance(content, str) else content
        (sandbox / name).write_bytes(data or _bomb(sandbox))
        return _search(sandbox, f"data.source={sandbox / name}")

    return spoil


def _link(path: str, target: str, command: str) -> Case:
    def spoil(sandbox: Path) -> list[str]:
        (sandbox / path).unlink(missing_ok=True)
        (sandbox / path).symlink_to(target)
        return _command(sandbox, command)

    return spoil


def _header(header: str | bytes, length: int | None = None) -> bytes:
    data = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(data) if length is None else length) + data


SPEC_TEXTS: dict[str, bytes | str] = {
    "an empty spec": "",
    "noise for a spec": NOISE,
    "zeros for a spec": b"\0" * 100,
    "a spec in UTF-16": "[model]".encode("utf-16"),
    "half a spec": '[model]\nsource = "a',
    "a spec twice": '[model]\nsource = "a"\n[model]\nsource = "b"\n',
    "JSON for a spec": '{"model": {"source": "a"}}',
    "YAML for a spec": "model: !!python/object/apply:os.system [touch canary]\n",
    "a deep spec": f"[model]\nsource = {DEEP}",
    "a section that is a number": "model = 7\n",
    "sections that are lists": '[[model]]\nsource = "a"\n',
    "an unknown section": "[code]\nrun = 1\n",
    "a key with a terminal's codes": '[model]\n"so\\u001b[2Jurce" = 1\n',
    "a source that is a list": "[model]\nsource = [1]\n",
    "a source of two lines": '[model]\nsource = "a\\nb"\n[data]\nsource = "text.txt"\n',
    "a spec of a long line": "[model]\nsource = '" + "a" * 100_000 + "'\n[data]\nsource = 'x'\n",
    "a date for a number": "[prune]\nsparsity = 2020-01-01\n",
}
OVERRIDES: dict[str, str] = {
    "sparsity is NaN": "prune.sparsity=nan",
    "sparsity is infinite": "prune.sparsity=inf",
    "sparsity below 0": "prune.sparsity=-0.1",
    "sparsity above 1": "prune.sparsity=1e308",
    "sparsity of 0": "prune.sparsity=0",
    "an unknown method": "prune.method=__import__('os')",
    "an unknown allocation": "prune.allocation=../../etc/passwd",
    "an unknown pattern": "prune.pattern=9:8",
    "no scouts": "search.scouts=0",
    "scouts beyond belief": "search.scouts=1e99",
    "an unknown sampler": "search.sampler=;ls",
    "a storage that is no URL": "search.storage=no",
    "a storage with no driver": "search.storage=nosuch://host/db",
    "a model that is not there": "model.source={}/none",
    "a model that is a device": "model.source=/dev/zero",
    "a model that is a command": "model.source=$(touch {}/canary)",
    "a model on another scheme": "model.source=ftp://host/model",
    "a model of the hub that climbs": "model.source=../../../etc",
    "a revision with a terminal's codes": "model.source=org/model@\x1b[2J",
    "data that is not there": "data.source={}/none.txt",
    "data that is a device": "data.source=/dev/null",
    "an address that is none": "cluster.address=http://",
    "an address of Ray Client": "cluster.address=ray://127.0.0.1:1",
    "a negative timeout": "cluster.trial_timeout_s=-1",
    "a run in a file": "run.dir={}/text.txt",
    "a run below a file": "run.dir={}/text.txt/run",
    "a run in the model": "run.dir={}/model",
    "a run whose name is too long": "run.dir={}/" + "a" * 300,
    "a run with a NUL": "run.dir={}/a\x00b",
    "an override of nothing": "prune.nothing=1",
    "an override of an attribute": "prune.__class__=1",
    "an override of a section": "prune=1",
}
CELL = '[[cells]]\nspec = "tiny.toml"\n'
STUDIES: dict[str, Case] = {
    "an empty study": _study(""),
    "noise for a study": _study(NOISE),
    "a deep study": _study(f"cells = {DEEP}"),
    "a study whose cells are a number": _study("cells = 1"),
    "a study that names itself": _study(CELL.replace("tiny", "study")),
    "a study of a spec with a NUL": _study(CELL.replace("tiny", "a\\u0000")),
    "a study of a device": _study(CELL.replace("tiny.toml", "/dev/null")),
    "a study in a folder with a NUL": _study(CELL, "study.dir={}/a\x00b"),
    "a study in a file": _study(CELL, "study.dir={}/text.txt"),
    "an infinite priority": _study(CELL + "priority = inf\n"),
    "a priority that is NaN": _study(CELL + "priority = nan\n"),
    "an infinite budget": _study(CELL, "budget.gpu_hours=inf"),
    "hours that are NaN": _study(CELL, "budget.hours=nan"),
    "a group whose name climbs": _study(CELL + 'name = "../x"\n'),
    "an override of a value in it": _study(CELL + 'overrides = {"prune.method.a" = 1}\n'),
    "a study of no model": _study(CELL + 'models = ["/none"]\n'),
    "an infinite beta": _study(CELL + 'overrides = {"prune.beta" = inf}\n'),
    "noise for study.json": _reported_study("noise"),
    "half of study.json": _reported_study('{"dir": "x", "groups": ['),
    "a study.json of no groups": _reported_study('{"dir": "x"}'),
}
RUN_FILES = ("run.json", "spec.toml", "model.json", "waves/0001.json", "trials/00003.json")
RUN_TEXTS: dict[str, bytes | str] = {
    "emptied": b"",
    "noise": NOISE,
    "deep": DEEP,
    "a list": "[]",
    "null": "null",
}
WEIGHTS: dict[str, bytes] = {
    "empty weights": b"",
    "noise for weights": NOISE,
    "a pickle for weights": b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
    "a header without end": _header("{", 1 << 62),
    "a negative header": b"\xff" * 8 + b"{}",
    "a header that is a list": _header("[]"),
    "a deep header": _header(DEEP),
    "a header that is no text": _header(NOISE),
    "offsets beyond the file": _header(
        '{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}'
    ),
    "offsets below zero": _header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}'),
    "a size that overflows": _header(
        '{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 0]}}'
    ),
}
CONFIGS: dict[str, bytes | str] = {
    "an empty configuration": "",
    "noise for a configuration": NOISE,
    "a list for a configuration": "[]",
    "a deep configuration": DEEP,
    "an empty object": "{}",
    "an unknown model type": '{"model_type": "nosuch"}',
    "a model type with a path": '{"model_type": "../../x"}',
}
INDEX = "model/model.safetensors.index.json"
CONFIG = "model/config.json"
CASES: dict[str, Case] = {
    **{name: _content("tiny.toml", text) for name, text in SPEC_TEXTS.items()},
    **{name: _given(override) for name, override in OVERRIDES.items()},
    **STUDIES,
    **{
        f"{file} {name}": _content(f"run/{file}", text, "report")
        for file in RUN_FILES
        if "waves" not in file  # which a report does not read
        for name, text in RUN_TEXTS.items()
    },
    **{
        f"{file} {name}, resumed": _content(f"run/{file}", text, "resume")
        for file in RUN_FILES
        if file != "spec.toml"  # it is written anew
        for name, text in RUN_TEXTS.items()
    },
    "a run of a later version": _json("run/run.json", "report", version=2),
    "a run of a version in words": _json("run/run.json", "resume", version="1\n2"),
    "a run without a version": _json("run/run.json", "report", version=None),
    "a run of another spec": _json("run/run.json", "resume", identity={}),
    "a trial of another number": _json("run/trials/00003.json", "report", losses=["x"]),
    "a trial of NaN": _content("run/trials/00003.json", '{"losses": [NaN]}', "report"),
    "a trial that is a device": _link("run/trials/00003.json", "/dev/null", "report"),
    "a trial that points to itself": _link("run/trials/00003.json", "00003.json", "report"),
    **{name: _content("model/model.safetensors", data) for name, data in WEIGHTS.items()},
    **{
        f"{name}, evaluated": _content("model/model.safetensors", data, "evaluate")
        for name, data in WEIGHTS.items()
    },
    **{name: _content(CONFIG, text) for name, text in CONFIGS.items()},
    "blocks without number": _json(CONFIG, num_hidden_layers="many"),
    "blocks below zero": _json(CONFIG, num_hidden_layers=-1),
    "no heads": _json(CONFIG, num_attention_heads=0),
    "another width": _json(CONFIG, hidden_size=48),
    "code of its own": _remote,
    "a tokenizer of its own": _remote_tokenizer,
    "noise for a tokenizer": _content("model/tokenizer.json", NOISE),
    "an empty tokenizer": _content("model/tokenizer.json", "{}"),
    "a pickle in place of the weights": _pickled("pytorch_model.bin"),
    "a pickle of another name": _pickled("model.pt"),
    "an index that climbs": _content(INDEX, '{"weight_map": {"a": "../../x.safetensors"}}'),
    "an index of nothing": _content(INDEX, '{"weight_map": {}}'),
    "an index that is a list": _content(INDEX, "[]"),
    "an index of a file that is not there": _content(
        INDEX, '{"weight_map": {"a": "b.safetensors"}}'
    ),
    "a data set with a script": _script,
    "a pickle for data": _data("data.pkl", ""),
    "a pickle called parquet": _data("data.parquet", ""),
    "a pickle called arrow": _data("data.arrow", ""),
    "a pickle called text": _data("data.txt", ""),
    "empty text": _data("none.txt", b"\n"),
    "noise for text": _data("noise.txt", NOISE),
    "noise for parquet": _data("noise.parquet", b"PAR1" + NOISE + b"PAR1"),
    "noise called gzip": _data("noise.jsonl.gz", b"\x1f\x8b" + NOISE),
    "lines that are no JSON": _data("data.jsonl", "{]\n"),
    "lines without the column": _data("data.jsonl", '{"other": "x"}\n' * 9),
    "lines that are deep": _data("data.jsonl", DEEP + "\n"),
    "a column of numbers": _data("data.jsonl", '{"text": 7}\n' * 9),
    "text too short": _data("short.txt", "a\n\nb\n\nc\n\nd\n"),
    "a spec that is a device": lambda sandbox: ["search", "/dev/null"],
    "a spec that is a folder": lambda sandbox: ["search", str(sandbox)],
    "a report of a checkpoint": lambda sandbox: ["report", str(sandbox / "model")],
    "a report of nothing": lambda sandbox: ["report", str(sandbox / "none")],
    **{f"packed: {name}": _packed(change) for name, change in MANIFESTS.items()},
}
