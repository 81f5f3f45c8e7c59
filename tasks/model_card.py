"""The README.md of a sparse checkpoint, with the front matter that the hub reads.

Path("runs/quickstart/best/README.md").write_text(model_card(report))
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from infra.bits import LEAST, MOST, ROUNDING
from infra.spec_files import toml_value
from tasks.statistics import label, plus_minus

_KINDS = {  # task and library, as the hub calls them
    "language": ("text-generation", "transformers"),
    "vision": ("image-classification", "timm"),
    "multimodal": ("image-text-to-text", "transformers"),
}
_LOADING = {
    "language": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")""",
    "vision": """import timm

model = timm.create_model("local-dir:path/to/this/folder", pretrained=True)""",
    "multimodal": """from transformers import AutoModel

model = AutoModel.from_pretrained("path/to/this/folder")""",
}
_MASKED = """\
**The weights are masked**: zeros are stored and multiplied like other numbers. `sparseramp pack`
stores them in less space, and `sparseramp speed` measures which engines gain from them."""
_SMALLER = """\
**The model is smaller**: its blocks differ in width, which the configurations of transformers and
timm cannot say. `structure.json` does, and a checkout of Sparseramp loads it."""
_LOADING_SMALLER = """from modalities.smaller import load_smaller

model = load_smaller("path/to/this/folder")"""
_SECTION = r".*?(?=^## )"  # to its end
_HUB = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(@[\w./-]+)?(:[^:]+)?")


def model_card(report: Mapping[str, Any], *, smaller: bool = False) -> str:
    """What was made, from what, how well it does, and how to make it again.

    `report` is what report.json holds; read are `spec`, `model`, `dense`, `uniform`, `best`,
    `gain`, `protocol`, `command` and `version`. `smaller` says that its blocks lack channels or
    heads, by this pruning or an earlier one.
    """
    spec, model, best = report["spec"], report["model"], report["best"]
    source, prune = spec["model"]["source"], spec["prune"]
    rounds, bits = prune["method"] in ROUNDING, f"{best['bits']:.4g} bits"
    structured = prune["pattern"] == "structured"
    gone = "are gone, with whole channels and heads" if structured else "are zero"
    share = f"{100 * best['sparsity']:.4g} %"
    sparse = (
        [] if rounds else [f"{share} of its blocks removed" if structured else f"{share} sparse"]
    )
    name = ", ".join([short(source), *sparse, *([bits] if best["bits"] else [])])
    texts = {use: spec["data"][use] or spec["data"]["source"] for use in ("calibration", "report")}
    paper, length = report["protocol"] == "paper", spec["evaluation"]["context"]
    warning = "; **paper protocol: beta was selected on this split**" if paper else ""
    return f"""---
{_front_matter(report, name, texts, smaller)}
---

# {name}

{report["gain"]["conclusion"]}

{_rows({side: report[side] for side in ("dense", "uniform", "best") if report[side]})}
{_recovered(report)}
± is one standard error; n = {best["metrics"]["loss"]["n"]} {_windows(report["windows"], length)}
of {_public(texts["report"])}, calibrated
{_times(report["gain"]["n_seeds"])}{warning}. The weights here are those of calibration seed
{report["gain"]["seeds"][0]}.

## What was done

- **Base model**: {_public(source)} ({model["architecture"]}, {model["dtype"]}; sha256 of the
  weights `{model["sha256"]}`).
- **Licence**: {model["licence"] or "not stated by the base model; its terms apply"}.
- **Method**: {prune["method"]}, calibrated on {calibrated_on(spec, report["windows"])} of
  {_public(texts["calibration"])}.
- **Sparsity**: {best["sparsity"]:.6f} of the weights in blocks {gone}. Embeddings, norms and
  {"the output head are whole" if structured else "heads are dense"}.{_rounded(best)}
- **Rates**: {_rates(best, prune)}
  `sparsity.json` lists every matrix.

{_how_stored(spec["model"]["modality"], structured, smaller)}

## How to make it again

With Sparseramp {report["version"]}, `sparseramp {report["command"]} spec.toml`, where spec.toml is

```toml
{settings(spec)}
```
"""


