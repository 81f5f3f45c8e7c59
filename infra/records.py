"""Records: what a trial is asked and what it answers, as they stand in a run directory.

    TrialResult.model_validate_json(Path("runs/quickstart/trials/00003.json").read_text())

They are plain data, so that the driver, a Ray worker and a reader of the files share them
without importing torch.
"""

import math
from typing import Literal

from pydantic import Field

from infra.errors import UserError, nearest
from infra.frozen import Frozen
from infra.recovery_spec import RecoverySpec
from infra.specs import CalibrationSpec, DataSpec, Modality, ModelSpec, PruneSpec

Split = Literal["selection", "report"]
PASSES = 4  # of a token with gradients: a forward, again for its backward, which takes two
SHOWN = 12  # windows whose answers are kept in words
LARGEST_EXPONENT = 700.0  # exp of it is 1e304; little more, and it is no number


def finite_exp(value: float) -> float | None:
    """exp; None where that is too large to be written down, which JSON has no other word for."""
    return math.exp(value) if value <= LARGEST_EXPONENT else None


class MatrixRecord(Frozen):
    """One prunable matrix; `matrix` ends in `[e]` for expert e of a fused parameter."""

    block: int
    matrix: str
    params: int
    tower: str = Field("", description="of a multimodal model, what the block is a part of")
    rate: float = 0.0
    zeros: int = 0
    bits: float = Field(0.0, description="per weight, scales counted; 0: it was not rounded")


class ModelRecord(Frozen):
    """What a model is made of, found by watching one forward."""

    source: str
    architecture: str
    modality: Modality = "language"
    dtype: str
    sha256: str = Field(description="of the dense weights as they are mapped")
    blocks: list[str]
    matrices: list[MatrixRecord]
    total_params: int
    unseen: list[str] = Field(default=[], description="matrices of blocks in no known product")
    unit: str = Field("token", description="what a loss is the mean of: token, image, answer")
    scores: list[str] = Field(default=[], description="what is measured of it beside the loss")
    context: int = Field(description="longest context the model states")
    width: int = Field(0, description="of the hidden state")
    inner: int = Field(0, description="largest side of a matrix in a block")
    outputs: int = Field(0, description="of the head: the vocabulary of a language model")
    batch_tokens: int = Field(0, description="that pass a block, and the head, at once")
    window_tokens: int = Field(0, description="of an image in its first block; 0: text decides")
    adds_bos: bool = False
    profile: list[float] = Field(
        default=[], description="what the spec's allocation measured, one number per matrix"
    )
    dense_loss: float = Field(0.0, description="nats per token on the first evaluated batch")
    data_sha256: dict[str, str] = Field(default={}, description="of the documents of each split")
    licence: str = ""

    def towers(self) -> list[str]:
        """The tower of each block, in order; empty names in a model that is one."""
        found = {matrix.block: matrix.tower for matrix in self.matrices}
        return [found.get(block, "") for block in range(len(self.blocks))]

    def block_params(self) -> list[int]:
        """Prunable parameters of each block, in order."""
        sizes = [0] * len(self.blocks)
        for matrix in self.matrices:
            sizes[matrix.block] += matrix.params
        return sizes


class TrialSpec(Frozen):
    """One sweep: prune the model and measure it. `prune` is the candidate."""

    number: int
    stage: Literal["search", "final"]
    rung: int = Field(0, description="fidelity; losses of different rungs are not comparable")
    model: ModelSpec
    data: DataSpec
    calibration: CalibrationSpec
    prune: PruneSpec
    profile: list[float] = Field(
        default=[], description="what an allocation measured, one number per matrix"
    )
    split: Split
    windows: int
    context: int = Field(description="tokens per window")
    tasks: list[str] = Field(default=[], description="lm-eval tasks that measure it as well")
    task_rows: int = Field(0, description="rows of each: the first, or those after for selection")
    task_data: str = ""
    error_curves: bool = Field(False, description="a dense copy rides along")
    checkpoint: bool = Field(False, description="save the pruned model and verify it")
    recovery: RecoverySpec | None = Field(None, description="fine-tune it, and measure it again")


