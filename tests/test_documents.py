"""Documents as token sequences, and what is left out of them for guidance."""

from collections import Counter

import numpy as np
import pytest

from transfusion_jax.config import DataConfig, DiffusionConfig, ImageConfig
from transfusion_jax.data.documents import (
    Document,
    Image,
    Text,
    interleaved_document,
    pair_document,
    sequence,
)
from transfusion_jax.data.packing import pack

LIMITED = DiffusionConfig(noise_limit=500)
DRAWS = 4000


def picture(value: float) -> np.ndarray:
    return np.full((4, 4, 1), value, np.float32)


A, B, C = map(picture, (1.0, 2.0, 3.0))
EDIT = (A, Text([7, 8]), B)
PAGE = (Text([7]), A, Text([8, 9]), B, Text([10]), C, Text([11]))


def shape(document: Document) -> str:
    """Its spans in short: `s` BOS, `e` EOS, `t` other text, a, b, c the images."""
    spans = document.spans
    middle = ["t" if isinstance(x, Text) else " abc"[int(x.latent_hwc[0, 0, 0])] for x in spans]
    return "s" + "".join(middle[1:-1]) + "e"


def drawn(spans, tokenizer, data: DataConfig, diffusion=LIMITED) -> list[Document]:
    rng = np.random.default_rng(0)
    return [interleaved_document(spans, tokenizer, data, diffusion, rng) for _ in range(DRAWS)]


def learned(document: Document, tokenizer) -> list[int]:
    """Tokens under the loss."""
    got = sequence(document, tokenizer, 4)
    return got.target[got.weight > 0].tolist()


def test_sequence_marks_images_and_what_is_learned(tokenizer):
    latent = np.zeros((4, 4, 1), np.float32)
    document = Document((Text([tokenizer.bos, 7]), Image(latent, 500), Text([8, tokenizer.eos])))
    got = sequence(document, tokenizer, 4)
    boi, eoi, bos, eos = tokenizer.boi, tokenizer.eoi, tokenizer.bos, tokenizer.eos
    np.testing.assert_array_equal(got.tokens, [bos, 7, boi, 0, 0, 0, 0, eoi, 8, eos])
    np.testing.assert_array_equal(got.weight, [1, 1, 0, 0, 0, 0, 0, 1, 1, 0])
    at_weight = got.weight > 0
    np.testing.assert_array_equal(got.target[at_weight], [7, boi, 8, eos])
    assert [(at, image.noise_limit) for at, image in got.images] == [(3, 500)]


def test_text_is_learned_from_a_span_on(tokenizer):
    spans = (Text([tokenizer.bos]), Image(A, 500), Text([8]), Image(B, 9), Text([tokenizer.eos]))
    boi, eos = tokenizer.boi, tokenizer.eos
    expected = [[boi, 8, boi, eos], [8, boi, eos], [boi, eos], [eos], []]
    for start, tokens in enumerate(expected):
        assert learned(Document(spans, start), tokenizer) == tokens


def test_pairs_come_in_the_shares_of_the_recipe(tokenizer):
    rng = np.random.default_rng(0)
    latent = np.zeros((8, 8, 1), np.float32)
    documents = [
        pair_document([[7], [8, 9]], latent, tokenizer, DataConfig(), LIMITED, rng)
        for _ in range(DRAWS)
    ]
    first = [d for d in documents if d.spans[1].noise_limit == 500]
    dropped = [d for d in documents if d.learn_from]
    caption_first = [d for d in documents if not d.learn_from and d.spans[1].noise_limit == 1000]
    assert len(first) / DRAWS == pytest.approx(0.2, abs=0.03)
    assert len(dropped) / DRAWS == pytest.approx(0.08, abs=0.02)
    assert len(first) + len(dropped) + len(caption_first) == DRAWS
    assert all(len(d.spans[0].ids) == 1 and len(d.spans[2].ids) > 1 for d in first)
    assert all(len(d.spans[0].ids) > 1 and len(d.spans[2].ids) == 1 for d in caption_first)
    assert all(len(d.spans[0].ids) == len(d.spans[2].ids) == 1 for d in dropped)
    assert not any(learned(d, tokenizer) for d in dropped)


def test_the_noise_limit_is_off_by_default(tokenizer):
    data = DataConfig(image_first=1.0, caption_dropout=0.0)
    rng = np.random.default_rng(0)
    pair = pair_document([[7]], A, tokenizer, data, DiffusionConfig(steps=50), rng)
    assert pair.spans[1].noise_limit == 50
    edit = interleaved_document(EDIT, tokenizer, data, DiffusionConfig(steps=50), rng)
    assert [x.noise_limit for x in edit.spans if isinstance(x, Image)] == [50, 50]


