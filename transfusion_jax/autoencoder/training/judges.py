"""Frozen networks that judge reconstructions: LPIPS, and the ResNet of the ID term."""

from dataclasses import dataclass
from pathlib import Path

import jax

from transfusion_jax.autoencoder.config import AutoencoderExperiment
from transfusion_jax.autoencoder.training import losses, resnet
from transfusion_jax.errors import require
from transfusion_jax.training.checkpoint import Report


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Judges:
    """Weights of networks that are not trained; None where the loss lacks the term."""

    lpips: losses.Lpips | None = None
    identity: resnet.Weights | None = None


def load_judges(experiment: AutoencoderExperiment, report: Report) -> Judges:
    """The networks of the LPIPS and ID terms; reports the terms that training does without.

    Raises:
      ValueError: the weights of a term that is asked for cannot be had.
    """
    loss = experiment.loss
    channels = experiment.model.channels
    perceptual = None
    if loss.lpips:
        perceptual = losses.load_lpips(loss.lpips_network, experiment.model.size)
    else:
        report("loss.lpips=0: the summary will have no reconstruction_fid_lpips")
    identity = None
    if loss.identity and loss.identity_weights:
        identity = resnet.load_resnet(Path(loss.identity_weights))
    elif loss.identity:
        report("no loss.identity_weights: training does without the ID term")
    require(
        channels in (1, 3) or (perceptual, identity) == (None, None),
        f"LPIPS and ID compare pictures of 1 or 3 channels, not model.channels={channels}",
    )
    return Judges(perceptual, identity)
