"""What is settled before a run begins: a spec that contradicts itself, sources and their revisions.

refuse(spec)
spec = pin(spec)
"""

from infra.checkpoints import inspect_checkpoint, refuse_unfit
from infra.errors import UserError
from infra.recovery_spec import RecoverySpec
from infra.sources import fetch, listed, pinned
from infra.specs import MISSING_SOURCE, ModelSpec, Spec
from tasks.allocation import allocation_named
from tasks.methods import check_pattern


def refuse(spec: Spec) -> None:
    """Raise UserError where a spec contradicts itself, whatever its sources hold."""
    data, prune = spec.data, spec.prune
    if not data.source and not (data.calibration and data.selection and data.report):
        raise UserError(MISSING_SOURCE)
    if prune.sparsity == 0 and not prune.bits:
        raise UserError("prune.sparsity=0 prunes nothing: give the share of zeros, such as 0.6")
    allocation_named(prune.allocation)
    check_pattern(prune.method, prune.pattern)
    if prune.pattern[0].isdigit() and prune.allocation != "uniform":
        kept, size = map(int, prune.pattern.split(":"))
        raise UserError(
            f"prune.pattern={prune.pattern} fixes the rate of every matrix: set "
            f"prune.allocation=uniform and prune.sparsity={1 - kept / size:g}"
        )
    if spec.recovery.workers > 1:
        raise UserError(
            f"recovery.workers={spec.recovery.workers}: a search recovers on one worker; let it "
            "end, then give sparseramp recover RUN/best"
        )
    if data.cut == "whole" and spec.search.protocol != "paper":
        raise UserError("data.cut='whole' does not keep splits apart: use search.protocol='paper'")


def pin(spec: Spec) -> Spec:
    """The spec with the exact revision of every source, so that all nodes read the same.

    Raises UserError where a source is missing, or a checkpoint is cut off or unsafe; of the hub,
    whether weights are cut off is seen where they are loaded.
    """
    model, data = spec.model, spec.data
    model = model.model_copy(
        update={
            "source": _pin_model(model),
            "tokenizer": model.tokenizer and pinned(model.tokenizer, "tokenizer"),
        }
    )
    sources = {
        "source": "",
        "calibration": pinned(data.source_of("calibration"), "dataset"),
        "selection": pinned(data.source_of("selection"), "dataset"),
        "report": pinned(data.source_of("report"), "dataset"),
    }
    data = data.model_copy(update=sources)
    recovery = pin_recovery(spec.recovery)
    return spec.model_copy(update={"model": model, "data": data, "recovery": recovery})


def pin_recovery(recovery: RecoverySpec) -> RecoverySpec:
    """The same with the exact revision of its source."""
    source = recovery.source and pinned(recovery.source, "dataset")
    return recovery.model_copy(update={"source": source})


def _pin_model(model: ModelSpec) -> str:
    """Of the hub, the weights stay there until a worker loads them, and looks at them as well."""
    options = {"allow_pickle": model.allow_pickle, "trust_remote_code": model.trust_remote_code}
    if found := listed(model.source, allow_pickle=model.allow_pickle):
        source, listing = found
        names = listing.names
        ggufs = [name for name in names if name.endswith(".gguf")]
        is_gguf = source.endswith(".gguf") or ("config.json" not in names and len(ggufs) == 1)
        if not is_gguf and "packed.json" not in names:
            refuse_unfit(listing.folder, names, **options)
        return source
    inspect_checkpoint(fetch(model.source, allow_pickle=model.allow_pickle), **options)
    return pinned(model.source, allow_pickle=model.allow_pickle)
