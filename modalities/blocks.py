"""Finding the blocks of a model and their prunable matrices by watching it run.

    blocks = find_blocks(model, lambda: model(input_ids=ids, use_cache=False))
    # [Block(name="model.layers.0", module=..., matrices=(...)), ...]

No architecture is named here. Blocks are the children of a ModuleList or Sequential that a
forward calls one after another with a hidden state whose shape they keep. A list whose children
change the shape (the stages of Swin or ConvNeXt) is opened, one called out of order is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from infra.errors import UserError
from modalities.products import Found, Matrix, ProductRecorder

_MAX_UNSEEN = 0.01  # of a block's matrix weights


@dataclass(frozen=True, eq=False)
class Block:
    """One block: its name in the model and its prunable matrices in the order of their use.

    `tower` is the part of a model of several that it belongs to, such as vision or language.
    """

    name: str
    module: nn.Module
    matrices: tuple[Matrix, ...]
    unseen: tuple[str, ...] = ()
    tower: str = ""


@dataclass(frozen=True)
class _Call:
    shape_in: torch.Size
    shape_out: torch.Size


def find_blocks(model: nn.Module, forward: Callable[[], Any]) -> list[Block]:
    """Run `forward` twice and find every block with its matrices.

    Raises UserError where there are no blocks, where one is visited twice or shares a matrix with
    another one, and where more than 1 % of a block's matrix weights take part in no known product.
    """
    names = _block_names(model, forward)
    if not names:
        raise UserError(
            f"no blocks found in {type(model).__name__}: no list of modules is called one after "
            "another with a hidden state"
        )
    recorders: dict[str, ProductRecorder] = {}
    with ExitStack() as stack:
        for name in names:
            block = model.get_submodule(name)
            recorders[name] = ProductRecorder(block)
            stack.enter_context(_Watched(block, recorders[name]))
        forward()
    blocks = [_block(name, model.get_submodule(name), recorders[name].found) for name in names]
    if not any(block.matrices for block in blocks):
        raise UserError(f"no matrix products were seen in the blocks of {type(model).__name__}")
    _refuse_shared(blocks)
    towers = {block.name: _tower(model, block.name) for block in blocks}
    several = len(set(towers.values())) > 1
    return [replace(b, tower=towers[b.name]) for b in blocks] if several else blocks


def _tower(model: nn.Module, name: str) -> str:
    """What a block is a part of, by the sub-configuration of the model whose module holds it.

    A tower that is given pixels is `vision`, one that speaks is `language`; others are called as
    in the configuration, less `_config`.
    """
    config = getattr(model, "config", None)
    parts = {id(getattr(config, key, None)): key for key in getattr(config, "sub_configs", ())}
    place = name
    while place := place.rpartition(".")[0]:
        module: Any = model.get_submodule(place)
        key = parts.get(id(getattr(module, "config", None)), "").removesuffix("_config")
        if not key:
            continue
        if "vision" in key or getattr(module, "main_input_name", "") == "pixel_values":
            return "vision"
        speaks = key in ("text", "decoder") and getattr(model, "can_generate", bool)()
        return "language" if speaks else key
    return ""


def _refuse_shared(blocks: list[Block]) -> None:
    owners: dict[int, Block] = {}
    for block in blocks:
        for matrix in block.matrices:
            owner = owners.setdefault(matrix.stored().data_ptr(), block)
            if owner is not block:
                raise UserError(
                    f"{block.name}.{matrix.name} is shared with {owner.name}: a matrix of several "
                    "blocks cannot be pruned at the rate of one"
                )


class _Watched:
    """Runs a block's forward under a mode, while it is entered."""

    def __init__(self, block: nn.Module, mode: ProductRecorder) -> None:
        self.block, self.mode = block, mode

    def __enter__(self) -> None:
        self.before = self.block.__dict__.get("forward")
        original = self.block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.mode:
                return original(*args, **kwargs)

        self.block.forward = forward

    def __exit__(self, *_: object) -> None:
        if self.before is None:
            del self.block.forward
        else:
            self.block.forward = self.before


