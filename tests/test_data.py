import itertools
from dataclasses import replace

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor

from transfusion_jax.config import ImageConfig, SourceConfig
from transfusion_jax.data import packing
from transfusion_jax.data.documents import Document, Image, Text, sequence
from transfusion_jax.data.packing import pack, plan
from transfusion_jax.data.pipeline import Data, read
from transfusion_jax.data.sources import digits
from transfusion_jax.data.sources.registry import load_sources
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer


def fields(batch):
    return {name: getattr(batch, name) for name in batch.__dataclass_fields__}


def assert_same(a, b):
    for name in fields(a):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def best_fit_decreasing(lengths, capacity):
    """The textbook algorithm, one piece at a time: the multiset of room left in its rows."""
    room = []
    for length in sorted(lengths, reverse=True):
        fitting = [r for r in room if r >= length]
        if fitting:
            room.remove(min(fitting))
            room.append(min(fitting) - length)
        else:
            room.append(capacity - length)
    return sorted(room)


def held(packed):
    """Every piece, and the positions used in every row."""
    rows = [packed.row(r) for r in range(len(packed))]
    return sorted(piece for row in rows for piece in row), [
        sum(e - b for _, b, e in row) for row in rows
    ]


@pytest.mark.parametrize("seed", range(20))
def test_plan_loses_nothing_and_is_no_worse_than_best_fit(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 60))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 200)))
    packed = plan(lengths, capacity, splittable=False)
    pieces, used = held(packed)
    assert pieces == [(i, 0, n) for i, n in enumerate(lengths)] and not packed.rejected
    assert max(used) <= capacity
    assert len(packed) <= len(best_fit_decreasing(lengths.tolist(), capacity)) + 1


@pytest.mark.parametrize("splittable", [False, True])
def test_a_plan_of_many_blocks_is_the_plans_of_the_blocks(splittable, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 100)
    lengths = np.random.default_rng(0).integers(0, 30, 250)
    lengths[[7, 140, 249]] = 50  # longer than a row
    packed = plan(lengths, 40, splittable)
    firsts = range(0, 250, 100)
    parts = [plan(lengths[first : first + 100], 40, splittable) for first in firsts]
    positions = np.zeros(250, int)
    for document, begin, end in held(packed)[0]:
        positions[document] += end - begin
    taken = lengths if splittable else np.where(lengths > 40, 0, lengths)
    np.testing.assert_array_equal(positions, taken)
    assert len(packed) == sum(map(len, parts))
    ledger = packed.ledger()
    for reason in packed.rejected:
        found = [
            part.rejected[reason] + first
            for first, part in zip(firsts, parts, strict=True)
            if reason in part.rejected
        ]
        np.testing.assert_array_equal(packed.rejected[reason], np.concatenate(found))
    assert ledger["documents"] == 250
    assert ledger["rejected"].get("longer than a row", 0) == (0 if splittable else 3)
    assert max(held(packed)[1]) <= 40


@pytest.mark.parametrize("seed", range(20))
def test_text_alone_fills_every_row(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 60))
    lengths = rng.integers(0, 3 * capacity, int(rng.integers(1, 200)))
    packed = plan(lengths, capacity, splittable=True)
    pieces, used = held(packed)
    assert used[:-1] == [capacity] * (len(used) - 1) and 0 < used[-1] <= capacity
    # The pieces of a document follow one another, from its start to its end.
    for number, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        begins, ends = zip(*(piece[1:] for piece in group), strict=True)
        assert (begins[0], *ends) == (*begins, lengths[number])
    assert {d for d, _, _ in pieces} == set(np.flatnonzero(lengths)) and sum(used) == lengths.sum()


def test_plan_cuts_long_text_beside_images_and_rejects_long_images():
    lengths, cut = (
        np.asarray([25, 3, 10, 0, 7, 11]),
        np.asarray([True, False, False, True, False, False]),
    )
    packed = plan(lengths, 10, cut)
    pieces, used = held(packed)
    assert (
        pieces == [(0, 0, 10), (0, 10, 20), (0, 20, 25), (1, 0, 3), (2, 0, 10), (4, 0, 7)]
        and max(used) == 10
    )
    assert {k: v.tolist() for k, v in packed.rejected.items()} == {
        "empty": [3],
        "longer than a row": [5],
    }
    assert (
        len(plan(np.zeros(0), 10, splittable=True))
        == len(plan(np.zeros(3), 10, splittable=False))
        == 0
    )


