"""`import llama`: the imported model gives the logits of transformers' own code."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
import trained_run
from flax import nnx

from transfusion_jax.commands.main import main
from transfusion_jax.config import Experiment, MeshConfig
from transfusion_jax.data.documents import Document, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import stack
from transfusion_jax.export.from_llama import grown, halves_apart, huggingface_name
from transfusion_jax.export.llama_config import source_config
from transfusion_jax.parallel.mesh import make_mesh
from transfusion_jax.pretraining.initial import initialise_from
from transfusion_jax.pretraining.state import blueprint
from transfusion_jax.tensors import open_tensors

V, LENGTH = 300, 40
SIZE = trained_run.tokenizer().size
CASES = {
    "as Llama 2": dict(),
    "as Llama 3": dict(num_key_value_heads=2, rope_theta=500_000.0),
    "as Llama 3.1": dict(
        num_key_value_heads=2,
        rope_theta=5000.0,
        rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "as Llama 3.2, tied": dict(num_key_value_heads=1, tie_word_embeddings=True),
    "scaled linearly": dict(rope_scaling=dict(rope_type="linear", factor=4.0)),
}  # fmt: skip


def theirs(**config):
    """A Llama of transformers with random weights."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64, rms_norm_eps=1e-5,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **config)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in made.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = 1 + 0.3 * noise if weight.ndim == 1 else noise / weight.shape[1] ** 0.5
        if "embed" in name:
            weight.data *= 5
    return made


def expected(model, ids: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def started(directory: Path, mesh: MeshConfig | None = None, **changes):
    """A run that starts from imported weights: its experiment, graph and parameters."""
    described = json.loads((directory / "config.json").read_text())
    trunk = directory.parent / "trunk"
    trunk.mkdir(exist_ok=True)
    (trunk / "config.json").write_text(json.dumps(described["text_config"]))
    model = source_config(trunk, open_tensors(directory)).model
    base = replace(tiny.small(), model=replace(model, compute_dtype="float32", **changes))
    experiment = replace(base, train=replace(base.train, initial=str(directory)))
    devices = jax.devices()[:1] if mesh is None else jax.devices()[:2]
    planned = blueprint(experiment, make_mesh(mesh or MeshConfig(data=1), devices))
    tokenizer = directory / "tokenizer.model"
    model = tokenizer.read_bytes() if tokenizer.exists() else b""
    boi = json.loads((directory / "config.json").read_text())["boi_token_id"]
    given = SimpleNamespace(model=model, boi=boi)
    state = initialise_from(str(directory), planned, given, lambda line: None)()
    return experiment, planned.graph, state.parameters


def logits(run: tuple[Experiment, nnx.GraphDef, dict], ids: list[int]) -> np.ndarray:
    experiment, graph, parameters = run
    document = sequence(Document((Text(ids),)), tiny.TOKENIZER, experiment.image.patches)
    packed = pack([(document, 0, len(ids))], len(ids), experiment.image)
    batch = jax.tree.map(jnp.asarray, stack([packed]))
    net = nnx.merge(graph, jax.device_get(parameters))
    t_BM = jnp.zeros_like(batch.image_start_BM)
    hidden, _ = net.read(batch, t_BM, net.new_cache(1, len(ids)))
    return np.asarray(net.logits(hidden))[0]


def ids_below(count: int) -> list[int]:
    return np.random.default_rng(0).integers(count, size=LENGTH).tolist()


def imported(tmp_path: Path, source: str = "theirs") -> Path:
    words = ["import", "llama", str(tmp_path / source), "--out", str(tmp_path / "ours")]
    assert main(words) == 0
    return tmp_path / "ours"


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, tmp_path):
    model = theirs(**CASES[case])
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 3
    run = started(imported(tmp_path))
    ids = ids_below(V)
    found = expected(model, ids)
    assert np.abs(found).max() > 1
    np.testing.assert_allclose(logits(run, ids)[:, :V], found, atol=1e-4, rtol=0)


def test_a_model_of_images_starts_from_it_on_another_mesh(tmp_path):
    """Its own layers of images are drawn; text is read as before."""
    model = theirs(num_key_value_heads=2)
    model.save_pretrained(tmp_path / "theirs")
    run = started(
        imported(tmp_path), MeshConfig(data=1, fsdp=2),
        family="transfusion", image_attention="bidirectional",
    )  # fmt: skip
    assert "patches" in run[2]
    ids = ids_below(V)
    np.testing.assert_allclose(logits(run, ids)[:, :V], expected(model, ids), atol=1e-4, rtol=0)


