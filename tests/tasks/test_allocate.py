"""allocate(): named rates of real modules, the model untouched; and rates in a trial.

python -m pytest tests/tasks/test_allocate.py
"""

import json
import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from infra.errors import UserError
from infra.records import TrialSpec
from infra.specs import CalibrationSpec, DataSpec, ModelSpec, PruneSpec
from modalities.held import HeldModality
from tasks import trial
from tasks.allocation import ALLOCATIONS, allocate, load_rates, save_rates
from tasks.allocation.activations import dense_pass, dlp, owl
from tasks.allocation.weights import alpha_mid, lamp_scores, spectrum
from tests.models import build, write_checkpoint

IDS = [torch.arange(2, 22).reshape(2, 10), torch.arange(30, 37)]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are so small that threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def models() -> Any:
    made: dict[str, Any] = {}
    return lambda family: made.setdefault(family, build(family))


def sizes(model: nn.Module, rates: dict[str, float]) -> list[int]:
    """Weights of each named matrix; the name must be one of the model's parameters."""
    found = []
    for name in rates:
        parameter, _, expert = name.partition("[")
        weight = model.get_parameter(parameter)
        found.append((weight[int(expert.rstrip("]"))] if expert else weight).numel())
    return found


def check(model: nn.Module, rates: dict[str, float], sparsity: float) -> None:
    params = sizes(model, rates)
    with HeldModality(model, IDS) as held:
        names = [f"{b.name}.{m.name}" for b in held.blocks for m in b.matrices]
    assert list(rates) == names
    mean = sum(r * p for r, p in zip(rates.values(), params, strict=True)) / sum(params)
    assert mean == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= rate < 1 for rate in rates.values())


def quick(name: str) -> dict[str, Any]:
    """Options that make a measurement small."""
    return {"samples": 1} if name in ("ecoflap", "neuronal") else {}


COMBINATIONS = [
    (family, name)
    for family in ("llama", "gpt2", "mixtral")
    for name, allocation in ALLOCATIONS.items()
    if family == "llama" or allocation.measure is not None
    if (family, name) != ("gpt2", "ecoflap")
]


@pytest.mark.filterwarnings("ignore:.*clamped rates")
@pytest.mark.parametrize("family, name", COMBINATIONS)
def test_a_plain_model_gets_named_rates_and_stays_as_it_is(
    models: Any, family: str, name: str
) -> None:
    model = models(family).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    experts = model.config._experts_implementation
    rates = allocate(name, model, 0.6, IDS, **quick(name))
    check(model, rates, 0.6)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert model.config._experts_implementation == experts
    assert all(p.requires_grad for p in model.parameters())
    if not ALLOCATIONS[name].needs_data:
        assert allocate(name, model, 0.6) == rates


@pytest.mark.parametrize("name", [n for n, a in ALLOCATIONS.items() if a.needs_data])
def test_what_looks_at_inputs_wants_some(models: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"{name} looks at inputs: give calibration"):
        allocate(name, models("llama"), 0.6)


@pytest.mark.filterwarnings("ignore:.*clamped rates")
@pytest.mark.parametrize("name", ["owl", "dlp", "alphapruning", "ecoflap", "neuronal", "lamp"])
def test_a_loaded_modality_gives_what_its_plain_model_gives(
    loaded: Any, text: DataSpec, name: str
) -> None:
    modality = loaded("llama")
    batches = modality.calibration_batches(text, CalibrationSpec(samples=2, length=16))
    rates = allocate(name, modality, 0.6, batches, **quick(name))
    ids = [row for batch in batches for row in batch.ids]
    assert allocate(name, build("llama"), 0.6, ids, **quick(name)) == pytest.approx(
        rates, abs=1e-2 if name == "ecoflap" else 1e-5
    )


