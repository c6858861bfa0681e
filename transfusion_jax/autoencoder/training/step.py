"""One step of autoencoder training as a pure function: `step(state, judges, image) -> (state, metrics)`.

The autoencoder and its discriminator learn from the same forward pass. The gradients of the reconstruction terms
and of the GAN term meet at the reconstruction, where they are weighed against each other, and go back through the
autoencoder together.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from transfusion_jax.autoencoder import quantizer
from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.autoencoder.training import losses, resnet
from transfusion_jax.autoencoder.vae import LAST_KERNEL, abstract_autoencoder, build
from transfusion_jax.metrics.psnr import psnr
from transfusion_jax.parallel.rules import replicated
from transfusion_jax.training.update import Metrics, average, choose, learning_rate, make_optimizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Judges:
    """Networks that stay as they are; None where the loss goes without the term."""

    lpips: losses.Lpips | None
    identity: resnet.Weights | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """All that training changes; None for what the experiment has not."""

    step: Array
    """Steps taken, skipped ones included; also the index of the next batch."""
    parameters: Any
    ema: Any
    optimizer: Any
    discriminator: Any
    discriminator_optimizer: Any
    counts: Array | None
    """[codes]: how often each code was used since codes were last revived."""
    skipped: Array
    skipped_in_a_row: Array


@dataclass(frozen=True)
class Blueprint:
    """What a state looks like before it exists."""

    experiment: AutoencoderExperiment
    graph: nnx.GraphDef
    discriminator_graph: nnx.GraphDef | None
    optimizer: optax.GradientTransformation
    discriminator_optimizer: optax.GradientTransformation | None
    abstract: State
    """Shapes and dtypes; every array is whole on every device, and the batch is cut."""

    def initialise(self) -> State:
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        return jax.jit(functools.partial(_fresh, self), out_shardings=shardings)()


def blueprint(experiment: AutoencoderExperiment, mesh: Mesh) -> Blueprint:
    """Plans the state of an experiment on a mesh, without making any array."""
    settings, start = experiment.train, experiment.loss.gan_start
    graph, parameters = abstract_autoencoder(experiment.model)
    optimizer = make_optimizer(experiment.optimizer, settings.steps, parameters)
    discriminator_graph = discriminator_optimizer = None
    if experiment.loss.gan:
        discriminator_graph, parameters = _abstract_discriminator(experiment)
        discriminator_optimizer = make_optimizer(
            experiment.optimizer, settings.steps, parameters, start
        )
    plan = Blueprint(
        experiment, graph, discriminator_graph, optimizer, discriminator_optimizer, None
    )
    shapes, whole = jax.eval_shape(functools.partial(_fresh, plan)), replicated(mesh)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), shapes)
    return replace(plan, abstract=placed)


def _discriminator(experiment: AutoencoderExperiment) -> losses.Discriminator:
    loss, rngs = experiment.loss, nnx.Rngs(params=experiment.train.seed + 1)
    return losses.Discriminator(
        experiment.model.channels, loss.discriminator_width, loss.discriminator_layers, rngs=rngs
    )


def _abstract_discriminator(experiment: AutoencoderExperiment) -> tuple[nnx.GraphDef, nnx.State]:
    graphs = []

    def parameters():
        graph, state = nnx.split(_discriminator(experiment), nnx.Param)
        graphs.append(graph)
        return state

    state = jax.eval_shape(parameters)
    return graphs.pop(), state


def _fresh(plan: Blueprint) -> State:
    """Step 0, drawn from the experiment's seed."""
    experiment, zero = plan.experiment, jnp.zeros((), jnp.int32)
    pure = lambda module: nnx.to_pure_dict(nnx.state(module, nnx.Param))  # noqa: E731
    parameters = pure(build(experiment.model, experiment.train.seed))
    discriminator = pure(_discriminator(experiment)) if experiment.loss.gan else None
    revives = experiment.model.kind == "vq" and experiment.loss.revive_codes
    return State(
        step=zero,
        parameters=parameters,
        ema=jax.tree.map(
            jnp.copy, parameters
        ),  # apart, so that the step can take over both buffers
        optimizer=plan.optimizer.init(parameters),
        discriminator=discriminator,
        discriminator_optimizer=plan.discriminator_optimizer.init(discriminator)
        if discriminator
        else None,
        counts=jnp.zeros(experiment.model.codes, jnp.int32) if revives else None,
        skipped=zero,
        skipped_in_a_row=zero,
    )


