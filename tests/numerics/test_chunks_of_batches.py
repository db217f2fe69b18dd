"""`batch_size` where model and loss see all samples at once: the same number, or a refusal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import create_fisher_mv, create_ggn_mv, create_hessian_mv

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)))
Y = jnp.asarray(np.random.default_rng(1).standard_normal((8, 2)))
W = jnp.asarray(np.random.default_rng(2).standard_normal((3, 2)))
V = jnp.asarray(np.random.default_rng(3).standard_normal((3, 2)))
DATA = {"input": X, "target": Y}
CREATE = {
    "ggn": create_ggn_mv,
    "hessian": create_hessian_mv,
    "empirical": lambda *args, **options: create_fisher_mv(*args, kind="empirical", **options),
}
kinds = pytest.mark.parametrize("kind", CREATE)
sizes = pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
policies = pytest.mark.parametrize("linearize", ["cached", "rematerialized", "recomputed"])


def rowwise(input, params):
    return jnp.tanh(input @ params)


def batch_norm(input, params):
    hidden = input @ params
    return (hidden - hidden.mean(0, keepdims=True)) / jnp.sqrt(hidden.var(0, keepdims=True) + 0.1)


def neighbours(input, params):
    """Each sample is mixed with the next one."""
    hidden = jnp.tanh(input @ params)
    return hidden + jnp.roll(hidden, 1, axis=0)


def pooled(input, params):
    """One prediction for the whole batch."""
    return jnp.tanh(input @ params).sum(0)


def mean_loss(pred, target):
    return jnp.mean((pred - target) ** 2)


def contrastive(pred, target):
    """−log softmax of each sample's likeness with its own target among all targets."""
    return -jnp.diag(jax.nn.log_softmax(pred @ target.T, axis=-1))


def create(kind, model, loss, **options):
    return CREATE[kind](model, W, DATA, loss, vmap_over_data=False, **options)


@pytest.mark.combinations
@kinds
@sizes
@policies
def test_what_treats_each_sample_by_itself(kind, batch_size, linearize):
    got = create(kind, rowwise, "mse", batch_size=batch_size, linearize=linearize)
    np.testing.assert_allclose(got(V), create(kind, rowwise, "mse")(V), rtol=1e-12)


@pytest.mark.combinations
@kinds
@sizes
@policies
@pytest.mark.parametrize("model", [batch_norm, neighbours])
def test_a_model_that_couples_samples_is_refused(kind, batch_size, linearize, model):
    with pytest.raises(ValueError, match="batch_size: model_fn gives a sample another result"):
        create(kind, model, "mse", batch_size=batch_size, linearize=linearize)


@pytest.mark.combinations
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@sizes
@pytest.mark.parametrize("loss", [mean_loss, contrastive])
def test_a_loss_that_couples_samples(kind, batch_size, loss):
    """Right where the linearisation is kept, since the loss sees all predictions then; refused otherwise."""
    want = create(kind, rowwise, loss)(V)
    got = create(kind, rowwise, loss, batch_size=batch_size, linearize="cached")(V)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    with pytest.raises(ValueError, match="batch_size: loss_fn gives a sample another result"):
        create(kind, rowwise, loss, batch_size=batch_size)


@policies
def test_a_prediction_of_the_whole_batch_is_refused(linearize):
    data = {"input": X, "target": Y}
    loss = lambda pred, target: (pred - target[0]) ** 2
    with pytest.raises(ValueError, match="expected a row for each, to take them in batches"):
        create_ggn_mv(pooled, W, data, loss, vmap_over_data=False, batch_size=4, linearize=linearize)


@pytest.mark.parametrize("model", [batch_norm, neighbours, pooled])
def test_one_batch_is_no_chunk(model):
    loss = (lambda pred, target: (pred - target[0]) ** 2) if model is pooled else "mse"
    whole = create_ggn_mv(model, W, DATA, loss, vmap_over_data=False)
    for batch_size in (8, 100):
        got = create_ggn_mv(model, W, DATA, loss, vmap_over_data=False, batch_size=batch_size)
        np.testing.assert_allclose(got(V), whole(V), rtol=1e-12)
