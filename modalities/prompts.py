"""Questions about images as a processor writes them, and where their answers are predicted.

    prompts = Prompts(processor, model)
    question = prompts.question("What is this?", image, ["cat", "dog"], right=0, name="row 3")

A processor with a chat template is given a user's turn: the image, then the question, or "Describe
the image." where there is none. Others are given `<image>`, a new line and `Question: ...`, a new
line and `Answer:`; without a question the image alone, as a caption follows it in training.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infra.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

_DESCRIBE = "Describe the image."


@dataclass(frozen=True)
class Spot:
    """Where an answer is predicted: `ids[j]` by the logits of `row` at position `start + j`."""

    row: int
    start: int
    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Question:
    """One window: rows of the model's inputs, and the spot of each answer that is compared.

    One row predicts all answers of one token; longer ones need a row each, as far as they differ
    before their last token. Rows are padded on the right, where nothing that is scored looks.
    """

    inputs: dict[str, Tensor]
    text: str
    spots: tuple[Spot, ...]
    answers: tuple[str, ...]
    right: int

    @property
    def ids(self) -> Tensor:
        """Tokens of the text, rows x positions."""
        return self.inputs[self.text]

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for questions whose inputs can be put below each other."""
        return tuple((name, tensor.shape[1:]) for name, tensor in self.inputs.items())