@pytest.mark.parametrize("spread", [0.5, 1.0])
def test_plan_fills_rows_of_web_like_lengths(spread):
    rng = np.random.default_rng(0)
    pairs = 260 + np.clip(rng.lognormal(np.log(30), spread, 20_000).astype(int), 1, 500)
    text = np.clip(rng.lognormal(np.log(500), 1.0, 20_000).astype(int), 1, 100_000)
    both, is_text = np.concatenate([pairs, text]), np.repeat([False, True], 20_000)
    for lengths, cut, least in (
        (pairs, False, 0.985),
        (text, True, 0.9999),
        (both, is_text, 0.999),
    ):
        assert plan(lengths, 4096, cut).filled(4096) > least


def test_pack_places_documents_and_keeps_text_that_was_cut(tokenizer):
    text = sequence(Document((Text(list(range(10, 20))),)), tokenizer, 4)
    latent = np.arange(16, dtype=np.float32).reshape(4, 4, 1)
    pair = sequence(Document((Text([5]), Image(latent, 500))), tokenizer, 4)
    row = pack([(text, 4, 8), (pair, 0, 7)], 16, ImageConfig(4, 4, 1, 2))
    np.testing.assert_array_equal(row.segment_BL, [1] * 4 + [2] * 7 + [0] * 5)
    np.testing.assert_array_equal(row.position_BL, [*range(4), *range(7), *[0] * 5])
    # The target of the last token before a cut is known: it is the first after it.
    assert row.text_target_BL[3] == 18 and row.text_weight_BL[3] == 1
    assert row.image_start_BM.tolist() == [6, 16] and row.image_limit_BM[0] == 500
    np.testing.assert_array_equal(row.latents_BMhwc[0], latent)


def test_data_order_is_the_same_for_any_hosts_batches_and_restarts(experiment, tokenizer):
    data = Data(experiment, tokenizer)
    expected_batches = [data.batches()[s] for s in range(4)]
    for rows in ([0, 1, 2, 3], [1, 4, 5, 7], [6]):  # what a process holds need not be one block
        part = data.batches(rows)
        for step, expected in enumerate(expected_batches):
            for name, value in fields(expected).items():
                np.testing.assert_array_equal(fields(part[step])[name], value[rows])
    # Another batch size cuts the same stream of rows elsewhere.
    small = Data(
        replace(experiment, data=replace(experiment.data, batch_rows=4)), tokenizer
    ).batches()
    np.testing.assert_array_equal(
        np.concatenate([small[0].tokens_BL, small[1].tokens_BL]), expected_batches[0].tokens_BL
    )
    # A restart reads on from its step, in a process of its own making.
    again = read(Data(experiment, tokenizer).batches(), 2, prefetch=4)
    for expected in expected_batches[2:]:
        assert_same(next(again), expected)


def test_every_epoch_is_in_another_order(experiment, tokenizer):
    """Sums are text alone, so a row is the same whenever it is read."""
    only_sums = replace(experiment.data, sources=(SourceConfig("sums"),), row_length=40)
    data = Data(replace(experiment, data=only_sums), tokenizer)
    rows = data.rows()
    count = len(data.sources[0])
    epochs = [
        [rows[epoch * count + i].tokens_BL.tobytes() for i in range(count)] for epoch in range(4)
    ]
    assert count > 50 and len(set(epochs[0])) == count
    for one, other in itertools.combinations(epochs, 2):
        assert set(one) == set(other)
        assert sum(a == b for a, b in zip(one, other, strict=True)) < count / 5


def test_what_is_drawn_for_a_row_depends_on_the_row_and_the_seed(experiment, tokenizer):
    """One row of three synthetic pairs, again and again: its latents are noise of its generator."""
    noise = replace(experiment.data, sources=(SourceConfig("synthetic"),))

    def drawn(seed: int) -> list[np.ndarray]:
        train = replace(experiment.train, seed=seed)
        data = Data(replace(experiment, data=noise, train=train), tokenizer)
        lengths = data.sources[0].source.lengths(tokenizer)[:3]
        data.sources[0] = replace(data.sources[0], plan=plan(lengths, 96, splittable=False))
        assert len(data.sources[0]) == 1
        return [x for i in range(20) for x in data.rows()[i].latents_BMhwc[:3]]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert [x.tobytes() for x in first] == [x.tobytes() for x in again]
    every = np.stack(first + other).reshape(len(first) + len(other), -1)
    correlation = np.corrcoef(every)[np.triu_indices(len(every), 1)]
    assert abs(correlation).max() < 0.7 and correlation.mean() == pytest.approx(0, abs=0.01)