def _keep(inputs: list[Any], module: Any, args: Any, output: Any) -> None:
    inputs.append(args[0])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_owl_sees_the_inputs_that_hooks_see(models: Any, family: str) -> None:
    """An independent count: forward hooks on the modules that hold the matrices."""
    model = models(family)
    seen: dict[str, Any] = {}
    handles = []
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D") and ".0." in name:
            handles.append(module.register_forward_hook(partial(_keep, seen.setdefault(name, []))))
    with torch.no_grad():
        for ids in IDS:
            model.eval()(ids.reshape(-1, ids.shape[-1]))
    for handle in handles:
        handle.remove()
    scores = []
    for name, inputs in seen.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        weight = weight.T if family == "gpt2" else weight
        columns = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs]).norm(dim=0)
        scores.append((weight.abs() * columns).flatten())
    flat = torch.cat(scores)
    with HeldModality(model, IDS) as held:
        percent = owl(held, held.calibration, PruneSpec(parameters={"M": 2.0}))
        medians = dlp(held, held.calibration, PruneSpec())
    assert percent[0] == pytest.approx(
        100 * float((flat > 2 * flat.mean()).float().mean()), abs=0.02
    )
    assert medians[0] == pytest.approx(float(flat.median()), rel=1e-5)
    assert len(set(percent)) == len(held.blocks)


