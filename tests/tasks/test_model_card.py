"""The model card: front matter that the hub accepts, and the facts that a reader needs."""

import tomllib
from typing import Any

import pytest
from huggingface_hub import ModelCard

from infra.recovery_spec import RecoverySpec
from infra.spec_files import parse_spec
from tasks.model_card import model_card, packed_card, recovered_card


def make_report(source: str = "org/base@main", licence: str = "Apache-2.0") -> dict[str, Any]:
    raw = {"model": {"source": source}, "data": {"source": "/home/me/texts/wiki.txt"}}
    raw["data"]["calibration"] = "allenai/c4:en/one.json.gz"

    def metrics(mean: float) -> dict[str, Any]:
        ppl = {"mean": mean, "stderr": 1.5, "n": 32, "unit": "perplexity/token"}
        bits = {"mean": 1.52, "stderr": 0.011, "n": 32, "unit": "bits/byte"}
        loss = {"mean": 4.1, "stderr": 0.02, "n": 32, "unit": "nats/token"}
        return {"perplexity": ppl, "bits_per_byte": bits, "loss": loss}

    sparse = {"beta": 0.0083, "tilt": 0.3, "sparsity": 0.6, "bits": 0.0}
    sparse |= {"allocation": "arithmetic"}
    return {
        "spec": parse_spec(raw, "test.toml").model_dump(),
        "model": {
            "architecture": "LlamaForCausalLM",
            "dtype": "bfloat16",
            "sha256": "ab" * 32,
            "licence": licence,
        },
        "dense": {"metrics": metrics(19.9)},
        "uniform": {"metrics": metrics(84.0), **sparse, "beta": 0.0},
        "best": {"metrics": metrics(69.2), **sparse},
        "gain": {"conclusion": "At 60 % sparsity, it helps.", "n_seeds": 3, "seeds": [4, 5, 6]},
        "windows": "windows",
        "protocol": "ladder",
        "command": "search",
        "version": "0.1.0",
    }


def test_the_hub_reads_the_front_matter() -> None:
    card = ModelCard(model_card(make_report()))
    assert card.data.get("base_model") == "org/base"
    assert card.data.get("license") == "apache-2.0"
    assert card.data.get("datasets") == ["allenai/c4"]
    measured = {r.metric_type: r.metric_value for r in card.data.get("eval_results")}
    assert measured == {"perplexity": 69.2, "bits_per_byte": 1.52}


def test_a_perplexity_that_is_no_number_is_left_out() -> None:
    report = make_report()
    report["best"]["metrics"]["perplexity"] |= {"mean": None, "stderr": None}
    text = model_card(report)
    assert [r.metric_type for r in ModelCard(text).data.get("eval_results")] == ["bits_per_byte"]
    assert "| best | over 1e304 |" in text


def test_the_storage_is_nobodys_business() -> None:
    report = make_report()
    report["spec"]["search"]["storage"] = "postgresql://me:secret@host/db"
    assert "secret" not in model_card(report)


def test_facts_that_a_reader_needs() -> None:
    text = model_card(make_report())
    for fact in (
        "At 60 % sparsity, it helps.",
        "| best | 69.2 ± 1.5 | 1.520 ± 0.011 | 60.00 % |",
        "| dense | 19.9 ± 1.5 | 1.520 ± 0.011 | 0.00 % |",
        "beta = 0.0083 (tilt 0.300)",
        "calibration seed\n4",
        "sparseramp search spec.toml",
        "`sparseramp pack`",
    ):
        assert fact in text
    assert "/home/me" not in text.partition("## How to make it again")[0]


def test_settings_can_be_read_back_as_a_spec() -> None:
    report = make_report()
    settings = model_card(report).partition("```toml\n")[2].partition("```")[0]
    spec = parse_spec(tomllib.loads(settings), "card")
    assert spec.model_dump() == report["spec"]


@pytest.mark.parametrize("source", ["pypi:tiny==1/t/tiny.gguf", "/home/me/models/tiny"])
def test_what_is_not_on_the_hub_is_not_claimed_to_be(source: str) -> None:
    text = model_card(make_report(source, licence=""))
    card = ModelCard(text)
    assert card.data.get("base_model") is None and card.data.get("license") is None
    assert "not stated by the base model" in text
    assert "# tiny, 60 % sparse" in text


def test_a_smaller_model_is_loaded_by_what_can() -> None:
    report = make_report()
    report["spec"]["prune"] |= {"method": "sparsegpt", "pattern": "structured"}
    text = model_card(report, smaller=True)
    assert "60 % of its blocks removed" in text and "are gone, with whole channels" in text
    assert "load_smaller" in text and "AutoModel" not in text and "masked" not in text
    packed = packed_card(text)
    assert "load_packed" in packed and "load_smaller" not in packed
    report["spec"]["prune"] |= {"pattern": "unstructured"}  # of a model that was smaller already
    text = model_card(report, smaller=True)
    assert "load_smaller" in text and "AutoModel" not in text and "library_name" not in text
    assert "60 % sparse" in text and "masked" in text and "masked" not in packed_card(text)


def test_the_card_of_packed_codes_says_so() -> None:
    report = make_report()
    report["best"]["bits"] = 4.125
    assert "numbers of few bits" in packed_card(model_card(report))
    assert "few bits" not in packed_card(model_card(make_report()))


def test_paper_protocol_is_said() -> None:
    assert "paper protocol" not in model_card(make_report())
    assert "selected on this split" in model_card({**make_report(), "protocol": "paper"})


def test_the_card_of_a_packed_copy_says_how_to_load_it() -> None:
    card = "# A\n\n**The weights are masked**: zeros.\n\n```python\nbefore\n```\n\n## How to make\n"
    packed = packed_card(card)
    assert "masked" not in packed
    assert "before" not in packed
    assert 'load_packed("path/to/this/folder")' in packed
    assert packed.endswith("\n\n## How to make\n")


def test_what_was_packed_is_not_any_more_after_a_fine_tune() -> None:
    report = make_report()
    card, metrics = model_card(report), report["best"]["metrics"]
    answer = {"before": metrics, "after": metrics, "sparsity": 0.6, "of": "windows"}
    answer["conclusion"] = "10 steps of LoRA take perplexity from 370 to 95."
    spec = report["spec"] | {"recovery": RecoverySpec(steps=10).model_dump()}
    told = recovered_card(packed_card(card), spec, answer)
    assert "packed" not in told and answer["conclusion"] in told
    assert told == recovered_card(card, spec, answer)
