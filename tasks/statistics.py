"""Means with standard errors: perplexity, bits per byte, paired differences.

    perplexity([3.1, 2.9, 3.3], tokens=[511, 511, 511])   # Estimate(mean=22.2, stderr=2.6, n=3)

Losses are nats per token, one per window of text. Where a function says *rows*, it takes one list
of window losses, or several lists: one per calibration seed, over the same windows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from infra.records import finite_exp

TOO_LARGE = "over 1e304"  # exp of 700 nats

_LABELS = {"bits_per_byte": "bits per byte", "top1": "top-1, %", "top5": "top-5, %"}

Rows = Sequence[float] | Sequence[Sequence[float]]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, the number of windows behind it, and its unit."""

    mean: float | None  # None: too large for a number
    stderr: float | None
    n: int
    unit: str


@dataclass(frozen=True)
class Difference:
    """Mean paired difference in nats/token, and the 95 % interval it lies in."""

    mean: float
    stderr: float
    n_windows: int
    n_seeds: int
    low: float
    high: float
    df: float


def mean_loss(rows: Rows, tokens: Sequence[int], unit: str = "token") -> Estimate:
    """Mean of window losses, weighted by the tokens (or other units) scored in each."""
    table = _table(rows)
    mean, stderr, _ = _two_way(table, np.asarray(tokens, dtype=float))
    return Estimate(mean, stderr, table.shape[1], f"nats/{unit}")


def percentage(rows: Rows) -> Estimate:
    """Mean of scores in [0, 1], one per window or row, in per cent."""
    table = _table(rows)
    mean, stderr, _ = _two_way(table, np.ones(table.shape[1]))
    return Estimate(100 * mean, 100 * stderr, table.shape[1], "%")


def perplexity(rows: Rows, tokens: Sequence[int]) -> Estimate:
    """exp of the token-weighted mean loss; standard error by the delta method: exp(m) * se(m).

    Both are None where the loss is above 700 nats: the exponential is too large for a number.
    """
    table = _table(rows)
    loss, stderr, _ = _two_way(table, np.asarray(tokens, dtype=float))
    mean = finite_exp(loss)
    stderr_of_exp = None if mean is None else mean * stderr
    return Estimate(mean, stderr_of_exp, table.shape[1], "perplexity/token")


def bits_per_byte(rows: Rows, tokens: Sequence[int], num_bytes: Sequence[int]) -> Estimate:
    """Bits to encode one UTF-8 byte of the text: comparable between tokenizers.

    Total bits over total bytes is the mean of the windows' own ratios, weighted by their bytes.
    """
    table = _table(rows)
    sizes = np.asarray(num_bytes, dtype=float)
    bits = table * np.asarray(tokens, dtype=float) / math.log(2)
    mean, stderr, _ = _two_way(bits / sizes, sizes)
    return Estimate(mean, stderr, table.shape[1], "bits/byte")


def paired_difference(a: Rows, b: Rows, tokens: Sequence[int] | None = None) -> Difference:
    """Mean of a - b over the same windows and calibration seeds, with a 95 % t interval.

    Windows and seeds are both samples of what the claim is about, so both count (crossed random
    effects; Searle, Casella, McCulloch, *Variance Components*, 1992, chapter 4). With d the
    differences, W windows and S seeds:

        se^2 = var_windows(mean of d over seeds) / W + var_seeds(mean of d over windows) / S

    The second term is absent for S = 1: the interval then speaks of that one calibration set only.
    What varies with window and seed together is counted in both terms, so the interval errs on
    the wide side. Degrees of freedom after Satterthwaite (Biometrics Bulletin 2, 1946):
    se^4 / sum(term_k^2 / df_k). Windows are weighted by `tokens` where given.
    """
    first, second = _table(a), _table(b)
    if first.shape != second.shape:
        raise ValueError(f"not paired: {first.shape} and {second.shape} seeds and windows")
    table = first - second
    num_seeds, num_windows = table.shape
    weights = np.ones(num_windows) if tokens is None else np.asarray(tokens, dtype=float)
    mean, stderr, df = _two_way(table, weights)
    margin = float(student.ppf(0.975, df)) * stderr
    return Difference(mean, stderr, num_windows, num_seeds, mean - margin, mean + margin, df)


def ruled_out(candidate: Sequence[float], best: Sequence[float], level: float = 0.05) -> bool:
    """Whether a one-sided paired t test over the same windows says that `candidate` is worse.

    A single window rules nothing out.
    """
    if len(candidate) == len(best) == 1:
        return False
    excess = paired_difference(candidate, best)
    return excess.mean > float(student.ppf(1 - level, excess.df)) * excess.stderr


def plus_minus(mean: float | None, stderr: float | None) -> str:
    """84.0 ± 5.1: the standard error to two digits, the mean to as many decimals."""
    if mean is None:
        return TOO_LARGE
    if stderr is None:
        return f"{mean:.4f}"
    digits = 1 - math.floor(math.log10(stderr)) if stderr > 0 else 4
    digits = min(max(digits, 0), 6)
    return f"{mean:.{digits}f} ± {stderr:.{digits}f}"


def label(name: str, metric: Mapping[str, Any]) -> str:
    """How a metric is called in a table; `metric` is an estimate as a dictionary."""
    if name == "loss":
        return f"loss, {metric['unit']}"
    split = f" ({metric['split']})" if "split" in metric else ""
    return _LABELS.get(name, f"{name}, %{split}" if metric["unit"] == "%" else name)


def three_digits(value: float | None) -> str:
    """19.9, 5.47 or 1633: at least three significant digits, never an exponent."""
    if value is None:
        return TOO_LARGE
    return f"{value:.{max(2 - math.floor(math.log10(abs(value))), 0) if value else 0}f}"


def _table(rows: Rows) -> Array:
    table = np.atleast_2d(np.asarray(rows, dtype=float))
    if table.shape[1] < 2:
        raise ValueError(f"a standard error needs at least 2 windows, not {table.shape[1]}")
    return table


def _two_way(table: Array, weights: Array) -> tuple[float, float, float]:
    """Weighted mean of a (seeds, windows) table, its standard error and degrees of freedom.

    The windows' weights are themselves random (a ratio of totals), hence the linearised variance
    W / (W - 1) * sum(w_j^2 * residual_j^2), which is var / W for equal weights.
    """
    num_seeds, num_windows = table.shape
    share = weights / weights.sum()
    means = table @ share
    mean = float(means.mean())
    scaled = share * (table.mean(axis=0) - mean)
    terms = [(float(scaled @ scaled) * num_windows / (num_windows - 1), num_windows - 1)]
    if num_seeds > 1:
        terms.append((float(means.var(ddof=1)) / num_seeds, num_seeds - 1))
    variance = sum(term for term, _ in terms)
    if variance == 0:
        return mean, 0.0, float(num_windows - 1)
    return mean, math.sqrt(variance), variance**2 / sum(term**2 / df for term, df in terms)
