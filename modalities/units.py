"""Units of a block that can go as a whole: feed-forward channels, and heads with what they share.

    find_units(block, lambda: model(input_ids=ids, use_cache=False))
    # [Units(consumer=o_proj, count=3, producers=(q, k, v)),
    #  Units(consumer=down_proj, count=1536, producers=(gate, up))]

No architecture is named. A row of a weight is set to zero, and the inputs of later products that
change tell what it feeds: one channel, or all heads of a group, whose columns go together with
the rows. What was found is proven by running a copy of the block that has become smaller.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor

from infra.errors import UserError, first_line
from infra.structure import Attribute, Cut, Removed, shrink
from modalities.ablation import forward_of, without
from modalities.blocks import Block
from modalities.products import Matrix, ProductWatcher

_ROWS = 12  # of each weight that are tried, so that two heads of q, k and v each have one
_SEGMENTS = (1, 2, 3)  # that a fused weight may have: gate and up, or q, k and v
_CHANGED = 1e-4  # of the largest input
_LEFT = 0.1  # of a block's weights may belong to no unit
_GROUPS = "num_key_value_groups"


@dataclass(frozen=True, eq=False)
class Producer:
    """A weight whose rows make the inputs of a consumer; `segments` of them lie one below the
    other where it is fused."""

    matrix: Matrix
    segments: int

    def rows(self, gone: Tensor) -> Tensor:
        """Mask of its rows that belong to some units. gone: units, True where one goes."""
        each = self.matrix.weight().shape[0] // (self.segments * gone.numel())
        return gone.repeat_interleave(each).repeat(self.segments)


@dataclass(frozen=True, eq=False)
class Units:
    """`count` equal parts of the columns of a weight, with the rows of others that feed them."""

    consumer: Matrix
    count: int
    producers: tuple[Producer, ...]

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All that loses something with a unit."""
        return (self.consumer, *(producer.matrix for producer in self.producers))

    def columns(self, gone: Tensor) -> Tensor:
        """Mask of the consumer's columns. gone: units, True where one goes."""
        return gone.repeat_interleave(self.consumer.weight().shape[1] // self.count)

    @property
    def params(self) -> int:
        """Weights of one unit."""
        return sum(matrix.params for matrix in self.matrices) // self.count

    @property
    def holder(self) -> str:
        """The module inside the block that the consumer's layer is a part of."""
        return self.consumer.parameter.rpartition(".")[0].rpartition(".")[0]

    @property
    def shares_key(self) -> bool:
        """Whether they are heads that all use one key and value, which stays."""
        groups = getattr(self.consumer.block.get_submodule(self.holder), _GROUPS, None)
        return len(self.producers) == 1 and groups == self.count

    def removed(self, gone: Tensor) -> Removed:
        """What removing some of them makes of the block. gone: units, True where one goes."""
        block, consumer = self.consumer.block, self.consumer
        cuts = [Cut(parameter=consumer.parameter, dim=0 if consumer.transposed else 1)]
        names = {name for name, _ in block.named_parameters()}
        for producer in self.producers:
            matrix, segments = producer.matrix, producer.segments
            dim = 1 if matrix.transposed else 0
            cuts.append(Cut(parameter=matrix.parameter, dim=dim, segments=segments))
            bias = f"{matrix.parameter.removesuffix('weight')}bias"
            if matrix.parameter.endswith("weight") and bias in names:
                cuts.append(Cut(parameter=bias, dim=0, segments=segments))
        kept = (~gone).nonzero().flatten().tolist()
        module = block.get_submodule(self.holder)
        heads = self.count < consumer.weight().shape[1]
        stated = {name: getattr(module, name, None) for name in get_args(Attribute)}
        same = {"num_key_value_heads", "num_kv_heads"} if self.shares_key else {_GROUPS}
        attributes = {
            name: value * len(kept) // self.count
            for name, value in stated.items()
            if heads and isinstance(value, int) and name not in same
        }
        return Removed(
            count=self.count, kept=kept, cuts=cuts, holder=self.holder, attributes=attributes
        )


def find_units(blocks: Sequence[Block], forward: Callable[[], Any]) -> list[list[Units]]:
    """The units of every block, the largest first; `forward` runs the model on something small.

    Blocks of one kind are tried once. Raises UserError for a block whose weights do not fall into
    units that its code can do without.
    """
    found: dict[Any, list[tuple[str, int, list[tuple[str, int]]]]] = {}
    failed: dict[tuple[type, str], str] = {}
    for block in blocks:
        if _kind(block) in found:
            continue
        if any(matrix.expert is not None for matrix in block.matrices):
            raise UserError(
                f"prune.pattern=structured: {block.name} has a mixture of experts, whose channels "
                "cannot be removed: use prune.pattern=unstructured"
            )

        def probe(original: Any, *args: Any, block: Block = block, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            units = []
            for each, reason in _units(block, lambda module: module(*args, **kwargs), original):
                if reason:
                    failed[type(block.module), each.consumer.name] = reason
                else:
                    units.append(each)
            found[_kind(block)] = [
                (u.consumer.name, u.count, [(p.matrix.name, p.segments) for p in u.producers])
                for u in units
            ]
            return output

        with forward_of(block.module, probe), torch.no_grad():
            forward()
    units = [_of_block(block, found[_kind(block)]) for block in blocks]
    _refuse_uncovered(blocks, units, failed)
    return units


def _kind(block: Block) -> Any:
    shapes = tuple((m.name, m.transposed, tuple(m.weight().shape)) for m in block.matrices)
    return type(block.module), shapes


def _of_block(block: Block, found: list[tuple[str, int, list[tuple[str, int]]]]) -> list[Units]:
    named = {matrix.name: matrix for matrix in block.matrices}
    units = [
        Units(named[name], count, tuple(Producer(named[n], segments) for n, segments in producers))
        for name, count, producers in found
    ]
    return sorted(units, key=lambda each: -each.params)


Call = Callable[[Callable[..., Any]], Any]  # runs a block, or its forward, on what it was given


def _units(block: Block, call: Call, forward: Callable[..., Any]) -> Iterator[tuple[Units, str]]:
    """Of one block, by running it on what it was given; `forward` is its own. With each, why it
    does not work without half of them, where it does not."""
    plain = _inputs(block, call, forward)
    reached = {matrix: _reached(block, matrix, plain, call, forward) for matrix in block.matrices}
    for consumer in block.matrices:
        if consumer not in plain:
            continue
        size = plain[consumer].shape[1]
        widths = {}
        for matrix, rows in reached.items():
            spans = [changed[consumer] for changed in rows.values() if changed[consumer].any()]
            width = max((_cell(span) for span in spans), default=size)
            if width <= size // 2:
                widths[matrix] = width
        if not widths:
            continue
        count = size // max(widths.values())
        producers = [
            Producer(matrix, _segments(matrix, reached[matrix], consumer, count, block))
            for matrix in widths
        ]
        units = Units(consumer, count, tuple(producers))
        yield units, _failure(block, units, plain, call, forward)


def _inputs(block: Block, call: Call, forward: Callable[..., Any]) -> dict[Matrix, Tensor]:
    """Of every product: tokens x in."""
    found: dict[Matrix, Tensor] = {}

    def watch(matrix: Matrix, inputs: Tensor) -> None:
        found[matrix] = inputs.detach().clone()

    with ProductWatcher(block.matrices, watch):
        call(forward)
    return found


def _reached(
    block: Block,
    matrix: Matrix,
    plain: dict[Matrix, Tensor],
    call: Call,
    forward: Callable[..., Any],
) -> dict[int, dict[Matrix, Tensor]]:
    """Of some rows of a weight, which inputs of every product change without them."""
    chance, out = random.Random(0), matrix.weight().shape[0]
    edges = [place * out // _ROWS for place in range(_ROWS + 1)]
    found = {}
    for row in (chance.randrange(a, b) for a, b in pairwise(edges) if a < b):
        mask = torch.zeros(out, dtype=torch.bool)
        mask[row] = True
        with without((matrix, mask)):
            after = _inputs(block, call, forward)
        found[row] = {m: _changed(plain[m], after[m]) for m in plain if m in after}
    return found


def _changed(before: Tensor, after: Tensor) -> Tensor:
    """Mask of the columns that differ."""
    if before.shape != after.shape:
        return torch.ones(before.shape[1], dtype=torch.bool)
    apart = (before.float() - after.float()).abs().amax(0)
    return (apart > _CHANGED * before.float().abs().max()).cpu()


def _cell(span: Tensor) -> int:
    """The width of the smallest of all equal parts that holds everything that changed."""
    places, size = span.nonzero().flatten(), span.numel()
    first, last = int(places[0]), int(places[-1])
    return min(w for w in range(1, size + 1) if size % w == 0 and first // w == last // w)


def _segments(
    matrix: Matrix,
    rows: dict[int, dict[Matrix, Tensor]],
    consumer: Matrix,
    count: int,
    block: Block,
) -> int:
    """Of how many parts one below the other a weight is made, each of which feeds all units."""
    out = matrix.weight().shape[0]
    for segments in _SEGMENTS:
        if out % (segments * count):
            continue
        each = out // (segments * count)
        if all(
            int(changed[consumer].nonzero()[0]) // (changed[consumer].numel() // count)
            == row % (out // segments) // each
            for row, changed in rows.items()
            if changed[consumer].any()
        ):
            return segments
    raise UserError(
        f"prune.pattern=structured: the rows of {block.name}.{matrix.name} do not fall into "
        f"{count} units: use prune.pattern=unstructured"
    )


def _refuse_uncovered(
    blocks: Sequence[Block],
    units: Sequence[Sequence[Units]],
    failed: Mapping[tuple[type, str], str],
) -> None:
    """What is part of units in another block of the kind may be the last unit of this one."""
    proven: set[tuple[type, str]] = set()
    covered: set[tuple[type, str]] = set()
    for block, kinds in zip(blocks, units, strict=True):
        kind = type(block.module)
        once: set[str] = set()
        for each in kinds:
            names = {matrix.name for matrix in each.matrices}
            if twice := sorted(once & names):
                raise UserError(
                    f"prune.pattern=structured: {block.name}.{twice[0]} gives the units of one "
                    "product and takes those of another: use prune.pattern=unstructured"
                )
            once |= names
            proven.add((kind, each.consumer.name))
            covered |= {(kind, name) for name in names}
            if each.shares_key:
                beside = [m.name for m in block.matrices if m.name.startswith(f"{each.holder}.")]
                covered |= {(kind, name) for name in beside}
    for key, reason in failed.items():
        if key not in proven:
            raise UserError(f"prune.pattern=structured: {reason}; use prune.pattern=unstructured")
    for block in blocks:
        rest = [m for m in block.matrices if (type(block.module), m.name) not in covered]
        total = sum(matrix.params for matrix in block.matrices)
        if sum(matrix.params for matrix in rest) > _LEFT * total:
            raise UserError(
                f"prune.pattern=structured: {block.name}.{rest[0].name} belongs to no channel or "
                "head that could be removed: use prune.pattern=unstructured"
            )


def _failure(
    block: Block,
    units: Units,
    plain: dict[Matrix, Tensor],
    call: Call,
    forward: Callable[..., Any],
) -> str:
    """A copy without half of the units gives what the block gives with zeros in their place; else
    in words what happens."""
    gone = torch.arange(units.count) % 2 == 1
    rows = [(producer.matrix, producer.rows(gone)) for producer in units.producers]
    with without(*rows):
        kept = ~_changed(plain[units.consumer], _inputs(block, call, forward)[units.consumer])
        with without((units.consumer, units.columns(gone)), columns=True):
            wanted = _tensor(call(forward))
    smaller = copy.deepcopy(block.module)
    smaller.__dict__.pop("forward", None)  # what watches the original is not for the copy
    smaller._forward_hooks.clear()
    smaller._forward_pre_hooks.clear()
    close = 1e-3 if wanted.dtype in (torch.float32, torch.float64) else 5e-2
    reason = ""
    try:
        shrink(smaller, [units.removed(gone)])
        found = _tensor(call(smaller))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = first_line(error)
    else:
        if float((found - wanted).abs().max()) > close * float(wanted.abs().max()):
            reason = "it computes something else"
    if not kept[~units.columns(gone)].all():
        reason = "they are not independent"
    if not reason:
        return ""
    return (
        f"{block.name} ({type(block.module).__name__}) does not work without half of the "
        f"{units.count} units of {units.consumer.name}: {reason}"
    )


def _tensor(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found