def test_edits_lose_their_text_or_all_that_comes_before(tokenizer):
    """As often as in InstructPix2Pix: the text alone 5 %, text and image 5 %."""
    counts = Counter(map(shape, drawn(EDIT, tokenizer, DataConfig())))
    assert set(counts) == {"satbe", "sabe", "sbe"}
    assert counts["sabe"] / DRAWS == pytest.approx(0.05, abs=0.012)
    assert counts["sbe"] / DRAWS == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ("data", "left"),
    [
        (DataConfig(caption_dropout=0.0), {"satbe"}),
        (DataConfig(caption_dropout=1.0, image_dropout=0.0), {"sabe"}),
        (DataConfig(caption_dropout=1.0, image_dropout=1.0), {"sbe"}),
    ],
)
def test_the_fields_steer_what_is_dropped(data, left, tokenizer):
    assert set(map(shape, drawn(EDIT, tokenizer, data))) == left


def test_any_image_of_a_page_may_lose_what_comes_before_it_and_keeps_what_follows(tokenizer):
    counts = Counter(map(shape, drawn(PAGE, tokenizer, DataConfig(caption_dropout=0.3))))
    # b and c with and without the images before; before a there is text alone.
    shares = {"statbtcte": 0.7, "satbtcte": 0.1, "sabtcte": 0.05, "sbtcte": 0.05}
    shares |= {"sabcte": 0.05, "scte": 0.05}
    assert set(counts) == set(shares)
    for left, share in shares.items():
        assert counts[left] / DRAWS == pytest.approx(share, abs=0.02), left


def test_nothing_is_dropped_where_nothing_comes_before_an_image(tokenizer):
    data = DataConfig(caption_dropout=1.0)
    for spans, whole in (((A, Text([7])), "sate"), ((Text([7]), Text([8])), "stte"), ((A,), "sae")):
        assert set(map(shape, drawn(spans, tokenizer, data))) == {whole}


def test_documents_never_grow_and_limits_follow_the_place(tokenizer):
    data = DataConfig(caption_dropout=0.5)
    for spans in (EDIT, PAGE, PAGE[:-1]):
        whole, *_ = drawn(spans, tokenizer, DataConfig(caption_dropout=0.0))
        longest = len(sequence(whole, tokenizer, 4).tokens)
        for document in drawn(spans, tokenizer, data):
            assert len(sequence(document, tokenizer, 4).tokens) <= longest
            # An image is under the limit if something follows it, and then only.
            for span, after in zip(document.spans, document.spans[1:], strict=False):
                if isinstance(span, Image):
                    ends = after is document.spans[-1]
                    assert span.noise_limit == (1000 if ends else 500)


def test_text_that_lost_its_context_is_not_learned(tokenizer):
    boi, eos = tokenizer.boi, tokenizer.eos
    expected = {
        "statbtcte": [7, boi, 8, 9, boi, 10, boi, 11, eos],
        "satbtcte": [9, boi, 10, boi, 11, eos],
        "sabtcte": [boi, 11, eos],
        "sbtcte": [boi, 11, eos],
        "sabcte": [eos],
        "scte": [eos],
    }
    for document in drawn(PAGE, tokenizer, DataConfig(caption_dropout=0.5)):
        assert learned(document, tokenizer) == expected[shape(document)]
    for document in drawn(EDIT, tokenizer, DataConfig(caption_dropout=1.0)):
        assert not learned(document, tokenizer)


def test_an_unconditional_document_begins_as_what_guidance_contrasts_with(tokenizer):
    """The engine runs `<s> BOI` and then patches, at positions 0, 1, 2, ..., with all the noise."""
    rng = np.random.default_rng(0)
    data = DataConfig(caption_dropout=1.0, image_dropout=1.0, image_first=0.0)
    edit = interleaved_document(EDIT, tokenizer, data, LIMITED, rng)
    pair = pair_document([[7, 8]], B, tokenizer, data, LIMITED, rng)
    for document in (edit, pair):
        made = sequence(document, tokenizer, 4)
        other = sequence(Document((Text([tokenizer.bos, 5, tokenizer.eos]),)), tokenizer, 4)
        row = pack([(other, 0, 3), (made, 0, 99)], 16, ImageConfig(4, 4, 1, 2))
        at = np.flatnonzero(row.segment_BL == 2)
        expected = [tokenizer.bos, tokenizer.boi, 0, 0, 0, 0, tokenizer.eoi, tokenizer.eos]
        assert row.tokens_BL[at].tolist() == expected
        assert row.position_BL[at].tolist() == list(range(8))
        assert row.image_start_BM[0] == at[2] and row.image_limit_BM[0] == LIMITED.steps
