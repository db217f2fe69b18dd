"""Derivatives of a product through parts that it does not touch: zero, where the part's own derivative is infinite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import create_ggn_mv, create_ggn_mv_without_data, create_hessian_mv

X = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (6, 3)))
W = jnp.asarray(np.random.default_rng(1).standard_normal((3, 2)))
V = jnp.asarray(np.random.default_rng(2).standard_normal((3, 2)))
OPTIONS = [{}, {"linearize": "recomputed"}, {"linearize": "rematerialized"}, {"batch_size": 2}]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)


def tanh_model(input, params):
    return jnp.tanh(input @ params)


def root_model(input, params):
    """√x meets the parameters; its derivative at 0 is infinite."""
    return jnp.tanh(jnp.sqrt(input) @ params)


@options
def test_gradient_through_a_target_that_h_does_not_read(options):
    def norm(t):
        G = create_ggn_mv(tanh_model, W, {"input": X, "target": jnp.sqrt(t)}, "mse", **options)
        return jnp.sum(G(V) ** 2)
    assert not np.any(np.asarray(jax.grad(norm)(jnp.zeros((6, 2)))))
    assert not np.any(np.asarray(jax.jit(jax.grad(norm))(jnp.zeros((6, 2)))))


@options
@pytest.mark.parametrize("create", [create_ggn_mv, create_hessian_mv])
def test_jvp_in_the_parameters_beside_inputs_at_a_singularity(options, create):
    x = X.at[0, 0].set(0.0)
    y = jnp.ones((6, 2))
    product = lambda w, x, model: create(model, w, {"input": x, "target": y}, "mse", **options)(V)
    _, got = jax.jvp(lambda w: product(w, x, root_model), (W,), (V,))
    _, want = jax.jvp(lambda w: product(w, jnp.sqrt(x), tanh_model), (W,), (V,))
    np.testing.assert_allclose(got, want, rtol=1e-9)


@options
def test_gradient_in_the_parameters_beside_inputs_at_a_singularity(options):
    x = X.at[0, 0].set(0.0)
    norm = lambda w, x, model: jnp.sum(create_ggn_mv_without_data(model, w, "mse", 1.0, **options)(
        V, {"input": x, "target": jnp.ones((6, 2))}) ** 2)
    got = jax.grad(norm)(W, x, root_model)
    np.testing.assert_allclose(got, jax.grad(norm)(W, jnp.sqrt(x), tanh_model), rtol=1e-9)


def test_gradient_through_the_weights_where_the_target_is_singular():
    """The weight matters, the target does not."""
    def norm(w, t):
        data = {"input": X, "target": jnp.sqrt(t), "weight": w}
        return jnp.sum(create_ggn_mv_without_data(tanh_model, W, "mse", 1.0)(V, data) ** 2)
    by_weight, by_target = jax.grad(norm, argnums=(0, 1))(jnp.ones(6), jnp.zeros((6, 2)))
    step = 1e-5 * jnp.eye(6)[2]
    central = (norm(1 + step, jnp.ones((6, 2))) - norm(1 - step, jnp.ones((6, 2)))) / 2e-5
    np.testing.assert_allclose(by_weight[2], central, rtol=1e-6)
    assert not np.any(np.asarray(by_target))
