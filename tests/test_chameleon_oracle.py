"""Chameleon's transformer against that of transformers, given the same random weights."""

import operator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from test_families import CODES, GRID
from test_llama_oracle import layer_weights

from transfusion_jax.data.documents import Document, Image, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import stack

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V = 44


def chameleon(plan, parameters: dict):
    """The same transformer in transformers: post-norm ("swin_norm"), query-key norm."""
    model = plan.experiment.model
    config = transformers.ChameleonConfig(
        vocab_size=V + CODES,
        hidden_size=model.width,
        intermediate_size=model.ffn_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.num_kv_heads,
        rms_norm_eps=model.norm_epsilon,
        rope_theta=model.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        swin_norm=True,
        vocabulary_map={"<image>": V - 1},
        vq_config={"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1},
        attn_implementation="eager",
    )
    theirs = transformers.ChameleonModel(config).eval()
    weights = {
        "embed_tokens.weight": parameters["embedding_VD"],
        "norm.weight": parameters["transformer"]["norm"]["scale"],
    }
    for layer in range(model.layers):
        block = jax.tree.map(operator.itemgetter(layer), parameters["transformer"]["blocks"])
        prefix = f"layers.{layer}."
        weights |= layer_weights(prefix, block)
        for ours, name, heads in (("q", "q", model.heads), ("k", "k", model.num_kv_heads)):
            norm = block["attention"][f"{ours}_norm"]
            for part, their_part in (("scale", "weight"), ("bias", "bias")):
                weights[f"{prefix}self_attn.{name}_norm.{their_part}"] = jnp.tile(
                    norm[part], (heads, 1)
                )
    loaded = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    missing, unexpected = theirs.load_state_dict(loaded, strict=False)
    assert not unexpected and all(name.startswith("vqmodel.") for name in missing)
    return theirs


def test_hidden_states_of_text_and_codes():
    small = tiny.small()
    model = replace(
        small.model,
        family="chameleon",
        image_attention="causal",
        norm_placement="post",
        qk_norm=True,
    )
    plan = tiny.planned(replace(small, model=model, image=GRID))
    parameters = tiny.random_parameters(plan, seed=4)
    theirs = chameleon(plan, parameters)
    rng = np.random.default_rng(0)
    codes = rng.integers(CODES, size=(2, 2, 1)).astype(np.float32)
    spans = (Text([1, 7, 9]), Image(codes, 1), Text([5, 4, 30, 2]))
    document = sequence(Document(spans), tiny.TOKENIZER, GRID.patches)
    length = len(document.tokens)
    batch = jax.tree.map(jnp.asarray, stack([pack([(document, 0, length)], length, GRID)]))
    net = nnx.merge(plan.graph, parameters)
    ours, _ = net.read(batch, jnp.zeros_like(batch.image_start_BM), net.new_cache(1, length))
    tokens = document.tokens.copy()
    at = document.images[0][0]
    tokens[at : at + GRID.patches] = V + codes.reshape(-1)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens[None].astype(np.int64))).last_hidden_state.numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-4)
