"""What a fine-tune did to uniform and best: both before and after, on the same windows.

    recovery = recovery_of(uniform, best, objective="loss", unit="token")
    recovery["best"]["after"]["perplexity"]     # {"mean": 95.2, "stderr": 8.1, "n": 16, ...}

It is done for one calibration seed, so that nothing here says anything about others.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.live import duration
from flows.measures import gain_in, headline, in_words, metrics_of, sampled
from infra.errors import UserError
from infra.records import TrialResult
from tasks.statistics import label, plus_minus

FILE = "recovery.json"  # of a run of `sparseramp recover`
NAMES = {"lora": "LoRA", "full": "full fine-tuning"}


def recovery_of(
    uniform: Sequence[TrialResult], best: Sequence[TrialResult], *, objective: str, unit: str
) -> dict[str, Any] | None:
    """Both sides of the first calibration seed that was fine-tuned; None without any."""
    pairs = [(u, b) for u, b in zip(uniform, best, strict=True) if u.recovery and b.recovery]
    if not pairs:
        return None
    equal, other = pairs[0]
    sides = {"uniform": equal, "best": other}
    found = {name: side_of(result, objective, unit) for name, result in sides.items()}
    gain = gain_in(objective, [equal.recovered()], [other.recovered()])
    recovery: dict[str, Any] = {
        **{key: found["best"][key] for key in ("method", "steps", "tokens", "headline", "of")},
        "seed": other.spec.calibration.seed,
        "saved": any(result.spec.checkpoint for result in (equal, other)),
        **found,
        "gain": {
            **{key: getattr(gain, key) for key in ("mean", "stderr", "low", "high")},
            "n": gain.n_windows,
            "unit": found["best"]["gained"]["unit"],
        },
    }
    return recovery | {"conclusion": _conclusion(recovery, other.spec.prune.is_uniform)}


def side_of(result: TrialResult, objective: str, unit: str) -> dict[str, Any]:
    """One model before and after; `gained` is the paired difference, positive is better."""
    record = result.recovery
    assert record is not None
    after = result.recovered()
    gained = gain_in(objective, [result], [after])
    metrics = metrics_of([result], unit)
    return {
        **record.model_dump(),
        "headline": headline(list(metrics), objective),
        "of": sampled(objective, unit),
        "before": metrics,
        "after": metrics_of([after], unit),
        "gained": {
            **{key: getattr(gained, key) for key in ("mean", "stderr", "low", "high")},
            "n": gained.n_windows,
            "unit": f"nats/{unit}" if objective == "loss" else f"points of {objective}",
        },
    }


def told(side: dict[str, Any]) -> str:
    """Perplexity from 370 to 95.2."""
    name = side["headline"]
    before, after = (in_words(side[when][name]) for when in ("before", "after"))
    return f"{label(name, side['after'][name]).removesuffix(', %')} from {before} to {after}"


def effort(side: dict[str, Any]) -> str:
    """200 steps of LoRA on 819,200 tokens."""
    what = "tokens" if side["of"] == "windows" or side["of"] == "rows" else side["of"]
    return f"{side['steps']} steps of {NAMES[side['method']]} on {side['tokens']:,} {what}"


def conclusion(side: dict[str, Any]) -> str:
    """200 steps of LoRA on 819,200 tokens take perplexity from 370 to 95.2; all zeros stayed."""
    return f"{effort(side)} take {told(side)}{_worse(side)}{_kept(side)}."


def kept_recovery(run: Path) -> dict[str, Any]:
    """What recovery.json of a run holds; raises UserError where there is none yet."""
    if not (run / FILE).exists():
        raise UserError(
            f"{run} has not ended: `sparseramp status {run}` says how far it is; the command that "
            "started it goes on"
        )
    try:
        found: dict[str, Any] = json.loads((run / FILE).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run / FILE} cannot be read: give the command that started the run once more"
        ) from error


def print_recovery(answer: dict[str, Any]) -> None:
    """The table and the conclusion of a run of `recover`, and where to look next."""
    print_sides({"checkpoint": answer})
    print(conclusion(answer))
    print(f"numbers     {Path(answer['run'], FILE)}")
    print(f"checkpoint  {Path(answer['run'], 'best')}")
    print(f"this table  sparseramp report {answer['run']}")


def _kept(side: dict[str, Any]) -> str:
    """That no zero was lost, else the fine-tune had ended with an error; "" where there are none,
    as in a model that is smaller instead."""
    return f"; all {side['zeros_after']:,} zeros stayed" if side["zeros_after"] else ""


def _worse(side: dict[str, Any]) -> str:
    """By how much the fine-tune has made the model worse; "" where it has not."""
    gained = side["gained"]
    if gained["mean"] >= 0:
        return ""
    chance = ", which may be chance" if gained["high"] > 0 else ""
    size = plus_minus(-gained["mean"], gained["stderr"])
    return f", worse than before by {size} {gained['unit']}{chance}"


def _conclusion(recovery: dict[str, Any], is_uniform: bool) -> str:
    best, uniform, gain = recovery["best"], recovery["uniform"], recovery["gain"]
    if is_uniform:
        return conclusion(best)
    equal = told(uniform).partition(" from ")[2]
    text = (
        f"{effort(best)} take {told(best)} (best){_worse(best)} and from {equal} "
        f"(uniform){_worse(uniform)}{_kept(best)}. "
    )
    interval = f"95 % interval {gain['low']:.3f} to {gain['high']:.3f}, one calibration seed"
    if gain["low"] > 0:
        return f"{text}Of the gain {gain['mean']:.3f} {gain['unit']} is left ({interval})."
    if gain["high"] < 0:
        return f"{text}Uniform is then ahead by {-gain['mean']:.3f} {gain['unit']} ({interval})."
    return (
        f"{text}The difference of {gain['mean']:.3f} {gain['unit']} that is left may be chance "
        f"({interval})."
    )


def print_sides(sides: dict[str, dict[str, Any]]) -> None:
    """A row per model: before, after, and the paired difference."""
    console = Console(highlight=False)
    first = next(iter(sides.values()))
    name = first["headline"]
    heading = label(name, first["after"][name])
    table = Table(title=f"recovery, {heading}", title_justify="left")
    gained = f"gained, paired\n{first['gained']['unit']}"
    for column in ("", "before", "after", gained, "n", "time"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row, side in sides.items():
        values = [side[when][name] for when in ("before", "after")]
        table.add_row(
            row,
            *(plus_minus(value["mean"], value["stderr"]) for value in values),
            plus_minus(side["gained"]["mean"], side["gained"]["stderr"]),
            f"{side['gained']['n']}",
            duration(side["seconds"]),
        )
    console.print(table)
