"""Fewer bits: uniform against the best line, by round-to-nearest and GPTQ, and bytes on disk.

    python -m tests.bench.quantised [--json] [--bits 3 4] [--tilts 0.2 0.4] [--samples 4]

Lines are tried at some tilts on selection text, calibrated with a quarter of the samples; the best
is compared with uniform on report text. Then SparseGPT at 50 % and 4 bits, in one pass, beside the
dense model at 4 bits: perplexity, and the bytes of the packed weights. What is finished is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch

from infra.specs import PruneSpec
from tasks.packed import pack
from tasks.trial import run_trial
from tests.bench.kept import Kept
from tests.bench.lines import Lines, facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--spec", default="flows/specs/quickstart.toml")
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 4.0])
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq"])
    parser.add_argument("--tilts", type=float, nargs="+", default=[-0.2, 0.2, 0.4, 0.6])
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kept", type=Path, default=Path("runs/bench-quantised.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(
        Kept(options.kept),
        options.spec,
        samples=options.samples,
        windows=options.windows,
        seeds=options.seeds,
    )
    rows, dense = [], None
    print("method  bits  side      beta      perplexity  loss    bits realised   gain, nats (95 %)")
    for bits in options.bits:
        for method in options.methods:
            uniform = PruneSpec(method=method, bits=bits)
            pair = lines.compare(uniform, options.tilts)
            dense, gain = pair.uniform[0].dense_losses, pair.gain
            for side, results in (("uniform", pair.uniform), ("best", pair.best)):
                row = {
                    **facts(results),
                    "scouts": [[r.beta, r.loss] for r in pair.scouts],
                    "gain": [gain.mean, gain.low, gain.high] if side == "best" else None,
                }
                rows.append({"method": method, "asked": bits, "side": side, **row})
                words = (
                    f"{gain.mean:.3f} ({gain.low:.3f} to {gain.high:.3f})" if row["gain"] else ""
                )
                print(
                    f"{method:<7} {bits:<5g} {side:<8} {row['beta']:>8.5f} "
                    f"{row['perplexity']:>13.2f}  {row['loss']:.4f}  {row['bits']:.4f}  {words}",
                    flush=True,
                )
    sizes = []
    print("                          perplexity  packed matrices  dense matrices  all weights")
    for prune in (
        PruneSpec(method="gptq", bits=4),
        PruneSpec(method="sparsegpt", bits=4, sparsity=0.5),
        PruneSpec(method="sparsegpt", sparsity=0.5),
    ):
        result = run_trial(lines.trial(prune, final=True, checkpoint=True))
        with tempfile.TemporaryDirectory() as folder:
            packed = pack(Path(result.checkpoint), Path(folder) / "packed")
        shutil.rmtree(result.checkpoint)
        sizes.append({"goal": prune.goal, **facts([result]), **vars(packed)})
        print(
            f"{prune.goal:<24} {sizes[-1]['perplexity']:>11.2f}  {packed.packed_bytes:>15,}  "
            f"{packed.dense_bytes:>14,}  {packed.file_bytes:>11,}",
            flush=True,
        )
    answer = {"bench": "quantised", "rows": rows, "sizes": sizes, "dense": dense}
    answer |= {"samples": options.samples, "windows": options.windows, "seeds": options.seeds}
    if options.json:
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
