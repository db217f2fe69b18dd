"""Linear algebra by products, against dense matrices in float64 from NumPy."""

import sys
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import (
    DenseBlocks,
    Diagonal,
    Operator,
    Stream,
    block_diagonal,
    create_fisher_mv,
    create_ggn_mv,
    create_hessian_mv,
    diagonal,
    eigsh,
    frobenius_norm,
    gram,
    inverse,
    inverse_sqrt,
    logdet,
    register_operator,
    sample,
    solve,
    solve_many,
    spectral_density,
    trace,
)
from ggn_nb.linalg.block_conjugate_gradients import orthonormal_rows
from ggn_nb.linalg.lanczos import Basis, nothing_beyond
from ggn_nb.linalg.lanczos_functions import first_coefficients
from ggn_nb.linalg.products import FlatProduct
from ggn_nb.tools.equations import equations_of
from ggn_nb.tools.testing import assert_close
from ggn_nb.tools.timing import count_compiles
from jax import random
from jax.flatten_util import ravel_pytree

pytest.importorskip("lineax", reason="of the extra `linalg`")
pytest.importorskip("matfree", reason="of the extra `linalg`")

N = 12


def model(input, params):
    return jnp.tanh(input @ params["w"]) @ params["v"] + params["b"]


@cache
def problem(dtype="float64"):
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(4, 2)),
        "v": rng.normal(size=(2, 3)) / 2,
        "b": np.zeros(3),
        "c": rng.normal(size=6),
    }
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), params)
    data = {"input": jnp.asarray(rng.normal(size=(N, 4)), dtype), "target": jnp.arange(N) % 3}
    return params, data


def with_spare(input, params):
    """The model, and parameters that hardly matter: the matrix has small eigenvalues."""
    return model(input, params) + 1e-2 * jnp.sum(params["c"] * input[0])


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


@cache
def operator(name):
    params, data = problem()
    create = lambda maker, **options: maker(with_spare, params, data, "cross_entropy", **options)
    G = create(create_ggn_mv)
    D = Diagonal(jax.tree.map(lambda p: 1 + p**2, params))
    return {
        "ggn": lambda: G,
        "in batches": lambda: create(create_ggn_mv, batch_size=5),
        "fisher": lambda: create(create_fisher_mv, kind="monte_carlo", key=random.key(0)),
        "multiple": lambda: 2.0 * G,
        "sum": lambda: G + D,
        "damped": lambda: G.damped(1.0),
        "blocks": lambda: block_diagonal(G, "layer"),
        "hessian": lambda: create(create_hessian_mv),
        "stream": lambda: create_ggn_mv(with_spare, params, Stream([data]), "cross_entropy"),
    }[name]()


@cache
def dense(name):
    return np.asarray(operator("ggn" if name == "stream" else name).dense(), np.float64)


def right(num=None):
    rng, (params, _) = np.random.default_rng(1), problem()
    shape = () if num is None else (num,)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=shape + p.shape)), params)


def rows(trees):
    return np.asarray(jax.vmap(lambda t: ravel_pytree(t)[0])(trees), np.float64)


def tree_of_dampings():
    params, _ = problem()
    return {"w": 0.5, "v": 0.1, "b": jnp.full(3, 2.0), "c": 1.0 + params["c"] ** 2}


# Solutions


@pytest.mark.parametrize("name", ["ggn", "in batches", "fisher", "multiple", "sum", "stream"])
def test_solutions(name):
    A, b, bs = operator(name), right(), right(4)
    M = dense(name) + 0.1 * np.eye(len(dense(name)))
    found = solve(A, b, 0.1, tolerance=1e-14)
    x = np.linalg.solve(M, flat(b))
    assert np.linalg.norm(flat(found.x) - x) <= 1e-10 * np.linalg.norm(x)
    true = np.linalg.norm(flat(b) - M @ flat(found.x)) / np.linalg.norm(flat(b))
    assert_close(float(found.residual), true, atol=1e-14)
    assert bool(found.converged) == (found.residual <= 1e-14) and int(found.num_steps) > 0
    many = solve_many(A, bs, 0.1, tolerance=1e-14)
    assert np.abs(rows(many.x) - np.linalg.solve(M, rows(bs).T).T).max() <= 1e-9
    assert many.residual.shape == many.converged.shape == (4,)


def test_trees_of_dampings():
    A, b, damping = operator("ggn"), right(), tree_of_dampings()
    M = np.asarray(A.damped(damping).dense())
    assert_close(flat(solve(A, b, damping, tolerance=1e-13).x), np.linalg.solve(M, flat(b)), rtol=1e-9)
    values, U = np.linalg.eigh(M)
    root = inverse_sqrt(A, damping, tolerance=1e-13)(b)
    assert_close(flat(root), U @ (U.T @ flat(b) / np.sqrt(values)), rtol=1e-9)
    found = logdet(A, damping, key=random.key(0), num_probes=30)
    assert abs(found.value - np.log(values).sum()) < 4 * found.standard_error


