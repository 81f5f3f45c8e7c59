"""Windows of text: BOS where the tokenizer adds it, nested, bytes counted exactly.

python -m pytest tests/modalities/test_text.py
"""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import UserError
from modalities.text import SEPARATOR, Windows, adds_bos, cut_windows, shuffled
from tests.models import BOS, tokenizer

PLAIN, BEGUN = tokenizer(bos=False), tokenizer(bos=True)
DOCUMENTS = ["Grüße, δέλτα!", "数据 and text", "", "  leading and 🙂🙃 emoji\nlines ", "end"] * 6


def text_of(ids: torch.Tensor) -> bytes:
    """The bytes that tokens stand for; every token is one."""
    kept = [int(i) for i in ids if int(i) != BOS]
    letters = PLAIN.convert_ids_to_tokens(kept)
    table = {c: b for b, c in _bytes_to_letters().items()}
    return bytes(table[letter] for letter in letters)


def _bytes_to_letters() -> dict[int, str]:
    """The alphabet of byte-level tokenizers: printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def test_bos_is_added_only_where_the_tokenizer_adds_it() -> None:
    assert adds_bos(BEGUN)
    assert not adds_bos(PLAIN)  # it has one, and does not begin with it
    assert PLAIN.bos_token_id == BOS


@pytest.mark.parametrize("length, count", [(8, 1), (8, 5), (33, 3)])
def test_windows_cover_the_text_in_order(length: int, count: int) -> None:
    stream = "".join(document + SEPARATOR for document in DOCUMENTS).encode()
    plain = cut_windows(PLAIN, DOCUMENTS, length=length, count=count, what="data")
    assert plain.ids.shape == (count, length)
    assert b"".join(map(text_of, plain.ids)) == stream[: count * length]
    begun = cut_windows(BEGUN, DOCUMENTS, length=length, count=count, what="data")
    assert begun.ids.shape == (count, length)
    assert begun.ids[:, 0].tolist() == [BOS] * count
    assert not (begun.ids[:, 1:] == BOS).any()
    assert b"".join(map(text_of, begun.ids)) == stream[: count * (length - 1)]


def test_bos_once_is_the_published_protocol() -> None:
    """The whole text is one sequence with one BOS, cut into windows."""
    stream = "".join(document + SEPARATOR for document in DOCUMENTS).encode()
    windows = cut_windows(BEGUN, DOCUMENTS, length=16, count=4, what="data", bos_once=True)
    assert windows.ids.shape == (4, 16)
    assert (windows.ids == BOS).nonzero().tolist() == [[0, 0]]
    assert b"".join(map(text_of, windows.ids)) == stream[: 4 * 16 - 1]
    plain = cut_windows(PLAIN, DOCUMENTS, length=16, count=4, what="data", bos_once=True)
    assert b"".join(map(text_of, plain.ids)) == stream[: 4 * 16]


@settings(deadline=None, max_examples=40)
@given(
    documents=st.lists(st.text(min_size=1, max_size=30), min_size=4, max_size=10),
    length=st.integers(2, 9),
    bos=st.booleans(),
    once=st.booleans(),
)
def test_fewer_windows_are_the_first_of_more(
    documents: list[str], length: int, bos: bool, once: bool
) -> None:
    chosen = BEGUN if bos else PLAIN

    def cut(count: int) -> Windows:
        return cut_windows(
            chosen, documents, length=length, count=count, what="data", bos_once=once
        )

    tokens = len("".join(d + SEPARATOR for d in documents).encode()) + (bos and once)
    most = tokens // (length - (bos and not once))
    everything = cut(most)
    for count in range(1, most):
        some = cut(count)
        assert torch.equal(some.ids, everything.ids[:count])
        assert some.bytes == everything.bytes[:count]
    with pytest.raises(UserError):
        cut(most + 1)


@pytest.mark.parametrize("made", [PLAIN, BEGUN])
@pytest.mark.parametrize("once", [False, True])
def test_bytes_are_those_of_the_scored_text(made: Any, once: bool) -> None:
    """ASCII: one byte per token, so a window has as many bytes as scored tokens."""
    windows = cut_windows(made, ["abc def"] * 20, length=12, count=6, what="data", bos_once=once)
    scored = [11] * 6  # all tokens of a window but its first
    assert list(windows.bytes) == scored


def test_bytes_of_text_that_is_not_ascii() -> None:
    """A character of several tokens is counted where its first one stands; the sum is exact."""
    document = "δδδδ" * 8
    windows = cut_windows(BEGUN, [document], length=9, count=8, what="data")
    assert windows.bytes == (8,) * 8  # four letters of two bytes
    windows = cut_windows(PLAIN, [document], length=8, count=8, what="data")
    assert sum(windows.bytes) == 8 * 8 - 8 * 2  # the first token of a window is not scored
    mixed = cut_windows(BEGUN, DOCUMENTS, length=10, count=12, what="data")
    stream = "".join(document + SEPARATOR for document in DOCUMENTS).encode()
    spare = sum(mixed.bytes) - 12 * 9  # of the last character only
    assert 0 <= spare <= 3
    assert stream[: 12 * 9].decode(errors="ignore").encode() in stream


class Merged:
    """A tokenizer without offsets, as those that are not backed by a compiled one."""

    is_fast = False
    bos_token_id = None

    def __call__(self, text: str, **_: Any) -> Any:
        ids = [0] * ((len(text) + 1) // 2)
        return {"input_ids": ids} if _ else type("Encoding", (), {"input_ids": ids})()


def test_bytes_without_offsets_are_shared_out() -> None:
    windows = cut_windows(Merged(), ["abcdefgh" * 10], length=5, count=4, what="data")
    assert windows.bytes == (8,) * 4


def test_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        cut_windows(BEGUN, ["abcdefgh"], length=6, count=3, what="data.selection")
    assert str(refused.value) == (
        "data.selection has 2 windows of 6 tokens, 3 are asked for: give more text, or ask for "
        "fewer or shorter windows"
    )
    with pytest.raises(UserError, match=r"data\.report has 0 windows of 512 tokens"):
        cut_windows(PLAIN, ["short"], length=512, count=1, what="data.report")


def test_order_depends_on_the_seed_alone() -> None:
    documents = [str(i) for i in range(50)]
    random.seed(1)
    first = shuffled(documents, 3)
    random.seed(2)
    assert shuffled(documents, 3) == first
    assert shuffled(documents, 4) != first
    assert sorted(first) == sorted(documents)
    assert documents == [str(i) for i in range(50)]
