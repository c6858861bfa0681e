import jax
import jax.numpy as jnp
import numpy as np
import optax
import packings
import pytest

from transfusion_jax.pretraining.objective import image_loss, text_loss, total


@pytest.mark.parametrize("chunk", [1, 7, 36, 100])
def test_chunked_text_loss_equals_cross_entropy(chunk):
    hidden = jax.random.normal(jax.random.key(0), (3, 36, 8))
    kernel = jax.random.normal(jax.random.key(1), (8, 50))
    target = jax.random.randint(jax.random.key(2), (3, 36), 0, 50)

    def ours(hidden, kernel):
        return text_loss(hidden, target, lambda x: x @ kernel, chunk)

    def whole(hidden, kernel):
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, target)

    np.testing.assert_allclose(ours(hidden, kernel), whole(hidden, kernel), rtol=1e-5, atol=1e-6)
    gradients = [
        jax.grad(lambda *a, f=f: f(*a).sum(), (0, 1))(hidden, kernel) for f in (ours, whole)
    ]
    for got, expected in zip(*gradients, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_total_is_lambda_weighted_and_ignores_what_has_no_weight():
    batch = jax.tree.map(jnp.asarray, packings.batch(["tIt", "ttt|t"]))
    text, image = jnp.full((2, 36), 1e9), jnp.full((2, 6), 1e9)
    text = jnp.where(batch.text_weight_BL > 0, 2.0, text)
    image = image.at[0, 0].set(3.0)
    losses = total(text, image, batch, batch, 5.0)
    assert (float(losses.text), float(losses.image), float(losses.total)) == (2.0, 3.0, 17.0)


def test_no_images_and_no_text_are_loss_zero():
    batch = jax.tree.map(jnp.asarray, packings.batch([""]))
    losses = total(jnp.ones((1, 36)), jnp.ones((1, 6)), batch, batch, 5.0)
    assert float(losses.total) == 0.0


def test_image_loss_is_a_mean_over_elements():
    zeros = jnp.zeros((2, 3, 4, 4, 2))
    np.testing.assert_allclose(image_loss(zeros + 2, zeros), np.full((2, 3), 4.0))