def test_experts_without_tokens_are_left_out(models: Any) -> None:
    """One token reaches two of four experts; the others say nothing about their block."""
    model = models("mixtral")
    with HeldModality(model, [torch.tensor([[5]])]) as held:
        used: list[int] = []
        dense_pass(held, held.calibration, lambda index, squares: used.append(len(squares)))
    assert used == [4 + 2 * 2] * 3  # attention, and two matrices of each expert
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("owl", "dlp"):
            check(model, allocate(name, model, 0.6, [torch.tensor([[5]])]), 0.6)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("name", ["global", "lamp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_threshold_over_all_matrices(
    models: Any, name: str, sparsity: float, dtype: torch.dtype
) -> None:
    """Against a sort of everything; bfloat16 has many equal scores."""
    model = models("llama").to(dtype)
    rates = allocate(name, model, sparsity)
    model.to(torch.float32)
    flat = {
        key: lamp_scores(w) if name == "lamp" else w.float().abs().flatten()
        for key, w in ((key, model.get_parameter(key).detach().to(dtype).float()) for key in rates)
    }
    everything = torch.cat(list(flat.values())).sort().values
    count = math.ceil(sparsity * len(everything))
    if count == 0:
        assert set(rates.values()) == {0.0}
        return
    threshold = everything[count - 1]
    for key, scores in flat.items():
        assert float((scores < threshold).float().mean()) <= rates[key] + 1e-6
        assert float((scores <= threshold).float().mean()) >= rates[key] - 1e-6


def test_lamp_scores_by_their_definition() -> None:
    weight = torch.tensor([[3.0, -1.0], [2.0, 0.0]])
    assert lamp_scores(weight).tolist() == pytest.approx([0, 1 / 14, 4 / 13, 1])
    assert lamp_scores(torch.zeros(2, 2)).tolist() == [0.0] * 4


def test_alpha_of_a_known_spectrum() -> None:
    """Eigenvalues at the quantiles of a power law with exponent 3."""
    e = (1 - (torch.arange(400) + 0.5) / 400) ** (-1 / 2)
    assert alpha_mid(e.double().numpy()) == pytest.approx(3, abs=0.05)
    assert len(spectrum(torch.ones(5, 3))) == 1  # rank one
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert len(spectrum(rotation)) == 8


def test_dead_matrices_have_rates_too(models: Any) -> None:
    """All zero, or of rank one: no spectrum to fit, no scores that differ."""
    model = build("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").zero_()
        model.get_parameter("model.layers.1.self_attn.q_proj.weight").fill_(0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("global", "lamp", "alphapruning", "owl", "dlp"):
            check(model, allocate(name, model, 0.6, IDS), 0.6)
        check(model, allocate("alphapruning", model, 0.6, mid=True), 0.6)


def test_rates_through_a_file(models: Any, tmp_path: Path) -> None:
    model, path = models("mixtral"), tmp_path / "rates.json"
    rates = allocate("lamp", model, 0.6)
    save_rates(rates, path)
    assert load_rates(path) == rates
    assert allocate(str(path), model, 0.6) == rates
    text = path.read_bytes()
    save_rates(load_rates(path), path)
    assert path.read_bytes() == text
    shuffled = dict(sorted(rates.items(), reverse=True))
    save_rates(shuffled, path)
    assert list(allocate(str(path), model, 0.6).items()) == list(rates.items())
    save_rates({name: round(rate, 4) for name, rate in rates.items()}, path)
    check(model, allocate(str(path), model, 0.6), 0.6)  # rounded by hand: repaired


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "is not JSON"),
        ("[1]", "expected one object"),
        ('{"a": 1.0}', r"a has rate 1\.0, which is not in \[0, 1\)"),
        ('{"a": true}', "a has rate True"),
        ('{"a": NaN}', "a has rate nan"),
        ('{"a": 0.5}', r"has no rate for model\.layers\.0\..*\(21 are missing\)"),
        (None, "cannot read rates"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    models: Any, tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "rates.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        allocate(str(path), models("llama"), 0.6)


def test_files_of_another_mean_or_model_are_refused(models: Any, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    rates = allocate("uniform", models("llama"), 0.6)
    save_rates(rates, path)
    with pytest.raises(UserError, match=r"removes 0\.6 on average: set prune\.sparsity=0\.6"):
        allocate(str(path), models("llama"), 0.7)
    save_rates(rates | {"model.layers.9.x": 0.6}, path)
    with pytest.raises(UserError, match=r"the model has no model\.layers\.9\.x"):
        allocate(str(path), models("llama"), 0.6)


def test_options(models: Any) -> None:
    model = models("llama")
    small, large = (allocate("owl", model, 0.6, IDS, lambda_=x, M=3) for x in (0.01, 0.1))
    assert max(large.values()) - min(large.values()) == pytest.approx(0.2)
    assert max(small.values()) - min(small.values()) == pytest.approx(0.02)
    assert allocate("arithmetic", model, 0.6, beta=0.1)["model.layers.0.mlp.up_proj.weight"] == (
        pytest.approx(0.5)
    )
    with pytest.warns(UserWarning, match="free: clamped rates: 1"):
        allocate("free", model, 0.6, block_0=0.9)
    with pytest.raises(UserError, match="not a number of owl"):
        allocate("owl", model, 0.6, IDS, epsilon=1)
    with pytest.raises(UserError, match=r"sparsity=1 is not in \[0, 1\)"):
        allocate("uniform", model, 1.0)


@pytest.fixture
def make(tmp_path: Path, cache: Path, text: DataSpec) -> Iterator[Any]:
    """A trial of tiny models with any allocation."""

    def spec(family: str, **prune: Any) -> TrialSpec:
        folder = tmp_path / family
        if not folder.exists():
            write_checkpoint(family, folder)
        return TrialSpec(
            number=0,
            stage="search",
            model=ModelSpec(source=str(folder), dtype="float32"),
            data=text,
            calibration=CalibrationSpec(samples=2, length=16),
            prune=PruneSpec(sparsity=0.6, **prune),
            split="selection",
            windows=2,
            context=16,
        )

    yield spec
    trial._loaded.clear()


@pytest.mark.parametrize("family, name", [("llama", "owl"), ("mixtral", "lamp"), ("llama", "bent")])
def test_a_trial_prunes_at_the_rates_of_what_was_measured(
    make: Any, family: str, name: str
) -> None:
    spec = make(family, allocation=name)
    profile = trial.measure_profile(spec)
    modality = trial.loaded(spec.model)
    assert len(profile) == (0 if name == "bent" else len(modality.matrices()))
    spec = TrialSpec.model_validate_json(
        spec.model_copy(update={"profile": profile}).model_dump_json()
    )
    result = trial.run_trial(spec)
    batches = modality.calibration_batches(spec.data, spec.calibration)
    rates = list(allocate(name, modality, 0.6, batches).values())
    assert [matrix.rate for matrix in result.matrices] == pytest.approx(rates)
    params = [matrix.params for matrix in result.matrices]
    assert sum(matrix.zeros for matrix in result.matrices) == round(0.6 * sum(params))
    for block, rate in enumerate(result.block_rates):
        inside = [m for m in result.matrices if m.block == block]
        assert rate == pytest.approx(
            sum(m.rate * m.params for m in inside) / sum(m.params for m in inside)
        )
    assert len(set(rates)) == {"owl": 3, "lamp": len(rates), "bent": 1}[name]


def test_a_trial_from_a_file(make: Any, tmp_path: Path) -> None:
    spec = make("llama", allocation="lamp")
    modality = trial.loaded(spec.model)
    path = tmp_path / "mine.json"
    save_rates(allocate("lamp", modality, 0.6), path)
    spec = make("llama", allocation=str(path))
    profile = trial.measure_profile(spec)
    assert profile == list(json.loads(path.read_text()).values())
    result = trial.run_trial(spec.model_copy(update={"profile": profile}))
    assert [matrix.rate for matrix in result.matrices] == profile