def test_preconditioners():
    A, b = operator("ggn"), right()
    params, _ = problem()
    x = np.linalg.solve(dense("ggn") + 0.01 * np.eye(len(flat(b))), flat(b))
    exact = gram(A)
    for C in (exact, inverse(exact, 0.01), Diagonal(diagonal(A)), block_diagonal(A).dense_blocks(), block_diagonal(A)):
        found = solve(A, b, 0.01, preconditioner=C, tolerance=1e-12)
        assert_close(flat(found.x), x, rtol=1e-8)
        if C is exact: assert found.num_steps <= 2
    with pytest.raises(TypeError, match="preconditioner: got dict, expected an Operator"):
        solve(A, b, 0.1, preconditioner=params)
    with pytest.raises(ValueError, match="preconditioner: got tree structure"):
        solve(A, b, 0.1, preconditioner=Diagonal(jnp.ones(3)))


def test_indefinite_matrices():
    H, b = operator("hessian"), right()
    least = np.linalg.eigvalsh(dense("hessian"))[0]
    assert least < -0.1
    for call in (lambda: solve(H, b, 1e-3), lambda: solve_many(H, right(3), 1e-3)):
        with pytest.raises(ValueError, match="M: got an operator with a direction of negative curvature"):
            call()
    compiled = jax.jit(lambda H, b: solve(H, b, 1e-3))(H, b)
    assert not compiled.converged and np.isfinite(flat(compiled.x)).all()
    found = solve(H, b, 1 - least, tolerance=1e-12)
    assert_close(flat(found.x), np.linalg.solve(dense("hessian") + (1 - least) * np.eye(len(flat(b))), flat(b)), rtol=1e-9)
    assert np.isnan(flat(inverse(H, 1e-3)(b))).all()


@register_operator
class Turned(Operator):
    """A dense symmetric matrix, known by its products."""

    matrix: jax.Array

    @property
    def structure(self): return jax.ShapeDtypeStruct(self.matrix.shape[:1], self.matrix.dtype)

    @property
    def is_psd(self): return True

    def multiply(self, vec): return self.matrix @ vec


def turned(values, dtype="float64", seed=0):
    Q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(values),) * 2))
    return Turned(jnp.asarray((Q * values) @ Q.T, dtype)), Q


def test_tolerances_out_of_reach_end():
    """Ill-conditioned and in float32: no tolerance makes it run long, or return NaN."""
    A, _ = turned(np.r_[np.logspace(2, 5, 12), np.linspace(0, 1, 108)], "float32")
    b = random.normal(random.key(0), (120,), "float32")
    run = jax.jit(lambda A, b, d: [solve(A, b, d, tolerance=t) for t in (1e-2, 1e-9)])
    near, far = run(A, b, 10.0)
    assert near.converged and near.residual <= 1e-2
    assert not far.converged and far.residual < 1e-3 and far.num_steps < 500
    hard = run(A, b, 0.1)[1]
    assert not hard.converged and hard.residual < 1e-2 and hard.num_steps <= 1000
    many = jax.jit(lambda A, b: solve_many(A, b, 0.1, tolerance=1e-9))(A, jnp.stack([b, 2 * b, b[::-1]]))
    assert np.isfinite(many.x).all() and (many.residual < 1e-1).all()


def test_dependent_right_hand_sides():
    A, _ = turned(np.r_[np.logspace(0, 3, 20), np.zeros(20)])
    b, c = np.random.default_rng(2).normal(size=(2, 40))
    bs = jnp.asarray([b, 2 * b, b + c, np.zeros(40), c, np.asarray(A.matrix) @ b + 0.1 * b])
    found = jax.jit(lambda A, bs: solve_many(A, bs, 0.1, tolerance=1e-11))(A, bs)
    assert_close(np.asarray(found.x), np.linalg.solve(A.matrix + 0.1 * np.eye(40), bs.T).T, rtol=1e-8)
    assert found.converged.all() and found.residual[3] == 0
    few, _ = turned(np.array([1.0, 2.0, 3.0]))
    bs = jnp.asarray(np.random.default_rng(3).normal(size=(5, 3)))
    assert_close(np.asarray(solve_many(few, bs, 1.0, tolerance=1e-12).x), np.linalg.solve(few.matrix + np.eye(3), bs.T).T)


def test_orthonormal_rows_span():
    rows = np.random.default_rng(0).normal(size=(3, 8))
    Q = np.asarray(orthonormal_rows(jnp.asarray(np.r_[rows, rows[:1] - rows[1:2], np.zeros((1, 8))])))
    assert np.linalg.matrix_rank(Q) == 3
    assert_close(rows @ Q.T @ Q, rows, atol=1e-12)


