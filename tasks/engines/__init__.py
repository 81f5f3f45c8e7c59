"""Engines: ways to run a pruned model's linear layers, and how a model is converted to one.

    from tasks.engines import convert

    records = convert(model, "bitmask", use="decode")  # in place

and then model(...) or model.generate(...) as usual.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from infra.errors import UserError
from infra.records import SpeedLayer
from tasks.engines.base import EncodedLinear, Engine, Use
from tasks.engines.bitmask import Bitmask
from tasks.engines.decode_gpu import Deltas
from tasks.engines.dense import Dense, OneDNN
from tasks.engines.semi_structured import SemiStructured

# An engine is added by a class, its place here and its name in infra/specs.py.
ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (Dense(), OneDNN(), Bitmask(), Deltas(), SemiStructured())
}


@torch.no_grad()
def convert(model: nn.Module, engine: str, *, use: Use = "decode") -> list[SpeedLayer]:
    """Replace, in place, the linear layers of a model that the engine runs faster; list them all.

    `use` is what the model is wanted for: a layer is encoded where its own share of zeros is at
    least the engine's break-even for that use. nn.Linear and transformers' Conv1D are looked at;
    heads and weights that are also something else's (tied embeddings) stay as they are.
    Raises UserError for an unknown engine, or one that runs nothing of the model at all.
    """
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine}: choose one of {', '.join(ENGINES)}")
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D)  # a subclass may compute something else
    }
    uses = Counter(id(held) for _, held in model.named_parameters(remove_duplicate=False))
    heads = {id(head) for head in _heads(model)}
    refusal = cache(ENGINES[engine].refusal)  # a build that fails takes seconds each time
    records, refusals = [], []
    for name in list(layers):
        module = layers.pop(name)  # what is replaced is freed at once
        matrix: Tensor = module.weight.detach()
        weight = matrix.T if isinstance(module, Conv1D) else matrix
        sparsity = 1 - int(weight.count_nonzero()) / max(1, weight.numel())
        chosen, reason = ENGINES[engine], ""
        if id(module) in heads:
            reason = "a head"
        elif uses[id(module.weight)] > 1:
            reason = "its weight is used elsewhere too"
        else:
            reason = refusal(weight.device, weight.dtype) or chosen.misfit(weight)
            refusals.append(reason)
            if not reason and sparsity < (least := chosen.break_even(weight.dtype, use)):
                reason = f"fewer than {least:.0%} zeros, from which {engine} gains in {use}"
        encoded_bytes = weight.nbytes
        if not reason and engine != "dense":
            encoded = chosen.encode(weight, module.bias)
            model.set_submodule(name, encoded)
            encoded_bytes = encoded.encoded_bytes
        records.append(
            SpeedLayer(
                name=name,
                shape=(weight.shape[0], weight.shape[1]),
                sparsity=sparsity,
                engine="dense" if reason else engine,
                reason=reason,
                dense_bytes=weight.nbytes,
                encoded_bytes=encoded_bytes,
            )
        )
    if refusals and all(refusals):
        raise UserError(f"engine {engine} cannot run this model: {refusals[0]}; use another engine")
    if any(isinstance(module, EncodedLinear) for module in model.modules()):
        _let_go(model)
    return records


def _let_go(model: nn.Module) -> None:
    """Copy what stays dense: until then a mapped file is kept whole, with all that was encoded."""
    kept = {
        id(held): held
        for module in model.modules()
        if not isinstance(module, EncodedLinear)
        for held in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    for held in kept.values():
        if held.device.type == "cpu":
            held.data = held.data.clone()


def _heads(model: nn.Module) -> list[nn.Module]:
    """The output layer of a transformers model, or of a timm model."""
    ways = [getattr(model, way, None) for way in ("get_output_embeddings", "get_classifier")]
    found = [way() for way in ways if callable(way)]
    return [head for head in found if isinstance(head, nn.Module)]


__all__ = ["ENGINES", "EncodedLinear", "Engine", "Use", "convert"]
