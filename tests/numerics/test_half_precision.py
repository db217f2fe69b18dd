"""Sums over many samples in half precision: the factor comes after the sum, which is taken in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import Stream, create_fisher_mv, create_ggn_mv, create_ggn_mv_without_data, create_hessian_mv, gram, inverse, solve
from ggn_nb.losses import multi_head

HALVES = ("float16", "bfloat16")
EPS = {"float16": 2**-10, "bfloat16": 2**-7}
KINDS = {
    "ggn": create_ggn_mv,
    "hessian": create_hessian_mv,
    "empirical": lambda *args, **options: create_fisher_mv(*args, kind="empirical", **options),
}


def affine(input, params):
    return input * params["w"] + params["b"]


def dense(input, params):
    """The same by a matrix product, whose operands are stored in half precision."""
    return input @ params["w"][:, None] + params["b"]


def problem(num_samples, dtype):
    """Positive numbers, so that sums grow with their length: parameters, data, vector, and (Σ1, Σx, Σx²) in float64."""
    x = np.linspace(0.5, 1.5, num_samples, dtype=np.float64)
    x = jnp.asarray(x).astype(dtype)[:, None]
    one = jnp.ones(1, dtype)
    y = x + jnp.asarray(0.5, dtype)
    moments = [float(np.sum(np.asarray(x, np.float64) ** k)) for k in range(3)]
    return {"w": one, "b": one}, {"input": x, "target": y}, {"w": one, "b": one}, moments


@pytest.mark.combinations
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("num_samples", [60_000, 300_000])
@pytest.mark.parametrize("scale", [{"reduction": "mean"}, {"num_total_samples": 1}], ids=str)
@pytest.mark.parametrize("model", [affine, dense])
@pytest.mark.parametrize("options", [{}, {"linearize": "recomputed"}, {"batch_size": 100_000}], ids=str)
def test_a_mean_over_many_samples(dtype, num_samples, scale, model, options):
    params, data, vec, (n, s1, s2) = problem(num_samples, dtype)
    got = create_ggn_mv(model, params, data, "mse", **scale, **options)(vec)
    want = {"w": 2 * (s2 + s1) / n, "b": 2 * (s1 + n) / n}
    for name in want:
        assert got[name].dtype == dtype
        assert abs(float(got[name][0]) / want[name] - 1) < 4 * EPS[dtype]


@pytest.mark.parametrize("model", [affine, dense])
@pytest.mark.parametrize("kind", [create_ggn_mv, create_hessian_mv])
@pytest.mark.parametrize("size", [1.0, 0.03, 1e-3])
def test_one_sample_many_times(model, kind, size):
    """Each summand, 1/N times an entry of H J v, would be rounded alike: below 6e-5, float16 has few digits left."""
    n = 300_000
    params, _, vec, _ = problem(2, "float16")
    x = jnp.ones((n, 1), jnp.float16)
    G = kind(model, params, {"input": x, "target": x}, "mse", reduction="mean")
    got = G(jax.tree.map(lambda v: size * v, vec))
    want = 4 * float(np.float16(size))
    assert [float(got[name][0]) for name in ("w", "b")] == [pytest.approx(want, rel=4 * EPS["float16"])] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_kind_on_a_mean(kind, dtype):
    """With targets half a unit below the prediction, 2 (f − y) = 1, so that the empirical matrix is Σ J Jᵀ."""
    params, data, vec, (n, s1, s2) = problem(60_000, dtype)
    got = KINDS[kind](affine, params, data, "mse", reduction="mean")(vec)
    curvature = 1 if kind == "empirical" else 2
    np.testing.assert_allclose(float(got["w"][0]), curvature * (s2 + s1) / n, rtol=4 * EPS[dtype])


def test_a_stream_of_small_batches_of_many():
    """1/N times the sum of a batch of 8 is below what float16 can hold."""
    params, data, vec, (n, s1, s2) = problem(20_000, "float16")
    cut = lambda i: jax.tree.map(lambda a: np.asarray(a[i : i + 8]), data)
    stream = Stream([cut(i) for i in range(0, 20_000, 8)])
    G = create_ggn_mv(affine, params, stream, "mse", num_total_samples=1e-3)
    got = G(vec)
    assert got["w"].dtype == jnp.float16
    np.testing.assert_allclose(float(got["w"][0]), 1e-3 * 2 * (s2 + s1) / n, rtol=2 * EPS["float16"])
    many = G.matmat(jax.tree.map(lambda v: jnp.stack([v, v]), vec))
    np.testing.assert_allclose(np.asarray(many["b"][1], float), 1e-3 * 2 * (s1 + n) / n, rtol=2 * EPS["float16"])


@pytest.mark.parametrize("dtype", HALVES)
def test_bound_and_unbound_factors(dtype):
    params, data, vec, (n, s1, s2) = problem(60_000, dtype)
    mv = create_ggn_mv_without_data(affine, params, "mse", 1 / n)
    for product in (mv, jax.jit(mv)):
        np.testing.assert_allclose(float(product(vec, data)["w"][0]), 2 * (s2 + s1) / n, rtol=2 * EPS[dtype])


def test_small_factors_do_not_vanish_within():
    """In a model that computes in float16, from and to float32."""
    params, data, vec, (n, s1, s2) = problem(60_000, "float16")
    wide = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)
    within = lambda input, params: affine(input.astype(jnp.float16), jax.tree.map(lambda p: p.astype(jnp.float16), params)).astype(jnp.float32)
    for kind in ("ggn", "factored"):
        options = {} if kind == "ggn" else {"linearize": "factored"}
        got = create_ggn_mv(within, wide(params), wide(data), "mse", num_total_samples=1e-3, batch_size=256, **options)(wide(vec))
        np.testing.assert_allclose(float(got["w"][0]), 1e-3 * 2 * (s2 + s1) / n, rtol=2 * EPS["float16"])


def test_large_factors_do_not_overflow_before_the_sum():
    params, data, vec, (n, s1, s2) = problem(16, "float16")
    tiny = jax.tree.map(lambda v: jnp.full_like(v, 1e-3), vec)
    G = create_ggn_mv(affine, params, data, "mse", num_curv_samples=1, num_total_samples=1e5)
    assert not np.isfinite(np.float16(1e5)) and np.isfinite(float(G(tiny)["w"][0]))
    np.testing.assert_allclose(float(G(tiny)["w"][0]), 1e5 * 2e-3 * (s2 + s1), rtol=2 * EPS["float16"])


def test_heads_of_unequal_weight():
    """A mean divides each head by the sum of its own weights, also where they are far apart."""
    n = 60_000
    x = jnp.ones((n, 1), jnp.float16)
    data = {"input": x, "target": {"a": x, "b": x}, "mask": {"a": jnp.ones(n, bool), "b": jnp.arange(n) < 3}}
    model = lambda input, params: {"a": input * params["a"], "b": input * params["b"]}
    params = {"a": jnp.ones(1, jnp.float16), "b": jnp.ones(1, jnp.float16)}
    G = create_ggn_mv(model, params, data, multi_head({"a": "mse", "b": "mse"}), reduction="mean")
    got = jax.tree.map(lambda a: float(a[0]), G(params))
    assert got == {"a": pytest.approx(2, rel=2e-3), "b": pytest.approx(2, rel=2e-3)}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_what_lies_between_in_a_gram_solution_may_leave_the_range(dtype, size):
    """Eigenvalues and damping of 1e5: the steps by columns are in float32, whatever the parameters are in."""
    X = 100 * np.random.default_rng(0).normal(size=(5, 4))
    data = {"input": jnp.asarray(X, dtype), "target": jnp.zeros(5, dtype)}
    G = create_ggn_mv(lambda input, params: input @ params, jnp.zeros(4, dtype), data, "mse")
    X, b = np.asarray(data["input"], np.float64), jnp.asarray([1.0, -0.5, 0.3, 0.8], dtype) * size
    expected = np.linalg.solve(2 * X.T @ X + 1e5 * np.eye(4), np.asarray(b, np.float64))
    atol = 2 * float(jnp.finfo(dtype).eps) * np.abs(expected).max() + float(jnp.finfo(dtype).smallest_subnormal)
    for x in (solve(gram(G), b, 1e5).x, inverse(gram(G), 1e5)(b)):
        assert x.dtype == dtype
        np.testing.assert_allclose(np.asarray(x, np.float64), expected, rtol=0, atol=atol)