def test_derivatives_and_batches_of_solutions():
    A, b = operator("ggn"), right()
    M = lambda d: dense("ggn") + d * np.eye(len(flat(b)))
    x_of = lambda d, b: ravel_pytree(solve(A, b, d, tolerance=1e-13).x)[0]
    forward, backward = jax.jit(lambda d: (jax.jacfwd(x_of)(d, b), jax.jacrev(x_of)(d, b)))(0.3)
    exact = -np.linalg.solve(M(0.3), np.linalg.solve(M(0.3), flat(b)))
    assert_close(np.asarray(forward), exact, rtol=1e-8)
    assert_close(np.asarray(backward), exact, rtol=1e-8)
    by_b = jax.jit(jax.grad(lambda b: jnp.sum(jnp.sin(x_of(0.3, b)))))(b)
    x = np.linalg.solve(M(0.3), flat(b))
    assert_close(flat(by_b), np.linalg.solve(M(0.3), np.cos(x)), rtol=1e-8)
    several = jax.jit(jax.vmap(x_of, (0, None)))(jnp.array([0.1, 1.0, 10.0]), b)
    assert_close(np.asarray(several), np.stack([np.linalg.solve(M(d), flat(b)) for d in (0.1, 1.0, 10.0)]), rtol=1e-8)


def test_derivatives_with_leaves_that_are_no_floats():
    """The keys and numbers of a Monte-Carlo Fisher do not stand in the way."""
    F, b = operator("fisher"), right()
    slope = jax.jit(jax.grad(lambda F, d: solve(F, b, d, tolerance=1e-12).residual + ravel_pytree(solve(F, b, d).x)[0].sum(), 1))(F, 0.5)
    M = dense("fisher") + 0.5 * np.eye(len(flat(b)))
    assert_close(float(slope), -np.linalg.solve(M, np.linalg.solve(M, flat(b))).sum(), rtol=1e-6)


def test_derivatives_by_parameters():
    """What has derivatives has the right ones, by products and by closed forms with multiple eigenvalues; the rest is refused."""
    params, _ = problem()
    A, b, direction = operator("ggn"), right(), right()
    at = lambda h: A.at(jax.tree.map(lambda p, t: p + h * t, params, direction))
    dense_at = lambda h: np.asarray(at(h).dense())
    dM = (8 * (dense_at(1e-4) - dense_at(-1e-4)) - (dense_at(2e-4) - dense_at(-2e-4))) / 12e-4
    M, w, v = dense("ggn") + 0.3 * np.eye(len(flat(b))), np.sin(np.arange(len(flat(b)))), flat(b)
    l, U = np.linalg.eigh(M)
    X, r = U.T @ dM @ U, np.sqrt(l)
    root = -(U.T @ w) @ (X / (np.outer(r, r) * (r[:, None] + r))) @ (U.T @ v)
    solved = -np.linalg.solve(M, w) @ dM @ np.linalg.solve(M, v)
    along = lambda tree: jnp.asarray(w) @ ravel_pytree(tree)[0]
    K = lambda h: gram(at(h))
    of = {
        "solve": (lambda h: along(solve(at(h), b, 0.3, tolerance=1e-13).x), solved),
        "solve by Gram": (lambda h: along(solve(K(h), b, 0.3).x), solved),
        "root by Gram": (lambda h: along(inverse_sqrt(K(h), 0.3)(b)), root),
        "logdet by Gram": (lambda h: logdet(K(h), 0.3), np.trace(np.linalg.solve(M, dM))),
        "eigenvalues": (lambda h: eigsh(at(h), 3)[0].sum(), np.diag(X)[-3:].sum()),
    }
    found = jax.jit(lambda h: {name: jax.jvp(fn, (h,), (1.0,))[1] for name, (fn, _) in of.items()})(0.0)
    for name, (_, exact) in of.items():
        assert_close(float(found[name]), exact, rtol=1e-7)
    by_damping = jax.jit(jax.grad(lambda d: along(inverse_sqrt(A, d, tolerance=1e-12)(b))))(0.3)
    assert_close(float(by_damping), -(U.T @ w / l**1.5) @ (U.T @ v) / 2, rtol=1e-8)
    refused = {
        "an inverse square root": lambda h: along(inverse_sqrt(at(h), 0.3)(b)),
        "a sample": lambda h: along(sample(at(h), random.key(0), 0.3)),
        "a quadrature": lambda h: logdet(at(h), 0.3, key=random.key(0)).value,
    }
    for what, fn in refused.items():
        with pytest.raises(TypeError, match=f"M: got a derivative by arrays of the operator .*{what}"):
            jax.grad(fn)(0.0)