def test_bfloat16_stays_and_float16_becomes_float32(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    for name, dtype in (("theirs", torch.bfloat16), ("half", torch.float16)):
        theirs().to(dtype).save_pretrained(tmp_path / name)
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        out = imported(tmp_path, name)
        with safetensors.safe_open(out / "model-00001-of-00001.safetensors", "flax") as reader:
            kinds = {str(reader.get_tensor(tensor).dtype) for tensor in reader.keys()}
        assert kinds == {"bfloat16" if name == "theirs" else "float32"}
        ids = ids_below(V)
        found = expected(model, ids)
        np.testing.assert_allclose(logits(started(out), ids)[:, :V], found, atol=1e-4, rtol=0)
        out.rename(tmp_path / f"{name}-ours")


def as_meta(model, **params) -> tuple[dict, dict]:
    """The same weights under Meta's names and in Meta's order of queries and keys."""
    config = model.config
    heads = {"wq": config.num_attention_heads, "wk": config.num_key_value_heads}
    names = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings",
        "lm_head": "output",
    }  # fmt: skip
    tensors = {}
    for name, tensor in model.state_dict().items():
        theirs = name.removeprefix("model.")
        for old, new in names.items():
            theirs = theirs.replace(old, new) if old in theirs else theirs
        tensor = tensor.numpy()
        if count := heads.get(theirs.rsplit(".", 2)[-2]):
            # Rows i and i + H / 2 of a head become 2i and 2i + 1.
            half = config.head_dim // 2
            turned = [
                tensor[head * config.head_dim + i % 2 * half + i // 2]
                for head in range(count)
                for i in range(config.head_dim)
            ]
            tensor = np.stack(turned)
        tensors[theirs] = np.ascontiguousarray(tensor)
    raw = dict(
        dim=config.hidden_size, n_layers=config.num_hidden_layers, vocab_size=-1,
        n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads,
        multiple_of=256, norm_eps=config.rms_norm_eps, **params,
    )  # fmt: skip
    return tensors, raw


def write_meta(directory: Path, tensors: dict, raw: dict, files: int = 1):
    directory.mkdir()
    (directory / "params.json").write_text(json.dumps(raw))
    for k in range(files):
        part = {name: tensors[name] for name in sorted(tensors)[k::files]}
        safetensors.numpy.save_file(part, directory / f"consolidated.{k:02}.safetensors")


@pytest.mark.parametrize("scaled", [False, True])
def test_metas_layout_gives_the_same(scaled, tmp_path):
    scaling = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )  # fmt: skip
    # Angles small enough that wrong ones at 40 positions of 8192 show.
    more = dict(rope_scaling=scaling, rope_theta=1e5) if scaled else dict(rope_theta=1e5)
    model = theirs(num_key_value_heads=2, **more)
    rope = dict(use_scaled_rope=True, rope_scaling_factor=8) if scaled else {}
    tensors, raw = as_meta(model, rope_theta=1e5, **rope)
    tensors["rope.freqs"] = np.ones(4, np.float32)
    write_meta(tmp_path / "theirs", tensors, raw, files=2)
    run = started(imported(tmp_path))
    kind = "llama3" if scaled else "none"
    assert run[0].model.rope_scaling.kind == kind
    ids = ids_below(V)
    np.testing.assert_allclose(logits(run, ids)[:, :V], expected(model, ids), atol=1e-4, rtol=0)


