"""What a search shows while it runs: a live board on a terminal, else one JSON line per event.

    with live(spec, total=8_000_000) as view:
        view.event({"kind": "wave", "number": 0, "rung": 0, "candidates": ["beta 0"]})
        view.event(trial_event(result))

Events are the dictionaries that go to events.jsonl. Kinds: started, model, wave, trial, climb,
final, checkpoint (it is made again), report, finished, stopped, and storage (Optuna's cannot be
written, or can again); recovery, how far a fine-tune is, is shown only. `total` counts token
passes, the unit in which work is known beforehand; any event may correct it with `planned`, and one
of a resumed run says with `done` how many earlier drivers have behind them.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from infra.records import TrialResult
from infra.specs import Spec

Event = dict[str, Any]


class View(Protocol):
    """Where a search tells what happens."""

    def event(self, event: Event) -> None:
        """Show one event; see the top of this file for the kinds."""


@contextmanager
def live(
    spec: Spec, total: int, *, as_json: bool = False, console: Console | None = None
) -> Iterator[View]:
    """A view for the duration of a search: the board on a terminal, JSON lines otherwise."""
    console = console or Console(highlight=False)
    if as_json or not console.is_terminal:
        yield _Lines(console)
        return
    board = Board(spec, total, console)
    with Live(console=console, get_renderable=board.render, refresh_per_second=2):
        yield board


def trial_event(result: TrialResult) -> Event:
    """The event of a trial that has ended, whichever way."""
    complete = result.state == "complete"
    return {
        "kind": "trial",
        "number": result.spec.number,
        "stage": result.spec.stage,
        "rung": result.spec.rung,
        "beta": result.beta,
        "label": result.spec.prune.label,
        "tilt": result.tilt,
        "state": result.state,
        "cause": result.cause,
        "loss": result.loss if complete else None,
        "scores": {name: sum(each) / len(each) for name, each in result.scores.items()},
        "seconds": result.cost.total_s,
        "token_passes": result.cost.token_passes,
        "host": result.host,
    }


def duration(seconds: float) -> str:
    """8.4 s, 3 min 05 s or 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def steps_in_words(facts: Event) -> str:
    """step 37 of 200, loss 3.21, about 4 min 05 s left; what a fine-tune told, see recovery."""
    step, steps, loss = facts["step"], facts["steps"], facts["loss"]
    text = f"step {step} of {steps}" + ("" if loss is None else f", loss {loss:.2f}")
    if step == steps:
        return f"{text}, is measured and saved"
    if done := step - facts["begun"]:
        text += f", about {_rough((steps - step) * facts['seconds'] / done)} left"
    return text


class _Lines:
    def __init__(self, console: Console) -> None:
        self.file = console.file

    def event(self, event: Event) -> None:
        """One JSON object on one line, at once; what an earlier call told is not told again, and
        of a fine-tune every tenth of its steps."""
        if not event.get("earlier") and event.get("tenth", True):
            line = json.dumps({key: event[key] for key in event if key != "tenth"})
            self.file.write(f"{line}\n")  # in one piece: two threads may tell
            self.file.flush()


