"""`export --format gguf`: read back by transformers' reader of GGUF."""

import sys

import numpy as np
import pytest
import trained_run
from test_export_llama import CORPUS, SIZE, logits, texts_like

from transfusion_jax.commands.main import main
from transfusion_jax.config import Experiment, RopeScaling

gguf = pytest.importorskip("gguf")


def exported(tmp_path, run: Experiment, *flags: str) -> tuple[int, dict]:
    parameters = trained_run.write_run(tmp_path / "run", run)
    words = ["export", str(tmp_path / "run"), "--format", "gguf", "--out", str(tmp_path / "out")]
    return main([*words, *flags]), parameters


@pytest.mark.long
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_logits_and_ids_equal_those_of_transformers(kv_heads, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF with accelerate")
    run = trained_run.experiment(kv_heads=kv_heads, rope_theta=700.0)
    code, parameters = exported(tmp_path, run)
    assert code == 0
    named = dict(gguf_file="model.gguf", dtype=torch.float32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", **named).eval()
    ids = [1, *np.random.default_rng(0).integers(3, SIZE, 40).tolist()]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0].numpy()
    found = logits(run, parameters, ids)[:, :SIZE]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    ours = trained_run.tokenizer()
    other = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    assert (len(other), other.bos_token_id, other.eos_token_id) == (SIZE, ours.bos, ours.eos)
    for text in (*CORPUS, *texts_like(ours, 200, seed=4)):
        # Its reader puts no space before a text that begins with one, and looks for "</s>" in it.
        if text[:1] not in (" ", "▁") and "<" not in text:
            assert other(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


def test_names_shapes_kinds_and_settings(tmp_path):
    run = trained_run.experiment(kv_heads=2)
    code, parameters = exported(tmp_path, run, "--dtype", "bfloat16")
    assert code == 0
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 9 * run.model.layers
    kinds = {
        name: tensors[name].tensor_type.name for name in ("output.weight", "output_norm.weight")
    }
    assert kinds == {"output.weight": "BF16", "output_norm.weight": "F32"}
    norm = parameters["transformer"]["blocks"]["mlp_norm"]["scale"][1]
    np.testing.assert_array_equal(tensors["blk.1.ffn_norm.weight"].data, norm)
    # Row 1 of a head, in GGUF, is what our halves have H / 2 behind row 0.
    matrix = gguf.dequantize(
        tensors["blk.0.attn_k.weight"].data, tensors["blk.0.attn_k.weight"].tensor_type
    )
    keys = parameters["transformer"]["blocks"]["attention"]["k_DKH"][0]
    np.testing.assert_allclose(matrix[1], keys[:, 0, run.model.head_dim // 2], rtol=1e-2)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["llama.rope.freq_base"] == pytest.approx(run.model.rope_theta)
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert fields["tokenizer.ggml.tokens"][-2:] == ["<boi>", "<eoi>"]
    assert fields["tokenizer.ggml.token_type"][:3] == [2, 3, 3]  # unknown, control, control


def test_scaled_frequencies_are_refused_in_a_line(tmp_path, capsys):
    code, _ = exported(tmp_path, trained_run.experiment(rope_scaling=RopeScaling("linear", 2.0)))
    assert code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "model.rope_scaling.kind='linear'" in said[0]


def test_a_package_that_is_missing_is_named_in_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "transfusion_jax.export.gguf", raising=False)
    code, _ = exported(tmp_path, trained_run.experiment())
    assert code == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "needs the package gguf: pip install" in said[0]