class Prompts:
    """Writes questions for one model."""

    def __init__(self, processor: Any, model: Any) -> None:
        """Raises UserError where the processor leaves no place for the image in the text."""
        self.processor, self.tokenizer, self.model = processor, processor.tokenizer, model
        config = model.config
        self.takes = inspect.signature(model.forward).parameters
        self.dtype = next(model.parameters()).dtype
        self.context = int(
            getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
            or 1 << 30
        )
        # An encoder of images alone, or a language model that reads and writes in two places.
        self.captions_only = "input_ids" not in self.takes
        text = config.get_text_config()
        self.two_places = self.captions_only or bool(getattr(text, "is_encoder_decoder", False))
        self.text = "decoder_input_ids" if self.two_places else "input_ids"
        needed = self.takes["pixel_values"].default is inspect.Parameter.empty
        self.needs_image = self.captions_only or needed
        token = getattr(config, "image_token_id", None)
        self.image_id = getattr(config, "image_token_index", None) if token is None else token
        self.image_token = str(getattr(processor, "image_token", None) or "")
        if not self.captions_only and not getattr(processor, "chat_template", None):
            self._find_image_token()
        if self.image_id is not None and not self.captions_only:
            found = self._processed(self._prompt("?", True), noise())["input_ids"]
            if self.image_id not in found:
                raise UserError(
                    f"{type(processor).__name__} has no image token: the model looks for token "
                    f"{self.image_id} and finds none; give the processor of this model"
                )

    def _find_image_token(self) -> None:
        """Some processors write it themselves, some count on finding it, some do both."""

        def count(text: str) -> int:
            try:
                ids = self._processed(text, noise())["input_ids"]
                return ids[0].tolist().count(self.image_id)
            except (ValueError, IndexError, StopIteration):  # text and images do not fit
                return 0

        if alone := count("?"):
            given = count(f"{self.image_token}?") if self.image_token else 0
            self.image_token = self.image_token if given == alone else ""

    def question(
        self,
        question: str,
        image: Image | None,
        answers: Sequence[str],
        *,
        right: int = 0,
        name: str = "",
    ) -> Question:
        """Of an example called `name`; without answers its prompt alone.

        Raises UserError where an answer is empty, the model needs an image and has none or one of
        a shape that its processor refuses, or the text is longer than its context.
        """
        if image is None and self.needs_image:
            raise UserError(f"{name} has no image: {type(self.model).__name__} takes none without")
        try:
            inputs = self._begin(question, image)
        except ValueError as error:
            kind, reason = type(self.processor).__name__, str(error).partition("\n")[0]
            raise UserError(f"{name}: {kind} refuses it: {reason}") from error
        start = inputs[self.text].shape[1]
        spaced = self._ends_open(int(inputs[self.text][0, -1]))
        ids = [self._answer(answer, spaced) for answer in answers]
        if not all(ids):
            raise UserError(f"{name} has an empty answer: set data.answer, or leave the row out")
        before = {tokens[:-1]: None for tokens in ids} or {(): None}
        rows = [b for b in before if not any(o[: len(b)] == b and o != b for o in before)]
        width = max(map(len, rows))
        if start + width > self.context:
            raise UserError(
                f"{name} has {start + width} tokens, the model's context is {self.context}"
            )
        spots = tuple(
            Spot(next(i for i, r in enumerate(rows) if r[: len(t) - 1] == t[:-1]), start - 1, t)
            for t in ids
        )
        whole = self._extended(inputs, rows, width)
        return Question(whole, self.text, spots, tuple(answers), right)

    def _begin(self, question: str, image: Image | None) -> dict[str, Tensor]:
        if self.captions_only:
            pixels = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
            begin = self.tokenizer(question, add_special_tokens=False)["input_ids"]
            return {
                "pixel_values": pixels.to(self.dtype),
                self.text: torch.tensor([[self._start(), *begin]]),
            }
        inputs = self._processed(self._prompt(question, image is not None), image)
        if self.two_places:
            inputs[self.text] = torch.tensor([[self._start()]])
        return inputs

    def _prompt(self, question: str, has_image: bool) -> str:
        if getattr(self.processor, "chat_template", None):
            content = [{"type": "image"}] if has_image else []
            content.append({"type": "text", "text": question or _DESCRIBE})
            turn = [{"role": "user", "content": content}]
            text: str = self.processor.apply_chat_template(turn, add_generation_prompt=True)
            return text
        begin = self.image_token if has_image else ""
        if not question:
            return begin
        return f"{begin}\nQuestion: {question}\nAnswer:".lstrip("\n")

    def _processed(self, text: str, image: Image | None) -> dict[str, Tensor]:
        options: dict[str, Any] = {"return_tensors": "pt"}
        if self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token):
            options["add_special_tokens"] = False  # as transformers does for its templates
        if image is None:
            made = self.tokenizer([text], **options)
        else:
            made = self.processor(text=[text], images=[image], **options)
        return {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in made.items()
            if name in self.takes and name != "labels"
        }

    def _start(self) -> int:
        for config in (self.model.config, self.model.config.get_text_config(decoder=True)):
            for name in ("decoder_start_token_id", "bos_token_id"):
                if (token := getattr(config, name, None)) is not None:
                    return int(token)
        raise UserError("the model's config.json states no decoder_start_token_id")

    def _ends_open(self, token: int) -> bool:
        """Whether a space stands between a prompt that ends in this token and the answer."""
        special = token == self.image_id or token in self.tokenizer.all_special_ids
        return not special and not self.tokenizer.decode([token])[-1:].isspace()

    def _answer(self, answer: str, spaced: bool) -> tuple[int, ...]:
        """As it follows other text: some tokenizers write the first word of a text otherwise."""
        head, rest = (":", f" {answer}") if spaced else ("\n", answer)
        before = self.tokenizer(head, add_special_tokens=False)["input_ids"]
        whole = self.tokenizer(head + rest, add_special_tokens=False)["input_ids"]
        if not answer.strip():
            return ()
        if whole[: len(before)] == before:
            return tuple(whole[len(before) :])
        return tuple(self.tokenizer(rest, add_special_tokens=False)["input_ids"])

    def _extended(
        self, inputs: dict[str, Tensor], rows: list[tuple[int, ...]], width: int
    ) -> dict[str, Tensor]:
        """A row for each of the texts that follow the prompt."""
        ids = inputs[self.text]
        pad = self.tokenizer.pad_token_id or 0
        whole = {}
        for name, tensor in inputs.items():
            repeated = torch.cat([tensor] * len(rows))
            if tensor.shape == ids.shape and (name == self.text or not self.two_places):
                if name == self.text:
                    after = [[*row, *[pad] * (width - len(row))] for row in rows]
                elif name == "attention_mask":
                    after = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
                else:
                    after = [[self._kind(name, tensor, ids)] * width for _ in rows]
                suffix = torch.tensor(after, dtype=tensor.dtype).reshape(len(rows), width)
                repeated = torch.cat([repeated, suffix], 1)
            whole[name] = repeated
        return whole

    def _kind(self, name: str, kinds: Tensor, ids: Tensor) -> int:
        """Of the tokens of an answer. Kinds that count images as 0 tell the prompt, which sees all
        of itself, from what follows; others tell images from text, which is 0."""
        return int(name == "token_type_ids" and not kinds[ids == self.image_id].any())


def noise() -> Image:
    """An image to find things out with."""
    import PIL.Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (48, 64, 3), dtype=torch.uint8, generator=generator)
    return PIL.Image.fromarray(pixels.numpy())
