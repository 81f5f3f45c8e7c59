"""Which sampler finds the best beta with the fewest trials: regret on measured loss curves.

    python tests/bench/samplers.py [--seeds 50] [--samplers bracket,tpe,random,gp] [--spreads]

Prints a table and one JSON line. The curves are SmolLM2-135M at 60 and 70 % (ln perplexity over
tilt), moved so that the optimum lies anywhere between tilt -0.1 and 0.7, read with noise of
standard deviation 0.01. Waves of 4; the first is the same for every sampler. Regret is the true
loss of the best seen minus the least possible, in nats per token (0.01 is 1 % perplexity); `top3`
is that of the best of three that are confirmed without noise. `gp` imports torch and takes minutes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
from scipy.interpolate import PchipInterpolator

from infra import samplers

# beta over its bound, perplexity; the outermost are extrapolated
CURVES = {
    "60 %": (0.0276, [(-0.0276, 3000), (-0.012, 250), (-0.004, 115), (0, 92.6), (0.004, 80.7),
                      (0.008, 71.5), (0.012, 75.5), (0.016, 87.5), (0.02, 150), (0.024, 500),
                      (0.0276, 3000)]),
    "70 %": (0.0207, [(-0.0207, 8000), (-0.008, 1500), (0, 566), (0.004, 296), (0.008, 225),
                      (0.012, 197), (0.016, 244), (0.02, 1633), (0.0207, 2500)]),
}  # fmt: skip
SPREADS = {
    "(0, .25, .55, -.25)": (0, 0.25, 0.55, -0.25),
    "(0, .25, .5, -.2)": (0, 0.25, 0.5, -0.2),
    "(0, .33, .67, -.33)": (0, 0.33, 0.67, -0.33),
    "(0, .25, .5, .75)": (0, 0.25, 0.5, 0.75),
    "(0, .5, -.5, .75)": (0, 0.5, -0.5, 0.75),
}
NOISE, WAVE, WAVES = 0.01, 4, 3
Curve = Callable[[float], float]


def moved_curve(seed: int) -> Curve:
    """One of the measured curves with its optimum at a random tilt."""
    bound, points = list(CURVES.values())[seed % 2]
    beta, perplexity = np.array(points, dtype=float).T
    tilt, loss = beta / bound, np.log(perplexity)
    tilt = tilt - tilt[loss.argmin()] + np.random.default_rng(10_000 + seed).uniform(-0.1, 0.7)
    spline = PchipInterpolator(tilt, loss)
    # beyond what was measured it rises on
    return lambda x: float(
        spline(np.clip(x, tilt[0], tilt[-1])) + 6 * abs(x - np.clip(x, tilt[0], tilt[-1]))
    )


def regrets(sampler: str, seed: int) -> list[float]:
    """Regret after 6, 8, 10 and 12 trials, then that of the best of three after 8 and 12."""
    curve, noise = moved_curve(seed), np.random.default_rng(seed)
    history: list[tuple[float, float | None]] = []
    for _ in range(WAVES):
        wave = samplers.propose(
            sampler=sampler,
            seed=seed,
            wave=WAVE,
            count=WAVE,
            bounds={"tilt": (-1.0, 1.0)},
            history=[({"tilt": tilt}, loss) for tilt, loss in history],
        )
        betas = [values["tilt"] for values in wave]
        history += [(b, curve(b) + NOISE * noise.standard_normal()) for b in betas]
    least = min(curve(x) for x in np.linspace(-0.99, 0.99, 1000))

    def chosen(n: int, keep: int) -> float:
        ranked = sorted(history[:n], key=lambda pair: pair[1] or 0.0)
        return min(curve(beta) for beta, _ in ranked[:keep]) - least

    return [chosen(n, 1) for n in (6, 8, 10, 12)] + [chosen(n, 3) for n in (8, 12)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--samplers", default="bracket,tpe,random")
    parser.add_argument("--spreads", action="store_true", help="compare first waves as well")
    args = parser.parse_args()
    spreads = SPREADS if args.spreads else dict(list(SPREADS.items())[:1])
    rows = []
    columns = ["6", "8", "10", "12", "top3 of 8", "top3 of 12"]
    print(
        f"{'sampler':8} {'first wave':20} {'ms/wave':>8} " + " ".join(f"{c:>10}" for c in columns)
    )
    for spread, tilts in spreads.items():
        samplers.FIRST_TILTS = tilts
        for sampler in args.samplers.split(","):
            start = time.perf_counter()
            values = np.array([regrets(sampler, seed) for seed in range(args.seeds)])
            wave_ms = 1000 * (time.perf_counter() - start) / (args.seeds * WAVES)
            mean, error = values.mean(0), values.std(0, ddof=1) / np.sqrt(args.seeds)
            print(f"{sampler:8} {spread:20} {wave_ms:8.1f} " + " ".join(f"{m:10.4f}" for m in mean))
            rows.append({
                "sampler": sampler, "first_wave": tilts, "wave_ms": round(wave_ms, 1),
                "regret": dict(zip(columns, mean.round(5).tolist(), strict=True)),
                "stderr": dict(zip(columns, error.round(5).tolist(), strict=True)),
            })  # fmt: skip
    print(json.dumps({"seeds": args.seeds, "noise": NOISE, "rows": rows}))


if __name__ == "__main__":
    main()
