"""Whole models on the CPU engines, over the best dense one: speed, memory while decoding, files.

    python tests/bench/models.py --checkpoint runs/quickstart/best --sparsity 0.7 --json

`small` is the checkpoint, pruned by magnitude where it has fewer zeros. `llama` is LLaMA2-7B's
shape with random weights: blocks are made and timed one after another, and the times of 32 blocks
and the head summed. Engines run in turn. `resident` is the memory of a fresh process per engine, as
Linux counts it, and `packed` the file of `sparseramp pack`. `upcast` is a dense candidate besides
the two baselines: bf16 weights made fp32 for an fp32 product. A bound is what the dense head
leaves: bytes read for one token, dense over encoded.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from flows.speed import Timing, timings
from infra.records import SpeedCase, SpeedEngine
from infra.specs import ModelSpec
from modalities import load
from tasks.engines import ENGINES, EncodedLinear, convert
from tasks.packed import pack
from tasks.pruning import prune_in_place
from tasks.pruning.inputs import InputStatistics
from tasks.pruning.patterns import Budget
from tasks.speed import timed
from tasks.speed_cases import Case, decode, prefill

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPE = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
NUM_BLOCKS, VOCABULARY = 32, 32000
PROMPT = 128
FEW = 16  # tokens before decoding a block: what it attends to is little beside its weights
# What a fresh process does: decode with an engine, and tell its memory while it does.
CHILD = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
from tasks.engines import convert
from tasks.speed_cases import decode
folder, engine, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
with torch.inference_mode():
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    convert(model, engine)
    next(decode(torch.arange(16)[None], 16).calls(model))()
    status = Path("/proc/self/status").read_text()
print(*(int(status.split(f"{name}:")[1].split()[0]) << 10 for name in ("RssAnon", "RssFile")))
"""


def main() -> None:
    """Print a table, and one JSON line with --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES])
    parts = ("small", "llama", "resident", "packed")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=NUM_BLOCKS, help="of llama, for decoding")
    parser.add_argument("--prefill-blocks", type=int, default=4, help="of llama, for prefill")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.threads == 1:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    found: dict[str, Any] = {"sparsity": options.sparsity, "threads": options.threads}
    for name in options.dtype:
        if reason := ENGINES["onednn"].refusal(CPU, DTYPES[name]):
            print(f"onednn is left out of {name}: {reason}")
    with torch.inference_mode():
        if "small" in options.part:
            found["small"] = [row for name in options.dtype for row in small(options, name)]
        if "llama" in options.part:
            found["llama"] = [row for name in options.dtype for row in llama(options, name)]
        if {"resident", "packed"} & set(options.part):
            found |= stored(options)
    if options.json:
        print(json.dumps(found))


def small(options: argparse.Namespace, dtype: str) -> Iterator[dict[str, Any]]:
    """The checkpoint's prefill and decoding."""
    model = pruned(options, DTYPES[dtype])
    models, share = in_engines(model)
    ids = torch.arange(PROMPT)[None]
    for case in (prefill(ids), decode(ids, 8)):
        record, _ = timed(case, without(models, case), options.runs, CPU)
        yield told(Path(options.checkpoint).name, dtype, record, bound(model, share, 1))


