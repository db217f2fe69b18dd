"""Operators and square roots in the solvers of SciPy, lineax and matfree."""

import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import (
    Diagonal,
    Stream,
    create_fisher_mv,
    create_ggn_mv,
    create_ggn_mv_without_data,
    create_hessian_mv,
    square_root,
    to_lineax,
    to_matfree,
    to_scipy,
)
from ggn_nb.tools.testing import assert_close, random_like
from ggn_nb.tools.timing import count_compiles
from jax import random
from jax.flatten_util import ravel_pytree

KEY = random.key(0)
X = np.asarray(random.normal(KEY, (7, 3)))
Y = np.asarray(random.normal(random.key(1), (7, 2)))
PARAMS = {"w": random.normal(random.key(2), (3, 2)) / 2, "b": jnp.array([0.1, -0.2])}  # P = 8


def model_fn(input, params):
    return jax.nn.relu(input @ params["w"] + params["b"]) + jnp.tanh(input[:2] * params["b"])


def data(dtype=jnp.float64):
    """Samples with a mask, so that an operator has truth values among its leaves."""
    return {"input": jnp.asarray(X, dtype), "target": jnp.asarray(Y, dtype), "mask": jnp.arange(7) != 3}


def ggn(params=PARAMS, **options):
    return create_ggn_mv(model_fn, params, data(params["w"].dtype), "mse", **options)


@cache
def jacobian() -> np.ndarray:
    """Of all predictions that count, of shape (12, 8), in the order of `ravel_pytree`."""
    flat, unravel = ravel_pytree(PARAMS)
    predict = lambda p: jax.vmap(lambda x: model_fn(x, unravel(p)))(jnp.asarray(X)[jnp.arange(7) != 3])
    return np.asarray(jax.jacobian(predict)(flat)).reshape(-1, 8)


def dense() -> np.ndarray:
    return 2 * jacobian().T @ jacobian()


def converted(tree, dtype):
    return jax.tree.map(lambda a: a.astype(dtype), tree)


# SciPy


def halves():
    """The data as a stream of two batches."""
    return Stream([jax.tree.map(lambda a: np.asarray(a)[rows], data()) for rows in (slice(4), slice(4, 7))])


@pytest.mark.parametrize("kind", ["cached", "batches", "streamed"])
def test_scipy_products(kind):
    sources = {"cached": lambda: ggn(), "batches": lambda: ggn(batch_size=3),
               "streamed": lambda: create_ggn_mv(model_fn, PARAMS, halves(), "mse")}
    A = to_scipy(sources[kind]())
    V = np.asarray(random.normal(KEY, (8, 3)))
    assert (A.shape, A.dtype) == ((8, 8), np.float64)
    for product in (A @ V, A.T @ V, np.stack([A @ v for v in V.T], 1), A @ V[:, :1]):
        assert isinstance(product, np.ndarray)
        assert_close(product, dense() @ V[:, : product.shape[1]])
    assert (A @ V[:, 0]).shape == (8,) and (A @ V[:, :1]).shape == (8, 1)


def test_scipy_square_root():
    A = square_root(ggn())
    R, RT = to_scipy(A), to_scipy(A.T)
    U, V = np.eye(14), np.eye(8)
    assert (R.shape, RT.shape) == ((8, 14), (14, 8))
    assert_close(R @ U, A.dense())
    assert_close(RT @ V, (R @ U).T)
    assert_close(R.T @ V, (R @ U).T)
    assert_close(RT.T @ U, R @ U)
    assert_close((R @ (R.T @ V)), dense())


@pytest.mark.parametrize(("dtype", "shown", "rtol"), [("float32", "float32", 1e-5), ("bfloat16", "float32", 0.05)])
def test_scipy_in_low_precision(dtype, shown, rtol):
    A = to_scipy(ggn(converted(PARAMS, dtype)))
    v = np.asarray(random.normal(KEY, (8,)))  # float64: rounded
    assert A.dtype == shown
    assert (A @ v).dtype == shown
    assert np.linalg.norm(A @ v - dense() @ v) < rtol * np.linalg.norm(dense() @ v)