def recovered_card(
    card: str, spec: Mapping[str, Any], answer: Mapping[str, Any], *, smaller: bool = False
) -> str:
    """The card of a checkpoint, changed to that of what a fine-tune made of it.

    `card` is empty where the checkpoint has none, `spec` is that of the fine-tune, and `answer`
    what recovery.json holds; read are `before`, `after`, `sparsity`, `of`, `conclusion`. Where the
    weights were packed, they are not any more; `smaller` is as for `model_card`.
    """
    stored = f"{_how_stored(spec['model']['modality'], False, smaller)}\n\n"  # zeros were packed
    card = re.sub(r"\*\*The weights are packed\*\*" + _SECTION, stored, card, flags=re.S | re.M)
    name, recovery, windows = short(spec["model"]["source"]), spec["recovery"], answer["of"]
    card = card or f"# {name}\n\nThe checkpoint came without a card of ours.\n"
    parsed = ModelCard(card) if card.startswith("---\n") else None
    if parsed:
        parsed.data["eval_results"] = _results(answer["after"], spec, windows)
        card = f"---\n{parsed.data.to_yaml()}\n---\n{parsed.text}"
    before, after = ({"metrics": answer[side]} for side in ("before", "after"))
    share = {"sparsity": answer["sparsity"]}
    settings = "\n".join(f"recovery.{key} = {toml_value(value)}" for key, value in recovery.items())
    length = spec["evaluation"]["context"]
    told = f"""\
**The weights here were fine-tuned since**: what follows this section is about those before.
{answer["conclusion"]}

{_rows({"before": before | share, "after": after | share})}

± is one standard error; n = {answer["after"]["loss"]["n"]} {_windows(windows, length)}
of {_public(spec["data"]["report"] or spec["data"]["source"])}. Trained on
{_public(recovery["source"] or spec["data"]["calibration"] or spec["data"]["source"])} by
`sparseramp recover` with

```toml
{settings}
```

## Before the fine-tune
"""
    return re.sub(r"^# .*\n", lambda title: f"{title[0]}\n{told}", card, count=1, flags=re.M)


def packed_card(card: str) -> str:
    """The card of a checkpoint, changed to that of its packed copy."""
    how = "a bit for every weight, and the values that are not zero"
    if "\n- **Bits**" in card:
        how = "whole numbers of few bits, and their scales"
    told = (
        f"**The weights are packed**: {how}.\n\n"
        "```python\nfrom tasks.packed import load_packed  # in a checkout of Sparseramp\n\n"
        'model = load_packed("path/to/this/folder")\n```\n\n'
    )
    masked = r"\*\*The (?:weights are masked|model is smaller)\*\*" + _SECTION
    return re.sub(masked, told, card, flags=re.S | re.M)


def _rates(best: Mapping[str, Any], prune: Mapping[str, Any]) -> str:
    bits = ""
    if prune["method"] in ROUNDING:
        bits = f"\n  A rate r stands for {MOST:g} - {MOST - LEAST:g} r bits per weight."
    if best["allocation"] not in ("uniform", "arithmetic"):
        return f"{best['label']}, with a mean of {prune['sparsity']:g}.{bits}"
    return (
        f"beta = {best['beta']:.6g} (tilt {best['tilt']:.3f}); block i has the rate\n"
        f"  S + beta * (i - c), with S = {prune['sparsity']:g} and c the centre of the parameters."
        f"{bits}"
    )


def _rounded(best: Mapping[str, Any]) -> str:
    if not best["bits"]:
        return ""
    return (
        f"\n- **Bits**: {best['bits']:.6f} per weight in blocks, scales counted. They are stored in"
        "\n  full size here; `grids.safetensors` has the width and the scales of every row."
    )