def llama(options: argparse.Namespace, dtype: str) -> Iterator[dict[str, Any]]:
    """Random weights of LLaMA2-7B's shape, a block at a time."""
    draw = torch.Generator().manual_seed(0)
    one = block(1, 32)
    size = sum(p.numel() for p in one.model.layers.parameters())
    shift = 1 << 22
    pool = torch.empty(size + shift, dtype=DTYPES[dtype])  # every block is another part of it
    for part in pool.split(1 << 22):
        zero = torch.rand(len(part), generator=draw) < options.sparsity
        part.copy_(torch.randn(len(part), generator=draw).mul_(0.02).masked_fill_(zero, 0))
    head = given(block(0, VOCABULARY), pool)
    few, many = torch.arange(FEW)[None], torch.arange(32).repeat(PROMPT // 32)[None]
    for case, num_blocks in (
        (prefill(many), options.prefill_blocks),
        (decode(few, 4), options.blocks),
    ):
        rounds = []
        for _ in range(num_blocks):
            start = int(torch.randint(shift, (), generator=draw))
            one = given(block(1, 32), pool[start:])
            models, share = in_engines(one)
            rounds.append(timed(case, without(models, case), options.runs, CPU)[0])
        record = rounds[0]
        heads = timed(case, dict.fromkeys(record.seconds, head), options.runs, CPU)[0].seconds
        seconds = {
            name: [
                NUM_BLOCKS / num_blocks * sum(each.seconds[name][run] for each in rounds)
                + heads[name][run]
                for run in range(options.runs)
            ]
            for name in record.seconds
        }
        limit = bound(head, share, NUM_BLOCKS, one)
        yield told("llama2-7b", dtype, record.model_copy(update={"seconds": seconds}), limit)


def block(num_layers: int, vocabulary: int) -> Any:
    """LLaMA2-7B with few layers, without weights."""
    with init_empty_weights(include_buffers=False):
        return LlamaForCausalLM(
            LlamaConfig(**SHAPE, num_hidden_layers=num_layers, vocab_size=vocabulary)
        ).eval()


def given(model: Any, pool: Tensor) -> Any:
    """A model with parts of the pool as matrices of its layers, and dense weights elsewhere."""
    start = 0
    for name, p in list(model.named_parameters()):
        if "layers" in name and p.ndim == 2:
            value = pool[start : start + p.numel()].view(p.shape)
            start += p.numel()
        else:
            value = torch.full(p.shape, 0.01, dtype=pool.dtype)
        model.get_submodule(name.rpartition(".")[0]).weight = nn.Parameter(value, False)
    return model


def pruned(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The checkpoint's model, with as many zeros in each matrix as asked, or more."""
    kind = str(dtype).removeprefix("torch.")
    modality = load(ModelSpec(source=options.checkpoint, dtype=kind), CPU)
    for each in modality.blocks:
        for matrix in each.matrices:
            weight = matrix.weight()
            budget = Budget(round(options.sparsity * weight.numel()))
            if weight.numel() - int(weight.count_nonzero()) < budget.zeros:
                unseen = InputStatistics(frozenset())
                prune_in_place(weight, unseen, method="magnitude", budget=budget)
    return modality.model


class Upcast(EncodedLinear):
    """An fp32 product of a bf16 weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.shape, bias)
        self.register_buffer("matrix", weight)

    @property
    def weight(self) -> Tensor:
        """The weight itself."""
        return self.get_buffer("matrix")

    def forward(self, x: Tensor) -> Tensor:
        """x: ... x in; returns ... x out."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def in_engines(model: Any) -> tuple[dict[str, nn.Module], float]:
    """The model in every CPU engine, and the bitmasks' share of the bytes of dense matrices.

    Weights that stay dense are one tensor in all of them.
    """
    dtype = next(model.parameters()).dtype
    shared = {id(p): p for p in model.parameters()}
    models: dict[str, nn.Module] = {"dense": model}
    share = 1.0
    for name in ("onednn", "bitmask"):
        if ENGINES[name].refusal(CPU, dtype):
            continue
        models[name] = copy.deepcopy(model, dict(shared))
        layers = convert(models[name], name)
        encoded = [layer for layer in layers if not layer.reason]
        share = sum(la.encoded_bytes for la in encoded) / sum(la.dense_bytes for la in encoded)
    if dtype == torch.bfloat16:
        models["upcast"] = copy.deepcopy(model, dict(shared))
        for name, module in list(models["upcast"].named_modules()):
            if isinstance(module, nn.Linear) and "layers" in name:
                models["upcast"].set_submodule(name, Upcast(module.weight, module.bias))
    return models, share


def without(models: dict[str, nn.Module], case: Case) -> dict[str, nn.Module]:
    """Those that could be fastest: converting weights for a single token is not."""
    return {n: m for n, m in models.items() if n != "upcast" or case.kind == "prefill"}


def bound(model: Any, share: float, num_blocks: int, one: Any = None) -> float:
    """Bytes that decoding one token reads of the dense model, over those with encoded blocks."""
    layers = (one or model).model.layers
    blocks = num_blocks * sum(p.nbytes for p in layers.parameters() if p.ndim == 2)
    head: int = model.lm_head.weight.nbytes
    return (blocks + head) / (blocks * share + head)


def told(model: str, dtype: str, record: SpeedCase, limit: float) -> dict[str, Any]:
    """A row of the table, as it is printed."""
    engines = [SpeedEngine(name=n, baseline=n != "bitmask") for n in record.seconds]
    by_name: dict[str, Timing] = {each.engine: each for each in timings(record, engines)}
    ours = by_name["bitmask"]
    dense = [each for name, each in by_name.items() if name != "bitmask"]
    best = (max if record.work else min)(dense, key=lambda each: each.median)
    row = {
        "model": model,
        "dtype": dtype,
        "case": record.kind,
        "unit": record.unit,
        "speedup": ours.ratio,
        "quartiles": [ours.ratio_low, ours.ratio_high],
        "bound": limit if record.kind == "decode" else None,
        "dense_kernel": best.engine,
        "medians": {name: each.median for name, each in by_name.items()},
        "runs": len(record.seconds["bitmask"]),
    }
    limits = f"bound {limit:.2f}x" if row["bound"] else ""
    medians = "  ".join(f"{name} {each.median:.4g}" for name, each in by_name.items())
    print(
        f"{model:>10} {dtype} {record.kind:8} {ours.ratio:5.2f}x [{ours.ratio_low:.2f}, "
        f"{ours.ratio_high:.2f}] over {best.engine:7} {limits:12} {record.unit}: {medians}",
        flush=True,
    )
    return row


def stored(options: argparse.Namespace) -> dict[str, Any]:
    """The checkpoint in bf16: memory of processes that decode it, and its packed file."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model = pruned(options, torch.bfloat16)
        matrices = sum(p.nbytes for p in model.model.layers.parameters() if p.ndim == 2)
        model.save_pretrained(folder)
        if "packed" in options.part:
            sizes = pack(folder, Path(scratch) / "packed")
            found["packed"] = {
                "ratio": sizes.ratio,
                "file_ratio": sizes.file_ratio,
                "file_bound": sizes.file_bound,
            }
            print(
                f"packed: matrices {sizes.ratio:.4f} of dense at {sizes.sparsity:.1%} zeros, the "
                f"file {sizes.file_ratio:.4f} (bound {sizes.file_bound:.4f}); read back, the same"
            )
        if "resident" in options.part:
            memory = {}
            for engine in ("dense", "bitmask"):
                command = [sys.executable, "-c", CHILD, str(folder), engine, str(options.threads)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                memory[engine] = [int(size) for size in done.stdout.split()]
            saved = sum(memory["dense"]) - sum(memory["bitmask"])
            found["resident"] = {
                "anonymous_and_file_bytes": memory,
                "matrices_bytes": matrices,
                "share": 1 - saved / matrices,
            }
            sizes_mb = {n: " + ".join(f"{s / 1e6:.1f}" for s in m) for n, m in memory.items()}
            print(
                f"resident while decoding, MB private + mapped: dense {sizes_mb['dense']}, bitmask "
                f"{sizes_mb['bitmask']}; so the matrices take {1 - saved / matrices:.3f} of their "
                f"dense {matrices / 1e6:.1f}"
            )
    return found


if __name__ == "__main__":
    main()
