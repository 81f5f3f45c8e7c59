"""Why a schedule wins, or does not: a few words generated from the two error curves of a report.

    explain(uniform, best, uniform_rates, best_rates, verdict="gain")

Per block, absolute = made + carried + cross and gain^2 = carried / absolute of the block before. So
the error at the output is a sum over the blocks of (made + cross) times the squared gains of all
later blocks. That sum, not an opinion, says where the error at the output comes from; every clause
is there only where the numbers support it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from infra.records import BlockError

Curve = Sequence[BlockError]
Verdict = Literal["gain", "no gain", "loss"]

EQUAL = 0.02  # errors at the output that differ by less are called equal
NOTABLE = 0.05  # a factor or share is named where it differs from 1, or 0, by more
APART = 0.01  # rates that differ by less say nothing about a damage rate


@dataclass(frozen=True)
class _Half:
    """Half of the blocks: what they make and what of it there is at the output, over ||H||^2 there.

    `passed` is the factor by which an error made here has grown when it gets to the output.
    """

    made: float
    origin: float
    cross: float

    @property
    def passed(self) -> float:
        return math.sqrt(self.origin / self.made) if self.made else 1.0


def explain(
    uniform: Curve,
    best: Curve,
    uniform_rates: Sequence[float],
    best_rates: Sequence[float],
    *,
    verdict: Verdict,
    same: bool = False,
) -> str:
    """Where error is made, carried and absorbed, and what the best schedule changes about it.

    `verdict` is that of the losses: best has a gain over uniform, none, or is worse. `same` says
    that uniform itself is the best. Empty where the curves were not recorded or cannot be split.
    """
    if not (_complete(uniform) and _complete(best)) or len(uniform) != len(best):
        return ""
    if len(uniform) == 1:
        return "There is one block only: it makes all of the error and carries none."
    first = _where(uniform)
    if same:
        return f"{first} Best has equal rates too, so there is nothing to compare."
    return f"{first} {_compare(uniform, best, uniform_rates, best_rates, verdict)}"


def damage_rates(
    uniform: Curve, best: Curve, uniform_rates: Sequence[float], best_rates: Sequence[float]
) -> list[float | None]:
    """Per block, the change of ln(made) per unit of sparsity between the two schedules.

    None where their rates differ by 0.01 or less. What earlier blocks do to the input differs too,
    so it is a diagnostic, not a property of the block.
    """
    rates: list[float | None] = []
    for u, b, at_u, at_b in zip(uniform, best, uniform_rates, best_rates, strict=False):
        known = abs(at_b - at_u) > APART and u.made > 0 and b.made > 0
        rates.append(math.log(b.made / u.made) / (at_b - at_u) if known else None)
    return rates


def _complete(curve: Curve) -> bool:
    """Whether the output's error can be traced back to the blocks, to within 1 %."""
    if not curve or not curve[-1].relative:
        return False
    early, late = _halves(curve)
    total = early.origin + early.cross + late.origin + late.cross
    return math.isclose(total, curve[-1].relative ** 2, rel_tol=0.01)


def _halves(curve: Curve) -> tuple[_Half, _Half]:
    size = curve[-1].absolute / curve[-1].relative ** 2
    parts, factor = [], 1.0
    for error in reversed(curve):
        parts.append((error.made / size, error.made * factor / size, error.cross * factor / size))
        factor *= error.gain**2
    parts.reverse()
    middle = len(curve) // 2
    early, late = (
        _Half(*(sum(part[column] for part in half) for column in range(3)))
        for half in (parts[:middle], parts[middle:])
    )
    return early, late


def _where(curve: Curve) -> str:
    """Of one model: where the error at its output was made, and what became of it on the way."""
    early, late = _halves(curve)
    middle = len(curve) // 2
    share = early.origin / (early.origin + late.origin)
    text = (
        f"With equal rates, {_percent(share)} of the error that reaches the output is made by "
        f"{_span(curve[:middle])} and {_percent(1 - share)} by {_span(curve[middle:])}"
    )
    begin = next(place for place, error in enumerate(curve) if error.absolute)
    carrying = curve[begin + 1 :]
    if carrying:
        text += f"; carried through {_span(carrying)}, error "
        text += _grows(math.prod(error.gain for error in carrying))
        state = _size(curve[-1]) / _size(curve[begin])
        if abs(state - 1) > NOTABLE:
            text += f" while the hidden state {_grows(state, 'grows', 'shrinks')}"
    absorbing = [error for error in carrying if error.gain < 1 - NOTABLE]
    if absorbing:
        most = min(absorbing, key=lambda error: error.gain)
        text += f", absorbed in {len(absorbing)} of them, most in block {most.block} "
        text += f"(gain {most.gain:.2f})"
    cross = (early.cross + late.cross) / curve[-1].relative ** 2
    if abs(cross) > NOTABLE:
        text += f"; that made and carried error {'agree' if cross > 0 else 'oppose each other'} "
        text += f"{'adds' if cross > 0 else 'takes off'} {_percent(abs(cross))}"
    return f"{text}."


