"""Data sets in a folder that stand for the hub: lm-eval's definitions, none of its downloads.

    with local_data(Path("data_sets"), "data_sets"):
        task = TaskManager().load(["piqa"])["tasks"]["piqa"]  # reads data_sets/piqa/validation

A data set `owner/name` with configuration `config` is looked for in `owner/name/config` and in
`name/config`; one without configuration may lie in `none`, `plain_text` or `default`. Its splits
are folders that `save_to_disk` wrote. What is measured is the validation split, whatever split
lm-eval's definition measures: the published averages of ARC and OpenBookQA are of test splits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.errors import UserError

# Known under another name as well. BoolQ as its authors publish it has the same rows without the
# title of the article, which SuperGLUE puts before each passage: `Ethanol fuel -- All biomass ...`
_ELSEWHERE = {"aps/super_glue/boolq": "boolq", "cais/mmlu": "hails/mmlu_no_train"}
_UNNAMED = ("", "none", "plain_text", "default")


@contextmanager
def local_data(folder: Path, source: str, shots: int | None = None) -> Iterator[None]:
    """Tasks that lm-eval makes inside read their rows from a folder.

    Raises UserError where it lacks a data set, the validation split, or the split that a task's
    examples come from; `shots` replaces their number. `source` is how the user calls the folder.
    """
    from huggingface_hub import constants
    from lm_eval.api.task import ConfigurableTask

    def download(task: Any, *_: Any, **__: Any) -> None:
        _read(task, folder, source, shots)

    before = ConfigurableTask.download, constants.HF_HUB_OFFLINE
    ConfigurableTask.download, constants.HF_HUB_OFFLINE = download, True
    try:
        yield
    finally:
        ConfigurableTask.download, constants.HF_HUB_OFFLINE = before


def _read(task: Any, folder: Path, source: str, shots: int | None) -> None:
    config, name = task.config, task.config.task
    splits = _splits(folder, task.DATASET_PATH or "", task.DATASET_NAME or "")
    if not splits:
        held = ", ".join(sorted(each.name for each in folder.iterdir() if each.is_dir())[:20])
        wanted = "/".join(filter(None, (task.DATASET_PATH, task.DATASET_NAME)))
        raise UserError(f"{source} holds no {wanted} for {name}: it has {held or 'no folders'}")
    measured = config.validation_split or "validation"
    if measured not in splits:
        raise UserError(
            f"{source}: the data of {name} has no {measured} split, only {', '.join(splits)}"
        )
    examples = task.fewshot_cfg.split or config.training_split or measured
    # lm-eval keeps a row from being its own example only where it knows what is measured.
    if (config.num_fewshot if shots is None else shots) and (
        examples not in splits or examples == measured
    ):
        raise UserError(
            f"{source}: the data of {name} has no {examples if examples != measured else 'other'} "
            f"split to take examples from: leave {name} out, or write {name}@0"
        )
    config.test_split, config.validation_split = None, measured
    if config.training_split not in splits:
        config.training_split = None
    if task.fewshot_cfg.split not in splits:
        task.fewshot_cfg.split = None
    task.dataset = {split: _rows(path) for split, path in splits.items()}


def _splits(folder: Path, path: str, name: str) -> dict[str, Path]:
    """The splits of a data set, from the first folder that has any."""
    for root in (
        *(other for known, other in _ELSEWHERE.items() if known == f"{path}/{name}"),
        *(f"{other}/{name}" for known, other in _ELSEWHERE.items() if known == path),
        f"{path}/{name}",
        f"{path.rpartition('/')[2]}/{name}",
    ):
        for inner in _UNNAMED:
            states = sorted((folder / root / inner).glob("*/state.json"))
            if states:
                return {state.parent.name: state.parent for state in states}
    return {}


def _rows(path: Path) -> Any:
    """A split in memory: what is derived from it is not written beside it."""
    from datasets import load_from_disk

    rows = load_from_disk(str(path), keep_in_memory=True)
    if {"passage", "answer"} <= set(rows.column_names) and "label" not in rows.column_names:
        return rows.add_column("label", [int(answer) for answer in rows["answer"]])  # BoolQ's own
    return rows