def train_step(plan: Blueprint) -> Callable[[State, Judges, Array], tuple[State, Metrics]]:
    """The step of an experiment; jit it once, with the state donated (`compiled_step`).

    The latents' noise comes from (seed, step). A step whose loss or gradients are not finite changes nothing but
    the counters.
    """
    experiment = plan.experiment
    rate = learning_rate(experiment.optimizer, experiment.train.steps)

    def step(state: State, judges: Judges, image_Bhwc: Array) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(experiment.train.seed), state.step)
        forward = functools.partial(_forward, plan, image_Bhwc, key)
        (reconstruction, regular_B), pull, codes = jax.vjp(forward, state.parameters, has_aux=True)
        judge = jax.value_and_grad(
            functools.partial(_judge, experiment, judges, image_Bhwc), (0, 1), has_aux=True
        )
        (value, metrics), (at_reconstruction, at_regular) = judge(reconstruction, regular_B)

        def at_last_kernel(gradient: Array) -> Array:
            (gradients,) = pull((gradient, jnp.zeros_like(regular_B)))
            return functools.reduce(lambda tree, name: tree[name], LAST_KERNEL, gradients)

        gan = _gan(plan, state, image_Bhwc, reconstruction)
        weight = losses.adaptive_weight(
            at_last_kernel(at_reconstruction), at_last_kernel(gan.gradient)
        )
        weight = experiment.loss.gan * jax.lax.stop_gradient(weight)
        (gradients,) = pull((at_reconstruction + weight * gan.gradient, at_regular))
        value, norm = value + weight * gan.value, optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(value) & jnp.isfinite(gan.norm)

        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its integer counts
            updates, optimizer = plan.optimizer.update(gradients, state.optimizer, state.parameters)
            current_rate = rate(state.step - state.skipped)
        parameters = optax.apply_updates(state.parameters, updates)
        new = {
            "parameters": parameters,
            "ema": average(state.ema, parameters, state.step - state.skipped, experiment.train.ema_decay),
            "optimizer": optimizer, "discriminator": gan.discriminator, "discriminator_optimizer": gan.optimizer,
            "counts": state.counts,
        }  # fmt: skip
        if state.counts is not None:
            new |= _revived(experiment, codes, state, new["parameters"], new["ema"], key)
        skipped = jnp.where(finite, 0, 1).astype(jnp.int32)
        counters = {
            "skipped": state.skipped + skipped,
            "skipped_in_a_row": (state.skipped_in_a_row + 1) * skipped,
        }
        kept = {name: choose(finite, tree, getattr(state, name)) for name, tree in new.items()}
        if plan.discriminator_graph is not None:
            metrics |= {
                "gan": gan.value,
                "gan_weight": jnp.where(gan.norm > 0, weight, 0.0),
                "discriminator": gan.loss,
            }
        metrics |= {"loss": value, "grad_norm": norm, "learning_rate": current_rate, **counters}
        return State(step=state.step + 1, **kept, **counters), metrics | _code_metrics(
            experiment, codes
        )

    return step


def compiled_step(plan: Blueprint) -> Callable[[State, Judges, Array], tuple[State, Metrics]]:
    """`train_step`, jitted: the state is donated and keeps its placement."""
    placement = jax.tree.map(lambda x: x.sharding, plan.abstract)
    return jax.jit(train_step(plan), donate_argnums=0, out_shardings=(placement, None))


class Codes(NamedTuple):
    latents: Array
    """What was quantised."""
    indices: Array


def _forward(
    plan: Blueprint, image_Bhwc: Array, key: Array, parameters: Any
) -> tuple[tuple[Array, Array], Any]:
    """Reconstruction and what holds the latents in shape [B]; then, of a "vq" autoencoder, its codes."""
    model = nnx.merge(plan.graph, parameters)
    if plan.experiment.model.kind == "kl":
        gaussian = model.encode(image_Bhwc)
        return (model.decode(gaussian.sample(key)), losses.kl(gaussian.kl(), image_Bhwc)), None
    latents = model.features(image_Bhwc)
    quantized = model.quantizer(latents, plan.experiment.loss.commitment)
    return (model.decode(quantized.latent), quantized.loss_B), Codes(latents, quantized.codes)


