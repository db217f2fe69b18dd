"""An operator at other parameters: `G.at`, and what `dataclasses.replace` leaves behind."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import create_fisher_mv, create_ggn_mv, create_hessian_mv
from ggn_nb.tools.timing import count_compiles

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)))
Y = jnp.asarray(np.random.default_rng(1).standard_normal((8, 2)))
W, ELSEWHERE, V = jnp.asarray(np.random.default_rng(2).standard_normal((3, 3, 2)))
DATA = {"input": X, "target": Y}
KINDS = {
    "ggn": create_ggn_mv,
    "hessian": create_hessian_mv,
    "fisher": create_fisher_mv,
    "monte_carlo": lambda *args, **options: create_fisher_mv(
        *args, kind="monte_carlo", key=jax.random.key(0), **options),
}
kinds = pytest.mark.parametrize("kind", KINDS)
options = pytest.mark.parametrize(
    "options", [{}, {"linearize": "rematerialized"}, {"linearize": "recomputed"}, {"batch_size": 3}], ids=str)


def model(input, params):
    return jnp.tanh(input @ params)


@kinds
@options
def test_at_other_parameters(kind, options):
    here = KINDS[kind](model, W, DATA, "mse", **options)
    here(V)
    with count_compiles() as compiles:
        there = here.at(ELSEWHERE)
        product = there(V)
    assert compiles.count == 0
    expected = KINDS[kind](model, ELSEWHERE, DATA, "mse", **options)
    np.testing.assert_allclose(product, expected(V), rtol=1e-12)
    assert repr(there) == repr(here)
    assert np.max(np.abs(here(V) - product)) > 1e-3


@kinds
@options
def test_replaced_parameters_leave_no_linearisation_behind(kind, options):
    here = KINDS[kind](model, W, DATA, "mse", **options)
    moved = replace(here, problem=replace(here.problem, params=ELSEWHERE))
    np.testing.assert_allclose(moved(V), KINDS[kind](model, ELSEWHERE, DATA, "mse")(V), rtol=1e-12)
    other = replace(here, samples=here.samples._replace(input=X + 1))
    data = DATA | {"input": X + 1}
    np.testing.assert_allclose(other(V), KINDS[kind](model, W, data, "mse")(V), rtol=1e-12)


def test_at_inside_a_compiled_function():
    G = create_ggn_mv(model, W, DATA, "mse")
    moved = jax.jit(lambda G, w, v: G.at(w)(v))
    np.testing.assert_allclose(moved(G, ELSEWHERE, V), create_ggn_mv(model, ELSEWHERE, DATA, "mse")(V), rtol=1e-12)


@pytest.mark.parametrize(("params", "error"), [
    (W[:2], ValueError), ({"w": W}, ValueError), (W.astype(jnp.float32), TypeError), (None, ValueError)], ids=repr)
def test_other_structures_are_refused(params, error):
    with pytest.raises(error, match="params"):
        create_ggn_mv(model, W, DATA, "mse").at(params)


def test_a_linearisation_is_no_argument():
    with pytest.raises((TypeError, ValueError), match="linearization"):
        G = create_ggn_mv(model, W, DATA, "mse")
        replace(G, linearization=G.linearization)