def test_roots_of_blocks_with_multiple_eigenvalues_have_derivatives():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    K, dK, v = (Q * [2.0, 2, 0, 0, 0]) @ Q.T, rng.normal(size=(5, 5)), rng.normal(size=5)
    root = lambda h: inverse_sqrt(DenseBlocks.on(jnp.zeros(5), [K + h * (dK + dK.T)]), 0.4)(jnp.asarray(v))
    exact = (8 * (root(1e-4) - root(-1e-4)) - (root(2e-4) - root(-2e-4))) / 12e-4
    assert_close(np.asarray(jax.jacrev(root)(0.0)), np.asarray(exact), rtol=1e-7)


# Eigenpairs


@pytest.mark.parametrize("name", ["ggn", "hessian", "blocks", "damped", "stream"])
def test_eigenpairs(name):
    A, M = operator(name), dense(name)
    exact = np.linalg.eigvalsh(M)
    for which, expected in (("LA", exact[::-1]), ("SA", exact)):
        values, vectors = eigsh(A, 5, which=which)
        U = rows(vectors)
        assert_close(np.asarray(values), expected[:5], rtol=1e-10, atol=1e-10 * exact[-1])
        assert_close(U @ U.T, np.eye(5), atol=1e-10)
        assert np.abs(M @ U.T - U.T * np.asarray(values)).max() <= 1e-9 * exact[-1]


def test_ten_largest_in_float32():
    d = np.r_[np.repeat([1e4, 3e3, 900.0], 2), np.logspace(2, 0, 200), np.zeros(94)]
    A, _ = turned(d, "float32")
    for values, vectors in (eigsh(A, 10), jax.jit(lambda A: eigsh(A, 10))(A)):
        assert_close(np.asarray(values, np.float64), np.sort(d)[::-1][:10], rtol=2e-5, atol=5e-3)
        assert_close(np.asarray(vectors @ vectors.T), np.eye(10, dtype="float32"), atol=2e-5)


def test_multiple_eigenvalues_and_zeros():
    A, _ = turned(np.r_[np.full(6, 4.0), np.full(3, 1.0), np.zeros(191)])
    values, vectors = eigsh(A, 12)
    assert_close(np.asarray(values), np.r_[np.full(6, 4.0), np.full(3, 1.0), np.zeros(3)], atol=1e-10)
    assert_close(np.asarray(vectors @ vectors.T), np.eye(12), atol=1e-10)


