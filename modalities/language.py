"""Language models: any decoder that transformers loads as a causal language model.

    modality = LanguageModality.load(ModelSpec(source="path/to/model"), torch.device("cpu"))
    modality.losses(modality.evaluation_batches(data, "report", windows=8, context=512)[0])

A checkpoint is converted once per node into one mapped file (GGUF is dequantised), next to its
configuration and tokenizer; from then on opening it takes milliseconds.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infra.checkpoints import CheckpointLayout, inspect_checkpoint
from infra.documents import documents, whole_text
from infra.errors import UserError, first_line
from infra.records import Split
from infra.recovery_spec import RecoverySpec
from infra.sources import fetch
from infra.specs import CalibrationSpec, DataSpec, ModelSpec
from infra.structure import copy_structure, is_structured, read_structure
from infra.training_text import conversations, training_documents
from infra.weights import MappedWeights, save_mapped
from modalities.base import Batch, HeldWeights, LoadedModality, Weights, resolve_dtype
from modalities.blocks import Block, find_blocks
from modalities.converted import (
    WEIGHTS,
    convert_once,
    licence_of,
    stated_licence,
)
from modalities.pretrained import copy_code, mapped, refuse_incomplete, reopened
from modalities.smaller import load_smaller, save_smaller
from modalities.text import adds_bos, cut_windows, shuffled
from modalities.training import UNSCORED, TrainingText, chat_windows, text_windows

_FORMAT = 2  # of a converted checkpoint; a change makes all of them anew
_PROBE_TOKENS = 64
_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
_HEAD_ROWS = 512  # logits turned to float32 at once


class LanguageModality(LoadedModality):
    """A causal language model; its loss is nats per token."""

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        weights: Weights,
        device: torch.device,
        tokenizer: Any,
        licence: str,
    ) -> None:
        super().__init__(model, blocks, weights, device)
        self.tokenizer = self.writer = tokenizer
        self.licence = licence
        self._adds_bos = adds_bos(tokenizer)

    @classmethod
    def load(cls, spec: ModelSpec, device: torch.device) -> LanguageModality:
        """Convert where this node has not yet, then map.

        Raises UserError for weights that are missing, damaged, unsafe or of another shape, and
        for a model whose matrix products are not seen.
        """
        from transformers import AutoModelForCausalLM

        folder = convert(spec, resolve_dtype(spec.dtype, device))
        weights = MappedWeights(folder / WEIGHTS)
        model = mapped(AutoModelForCausalLM, folder, spec, weights)
        tokenizer = _tokenizer(folder)
        blocks = find_blocks(model, lambda: model(input_ids=_some_ids(model), use_cache=False))
        return cls(model, blocks, weights, device, tokenizer, licence_of(folder))

    def calibration_batches(
        self, data: DataSpec, calibration: CalibrationSpec, *, divisor: int = 1
    ) -> list[Batch]:
        """The first windows of the calibration documents in the order of the seed."""
        texts = shuffled(documents(data, "calibration"), calibration.seed)
        size = (calibration.samples, calibration.length)
        return self._batches(texts, *size, "data.calibration", divisor)

    def evaluation_batches(
        self, data: DataSpec, split: Split, windows: int, context: int, *, divisor: int = 1
    ) -> list[Batch]:
        """The first windows of a split, in an order that never changes."""
        if data.cut == "whole":
            texts = [whole_text(data.source_of(split), data.column, data.files)]
            return self._batches(texts, windows, context, f"data.{split}", divisor, bos_once=True)
        texts = shuffled(documents(data, split), 0)
        return self._batches(texts, windows, context, f"data.{split}", divisor)

    def _batches(
        self,
        texts: list[str],
        count: int,
        length: int,
        what: str,
        divisor: int,
        *,
        bos_once: bool = False,
    ) -> list[Batch]:
        limit = _context(self.model)
        if length > limit:
            raise UserError(f"{what}: windows of {length} tokens, the model's context is {limit}")
        cut = cut_windows(
            self.tokenizer, texts, length=length, count=count, what=what, bos_once=bos_once
        )
        vocabulary = _vocabulary(self.model)
        if int(cut.ids.max()) >= vocabulary:
            raise UserError(
                f"the tokenizer does not match the model: it made token {int(cut.ids.max())}, "
                f"the model has {vocabulary} embeddings; set model.tokenizer"
            )
        rows = max(1, _TOKENS_PER_BATCH[self.device.type] // length // divisor)
        return [
            Batch(cut.ids[i : i + rows].to(self.device), cut.bytes[i : i + rows])
            for i in range(0, count, rows)
        ]

    def run(self, batch: Batch) -> Any:
        """One forward of the whole model."""
        return self.model(input_ids=batch.ids, use_cache=False)

    def probe(self) -> Any:
        """The first tokens of the vocabulary, the last of them masked: attention that needs no mask
        may not notice that heads are missing."""
        ids = _some_ids(self.model).to(self.device)
        seen = torch.ones_like(ids)
        seen[:, -1] = 0
        return self.model(input_ids=ids, attention_mask=seen, use_cache=False)

    def losses(self, batch: Batch) -> list[float]:
        """Mean negative log-likelihood of each window's tokens after its first, in nats."""
        return [float(loss) for loss in self.window_losses(batch)]

    def window_losses(self, batch: Batch) -> list[Tensor]:
        """The same as tensors of one graph."""
        logits: Tensor = self.run(batch).logits
        sums = []
        for row, ids in zip(logits, batch.ids, strict=True):
            parts = [
                F.cross_entropy(part.float(), target, reduction="sum")
                for part, target in zip(
                    row[:-1].split(_HEAD_ROWS), ids[1:].split(_HEAD_ROWS), strict=True
                )
            ]
            sums.append(torch.stack(parts).sum(dtype=torch.float64))
        return [x / (batch.ids.shape[1] - 1) for x in sums]

    def training_windows(self, data: DataSpec, recovery: RecoverySpec) -> Batch:
        """Windows of documents, or conversations, in the order of the recovery's seed."""
        size = {"length": recovery.length, "count": recovery.steps * recovery.batch}
        if recovery.length > (limit := _context(self.model)):
            raise UserError(f"recovery.length={recovery.length}: the model's context is {limit}")
        if recovery.has_answers:
            asked = shuffled(conversations(data, recovery), recovery.seed)
            return chat_windows(self.tokenizer, asked, what="recovery", **size)
        texts = shuffled(training_documents(data, recovery), recovery.seed)
        return text_windows(self.tokenizer, texts, what="recovery", **size)

    def training_loss(self, batch: Batch) -> Tensor:
        """Summed negative log-likelihood of the scored tokens, in nats."""
        assert isinstance(batch, TrainingText)
        batch = batch.trimmed()
        logits: Tensor = self.model(input_ids=batch.ids.to(self.device), use_cache=False).logits
        targets = batch.labels[:, 1:].to(self.device).flatten()
        parts = [
            F.cross_entropy(part.float(), target, reduction="sum", ignore_index=UNSCORED)
            for part, target in zip(
                logits[:, :-1].flatten(0, 1).split(_HEAD_ROWS),
                targets.split(_HEAD_ROWS),
                strict=True,
            )
        ]
        return torch.stack(parts).sum()

    def num_scored(self, batch: Batch) -> int:
        """Tokens that the loss is taken on."""
        assert isinstance(batch, TrainingText)
        return int((batch.labels[:, 1:] != UNSCORED).sum())

    def num_together(self, batch: Batch) -> int:
        """Windows per forward."""
        return max(1, _TOKENS_PER_BATCH[self.device.type] // batch.ids.shape[1])

    def scored_tokens(self, batch: Batch) -> list[int]:
        """All tokens of a window but its first."""
        return [batch.ids.shape[1] - 1] * batch.ids.shape[0]

    def save(self, folder: Path) -> None:
        """`save_pretrained` of the model and its tokenizer, and the code that came with it."""
        model: Any = self.model
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        if isinstance(self.weights, MappedWeights):
            copy_code(self.weights.path.parent, folder)
            if is_structured(self.weights.path.parent):
                save_smaller(model, read_structure(self.weights.path.parent), folder)

    def reopen(self, folder: Path) -> LanguageModality:
        """Load what `save` wrote, as any user of transformers would."""
        from transformers import AutoModelForCausalLM

        model, blocks = reopened(AutoModelForCausalLM, folder, self.blocks)
        rest = (self.device, self.tokenizer, self.licence)
        return LanguageModality(model, blocks, HeldWeights(), *rest)

    def facts(self) -> dict[str, Any]:
        """Context, width, vocabulary, BOS habit and licence."""
        return {
            "width": int(self.model.get_input_embeddings().weight.shape[1]),  # type: ignore[operator]
            "outputs": _vocabulary(self.model),
            "batch_tokens": _TOKENS_PER_BATCH[self.device.type],
            "context": _context(self.model),
            "adds_bos": self._adds_bos,
            "licence": self.licence,
        }


def convert(spec: ModelSpec, dtype: torch.dtype) -> Path:
    """The folder of a converted checkpoint; made once per node, under a lock, renamed when done."""
    layout = inspect_checkpoint(
        fetch(spec.source, allow_pickle=spec.allow_pickle),
        allow_pickle=spec.allow_pickle,
        trust_remote_code=spec.trust_remote_code,
    )
    tokenizer_path = fetch(spec.tokenizer, "tokenizer") if spec.tokenizer else None
    tokenizer = CheckpointLayout(tokenizer_path).stamp() if tokenizer_path else []
    return convert_once(
        spec.source,
        [_FORMAT, str(dtype), layout.stamp(), tokenizer, spec.trust_remote_code],
        lambda folder: _convert(spec, layout, tokenizer_path, dtype, folder),
        licence=stated_licence(layout.folder),
    )


def _convert(
    spec: ModelSpec,
    layout: CheckpointLayout,
    tokenizer_path: Path | None,
    dtype: torch.dtype,
    folder: Path,
) -> None:
    from transformers import AutoTokenizer, logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if is_structured(layout.folder):
        model = load_smaller(layout.folder, trust_remote_code=spec.trust_remote_code).to(dtype)
        model.config.dtype = dtype  # buffers are made in it
    else:
        model = _opened(spec, layout, dtype)
    where = tokenizer_path or layout.folder
    extra = {"gguf_file": layout.gguf} if layout.gguf and tokenizer_path is None else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, trust_remote_code=spec.trust_remote_code, **extra
        )
    except (OSError, ValueError, LookupError) as error:
        raise UserError(
            f"cannot load the tokenizer of {spec.tokenizer or spec.source}: set model.tokenizer to "
            f"one that transformers loads ({first_line(error).rstrip(' :')})"
        ) from error
    save_mapped(model, folder / WEIGHTS)
    copy_structure(layout.folder, folder)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if spec.trust_remote_code:
        copy_code(layout.folder, folder)


