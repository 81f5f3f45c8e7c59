"""Optuna: which numbers to try next, and a view of a search for Optuna's own tools.

This is the only folder that imports optuna, and only when it is used.
"""

from infra.samplers.mirror import StudyMirror
from infra.samplers.proposals import FIRST_TILTS, GRID_STEPS, SAMPLERS, Values, grid, propose

__all__ = [
    "FIRST_TILTS",
    "GRID_STEPS",
    "SAMPLERS",
    "StudyMirror",
    "Values",
    "grid",
    "propose",
]
