"""The [recovery] section of a spec: a short fine-tune of what was pruned, that keeps every zero.

RecoverySpec(steps=200, method="lora").replayable()    # the part that decides results
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from infra.frozen import Frozen


class RecoverySpec(Frozen):
    """How the final models are fine-tuned after pruning; the mask stays as it is."""

    steps: int = Field(0, ge=0, description="of the optimizer; 0: nothing is fine-tuned")
    method: Literal["lora", "full"] = Field(
        "lora", description="full: every weight that was kept; for matrices without linear layers"
    )
    source: str = Field("", description="what is trained on; empty: what calibrates")
    column: str = Field("", description="the column that holds the text; empty: data.column")
    question: str = Field("", description="with `answer`: columns of instructions")
    answer: str = Field("", description="the loss is taken on these alone")
    messages: str = Field(
        "", description="a column of conversations, lists of {role, content}, instead of the two"
    )
    length: int = Field(512, ge=8, description="tokens per window; longer conversations are cut")
    batch: int = Field(8, ge=1, description="windows, conversations or images per step")
    learning_rate: float = Field(
        2e-4, gt=0, description="at its highest: a tenth of the steps warm up, a cosine follows"
    )
    rank: int = Field(16, ge=1, description="of LoRA's two factors")
    alpha: float = Field(32.0, gt=0, description="LoRA's update is scaled by alpha / rank")
    seed: int = Field(0, ge=0, description="of the order of the text, and of LoRA's first factor")
    save_every: int = Field(
        50, ge=1, description="steps between states from which a restart goes on"
    )
    workers: int = Field(
        1, ge=1, description="of `sparseramp recover`: more share each batch, by Ray Train"
    )

    @property
    def has_answers(self) -> bool:
        """Whether what is trained on are conversations."""
        return bool(self.messages or self.question)

    @model_validator(mode="after")
    def _columns(self) -> "RecoverySpec":
        if bool(self.question) != bool(self.answer):
            raise ValueError("recovery.question and recovery.answer need each other")
        if self.messages and (self.question or self.column):
            raise ValueError("recovery.messages stands for question, answer and column: drop them")
        if self.question and self.column:
            raise ValueError("recovery.column is for text: drop it, or question and answer")
        return self

    def replayable(self) -> dict[str, Any]:
        """What decides results; {} where nothing is fine-tuned."""
        return self.model_dump(exclude={"save_every", "workers"}) if self.steps else {}
