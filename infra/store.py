"""The run directory: the only truth about a search, safe against kill -9 at any moment.

    with RunStore.open(spec) as store:  # creates or resumes spec.run.dir, and locks it
        store.write_result(result)

    runs/quickstart/  run.json spec.toml lock model.json events.jsonl report.json report.html
                      waves/0000.json trials/00003.json best/

A file appears whole or not at all; a wave is written before its first trial starts.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tomllib
import uuid
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import TypeAdapter, ValidationError

from infra.errors import UserError
from infra.provenance import provenance
from infra.records import ModelRecord, TrialResult, TrialSpec
from infra.spec_files import changed_keys, parse_spec, toml_value, with_defaults
from infra.specs import Spec

VERSION = 1
TEMP_PREFIX = ".tmp-"  # whatever begins so, file or folder, is removed when a run is opened
_WAVE = TypeAdapter(list[TrialSpec])
_RESULT, _MODEL = TypeAdapter(TrialResult), TypeAdapter(ModelRecord)
_EVENTS, _REPORT = TypeAdapter(list[dict[str, Any]]), TypeAdapter(dict[str, Any])
_T = TypeVar("_T")


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that is either absent, as it was, or whole, and stays so after a power cut."""
    temp = path.parent / f"{TEMP_PREFIX}{path.name}-{os.getpid()}"
    with _writing(path):
        try:
            with temp.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temp.replace(path)
            _fsync(path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                temp.unlink()
            raise


class RunStore:
    """A run directory, opened for writing by `open` or for reading by `read`."""

    def __init__(
        self, directory: Path, spec: Spec, header: dict[str, Any], lock: int, holder: bytes = b""
    ) -> None:
        self.dir = directory
        self.spec = spec
        self.id: str = header["id"]
        self.command: str = header["identity"]["command"]
        self.provenance: dict[str, str] = header["provenance"]
        self._lock, self._holder = lock, holder

    @classmethod
    def open(cls, spec: Spec, command: str = "search") -> RunStore:
        """Create or resume the run of a command that `spec.run.dir` names.

        Raises UserError if another process has it open, it belongs to another spec or version, or
        it cannot be written.
        """
        directory = Path(spec.run.dir)
        header: dict[str, Any] = {"version": VERSION, "id": uuid.uuid4().hex}
        with _writing(directory):
            if directory.exists() and not (directory / "run.json").exists():
                _refuse_foreign(directory)
            for folder in ("waves", "trials"):
                (directory / folder).mkdir(parents=True, exist_ok=True)
        lock, holder = _acquire(directory)
        try:
            identity = json.loads(json.dumps(spec.identity() | {"command": command}))
            if resumed := (directory / "run.json").exists():
                header = _read_header(directory)
                begun = any((directory / "waves").glob("*.json"))
                if not begun:  # nothing was tried yet, so the spec may still change
                    (directory / "model.json").unlink(missing_ok=True)
                elif (other := header["identity"].get("command", command)) != command:
                    raise UserError(f"{directory} is a run of `{other}`: choose another run.dir")
                elif changes := changed_keys(with_defaults(header["identity"]), identity):
                    raise UserError(
                        f"{directory} belongs to another spec, {', '.join(changes)}: undo the "
                        "change or choose another run.dir"
                    )
            header |= {
                "digest": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
                "identity": identity,
                "provenance": dict(provenance()),
            }
            with _writing(directory):
                _repair(directory)
            write_atomic(directory / "spec.toml", _toml(spec).encode())
            write_atomic(directory / "run.json", json.dumps(header, indent=1).encode())
        except BaseException:
            os.close(lock)
            raise
        store = cls(directory, spec, header, lock, holder)
        store.event("resumed" if resumed else "created", pid=os.getpid(), **store.provenance)
        return store

    @classmethod
    def read(cls, directory: str | Path) -> RunStore:
        """Look at a run, whether or not it is going on."""
        directory, path = Path(directory), Path(directory, "spec.toml")
        header = _read_header(directory)
        try:
            spec = parse_spec(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
        except (OSError, ValueError, RecursionError) as error:  # not TOML, or not UTF-8
            raise UserError(f"{path} cannot be read: {error}") from error
        return cls(directory, spec, header, -1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the lock; so does the death of the process."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def path(self, name: str) -> Path:
        """Where a file of the run stands, say `report.html`."""
        return self.dir / name

    def check_owner(self) -> None:
        """Raise UserError where another driver has the run, as when its lock was deleted."""
        if self._lock < 0:
            raise RuntimeError(f"{self.dir} was opened for reading")
        with _writing(path := self.dir / "lock"):
            if (holder := path.read_bytes() if path.exists() else b"") != self._holder:
                raise UserError(f"{self.dir} was taken over by {_describe(holder.decode())}")

    def waves(self) -> list[list[TrialSpec]]:
        """What was proposed, in order."""
        paths = self._numbered("waves")
        if paths and int(paths[-1].stem) >= len(paths):  # the next one would take its number
            raise UserError(f"{self.dir}/waves has a gap: restore what is missing, or delete all")
        return [self.parse(f"waves/{path.name}", _WAVE) for path in paths]

    def write_wave(self, index: int, specs: Sequence[TrialSpec]) -> None:
        """Write down a wave's candidates; do so before its first trial starts."""
        self._write(f"waves/{index:04d}.json", _WAVE.dump_json(list(specs), indent=1))

    def numbers(self) -> list[int]:
        """The finished trials, without reading them."""
        return [int(path.stem) for path in self._numbered("trials")]

    def result(self, number: int) -> TrialResult:
        """One finished trial."""
        return self.parse(f"trials/{number:05d}.json", _RESULT)

    def results(self) -> dict[int, TrialResult]:
        """All finished trials, failed ones included, in number order."""
        return {number: self.result(number) for number in self.numbers()}

    def write_result(self, result: TrialResult) -> None:
        """From here on the trial is finished and is never run again."""
        data = result.model_dump_json(indent=1).encode()
        self._write(f"trials/{result.spec.number:05d}.json", data)

    def model(self) -> ModelRecord | None:
        """What the model is made of, once that was found out."""
        return self.parse("model.json", _MODEL) if self.path("model.json").exists() else None

    def write_model(self, model: ModelRecord) -> None:
        """Write down what the model is made of."""
        self._write("model.json", model.model_dump_json(indent=1).encode())

    def event(self, kind: str, **fields: Any) -> None:
        """Append a line to events.jsonl."""
        self.check_owner()
        path = self.dir / "events.jsonl"
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind}
        with _writing(path), path.open("ab", buffering=0) as file:
            data = json.dumps(line | fields).encode() + b"\n"
            if (file.write(data) or 0) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def events(self) -> list[dict[str, Any]]:
        """All events but one that is being written; none where a start was killed before it."""
        if not self.path("events.jsonl").exists():
            return []
        return self.parse("events.jsonl", _EVENTS, _whole_lines)

    def report(self) -> dict[str, Any] | None:
        """What report.json holds, once it is written."""
        return self.parse("report.json", _REPORT) if self.path("report.json").exists() else None

    def _write(self, name: str, data: bytes) -> None:
        self.check_owner()
        write_atomic(self.dir / name, data)

    def _numbered(self, folder: str) -> list[Path]:
        paths = (self.dir / folder).glob("*.json")
        return sorted((p for p in paths if p.stem.isdecimal()), key=lambda path: int(path.stem))

    def parse(
        self, name: str, adapter: TypeAdapter[_T], edit: Callable[[bytes], bytes] = bytes
    ) -> _T:
        """What a file of the run holds; raises UserError where it is damaged."""
        path = self.dir / name
        try:
            return adapter.validate_json(edit(path.read_bytes()))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise UserError(
                f"{path} is damaged ({error.errors()[0]['msg']}): restore it, or delete it and "
                "start again to repeat its work"
            ) from None


def _whole_lines(data: bytes) -> bytes:
    return b"[%s]" % data.rpartition(b"\n")[0].replace(b"\n", b",")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; finished trials are kept, start again once "
            "it can be written"
        ) from error


def _fsync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse_foreign(directory: Path) -> None:
    """A folder without run.json is ours only if it holds no more than a start that was killed."""
    ours = {"lock", "spec.toml", "waves", "trials"}
    try:
        names = {path.name for path in directory.iterdir()}
    except OSError as error:
        raise UserError(f"run.dir={directory} cannot be read: {error.strerror}") from error
    if foreign := sorted(n for n in names - ours if not n.startswith(TEMP_PREFIX)):
        raise UserError(
            f"{directory} is no run directory but holds {foreign[0]!r}: choose another run.dir"
        )


def _acquire(directory: Path) -> tuple[int, bytes]:
    """Lock the run until this process ends, however it ends; also, what the lock then says."""
    path = directory / "lock"
    with _writing(path):
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = path.read_text(encoding="utf-8")
            os.close(lock)
            raise UserError(f"{directory} is in use by {_describe(holder)}") from None
        except OSError:
            os.close(lock)
            raise
        start = datetime.now(UTC).isoformat(timespec="microseconds")
        fields = {"host": socket.gethostname(), "pid": os.getpid(), "start": start}
        os.ftruncate(lock, 0)
        os.write(lock, mark := json.dumps(fields).encode())
    return lock, mark


def _describe(holder: str) -> str:
    try:
        fields = json.loads(holder)
        age = datetime.now(UTC) - datetime.fromisoformat(fields["start"])
    except (ValueError, KeyError, TypeError):  # read in the moment before it was written
        return "another process that has just started: wait for it, or stop it"
    return (
        f"pid {fields['pid']} on {fields['host']}, started "
        f"{str(age).partition('.')[0]} (h:mm:ss) ago: wait for it, or stop it"
    )


def _read_header(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    try:
        header = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        above = directory.parent
        hint = f": give {above}" if (above / "run.json").is_file() else ": it holds no run.json"
        raise UserError(f"{directory} is not a run directory{hint}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): choose another run.dir") from error
    version = header.get("version") if isinstance(header, dict) else None
    if version != VERSION:
        raise UserError(
            f"{directory} was written in version {version} of the run format and this program "
            f"reads version {VERSION}: use the program that wrote it, or another run.dir"
        )
    kinds = {"id": str, "identity": dict, "provenance": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(header.get(key), kind)]:
        raise UserError(f"{path} is damaged (no {wrong[0]!r}): choose another run.dir")
    return dict(header)


def _repair(directory: Path) -> None:
    """Remove what a killed writer left: temporary files, and the torn last line of events."""
    for folder in (directory, *(directory / name for name in ("waves", "trials", "best"))):
        for left in folder.glob(f"{TEMP_PREFIX}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    events = directory / "events.jsonl"
    if events.exists():
        os.truncate(events, events.read_bytes().rfind(b"\n") + 1)


def _toml(spec: Spec) -> str:
    """The full spec as TOML: sections of strings, numbers, booleans, lists and inline tables."""
    lines = []
    for section, values in spec.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        # JSON writes these values as TOML does, but for DEL
        lines += [
            f"{key} = {toml_value(value)}".replace("\x7f", "\\u007f")
            for key, value in values.items()
        ]
        lines.append("")
    return "\n".join(lines)
