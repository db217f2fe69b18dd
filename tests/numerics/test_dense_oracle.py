"""The product against the dense Gauss-Newton matrix, float64, on four models."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import LOSSES, POLICIES, batched, data_case, dense_of, linear, model_case, oracle_of, random_like, reference
from ggn_nb import create_ggn_mv, create_ggn_mv_without_data
from ggn_nb.tools.testing import assert_close
from jax.flatten_util import ravel_pytree

ALL = [(linearize, vmapped) for linearize in POLICIES for vmapped in (True, False)]
TWO = [("cached", True), ("recomputed", False)]
COMBINATIONS = {
    "mlp": dict.fromkeys(LOSSES, ALL),
    "cnn": dict.fromkeys(LOSSES, TWO) | {"cross_entropy": ALL},
    "transformer-scan": {"cross_entropy": ALL, "coupled": TWO},
    "transformer-unrolled": {"cross_entropy": TWO},
}
PAIRS = [(model, loss) for model, by_loss in COMBINATIONS.items() for loss in by_loss]
EACH = [(model, loss, *way) for model, by_loss in COMBINATIONS.items() for loss, ways in by_loss.items() for way in ways]
name = lambda value: {True: "vmap", False: "whole"}[value] if isinstance(value, bool) else str(value)


def test_settings_are_strict():
    assert jax.config.jax_enable_x64
    assert jax.config.jax_numpy_dtype_promotion == "strict"
    assert jax.config.jax_numpy_rank_promotion == "raise"


@cache
def oracle(model, loss):
    """The dense matrix; that of the scanned transformer is that of the unrolled one."""
    if model == "transformer-unrolled":
        return oracle("transformer-scan", loss)
    case = model_case(model)
    return oracle_of(case.model_fn, case.params, data_case(model, loss), reference(loss))


@pytest.mark.parametrize(("model", "loss"), PAIRS)
def test_oracle_says_something(model, loss):
    G = oracle(model, loss)
    assert jnp.all(jnp.isfinite(G))
    assert jnp.linalg.matrix_rank(G) >= 2
    assert jnp.max(jnp.abs(G)) > 1e-2


@pytest.mark.combinations
@pytest.mark.parametrize(("model", "loss", "linearize", "vmap_over_data"), EACH, ids=name)
def test_product_is_the_dense_one(model, loss, linearize, vmap_over_data):
    case = model_case(model)
    model_fn = case.model_fn if vmap_over_data else batched(case.model_fn)
    G = create_ggn_mv(
        model_fn, case.params, data_case(model, loss), LOSSES[loss], vmap_over_data=vmap_over_data, linearize=linearize
    )
    assert_close(dense_of(G, case.params), oracle(model, loss))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("linearize", POLICIES)
def test_eager_calls_agree_with_the_oracle(loss, linearize):
    case, data = model_case("mlp"), data_case("mlp", loss)
    G = create_ggn_mv(case.model_fn, case.params, data, LOSSES[loss], linearize=linearize)
    vec = random_like(case.params)
    assert_close(ravel_pytree(G(vec))[0], oracle("mlp", loss) @ ravel_pytree(vec)[0])
    assert jax.tree.structure(G(vec)) == jax.tree.structure(case.params)


@pytest.mark.parametrize("vmap_over_data", [True, False], ids=["vmap", "whole"])
def test_unbound_product_takes_data_in_each_call(vmap_over_data):
    case, data = model_case("mlp"), data_case("mlp", "coupled")
    model_fn = case.model_fn if vmap_over_data else batched(case.model_fn)
    mv = create_ggn_mv_without_data(model_fn, case.params, LOSSES["coupled"], 0.5, vmap_over_data=vmap_over_data)
    for part in (slice(0, 3), slice(0, 1), slice(1, 3)):
        some = jax.tree.map(lambda leaf: leaf[part], data)
        expected = 0.5 * oracle_of(case.model_fn, case.params, some, reference("coupled"))
        assert_close(dense_of(mv.bind(some), case.params), expected)
        vec = random_like(case.params)
        assert_close(ravel_pytree(mv(vec, some))[0], expected @ ravel_pytree(vec)[0])


@pytest.mark.parametrize("loss", LOSSES)
def test_single_datum_without_a_batch_axis(loss):
    case = model_case("mlp")
    one = jax.tree.map(lambda leaf: leaf[0], data_case("mlp", loss))
    mv = create_ggn_mv_without_data(case.model_fn, case.params, LOSSES[loss], 1.0, vmap_over_data=False)
    expected = oracle_of(case.model_fn, case.params, jax.tree.map(lambda leaf: leaf[None], one), reference(loss))
    vec = random_like(case.params)
    assert_close(ravel_pytree(mv(vec, one))[0], expected @ ravel_pytree(vec)[0])


FACTORS = [
    ({}, 1.0),
    ({"num_curv_samples": 3}, 1.0),
    ({"num_curv_samples": 6}, 1.0),  # num_total_samples defaults to num_curv_samples
    ({"num_total_samples": 30}, 10.0),
    ({"num_curv_samples": 4, "num_total_samples": 6}, 1.5),
    ({"num_curv_samples": 10, "num_total_samples": 1}, 0.1),
    ({"num_curv_samples": 2.5, "num_total_samples": np.int32(5)}, 2.0),
]


@pytest.mark.parametrize(("numbers", "factor"), FACTORS, ids=str)
@pytest.mark.parametrize("vmap_over_data", [True, False], ids=["vmap", "whole"])
def test_factor_is_total_over_curvature_samples(numbers, factor, vmap_over_data):
    x = jnp.arange(1.0, 7.0).reshape(3, 2)
    data, params = {"input": x, "target": None}, jnp.zeros((2, 1))
    G = create_ggn_mv(linear, params, data, "none", vmap_over_data=vmap_over_data, **numbers)
    assert_close(dense_of(G, params), factor * x.T @ x)


@pytest.mark.parametrize("total", [jnp.int64(6), jnp.float32(6), 6], ids=repr)
def test_sample_numbers_may_differ_in_dtype(total):
    x = jnp.arange(1.0, 7.0).reshape(3, 2)
    data, params = {"input": x, "target": None}, jnp.zeros((2, 1))
    G = create_ggn_mv(linear, params, data, "none", num_curv_samples=jnp.int32(2), num_total_samples=total)
    assert_close(dense_of(G, params), 3 * x.T @ x)


@pytest.mark.parametrize("factor", [0.0, -2.0, 3, jnp.float32(0.25), jnp.bfloat16(0.5), 1e300], ids=repr)
def test_unbound_factor_multiplies_the_sum(factor):
    x = jnp.arange(1.0, 7.0).reshape(3, 2)
    mv = create_ggn_mv_without_data(linear, jnp.zeros((2, 1)), "none", factor)
    got = dense_of(mv.bind({"input": x, "target": None}), jnp.zeros((2, 1)))
    assert_close(got, float(factor) * x.T @ x)

