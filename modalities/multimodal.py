"""Models of images and text: those that answer or describe, and those that match (contrastive.py).

    modality = MultimodalModality.load(ModelSpec(source="path", modality="multimodal"), cpu)
    modality.measure(modality.evaluation_batches(data, "report", 8, 0)[0]).scores["accuracy"]

A window is one question, or one image with its caption; its loss is the nats of the answer, summed
over its tokens. `choices` are compared by their log-likelihood (`accuracy`). A question with an
answer gives `exact`. Rows without an image pass by the vision tower.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from infra.errors import UserError
from infra.images import Example, evaluated, usable
from infra.records import SHOWN, Split
from infra.specs import CalibrationSpec, DataSpec, ModelSpec
from infra.weights import MappedWeights
from modalities.base import (
    Batch,
    ExampleBatch,
    HeldWeights,
    LoadedModality,
    Measured,
    Weights,
    resolve_dtype,
)
from modalities.blocks import Block, find_blocks
from modalities.converted import WEIGHTS, licence_of
from modalities.pretrained import copy_code, mapped, reopened
from modalities.prompts import Prompts, Question, noise
from modalities.vision_language import (
    auto_class,
    convert,
    matches,
    processor_of,
)

_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
_PIXELS_PER_TOKEN = 3 * 14 * 14  # about what a patch of an image costs


@dataclass(frozen=True)
class QuestionBatch(ExampleBatch):
    """Questions whose inputs have one shape; `score` names what is measured of them."""

    questions: tuple[Question, ...] = ()
    score: str = ""

    def rows(self, start: int, stop: int) -> Self:
        """Some of the questions."""
        part = super().rows(start, stop)
        return replace(part, questions=self.questions[start:stop])

    def inputs(self, device: torch.device) -> dict[str, Tensor]:
        """What the model's forward is given."""
        return {
            name: torch.cat([question.inputs[name] for question in self.questions]).to(device)
            for name in self.questions[0].inputs
        }


