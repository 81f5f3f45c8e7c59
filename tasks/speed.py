"""How fast a checkpoint runs on each engine, measured on this machine.

    record = measure_speed(ModelSpec(source="runs/quickstart/best"), SpeedSpec())

Every engine holds the same weights; a model that lost whole channels is timed beside the one that
has zeros in their place. A case is run by all engines in turn, again and again, so that
whatever disturbs the machine meets all of them. Kept are the times, not their mean.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.checkpoints import inspect_checkpoint
from infra.errors import UserError
from infra.records import SpeedCase, SpeedEngine, SpeedRecord
from infra.sources import fetch
from infra.specs import ModelSpec, SpeedSpec
from infra.structure import expanded, is_structured
from modalities import load
from modalities.base import LoadedModality
from tasks.engines import ENGINES, EncodedLinear, Use, convert
from tasks.speed_cases import Case, cases_of, image_batch
from tasks.trial import device_name

SMALLER = "smaller"  # a structured checkpoint as it is, run by torch
WITH_ZEROS = "with zeros"  # the same at full size, with zeros where units went
WARM_UPS = 3
LONG_S = 0.25  # of a call; after one of these everything is warm
LEAST = 3  # timings that a case has however long they take
TEXT = "The history of the city begins with"  # all engines continue it, to be compared
CONTINUED = 64


@torch.inference_mode()
def measure_speed(model: ModelSpec, speed: SpeedSpec) -> SpeedRecord:
    """Time a checkpoint's cases on every engine that runs here, interleaved.

    Raises UserError for an engine that was asked for and does not run here, and for a model that
    neither continues a text nor classifies images.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    use: Use = "prefill" if model.modality == "vision" else "decode"
    with _threads(speed.threads):
        folder = Path(fetch(model.source))
        masked = model
        if smaller := is_structured(folder):
            whole = inspect_checkpoint(folder, trust_remote_code=model.trust_remote_code).folder
            masked = model.model_copy(update={"source": str(expanded(whole))})
        modality = load(masked, device)
        matrices = [m.weight() for block in modality.blocks for m in block.matrices]
        zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
        cases = cases_of(modality, speed)
        models: dict[str, nn.Module] = {}
        engines = []
        spare: nn.Module | None = modality.model.to(device)
        names = speed.engines or ([] if smaller else ENGINES)
        for name in dict.fromkeys(["dense", *names]):
            each = load(masked, device).model.to(device) if spare is None else spare
            engine = _converted(each, name, use, asked=bool(speed.engines))
            if smaller and name == "dense":
                name = WITH_ZEROS
            engines.append(engine.model_copy(update={"name": name}))
            spare = each if engines[-1].refusal else None  # what was refused is as it was
            if not spare:
                models[name] = each
        if smaller:
            models[SMALLER] = load(model, device).model.to(device)
            for parameter in models[SMALLER].parameters():
                parameter.count_nonzero()  # mapped until then, as no other model is any more
            held_bytes = _held_bytes(models[SMALLER])
            engines.append(SpeedEngine(name=SMALLER, resident_bytes=held_bytes))
        done = [timed(case, models, speed.runs, device, speed.case_s) for case in cases]
        extra = {name: max(added[name] for _, added in done) for name in models}
        differences = _differences(modality, models)
        return SpeedRecord(
            checkpoint=model.source,
            modality=model.modality,
            architecture=type(modality.model).__name__,
            dtype=str(matrices[0].dtype).removeprefix("torch."),
            sparsity=zeros / sum(matrix.numel() for matrix in matrices),
            stored_bytes=sum(f.stat().st_size for f in folder.rglob("*.safetensors")),
            device=device_name(device),
            threads=torch.get_num_threads(),
            host=platform.node(),
            engines=[
                engine.model_copy(
                    update={"peak_bytes": engine.resident_bytes + extra[engine.name]}
                    | differences.get(engine.name, {})
                )
                if engine.name in models
                else engine
                for engine in engines
            ],
            cases=[case for case, _ in done],
        )


def _converted(model: nn.Module, name: str, use: Use, *, asked: bool) -> SpeedEngine:
    """Convert in place; an engine that cannot run here is told with its reason."""
    try:
        layers = convert(model, name, use=use)
    except UserError as error:
        if asked:
            raise
        return SpeedEngine(name=name, refusal=str(error))
    hidden = sum(m.encoded_bytes for m in model.modules() if isinstance(m, EncodedLinear))
    hidden -= sum(
        t.nbytes
        for m in model.modules()
        if isinstance(m, EncodedLinear)
        for n, t in m.named_buffers()
        if n != "bias"
    )
    return SpeedEngine(
        name=name,
        baseline=ENGINES[name].baseline,
        layers=layers,
        resident_bytes=_held_bytes(model) + hidden,
    )


