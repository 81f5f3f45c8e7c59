"""What a recovery is trained on: documents or conversations that neither select nor report.

    training_documents(data, RecoverySpec(steps=100, source="corpus.jsonl"))

Without a source these are the documents that calibrate. A source that calibrates or measures as
well is dealt out as always; text that a measured split holds too is refused.
"""

import json
from collections.abc import Iterable
from typing import Any

from infra.documents import TABLES, deal, documents, files_of, load_table, suffix_of
from infra.errors import UserError
from infra.recovery_spec import RecoverySpec
from infra.specs import DataSpec

Conversation = list[dict[str, str]]


def training_documents(data: DataSpec, recovery: RecoverySpec) -> list[str]:
    """The distinct documents, in the order of their source; raises UserError as `documents` does,
    and where the selection or the report holds one of them."""
    trained_on = _trained_on(data, recovery)
    if recovery.source:
        files = files_of(recovery.source, trained_on.files)
        if suffix_of(files[0]) in TABLES or files[0].is_dir():
            names = load_table(files, recovery.source).column_names
            if trained_on.column not in names:
                raise UserError(
                    f"{recovery.source} has no column {trained_on.column!r}, it has "
                    f"{', '.join(names)}: set recovery.column to the text, or recovery.messages, "
                    "or recovery.question and recovery.answer"
                )
    found = documents(trained_on, "calibration")
    _refuse_shared(found, data, recovery)
    return found


def conversations(data: DataSpec, recovery: RecoverySpec) -> list[Conversation]:
    """The rows of a table as lists of {role, content}.

    Raises UserError for what is no table, lacks a column or holds something else than text, and
    where the selection or the report holds the text of a turn.
    """
    trained_on = _trained_on(data, recovery)

    def read(source: str) -> list[Conversation]:
        table = load_table(files_of(source, trained_on.files), source)
        keys = [key for key in ("messages", "question", "answer") if getattr(recovery, key)]
        wanted = [getattr(recovery, key) for key in keys]
        for key, name in zip(keys, wanted, strict=True):
            if name not in table.column_names:
                names = ", ".join(table.column_names)
                raise UserError(
                    f"{source} has no column {name!r}, it has {names}: set recovery.{key}"
                )
        rows = zip(*(table[name] for name in wanted), strict=True)
        return [_conversation(row, source, wanted) for row in rows if None not in row]

    found = deal(trained_on, "calibration", read, _key, lambda each: repr(_key(each)[:60]), "row")
    turns = (turn["content"].strip() for each in found for turn in each)
    _refuse_shared(turns, data, recovery)
    return found


def _trained_on(data: DataSpec, recovery: RecoverySpec) -> DataSpec:
    """The data with what is trained on in the place of what calibrates."""
    changes: dict[str, Any] = {}
    if recovery.source and recovery.source != data.source_of("calibration"):
        changes = {"calibration": recovery.source, "files": ""}
    if recovery.column:
        changes["column"] = recovery.column
    return data.model_copy(update=changes)


def _conversation(row: tuple[Any, ...], source: str, columns: list[str]) -> Conversation:
    turns = row[0]
    if len(columns) == 2:
        turns = [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), row, strict=True)
        ]
    fits = isinstance(turns, list) and all(
        isinstance(turn, dict) and isinstance(turn.get(key), str)
        for turn in turns
        for key in ("role", "content")
    )
    if not fits:
        raise UserError(
            f"{source}: {' and '.join(columns)} must hold text, or lists of {{role, content}}"
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _key(conversation: Conversation) -> bytes:
    return json.dumps(conversation).encode()


def _refuse_shared(texts: Iterable[str], data: DataSpec, recovery: RecoverySpec) -> None:
    trained = set(texts)
    for split in ("selection", "report"):
        source = data.source_of(split)
        shared = trained.intersection(documents(data, split)) if source else set()
        if shared:
            raise UserError(
                f"training on the {split} split: {len(shared)} documents are in both what recovery "
                f"trains on ({recovery.source or data.source_of('calibration')}) and data.{split} "
                f"({source}), e.g. {min(shared)[:60]!r}"
            )
