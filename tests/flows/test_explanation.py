"""The words about two error curves: true for the numbers they come from, and silent otherwise.

python -m pytest tests/flows/test_explanation.py
"""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.explanation import damage_rates, explain
from infra.records import BlockError

BLOCKS = 8
FLAT, RISING, FALLING = [0.6] * BLOCKS, [0.4] * 4 + [0.8] * 4, [0.8] * 4 + [0.4] * 4


def curve(made: list[float], gain: list[float], cross: float = 0.0) -> list[BlockError]:
    """A stream of constant size 1 in which a block makes `made` and passes on by `gain`."""
    errors, before = list[BlockError](), 0.0
    for block, (m, g) in enumerate(zip(made, gain, strict=True)):
        carried = g**2 * before
        both = 2 * cross * math.sqrt(m * carried)
        before = m + carried + both
        errors.append(
            BlockError(
                block=block,
                absolute=before,
                relative=math.sqrt(before),
                cosine=0.9,
                made=m,
                carried=carried,
                cross=both,
                gain=g if block else 0.0,
                damage=m,
            )
        )
    return errors


def halves(early: float, late: float) -> list[float]:
    return [early] * 4 + [late] * 4


def test_three_situations_three_sentences() -> None:
    amplifying, absorbing, even = [1.3] * BLOCKS, [0.6] * BLOCKS, [1.0] * BLOCKS
    equal = halves(0.01, 0.01)
    amplified = explain(
        curve(equal, amplifying),
        curve(halves(0.005, 0.02), amplifying),
        FLAT,
        RISING,
        verdict="gain",
    )
    absorbed = explain(
        curve(equal, absorbing),
        curve(halves(0.03, 0.005), absorbing),
        FLAT,
        FALLING,
        verdict="gain",
    )
    moved = explain(
        curve(equal, even), curve(halves(0.005, 0.015), even), FLAT, RISING, verdict="no gain"
    )
    assert (
        "89 % of the error that reaches the output is made by blocks 0 to 3" in amplified
    )  # 1.69 ** 4 = 8.16 times what blocks 4 to 7 make
    assert "blocks 1 to 7, error is amplified 6.27 times. Best" in amplified
    assert "Best ends lower, at 0.794 instead of 0.975" in amplified
    assert "makes 50 % less in the first half, which with equal rates is amplified" in amplified
    assert "while more comes from the second half" in amplified
    assert "is made by blocks 0 to 3 and 98 % by blocks 4 to 7" in absorbed
    assert "is absorbed to 0.028 of its size" in absorbed and "(gain 0.60)" in absorbed
    assert "it makes 50 % less in the second half" in absorbed
    assert "the first half, pruned more, is cheap: its error is absorbed" in absorbed
    assert "amplified" not in absorbed and "absorbed" not in amplified
    assert "Both curves end equal" in moved
    assert "only moves error from the first half to the second, which gains nothing" in moved
    assert len({amplified, absorbed, moved}) == 3


def test_a_last_block_that_dominates_is_named() -> None:
    uniform = curve([0.01] * BLOCKS, [1.0] * BLOCKS)
    best = curve([0.005] * 7 + [0.2], [1.0] * BLOCKS)
    text = explain(uniform, best, FLAT, RISING, verdict="loss")
    assert "Best ends higher" in text and "more in the second half" in text
    assert "the last block alone makes 85 % of it (12 % with equal rates)" in text
    assert "last block" not in explain(best, uniform, FLAT, RISING, verdict="no gain")


@pytest.mark.parametrize("gain", [0.7, 1.0, 1.4])
def test_nothing_is_claimed_that_the_numbers_do_not_show(gain: float) -> None:
    passing = [gain] * BLOCKS
    uniform = curve([0.01] * BLOCKS, passing)
    lower = curve([0.007] * BLOCKS, passing)
    same = explain(uniform, uniform, FLAT, RISING, verdict="gain")
    assert "changes little" in same and "not in the size of this error" in same
    assert "gains nothing" not in same and "moves error" not in same
    tie = explain(uniform, lower, FLAT, FALLING, verdict="no gain")
    assert "Best ends lower" in tie and tie.endswith("but its loss gains nothing.")
    assert "comes from the" not in tie  # both halves make less
    won = explain(lower, uniform, FLAT, RISING, verdict="gain")
    assert "Best ends higher" in won and "does not say why" in won
    for text in (same, tie, won):
        assert ("amplified" in text, "absorbed" in text) == (gain > 1, gain < 1)
        assert "agree" not in text and "oppose" not in text
    alone = explain(uniform, uniform, FLAT, FLAT, verdict="no gain", same=True)
    assert alone.endswith("so there is nothing to compare.") and "Best ends" not in alone


