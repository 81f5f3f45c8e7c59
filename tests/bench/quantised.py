"""Fewer bits: uniform against the best line, by round-to-nearest and GPTQ, and bytes on disk.

    python tests/bench/quantised.py [--json] [--bits 3 4] [--tilts 0.2 0.4] [--samples 4]

Lines are tried at some tilts on selection text, calibrated with a quarter of the samples; the best
is compared with uniform on report text. Then SparseGPT at 50 % and 4 bits, in one pass, beside the
dense model at 4 bits: perplexity, and the bytes of the packed weights. What is finished is kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from flows.pins import pin
from infra.records import TrialResult, TrialSpec
from infra.spec_files import load_spec
from infra.specs import PruneSpec
from tasks.allocation import beta_bounds
from tasks.packed import pack
from tasks.statistics import paired_difference
from tasks.trial import describe_model, run_trial
from tests.bench.kept import Kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--spec", default="flows/specs/quickstart.toml")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 4.0])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--tilts", type=float, nargs="+", default=[-0.2, 0.2, 0.4, 0.6])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--kept", type=Path, default=Path("runs/bench-quantised.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(options.kept)
    spec = pin(load_spec(options.spec))

    def trial(prune: PruneSpec, final: bool, **more: Any) -> TrialSpec:
        samples = options.samples if final else max(1, options.samples // 4)
        return TrialSpec(
            number=0,
            stage="final" if final else "search",
            model=spec.model,
            data=spec.data,
            calibration=spec.calibration.model_copy(update={"samples": samples}),
            prune=prune,
            split="report" if final else "selection",
            windows=options.windows if final else max(2, options.windows // 2),
            context=512,
            **more,
        )

    params = describe_model([trial(PruneSpec(), False)]).block_params()
    rows, dense = [], None
    print("method  bits  side      beta      perplexity  loss    bits realised   gain, nats/token")
    for bits in options.bits:
        for method in options.methods:
            uniform = PruneSpec(method=method, bits=bits)
            low, high = beta_bounds(params, uniform.sparsity)
            betas = [0.0, *(t * (high if t > 0 else -low) for t in options.tilts)]
            lines = [uniform.model_copy(update={"beta": beta}) for beta in betas]
            scouts = [kept.run(trial(line, False)) for line in lines]
            best = min(scouts, key=lambda result: result.loss)
            finals = [
                kept.run(trial(prune, True, error_curves=prune is uniform))
                for prune in (uniform, best.spec.prune)
            ]
            gain = paired_difference(finals[0].losses, finals[1].losses, finals[0].tokens)
            dense = finals[0].dense_losses
            for side, result in zip(("uniform", "best"), finals, strict=True):
                row = {
                    **facts(result),
                    "scouts": [[r.beta, r.loss] for r in scouts],
                    "gain": [gain.mean, gain.stderr] if side == "best" else None,
                }
                rows.append({"method": method, "asked": bits, "side": side, **row})
                words = f"{gain.mean:.4f} +- {gain.stderr:.4f}" if row["gain"] else ""
                print(
                    f"{method:<7} {bits:<5g} {side:<8} {result.beta:>8.5f} "
                    f"{row['perplexity']:>13.2f}  {result.loss:.4f}  {row['bits']:.4f}  {words}",
                    flush=True,
                )
    sizes = []
    print("                          perplexity  packed matrices  dense matrices  all weights")
    for prune in (
        PruneSpec(method="gptq", bits=4),
        PruneSpec(method="sparsegpt", bits=4, sparsity=0.5),
        PruneSpec(method="sparsegpt", sparsity=0.5),
    ):
        result = run_trial(trial(prune, True, checkpoint=True))
        with tempfile.TemporaryDirectory() as folder:
            packed = pack(Path(result.checkpoint), Path(folder) / "packed")
        sizes.append({"goal": prune.goal, **facts(result), **vars(packed)})
        print(
            f"{prune.goal:<24} {sizes[-1]['perplexity']:>11.2f}  {packed.packed_bytes:>15,}  "
            f"{packed.dense_bytes:>14,}  {packed.file_bytes:>11,}",
            flush=True,
        )
    answer = {"bench": "quantised", "rows": rows, "sizes": sizes, "dense": dense}
    answer |= {"samples": options.samples, "windows": options.windows}
    if options.json:
        print(json.dumps(answer))


def facts(result: TrialResult) -> dict[str, Any]:
    total = sum(matrix.params for matrix in result.matrices)
    return {
        "beta": result.beta,
        "loss": result.loss,
        "perplexity": result.metrics()["perplexity"],
        "bits": sum(matrix.bits * matrix.params for matrix in result.matrices) / total,
        "zeros": sum(matrix.zeros for matrix in result.matrices) / total,
        "seconds": result.cost.sweep_s,
    }


if __name__ == "__main__":
    main()
