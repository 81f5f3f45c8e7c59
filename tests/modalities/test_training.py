"""What a language model is trained on: windows of text, and answers of conversations alone.

python -m pytest tests/modalities/test_training.py
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from infra.errors import UserError
from infra.recovery_spec import RecoverySpec
from infra.specs import DataSpec
from infra.training_text import conversations, training_documents
from modalities.training import UNSCORED, chat_windows, text_windows
from tests.models import load, tokenizer, write_checkpoint

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [
    [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": "four"}],
    [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bc"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "ef"},
        {"role": "user", "content": "never answered"},
    ],
]


def answers(row: torch.Tensor, labels: torch.Tensor) -> str:
    assert torch.equal(row[labels != UNSCORED], labels[labels != UNSCORED])
    return str(tokenizer().decode(labels[labels != UNSCORED]))


def test_only_answers_are_scored() -> None:
    made = tokenizer()
    made.chat_template = TEMPLATE
    windows = chat_windows(made, CHAT, length=200, count=9, what="chat")
    assert answers(windows.ids[0], windows.labels[0]) == "four</assistant>"
    assert answers(windows.ids[1], windows.labels[1]) == "bc</assistant>ef</assistant>"
    text = made.decode(windows.ids[1])
    assert text.startswith("<system>be short</system><user>a</user><assistant>bc</assistant>")
    assert "never answered" in text
    cut = chat_windows(made, CHAT[:1], length=48, count=9, what="chat")
    whole = made.decode(windows.ids[0])
    assert answers(cut.ids[0], cut.labels[0]) == whole[whole.index("four") : 48]


def test_a_row_of_padding_changes_no_loss(tmp_path: Path, cache: Path) -> None:
    """Right of the answers nothing is seen: a plain forward of each conversation alone agrees."""
    modality = load(write_checkpoint("llama", tmp_path / "model"))
    modality.tokenizer.chat_template = TEMPLATE
    windows = chat_windows(modality.tokenizer, CHAT, length=120, count=2, what="chat")
    with torch.no_grad():
        together = float(modality.training_loss(windows))
        alone = 0.0
        for ids, labels in zip(windows.ids, windows.labels, strict=True):
            end = int((labels != UNSCORED).nonzero().max()) + 1
            logits = modality.model(input_ids=ids[None, :end], use_cache=False).logits[0]
            for place in range(1, end):
                if labels[place] != UNSCORED:
                    alone -= float(F.log_softmax(logits[place - 1], -1)[labels[place]])
    assert together == pytest.approx(alone, rel=1e-5)
    scored = int((windows.labels != UNSCORED).sum())
    assert (
        modality.num_scored(windows)
        == scored
        == len("four</assistant>bc</assistant>ef</assistant>")
    )


def test_fewer_windows_than_asked_for_will_do() -> None:
    documents = ["abcdefgh" * 4] * 3
    windows = text_windows(tokenizer(), documents, length=16, count=50, what="text")
    assert 0 < windows.windows < 50
    assert torch.equal(windows.labels[:, 1:], windows.ids[:, 1:])
    assert (windows.labels[:, 0] == UNSCORED).all()
    with pytest.raises(UserError, match="text has 0 windows of 512 tokens"):
        text_windows(tokenizer(), documents, length=512, count=50, what="text")


def test_what_cannot_be_a_conversation_is_refused() -> None:
    made = tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        chat_windows(made, CHAT, length=200, count=9, what="chat")
    made.chat_template = TEMPLATE
    with pytest.raises(UserError, match="no answer begins within 8 tokens"):
        chat_windows(made, CHAT, length=8, count=9, what="chat")
    made.chat_template = TEMPLATE.replace("<{{ m.role }}>", "{{ messages | length }}")
    with pytest.raises(UserError, match="changes earlier turns"):
        chat_windows(made, CHAT[1:], length=200, count=9, what="chat")


def test_instruction_tables_are_read_and_kept_apart(
    tmp_path: Path, cache: Path, text: DataSpec
) -> None:
    rows = [{"q": f"what is {i}", "a": f"it is {i}", "chat": CHAT[i % 2]} for i in range(40)]
    table = tmp_path / "rows.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    asked = RecoverySpec(steps=1, source=str(table), question="q", answer="a")
    found = conversations(text, asked)
    assert len(found) == 40  # a source of its own is not dealt out
    assert found[3] == [
        {"role": "user", "content": "what is 3"},
        {"role": "assistant", "content": "it is 3"},
    ]
    turns = conversations(text, RecoverySpec(steps=1, source=str(table), messages="chat"))
    assert CHAT[0] in turns
    shared = text.model_copy(update={"report": str(table), "column": "a", "source": ""})
    shared = shared.model_copy(update={"selection": text.source, "calibration": text.source})
    with pytest.raises(UserError, match="documents are in both"):
        conversations(shared, asked)
    for wrong, message in (
        ({"question": "ask", "answer": "a"}, r"no column 'ask', .*: set recovery\.question$"),
        ({"question": "q", "answer": "say"}, r"no column 'say', .*: set recovery\.answer$"),
        ({"messages": "turns"}, r"no column 'turns', .*: set recovery\.messages$"),
    ):
        with pytest.raises(UserError, match=message):
            conversations(text, RecoverySpec(steps=1, source=str(table), **wrong))
    prose = tmp_path / "prose.md"
    prose.write_text("no table")
    with pytest.raises(UserError, match=r"prose\.md is no table: name one of \.parquet"):
        conversations(text, RecoverySpec(steps=1, source=str(prose), messages="chat"))
    with pytest.raises(UserError, match=r"no column 'text', it has q, a, chat: set recovery\.colu"):
        training_documents(text, RecoverySpec(steps=1, source=str(table)))
    with pytest.raises(UserError, match="must hold text"):
        conversations(text, RecoverySpec(steps=1, source=str(table), messages="q"))
