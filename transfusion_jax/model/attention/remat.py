"""What a rematerialised layer may keep of attention, so that only the products around it are done
again."""

from jax import Array
from jax.ad_checkpoint import checkpoint_name

KEPT = "attention"


def kept(out: Array, logsumexp: Array) -> tuple[Array, Array]:
    """Names the residuals for `model.remat = "attention"`; with them the backward pass need not run
    attention again."""
    return checkpoint_name(out, KEPT), checkpoint_name(logsumexp, KEPT)