def _opened(spec: ModelSpec, layout: CheckpointLayout, dtype: torch.dtype) -> Any:
    """As transformers loads it; raises UserError where it does not, or not all of it."""
    from transformers import AutoModelForCausalLM, GgufConfig

    options: dict[str, Any] = {
        "dtype": dtype,
        "trust_remote_code": spec.trust_remote_code,
        "ignore_mismatched_sizes": True,  # they are named below
    }
    if layout.gguf:
        options |= {"gguf_file": layout.gguf, "quantization_config": GgufConfig(dequantize=True)}
    else:
        options["use_safetensors"] = not layout.pickle
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            layout.folder, output_loading_info=True, **options
        )
    except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
        hint = ": fetch it again, it may be cut off" if layout.gguf else ""
        raise UserError(f"cannot load {spec.source}: {first_line(error)}{hint}") from error
    model, info = loaded
    refuse_incomplete(spec.source, sorted(info["missing_keys"]), info["mismatched_keys"])
    model.config.quantization_config = None
    del model.config.quantization_config
    return model


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder,
        trust_remote_code=any(folder.glob("*.py")),  # there only after consent
    )
    tokenizer.model_max_length = 1 << 30  # windows are cut from longer texts
    return tokenizer


def _some_ids(model: Any) -> Tensor:
    tokens = min(_PROBE_TOKENS, _context(model))
    return torch.arange(tokens).remainder(_vocabulary(model))[None]


def _context(model: Any) -> int:
    """The longest context that the model's configuration states."""
    config = model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1 << 30)


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
