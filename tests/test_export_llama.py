"""`export --format llama`: transformers' own code gives the same logits and ids."""

import io
import json
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import tiny
import trained_run
from flax import nnx
from sentencepiece import sentencepiece_model_pb2

from transfusion_jax.commands.main import main
from transfusion_jax.config import Experiment, RopeScaling
from transfusion_jax.data.documents import Document, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import stack
from transfusion_jax.data.tokenizer import Tokenizer, train_tokenizer
from transfusion_jax.export import llama
from transfusion_jax.export.tokenizer_json import BOI, EOI, tokenizer_json
from transfusion_jax.export.trained import open_trained

SIZE = trained_run.tokenizer().size
CASES = {
    "grouped heads": dict(kv_heads=2),
    "another theta": dict(rope_theta=500_000.0),
    "one key head, no images": dict(kv_heads=1, family="llama", image_attention="causal"),
    "scaled as Llama 3.1": dict(
        kv_heads=0, rope_theta=1000.0, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    ),
    "scaled linearly": dict(rope_scaling=RopeScaling("linear", 2.0)),
    "weights of its own for images": dict(experts="modality"),
}


def exported(tmp_path, run: Experiment, *flags: str):
    """The directory that is written, and the parameters."""
    parameters = trained_run.write_run(tmp_path / "run", run)
    words = ["export", str(tmp_path / "run"), "--format", "llama", "--out", str(tmp_path / "out")]
    assert main([*words, *flags]) == 0
    return tmp_path / "out", parameters


def logits(run: Experiment, parameters: dict, ids: list[int]) -> np.ndarray:
    """Of every position of one document."""
    document = sequence(Document((Text(ids),)), trained_run.tokenizer(), run.image.patches)
    length = len(document.tokens)
    batch = jax.tree.map(jnp.asarray, stack([pack([(document, 0, length)], length, run.image)]))
    net = nnx.merge(tiny.planned(run).graph, parameters)
    hidden, _ = net.read(batch, jnp.zeros_like(batch.image_start_BM), net.new_cache(1, length))
    return np.asarray(net.logits(hidden))[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    run = trained_run.experiment(**CASES[case])
    out, parameters = exported(tmp_path, run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    assert isinstance(theirs, transformers.LlamaForCausalLM)
    ids = [1, *np.random.default_rng(0).integers(3, SIZE, 40).tolist()]
    ours = logits(run, parameters, ids)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    assert expected.shape == (41, SIZE)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(ours[:, :SIZE], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_both_versions_of_transformers_find_theta_and_scaling(case, tmp_path):
    """4 reads rope_theta and rope_scaling, 5 rope_parameters."""
    model = trained_run.experiment(**CASES[case]).model
    trained_run.write_run(tmp_path / "run", trained_run.experiment(**CASES[case]))
    raw = llama.config(open_trained(tmp_path / "run", None, "average", print), "float32")
    scaling = {k: v for k, v in raw["rope_parameters"].items() if k != "rope_theta"}
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == model.rope_theta
    assert scaling == (raw["rope_scaling"] or {"rope_type": "default"})
    assert scaling["rope_type"] == {"none": "default"}.get(
        model.rope_scaling.kind, model.rope_scaling.kind
    )


def test_padding_is_cut_and_image_marks_stay(tmp_path):
    run = trained_run.experiment()
    out, parameters = exported(tmp_path, run)
    found = safetensors.numpy.load_file(out / "model-00001-of-00001.safetensors")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == SIZE
    for name, ours in (
        ("model.embed_tokens.weight", parameters["embedding_VD"]),
        ("lm_head.weight", parameters["output_DV"].T),
    ):
        assert found[name].shape == (SIZE, run.model.width)
        np.testing.assert_array_equal(found[name], ours[:SIZE])
    whole = json.loads((out / "tokenizer.json").read_text())
    assert whole["model"]["vocab"][BOI] == SIZE - 2
    assert whole["model"]["vocab"][EOI] == SIZE - 1
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2, SIZE - 2]  # text ends where an image would begin


def test_bfloat16_is_rounded_float32(tmp_path):
    out, parameters = exported(tmp_path, trained_run.experiment(), "--dtype", "bfloat16")
    with safetensors.safe_open(out / "model-00001-of-00001.safetensors", "flax") as reader:
        found = reader.get_tensor("model.layers.1.mlp.gate_proj.weight")
    expected = parameters["transformer"]["blocks"]["mlp"]["gate_DF"][1].T
    np.testing.assert_array_equal(found, expected.astype(jnp.bfloat16))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_array_of_the_checkpoint_is_read_once_and_not_kept(tmp_path):
    trained_run.write_run(tmp_path / "run", trained_run.experiment())
    trained = open_trained(tmp_path / "run", None, "average", print)
    reads = []

    class Counted:
        def read(self, name):
            reads.append(name)
            return trained.arrays.read(name)

        def parts(self, name):
            reads.append(name)
            return trained.arrays.parts(name)

    counted = replace(trained, arrays=Counted())
    found = llama.trunk(counted)
    names = [name for name, _ in llama.values(counted, found)]
    assert names == [tensor.name for tensor in found]
    assert sorted(reads) == sorted({tensor.parameter for tensor in found})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(qk_norm=True), "no norm of queries and keys (model.qk_norm=True)"),
        (dict(norm_placement="post"), "norms are before its layers (model.norm_placement='post')"),
    ],
)
def test_what_is_no_llama_is_refused_in_a_line(change, message, tmp_path, capsys):
    trained_run.write_run(tmp_path / "run", trained_run.experiment(**change))
    words = ["export", str(tmp_path / "run"), "--format", "llama", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0]
    assert not (tmp_path / "out").exists()