def test_scipy_solvers():
    from scipy.sparse.linalg import cg, eigsh, lobpcg, lsmr, svds

    G, A = to_scipy(ggn()), to_scipy(square_root(ggn()))
    spectrum, b, delta = np.linalg.eigvalsh(dense()), np.arange(14.0), 0.3
    assert_close(eigsh(G, k=2)[0], spectrum[-2:], rtol=1e-8)
    assert_close(np.sort(lobpcg(G, np.eye(8, 1), maxiter=200, tol=1e-9)[0]), spectrum[-1:], rtol=1e-8)
    assert_close(np.sort(svds(A, k=2, return_singular_vectors=False)) ** 2, spectrum[-2:], rtol=1e-8)
    want = np.linalg.solve(dense() + delta * np.eye(8), A @ b)
    assert_close(cg(to_scipy(ggn().damped(delta)), A @ b, rtol=1e-12)[0], want, rtol=1e-8)
    assert_close(lsmr(A.T, b, damp=delta**0.5, atol=1e-13, btol=1e-13)[0], want, rtol=1e-8)


def test_scipy_refuses():
    with pytest.raises(TypeError, match="x: got dtype complex128, expected real numbers"):
        to_scipy(ggn()) @ (1j * np.ones(8))
    unbound = create_ggn_mv_without_data(model_fn, PARAMS, "mse", 1.0)
    with pytest.raises(TypeError, match=r"A: got Unbound, expected an operator.*or its bind\(data\)"):
        to_scipy(unbound)
    for wrong in (dense(), None, lambda v: v):
        with pytest.raises(TypeError, match="expected an operator, such as create_ggn_mv returns"):
            to_scipy(wrong)


# Lineax


def test_lineax_tags():
    lineax = pytest.importorskip("lineax")
    G = ggn()
    H = create_hessian_mv(model_fn, PARAMS, data(), "mse")
    F = create_fisher_mv(model_fn, PARAMS, data(), "mse", kind="monte_carlo", key=KEY)
    definite = {G: True, F: True, G.damped(0.1): True, G.flat(): True, H: False, G - H: False, Diagonal(PARAMS): False}
    for A, expected in definite.items():
        L = to_lineax(A)
        assert lineax.is_symmetric(L)
        assert lineax.is_positive_semidefinite(L) is expected
        assert L.T is L or lineax.is_symmetric(L.T)
    root = to_lineax(square_root(G))
    assert not lineax.is_symmetric(root)
    assert not lineax.is_positive_semidefinite(root)


def test_lineax_products_and_structures():
    pytest.importorskip("lineax")
    A = square_root(ggn())
    for matrix in (ggn(), A, A.T, A.flat()):
        L, v = to_lineax(matrix), random_like(KEY, matrix.structure)
        assert jax.tree.structure(L.in_structure()) == jax.tree.structure(matrix.structure)
        assert_close(L.mv(v), matrix(v))
        assert jax.tree.map(jnp.shape, L.mv(v)) == jax.tree.map(jnp.shape, L.out_structure())
        assert_close(L.as_matrix(), matrix.dense())
        assert_close(L.T.as_matrix(), matrix.dense().T)
        assert_close(L.T.T.mv(v), L.mv(v))


def test_lineax_takes_arrays_as_arguments():
    lineax = pytest.importorskip("lineax")
    solve = lambda L, b: lineax.linear_solve(L, b, lineax.CG(rtol=1e-12, atol=1e-12)).value
    b = random_like(KEY, PARAMS)
    L = to_lineax(ggn().damped(0.1))
    assert not jax.make_jaxpr(solve)(L, b).consts
    compiled = jax.jit(solve)
    want = np.linalg.solve(dense() + 0.1 * np.eye(8), ravel_pytree(b)[0])
    assert_close(ravel_pytree(compiled(L, b))[0], want, rtol=1e-8)
    elsewhere = ggn(jax.tree.map(lambda p: 1.1 * p, PARAMS)).damped(0.2)
    L = to_lineax(elsewhere)
    with count_compiles() as compiles:
        x = jax.block_until_ready(compiled(L, b))
    assert compiles.count == 0
    assert_close(elsewhere(x), b, rtol=1e-8)


def test_lineax_least_squares():
    lineax = pytest.importorskip("lineax")
    A = square_root(ggn())
    u = random_like(KEY, A.structure)
    found = lineax.linear_solve(to_lineax(A.T), u, lineax.LSMR(rtol=1e-12, atol=1e-12), throw=False).value
    assert jax.tree.structure(found) == jax.tree.structure(PARAMS)
    want = np.linalg.lstsq(np.asarray(A.dense()).T, np.ravel(u))[0]
    assert_close(ravel_pytree(found)[0], want, rtol=1e-7)