class MultimodalModality(LoadedModality):
    """A model that continues text about an image; its loss is nats per answer."""

    unit = "answer"

    def __init__(
        self,
        model: nn.Module,
        blocks: list[Block],
        weights: Weights,
        device: torch.device,
        processor: Any,
        licence: str,
    ) -> None:
        super().__init__(model, blocks, weights, device)
        self.processor, self.licence = processor, licence
        self._cached: dict[Any, list[Question]] = {}
        self._prepare()

    def _prepare(self) -> None:
        self.prompts = Prompts(self.processor, self.model)
        if self.prompts.image_id is not None and not self.prompts.two_places:
            self.writer = self.processor

    @classmethod
    def load(cls, spec: ModelSpec, device: torch.device) -> MultimodalModality:
        """Convert where this node has not yet, then map.

        Raises UserError for weights that are missing, damaged or unsafe, a processor that has no
        place for images, a tower that the model does not have, and a model whose answers see what
        comes after them.
        """
        from transformers import AutoConfig, logging

        logging.set_verbosity_error()
        folder = convert(spec, resolve_dtype(spec.dtype, device))
        weights = MappedWeights(folder / WEIGHTS)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
        model = mapped(auto_class(config, spec.source), folder, spec, weights)
        kind = cls
        if matches(model.config):
            from modalities.contrastive import ContrastiveModality

            kind = ContrastiveModality
        cpu = torch.device("cpu")
        probing = kind(model, [], weights, cpu, processor_of(folder), licence_of(folder))
        with torch.no_grad():
            blocks = _of_towers(probing.probe(), spec)
        return kind(model, blocks, weights, device, probing.processor, probing.licence)

    def probe(self) -> list[Block]:
        """Find the blocks with two questions that differ in their last token only."""
        asked = [self._probing(answer) for answer in ("cat dog", "cat 7")]
        logits: list[Tensor] = []

        def forward() -> None:
            batch = asked[len(logits) % 2]
            logits.append(self.run(batch).logits[0, : batch.questions[0].spots[0].start + 1])

        blocks = find_blocks(self.model, forward)
        if not torch.allclose(logits[0].float(), logits[1].float(), rtol=0.01, atol=0.01):
            raise UserError(
                f"{type(self.model).__name__} sees what follows a token: its answers would be "
                "measured with their own knowledge"
            )
        return blocks

    def _probing(self, answer: str) -> QuestionBatch:
        question = self.prompts.question("What is it?", noise(), [f"{answer} ."], name="probe")
        return QuestionBatch(question.ids[:1], (0,), (question,))

    def calibration_batches(
        self, data: DataSpec, calibration: CalibrationSpec, *, divisor: int = 1
    ) -> list[Batch]:
        """The first questions or captions of the calibration split, each with its answer."""
        size = (calibration.seed, calibration.samples)
        return self._batches(self._questions(data, "calibration", *size, ""), "", divisor)

    def evaluation_batches(
        self, data: DataSpec, split: Split, windows: int, context: int, *, divisor: int = 1
    ) -> list[Batch]:
        """The first questions of a split, in an order that never changes."""
        found = evaluated(data, split)
        score = "exact" if all(e.question for e in found) else ""
        score = "accuracy" if all(e.choices for e in found) else score
        return self._batches(self._questions(data, split, 0, windows, score), score, divisor)

    def _questions(
        self, data: DataSpec, split: Any, seed: int, count: int, score: str
    ) -> list[Question]:
        """The same as for the trial before, where it asked for them."""
        key = (data, split, seed, count, score)
        if key not in self._cached:
            good = usable(evaluated(data, split, seed), count, data, f"data.{split}")
            needs = split != "calibration"
            answers = [_answers(example, score, f"data.{split}", needs) for example, _ in good]
            while len(self._cached) > 1:
                del self._cached[next(iter(self._cached))]
            self._cached[key] = [
                self.prompts.question(e.question, image, some, right=right, name=e.name)
                for (e, image), (some, right) in zip(good, answers, strict=True)
            ]
        return self._cached[key]

    def _batches(self, questions: Sequence[Question], score: str, divisor: int) -> list[Batch]:
        """Those of one shape together; the first few, which a report shows, in their order."""
        groups: dict[Any, list[Question]] = {}
        place, last = 0, ()
        for number, question in enumerate(questions):
            place += number < SHOWN and question.shape != last
            last = question.shape
            groups.setdefault((place, last), []).append(question)
        batches: list[Batch] = []
        for group in groups.values():
            cost = max(_cost(question) for question in group)
            rows = max(1, _TOKENS_PER_BATCH[self.device.type] // cost // divisor)
            for i in range(0, len(group), rows):
                part = tuple(group[i : i + rows])
                ids = torch.cat([question.ids[:1] for question in part])
                batches.append(QuestionBatch(ids, (0,) * len(part), part, score))
        return batches

    def run(self, batch: Batch) -> Any:
        """One forward of the whole model."""
        assert isinstance(batch, QuestionBatch)
        return self.model(**batch.inputs(self.device), use_cache=False)

    def losses(self, batch: Batch) -> list[float]:
        """Negative log-likelihood of each right answer, in nats."""
        return [float(loss) for loss in self.window_losses(batch)]

    def window_losses(self, batch: Batch) -> list[Tensor]:
        """The same as tensors of one graph."""
        assert isinstance(batch, QuestionBatch)
        if not all(question.spots for question in batch.questions):
            raise UserError("data.calibration: a row has no answer, so no loss: set data.answer")
        rights = [(question.right,) for question in batch.questions]
        return [-sums[0] for sums, _ in self._likelihoods(batch, rights)]

    def measure(self, batch: Batch) -> Measured:
        """Losses, `accuracy` of choices by their log-likelihood, and `exact`.

        `exact` is 1 where the likeliest tokens are the answer, up to case, punctuation and
        articles; each is predicted after the right ones before it (teacher forcing). Where all are
        right, greedy decoding begins with the answer; what it would say then is not looked at.
        """
        assert isinstance(batch, QuestionBatch)
        chosen = [
            range(len(q.spots)) if batch.score == "accuracy" else (q.right,)
            for q in batch.questions
        ]
        found = self._likelihoods(batch, chosen)
        if batch.score != "accuracy":
            losses = [-float(sums[0]) for sums, _ in found]
            if not batch.score:
                return Measured(losses)
            said = [self.prompts.tokenizer.decode(first).strip() for _, (first, *_) in found]
            expected = [question.answers[question.right] for question in batch.questions]
            pairs = zip(said, expected, strict=True)
            hits = [float(_normalised(a) == _normalised(b)) for a, b in pairs]
            return Measured(losses, {"exact": hits}, said, expected)
        sums = [torch.stack(each) for each, _ in found]
        best = [int(each.argmax()) for each in sums]
        pairs_of = list(zip(batch.questions, best, sums, strict=True))
        return Measured(
            [-float(each[q.right]) for q, _, each in pairs_of],
            {"accuracy": [float(b == q.right) for q, b, _ in pairs_of]},
            [q.answers[b] for q, b, _ in pairs_of],
            [q.answers[q.right] for q, _, _ in pairs_of],
        )

    def _likelihoods(
        self, batch: QuestionBatch, chosen: Sequence[Sequence[int]]
    ) -> list[tuple[list[Tensor], list[list[int]]]]:
        """Of each question's chosen answers: log-likelihoods, and the likeliest tokens."""
        inputs = batch.inputs(self.device)
        first = min(spot.start for q in batch.questions for spot in q.spots)
        if "logits_to_keep" in self.prompts.takes:  # the head over the image is dear
            inputs["logits_to_keep"] = batch.questions[0].ids.shape[1] - first  # type: ignore[assignment]
        else:
            first = 0
        logits: Tensor = self.model(**inputs, use_cache=False).logits
        found, row = [], 0
        for question, wanted in zip(batch.questions, chosen, strict=True):
            sums, said = [], []
            for spot in (question.spots[choice] for choice in wanted):
                begin = spot.start - first
                part = logits[row + spot.row, begin : begin + len(spot.ids)].float()
                ids = torch.tensor(spot.ids, device=part.device)
                picked = part.log_softmax(-1).gather(1, ids[:, None])
                sums.append(picked.sum(dtype=torch.float64))
                said.append(part.argmax(-1).tolist())
            found.append((sums, said))
            row += question.ids.shape[0]
        return found

    def scored_tokens(self, batch: Batch) -> list[int]:
        """One answer per window."""
        return [1] * batch.windows

    def save(self, folder: Path) -> None:
        """`save_pretrained` of the model and its processor, and the code that came with it."""
        self.model.save_pretrained(folder)  # type: ignore[operator]
        self.processor.save_pretrained(folder)
        if isinstance(self.weights, MappedWeights):
            copy_code(self.weights.path.parent, folder)

    def reopen(self, folder: Path) -> MultimodalModality:
        """Load what `save` wrote, as any user of transformers would."""
        auto = auto_class(self.model.config, str(folder))
        model, blocks = reopened(auto, folder, self.blocks)
        rest = (self.device, self.processor, self.licence)
        return type(self)(model, blocks, HeldWeights(), *rest)

    def facts(self) -> dict[str, Any]:
        """Context, width and vocabulary of the text, and the licence."""
        config: Any = self.model.config
        text = config.get_text_config(decoder=True)
        return {
            "modality": "multimodal",
            "unit": self.unit,
            "width": int(text.hidden_size),
            "outputs": int(text.vocab_size),
            "batch_tokens": _TOKENS_PER_BATCH[self.device.type],
            "context": int(getattr(text, "max_position_embeddings", None) or 1 << 30),
            "licence": self.licence,
        }


def _of_towers(blocks: list[Block], spec: ModelSpec) -> list[Block]:
    known = list(dict.fromkeys(block.tower for block in blocks))
    for tower in spec.towers:
        if tower not in known:
            has = ", ".join(known) if any(known) else "one tower without a name"
            raise UserError(f"model.towers: {spec.source} has no {tower!r}, it has {has}")
    return [block for block in blocks if not spec.towers or block.tower in spec.towers]


def right_answer(example: Example, what: str, *, needed: bool = True) -> str:
    """Its answer, or the choice or the name that is its label."""
    choices, label = example.choices, example.label
    if example.answer:
        return example.answer
    if choices and isinstance(label, int) and 0 <= label < len(choices):
        return choices[label]
    if isinstance(label, str):
        return label
    if needed:
        raise UserError(f"{what}: {example.name} has no answer: set data.answer")
    return ""


def _answers(example: Example, score: str, what: str, needed: bool) -> tuple[list[str], int]:
    """The answers to compare, and which is right; one where there is no choice."""
    choices, answer = list(example.choices), right_answer(example, what, needed=needed)
    if score == "accuracy":
        if answer not in choices:
            raise UserError(
                f"{what}: the answer {answer!r} of {example.name} is none of its choices "
                f"({', '.join(choices)}): set data.answer"
            )
        return choices, choices.index(answer)
    return ([answer] if answer else []), 0


def _cost(question: Question) -> int:
    """Tokens of its rows, or patches of its image where these are more."""
    pixels = question.inputs.get("pixel_values")
    patches = pixels.numel() // _PIXELS_PER_TOKEN if pixels is not None else 0
    return max(1, question.ids.numel(), patches)


def _normalised(answer: str) -> str:
    """Lower case, without punctuation, articles and space to spare, as far as that leaves any."""
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation)).split()
    words = [word for word in bare if word not in ("a", "an", "the")]
    return " ".join(words or bare) or answer.strip()
