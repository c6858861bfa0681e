"""What a rematerialised layer may keep of attention, to recompute only the products around it."""

from jax import Array
from jax.ad_checkpoint import checkpoint_name

KEPT = "attention"


def kept(out: Array, logsumexp: Array) -> tuple[Array, Array]:
    """Names the residuals that `model.remat = "attention"` keeps; they spare a second attention."""
    return checkpoint_name(out, KEPT), checkpoint_name(logsumexp, KEPT)
