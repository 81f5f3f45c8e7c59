"""Standard errors and intervals, against closed forms, scipy and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from tasks.statistics import (
    bits_per_byte,
    mean_loss,
    paired_difference,
    perplexity,
    plus_minus,
    ruled_out,
    three_digits,
)


def test_perplexity_is_exp_of_the_token_weighted_mean() -> None:
    estimate = perplexity([1.0, 2.0], [300, 100])
    assert estimate.mean == pytest.approx(math.exp(1.25))
    assert (estimate.n, estimate.unit) == (2, "perplexity/token")


def test_equal_windows_give_the_textbook_standard_error() -> None:
    losses = [3.0, 3.2, 2.9, 3.4]
    loss = mean_loss(losses, [511] * 4)
    assert loss.stderr == pytest.approx(stats.sem(losses))
    assert perplexity(losses, [511] * 4).stderr == pytest.approx(
        math.exp(loss.mean) * stats.sem(losses)
    )


def test_standard_error_of_perplexity_matches_resampling_with_unequal_windows() -> None:
    random = np.random.default_rng(0)
    tokens = random.integers(100, 900, size=200)
    losses = random.normal(3, 0.4, size=200) + tokens / 2000
    picks = random.integers(0, 200, size=(4000, 200))
    resampled = np.exp((losses * tokens)[picks].sum(1) / tokens[picks].sum(1))
    estimate = perplexity(losses.tolist(), tokens.tolist())
    assert estimate.stderr == pytest.approx(resampled.std(), rel=0.06)


def test_bits_per_byte_is_total_bits_over_total_bytes() -> None:
    estimate = bits_per_byte([2.0, 3.0], [100, 50], [400, 300])
    assert estimate.mean == pytest.approx((200 + 150) / math.log(2) / 700)
    assert estimate.unit == "bits/byte"


def test_one_seed_gives_the_paired_t_interval() -> None:
    random = np.random.default_rng(1)
    a, b = random.normal(3, 1, 20), random.normal(2.9, 1, 20)
    difference = paired_difference(a.tolist(), b.tolist())
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert (difference.n_windows, difference.n_seeds, difference.df) == (20, 1, 19)


def test_interval_covers_when_seeds_and_windows_both_vary() -> None:
    random = np.random.default_rng(2)
    covered, alone = 0, 0
    for _ in range(600):
        effect = 0.1 + random.normal(0, 0.05, (3, 1)) + random.normal(0, 0.1, (1, 32))
        table = effect + random.normal(0, 0.05, (3, 32))
        both = paired_difference(table.tolist(), np.zeros((3, 32)).tolist())
        one = paired_difference(table[0].tolist(), [0.0] * 32)
        covered += both.low <= 0.1 <= both.high
        alone += one.low <= 0.1 <= one.high
    assert 0.93 <= covered / 600 <= 0.995
    assert alone / 600 < 0.85  # one seed claims too much: why three are the default


def test_seed_variance_and_degrees_of_freedom() -> None:
    difference = paired_difference([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]], [[0.0, 0.0]] * 3)
    assert difference.stderr == pytest.approx(math.sqrt(0.01 / 3))
    assert difference.df == pytest.approx(2)
    assert difference.high - difference.mean == pytest.approx(4.3027 * difference.stderr, rel=1e-4)


def test_token_weights_make_the_difference_that_of_the_losses() -> None:
    a, b, tokens = [3.0, 4.0, 5.0], [2.5, 3.9, 4.0], [10, 500, 90]
    difference = paired_difference(a, b, tokens)
    assert difference.mean == pytest.approx(mean_loss(a, tokens).mean - mean_loss(b, tokens).mean)


def test_identical_losses_are_no_difference_and_are_not_ruled_out() -> None:
    losses = [3.0, 3.1, 2.9]
    difference = paired_difference(losses, losses)
    assert (difference.mean, difference.low, difference.high) == (0, 0, 0)
    assert not ruled_out(losses, losses)


def test_ruled_out_agrees_with_a_one_sided_paired_test() -> None:
    random = np.random.default_rng(3)
    seen = set()
    for _ in range(200):
        best = random.normal(3, 1, 6)
        candidate = best + random.normal(0.05, 0.1, 6)
        expected = stats.ttest_rel(candidate, best, alternative="greater").pvalue < 0.05
        assert ruled_out(candidate.tolist(), best.tolist()) == expected
        seen.add(bool(expected))
    assert seen == {True, False}


def test_a_constant_excess_is_ruled_out_and_a_better_candidate_never() -> None:
    assert not ruled_out([3.5], [3.0])  # one window
    assert ruled_out([3.5, 2.5], [3.0, 2.0])
    assert not ruled_out([2.9, 1.8, 2.0], [3.0, 2.0, 2.1])


def test_windows_must_match_and_be_at_least_two() -> None:
    with pytest.raises(ValueError, match="not paired"):
        paired_difference([[1.0, 2.0], [1.0, 2.0]], [1.0, 2.0])
    with pytest.raises(ValueError, match="not paired"):
        ruled_out([1.0, 2.0, 3.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least 2 windows"):
        mean_loss([1.0], [10])


def test_numbers_are_written_as_precisely_as_they_are_known() -> None:
    assert plus_minus(84.0312, 5.1349) == "84.0 ± 5.1"
    assert plus_minus(-1.07231, 0.0231) == "-1.072 ± 0.023"
    assert plus_minus(1633.2, 312.0) == "1633 ± 312"
    assert plus_minus(3.0, 0.0) == "3.0000 ± 0.0000"
    assert [three_digits(x) for x in (1633.2, 84.0, 5.4712, 0.0)] == ["1633", "84.0", "5.47", "0"]


def test_a_perplexity_that_is_no_number_is_null() -> None:
    huge = perplexity([800.0, 900.0], [10, 10])
    assert (huge.mean, huge.stderr, huge.n) == (None, None, 2)
    assert plus_minus(huge.mean, huge.stderr) == three_digits(huge.mean) == "over 1e304"
    assert perplexity([699.0, 700.0], [10, 10]).mean == pytest.approx(math.exp(699.5))