class BlockError(Frozen):
    """Error of one block's output against dense, over all evaluated tokens."""

    block: int
    absolute: float = Field(description="mean of ||H - H~||^2 per token")
    relative: float = Field(description="||H - H~|| / ||H||")
    cosine: float
    made: float = Field(0.0, description="mean of ||f~(X~) - f(X~)||^2 per token: by pruning f")
    carried: float = Field(0.0, description="mean of ||f(X~) - f(X)||^2 per token: by its input")
    cross: float = Field(0.0, description="absolute - made - carried: twice their inner product")
    gain: float = Field(0.0, description="sqrt(carried / absolute of the block before)")
    damage: float = Field(0.0, description="made, relative to ||H||^2")


class RecoveryRecord(Frozen):
    """What a fine-tune did, and that it kept the mask."""

    method: Literal["lora", "full"]
    steps: int
    tokens: int = Field(description="trained on, padding included; images where there are any")
    trained_params: int
    zeros_before: int = Field(description="in the prunable matrices")
    zeros_after: int
    losses: list[float] = Field(description="nats per scored unit, one per step")
    seconds: float


class Cost(Frozen):
    """What a trial took."""

    cold: bool = Field(False, description="the model was loaded for it")
    load_s: float = 0.0
    sweep_s: float = 0.0
    total_s: float = 0.0
    token_passes: int = Field(0, description="tokens times passes over all blocks")
    peak_memory_bytes: int = Field(
        0, description="on the GPU during the trial, else of the process since it began"
    )
    held_s: float = Field(0.0, description="a worker was held for it, lost dispatches included")
    gpus: float = Field(0.0, description="that the worker held")
    cpus: float = 0.0

    @property
    def used_s(self) -> float:
        """GPU-seconds; CPU-seconds where it had no GPU."""
        return self.held_s * (self.gpus or self.cpus or 1.0)


class TrialResult(Frozen):
    """The answer to a TrialSpec."""

    spec: TrialSpec
    state: Literal["complete", "failed"]
    cause: str = Field("", description="why it failed, on one line")
    tilt: float = Field(0.0, description="beta over the bound on its side")
    losses: list[float] = Field(default=[], description="nats per token, one per window")
    dense_losses: list[float] = Field(default=[], description="the same of the dense model")
    scores: dict[str, list[float]] = Field(
        default={}, description="by name, one per window or row of a task; the higher the better"
    )
    dense_scores: dict[str, list[float]] = {}
    answers: list[str] = Field(default=[], description="to the first windows, in words")
    dense_answers: list[str] = []
    expected: list[str] = Field(default=[], description="the right answers")
    recovered_losses: list[float] = Field(default=[], description="`losses` after the fine-tune")
    recovered_scores: dict[str, list[float]] = {}
    recovery: RecoveryRecord | None = None
    tokens: list[int] = Field(default=[], description="scored tokens per window")
    bytes: list[int] = Field(default=[], description="UTF-8 bytes of them")
    block_rates: list[float] = Field(default=[], description="mean over the weights of each block")
    clamped: int = Field(0, description="rates that had to be clamped to stay in range")
    matrices: list[MatrixRecord] = []
    fallbacks: list[str] = Field(default=[], description="matrices that saw no calibration token")
    notes: list[str] = Field(default=[], description="what a method had to do to prune a matrix")
    errors: list[BlockError] = []
    removed: dict[str, tuple[int, int]] = Field(
        default={}, description="whole units that went, and how many there were, by what they are"
    )
    cost: Cost = Cost()
    attempts: int = Field(1, description="dispatches, the lost ones included")
    weights_sha256: str = Field("", description="of the dense weights that it began with")
    host: str = ""
    node: str = Field("", description="Ray's id of the node that ran it")
    device: str = ""
    checkpoint: str = Field("", description="folder on `host` that holds the saved model")
    checkpoint_sha256: dict[str, str] = Field(default={}, description="of each file saved")

    @property
    def beta(self) -> float:
        """The common difference that was tried."""
        return self.spec.prune.beta

    @property
    def numbers(self) -> dict[str, float]:
        """The numbers of the allocation that were tried, beta among them."""
        return {"beta": self.beta, **self.spec.prune.parameters}

    @property
    def loss(self) -> float:
        """Mean nats per token over all windows."""
        return sum(x * n for x, n in zip(self.losses, self.tokens, strict=True)) / sum(self.tokens)

    def recovered(self) -> "TrialResult":
        """The same with what was measured after the fine-tune in the place of what was before."""
        after = {"losses": self.recovered_losses, "scores": self.recovered_scores, "recovery": None}
        return self.model_copy(update=after)

    def objective(self, name: str) -> list[float]:
        """What a search minimises, one number per window: the losses, or a score's negative.

        Raises UserError where the trial has no such score.
        """
        if name == "loss":
            return self.losses
        if name not in self.scores:
            raise UserError(
                f"search.objective={name!r} was not measured: "
                f"{nearest(name, ['loss', *self.scores])}"
            )
        return [-score for score in self.scores[name]]

    def objective_mean(self, name: str) -> float:
        """Its mean: over tokens for the loss, over windows or rows for a score."""
        if name == "loss":
            return self.loss
        values = self.objective(name)
        return sum(values) / len(values)

    def metrics(self) -> dict[str, float]:
        """The loss, the mean of each score, and of text the perplexity, unless it is too large."""
        found = {"loss": self.loss}
        if any(self.bytes) and (perplexity := finite_exp(self.loss)) is not None:
            found["perplexity"] = perplexity
        found |= {name: sum(each) / len(each) for name, each in self.scores.items()}
        after = self.recovered().metrics() if self.recovery else {}
        return found | {f"recovered_{name}": value for name, value in after.items()}