SPECTRA = {
    "clustered": np.r_[1 + 1e-6 * np.arange(8), np.linspace(0, 0.5, 32)],
    "multiple": np.r_[np.full(6, 3.0), np.full(6, 2.0), np.zeros(28)],
    "of low rank": np.r_[np.arange(1.0, 5.0), np.zeros(36)],
    "indefinite": np.linspace(-5, 3, 40),
    "zero": np.zeros(40),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_spectra(dtype):
    """More pairs than the rank, all of them, from both ends: values, orthogonality and true residuals."""
    small = 100 * jnp.finfo(dtype).eps
    for name, d in SPECTRA.items():
        A, _ = turned(d, dtype)
        scale, M = np.abs(d).max() or 1, np.asarray(A.matrix, np.float64)
        cases = [("LA", -d, 10), ("LA", -d, 40)] + [("SA", d, 10), ("LM", -np.abs(d), 10)] * (name == "indefinite")
        for which, order, k in cases:
            values, vectors = (np.asarray(x, np.float64) for x in eigsh(A, k, which=which))
            expected = np.sort(order)[:k]
            assert np.abs({"LA": -values, "SA": values, "LM": -np.abs(values)}[which] - expected).max() < small * scale
            assert np.abs(vectors @ vectors.T - np.eye(k)).max() < small
            assert np.linalg.norm(M @ vectors.T - vectors.T * values, axis=0).max() < max(small, 3e-13) * scale


@pytest.mark.parametrize("seed", range(30))
def test_copies_are_found(seed):
    """Random spectra of both signs, with copies among the wanted, from all ends; P is larger than the first basis."""
    rng = np.random.default_rng(seed)
    d = rng.normal(size=200) ** 3
    ranks = np.argsort(-np.abs(d))
    d[ranks[40:45]] = d[ranks[:5]]  # copies of the five largest
    for dtype, small in (("float64", 1e-11), ("float32", 2e-4)):
        A, _ = turned(d, dtype)
        for which, wanted in (("LA", -np.sort(-d)), ("SA", np.sort(d)), ("LM", d[np.argsort(-np.abs(d), stable=True)])):
            values, vectors = (np.asarray(x, np.float64) for x in eigsh(A, 6, which=which, key=random.key(seed)))
            assert np.abs(np.sort(values) - np.sort(wanted[:6])).max() < small * np.abs(d).max(), which
            assert np.abs(vectors @ vectors.T - np.eye(6)).max() < 10 * small


# Copies whose distance to the next eigenvalue is that of the other eigenvalues: no bound parts them after a few products.
NEAR = {
    "two zeros": np.r_[0, 0, np.linspace(1e-3, 2, 198)],
    "two of the largest": np.r_[2, 2, 2 - np.linspace(1e-3, 2, 198)],
    "in both outputs": np.repeat(np.r_[1.0, np.linspace(0, 0.9995, 99)], 2),
    "five zeros": np.r_[np.zeros(5), np.geomspace(1e-8, 1, 26)],
    "many zeros": np.r_[np.zeros(10), np.logspace(-6, 1, 50)],
    "more than fit in a basis": np.r_[0, 0, np.linspace(1e-3, 2, 398)],
}


@pytest.mark.parametrize("name", NEAR)
def test_copies_near_to_the_next_are_found(name):
    """As values on the host and in a compiled program, and with another key."""
    A, k = 1.0 * Diagonal(jnp.asarray(NEAR[name])), 5 if name in ("five zeros", "many zeros") else 2
    for which, wanted in (("LA", np.sort(NEAR[name])[::-1]), ("SA", np.sort(NEAR[name]))):
        for find in (eigsh, partial(eigsh, key=random.key(5)), jax.jit(eigsh, static_argnums=1, static_argnames="which")):
            values, vectors = find(A, k, which=which)
            assert np.abs(values - wanted[:k]).max() < 1e-9, which
            assert np.abs(vectors @ vectors.T - np.eye(k)).max() < 1e-9


def test_what_is_not_known_to_be_complete_is_refused():
    """A search that ends where a look has found that a pair is missing, or was undecided, is not over."""
    A = 1.0 * Diagonal(jnp.asarray(NEAR["more than fit in a basis"]))
    with pytest.raises(ValueError, match="max_steps: got 300 products, in which not all eigenpairs were found"):
        eigsh(A, 2, which="SA", max_steps=300)
    assert np.isnan(jax.jit(lambda A: eigsh(A, 2, which="SA", max_steps=300)[1])(A)).all()


def test_what_a_look_outside_says():
    """Of 300 random starts and bounds, each below the largest eigenvalue finds it, and each above it finds nothing."""
    d = np.r_[np.linspace(-1, 1, 60), 1.2]
    empty = Basis(jnp.zeros((2, 61)), jnp.zeros((1, 1)), jnp.zeros(()))
    A = FlatProduct(Diagonal(jnp.asarray(d)))
    look = jax.jit(jax.vmap(lambda bound, key: nothing_beyond(A, empty, jnp.array([bound, jnp.inf]), 60, key)))
    keys, bounds = random.split(random.key(0), 300), np.linspace(1.05, 2.0, 300)
    complete, products = look(bounds, keys)
    assert (np.asarray(complete) == (bounds > 1.2)).all() and products.max() < 60
    assert np.polyfit(bounds[bounds > 1.25], products[bounds > 1.25], 1)[0] < 0  # the farther, the fewer


def test_a_few_products_are_enough_where_the_spectrum_falls():
    """A basis of 20, a look outside, and one product for the residuals of all nine pairs."""
    products = []

    class Counted(Turned):
        def multiply(self, vec):
            jax.debug.callback(lambda: products.append(1))
            return Turned.multiply(self, vec)

    d = np.r_[2.0 ** -np.arange(30), np.zeros(470)]
    turned_matrix, _ = turned(d, "float32")
    values, _ = eigsh(register_operator(Counted)(turned_matrix.matrix), 9, tolerance=1e-4)
    jax.effects_barrier()
    assert_close(np.asarray(values, np.float64), d[:9], atol=1e-4)
    assert 20 < len(products) < 30, len(products)


@pytest.mark.parametrize("name", SPECTRA)
def test_no_number_is_nan_on_the_way(name):
    """For those who debug with `jax_debug_nans`: at once, and compiled."""
    A, _ = turned(SPECTRA[name], "float32")
    with jax.debug_nans(True):
        for which in ("LA", "SA", "LM"):
            for find in (eigsh, jax.jit(eigsh, static_argnums=1, static_argnames="which")):
                assert np.isfinite(find(A, 3, which=which)[0]).all()
        assert np.isfinite(solve(A, jnp.ones(40, "float32"), 10.0).x).all()


def test_a_matrix_of_one_number():
    values, vectors = eigsh(Turned(jnp.array([[-2.0]])), 1, which="LM")
    assert values.tolist() == [-2.0] and abs(vectors).tolist() == [[1.0]]


def test_a_loss_that_is_not_convex():
    """G is held to be positive semi-definite, which it is not far from the targets of a loss with heavy tails."""
    x = jax.random.normal(jax.random.key(0), (30, 8))
    heavy = lambda f, y: 2 * jnp.log1p((f - y) ** 2)
    G = create_ggn_mv(lambda input, params: input @ params, jnp.zeros(8), {"input": x, "target": jnp.full(30, 30.0)}, heavy)
    eigenvalues, key, b = np.linalg.eigvalsh(np.asarray(G.dense(), float)), jax.random.key(1), jnp.ones(8)
    assert eigenvalues[-1] < -0.01 and eigenvalues[0] > -1
    found = logdet(G, 1.0, key=key, num_steps=8, num_probes=40)
    assert abs(found.value - np.log1p(eigenvalues).sum()) < 5 * found.standard_error
    for refused in (lambda: logdet(G, 0.01, key=key), lambda: logdet(G, jnp.full(8, 0.01), key=key), lambda: sample(G, key, 0.01),
                    lambda: solve(G, b, 0.01), lambda: solve_many(G, jnp.stack([b, 2 * b]), 0.01)):
        with pytest.raises(ValueError, match="not positive definite"): refused()


def test_what_is_no_symmetric_matrix_has_no_eigenpairs():
    A = Turned(jnp.asarray(np.random.default_rng(0).normal(size=(40, 40))))
    with pytest.raises(ValueError, match=r"M: got products for which \|M u − λ u\| is .* times the largest"):
        eigsh(A, 40)
    assert np.isnan(jax.jit(lambda A: eigsh(A, 40))(A)[1]).any()
    B, _ = turned(SPECTRA["clustered"], "float32")
    with pytest.raises(ValueError, match="rounding errors leave"):
        eigsh(B, 3, tolerance=1e-9)


def test_lobpcg():
    A, Q = turned(np.r_[9.0, 7.0, 7.0, 5.0, np.linspace(-1, 1, 56)])
    for which, exact in (("LA", [9.0, 7, 7]), ("SA", np.linspace(-1, 1, 56)[:3])):
        values, vectors = eigsh(A, 3, which=which, method="lobpcg", tolerance=1e-12)
        assert_close(np.asarray(values), np.asarray(exact), rtol=1e-8)
    with pytest.raises(ValueError, match="method: got 'lobpcg' for which='LM'"):
        eigsh(A, 3, which="LM", method="lobpcg")
    with pytest.raises(ValueError, match="method: got 'qr'"):
        eigsh(A, 3, method="qr")


# Roots, samples


def test_inverse_roots_and_samples():
    A, b = operator("sum"), right()
    M = dense("sum") + 0.2 * np.eye(len(flat(b)))
    values, U = np.linalg.eigh(M)
    R = inverse_sqrt(A, 0.2, tolerance=1e-13)
    assert_close(flat(R(b)), U @ (U.T @ flat(b) / np.sqrt(values)), rtol=1e-10)
    assert_close(np.asarray(R.dense()), (U / np.sqrt(values)) @ U.T, rtol=1e-10)
    assert_close(np.asarray(inverse(A, 0.2, tolerance=1e-13).dense()), (U / values) @ U.T, rtol=1e-9)
    draws = rows(sample(A, random.key(0), 0.2, 4000))
    error = np.abs(draws.T @ draws / 4000 - (U / values) @ U.T).max()
    assert error < 5 * (1 / values).max() * np.sqrt(2 / 4000)
    one = sample(A, random.key(0), 0.2)
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, b)