def test_lineax_gradient_in_the_parameters():
    """d/dθ bᵀ (G(θ) + δ I)⁻¹ b, against the same by a dense matrix."""
    lineax = pytest.importorskip("lineax")
    flat, unravel = ravel_pytree(PARAMS)
    b = jnp.arange(8.0)

    def by_lineax(flat):
        L = to_lineax(ggn(unravel(flat)).damped(0.5).flat())
        return b @ lineax.linear_solve(L, b, lineax.CG(rtol=1e-13, atol=1e-13)).value

    assert_close(jax.grad(by_lineax)(flat), jax.grad(lambda p: b @ jnp.linalg.solve(dense_at(p), b))(flat), rtol=1e-7)


def dense_at(flat, delta=0.5):
    """G + δ I at flat parameters, as a function that can be differentiated."""
    unravel = ravel_pytree(PARAMS)[1]
    inputs = jnp.asarray(X)[jnp.arange(7) != 3]
    J = jax.jacfwd(lambda p: jax.vmap(lambda x: model_fn(x, unravel(p)))(inputs))(flat).reshape(-1, 8)
    return 2 * J.T @ J + delta * jnp.eye(8)


# Matfree


def test_matfree_product_of_equal_functions():
    matvec, leaves = to_matfree(ggn())
    other, _ = to_matfree(ggn(jax.tree.map(lambda p: 1.1 * p, PARAMS)))
    assert matvec == other and hash(matvec) == hash(other)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves)
    v = jnp.arange(8.0)
    assert_close(matvec(v, *leaves), dense() @ v)
    assert_close(jax.jit(matvec)(v, *leaves), dense() @ v)
    assert_close(jax.vmap(lambda v: matvec(v, *leaves))(jnp.eye(8)), dense())


@pytest.mark.parametrize("linearize", ["cached", "rematerialized", "factored", "recomputed"])
def test_matfree_policies_and_roots(linearize):
    A = square_root(ggn(linearize=linearize))
    for matrix in (A.operator, A, A.T):
        matvec, leaves = to_matfree(matrix)
        assert_close(matvec(jnp.ones(matrix.shape[1]), *leaves), matrix.dense().sum(1))


def test_matfree_random_keys_among_the_leaves():
    F = create_fisher_mv(model_fn, PARAMS, data(), "mse", kind="monte_carlo", key=KEY, linearize="recomputed")
    matvec, leaves = to_matfree(F)
    assert_close(matvec(jnp.ones(8), *leaves), F.dense().sum(1))


def test_matfree_gradients():
    """Of an estimate of vᵀ log(G(θ) + δ I) v in θ and δ, against the same with a dense matrix."""
    pytest.importorskip("matfree")
    from matfree import decomp, funm

    flat, unravel = ravel_pytree(PARAMS)
    v = jnp.arange(1.0, 9.0)
    log_of = funm.monte_carlo_funm_sym_logdet(decomp.tridiag_sym(4))

    def by_products(flat, delta):
        matvec, leaves = to_matfree(ggn(unravel(flat)).damped(delta))
        return log_of(matvec, v, *leaves)

    def by_dense(flat, delta):
        return log_of(lambda v, D: D @ v, v, dense_at(flat, delta))

    assert_close(by_products(flat, 0.5), by_dense(flat, 0.5), rtol=1e-8)
    found = jax.jit(jax.grad(by_products, (0, 1)))(flat, 0.5)
    assert_close(found, jax.grad(by_dense, (0, 1))(flat, 0.5), rtol=1e-7)


# What is missing


@pytest.mark.parametrize("convert", [to_lineax, to_matfree])
def test_streams_are_refused(convert):
    G = create_ggn_mv(model_fn, PARAMS, halves(), "mse")
    with pytest.raises(TypeError, match=r"A: got an operator on a stream.*write to_scipy\(A\)"):
        convert(G)


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lineax", None)
    with pytest.raises(ImportError, match=r'lineax: not installed.*pip install "ggn_nb\[linalg\]"'):
        to_lineax(ggn())
