"""What a study may use: how many trials, how much of the cluster, until when.

budget = Budget(trials=1000, until=cluster.now() + 3600)
budget.spent(used_s=0.0, now=cluster.now())  # why no trial may begin; empty while one may
"""

import math
from dataclasses import dataclass

from infra.errors import UserError


class BudgetSpent(UserError):  # noqa: N818  the end of a study as it was asked for
    """No more trials may begin."""


@dataclass(kw_only=True)
class Budget:
    """How many trials may begin, what they may use, until when; what earlier starts used counts."""

    trials: float = math.inf
    used_s: float = math.inf
    until: float = math.inf
    grace_s: float = 0.0  # after `until`, for what still runs
    num_begun: int = 0
    used_before_s: float = 0.0  # by what is not among the entries any more

    def spent(self, used_s: float, now: float) -> str:
        """Why no trial may begin; empty while one may."""
        if self.num_begun >= self.trials:
            return f"budget: all {self.trials:g} trials are begun"
        if used_s >= self.used_s:
            return f"budget: {self.used_s / 3600:g} GPU-hours are used"
        return "budget: its hours are over" if now >= self.until else ""
