"""lm-eval's tasks on the model in memory: the definitions' own prompts, rows, and pruned weights.

python -m pytest tests/tasks/test_zero_shot.py
"""

import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from flows.evaluate import evaluate
from infra.errors import UserError
from infra.records import TrialSpec
from infra.specs import CalibrationSpec, DataSpec, ModelSpec, PruneSpec
from tasks import trial, zero_shot
from tests.models import CONTEXT, FAMILIES, load, write_checkpoint
from tests.tasks.zero_shot_rows import (
    ONLY_ACC,
    PLACES,
    ROWS,
    Question,
    part_of_lm_eval,
    questions,
    write_data_sets,
)

NAMES = list(PLACES)


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zero_shot, "_manager", part_of_lm_eval)
    zero_shot._load.cache_clear()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_sets(tmp_path_factory.mktemp("data"))


def by_hand(modality: Any, asked: list[Question], before: str = "") -> dict[str, list[float]]:
    """`acc` and `acc_norm` of each row, one forward per choice."""
    accuracy, normed = [], []
    for question in asked:
        sums = []
        for context, continuation in zip(question.contexts, question.continuations, strict=True):
            ids = modality.tokenizer(before + context + continuation).input_ids[-CONTEXT - 1 :]
            count = len(continuation.encode())
            with torch.no_grad():
                logits = modality.model(input_ids=torch.tensor([ids[:-1]])).logits[0]
            losses = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
            sums.append(-float(losses[-count:].sum()))
        ratios = [total / n for total, n in zip(sums, question.lengths, strict=True)]
        accuracy.append(float(sums.index(max(sums)) == question.gold))
        normed.append(float(ratios.index(max(ratios)) == question.gold))
    return {"acc": accuracy, "acc_norm": normed}


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_lm_evals_own(loaded: Any, data: Path, name: str) -> None:
    modality = loaded("llama")
    mmlu = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    expected = by_hand(modality, questions(name, data), mmlu if name.startswith("mmlu") else "")
    if name in ONLY_ACC:
        del expected["acc_norm"]
    scores = zero_shot.zero_shot(modality, [name], data=str(data))
    assert scores == {f"{name}/{metric}": values for metric, values in expected.items()}
    one_by_one = zero_shot.zero_shot(modality, [name], data=str(data), batch_divisor=10**6)
    assert one_by_one == scores


