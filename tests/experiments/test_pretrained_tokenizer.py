"""The tokenizer of llama2.c: laws, run.c's loop again, and its file."""

import itertools
import math
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data.errors import DataFileError
from experiments.pretrained import (
    Tokenizer,
    decode,
    encode,
    read_tokenizer,
    tokenizer_of,
    write_tokenizer,
)

SPECIAL = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % byte for byte in range(256))]
JOINED = [b" a", b"ab", b" ab", b"aa", b"ba", b"aba", b"abab", b"bb", b"aaaa", "öa".encode()]
SINGLE = [b" ", b"a", b"b", b"c", "ö".encode()]


def small(order: list[int] | None = None) -> Tokenizer:
    """A vocabulary of a, b, c, ö and some of their strings; joins in any order, by rank."""
    ranks = range(len(JOINED)) if order is None else order
    scores = [0.0] * len(SPECIAL) + [-float(r) for r in ranks] + [-100.0] * len(SINGLE)
    return tokenizer_of([*SPECIAL, *JOINED, *SINGLE], scores)


def by_run_c(tokenizer: Tokenizer, text: str) -> list[int]:
    """The loop of run.c: look at all pairs, join the best, the first of equals, and again."""
    pieces, scores, _ = tokenizer
    lookup = {piece: token for token, piece in reversed(list(enumerate(pieces)))}
    out = []
    for character in (" " + text) if text else "":
        piece = character.encode()
        out += [lookup[piece]] if piece in lookup else [3 + byte for byte in piece]
    while True:
        best, at, joined = -1e10, -1, -1
        for i in range(len(out) - 1):
            token = lookup.get(pieces[out[i]] + pieces[out[i + 1]], -1)
            if token != -1 and scores[token] > best:
                best, at, joined = scores[token], i, token
        if at == -1:
            return [1, *out]
        out[at : at + 2] = [joined]


@given(st.text(alphabet="abc ö🦊\n", max_size=24))
def test_decoding_gives_the_text_back(text: str):
    assert decode(small(), encode(small(), text)) == text


@given(st.text(max_size=12))
def test_any_text_comes_back(text: str):
    assert decode(small(), encode(small(), text)) == text


@given(st.text(alphabet="aab ö", max_size=30), st.permutations(range(len(JOINED))))
def test_tokens_are_those_of_run_c(text: str, order: list[int]):
    tokenizer = small(order)
    assert encode(tokenizer, text) == by_run_c(tokenizer, text)


@given(st.text(alphabet="ab", max_size=30), st.lists(st.integers(0, 2), min_size=10, max_size=10))
def test_of_equal_scores_the_leftmost_is_joined(text: str, ranks: list[int]):
    tokenizer = small(ranks)
    assert encode(tokenizer, text) == by_run_c(tokenizer, text)


@given(st.text(alphabet="abc ", min_size=1, max_size=30))
def test_nothing_is_left_to_join(text: str):
    tokenizer = small()
    tokens = encode(tokenizer, text)[1:]
    pieces = tokenizer.pieces
    for left, right in itertools.pairwise(tokens):
        assert pieces[left] + pieces[right] not in tokenizer.tokens


def test_an_empty_text_is_its_beginning():
    assert encode(small(), "") == [1]
    assert decode(small(), [1]) == ""


def test_the_best_score_wins_and_not_the_longest_piece():
    first = small()
    known = first.tokens
    assert encode(first, "aba") == [1, known[b" ab"], known[b"a"]]
    other = small([1, 5, 6, 7, 0, 8, 9, 2, 3, 4])  # "ba" before " a", and that before the others
    assert encode(other, "aba") == [1, known[b" a"], known[b"ba"]]


def test_unknown_characters_are_bytes():
    fox = "🦊".encode()
    assert encode(small(), "🦊")[2:] == [3 + byte for byte in fox]


def test_beginning_and_end_stand_for_nothing():
    tokenizer = small()
    a = tokenizer.tokens[b"a"]
    assert decode(tokenizer, [1, a, 2, 1, a]) == "aa"


def test_one_space_is_taken_from_the_front():
    tokenizer = small()
    space, a = tokenizer.tokens[b" "], tokenizer.tokens[b"a"]
    assert decode(tokenizer, [1, space, space, a, space]) == " a "


def test_a_cut_character_is_a_replacement():
    assert decode(small(), [3 + byte for byte in "é".encode()[:1]]) == "�"


def test_of_equal_pieces_the_first_is_known():
    tokenizer = tokenizer_of([*SPECIAL, b"a", b" ", b"a"], [0.0] * 262)
    assert encode(tokenizer, "a") == [1, 260, 259]


def written(tokenizer: Tokenizer, path: Path) -> Path:
    """The official layout, spelled out."""
    data = struct.pack("<i", max(len(piece) for piece in tokenizer.pieces))
    for piece, score in zip(tokenizer.pieces, tokenizer.scores, strict=True):
        data += struct.pack("<f", score) + struct.pack("<i", len(piece)) + piece
    path.write_bytes(data)
    return path


def test_a_file_is_read_and_written(tmp_path: Path):
    tokenizer = small()
    path = written(tokenizer, tmp_path / "tok.bin")
    assert read_tokenizer(path, len(tokenizer.pieces)) == tokenizer
    write_tokenizer(tmp_path / "again.bin", tokenizer)
    assert (tmp_path / "again.bin").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("change", [-1, 1])
def test_another_size_is_refused(change: int, tmp_path: Path):
    tokenizer = small()
    path = written(tokenizer, tmp_path / "tok.bin")
    with pytest.raises(DataFileError, match=r"ends early|more than a tokenizer") as caught:
        read_tokenizer(path, len(tokenizer.pieces) + change)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0, 3, 4, 11, 14, 200], ids=str)
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path):
    path = written(small(), tmp_path / "tok.bin")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataFileError, match=r"tok.bin"):
        read_tokenizer(path, len(small().pieces))


def _replaced(tokenizer: Tokenizer, token: int, piece: bytes, score: float) -> Tokenizer:
    pieces, scores = list(tokenizer.pieces), list(tokenizer.scores)
    pieces[token], scores[token] = piece, score
    return tokenizer_of(pieces, scores)


@pytest.mark.parametrize(
    ("token", "piece", "score", "message"),
    [
        (7, b"<0xZZ>", 0.0, "no tokens for bytes"),
        (7, b"x", 0.0, "no tokens for bytes"),
        (260, b"ab", math.nan, "score nan"),
    ],
    ids=["hex", "letter", "nan"],
)
def test_a_vocabulary_that_is_none_is_refused(token, piece, score, message, tmp_path: Path):
    broken = _replaced(small(), token, piece, score)
    path = written(broken, tmp_path / "tok.bin")
    with pytest.raises(DataFileError, match=message):
        read_tokenizer(path, len(broken.pieces))


def test_lengths_that_cannot_be_are_refused(tmp_path: Path):
    path = written(small(), tmp_path / "tok.bin")
    data = bytearray(path.read_bytes())
    for length in (-1, 1000):
        data[8:12] = np.array([length], "<i4").tobytes()
        path.write_bytes(bytes(data))
        with pytest.raises(DataFileError, match=f"token 0 has length {length}"):
            read_tokenizer(path, len(small().pieces))