def settings(spec: Mapping[str, Any]) -> str:
    """The part of the spec that decides results, as TOML that can be read back."""
    sections = ["model", "data", "prune", "calibration", "evaluation", "search"]
    sections += ["recovery"] if spec.get("recovery", {}).get("steps") else []
    return "\n".join(
        f"{section}.{key} = {toml_value(value)}"
        for section in sections
        for key, value in spec[section].items()
        if (section, key) != ("search", "storage")  # a view, whose URL may hold a password
    )


def _how_stored(modality: str, structured: bool, smaller: bool) -> str:
    parts = [*([_SMALLER] if smaller else []), *([] if structured and smaller else [_MASKED])]
    loading = _LOADING_SMALLER if smaller else _LOADING[modality]
    return "\n\n".join([*parts, f"```python\n{loading}\n```"])


def _front_matter(
    report: Mapping[str, Any], name: str, texts: Mapping[str, str], smaller: bool
) -> str:
    model, spec = report["model"], report["spec"]
    task, library = _KINDS[spec["model"]["modality"]]
    ids = [_hub_id(text) for text in texts.values()]
    return ModelCardData(
        base_model=_hub_id(spec["model"]["source"]),
        license=model["licence"].lower() or None,
        datasets=sorted({i for i in ids if i}) or None,
        library_name=None if smaller else library,
        pipeline_tag=task,
        tags=["sparse", "pruned", spec["prune"]["method"]],
        model_name=name,
        eval_results=_results(report["best"]["metrics"], spec, report["windows"]),
    ).to_yaml()


def _results(metrics: Mapping[str, Any], spec: Mapping[str, Any], windows: str) -> list[EvalResult]:
    source = spec["data"]["report"] or spec["data"]["source"]
    return [
        EvalResult(
            task_type=_KINDS[spec["model"]["modality"]][0],
            dataset_type=_hub_id(source) or ("text" if windows == "windows" else "image"),
            dataset_name=short(source),
            metric_type=metric,
            metric_value=float(f"{value:.6g}"),
        )
        for metric, estimate in metrics.items()
        if metric != "loss" and (value := estimate["mean"]) is not None
    ]


def _rows(sides: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each side; the metrics are those of the last."""
    last = list(sides.values())[-1]
    shown = {n: m for n, m in last["metrics"].items() if n != "loss"}
    names = [label(name, metric) for name, metric in shown.items()]
    rows = [["model", *names, "zeros"], ["---"] * (len(names) + 2)]
    for name, side in sides.items():
        values = [side["metrics"].get(metric) for metric in shown]
        cells = [plus_minus(v["mean"], v["stderr"]) if v else "" for v in values]
        rows.append([name, *cells, f"{100 * side.get('sparsity', 0):.2f} %"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _recovered(report: Mapping[str, Any]) -> str:
    """That the weights are those after a fine-tune, and what they give."""
    if not (recovery := report.get("recovery")):
        return ""
    return (
        "\n**The weights here were fine-tuned after pruning**; the table above is of the models as "
        f"they were pruned. {recovery['conclusion']}\n"
    )


def _windows(windows: str, length: int) -> str:
    return f"windows of {length} tokens" if windows == "windows" else windows


def calibrated_on(spec: Mapping[str, Any], windows: str) -> str:
    """32 x 512 tokens, 32 images or 32 questions; `windows` says which."""
    calibration = spec["calibration"]
    if windows == "windows":
        return f"{calibration['samples']} x {calibration['length']} tokens"
    return f"{calibration['samples']} {windows}"


def _hub_id(source: str) -> str | None:
    match = _HUB.fullmatch(source)
    return match[1] if match and not Path(source).exists() else None


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def short(source: str) -> str:
    """The name of a source, without where it is."""
    name = _hub_id(source) or source.partition("#")[0]
    return name.rstrip("/").rpartition("/")[2].removesuffix(".gguf").removesuffix(".safetensors")


def _public(source: str) -> str:
    """A source as others can read it: where a local file lies is nobody's business."""
    if source.startswith(("pypi:", "npm:")) or _hub_id(source):
        return f"`{source.partition('#')[0]}`"
    return f"`{Path(source).name}` (a local source)"
