"""Trial functions without a model, run in Ray workers; `model.source` says what a trial does."""

import os
import time
from pathlib import Path

from infra.errors import UserError
from infra.progress import tell
from infra.records import Cost, TrialResult, TrialSpec
from infra.specs import CalibrationSpec, DataSpec, ModelSpec, PruneSpec

loaded: list[int] = []  # what a worker keeps between its trials


class OutOfMemoryError(RuntimeError):
    """What torch calls it, in a test without a GPU."""


def act(spec: TrialSpec, *, batch_divisor: int = 1) -> TrialResult:
    """Do what `model.source` says, `WORD[:ARGUMENT]`, and answer with pid and trials so far."""
    word, _, argument = spec.model.source.partition(":")
    loaded.append(spec.number)
    match word:
        case "meet":  # until another trial stands here at the same time
            Path(argument, str(spec.number)).touch()
            tell(always=True, trial=spec.number)
            deadline = time.monotonic() + 20
            while len(list(Path(argument).iterdir())) < 2:
                assert time.monotonic() < deadline, "nobody came"
                time.sleep(0.05)
        case "sleep":
            time.sleep(float(argument))
        case "pid":  # write it down and, the first time, wait to be killed
            first = not Path(argument).exists()
            Path(argument).write_text(str(os.getpid()))
            if first:
                time.sleep(60)
        case "exit":
            os._exit(1)
        case "raise":
            raise ValueError("no such layer\nsecond line")
        case "cuda" if batch_divisor < int(argument):
            raise OutOfMemoryError("CUDA out of memory")
        case "broken":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return TrialResult(
        spec=spec,
        state="complete",
        losses=[float(batch_divisor)],
        tokens=[1],
        cost=Cost(peak_memory_bytes=len(loaded)),
        device=str(os.getpid()),
    )


def trial(number: int, what: str) -> TrialSpec:
    """A trial that says in `model.source` what it does."""
    return TrialSpec(
        number=number,
        stage="search",
        model=ModelSpec(source=what),
        data=DataSpec(source="text.txt"),
        calibration=CalibrationSpec(),
        prune=PruneSpec(),
        split="selection",
        windows=2,
        context=512,
    )


def refuse(what: str) -> None:
    """As a function that finds something wrong with what the user asked for."""
    raise UserError(f"{what} is missing")


def measure(what: str, *, batch_divisor: int = 1) -> int:
    """As a function of the model that fails like a trial; see `act`."""
    word, _, argument = what.partition(":")
    match word:
        case "raise":
            raise RuntimeError("the dense model overflows\nsecond line")
        case "cuda" if batch_divisor < int(argument):
            raise OutOfMemoryError("CUDA out of memory")
        case "exit":
            os._exit(1)
    return batch_divisor


def environment(name: str) -> str | None:
    """A variable as a worker sees it."""
    return os.environ.get(name)