class Board:
    """Stage, progress, best so far and time; finished trials scroll by above it."""

    def __init__(
        self,
        spec: Spec,
        total: int,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec, self.total, self.console, self.clock = spec, total, console, clock
        self.start = self.measured = clock()
        self.stage = "starting"
        self.earlier = self.done = self.trials = self.failed = 0
        self.found: dict[int, dict[str, Event]] = {}
        self.tuned: dict[int, Event] = {}  # how far the fine-tune of a trial is
        self.ended: set[int] = set()

    def event(self, event: Event) -> None:
        """Take the event in; the board is drawn from it twice a second."""
        self.total = event.get("planned", self.total)
        if "done" in event:
            self.earlier = event["done"]
        if event["kind"] == "trial":
            self._trial(event)
        elif event["kind"] == "recovery":
            self.tuned[event["trial"]] = event
        elif event["kind"] == "storage":
            text = event["problem"] or "the Optuna storage can be written again"
            self.console.print(Text(f"{text} ({event['untold']} trials untold)", style="yellow"))
        else:
            self.stage = _stage(event)

    def _trial(self, event: Event) -> None:
        self.trials += 1
        self.failed += event["state"] == "failed"
        self.ended.add(event["number"])
        if event["stage"] == "search" and event["state"] == "complete":
            self.found.setdefault(event["rung"], {})[event["label"]] = event
        if event.get("earlier"):
            return
        self.done += event["token_passes"]
        self.measured = self.clock()
        line = f"trial {event['number']:>3}  {event['stage']:<6}  rung {event['rung']}"
        line += f"  {event['label']:<13}  tilt {event['tilt']:>5.2f}  "
        if event["state"] == "failed":
            self.console.print(Text(f"{line}failed: {event['cause']}", style="red"))
            return
        self.console.print(Text(f"{line}{self._value(event)}  {duration(event['seconds'])}"))

    def time_left(self) -> float | None:
        """Seconds that the planned token passes still take at this session's rate."""
        if not self.done:
            return None
        planned = max(self.total - self.earlier - self.done, 0)
        pace = (self.measured - self.start) / self.done
        return max(planned * pace - (self.clock() - self.measured), 0.0)

    def best(self) -> str:
        """The best of what is searched on the highest rung, beside uniform's there."""
        if not self.found:
            return "none yet"
        rung = max(self.found)
        name = self.spec.search.objective
        sign = 1 if name == "loss" else -1
        best = min(
            self.found[rung].values(), key=lambda e: (sign * _measured(e, name), e["number"])
        )
        text = f"{best['label']} (tilt {best['tilt']:.2f}), {self._value(best)}"
        uniform = self.found[rung].get("beta 0")
        if uniform is not None and uniform is not best:
            text += f", uniform {self._value(uniform).removeprefix(f'{name} ')}"
        split = "report split: paper protocol" if self.paper else "selection split"
        return f"{text}; rung {rung}, {split}"

    def _value(self, event: Event) -> str:
        """What is searched, of a trial: `loss 4.5000` or `top1 74.10 %`."""
        name = self.spec.search.objective
        value = _measured(event, name)
        return f"loss {value:.4f}" if name == "loss" else f"{name} {100 * value:.2f} %"

    @property
    def paper(self) -> bool:
        """Whether what is searched is measured on the split that is also reported on."""
        return self.spec.search.protocol == "paper"

    def render(self) -> Table:
        """The board as it stands now."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim")
        grid.add_column()
        passed = self.earlier + self.done
        share = min(passed / self.total, 1.0) if self.total else 0.0
        bar = Table.grid(padding=(0, 2))
        failed = f", {self.failed} failed" if self.failed else ""
        bar.add_row(
            ProgressBar(total=1.0, completed=share, width=36),
            f"{share:.0%}",
            f"{self.trials} trial{'' if self.trials == 1 else 's'}{failed}",
        )
        left = self.time_left()
        times = duration(self.clock() - self.start)
        if self.stage not in ("finished", "stopped"):
            times += ", time left not known yet" if left is None else f", about {_rough(left)} left"
            if left is not None and self.spec.evaluation.tasks:  # they are no token passes
                times += ", without lm-eval's tasks"
        grid.add_row("model", Text(f"{self.spec.model.source}, {self.spec.prune.goal}"))
        grid.add_row("stage", Text(self.stage, style="bold"))
        for number, event in sorted(self.tuned.items()):
            if number not in self.ended:
                grid.add_row("fine-tune", f"trial {number}, {steps_in_words(event)}")
        grid.add_row("progress", bar)
        grid.add_row("best", self.best())
        grid.add_row("time", times)
        return grid


def _measured(event: Event, name: str) -> float:
    return float(event["loss"] if name == "loss" else event["scores"][name])


def _rough(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 60 else duration(seconds)


def _stage(event: Event) -> str:
    match event["kind"]:
        case "started":
            return "resuming" if event.get("done") else "starting"
        case "model":
            return "reading the model"
        case "wave":
            return f"rung {event.get('rung', 0)}: {len(event.get('candidates', []))} candidates"
        case "climb":
            return f"climbing to rung {event.get('rung', '?')}"
        case "final":
            return "final comparison on the report split"
        case "checkpoint":
            return "making the checkpoint again"
        case "speed":
            return "timing the engines"
        case "report":
            return "writing the report"
        case kind:
            return str(kind)