def _judge(
    experiment: AutoencoderExperiment,
    judges: Judges,
    image_Bhwc: Array,
    reconstruction_Bhwc: Array,
    regular_B: Array,
) -> tuple[Array, Metrics]:
    """The loss without its GAN term, and each term by itself."""
    config = experiment.loss
    terms = {"l1": losses.l1(image_Bhwc, reconstruction_Bhwc)} if config.l1 else {}
    if judges.lpips is not None:
        terms["lpips"] = losses.lpips(judges.lpips, image_Bhwc, reconstruction_Bhwc)
    if judges.identity is not None:
        terms["identity"] = resnet.identity(judges.identity, image_Bhwc, reconstruction_Bhwc)
    terms["kl" if experiment.model.kind == "kl" else "codebook"] = regular_B
    metrics = {name: jnp.mean(term) for name, term in terms.items()}
    metrics["psnr"] = jnp.mean(psnr(image_Bhwc, jax.lax.stop_gradient(reconstruction_Bhwc)))
    return jnp.mean(losses.weighted(config, terms)), metrics


class Gan(NamedTuple):
    """What the discriminator has to say at a step, and what it learnt."""

    value: Array
    """The GAN term, without its weights."""
    gradient: Array
    """Of `value`, at the reconstruction."""
    loss: Array
    """The discriminator's own."""
    norm: Array
    """Of its gradients."""
    discriminator: Any
    optimizer: Any


def _gan(plan: Blueprint, state: State, image_Bhwc: Array, reconstruction_Bhwc: Array) -> Gan:
    """The GAN term and a step of the discriminator; before `gan_start`, zeros and no work."""
    zero = jnp.zeros((), jnp.float32)
    kept = (state.discriminator, state.discriminator_optimizer)
    idle = Gan(zero, jnp.zeros_like(reconstruction_Bhwc), zero, zero, *kept)
    if plan.discriminator_graph is None:
        return idle

    def term(x):
        return jnp.mean(
            losses.generator_loss(nnx.merge(plan.discriminator_graph, state.discriminator)(x))
        )

    def discriminator_loss(parameters):
        discriminator = nnx.merge(plan.discriminator_graph, parameters)
        return jnp.mean(
            losses.discriminator_loss(discriminator(image_Bhwc), discriminator(reconstruction_Bhwc))
        )

    def active() -> Gan:
        value, gradient = jax.value_and_grad(term)(reconstruction_Bhwc)
        loss, gradients = jax.value_and_grad(discriminator_loss)(state.discriminator)
        with jax.numpy_dtype_promotion("standard"):
            updates, optimizer = plan.discriminator_optimizer.update(
                gradients, state.discriminator_optimizer, state.discriminator
            )
        discriminator = optax.apply_updates(state.discriminator, updates)
        return Gan(value, gradient, loss, optax.tree.norm(gradients), discriminator, optimizer)

    return jax.lax.cond(state.step >= plan.experiment.loss.gan_start, active, lambda: idle)


def _revived(
    experiment: AutoencoderExperiment,
    codes: Codes,
    state: State,
    parameters: Any,
    ema: Any,
    key: Array,
) -> dict[str, Any]:
    """Every `revive_every` steps, codes that none of them used move to latents of the batch, in the average too."""
    counts = state.counts + quantizer.count(codes.indices, experiment.model.codes)
    due = (state.step + 1) % experiment.loss.revive_every == 0
    considered = jnp.where(due, counts, 1)
    book = quantizer.revive(parameters["quantizer"]["codebook"], codes.latents, considered, key)
    average_book = jnp.where((considered == 0)[:, None], book, ema["quantizer"]["codebook"])
    return {
        "parameters": parameters | {"quantizer": {"codebook": book}},
        "ema": ema | {"quantizer": {"codebook": average_book}},
        "counts": jnp.where(due, 0, counts),
    }


def _code_metrics(experiment: AutoencoderExperiment, codes: Codes | None) -> Metrics:
    """How much of the codebook the batch used."""
    if codes is None:
        return {}
    use = quantizer.usage(codes.indices, experiment.model.codes)
    return {"codebook_use": use.share, "codebook_perplexity": use.perplexity}