def _grows(factor: float, more: str = "is amplified", less: str = "is absorbed") -> str:
    if factor > 1 + NOTABLE:
        return f"{more} {factor:.3g} times"
    if factor < 1 - NOTABLE:
        return f"{less} to {factor:.2g} of its size"
    return "keeps its size"


def _span(part: Curve) -> str:
    first, last = part[0].block, part[-1].block
    return f"block {first}" if first == last else f"blocks {first} to {last}"


def _size(error: BlockError) -> float:
    """||H||, the root mean square over tokens."""
    return math.sqrt(error.absolute) / error.relative


def _compare(
    uniform: Curve,
    best: Curve,
    uniform_rates: Sequence[float],
    best_rates: Sequence[float],
    verdict: Verdict,
) -> str:
    ends = uniform[-1].relative, best[-1].relative
    before, after = _halves(uniform), _halves(best)
    if abs(math.log(ends[1] / ends[0])) < EQUAL:
        text = f"Both curves end equal, at {ends[0]:.3g} and {ends[1]:.3g} of the output's size: "
        text += _moved(before, after, ends[0] ** 2)
        if verdict == "gain":
            text += "; the gain in loss is not in the size of this error"
        else:
            text += ", which gains nothing"
    else:
        lower = ends[1] < ends[0]
        text = f"Best ends {'lower' if lower else 'higher'}, at {ends[1]:.3g} instead of "
        text += f"{ends[0]:.3g} of the output's size: "
        text += _cause(before, after, _tilted(uniform_rates, best_rates), lower)
        if lower and verdict != "gain":
            text += ", but its loss gains nothing"
        elif not lower and verdict == "gain":
            text += ", but its loss is lower all the same: the size of this error does not say why"
    return f"{text}{_last_block(uniform[-1], best[-1])}."


def _tilted(uniform: Sequence[float], best: Sequence[float]) -> int:
    """1 where the best schedule prunes the first half less than uniform does, -1 for more."""
    middle = len(best) // 2
    change = sum(best[:middle]) - sum(uniform[:middle])
    return -1 if change > APART * middle else 1 if change < -APART * middle else 0


def _moved(before: tuple[_Half, _Half], after: tuple[_Half, _Half], whole: float) -> str:
    early, late = (b.origin - a.origin for a, b in zip(before, after, strict=True))
    if early * late < 0 and min(abs(early), abs(late)) > NOTABLE * whole:
        back = early > 0
        source, target = ("second", "first") if back else ("first", "second")
        return f"the schedule only moves error from the {source} half to the {target}"
    return "the schedule changes little of where its error comes from"


def _cause(
    before: tuple[_Half, _Half], after: tuple[_Half, _Half], tilted: int, lower: bool
) -> str:
    """The largest of three changes that add up to the change of the squared error at the output."""
    (early, late), (early_after, late_after) = before, after
    sign = -1 if lower else 1
    changes = {
        "first": early_after.origin - early.origin,
        "second": late_after.origin - late.origin,
        "cross": early_after.cross + late_after.cross - early.cross - late.cross,
    }
    main = max(changes, key=lambda name: sign * changes[name])
    if main == "cross":
        return f"made and carried error cancel {'more' if lower else 'less'} than with equal rates"
    old, new = (early, early_after) if main == "first" else (late, late_after)
    if not old.made:
        return f"it makes error in the {main} half, where equal rates make none"
    made, passed = (
        sign * math.log(b / a) if a and b else math.inf
        for a, b in ((old.made, new.made), (old.passed, new.passed))
    )
    more = "less" if lower else "more"
    if made < 2 * passed:  # origin = made * passed ** 2
        text = f"{more} of what the {main} half makes reaches the output"
    else:
        text = f"it makes {_percent(abs(new.made / old.made - 1))} {more} in the {main} half"
        if main == "first" and early.passed > 1 + NOTABLE:
            text += f", which with equal rates is amplified {early.passed:.3g} times on its way"
    other = changes["second" if main == "first" else "first"]
    if sign * other < -NOTABLE * sum(abs(change) for change in changes.values()):
        text += f", while {'more' if lower else 'less'} comes from the "
        text += "second half" if main == "first" else "first half"
    if main == "second" and lower and tilted < 0 and early_after.passed < 1 - NOTABLE:
        text += (
            "; the first half, pruned more, is cheap: its error is absorbed to "
            f"{early_after.passed:.2g} of its size on its way"
        )
    return text


def _last_block(uniform: BlockError, best: BlockError) -> str:
    shares = [error.made / (error.made + error.carried) for error in (uniform, best)]
    if shares[1] <= 0.5 or shares[1] - shares[0] < NOTABLE:
        return ""
    return (
        f"; the last block alone makes {_percent(shares[1])} of it ({_percent(shares[0])} with "
        "equal rates)"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
