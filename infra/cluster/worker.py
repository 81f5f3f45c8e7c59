"""What happens in a worker process: the trial boundary, where an exception becomes a result.

    kind, result = Worker(threads=2).trial(run_trial, spec, batch_divisor=1, node="")

Ray is not imported here.
"""

import gc
import os
import shutil
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from infra import environment
from infra.errors import UserError, first_line
from infra.records import TrialResult, TrialSpec

CHUNK_BYTES = 8 * 2**20

T = TypeVar("T")

# How a trial ended; "broken": the process's CUDA context is lost, no later trial can succeed.
Kind = Literal["done", "cuda-out-of-memory", "broken"]


class TrialFunction(Protocol):
    """What runs a trial in a worker; importable there by its name."""

    def __call__(self, spec: TrialSpec, *, batch_divisor: int = 1) -> TrialResult: ...


class Worker:
    """A process that runs one trial after another and stays warm between them."""

    def __init__(self, threads: int) -> None:
        environment.prepare()
        environment.reuse_freed_memory()
        os.environ["OMP_NUM_THREADS"] = str(threads)  # torch reads it when it is imported

    def trial(
        self, function: TrialFunction, spec: TrialSpec, batch_divisor: int, node: str
    ) -> tuple[Kind, TrialResult]:
        """Run a trial; whatever it raises is a failed result, and the process goes on."""
        kind: Kind = "done"
        try:
            result = function(spec, batch_divisor=batch_divisor)
        except Exception as error:  # noqa: BLE001  the one place where a trial's error ends
            kind = _kind(error)
            result = failed(spec, describe_error(error))
        if result.state == "failed":
            _release_memory(kind)
        return kind, result.model_copy(update={"node": node, "host": socket.gethostname()})

    def call(
        self, function: Callable[..., T], args: tuple[object, ...], options: dict[str, int]
    ) -> tuple[Kind, T | None, str]:
        """Run any function with what a trial has: how it ended, its answer, why there is none.

        A UserError is raised.
        """
        try:
            return "done", function(*args, **options), ""
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001  as of a trial
            kind, cause = _kind(error), describe_error(error)
        _release_memory(kind)
        return kind, None, cause


def failed(spec: TrialSpec, cause: str) -> TrialResult:
    """The result of a trial that gave none."""
    return TrialResult(spec=spec, state="failed", cause=cause)


def describe_error(error: BaseException) -> str:
    """What a UserError says; of others `TypeName: first line (file:line)`, where it was raised."""
    if isinstance(error, UserError):
        return str(error)
    name, said = type(error).__name__, first_line(error)
    text = name if said == name else f"{name}: {said}"
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return text
    file = Path(frames[-1].filename)
    if file.is_relative_to(environment.CHECKOUT):
        file = file.relative_to(environment.CHECKOUT)
    return f"{text} ({'/'.join(file.parts[-3:])}:{frames[-1].lineno})"


def read_chunk(path: str, offset: int) -> bytes:
    """A piece of a file on this node; empty at its end."""
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(CHUNK_BYTES)


def remove_folder(path: str) -> None:
    """Remove a checkpoint that was fetched."""
    shutil.rmtree(path, ignore_errors=True)


def _kind(error: Exception) -> Kind:
    """torch is not imported to know its errors: a trial that raised them has done so."""
    name = type(error).__name__
    if name == "OutOfMemoryError":
        return "cuda-out-of-memory"
    return "broken" if name == "AcceleratorError" or "CUDA error" in str(error) else "done"


def _release_memory(kind: Kind) -> None:
    """What the failed trial's frames held, so that the next trial finds the memory free."""
    gc.collect()
    torch = sys.modules.get("torch")
    if kind != "broken" and torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