# Ids -------------------------------------------------------------------------------------------

CORPUS = (
    *trained_run.TEXTS,
    "",
    " ",
    "   leading and   inner spaces  ",
    "▁ is what stands for a space ▁▁",
    "0 12 345 6789 1,000,000 1e-4 ½ ² ٣",
    "🙂 👩‍👩‍👧 🇪🇺 👍🏽 ☺️ a🙂b",
    "bytes: \x00 \x07 \x7f \ufffd \ufeff \U0010ffff 𐍈 \u2028",
    "\n\n\ttabs and\r\nlines\n",
    "<0x41> is no byte",
    "e\u0301 is not é, Å is not Å",
)


def theirs(tokenizer: Tokenizer):
    """The same in tokenizers; names of special tokens in a text are text to it, as here."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(tokenizer)))
    made.encode_special_tokens = True
    return made


def texts_like(tokenizer: Tokenizer, count: int, seed: int) -> list[str]:
    """Random characters, random entries of the vocabulary, and repetitions of a few characters."""
    draw = random.Random(seed)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)

    def character() -> str:
        bound = draw.choice([0x80, 0x3000, 0x10000, 0x110000])
        return chr(draw.choice([c for c in [draw.randrange(bound), 0x2581] if c >> 11 != 0x1B]))

    def words() -> list[str]:
        kind = draw.randrange(3)
        if kind == 0:
            return [character() for _ in range(60)]
        if kind == 1:
            return [pieces.id_to_piece(i).replace("▁", " ") for i in range(tokenizer.boi)]
        return [character(), character(), " ", " ", "a", "<s>", "</s>", BOI]

    return [
        "".join(draw.choices(words(), k=draw.randrange(draw.choice([4, 40, 200]))))
        for _ in range(count)
    ]


def trained(text: list[str], **changes) -> Tokenizer:
    made = io.BytesIO()
    options = dict(
        model_type="bpe", vocab_size=400, hard_vocab_limit=False, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text * 20), model_writer=made, **{**options, **changes}
    )
    return Tokenizer(made.getvalue())


def repetitive(letters: str, seed: int) -> Tokenizer:
    """Of text in which entries overlap in many ways."""
    draw = random.Random(seed)
    return train_tokenizer(
        ["".join(draw.choices(letters, k=draw.randrange(1, 150))) for _ in range(500)], 450
    )


def runs_of_spaces() -> Tokenizer:
    """With entries of the same score, all of them runs of spaces, as Llama 2's."""
    model = sentencepiece_model_pb2.ModelProto.FromString(trained_run.tokenizer().model)
    for length in (2, 4, 8, 5, 3, 6, 7):
        if "▁" * length not in {piece.piece for piece in model.pieces}:
            model.pieces.add(piece="▁" * length)
    for piece in model.pieces:
        if len(piece.piece) > 1 and set(piece.piece) == {"▁"}:
            piece.score = -1e9
    return Tokenizer(model.SerializeToString())


