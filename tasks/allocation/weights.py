"""What allocations measure of the weights alone.

    alphas = alpha(modality, (), PruneSpec(allocation="alphapruning"))    # one per matrix

Every function here takes (modality, batches, prune) and gives one number per matrix; the batches
are not looked at. Blocks are on the device one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from infra.specs import PruneSpec
from modalities.base import Batch, Modality


def weights_of(modality: Modality) -> Iterator[Tensor]:
    """The weights of every matrix in order, out x in, float32, on the device."""
    for index, block in enumerate(modality.blocks):
        modality.attach_block(index)
        try:
            for matrix in block.matrices:
                yield matrix.weight().float()
        finally:
            modality.release_block(index)


def er(modality: Modality, batches: Sequence[Batch], prune: PruneSpec) -> list[float]:
    """(in + out) / (in * out) of every matrix."""
    shapes = [m.weight().shape for block in modality.blocks for m in block.matrices]
    return [(out + in_) / (out * in_) for out, in_ in shapes]


def global_magnitude(modality: Modality, batches: Sequence[Batch], prune: PruneSpec) -> list[float]:
    """Share of every matrix below the one threshold on abs(W) that removes S of all weights."""
    return _below_threshold(modality, prune.sparsity, lambda weight: weight.abs().flatten())


def lamp(modality: Modality, batches: Sequence[Batch], prune: PruneSpec) -> list[float]:
    """The same with the scores of LAMP (arXiv 2010.07611)."""
    return _below_threshold(modality, prune.sparsity, lamp_scores)


def lamp_scores(weight: Tensor) -> Tensor:
    """w^2 over the sum of squares of all weights of the matrix that are at least as large.

    In ascending order, not in that of the weights.
    """
    squares = weight.double().square().flatten().sort().values
    rest = squares.flip(0).cumsum(0).flip(0)
    return (squares / rest.clamp_min(torch.finfo(rest.dtype).tiny)).float()


def _below_threshold(
    modality: Modality, sparsity: float, scores_of: Callable[[Tensor], Tensor]
) -> list[float]:
    """Two passes over the weights instead of a sort of all of them.

    Floats that are not negative are ordered as the integers of their bits: a histogram over the
    upper half of the bits finds the bin of the threshold, a second pass looks into that bin only.
    Scores equal to the threshold go in the same share from every matrix.
    """
    counts = np.zeros(1 << 16, dtype=np.int64)
    sizes = []
    for weight in weights_of(modality):
        scores = scores_of(weight)
        bins = torch.bincount(scores.view(torch.int32) >> 16, minlength=1 << 16)
        counts += bins.cpu().numpy()
        sizes.append(scores.numel())
    wanted = sparsity * sum(sizes)
    if wanted == 0:
        return [0.0] * len(sizes)
    cumulated = counts.cumsum()
    bin_ = int(np.searchsorted(cumulated, wanted))
    below, inside = [], []
    for weight in weights_of(modality):
        scores = scores_of(weight)
        place = scores.view(torch.int32) >> 16
        below.append(int((place < bin_).sum()))
        inside.append(scores[place == bin_].cpu().numpy())
    left = wanted - sum(below)
    threshold = np.sort(np.concatenate(inside))[max(0, math.ceil(left) - 1)]
    lower = [count + int((x < threshold).sum()) for count, x in zip(below, inside, strict=True)]
    ties = [int((x == threshold).sum()) for x in inside]
    share = (wanted - sum(lower)) / sum(ties)
    return [
        (count + share * tied) / size for count, tied, size in zip(lower, ties, sizes, strict=True)
    ]


def alpha(modality: Modality, batches: Sequence[Batch], prune: PruneSpec) -> list[float]:
    """The exponent of the tail of every matrix's spectrum; `mid = 1` fits its upper half.

    A matrix whose spectrum has no tail (all zero, or all singular values equal) gets the mean.
    """
    mid = bool(prune.parameters.get("mid", 0.0))
    alphas = [(alpha_mid if mid else alpha_peak)(spectrum(w)) for w in weights_of(modality)]
    defined = [a for a in alphas if math.isfinite(a)]
    mean = sum(defined) / len(defined) if defined else 0.0
    return [a if math.isfinite(a) else mean for a in alphas]


def spectrum(weight: Tensor) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Squared singular values, ascending, those that are zero but for rounding left out."""
    values = torch.linalg.svdvals(weight).double().square().flip(0).cpu().numpy()
    noise = 4 * np.finfo(np.float32).eps * max(weight.shape) ** 0.5  # of a singular value
    kept: np.ndarray[tuple[int], np.dtype[np.float64]] = values[values > noise**2 * values.max()]
    return kept


def alpha_mid(e: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """1 + n / sum over j >= i of ln(e_j / e_i), with i = N // 2 and n = N - i; e ascending."""
    return _hill(np.log(e), len(e) // 2) if len(e) > 1 else math.nan


def alpha_peak(e: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    """The same at that i near the peak of the spectrum where a power law fits best.

    The peak x is the left edge of the fullest of 100 bins of log10 e; i is searched where
    log10(0.95 x) <= e_i <= 1.5 x: a logarithm against an eigenvalue, as in the published code.
    """
    if len(e) < 2 or e[0] == e[-1]:
        return math.nan
    logs = np.log10(e)
    counts, edges = np.histogram(logs, bins=100)
    x = 10 ** edges[counts.argmax()]
    natural, best = np.log(e), (math.inf, math.nan)
    for i in range(len(e) - 1):
        if not math.log10(0.95 * x) <= e[i] <= 1.5 * x:
            continue
        a, n = _hill(natural, i), len(e) - i
        if a <= 1 or not math.isfinite(a):
            continue
        fitted = 1 - np.exp((1 - a) * (natural[i:] - natural[i]))
        distance = float(np.abs(fitted - np.arange(n) / n).max())
        best = min(best, (distance, a))
    return best[1]


def _hill(logs: np.ndarray[tuple[int], np.dtype[np.float64]], i: int) -> float:
    total = float((logs[i:] - logs[i]).sum())
    return 1 + (len(logs) - i) / total if total > 0 else math.nan