def _block_names(model: nn.Module, forward: Callable[[], Any]) -> list[str]:
    calls: dict[str, list[_Call]] = {}
    order: list[str] = []
    lists = {
        name: [f"{name}.{child}".lstrip(".") for child, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    children = {child for names in lists.values() for child in names}
    handles = [
        module.register_forward_hook(_recorder(name, calls, order), with_kwargs=True)
        for name, module in model.named_modules()
        if name in children
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    ended = {name: i for i, name in enumerate(order)}
    found: list[str] = []
    kinds: set[type[nn.Module]] = set()
    for alone in (False, True):  # a stage of one block is known by what it shares with the others
        for name, names in lists.items():
            if any(f"{name}.".startswith(f"{block}.") for block in found):
                continue  # inside a block: its experts, its layers
            called = [child for child in names if child in calls and child not in found]
            if alone:
                called = called if len(called) == 1 else []
                found += [child for child in called if type(model.get_submodule(child)) in kinds]
            elif _are_blocks(model, called, calls, ended):
                found += called
                kinds |= {type(model.get_submodule(child)) for child in called}
    for name in found:
        if len(calls[name]) > 1:
            raise UserError(
                f"{name} is visited {len(calls[name])} times in one forward: shared blocks cannot "
                "be pruned in lockstep"
            )
    return sorted(found, key=ended.__getitem__)


def _recorder(name: str, calls: dict[str, list[_Call]], order: list[str]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = hidden_state((args, kwargs))
        made = hidden_state(output)
        if given is not None and made is not None:
            calls.setdefault(name, []).append(_Call(given.shape, made.shape))
            order.append(name)

    return hook


def hidden_state(tree: Any) -> Tensor | None:
    """The first floating tensor of at least three dimensions, or else of two: packed patches."""
    floating = [x for x in tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()]
    states = [x for x in floating if x.ndim >= 3] or [x for x in floating if x.ndim == 2]
    return states[0] if states else None


def _are_blocks(
    model: nn.Module, called: list[str], calls: dict[str, list[_Call]], ended: dict[str, int]
) -> bool:
    if len(called) < 2:
        return False
    kinds = {type(model.get_submodule(child)) for child in called}
    # The first block of a stage may change the shape (MaxViT), where it is one of their kind.
    entering = {c.shape_in for child in called[len(kinds) == 1 :] for c in calls[child]}
    shapes = entering | {c.shape_out for child in called for c in calls[child]}
    in_order = [ended[child] for child in called]
    composite = all(
        any(True for _ in module.children()) and any(p.ndim >= 2 for p in module.parameters())
        for module in map(model.get_submodule, called)
    )
    return composite and len(shapes) == 1 and in_order == sorted(in_order)


def _block(name: str, module: nn.Module, found: dict[str, Found]) -> Block:
    found = _with_siblings(module, found)
    routers = _routers(module, found)
    used = [f for f in found.values() if f.parameter not in routers]
    matrices = tuple(_matrices(module, used))
    unseen = {
        parameter: tensor.numel()
        for parameter, tensor in module.named_parameters()
        if tensor.ndim >= 2
        and parameter not in found.keys() | routers  # a router is often cast before its product
        and not _is_no_matrix(module, parameter)
    }
    total = sum(unseen.values()) + sum(matrix.params for matrix in matrices)
    if sum(unseen.values()) > _MAX_UNSEEN * total:
        worst = max(unseen, key=unseen.__getitem__)
        raise UserError(
            f"{name} ({type(module).__name__}): {sum(unseen.values()) / total:.0%} of its matrix "
            f"weights are in no product that is known, {worst} first: this block cannot be pruned"
        )
    return Block(name, module, matrices, tuple(unseen))


def _with_siblings(module: nn.Module, found: dict[str, Found]) -> dict[str, Found]:
    """Adds what an expert that saw no token multiplies: the same as its siblings in the list.

    It takes the place that its number gives it, because that is when another batch will call it.
    """
    complete = dict(found)
    for name, child in module.named_modules():
        if not isinstance(child, nn.ModuleList):
            continue
        experts: dict[str, dict[str, Found]] = {index: {} for index, _ in child.named_children()}
        for parameter, f in complete.items():
            index, _, rest = parameter.removeprefix(f"{name}.").partition(".")
            if parameter.startswith(f"{name}.") and index in experts:
                experts[index][rest] = f
        if all(experts.values()) or not any(experts.values()):
            continue
        model = next(seen for seen in experts.values() if seen)
        for index, sibling in child.named_children():
            own = dict(sibling.named_parameters())
            experts[index] = experts[index] or {
                rest: Found(f"{name}.{index}.{rest}", f.fused, f.transposed)
                for rest, f in model.items()
                if rest in own
            }
        members = {f.parameter: f for seen in experts.values() for f in seen.values()}
        first = next(i for i, parameter in enumerate(complete) if parameter in members)
        others = [(p, f) for p, f in complete.items() if p not in members]
        complete = dict([*others[:first], *members.items(), *others[first:]])
    return complete


def _routers(module: nn.Module, found: dict[str, Found]) -> set[str]:
    """Matrices that score experts, or gate a whole path.

    They stand beside the experts and have as many outputs, or are called router or gate there (some
    route to more than there are experts); a gate of a whole path has one output.
    """
    mixtures = {
        (f.parameter.rpartition(".")[0], module.get_parameter(f.parameter).shape[0])
        for f in found.values()
        if f.fused
    } | {
        (name, len(child))
        for name, child in module.named_modules()
        if isinstance(child, nn.ModuleList) and any(p.startswith(f"{name}.") for p in found)
    }
    single = {
        name: parameter.shape[-1 if name in found and found[name].transposed else 0]
        for name, parameter in module.named_parameters()
        if parameter.ndim == 2 and not (name in found and found[name].fused)
    }
    routers = {name for name, outputs in single.items() if outputs == 1 and name in found}
    for where, experts in mixtures:
        place = where.rpartition(".")[0]
        prefix = f"{place}." if place else ""
        for name, outputs in single.items():
            beside = name.startswith(prefix) and not name.startswith(f"{where}.")
            called = name.removeprefix(prefix).partition(".")[0] in ("router", "gate")
            if beside and (called or outputs == experts):
                routers.add(name)
    return routers


def _matrices(module: nn.Module, used: list[Found]) -> Iterator[Matrix]:
    """In the order of use; the experts of one module expert by expert, as a token meets them."""
    owners: dict[str, list[Found]] = {}
    for f in used:
        owners.setdefault(f.parameter.rpartition(".")[0] if f.fused else f.parameter, []).append(f)
    for group in owners.values():
        if group[0].fused:
            for expert in range(module.get_parameter(group[0].parameter).shape[0]):
                for f in group:
                    yield Matrix(module, f.parameter, expert, f.transposed)
        else:
            yield Matrix(module, group[0].parameter, None, group[0].transposed)


def _is_no_matrix(module: nn.Module, parameter: str) -> bool:
    """Filters of a convolution over positions, and the biases of fused experts."""
    owner = module.get_submodule(parameter.rpartition(".")[0])
    return isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d) or parameter.endswith("bias")