class ModelQuestion(TrialSpec):
    """What a run asks before its first trial; a worker answers as it runs a trial."""

    key: str = Field(description="the same for whoever would get the same answer")
    sizes: list[TrialSpec] = Field(
        default=[], description="describe the model by these; none: measure for the allocation"
    )


class ModelAnswer(TrialResult):
    """The answer to a ModelQuestion; the cause of a failed one is what the user is told."""

    model: ModelRecord | None = None
    measured: list[float] = Field(default=[], description="one number per matrix")


class SpeedLayer(Frozen):
    """What an engine made of one linear layer."""

    name: str
    shape: tuple[int, int] = Field(description="out x in")
    sparsity: float
    engine: str
    reason: str = Field("", description="why it stays dense")
    dense_bytes: int
    encoded_bytes: int


class SpeedEngine(Frozen):
    """One engine's model: what it holds, and how far its answers are from the dense model's."""

    name: str
    refusal: str = Field("", description="why it does not run here; nothing else is known then")
    baseline: bool = Field(False, description="multiplies by zeros as well")
    layers: list[SpeedLayer] = []
    resident_bytes: int = Field(0, description="of all weights, as the engine holds them")
    peak_bytes: int = Field(0, description="of the weights and the most that a case needed beside")
    same_tokens: int | None = Field(None, description="greedy tokens before one differs")
    kl: float = Field(0.0, description="to the dense model, nats per token or image")
    logit_difference: float = Field(0.0, description="the largest, from the dense model")


class SpeedCase(Frozen):
    """One thing that was timed, on all engines in turn."""

    kind: Literal["prefill", "first token", "first token after an image", "decode", "images"]
    batch: int
    length: int = Field(description="tokens of the prompt; 0 for images")
    unit: Literal["ms", "tokens/s", "images/s"]
    work: int = Field(description="tokens or images of one timing; 0 where its time counts")
    seconds: dict[str, list[float]] = Field(description="of each timing, by engine")


class SpeedRecord(Frozen):
    """How fast a checkpoint runs on the engines of one machine."""

    checkpoint: str
    modality: Modality
    architecture: str
    dtype: str
    sparsity: float = Field(description="share of zeros in the prunable matrices")
    stored_bytes: int = Field(description="of its safetensors files")
    device: str
    threads: int
    host: str
    engines: list[SpeedEngine]
    cases: list[SpeedCase]