def test_halves_of_heads_move_apart():
    rows = np.arange(12)[:, None]
    assert halves_apart(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert huggingface_name("layers.12.ffn_norm.weight") == (
        "model.layers.12.post_attention_layernorm.weight"
    )


def test_new_rows_are_the_mean_of_the_others():
    matrix = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    found = grown(matrix, 8)
    np.testing.assert_array_equal(found[:5], matrix)
    np.testing.assert_allclose(found[5:], np.tile(matrix.mean(0), (3, 1)), rtol=1e-6)


def test_the_vocabulary_has_room_for_image_marks_and_the_tokenizer_comes_along(tmp_path, capsys):
    tokenizer = trained_run.tokenizer()
    model = theirs()
    model.resize_token_embeddings(tokenizer.boi)
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.model").write_bytes(tokenizer.model)
    out = imported(tmp_path)
    described = json.loads((out / "config.json").read_text())
    assert described["text_config"]["vocab_size"] == 512
    assert (described["boi_token_id"], described["eoi_token_id"]) == (tokenizer.boi, tokenizer.eoi)
    assert (out / "tokenizer.model").read_bytes() == tokenizer.model
    said = capsys.readouterr().out
    assert f"BOI and EOI are tokens {tokenizer.boi} and {tokenizer.eoi} of 512" in said
    assert "--model.kv-heads 4 --model.mlp-width 48 --model.vocab-size 512" in said


def test_a_run_exported_as_a_llama_comes_back(tmp_path, capsys):
    """Every row of a token is as it was, those of BOI and EOI too."""
    run = trained_run.experiment()
    parameters = trained_run.write_run(tmp_path / "run", run)
    words = ["export", str(tmp_path / "run"), "--format", "llama"]
    assert main([*words, "--out", str(tmp_path / "theirs")]) == 0
    experiment, _, found = started(
        imported(tmp_path), family="transfusion", image_attention="bidirectional"
    )
    assert experiment.model.vocab_size == 512
    said = capsys.readouterr().out
    assert f"BOI and EOI are tokens {SIZE - 2} and {SIZE - 1} of 512" in said
    assert f"begins as BOI is their token {SIZE - 2}, as EOI {SIZE - 1}" in said
    np.testing.assert_array_equal(found["embedding_VD"][:SIZE], parameters["embedding_VD"][:SIZE])
    np.testing.assert_array_equal(found["output_DV"][:, :SIZE], parameters["output_DV"][:, :SIZE])
    jax.tree.map(np.testing.assert_array_equal, found["transformer"], parameters["transformer"])


# Bad input --------------------------------------------------------------------------------------


def write_small(directory: Path, config: dict | None = None, **tensors):
    """A Hugging Face layout whose config says one layer."""
    directory.mkdir(exist_ok=True)
    raw = dict(
        model_type="llama", vocab_size=10, hidden_size=8, intermediate_size=12,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    (directory / "config.json").write_text(json.dumps({**raw, **(config or {})}))
    safetensors.numpy.save_file(
        tensors or {"model.norm.weight": np.ones(8, np.float32)}, directory / "model.safetensors"
    )


WHOLE = {
    name: np.ones(shape, np.float32)
    for name, shape in {
        "model.embed_tokens.weight": (10, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        **{f"model.layers.0.self_attn.{x}_proj.weight": (8, 8) for x in "qkvo"},
        "model.layers.0.post_attention_layernorm.weight": (8,),
        "model.layers.0.mlp.gate_proj.weight": (12, 8),
        "model.layers.0.mlp.up_proj.weight": (12, 8),
        "model.layers.0.mlp.down_proj.weight": (8, 12),
        "model.norm.weight": (8,),
        "lm_head.weight": (10, 8),
    }.items()
}
"""The tensors of `write_small`'s config."""

BAD = {
    "no such file or directory": lambda path: None,
    "no safetensors in": lambda path: path.mkdir(),
    "no config.json in": lambda path: (write_small(path), (path / "config.json").unlink()),
    "it has no 'hidden_size'": lambda path: (
        write_small(path), (path / "config.json").write_text('{"model_type": "llama"}'),
    ),
    "model_type='mistral' is not 'llama'": lambda path: write_small(
        path, {"model_type": "mistral"}
    ),
    "rope_type='yarn' is not supported": lambda path: write_small(
        path, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    ),
    "attention_bias=True is not supported": lambda path: write_small(
        path, {"attention_bias": True}
    ),
    "num_attention_heads=0 is not a whole": lambda path: write_small(
        path, {"num_attention_heads": 0}
    ),
    "hidden_size=8.0 is not a whole": lambda path: write_small(path, {"hidden_size": 8.0}),
    "100000000 layers, and 1 tensors": lambda path: write_small(
        path, {"num_hidden_layers": 10**8}
    ),
    "no attribute 'get'": lambda path: write_small(path, {"rope_scaling": "linear"}),
    "cannot convert float infinity": lambda path: write_small(
        path, {"max_position_embeddings": float("inf")}
    ),
    "head_dim=8 times num_attention_heads=2": lambda path: write_small(path, {"head_dim": 8}),
    "lm_head.weight missing instead of (10, 8); model.embed_tokens.weight missing": write_small,
    "mlp.up_proj.weight has numbers that are not finite": lambda path: write_small(
        path, **{**WHOLE, "model.layers.0.mlp.up_proj.weight": np.full((12, 8), np.nan, np.float32)}
    ),
    "is a pickle": lambda path: (path.mkdir(), (path / "pytorch_model.bin").write_bytes(b"x")),
    "2 pickles, consolidated.00.pth and so on": lambda path: (
        path.mkdir(),
        [(path / f"consolidated.0{k}.pth").write_bytes(b"x") for k in range(2)],
    ),
    "is damaged": lambda path: (
        write_small(path),
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1]),
    ),
    "no rope_scaling_factor beside it": lambda path: write_meta(
        path,
        {"tok_embeddings.weight": np.ones((4, 8), np.float32)},
        {"use_scaled_rope": True, "dim": 8, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_a_line(message, tmp_path, capsys):
    BAD[message](tmp_path / "theirs")
    words = ["import", "llama", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]
    assert main(words) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and message in said[0], said
    assert not (tmp_path / "ours").exists()


def test_a_tokenizer_with_more_entries_than_rows_is_refused(tmp_path, capsys):
    theirs().save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.model").write_bytes(trained_run.tokenizer().model)
    words = ["import", "llama", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]
    assert main(words) == 2
    assert f"has {SIZE - 2} entries, and the vocabulary {V} rows" in capsys.readouterr().err


def test_a_tokenizer_that_is_not_sentencepieces_is_left_out_and_said(tmp_path, capsys):
    model = theirs()
    model.resize_token_embeddings(384)  # a multiple of 128, so that rounding makes no room
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # as Llama 3's
    out = imported(tmp_path)
    assert "no sentencepiece tokenizer.model" in capsys.readouterr().out
    assert not (out / "tokenizer.model").exists()
    described = json.loads((out / "config.json").read_text())
    assert (described["boi_token_id"], described["eoi_token_id"]) == (384, 385)
    assert described["text_config"]["vocab_size"] == 512