def _held_bytes(model: nn.Module) -> int:
    """Two names of one tensor, such as a tied head, are held once."""
    held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(held.values())


def timed(
    case: Case,
    models: dict[str, nn.Module],
    runs: int,
    device: torch.device,
    limit_s: float = math.inf,
) -> tuple[SpeedCase, dict[str, int]]:
    """Seconds of every run by engine, and the bytes that each needs beside its weights.

    All engines run in turn, each time another one first. No further round begins after `limit_s`
    of them, but for the third.
    """
    extra = dict.fromkeys(models, 0)
    calls = {name: case.calls(model) for name, model in models.items()}
    order = list(models)

    def turn() -> dict[str, float]:
        seconds = {}
        for name in order:
            call = next(calls[name])
            with _memory(device) as memory:
                _wait(device)
                began = time.perf_counter()
                call()
                _wait(device)
                seconds[name] = time.perf_counter() - began
            extra[name] = max(extra[name], memory.added)
        order.append(order.pop(0))  # none always runs after the same one
        return seconds

    for _ in range(WARM_UPS):
        if min(turn().values()) > LONG_S:
            break
    began = time.perf_counter()
    turns: list[dict[str, float]] = []
    while len(turns) < runs and (len(turns) < LEAST or time.perf_counter() - began < limit_s):
        turns.append(turn())
    record = SpeedCase(
        kind=case.kind,
        batch=case.batch,
        length=case.length,
        unit=case.unit,
        work=case.work,
        seconds={name: [seconds[name] for seconds in turns] for name in models},
    )
    return record, extra


def _differences(
    modality: LoadedModality, models: dict[str, nn.Module]
) -> dict[str, dict[str, Any]]:
    """How far each engine's answers are from those of the first model, which is dense.

    Along the dense model's greedy continuation of a text: the tokens that an engine chooses as
    well, up to the first that it does not, the mean KL divergence in nats per token, and the
    largest difference of a logit. Of images: the last two of the class logits of random pixels.
    """
    logits = {}
    same = {}
    if modality.writer is None:
        inputs = image_batch(modality, CONTINUED)
        logits = {name: model(inputs) for name, model in models.items()}
    else:
        tokenizer = getattr(modality.writer, "tokenizer", modality.writer)
        prompt = tokenizer(TEXT, return_tensors="pt").input_ids.to(modality.device)
        first = None
        for name, model in models.items():
            logits[name] = _along(model, prompt, first)
            first = logits[name].argmax(-1) if first is None else first
            same[name] = int((logits[name].argmax(-1) == first).cumprod(0).sum())
    dense = logits[next(iter(models))].float()
    return {
        name: {
            "same_tokens": same.get(name),
            "kl": float(
                F.kl_div(
                    each.float().log_softmax(-1),
                    dense.log_softmax(-1),
                    log_target=True,
                    reduction="batchmean",
                )
            ),
            "logit_difference": float((each.float() - dense).abs().max()),
        }
        for name, each in logits.items()
    }


def _along(model: Any, prompt: Tensor, tokens: Tensor | None) -> Tensor:
    """Logits of CONTINUED tokens after a prompt, one by one; the model's own choice if not given.

    prompt: 1 x length; tokens: CONTINUED; returns CONTINUED x vocabulary.
    """
    out = model(input_ids=prompt, use_cache=True)
    rows = [out.logits[0, -1]]
    for i in range(CONTINUED - 1):
        token = rows[-1].argmax() if tokens is None else tokens[i]
        out = model(input_ids=token[None, None], past_key_values=out.past_key_values)
        rows.append(out.logits[0, -1])
    return torch.stack(rows)


@dataclass
class _Memory:
    added: int = 0


@contextmanager
def _memory(device: torch.device) -> Iterator[_Memory]:
    """The most bytes that were in use inside beyond those in use before.

    On a CPU of the process's resident set, as Linux counts it; 0 where it cannot be reset.
    """
    memory = _Memory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield memory
        memory.added = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew (proc(5))
    except OSError:
        yield memory
        return
    before = _high_water()
    yield memory
    memory.added = max(0, _high_water() - before)


def _high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads inside; 0: as many as there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
