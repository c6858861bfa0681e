"""A sentencepiece model without sentencepiece, for a model exported as StableHLO (`runner.py`)."""

import codecs
import heapq
import re
import struct
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6  # kinds of entries of a tokenizer
BPE = 2  # kind of a tokenizer


class Tokenizer:
    """A sentencepiece model of byte pairs with byte fallback, as Llama's, without sentencepiece."""

    def __init__(self, file: Path):
        self.pieces, self.scores, self.kinds = [], [], []
        spec = {
            "type": 1,
            "normalizer": b"",
            "dummy_prefix": 1,
            "collapse": 1,
            "spaces": 1,
            "suffix": 0,
        }
        for number, value in _fields(file.read_bytes()):
            inner = dict(_fields(value)) if isinstance(value, bytes) else {}
            if number == 1:
                self.pieces.append(inner[1].decode())
                self.scores.append(struct.unpack("<f", inner.get(2, bytes(4)))[0])
                self.kinds.append(inner.get(3, NORMAL))
            elif number == 2:
                spec["type"], spec["suffix"] = inner.get(3, 1), inner.get(24, 0)
            elif number == 3:
                spec["normalizer"] = inner.get(2, b"")
                spec["dummy_prefix"], spec["collapse"] = inner.get(3, 1), inner.get(4, 1)
                spec["spaces"] = inner.get(5, 1)
        self.spec = spec
        self.ids = {p: i for i, p in enumerate(self.pieces) if self.kinds[i] in (NORMAL, USER)}
        self.bytes = {p: i for i, p in enumerate(self.pieces) if self.kinds[i] == BYTE}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without marks of its begin and end; ValueError where it cannot tell."""
        spec = self.spec
        other = spec["normalizer"] or spec["collapse"] or spec["suffix"] or not spec["spaces"]
        if spec["type"] != BPE or other:
            raise ValueError(
                "run.py knows byte-pair tokenizers that keep text as it is: give --ids"
            )
        text = "▁" * bool(text and spec["dummy_prefix"]) + text.replace(" ", "▁")
        whole = {p for p, i in self.ids.items() if self.kinds[i] == USER}
        choices = [*map(re.escape, sorted(whole, key=len, reverse=True)), "."]
        symbols = re.findall("|".join(choices), text, re.DOTALL)
        ids = [i for symbol in self._merged(symbols, whole) for i in self._of(symbol)]
        unknown = self.kinds.index(UNKNOWN)  # several in a row are one
        return [i for n, i in enumerate(ids) if not n or {i, ids[n - 1]} != {unknown}]

    def _merged(self, symbols: list[str], whole: set[str]) -> list[str]:
        """Joins pairs of neighbours, the likeliest first, as long as there are pieces of them;
        those in `whole` stay as they are."""
        end = len(symbols)
        before, after = [*range(-1, end - 1)], [*range(1, end + 1)]
        fixed = [symbol in whole for symbol in symbols]
        pairs = []

        def offer(a: int, b: int) -> None:
            if a < 0 or b == end or fixed[a] or fixed[b]:
                return
            joined = symbols[a] + symbols[b]
            if joined in self.ids:
                heapq.heappush(pairs, (-self.scores[self.ids[joined]], a, b, joined))

        for a in range(end - 1):
            offer(a, a + 1)
        while pairs:
            _, a, b, joined = heapq.heappop(pairs)
            if after[a] != b or symbols[a] + symbols[b] != joined:
                continue  # one of them has been joined with another
            symbols[a], symbols[b] = joined, ""
            after[a], after[b] = after[b], -1
            if after[a] < end:
                before[after[a]] = a
            offer(before[a], a)
            offer(a, after[a])
        return [symbol for symbol in symbols if symbol]

    def _of(self, symbol: str) -> list[int]:
        if symbol in self.ids or not self.bytes:
            return [self.ids.get(symbol, self.kinds.index(UNKNOWN))]
        return [self.bytes[f"<0x{byte:02X}>"] for byte in symbol.encode()]

    def decode(self, ids: list[int], continued: bool = False) -> str:
        """Text of ids; marks are left out. If they follow a text, a space at their begin is
        kept."""
        text, first = b"", not continued
        for i in ids:
            if i >= len(self.pieces) or self.kinds[i] == CONTROL:
                continue
            piece = self.pieces[i]
            if self.kinds[i] == BYTE:
                text += bytes([int(piece[3:5], 16)])
            elif self.kinds[i] == UNKNOWN:
                text += " ⁇ ".encode()
            else:
                prefix = first and self.spec["dummy_prefix"]
                text += (piece.removeprefix("▁") if prefix else piece).replace("▁", " ").encode()
            first = False
        return text.decode(errors="each_byte")


# One mark for each byte that is no text, as sentencepiece has it; Python would join some.
codecs.register_error("each_byte", lambda error: ("\ufffd", error.start + 1))


def _fields(data: bytes):
    """(number, value) of the fields of a protocol buffer."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}[key & 7] if key & 7 != 2 else varint()
        yield key >> 3, data[at : at + size]
        at += size
