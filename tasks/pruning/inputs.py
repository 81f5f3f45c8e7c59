"""What is measured of the inputs of a matrix, and no more than a method needs.

    inputs = InputStatistics({"gram"})
    inputs.add(batch)       # tokens x in
    inputs.gram             # X^T X

Everything is float32, whatever the inputs are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
DAMPING = 0.01  # of the Hessian's mean diagonal, as published


class InputStatistics:
    """Sums over all the tokens it was given.

    needs: "norms" (squared, of each column), "moments" (mean and variance of each column), "gram"
    (X^T X, whose diagonal holds the squared norms) and "gradient", which is set from outside.
    """

    def __init__(self, needs: Collection[str] = ("norms",)) -> None:
        self.needs = frozenset(needs)
        self.tokens = 0
        self.gradient: Tensor | None = None
        self.note = ""  # what had to be done to use these inputs
        self._squares: Tensor | None = None
        self._gram: Tensor | None = None
        self._moments: tuple[Tensor, Tensor] | None = None  # mean, squared distance from it
        self._derived: dict[Any, Any] = {}

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs`, tokens x in."""
        if inputs.shape[0] == 0:
            return
        other = InputStatistics(self.needs)
        other.tokens = inputs.shape[0]
        if "gram" in self.needs:
            wide = inputs.float()
            if self._gram is None:
                other._gram = wide.T @ wide
            else:
                self._gram.addmm_(wide.T, wide)
        elif "norms" in self.needs:
            narrow = inputs.float() if inputs.dtype == torch.float64 else inputs
            norms = torch.linalg.vector_norm(narrow, dim=0, dtype=torch.float32)
            other._squares = norms.square_()
        if "moments" in self.needs:
            variance, mean = torch.var_mean(inputs.float(), dim=0, correction=0)
            other._moments = mean, variance * inputs.shape[0]
        self._take(other)

    def merge(self, other: InputStatistics) -> None:
        """Take in what another one has seen."""
        if other.tokens:
            self._take(other)
            if self._gram is other._gram and self._gram is not None:
                self._gram = self._gram.clone()

    def _take(self, other: InputStatistics) -> None:
        self._derived.clear()
        if other._squares is not None:
            mine = self._squares
            self._squares = other._squares if mine is None else mine + other._squares
        if other._gram is not None:
            self._gram = other._gram if self._gram is None else self._gram.add_(other._gram)
        if other._moments is not None:
            self._moments = self._combined(other._moments, other.tokens)
        self.tokens += other.tokens

    def _combined(self, moments: tuple[Tensor, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
        """Chan's rule: no difference of large sums, as the textbook variance is."""
        if self._moments is None:
            return moments
        share = tokens / (self.tokens + tokens)
        apart = moments[0] - self._moments[0]
        scatter = self._moments[1] + moments[1] + apart.square() * (share * self.tokens)
        return self._moments[0] + apart * share, scatter

    @property
    def squares(self) -> Tensor:
        """Squared norm of each column."""
        found = self._squares if self._gram is None else self._gram.diagonal()
        assert found is not None, "needs norms, and tokens"
        return found

    @property
    def gram(self) -> Tensor:
        """X^T X: in x in."""
        assert self._gram is not None, "needs gram, and tokens"
        return self._gram

    @property
    def mean(self) -> Tensor:
        """Mean of each column."""
        assert self._moments is not None, "needs moments, and tokens"
        return self._moments[0]

    @property
    def variance(self) -> Tensor:
        """Variance of each column."""
        assert self._moments is not None, "needs moments, and tokens"
        return self._moments[1] / self.tokens

    @property
    def are_finite(self) -> bool:
        """No NaN, no infinity, and no overflow of a sum."""
        squares = self._squares if self._gram is None else self._gram.diagonal()
        sums = (squares, *(self._moments or ()), self.gradient)
        return all(bool(torch.isfinite(s.sum())) for s in sums if s is not None)

    @property
    def measured(self) -> bool:
        """Whether there is anything to go by: an expert may see no token."""
        if "gradient" in self.needs:
            return self.gradient is not None and bool(self.gradient.any())
        return not self.needs or self.tokens > 0

    def derived(self, make: Callable[[InputStatistics], T]) -> T:
        """`make(self)`, computed once: several matrices may share the same inputs."""
        if make not in self._derived:
            self._derived[make] = make(self)
        found: T = self._derived[make]
        return found


@dataclass(frozen=True)
class Hessian:
    """Of ||X W - X W~||^2 with respect to a row of W: in x in, damped until it is positive."""

    matrix: Tensor
    dead: Tensor
    reversed_factor: Tensor  # lower Cholesky factor with the order of the inputs reversed


def hessian(inputs: InputStatistics) -> Hessian:
    """2/N X^T X with 1 % of its mean diagonal added; a dead input, always zero, has H_jj = 1.

    Where that is not positive definite in float32, the damping rises tenfold until it is, and
    `inputs.note` says so. (SparseGPT, arXiv 2301.00774, section 3.)
    """
    matrix = inputs.gram * (2 / inputs.tokens)
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    mean, share, added = diagonal.mean(), DAMPING, 0.0
    if not torch.isfinite(mean):
        raise RuntimeError("the Hessian holds NaN or infinity")
    while True:
        diagonal += (share - added) * mean
        factor, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
        if not failed:
            break
        share, added = share * 10, share
        inputs.note = f"Hessian not positive definite: damped by {share:g} of its mean diagonal"
    return Hessian(matrix, dead, factor)