def test_roots_that_still_change_are_not_returned():
    A, _ = turned(np.linspace(0, 1e4, 200))
    with pytest.raises(ValueError, match="max_steps: samples still change"):
        sample(A, random.key(0), 1e-3, max_steps=20)
    assert np.isnan(inverse_sqrt(A, 1e-3, max_steps=20)(jnp.ones(200))).all()


# Estimates


@pytest.mark.parametrize("name", ["ggn", "hessian", "stream"])
def test_traces_and_norms(name):
    A, M = operator(name), dense(name)
    estimates = {
        "hutchinson": (trace(A, "hutchinson", key=random.key(0), num_probes=40), np.trace(M)),
        "norm": (frobenius_norm(A, random.key(1), num_probes=40), np.linalg.norm(M)),
    }
    if name != "stream":
        estimates["xtrace"] = (trace(A, "xtrace", key=random.key(2), num_probes=9), np.trace(M))
    for found, exact in estimates.values():
        assert abs(found.value - exact) <= 4 * found.standard_error + 1e-10 * abs(exact)
    if name == "stream":
        with pytest.raises(ValueError, match="estimator: got 'xtrace', expected 'hutchinson'"):
            trace(A, "xtrace", key=random.key(0))


def test_hutchinson_is_exact_on_a_diagonal():
    D = Diagonal(jnp.arange(5.0))
    assert_close(float(trace(D, "hutchinson", key=random.key(0)).value), 10.0)
    assert_close(float(frobenius_norm(D, random.key(0)).value), np.sqrt(30.0))