def test_a_chat_template_is_not_applied_to_text(
    loaded: Any, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modality = loaded("llama")
    plain = zero_shot.zero_shot(modality, ["boolq"], data=str(data))
    template = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
    monkeypatch.setattr(modality.tokenizer, "chat_template", template)
    assert zero_shot.zero_shot(modality, ["boolq"], data=str(data)) == plain


def test_batches_hold_so_many_tokens(loaded: Any, data: Path) -> None:
    modality = loaded("llama")
    shapes: list[tuple[int, int]] = []

    def record(_: Any, arguments: tuple[torch.Tensor]) -> None:
        shapes.append(tuple(arguments[0].shape))

    handle = modality.model.register_forward_pre_hook(record)
    zero_shot.zero_shot(modality, ["hellaswag"], data=str(data), batch_divisor=2)
    handle.remove()
    assert sum(rows for rows, _ in shapes) == 4 * ROWS
    assert all(128 < rows * length <= 256 for rows, length in shapes[:-1])


def test_rows_are_chosen_and_stay_in_order(loaded: Any, data: Path) -> None:
    modality = loaded("llama")
    asked = ["hellaswag", "ai2_arc"]  # the second is a tag: it stands for two tasks
    whole = zero_shot.zero_shot(modality, asked, data=str(data))
    assert list(whole) == [
        f"{task}/{metric}"
        for task in ("hellaswag", "arc_challenge", "arc_easy")
        for metric in ("acc", "acc_norm")
    ]
    assert {len(values) for values in whole.values()} == {ROWS}
    first = zero_shot.zero_shot(modality, asked, rows=3, data=str(data))
    then = zero_shot.zero_shot(modality, asked, rows=3, skip=3, data=str(data))
    for name, values in whole.items():
        assert first[name] == values[:3]
        assert then[name] == values[3:6]
    assert zero_shot.zero_shot(modality, asked, rows=99, data=str(data)) == whole


def test_examples_before_the_question(loaded: Any, data: Path) -> None:
    modality = loaded("llama")
    split = data / "hails" / "mmlu_no_train" / "anatomy"
    from datasets import load_from_disk

    example = load_from_disk(str(split / "dev"))[0]
    listed = [f"{a}. {b}" for a, b in zip("ABCD", example["choices"], strict=True)]
    answer = f"Answer: {'ABCD'[example['answer']]}\n\n"
    before = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    before += "\n".join([example["question"].strip(), *listed, answer])
    both = zero_shot.zero_shot(modality, ["mmlu_anatomy@1", "mmlu_anatomy"], data=str(data))
    expected = by_hand(modality, questions("mmlu_anatomy", data), before)
    assert both["mmlu_anatomy@1/acc"] == expected["acc"]
    leaf = zero_shot._chosen(modality, ["mmlu_anatomy@1"], 0, 0, str(data))["mmlu_anatomy@1"][0]
    context = leaf.fewshot_context(leaf.eval_docs[0], 1)
    assert context == before + questions("mmlu_anatomy", data)[0].contexts[0]
    assert "mmlu_anatomy/acc" in both


def test_answers_in_free_text_after_examples(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each filter of gsm8k reads another answer out of the text."""
    kind, options = FAMILIES["llama"]
    monkeypatch.setitem(FAMILIES, "llama-long", (kind, options | {"max_position_embeddings": 2048}))
    rows = [{"question": f"{n} and 1?", "answer": f"so #### {n + 1}"} for n in range(6)]
    for split in ("train", "validation"):
        Dataset.from_list(rows).save_to_disk(tmp_path / "gsm8k/main" / split)
    modality = loaded("llama-long")
    modality.tokenizer.eos_token = "<s>"
    prompts = list[str]()

    def answer(_: Any, context: torch.Tensor, **__: Any) -> torch.Tensor:
        prompts.extend(modality.tokenizer.batch_decode(context, skip_special_tokens=True))
        ids = modality.tokenizer(" is 3 #### 2", add_special_tokens=False).input_ids
        return torch.cat([context, torch.tensor([ids] * len(context))], dim=1)

    generated = zero_shot.zero_shot(modality, ["gsm8k@2"], rows=3, data=str(tmp_path))
    assert {name: len(values) for name, values in generated.items()} == {
        "gsm8k@2/exact_match,strict-match": 3,
        "gsm8k@2/exact_match,flexible-extract": 3,
    }
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM._model_generate", answer)
    scores = zero_shot.zero_shot(modality, ["gsm8k"], rows=3, data=str(tmp_path))
    assert scores["gsm8k/exact_match,strict-match"] == [0.0, 1.0, 0.0]
    assert all(prompt.count("Question: ") == 6 for prompt in prompts)


def test_nothing_is_printed_asked_of_the_network_or_left_behind(
    loaded: Any, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    modality = loaded("llama")
    files = sorted(data.rglob("*"))
    tokens = len(modality.tokenizer), modality.tokenizer.pad_token
    dense = {name: p.clone() for name, p in modality.model.named_parameters()}
    zero_shot.zero_shot(modality, NAMES, data=str(data))
    assert capfd.readouterr() == ("", "")
    assert sorted(data.rglob("*")) == files
    assert (len(modality.tokenizer), modality.tokenizer.pad_token) == tokens
    for name, parameter in modality.model.named_parameters():
        assert torch.equal(parameter, dense[name])


@pytest.mark.parametrize(
    "task, options, message",
    [
        ("bolq", {}, "lm-eval has no task 'bolq': did you mean 'boolq'?"),
        ("piqa@few", {}, "piqa@few: write the number of examples after @, such as piqa@5"),
        ("piqa@5", {}, "the data of piqa has no train split to take examples from"),
        ("gsm8k", {}, "holds no openai/gsm8k/main for gsm8k: it has ai2_arc, "),
        ("rte", {"rows": 5, "skip": 5}, "rte has 7 rows, the selection needs 5 \\+ 5: at most"),
        ("rte", {"rows": 1}, "rte: one row has no standard error, set evaluation.task_rows=2"),
        ("rte", {"data": ""}, r"rte: .* \(.*\): set evaluation.task_data to a folder, say pypi:"),
        ("rte", {"data": "/nowhere"}, "/nowhere: no such file or folder"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_the_model_runs(
    loaded: Any, data: Path, task: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        zero_shot.check_tasks(loaded("llama"), [task], **({"data": str(data)} | options))
    assert "\n" not in str(refused.value)


def test_a_task_whose_split_is_missing(loaded: Any, data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "glue/rte/validation", tmp_path / "nyu-mll/glue/rte/train")
    with pytest.raises(UserError, match="the data of rte has no validation split, only train"):
        zero_shot.check_tasks(loaded("llama"), ["rte"], data=str(tmp_path))


def test_other_modalities_are_refused() -> None:
    class VisionModality:
        """Enough to be refused."""

        writer = None

    vision: Any = VisionModality()
    with pytest.raises(UserError, match="continue a text are given tasks, no vision ones"):
        zero_shot.check_tasks(vision, ["rte"])


@pytest.fixture
def spec(tmp_path: Path, cache: Path, text: DataSpec, data: Path) -> Iterator[TrialSpec]:
    yield TrialSpec(
        number=0,
        stage="final",
        model=ModelSpec(source=str(write_checkpoint("llama", tmp_path / "model")), dtype="float32"),
        data=text,
        calibration=CalibrationSpec(samples=4, length=16),
        prune=PruneSpec(sparsity=0.6, allocation="uniform"),
        split="report",
        windows=3,
        context=16,
        tasks=["arc_easy", "winogrande"],
        task_rows=3,
        task_data=str(data),
        error_curves=True,
        checkpoint=True,
    )
    trial._loaded.clear()


def test_a_trial_measures_the_pruned_model_and_the_dense_one_once(spec: TrialSpec) -> None:
    record = trial.describe_model([spec])
    modality = trial.loaded(spec.model)
    dense = {name: p.clone() for name, p in modality.model.named_parameters()}
    asked = {"rows": 3, "data": spec.task_data}
    before = zero_shot.zero_shot(modality, spec.tasks, **asked)
    result = trial.run_trial(spec)
    assert record.scores == list(result.scores)
    assert result.dense_scores == before
    saved = load(Path(result.checkpoint))
    assert result.scores == zero_shot.zero_shot(saved, spec.tasks, **asked)
    assert result.objective("winogrande/acc") == [-x for x in result.scores["winogrande/acc"]]
    for name, parameter in modality.model.named_parameters():
        assert torch.equal(parameter, dense[name]), name
    assert record.sha256 == result.weights_sha256
    steep = spec.model_copy(
        update={"prune": PruneSpec(sparsity=0.6, beta=0.1), "checkpoint": False}
    )
    result = trial.run_trial(steep)
    assert (set(result.scores), result.dense_scores) == (set(before), {})
    for name, parameter in modality.model.named_parameters():
        assert torch.equal(parameter, dense[name]), name


def test_a_selection_uses_the_rows_after_those_reported(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched = {"split": "selection", "stage": "search", "checkpoint": False}
    nothing = {"prune": PruneSpec(sparsity=0.0)}
    result = trial.run_trial(spec.model_copy(update=searched | nothing))
    modality = trial.loaded(spec.model)
    whole = zero_shot.zero_shot(modality, spec.tasks, data=spec.task_data)
    assert result.scores == {name: values[3:6] for name, values in whole.items()}
    with pytest.raises(UserError, match="arc_easy has 7 rows, the selection needs 4 \\+ 4"):
        trial.describe_model([spec.model_copy(update=searched | {"task_rows": 4})])
    monkeypatch.setattr("tasks.sweep.sweep", lambda *_, **__: pytest.fail("it was swept first"))
    with pytest.raises(UserError, match="did you mean 'boolq'"):
        trial.run_trial(spec.model_copy(update={"tasks": ["bolq"]}))


def test_a_failed_task_leaves_the_dense_model(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    modality = trial.loaded(spec.model)
    dense = {name: p.clone() for name, p in modality.model.named_parameters()}

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of something")

    monkeypatch.setattr("lm_eval.models.huggingface.HFLM.loglikelihood", fail)
    with pytest.raises(RuntimeError, match="out of something"):
        trial.run_trial(spec)
    for name, parameter in modality.model.named_parameters():
        assert torch.equal(parameter, dense[name]), name


def test_evaluate_prints_every_metric(spec: TrialSpec, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(spec.model.source)
    options = [f"data.source={spec.data.source}", "evaluation.context=16"]
    options += ["evaluation.report_windows=4", f"evaluation.task_data={spec.task_data}"]
    tasks = json.dumps([*zero_shot.SEVEN, "rte"])
    answer = evaluate(model, [*options, f"evaluation.tasks={tasks}", "evaluation.task_rows=5"])
    lines = capsys.readouterr().out.splitlines()
    assert "lm-eval, validation" in lines
    line = next(line for line in lines if line.startswith("  hellaswag/acc_norm "))
    assert "±" in line and line.endswith("%  (n = 5 rows)")
    assert answer["task_split"] == "validation"
    assert answer["metrics"]["rte/acc"]["n"] == 5
    assert not any("average" in name for name in answer["metrics"])
    tasks = json.dumps(list(zero_shot.SEVEN))
    answer = evaluate(model, [*options, f"evaluation.tasks={tasks}"], as_json=True)
    means = [answer["metrics"][f"{task}/acc"]["mean"] for task in zero_shot.SEVEN]
    assert answer["metrics"]["average of 7/acc"]["mean"] == pytest.approx(sum(means) / 7)
    assert answer["metrics"]["average of 7/acc"]["n"] == 7 * ROWS


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("free", [1 << 40, 0])
def test_on_a_device_with_room_for_all_blocks_and_for_one(
    spec: TrialSpec, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
    result = trial.run_trial(spec)
    modality = trial.loaded(spec.model)
    assert all(p.device.type == "cpu" for b in modality.blocks for p in b.module.parameters())
    saved = load(Path(result.checkpoint))  # on the CPU
    scores = zero_shot.zero_shot(saved, spec.tasks, rows=3, data=spec.task_data)
    assert result.scores == scores
    assert set(result.dense_scores) == set(scores)
