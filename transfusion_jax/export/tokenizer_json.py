"""A sentencepiece model as the `tokenizer.json` of Hugging Face's tokenizers, with equal ids.

Sentencepiece merges the two neighbours that give the piece with the best score, the leftmost ones
in a tie. Hugging Face merges by a list of pairs in order of preference. So the list holds every
pair of pieces that gives a piece, sorted by the score of what it gives.
"""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2

from transfusion_jax.data.tokenizer import Tokenizer
from transfusion_jax.errors import require
from transfusion_jax.files import write_atomic, write_json

SPACE = "▁"
"""What sentencepiece writes for a space."""
BOI, EOI = "<boi>", "<eoi>"
ANY = 1 << 30
BPE = sentencepiece_model_pb2.TrainerSpec.BPE
Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


def write_tokenizer(tokenizer: Tokenizer, out: Path, length: int) -> None:
    """Writes `tokenizer.json`, `tokenizer_config.json` and the sentencepiece model itself.

    Args:
      length: positions that the model was trained on.

    Raises:
      ValueError: the sentencepiece model does what tokenizers cannot.
    """
    whole = tokenizer_json(tokenizer)
    names = [entry["content"] for entry in whole["added_tokens"]]
    pieces = {token: name for name, token in whole["model"]["vocab"].items()}
    write_atomic(out / "tokenizer.json", json.dumps(whole, ensure_ascii=False).encode())
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": length,
            "bos_token": pieces[tokenizer.bos],
            "eos_token": pieces[tokenizer.eos],
            "unk_token": whole["model"]["unk_token"],
            "additional_special_tokens": [name for name in names if name in (BOI, EOI)],
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    )
    write_atomic(out / "tokenizer.model", tokenizer.model)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The contents of `tokenizer.json`; BOI and EOI are its last two entries.

    Text that holds the name of a special token, such as `</s>`, becomes that token, as everywhere
    in transformers; with `split_special_tokens=True` it stays text, as here.

    Raises:
      ValueError: the sentencepiece model does what tokenizers cannot.
    """
    model = checked_model(tokenizer)
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    special = {
        i: piece.piece
        for i, piece in enumerate(model.pieces)
        if piece.type in (Piece.CONTROL, Piece.UNKNOWN)
    }
    for name, i in ((BOI, tokenizer.boi), (EOI, tokenizer.eoi)):
        vocab[name] = i
        special[i] = name
    bos = special[tokenizer.bos]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, name) for i, name in sorted(special.items())],
        "normalizer": _normalizer(model.normalizer_spec),
        "pre_tokenizer": None,
        "post_processor": _begins_with(bos, tokenizer.bos),
        "decoder": _decoder(model.normalizer_spec),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.pieces[model.trainer_spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges(model),
        },
    }


def merges(model: sentencepiece_model_pb2.ModelProto) -> list[tuple[str, str]]:
    """Pairs of pieces in order of preference: the score of the piece they give.

    Scores are equal only where pieces are runs of one character, which grow from the left, so the
    longest comes first.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == Piece.NORMAL}
    return [
        (whole[:at], whole[at:])
        for whole in sorted(scores, key=lambda piece: (-scores[piece], -len(piece)))
        for at in _cuts(whole, scores.keys())
    ]


def _cuts(whole: str, pieces: Set[str]) -> list[int]:
    """Where a piece can be cut into two, in order of preference.

    Where A B = B C = `whole` stand as A B C, sentencepiece merges the two on the left. So of two
    cuts, at i and at i characters from the end, the one whose right part also begins the piece
    comes first.
    """
    length = len(whole)
    cuts = [i for i in range(1, length) if whole[:i] in pieces and whole[i:] in pieces]
    return sorted(cuts, key=lambda i: (-max(i, length - i), not whole.startswith(whole[i:]), -i))


def checked_model(tokenizer: Tokenizer) -> sentencepiece_model_pb2.ModelProto:
    """The parts of a sentencepiece model.

    Raises:
      ValueError: it does what other tokenizers do not, or differently.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    require(
        trainer.model_type == BPE,
        "the tokenizer is not a byte-pair model; only these have a tokenizer.json with equal ids",
    )
    require(
        not normalizer.precompiled_charsmap,
        f"the tokenizer normalises text ({normalizer.name}), which tokenizers does differently",
    )
    require(
        normalizer.escape_whitespaces and not trainer.treat_whitespace_as_suffix,
        "the tokenizer keeps its spaces as they are, or after words",
    )
    _check_pieces(model)
    return model


def _check_pieces(model: sentencepiece_model_pb2.ModelProto) -> None:
    """Raises ValueError for entries whose merges have no fixed order."""
    taken = sorted({BOI, EOI} & {piece.piece for piece in model.pieces})
    require(not taken, f"the tokenizer has an entry {taken[:1]} of its own")
    known = {piece.piece for piece in model.pieces if piece.type == Piece.NORMAL}
    with_score: dict[float, str] = {}
    for piece in model.pieces:
        name = piece.piece
        require(
            piece.type not in (Piece.USER_DEFINED, Piece.UNUSED),
            f"the tokenizer's entry {name!r} is user-defined or unused",
        )
        if piece.type != Piece.NORMAL or len(name) == 1:
            continue
        require(
            known.issuperset(name),
            f"the tokenizer's entry {name!r} has a character that is no entry",
        )
        other = with_score.setdefault(piece.score, name)
        require(
            other == name or len(set(other + name)) == 1,
            f"the tokenizer's entries {other!r} and {name!r} have the same score",
        )


def _added(i: int, name: str) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": name, **plain, "special": True}


def _normalizer(spec: sentencepiece_model_pb2.NormalizerSpec) -> dict[str, Any]:
    """A space before the text, and every space as the piece that stands for it."""
    steps = []
    if spec.remove_extra_whitespaces:
        steps += [_replace({"Regex": r"\A +"}, ""), _replace({"Regex": " {2,}"}, " ")]
        steps.append(_replace({"Regex": rf"[ {SPACE}]+\z"}, ""))
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return {"type": "Sequence", "normalizers": [*steps, _replace({"String": " "}, SPACE)]}


def _decoder(spec: sentencepiece_model_pb2.NormalizerSpec) -> dict[str, Any]:
    steps = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    spaces = ANY if spec.remove_extra_whitespaces else int(spec.add_dummy_prefix)
    if spaces:
        steps.append({"type": "Strip", "content": " ", "start": spaces, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _begins_with(bos: str, i: int) -> dict[str, Any]:
    """Puts BOS before a text, as before every document that the model was trained on."""

    def text(name: str, part: int) -> list[dict[str, Any]]:
        token = {"SpecialToken": {"id": bos, "type_id": part}}
        return [token, {"Sequence": {"id": name, "type_id": part}}]

    return {
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": [*text("A", 0), *text("B", 1)],
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
    }
