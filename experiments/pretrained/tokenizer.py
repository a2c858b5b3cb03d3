"""The byte-pair tokenizer of llama2.c: its file, and text to tokens and back.

A vocabulary of byte strings, each with a score. Encoding starts from characters and joins the two
neighbours whose string has the best score, again and again; scores are ranks of a training run of
SentencePiece, so the earlier a join was learned, the earlier it is made.
"""

from __future__ import annotations

import heapq
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.pretrained.files import refuse

UNKNOWN, BEGIN, END, FIRST_BYTE = 0, 1, 2, 3
BYTE_TOKENS = 256
_RAW = re.compile(rb"<0x([0-9A-F]{2})>")


class Tokenizer(NamedTuple):
    """A vocabulary.

    Tokens 0, 1 and 2 are unknown, beginning and end of a text; 3 to 258 are the 256 bytes, written
    ``<0x00>`` and so on, for characters that the vocabulary lacks.

    Attributes:
      pieces: the byte string of each token.
      scores: the higher, the earlier two tokens are joined to this one.
      tokens: the token of each byte string, the first where several are equal.
    """

    pieces: tuple[bytes, ...]
    scores: tuple[float, ...]
    tokens: Mapping[bytes, int]


def tokenizer_of(pieces: Sequence[bytes], scores: Sequence[float]) -> Tokenizer:
    """A tokenizer of these byte strings and scores."""
    tokens: dict[bytes, int] = {}
    for token, piece in enumerate(pieces):
        tokens.setdefault(piece, token)
    return Tokenizer(tuple(pieces), tuple(scores), tokens)


def read_tokenizer(path: Path, size: int) -> Tokenizer:
    """The tokenizer of a file: the longest piece's length, then score, length and bytes of each.

    Args:
      size: of the vocabulary, which the file does not say.

    Raises:
      DataFileError: the file ends early or late, a piece is longer than the file says, or tokens 3
        to 258 are not the bytes.
    """
    data = path.read_bytes()
    pieces: list[bytes] = []
    scores: list[float] = []
    try:
        (longest,) = struct.unpack_from("<i", data)
        at = 4
        for token in range(size):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8
            if not 0 <= length <= longest or at + length > len(data) or score != score:
                why = f"token {token} has length {length} and score {score}"
                raise refuse(path, "is no tokenizer of llama2.c", f"{why}, longest is {longest}")
            pieces.append(data[at : at + length])
            scores.append(score)
            at += length
    except struct.error as error:
        why = f"{len(data)} bytes are over after {len(pieces)} of {size} tokens"
        raise refuse(path, "ends early", why) from error
    if at != len(data):
        why = f"{len(data) - at} bytes after {size} tokens"
        raise refuse(path, "has more than a tokenizer", why)
    raw = [b"<0x%02X>" % byte for byte in range(BYTE_TOKENS)]
    if pieces[FIRST_BYTE : FIRST_BYTE + BYTE_TOKENS] != raw:
        why = f"tokens {FIRST_BYTE} to {FIRST_BYTE + BYTE_TOKENS - 1} are not <0x00> to <0xFF>"
        raise refuse(path, "has no tokens for bytes", why)
    return tokenizer_of(pieces, scores)


def write_tokenizer(path: Path, tokenizer: Tokenizer) -> None:
    """Write the file that :func:`read_tokenizer` reads."""
    chunks = [struct.pack("<i", max(map(len, tokenizer.pieces)))]
    for piece, score in zip(tokenizer.pieces, tokenizer.scores, strict=True):
        chunks.append(struct.pack("<fi", score, len(piece)) + piece)
    Path(path).write_bytes(b"".join(chunks))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text, :data:`BEGIN` before them.

    A text that is not empty has a space put before it. Each character is a token, or one for each
    of its bytes where the vocabulary lacks it. Then the neighbours whose string is the token of the
    best score are joined, the leftmost of equals, until none can be.

    Sharp edges: joins may give other tokens than SentencePiece itself where scores are equal.

    >>> pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % b for b in range(256))]
    >>> small = tokenizer_of([*pieces, b" ", b"a", b"b", b"ab", b" ab"], [0.0] * 262 + [-1.0, -2.0])
    >>> encode(small, "abé")
    [1, 263, 198, 172]

    Source: Sennrich, Haddow and Birch, Neural machine translation of rare words with subword units,
    2016, section 3.2; the order of joins is that of Karpathy, llama2.c, 2023.
    """
    tokens = [BEGIN]
    if text:
        tokens += _joined(tokenizer, _characters(tokenizer, " " + text))
    return tokens


def _characters(tokenizer: Tokenizer, text: str) -> list[int]:
    tokens: list[int] = []
    for character in text:
        piece = character.encode()
        known = tokenizer.tokens.get(piece)
        tokens += [FIRST_BYTE + byte for byte in piece] if known is None else [known]
    return tokens


def _joined(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Join neighbours by the best score: a heap of pairs, and links between what is left."""
    pieces, scores, known = tokenizer
    count = len(tokens)
    left, right = list(range(-1, count - 1)), list(range(1, count + 1))
    alive = [True] * count
    heap: list[tuple[float, int, int, int, int]] = []

    def offer(i: int) -> None:
        if i < 0 or right[i] >= count:
            return
        a, b = tokens[i], tokens[right[i]]
        joined = known.get(pieces[a] + pieces[b])
        if joined is not None:
            heapq.heappush(heap, (-scores[joined], i, a, b, joined))

    for i in range(count - 1):
        offer(i)
    while heap:
        _, i, a, b, joined = heapq.heappop(heap)
        j = right[i]
        # A pair of which one has been joined to another since is no longer there.
        if not alive[i] or j >= count or tokens[i] != a or tokens[j] != b:
            continue
        tokens[i], alive[j], right[i] = joined, False, right[j]
        if right[j] < count:
            left[right[j]] = i
        offer(left[i])
        offer(i)
    return [token for token, is_alive in zip(tokens, alive, strict=True) if is_alive]


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of tokens, without the space that :func:`encode` puts before it.

    Beginning and end of a text stand for nothing. Bytes that are no UTF-8, as of a text that was
    cut within a character, become U+FFFD.

    >>> pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % b for b in range(256))]
    >>> decode(tokenizer_of([*pieces, b" a"], [0.0] * 260), [1, 259, 259, 198, 172, 2])
    'a aé'
    """
    chunks = []
    for token in tokens:
        if token in (BEGIN, END):
            continue
        piece = tokenizer.pieces[token]
        raw = _RAW.fullmatch(piece)
        chunks.append(bytes([int(raw[1], 16)]) if raw else piece)
    return b"".join(chunks).removeprefix(b" ").decode("utf-8", errors="replace")