def test_log_determinants():
    A, M = operator("ggn"), dense("ggn")
    exact = lambda d: np.linalg.slogdet(M + d * np.eye(len(M)))[1]
    found, slope = jax.jit(jax.value_and_grad(lambda d: logdet(A, d, key=random.key(0), num_probes=60).value))(0.5)
    error = logdet(A, 0.5, key=random.key(0), num_probes=60).standard_error
    assert abs(found - exact(0.5)) < 4 * error
    assert abs(slope - np.trace(np.linalg.inv(M + 0.5 * np.eye(len(M))))) < 0.1 * slope
    with pytest.raises(ValueError, match="key: got None, .* for a log determinant by the products of a GGN"):
        logdet(A, 0.5)
    with pytest.raises(ValueError, match="M: got an operator with a direction of negative curvature"):
        logdet(operator("hessian"), 1e-3, key=random.key(0))


def test_spectral_density():
    A, M = operator("hessian"), dense("hessian")
    exact = np.linalg.eigvalsh(M)
    found = spectral_density(A, random.key(0), num_probes=50)
    assert_close(np.asarray(found.weights.sum(1)), np.full(50, float(len(M))))
    points = jnp.asarray([exact[0] - 1, -0.5 * abs(exact[0]), 0.5 * exact[-1], exact[-1] + 1])
    value, error = found.cumulative(points)
    expected = (exact[:, None] <= np.asarray(points)).sum(0)
    assert (np.abs(np.asarray(value) - expected) <= 4 * np.asarray(error) + 1e-9).all()
    grid = found.grid(4000)
    area = jnp.sum(found.density(grid).value) * (grid[1] - grid[0])
    assert_close(float(area), float(len(M)), rtol=1e-2)
    squares = found.trace(jnp.square)
    assert abs(squares.value - (exact**2).sum()) < 4 * squares.standard_error


# Compiled, narrow


def test_nothing_is_compiled_twice():
    A, b = operator("ggn"), right()
    params, _ = problem()
    calls = [
        lambda A: solve(A, b, 0.1),
        lambda A: eigsh(A, 3),
        lambda A: sample(A, random.key(0), 0.1),
        lambda A: logdet(A, 0.1, key=random.key(0)),
    ]
    moved = [A.at(jax.tree.map(lambda p, f=f: f * p, params)) for f in (1.1, 1.2)]
    for call in calls:
        call(moved[0])
        with count_compiles() as compiles:
            call(moved[1])
        assert compiles.count == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_narrow_parameters(dtype):
    params, data = problem(dtype)
    A = create_ggn_mv(with_spare, params, data, "cross_entropy")
    b = jax.tree.map(lambda leaf: leaf.astype(dtype), right())
    found = jax.jit(lambda A, b: solve(A, b, 1.0))(A, b)
    M = dense("ggn") + np.eye(len(flat(b)))
    error = np.linalg.norm(flat(found.x) - np.linalg.solve(M, flat(b))) / np.linalg.norm(flat(found.x))
    assert error < {"bfloat16": 0.2, "float16": 0.02, "float32": 1e-4}[dtype]
    assert [leaf.dtype.name for leaf in jax.tree.leaves(found.x)] == [dtype] * 4
    values, _ = eigsh(A, 3)
    assert_close(np.asarray(values, np.float64), np.linalg.eigvalsh(dense("ggn"))[::-1][:3], rtol={"bfloat16": 0.1, "float16": 0.01, "float32": 1e-4}[dtype])
    estimates = [(logdet(A, 1.0, key=random.key(0)), np.linalg.slogdet(M)[1]), (trace(A, "hutchinson", key=random.key(0)), np.trace(dense("ggn")))]
    for found, exact in estimates:
        assert found.value.dtype == "float32" and abs(float(found.value) - exact) < 4 * float(found.standard_error)
    if dtype != "float32":
        with pytest.raises(ValueError, match="method: got 'lobpcg', expected 'lanczos' for parameters in half precision"):
            eigsh(A, 2, method="lobpcg")
    drawn = sample(A, random.key(0), 1.0, 2)
    assert [leaf.dtype.name for leaf in jax.tree.leaves(drawn)] == [dtype] * 4
    assert np.isfinite(np.asarray(ravel_pytree(drawn)[0], np.float64)).all()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lineax", None)
    A, _ = turned(np.arange(1.0, 8.0))
    with pytest.raises(ImportError, match=r"pip install \"ggn_nb\[linalg\]\""):
        solve(A, jnp.ones(7), 1.0)


