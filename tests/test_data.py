import itertools
from dataclasses import replace

import numpy as np
import pytest

from transfusion_jax.config import DataConfig, DiffusionConfig, ImageConfig, SourceConfig
from transfusion_jax.data.documents import Document, Image, Text, pair_document, sequence
from transfusion_jax.data.packing import pack, plan
from transfusion_jax.data.pipeline import Data, read
from transfusion_jax.data.sources import digits, sums
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


def test_sequence_marks_images_and_what_is_learned(tokenizer):
    latent = np.zeros((4, 4, 1), np.float32)
    document = Document((Text([tokenizer.bos, 7]), Image(latent, 500), Text([8, tokenizer.eos])))
    got = sequence(document, tokenizer, 4)
    boi, eoi, bos, eos = tokenizer.boi, tokenizer.eoi, tokenizer.bos, tokenizer.eos
    np.testing.assert_array_equal(got.tokens, [bos, 7, boi, 0, 0, 0, 0, eoi, 8, eos])
    np.testing.assert_array_equal(got.weight, [1, 1, 0, 0, 0, 0, 0, 1, 1, 0])
    learned = got.weight > 0
    np.testing.assert_array_equal(got.target[learned], [7, boi, 8, eos])
    assert [(at, image.noise_limit) for at, image in got.images] == [(3, 500)]


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


def test_pairs_come_in_the_shares_of_the_recipe(tokenizer):
    rng = np.random.default_rng(0)
    latent = np.zeros((8, 8, 1), np.float32)
    documents = [
        pair_document([[7], [8, 9]], latent, tokenizer, DataConfig(), DiffusionConfig(), rng)
        for _ in range(4000)
    ]
    first = [d for d in documents if d.spans[1].noise_limit == 500]
    dropped = [d for d in documents if not d.learn_text]
    caption_first = [d for d in documents if d.learn_text and d.spans[1].noise_limit == 1000]
    assert len(first) / 4000 == pytest.approx(0.2, abs=0.03)
    assert len(dropped) / 4000 == pytest.approx(0.08, abs=0.02)
    assert len(first) + len(dropped) + len(caption_first) == 4000
    assert all(len(d.spans[0].ids) == 1 and len(d.spans[2].ids) > 1 for d in first)
    assert all(len(d.spans[0].ids) > 1 and len(d.spans[2].ids) == 1 for d in caption_first)
    assert all(len(d.spans[0].ids) == len(d.spans[2].ids) == 1 for d in dropped)


def test_data_order_is_the_same_for_any_hosts_batches_and_restarts(experiment, tokenizer):
    data = Data(experiment, tokenizer)
    whole = [data.batches()[s] for s in range(4)]
    for hosts in (2, 4):
        parts = [[data.batches(h, hosts)[s] for h in range(hosts)] for s in range(4)]
        for step, expected in enumerate(whole):
            joined = {
                k: np.concatenate([fields(p)[k] for p in parts[step]]) for k in fields(expected)
            }
            for name, value in fields(expected).items():
                np.testing.assert_array_equal(joined[name], value)
    # Another batch size cuts the same stream of rows elsewhere.
    small = Data(
        replace(experiment, data=replace(experiment.data, batch_rows=4)), tokenizer
    ).batches()
    np.testing.assert_array_equal(
        np.concatenate([small[0].tokens_BL, small[1].tokens_BL]), whole[0].tokens_BL
    )
    # A restart reads on from its step, in a process of its own making.
    again = read(Data(experiment, tokenizer).batches(), 2, prefetch=4)
    for expected in whole[2:]:
        assert_same(next(again), expected)


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


def test_held_out_parts_are_disjoint():
    trained, held_out = (set(p for p, _ in sums.problems(s)) for s in ("train", "held_out"))
    assert trained.isdisjoint(held_out) and len(trained | held_out) == 3 * 121
    trained, held_out = (digits.load(s)[0] for s in ("train", "held_out"))
    assert (len(trained), len(held_out)) == (1500, 297)
    pixels = np.concatenate([trained, held_out])
    assert pixels.min() == -1 and pixels.max() == 1


def test_captions_name_their_digit():
    for label in range(10):
        assert {digits.label_of(c) for c in digits.captions(label)} == {label}
    assert digits.label_of("a handwritten sevenn") is None


def test_tokenizer_round_trip_and_marks(tokenizer):
    for text in ("a handwritten seven", "zebra ÿ 日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    marks = [tokenizer.bos, tokenizer.eos, tokenizer.boi, tokenizer.eoi]
    assert len(set(marks)) == 4 and tokenizer.size == max(marks) + 1
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


def test_synthetic_rows_need_no_data(experiment, tokenizer):
    data = Data(
        replace(experiment, data=replace(experiment.data, sources=(SourceConfig("synthetic"),))),
        tokenizer,
    )
    rows = [data.rows()[i] for i in range(50)]
    assert any((r.image_start_BM < 96).any() for r in rows)
    assert all(np.isfinite(r.latents_BMhwc).all() for r in itertools.chain(rows))
