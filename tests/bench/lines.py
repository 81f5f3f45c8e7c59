"""Uniform rates beside the best of some lines: tried on selection text, compared on report text.

lines = Lines(kept, "flows/specs/quickstart.toml", samples=8, windows=16, seeds=3)
pair = lines.compare(PruneSpec(method="gptq", bits=3), tilts=[0.2, 0.4])
pair.best[0].beta, facts(pair.best)["perplexity"], pair.gain.mean
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flows.pins import pin
from infra.records import TrialResult, TrialSpec
from infra.spec_files import load_spec
from infra.specs import PruneSpec
from tasks.allocation import beta_bounds
from tasks.statistics import Difference, mean_loss, paired_difference, perplexity
from tasks.trial import describe_model
from tests.bench.kept import Kept


@dataclass(frozen=True)
class Pair:
    """Results on report text, one per calibration seed, and the scouts that chose the line."""

    scouts: list[TrialResult]  # all of the first seed
    uniform: list[TrialResult]
    best: list[TrialResult]
    gain: Difference  # nats per token, paired by window and seed


class Lines:
    """Trials of one model and text; a scout has a quarter of the samples and half the windows."""

    def __init__(self, kept: Kept, spec: str, *, samples: int, windows: int, seeds: int) -> None:
        self.kept, self.samples, self.windows, self.seeds = kept, samples, windows, seeds
        self.spec = pin(load_spec(spec))
        self.params = describe_model([self.trial(PruneSpec())]).block_params()

    def trial(
        self, prune: PruneSpec, *, final: bool = False, seed: int = 0, **more: Any
    ) -> TrialSpec:
        samples = self.samples if final else max(1, self.samples // 4)
        calibration = {"samples": samples, "seed": self.spec.calibration.seed + seed}
        return TrialSpec(
            number=0,
            stage="final" if final else "search",
            model=self.spec.model,
            data=self.spec.data,
            calibration=self.spec.calibration.model_copy(update=calibration),
            prune=prune,
            split="report" if final else "selection",
            windows=self.windows if final else max(2, self.windows // 2),
            context=512,
            **more,
        )

    def compare(self, uniform: PruneSpec, tilts: Sequence[float]) -> Pair:
        """Equal rates are tried as well. tilts: shares of the largest slope, of either sign."""
        low, high = beta_bounds(self.params, uniform.sparsity)
        betas = [0.0, *(tilt * (high if tilt > 0 else -low) for tilt in tilts)]
        tried = [uniform.model_copy(update={"beta": beta}) for beta in betas]
        scouts = [self.kept.run(self.trial(prune)) for prune in tried]
        best = min(scouts, key=lambda result: result.loss).spec.prune
        finals = [
            [
                self.kept.run(
                    self.trial(
                        prune, final=True, seed=seed, error_curves=prune == uniform and not seed
                    )
                )
                for seed in range(self.seeds)
            ]
            for prune in (uniform, best)
        ]
        rows = [[result.losses for result in results] for results in finals]
        gain = paired_difference(rows[0], rows[1], finals[0][0].tokens)
        return Pair(scouts, finals[0], finals[1], gain)


def facts(results: Sequence[TrialResult]) -> dict[str, Any]:
    """What a line of JSON says of the results of one line, one per calibration seed."""
    result, rows = results[0], [result.losses for result in results]
    total = sum(matrix.params for matrix in result.matrices)
    return {
        "beta": result.beta,
        "tilt": result.tilt,
        "loss": mean_loss(rows, result.tokens).mean,
        "perplexity": perplexity(rows, result.tokens).mean,
        "perplexities": [each.metrics()["perplexity"] for each in results],
        "bits": sum(matrix.bits * matrix.params for matrix in result.matrices) / total,
        "zeros": sum(matrix.zeros for matrix in result.matrices) / total,
        "seconds": result.cost.sweep_s,
    }
