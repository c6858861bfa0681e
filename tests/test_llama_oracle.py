"""The text trunk against the Llama of transformers, given the same random weights."""

import operator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from transfusion_jax.data.documents import Document, Text, sequence
from transfusion_jax.data.packing import pack
from transfusion_jax.data.pipeline import stack
from transfusion_jax.generation.engine import Engine

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 48
# Lengths of the documents of each row.
ROWS = ((1, 2, 17, 5), (48,), (30, 18), (3,))
CASES = [(100.0, 2), (10_000.0, 1), (10_000.0, 4)]  # theta, key heads of 4


def planned(theta: float, kv_heads: int):
    experiment = tiny.small()
    model = replace(experiment.model, rope_theta=theta, kv_heads=kv_heads)
    return tiny.planned(replace(experiment, model=model))


def parameters_of(plan) -> dict:
    """Random weights that never choose an image mark or an id past the tokenizer's."""
    parameters = tiny.random_parameters(plan, seed=6)
    never = jnp.asarray([tiny.TOKENIZER.bos, *range(tiny.TOKENIZER.boi, 44)])
    output = parameters["output_DV"].at[:, never].set(0.0)
    output = output.at[:, tiny.TOKENIZER.eos].multiply(1.5)  # some texts end before their limit
    return {**parameters, "output_DV": output}


def layer_weights(prefix: str, block: dict) -> dict:
    """One block's parameters under the names and in the layout of transformers."""
    attention, mlp = block["attention"], block["mlp"]
    D = attention["q_DNH"].shape[0]
    return {
        prefix + "input_layernorm.weight": block["attention_norm"]["scale"],
        prefix + "post_attention_layernorm.weight": block["mlp_norm"]["scale"],
        prefix + "self_attn.q_proj.weight": attention["q_DNH"].reshape(D, -1).T,
        prefix + "self_attn.k_proj.weight": attention["k_DKH"].reshape(D, -1).T,
        prefix + "self_attn.v_proj.weight": attention["v_DKH"].reshape(D, -1).T,
        prefix + "self_attn.o_proj.weight": attention["out_NHD"].reshape(-1, D).T,
        prefix + "mlp.gate_proj.weight": mlp["gate_DF"].T,
        prefix + "mlp.up_proj.weight": mlp["up_DF"].T,
        prefix + "mlp.down_proj.weight": mlp["down_FD"].T,
    }


def llama_config(model):
    """The `ModelConfig` of the text trunk in transformers."""
    return transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        intermediate_size=model.ffn_width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.num_kv_heads,
        rms_norm_eps=1e-5,
        rope_theta=model.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=False,
        bos_token_id=tiny.TOKENIZER.bos,
        eos_token_id=tiny.TOKENIZER.eos,
        pad_token_id=0,
        attn_implementation="eager",
    )


def llama(plan, parameters: dict):
    """The same model in transformers."""
    model = plan.experiment.model
    weights = {
        "model.embed_tokens.weight": parameters["embedding_VD"],
        "lm_head.weight": parameters["output_DV"].T,
        "model.norm.weight": parameters["transformer"]["norm"]["scale"],
    }
    for layer in range(model.layers):
        block = jax.tree.map(operator.itemgetter(layer), parameters["transformer"]["blocks"])
        weights |= layer_weights(f"model.layers.{layer}.", block)
    theirs = transformers.LlamaForCausalLM(llama_config(model)).eval()
    loaded = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    theirs.load_state_dict(loaded, strict=True)
    # Versions differ in the name under which they heed theta.
    frequencies = theirs.model.rotary_emb.inv_freq
    assert float(frequencies[1]) == pytest.approx(model.rope_theta ** (-2 / model.head_dim))
    return theirs


@pytest.mark.parametrize(("theta", "kv_heads"), CASES)
def test_logits(theta, kv_heads):
    plan = planned(theta, kv_heads)
    parameters = parameters_of(plan)
    theirs = llama(plan, parameters)
    rng = np.random.default_rng(0)
    texts = [[rng.integers(3, 38, n).tolist() for n in row] for row in ROWS]
    packed = []
    for row in texts:
        documents = [sequence(Document((Text(ids),)), tiny.TOKENIZER, 4) for ids in row]
        packed.append(pack([(d, 0, len(d.tokens)) for d in documents], LENGTH, tiny.IMAGE))
    batch = jax.tree.map(jnp.asarray, stack(packed))

    @jax.jit
    def run(parameters, batch):
        model = nnx.merge(plan.graph, parameters)
        hidden, _ = model(batch, batch.latents_BMhwc, jnp.zeros_like(batch.image_start_BM))
        return model.logits(hidden)

    ours = np.asarray(run(parameters, batch))
    for b, row in enumerate(texts):
        at = 0
        for ids in row:
            with torch.no_grad():
                expected = theirs(torch.tensor([ids])).logits[0].numpy()
            difference = np.abs(ours[b, at : at + len(ids)] - expected).max()
            assert difference <= 1e-5 * np.abs(expected).max(), (b, len(ids))
            at += len(ids)


@pytest.mark.parametrize(("theta", "kv_heads"), CASES[:2])
def test_cached_greedy_generation(theta, kv_heads):
    plan = planned(theta, kv_heads)
    parameters = parameters_of(plan)
    theirs = llama(plan, parameters)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 38, n).tolist() for n in (1, 3, 9, 20, 4, 6, 12, 31)]
    requests = [(" ".join(map(str, ids)),) for ids in prompts]
    spans = Engine(plan.experiment, tiny.TOKENIZER, plan.graph, parameters).generate(requests)
    room, lengths = plan.experiment.sampler.max_tokens, []
    for ids, ours in zip(prompts, spans, strict=True):
        prompt = torch.tensor([[tiny.TOKENIZER.bos, *ids]])
        with torch.no_grad():
            whole = theirs.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=room,
            )
        expected = whole[0, prompt.shape[1] :].tolist()
        lengths.append(len(expected))
        if expected[-1] == tiny.TOKENIZER.eos:
            expected.pop()
        text = tiny.TOKENIZER.decode(expected)
        assert ours == ([text] if text else [])
    assert min(lengths) < max(lengths) == room
