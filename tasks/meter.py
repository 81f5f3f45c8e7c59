"""Measuring the inputs of matrices while a block runs.

meter = Meter({"norms"})
with ProductWatcher(matrices, meter):
    block(hidden_states)
meter.close()
meter.result(matrices)      # InputStatistics of each
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from modalities.products import Matrix
from tasks.lockstep import torch_state_set_aside
from tasks.pruning.inputs import InputStatistics


class Meter:
    """Measures the inputs of matrices; those with the same inputs share what is measured."""

    def __init__(self, needs: Collection[str]) -> None:
        self.needs = needs
        self._sums: dict[tuple[Matrix, ...], InputStatistics] = {}
        self._last: tuple[Any, Tensor, InputStatistics] | None = None
        self._users: list[Matrix] = []

    def __call__(self, matrix: Matrix, inputs: Tensor) -> None:
        """Called inside a run, in whatever contexts the model has entered there."""
        key = identity(inputs)
        if self._last is None or self._last[0] != key:
            with torch_state_set_aside():
                self.close()
                measured = InputStatistics(self.needs)
                measured.add(inputs)
            self._last = key, inputs, measured  # holding the tensor keeps its address its own
        self._users.append(matrix)

    def close(self) -> None:
        """No other matrix has the same inputs as the last ones."""
        if self._last is not None:
            whole = self._sums.setdefault(tuple(self._users), InputStatistics(self.needs))
            whole.merge(self._last[2])
        self._last, self._users = None, []

    def result(self, matrices: Sequence[Matrix]) -> dict[Matrix, InputStatistics]:
        """Of each matrix, over all groups that it was in."""
        found: dict[Matrix, InputStatistics] = {}
        for users, measured in self._sums.items():
            for matrix in users:
                if matrix in found:
                    together = InputStatistics(self.needs)
                    together.merge(found[matrix])
                    together.merge(measured)
                    found[matrix] = together
                else:
                    found[matrix] = measured
        self._sums.clear()
        return {m: found.get(m) or InputStatistics(self.needs) for m in matrices}


def identity(inputs: Tensor) -> Any:
    """Equal for the same contents of the same memory, as long as the tensor is held."""
    version = object() if inputs.is_inference() else inputs._version  # never equal, if unknown
    return inputs.data_ptr(), inputs.shape, inputs.stride(), version