def test_another_seed_is_another_order(experiment, tokenizer):
    other = replace(experiment, train=replace(experiment.train, seed=1))
    a, b = (Data(e, tokenizer).batches()[0].tokens_BL for e in (experiment, other))
    assert (a != b).any()


def test_every_document_is_in_a_row_every_epoch(experiment, tokenizer):
    data = Data(
        replace(experiment, data=replace(experiment.data, sources=(SourceConfig("digits"),))),
        tokenizer,
    )
    epoch = len(data.sources[0])
    seen = [data.rows()[i].image_start_BM for i in range(epoch)]
    assert sum((start < experiment.data.row_length).sum() for start in seen) == 1500
    assert data.ledger()["digits"]["in_rows"] == data.ledger()["digits"]["documents"] == 1500


def test_sources_are_mixed_by_weight(experiment, tokenizer):
    sources = (SourceConfig("digits", 3.0), SourceConfig("sums", 1.0))
    data = Data(replace(experiment, data=replace(experiment.data, sources=sources)), tokenizer)
    rows = [data.rows()[i] for i in range(400)]
    pictures = sum((row.image_start_BM < experiment.data.row_length).any() for row in rows)
    assert pictures == 300


def test_fingerprint_tells_data_apart(experiment, tokenizer):
    longer = replace(experiment, data=replace(experiment.data, row_length=100))
    prints = [Data(e, tokenizer).fingerprints() for e in (experiment, experiment, longer)]
    assert prints[0] == prints[1] != prints[2]


def test_captions_name_their_digit():
    for label in range(10):
        assert {digits.label_of(c) for c in digits.captions(label)} == {label}
    assert digits.label_of("a handwritten sevenn") is None


def test_a_continuation_keeps_the_space_that_it_begins_with(tokenizer):
    for text in ("three plus four is seven", "two  spaces ", "a\nb 日本 ü"):
        ids = tokenizer.encode(text)
        for cut in range(1, len(ids)):
            begin = tokenizer.decode(ids[:cut], continued=True)
            if not begin.endswith("\ufffd"):  # in the middle of a character
                assert begin + tokenizer.decode(ids[cut:], continued=True) == f" {text}"
    assert tokenizer.decode([], continued=True) == ""
    assert tokenizer.decode([tokenizer.boi], continued=True) == ""


def test_tokenizer_round_trip_and_marks(tokenizer):
    for text in ("a handwritten seven", "zebra ÿ 日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    marks = [tokenizer.bos, tokenizer.eos, tokenizer.boi, tokenizer.eoi]
    assert len(set(marks)) == 4 and tokenizer.size == max(marks) + 1
    pieces = SentencePieceProcessor(model_proto=tokenizer.model).get_piece_size()
    assert (tokenizer.boi, tokenizer.eoi) == (pieces, pieces + 1)
    again = Tokenizer(tokenizer.model)
    assert again.encode("three plus four") == tokenizer.encode("three plus four")


def test_tokenizer_errors():
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        Tokenizer(b"nonsense")
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size=5"):
        train_tokenizer(["some text"], 5)


def test_source_and_vocabulary_errors(experiment, tokenizer):
    with pytest.raises(ValueError, match="'digit' is not one of"):
        load_sources(
            replace(experiment, data=replace(experiment.data, sources=(SourceConfig("digit"),))),
            "train",
        )
    small = replace(experiment, model=replace(experiment.model, vocab_size=64))
    with pytest.raises(ValueError, match=r"model\.vocab_size=64"):
        Data(small, tokenizer)


def test_rows_for_a_model_of_text_have_no_room_for_many_images(experiment, tokenizer):
    text = replace(
        experiment,
        model=replace(experiment.model, family="llama", image_attention="causal"),
        data=replace(experiment.data, sources=(SourceConfig("sums"),)),
    )
    row = Data(text, tokenizer).rows()[0]
    assert len(row.latents_BMhwc) == len(row.image_start_BM) == 1 == text.image_slots
    (whole,) = Data(text, tokenizer).once(1, 1)
    assert whole.latents_BMhwc.shape[:2] == (1, 1)