TOKENIZERS = {
    "ours": trained_run.tokenizer,
    "runs of spaces": runs_of_spaces,
    "two letters": lambda: repetitive("ab ", 0),
    "three letters": lambda: repetitive("abc ", 1),
    "no byte fallback": lambda: trained(list(trained_run.TEXTS), byte_fallback=False),
    "fewer spaces": lambda: trained(list(trained_run.TEXTS), remove_extra_whitespaces=True),
    "no space in front": lambda: trained(list(trained_run.TEXTS), add_dummy_prefix=False),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_equal_those_of_sentencepiece(name):
    ours = TOKENIZERS[name]()
    other = theirs(ours)
    for text in (*CORPUS, *texts_like(ours, 600, seed=3)):
        ids = ours.encode(text)
        assert other.encode(text, add_special_tokens=False).ids == ids, repr(text)
        if name != "no byte fallback":  # sentencepiece writes ?? for what it does not know
            assert other.decode(ids) == ours.decode(ids), repr(text)


def test_a_text_begins_with_bos_and_image_marks_are_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    out, _ = exported(tmp_path, trained_run.experiment())
    ours = trained_run.tokenizer()
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        other = kind.from_pretrained(out)
        assert len(other) == SIZE
        assert (other.bos_token_id, other.eos_token_id) == (ours.bos, ours.eos)
        assert other("people")["input_ids"] == [ours.bos, *ours.encode("people")]
        assert set(other("people")) == {"input_ids", "attention_mask"}  # all that a Llama takes
        marks = [ours.boi, ours.eoi]
        assert other(f"people{BOI}{EOI}")["input_ids"][-2:] == marks
        assert set(marks) <= set(other.all_special_ids)
        whole = [ours.bos, *ours.encode("people"), *marks, ours.eos]
        assert other.decode(whole, skip_special_tokens=True) == "people"
        plain = kind.from_pretrained(out, split_special_tokens=True)
        text = f"people </s> {BOI}"
        assert plain(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


def changed(change) -> Tokenizer:
    model = sentencepiece_model_pb2.ModelProto.FromString(trained_run.tokenizer().model)
    change(model)
    return Tokenizer(model.SerializeToString())


def same_score(model):
    named = [piece for piece in model.pieces if piece.type == 1 and len(piece.piece) > 1]
    named[0].score = named[1].score


UNLIKE = {
    "byte-pair": lambda: trained(list(trained_run.TEXTS), model_type="unigram", vocab_size=340),
    "nmt_nfkc": lambda: trained(list(trained_run.TEXTS), normalization_rule_name="nmt_nfkc"),
    "'@' is user-defined": lambda: trained(list(trained_run.TEXTS), user_defined_symbols=["@"]),
    "of its own": lambda: changed(lambda model: model.pieces.add(piece=BOI, score=-1e6)),
    "no entry": lambda: changed(lambda model: model.pieces.add(piece="ℵℵ", score=-1e6)),
    "the same score": lambda: changed(same_score),
}


@pytest.mark.parametrize(("message", "make"), UNLIKE.items(), ids=UNLIKE)
def test_tokenizers_without_an_equal_are_refused(message, make):
    with pytest.raises(ValueError, match=message):
        tokenizer_json(make())