def eigenproblems(program):
    """The dtypes of the matrices whose eigenvalues a program computes."""
    return {e.invars[0].aval.dtype.name for e in equations_of(program) if e.primitive.name == "eigh"}


def test_small_eigenproblems_are_in_float64():
    A, _ = turned(np.arange(1.0, 9.0), "float32")
    key, vec = random.key(0), jnp.ones(8, "float32")
    functions = (
        lambda A: logdet(A, 0.1, key=key).value,
        lambda A: spectral_density(A, key).nodes,
        lambda A: sample(A, key, 0.1),
        lambda A: inverse_sqrt(A, 0.1)(vec),
        lambda A: eigsh(A, 2)[0],
        lambda A: solve_many(A, jnp.stack([vec, 2 * vec]), 0.1).x,
    )
    for number, fn in enumerate(functions):
        program = jax.make_jaxpr(fn)(A)
        assert eigenproblems(program) == {"float64"}, number
        assert program.out_avals[0].dtype == "float32", number
    small = np.float32([[1, 0.5], [0.5, 0.25 + 1e-6]])
    basis = Basis(jnp.eye(3, 2, dtype="float32"), jnp.asarray(small), jnp.zeros((), "float32"))
    values, U = np.linalg.eigh(np.float64(small))
    exact = U @ (U[0] / np.sqrt(values))
    assert_close(np.float64(jax.jit(lambda b: first_coefficients(b, 2, jax.lax.rsqrt))(basis)), exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_representations_precondition_in_half_precision(dtype):
    params, data = problem(dtype)
    A = create_ggn_mv(with_spare, params, data, "cross_entropy")
    b = jax.tree.map(lambda leaf: leaf.astype(dtype), right())
    plain = flat(solve(A, b, 1.0).x)
    for C in (Diagonal(diagonal(A)), block_diagonal(A).dense_blocks(), gram(A)):
        for found in (solve(A, b, 1.0, preconditioner=C).x, jax.tree.map(lambda x: x[0], solve_many(A, jax.tree.map(lambda x: x[None], b), 1.0, preconditioner=C).x)):
            assert [leaf.dtype.name for leaf in jax.tree.leaves(found)] == [dtype] * 4
            assert np.linalg.norm(flat(found) - plain) < {"bfloat16": 0.2, "float16": 0.02}[dtype] * np.linalg.norm(plain)
    with pytest.raises(ValueError, match="preconditioner: got tree structure"):
        solve(A, b, 1.0, preconditioner=Diagonal(jnp.ones(3)))


def test_a_spectrum_of_one_point():
    for number in (0.0, 2.5, -1e-3):
        found = spectral_density(Diagonal(jnp.full(4, number)), random.key(0))
        grid = found.grid(2001)
        assert grid[0] < number < grid[-1]
        area = jnp.sum(found.density(grid).value) * (grid[1] - grid[0])
        assert_close(float(area), 4.0, rtol=1e-3)


def test_densities_are_compiled_once():
    found = [spectral_density(Diagonal(jnp.arange(9.0) + i), random.key(i)) for i in range(2)]
    grid = found[0].grid(50)
    found[0].density(grid), found[0].cumulative(grid)
    with count_compiles() as compiled:
        for each in found: each.density(grid), each.cumulative(grid)
    assert compiled.count == 0


def test_streams_are_solved_outside_of_compiled_functions():
    data = {"input": jnp.eye(2), "target": jnp.ones(2)}
    S = create_ggn_mv(lambda input, params: input @ params, jnp.ones(2), Stream(lambda: iter([data])), "mse", num_curv_samples=2)
    b, one = jnp.ones(2), jnp.ones(())
    for name, fn, argument in (
        ("b", lambda b: solve(S, b, 1.0).x, b),
        ("b", lambda b: solve_many(S, b[None], 1.0).x, b),
        ("damping", lambda d: solve(S, b, d).x, one),
        ("damping", lambda d: solve_many(S, b[None], d).x, one),
        ("damping", lambda d: inverse(S, d)(b), one),
        ("damping", lambda d: inverse_sqrt(S, d)(b), one),
        ("damping", lambda d: logdet(S, d, key=random.key(0)).value, one),
        ("damping", lambda d: sample(S, random.key(0), d), one),
    ):
        with pytest.raises(TypeError, match=f"{name}: got a traced array, expected numbers: an operator on a stream"):
            jax.jit(fn)(argument)


def test_how_many_eigenpairs_is_a_whole_number():
    for M in (operator("ggn"), Diagonal(jnp.ones(3))):
        for k in (None, 1.5):
            with pytest.raises(TypeError, match=f"k: got {k}, expected a whole number$"):
                eigsh(M, k)
