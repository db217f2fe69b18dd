"""Functions of damped matrices, for each representation, against dense matrices in float64 from NumPy."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import (
    DenseBlocks,
    Diagonal,
    create_fisher_mv,
    create_ggn_mv,
    create_hessian_mv,
    eigsh,
    gram,
    inverse,
    inverse_sqrt,
    logdet,
    sample,
    solve,
)
from ggn_nb.linalg.closed_forms import closed_forms
from ggn_nb.tools.testing import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

P = 11  # parameters
DAMPINGS = [1e-8, 1e-4, 1.0, 1e2]


def linear(input, params):
    """A model whose Jacobian is its input."""
    return input @ jnp.concatenate([params["a"].ravel(), params["b"]])


def params_like(dtype=np.float64):
    return {"a": jnp.zeros((2, 4), dtype), "b": jnp.zeros(3, dtype)}


def operator_with_root(A):
    """G = A Aᵀ for a matrix A of P rows, each of whose columns is a sample."""
    data = {"input": jnp.asarray(A.T), "target": None}
    return create_ggn_mv(linear, params_like(A.dtype), data, "none")


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def tree(vec, dtype=np.float64):
    return ravel_pytree(params_like(dtype))[1](jnp.asarray(vec, dtype))


def psd(rng, size, rank):
    root = rng.normal(size=(size, rank))
    return root @ root.T


@cache
def case(name):
    """A representation, and the dense matrix that it stands for."""
    rng = np.random.default_rng(0)
    if name == "diagonal":
        d = np.r_[rng.uniform(0, 5, P - 2), 0, 0]
        return Diagonal(tree(d)), np.diag(d)
    if name == "blocks":
        blocks = psd(rng, 8, 5), psd(rng, 3, 3)
        dense = np.zeros((P, P))
        dense[:8, :8], dense[8:, 8:] = blocks
        return DenseBlocks.on(params_like(), blocks), dense
    columns = {"few columns": 4, "many columns": 20}[name]
    A = rng.normal(size=(P, columns))
    A[:, 1] = 0
    A[:, 2] = 2 * A[:, 0]
    return gram(operator_with_root(A)), A @ A.T


NAMES = ["diagonal", "blocks", "few columns", "many columns"]


@pytest.fixture(params=NAMES)
def pair(request):
    return case(request.param)


def damped_eigh(dense, damping):
    """Eigenvalues of M + δI for a positive semi-definite M, and eigenvectors."""
    values, vectors = np.linalg.eigh(dense)
    return np.maximum(values, 0) + damping, vectors


# Values


@pytest.mark.parametrize("damping", DAMPINGS)
def test_against_dense(pair, damping):
    M, dense = pair
    values, U = damped_eigh(dense, damping)
    rtol = 1e-12 * max(1e2, values.max() / damping)
    b = np.random.default_rng(1).normal(size=P)
    solution = solve(M, tree(b), damping)
    assert_close(flat(solution.x), U @ (U.T @ b / values), rtol=rtol)
    assert float(solution.residual) <= 1e-15 * max(10, values.max() / damping)
    product = dense @ flat(solution.x) + damping * flat(solution.x)
    assert np.linalg.norm(b - product) <= 1e-14 * max(10, values.max() / damping) * np.linalg.norm(b)
    root = (U / np.sqrt(values)) @ U.T
    assert_close(flat(inverse_sqrt(M, damping)(tree(b))), root @ b, rtol=rtol)
    assert_close(float(logdet(M, damping)), np.log(values).sum(), rtol=rtol)


def test_inverses_are_operators(pair):
    M, dense = pair
    expected = np.linalg.inv(dense + 0.5 * np.eye(P))
    C, R = inverse(M, 0.5), inverse_sqrt(M, 0.5)
    assert_close(np.asarray(C.dense()), expected)
    assert_close(np.asarray(R.dense() @ R.dense()), expected)
    assert C.shape == R.shape == (P, P)
    assert C.is_psd and R.is_psd
    assert_close(np.asarray((2.0 * C + R).dense()), np.asarray(2 * C.dense() + R.dense()))


@pytest.mark.parametrize("damping", [1e-4, 1.0])
def test_covariance_of_samples(pair, damping):
    """Samples are linear in the noise: their covariance is known without drawing any."""
    M, dense = pair
    forms = closed_forms(M)
    noise, unravel = ravel_pytree(forms.draw_noise(jax.random.key(0)))
    draw = lambda e: ravel_pytree(forms.sample(forms.read_damping(damping), unravel(e)))[0]
    T = np.asarray(jax.jit(jax.vmap(draw))(jnp.eye(noise.size))).T
    values, U = damped_eigh(dense, damping)
    assert_close(T @ T.T, (U / values) @ U.T, rtol=1e-8)


def test_samples_have_axes_and_depend_on_the_key(pair):
    M, _ = pair
    one = sample(M, jax.random.key(0), 1.0)
    many = sample(M, jax.random.PRNGKey(1), 1.0, num_samples=3)
    assert jax.tree.map(jnp.shape, one) == {"a": (2, 4), "b": (3,)}
    assert jax.tree.map(jnp.shape, many) == {"a": (3, 2, 4), "b": (3, 3)}
    assert len({float(x) for x in many["b"][:, 0]}) == 3


def test_noise_is_standard_normal(pair):
    noise = ravel_pytree(jax.vmap(closed_forms(pair[0]).draw_noise)(jax.random.split(jax.random.key(0), 2000)))[0]
    assert abs(float(noise.mean())) < 0.05 and abs(float(noise.std()) - 1) < 0.05


def test_eigenpairs(pair):
    M, dense = pair
    k = 2
    values, vectors = eigsh(M, k)
    V = np.asarray(jax.vmap(lambda v: ravel_pytree(v)[0])(vectors))
    assert_close(np.asarray(values), np.linalg.eigvalsh(dense)[::-1][:k])
    assert_close(V @ V.T, np.eye(k), atol=1e-12)
    assert_close(dense @ V.T, V.T * np.asarray(values))


@settings(max_examples=5, deadline=None)
@given(
    columns=st.sampled_from([1, 3, P, 14]),
    zero=st.integers(0, 14),
    log_damping=st.floats(-6, 2),
    log_scale=st.floats(-3, 3),
    seed=st.integers(0, 99),
)
def test_low_rank_of_any_shape(columns, zero, log_damping, log_scale, seed):
    A = np.random.default_rng(seed).normal(size=(P, columns)) * 10.0**log_scale
    A[:, :zero] = 0
    K, damping = gram(operator_with_root(A)), 10.0**log_damping * 10.0 ** (2 * log_scale)
    values, U = damped_eigh(A @ A.T, damping)
    b = np.random.default_rng(seed + 1).normal(size=P)
    assert_close(flat(solve(K, tree(b), damping).x), U @ (U.T @ b / values), rtol=1e-6)
    assert_close(float(logdet(K, damping)), np.log(values).sum(), rtol=1e-7, atol=1e-7)


# Precision


def test_refinement_in_float32():
    """At λ/δ = 10⁶ the form that subtracts once is lost; roots and refinement are not."""
    rng = np.random.default_rng(0)
    Q, R = np.linalg.qr(rng.normal(size=(P, 6)))[0], np.linalg.qr(rng.normal(size=(6, 6)))[0]
    A = ((Q * np.logspace(0, -3, 6)) @ R).astype(np.float32)
    K, damping = gram(operator_with_root(A)), 1e-6
    wide = A.astype(np.float64)
    b = (wide @ rng.normal(size=6)).astype(np.float32)
    solution = solve(K, tree(b, np.float32), damping)
    dense = wide @ wide.T + damping * np.eye(P)
    residual = lambda x: np.linalg.norm(b - dense @ x) / np.linalg.norm(b)
    small = np.linalg.inv(A.T @ A + np.float32(damping) * np.eye(6, dtype=np.float32))
    once = (b - A @ (small @ (A.T @ b))) / np.float32(damping)
    assert residual(flat(solution.x)) < 1e-4 < 1e-2 < residual(once.astype(np.float64))
    assert 0.2 < float(solution.residual) / residual(flat(solution.x)) < 20  # both are rounding errors
    assert solution.residual.dtype == np.float32 and solution.x["b"].dtype == np.float32
    assert_close(float(logdet(K, damping)), np.linalg.slogdet(dense)[1], rtol=1e-2)


def test_eigenvectors_are_orthonormal_in_float32():
    rng = np.random.default_rng(0)
    A = (np.linalg.qr(rng.normal(size=(P, 6)))[0] * np.logspace(0, -2.5, 6)).astype(np.float32)
    _, vectors = eigsh(gram(operator_with_root(A)), 6)
    V = np.asarray(jax.vmap(lambda v: ravel_pytree(v)[0])(vectors))
    assert_close(V @ V.T, np.eye(6, dtype=np.float32), atol=1e-6)


def test_half_precision_has_sums_in_float32():
    dtype = jnp.bfloat16
    ones = jax.tree.map(lambda p: jnp.ones(p.shape, dtype), params_like())
    blocks = DenseBlocks.on(ones, [np.eye(8, dtype=np.float32), np.eye(3, dtype=np.float32)])
    G = create_ggn_mv(linear, ones, {"input": jnp.eye(P, dtype=dtype), "target": None}, "none")
    for M in (Diagonal(ones), blocks, gram(G)):
        solution = solve(M, ones, 1.0)
        assert {leaf.dtype for leaf in jax.tree.leaves(solution.x)} == {jnp.dtype(dtype)}
        assert solution.residual.dtype == logdet(M, 1.0).dtype == np.float32
        assert_close(flat(solution.x), np.full(P, 0.5), rtol=1e-2)
        assert sample(M, jax.random.key(0), 1.0)["a"].dtype == dtype


# Dampings


def test_diagonal_takes_a_tree_and_zero():
    entries = np.arange(1.0, P + 1)
    damping = {"a": 2.0, "b": jnp.array([0.0, 1.0, 3.0])}
    total = entries + np.r_[np.full(8, 2.0), 0, 1, 3]
    M = Diagonal(tree(entries))
    assert_close(flat(solve(M, tree(np.ones(P)), damping).x), 1 / total)
    assert_close(float(logdet(M, damping)), np.log(total).sum())
    assert_close(flat(inverse_sqrt(M, 0)(tree(np.ones(P)))), entries**-0.5)


BAD = [
    (0, ValueError, "greater than 0"),
    (0.0, ValueError, "greater than 0"),
    (-1.0, ValueError, "damping: got -1.0"),
    (float("nan"), ValueError, "damping: got nan"),
    (float("inf"), ValueError, "damping: got inf"),
    ("small", TypeError, "damping: got 'small'"),
    (None, (TypeError, ValueError), "damping: got"),
    (True, TypeError, "damping: got True"),
    (1j, TypeError, "damping: got 1j"),
]


@pytest.mark.parametrize("damping, exc, message", BAD)
def test_bad_dampings(damping, exc, message):
    for name in ("diagonal", "blocks", "few columns"):
        M, _ = case(name)
        calls = [partial(logdet, M), partial(inverse, M), partial(inverse_sqrt, M)]
        calls += [partial(solve, M, tree(np.ones(P))), partial(sample, M, jax.random.key(0))]
        for call in calls:
            with pytest.raises(exc, match=message):
                call(damping)


@pytest.mark.parametrize("name", ["blocks", "few columns"])
def test_a_tree_of_dampings_is_refused_with_the_remedy(name):
    with pytest.raises(TypeError, match="divide the parameters by its square root in the model"):
        solve(case(name)[0], tree(np.ones(P)), {"a": 1.0, "b": 2.0})
    with pytest.raises(TypeError, match="damping: got .*expected a real number"):
        logdet(case(name)[0], np.ones(P))


def test_one_block_of_two_leaves():
    dense = psd(np.random.default_rng(0), P, 6)
    M, b = DenseBlocks.on(params_like(), [dense], (0, 0)), np.arange(1.0, P + 1)
    assert_close(flat(solve(M, tree(b), 0.1).x), np.linalg.solve(dense + 0.1 * np.eye(P), b))
    assert_close(flat(M.diagonal()), np.diag(dense))


def test_an_indefinite_block_is_refused():
    M = DenseBlocks.on(params_like(), [-np.eye(8), np.eye(3)])
    assert_close(float(logdet(M, 2.0)), 3 * np.log(3.0))
    with pytest.raises(ValueError, match="M \\+ damping I is not positive definite"):
        logdet(M, 0.5)


# Compiled


def test_representation_and_damping_are_arguments_of_programs(pair):
    M, _ = pair
    b = tree(np.ones(P))

    @jax.jit
    def all_of_them(M, b, damping, key):
        root = inverse_sqrt(M, damping)(b)
        return solve(M, b, damping).x, root, logdet(M, damping), sample(M, key, damping, 2), eigsh(M, 1)[0]

    found = all_of_them(M, b, 0.3, jax.random.key(0))
    expected = (solve(M, b, 0.3).x, inverse_sqrt(M, 0.3)(b), logdet(M, 0.3),
                sample(M, jax.random.key(0), 0.3, 2), eigsh(M, 1)[0])  # fmt: skip
    assert_close(found, expected, rtol=1e-9)


def test_eigenpairs_are_kept():
    K, dense = case("many columns")
    kept = K.with_eigh()
    assert kept.eigh()[0] is kept.eigh()[0]
    assert_close(solve(kept, tree(np.ones(P)), 0.1).x, solve(K, tree(np.ones(P)), 0.1).x)
    steps = jax.jit(jax.vmap(lambda d: logdet(kept, d)))(jnp.array([0.1, 1.0]))
    assert_close(np.asarray(steps), np.array([np.linalg.slogdet(dense + d * np.eye(P))[1] for d in (0.1, 1.0)]))
    assert "eigh" not in str(jax.make_jaxpr(lambda K: logdet(K, 0.1))(kept))


# The Gram matrix


@pytest.mark.parametrize("linearize, batch_size", [("cached", None), ("recomputed", None), (None, 3)])
def test_gram_and_cross(linearize, batch_size):
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, P, 7))
    options = {"linearize": linearize, "batch_size": batch_size, "num_total_samples": 28}
    data = {"input": jnp.asarray(A.T), "target": jnp.zeros(7), "mask": jnp.arange(7) != 3}
    K = gram(create_ggn_mv(linear, params_like(), data, "mse", **options))
    factor = 2 * 28 / 7  # the squared error has H = 2
    masked = A * (np.arange(7) != 3)
    assert_close(np.asarray(K.dense()), factor * masked.T @ masked)
    assert_close(np.asarray(K.cross(data)), factor * masked.T @ masked)
    other = {"input": jnp.asarray(B.T[:5]), "target": jnp.zeros(5)}
    assert_close(np.asarray(K.cross(other)), factor * B[:, :5].T @ masked)


def test_gram_of_a_fisher():
    rng = np.random.default_rng(0)
    data = {"input": jnp.asarray(rng.normal(size=(5, P))), "target": jnp.asarray(rng.normal(size=5))}
    F = create_fisher_mv(linear, params_like(), data, "mse", kind="empirical")
    K = gram(F)
    values = np.linalg.eigvalsh(np.asarray(F.dense()))[::-1][:5]
    assert_close(np.asarray(eigsh(K, 5)[0]), values)


# Refusals


def test_what_a_closed_form_does_not_take_is_refused_by_name(pair):
    M, _ = pair
    b = tree(np.ones(P))
    refused = {
        "tolerance": lambda: solve(M, b, 1.0, tolerance=1e-3),
        "preconditioner": lambda: inverse(M, 1.0, preconditioner=Diagonal(b)),
        "max_steps": lambda: inverse_sqrt(M, 1.0, max_steps=3),
        "key": lambda: logdet(M, 1.0, key=jax.random.key(0)),
        "method": lambda: eigsh(M, 1, method="lanczos"),
    }
    for name, call in refused.items():
        with pytest.raises(ValueError, match=f"{name}: got .*, expected None: .* has a closed form"):
            call()


def test_what_is_no_operator_is_refused_by_name():
    for call in (lambda M: logdet(M, 1.0), lambda M: solve(M, np.ones(2), 1.0), lambda M: eigsh(M, 1)):
        with pytest.raises(TypeError, match="M: got ndarray, expected an Operator"):
            call(np.eye(2))


def test_no_gram_of_a_hessian():
    data = {"input": jnp.ones((2, P)), "target": jnp.zeros(2)}
    with pytest.raises(TypeError, match="G: got a Hessian, which may be indefinite"):
        gram(create_hessian_mv(linear, params_like(), data, "mse"))


def test_arguments_that_do_not_fit(pair):
    M, _ = pair
    with pytest.raises(ValueError, match="b: got tree structure"):
        solve(M, np.ones(P), 1.0)
    with pytest.raises(ValueError, match=r"b\['b'\]: got shape"):
        solve(M, {"a": jnp.ones((2, 4)), "b": jnp.ones(4)}, 1.0)
    with pytest.raises(TypeError, match=r"b\['a'\]: got dtype float32"):
        solve(M, tree(np.ones(P), np.float32), 1.0)
    with pytest.raises(TypeError, match="key: got 0"):
        sample(M, 0, 1.0)
    with pytest.raises(ValueError, match="key: got shape"):
        sample(M, jax.random.split(jax.random.key(0)), 1.0)
    for k, exc in ((0, ValueError), (P + 10, ValueError), (None, TypeError), (1.5, TypeError)):
        with pytest.raises(exc, match="k: got"):
            eigsh(M, k)


def test_eigenvectors_beyond_the_rank():
    K, _ = case("few columns")
    with pytest.raises(ValueError, match="k: got 3, expected at most the rank"):
        eigsh(K, 3)
    vectors = jax.jit(lambda K: eigsh(K, 3)[1])(K)
    assert np.isnan(vectors["a"]).any(axis=(1, 2)).tolist() == [False, False, True]


def test_numbers_that_are_not_finite():
    A = np.ones((P, 2))
    A[0, 0] = np.inf
    K = gram(operator_with_root(A))
    with pytest.raises(ValueError, match="Gram matrix: got an eigendecomposition with NaN"):
        logdet(K, 1.0)