def test_cross_terms_are_named_where_they_matter() -> None:
    made, gain = [0.01] * BLOCKS, [1.0] * BLOCKS
    against, along = (curve(made, gain, cross) for cross in (-0.3, 0.3))
    text = explain(against, along, FLAT, RISING, verdict="no gain")
    assert "made and carried error oppose each other takes off" in text
    assert "Best ends higher" in text and "cancel less than with equal rates" in text


def test_curves_that_cannot_be_split_are_not_explained() -> None:
    made = [0.01] * BLOCKS
    good = curve(made, [1.1] * BLOCKS)
    old = [BlockError(block=e.block, absolute=1.0, relative=0.5, cosine=0.9) for e in good]
    exact = [BlockError(block=e.block, absolute=0.0, relative=0.0, cosine=1.0) for e in good]
    for pair in ((old, good), (good, old), ([], []), (good, good[:-1]), (exact, exact)):
        assert explain(*pair, FLAT, RISING, verdict="gain") == ""
    one = curve(made[:1], [1.0])
    assert "one block only" in explain(one, one, [0.6], [0.6], verdict="no gain")


def test_blocks_before_the_first_error_have_no_gain() -> None:
    """A schedule may leave the first blocks dense."""
    late = curve([0.0, 0.0, *[0.01] * 6], [1.2] * BLOCKS)
    late = [e.model_copy(update={"gain": 0.0}) if e.block < 3 else e for e in late]
    text = explain(late, late, FLAT, FLAT, verdict="no gain", same=True)
    assert "carried through blocks 3 to 7, error is amplified 2.49 times" in text


def test_damage_rates_need_rates_that_differ() -> None:
    even = [1.0] * BLOCKS
    uniform = curve([0.01] * BLOCKS, even)
    best = curve([0.01 * math.exp(5 * (r - 0.6)) for r in RISING], even)
    assert damage_rates(uniform, best, FLAT, RISING) == pytest.approx([5.0] * BLOCKS)
    assert damage_rates(uniform, best, FLAT, [0.605] * BLOCKS) == [None] * BLOCKS
    assert damage_rates([], [], FLAT, RISING) == []


numbers = st.lists(st.floats(1e-4, 1.0), min_size=BLOCKS, max_size=BLOCKS)
gains = st.lists(st.floats(0.3, 2.0), min_size=BLOCKS, max_size=BLOCKS)


@given(numbers, gains, numbers, gains, st.floats(-0.5, 0.5), st.sampled_from(["gain", "loss"]))
def test_every_clause_is_true(
    made: list[float],
    gain: list[float],
    made_best: list[float],
    gain_best: list[float],
    cross: float,
    verdict: Any,
) -> None:
    """Against streams in which only one half of the blocks makes an error."""
    uniform, best = curve(made, gain, cross), curve(made_best, gain_best, cross)
    text = explain(uniform, best, FLAT, RISING, verdict=verdict)
    (early, late), (early_best, late_best) = (
        (
            curve(m[:4] + [0.0] * 4, g)[-1].absolute,
            curve([0.0] * 4 + m[4:], g)[-1].absolute,
        )
        for m, g in ((made, gain), (made_best, gain_best))
    )
    share = re.search(r"(\d+) % of the error", text)
    assert share and float(share[1]) == pytest.approx(100 * early / (early + late), abs=0.51)
    first, second = uniform[-1].relative, best[-1].relative
    if "Best ends lower" in text:
        assert second < first
    elif "Best ends higher" in text:
        assert second > first
    else:
        assert "end equal" in text and second == pytest.approx(first, rel=0.021)
    for half, old, new, parts in (
        ("first", early, early_best, slice(0, 4)),
        ("second", late, late_best, slice(4, 8)),
    ):
        for word, sign in (("less", -1), ("more", 1)):
            if f"{word} of what the {half} half makes" in text:
                assert sign * (new - old) > 0
            if re.search(rf"makes \d+ % {word} in the {half} half", text):
                assert sign * (sum(made_best[parts]) - sum(made[parts])) > 0
            if f"while {word} comes from the {half} half" in text:
                assert sign * (new - old) > 0
    grown = math.prod(gain[1:])
    assert ("error is amplified" in text) == (grown > 1.05)
    assert ("error is absorbed to" in text.split(" while ")[0]) == (grown < 0.95)
    shares = [e.made / (e.made + e.carried) for e in (uniform[-1], best[-1])]
    assert ("the last block alone" in text) == (shares[1] > max(0.5, shares[0] + 0.05))
    assert not (verdict == "gain" and "gains nothing" in text)
