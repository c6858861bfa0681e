"""Text to ids: a sentencepiece model with the two image marks appended after its own entries."""

import io
from collections.abc import Iterable

import sentencepiece

LINE = 1 << 14
"""Characters of a line that are trained on as one: at most 64 kB, beyond which the trainer would
leave it out."""


class Tokenizer:
    """Ids 0 ... size - 3 are the sentencepiece model's, then come BOI and EOI.

    Raises:
      ValueError: `model` is no serialized sentencepiece model, or it has no BOS or EOS entry.
    """

    def __init__(self, model: bytes, name: str = "tokenizer"):
        self.model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"{name} is not a sentencepiece model") from error
        entries = self._processor.get_piece_size()
        self.bos, self.eos = self._processor.bos_id(), self._processor.eos_id()
        if min(self.bos, self.eos) < 0:
            raise ValueError(f"{name} has no BOS or EOS entry (ids {self.bos}, {self.eos})")
        self.boi, self.eoi, self.size = entries, entries + 1, entries + 2

    def __reduce__(self) -> tuple:
        return Tokenizer, (self.model,)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS; raises ValueError if it cannot be UTF-8."""
        try:
            return self._processor.encode(text)
        except RuntimeError as error:
            raise ValueError(f"a text is not valid UTF-8: {ascii(text[:80])}") from error

    def decode(self, ids: Iterable[int], continued: bool = False) -> str:
        """Text of `ids`; the image marks are left out.

        Args:
          continued: they follow a text, so the space that they may begin with is kept.
        """
        before = self.encode("a") if continued else []
        whole = self._processor.decode([*before, *(int(i) for i in ids if i < self.boi)])
        return whole[len(self._processor.decode(before)) :]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-pair model with byte fallback that keeps every character, as Llama's.

    Long lines are cut (`LINE`). Text with few merges gives fewer entries than asked for.

    Raises:
      ValueError: `vocab_size` is too small for the characters and bytes.
    """
    model = io.BytesIO()
    lines = (text[at : at + LINE] for text in texts for at in range(0, len(text), LINE))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=4 * LINE,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"cannot train a tokenizer of tokenizer.vocab_size={vocab_size}: {error}"
        ) from error
    return Tokenizer(model.getvalue())
