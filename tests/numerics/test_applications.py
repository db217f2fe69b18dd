"""Covariances of predictions, evidence and influence against dense matrices, for every representation of the curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import targets
from ggn_nb import (
    Diagonal,
    block_diagonal,
    create_fisher_mv,
    create_ggn_mv,
    diagonal,
    gram,
    influence,
    log_marginal_likelihood,
    multi_head,
    predictive_covariance,
    select_params,
    square_root,
)
from ggn_nb.tools.testing import assert_close
from jax.flatten_util import ravel_pytree

N, C, DAMPING = 6, 3, 0.2


def model_fn(input, params):
    return jnp.tanh(input @ params["w"] + params["b"]) @ params["v"]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


PARAMS = {"b": normal(4, seed=1), "v": normal(4, C, seed=2), "w": normal(2, 4, seed=3)}
FLAT, UNRAVEL = ravel_pytree(PARAMS)


def data_for(loss, n=N, seed=5, **more):
    return {"input": normal(n, 2, seed=seed), "target": targets(np.random.default_rng(seed), loss, (n, C))} | more


def representations(G):
    """What stands for the curvature, and the matrix that it is."""
    dense, blocks = np.asarray(G.dense()), block_diagonal(G)
    return {
        "gram": (gram(G), dense),
        "diagonal": (Diagonal(diagonal(G)), np.diag(np.diag(dense))),
        "blocks": (blocks.dense_blocks(), np.asarray(blocks.dense())),
    }


def inverse(matrix, damping=DAMPING):
    return jnp.linalg.inv(jnp.asarray(matrix) + damping * jnp.eye(len(matrix)))


def value(loss, x, y, p):
    """The loss of one sample, by hand."""
    f = model_fn(x, UNRAVEL(p))
    return jnp.sum((f - y) ** 2) if loss == "mse" else -jax.nn.log_softmax(f)[y]


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_against_dense_matrices(loss):
    weight = jnp.linspace(0.0, 2.0, N)  # the first sample does not count
    data, queries = data_for(loss, weight=weight), data_for(loss, 2, seed=6)
    G = create_ggn_mv(model_fn, PARAMS, data, loss, num_total_samples=3 * N)
    J = jax.vmap(jax.jacrev(lambda p, x: model_fn(x, UNRAVEL(p))), (None, 0))(FLAT, queries["input"])
    gradient = jax.vmap(jax.grad(lambda p, x, y: value(loss, x, y, p)), (None, 0, 0))
    of_data, of_queries = (gradient(FLAT, d["input"], d["target"]) for d in (data, queries))
    total = 3 * sum(w * value(loss, x, y, FLAT) for w, x, y in zip(weight, data["input"], data["target"], strict=True))
    for name, (M, matrix) in representations(G).items():
        inv = inverse(matrix)
        covariance = jnp.einsum("ncp,pq,mdq->ncmd", J, inv, J)
        assert_close(predictive_covariance(M, G, queries["input"], DAMPING, joint=True), covariance, rtol=1e-9, atol=1e-10)
        own = jnp.stack([covariance[i, :, i] for i in range(2)])
        assert_close(predictive_covariance(M, G, queries["input"], DAMPING), own, rtol=1e-9, atol=1e-10)
        expected = 3 * weight[None] * (of_queries @ inv @ of_data.T)
        assert_close(influence(M, G, queries, DAMPING), expected, rtol=1e-9, atol=1e-10 * float(jnp.max(jnp.abs(expected))))
        logdet = jnp.linalg.slogdet(jnp.asarray(matrix) + DAMPING * jnp.eye(len(matrix)))[1]
        evidence = -total - DAMPING / 2 * FLAT @ FLAT + len(FLAT) / 2 * jnp.log(DAMPING) - logdet / 2
        assert_close(log_marginal_likelihood(M, G, DAMPING), evidence)
        slope = jax.grad(lambda d: log_marginal_likelihood(M, G, d))(DAMPING)  # noqa: B023
        assert_close(slope, -FLAT @ FLAT / 2 + len(FLAT) / DAMPING / 2 - jnp.trace(inv) / 2), name


def line(input, params):
    """A model whose Jacobian is its input."""
    return input @ params


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_dampings(dtype):
    """Queries in the span of training samples, beside it and nearly in it, down to a damping of 1e-6 of the largest eigenvalue."""
    rng, size, rank = np.random.default_rng(0), 40, 9
    basis = np.linalg.qr(rng.normal(size=(size, rank)))[0].T
    X = np.linalg.qr(rng.normal(size=(12, rank)))[0] * np.logspace(0, -1, rank) @ basis  # columns that depend on each other
    inside, beside = rng.normal(size=(3, 12)) @ X, rng.normal(size=(3, size))
    beside -= beside @ basis.T @ basis
    X, queries = (a.astype(dtype) for a in (X, np.concatenate([inside, beside, inside + 1e-3 * beside])))
    y = rng.normal(size=12).astype(dtype)
    G = create_ggn_mv(line, jnp.zeros(size, dtype), {"input": X, "target": y}, "mse")
    asked = {"input": queries, "target": np.ones(9, dtype)}

    @jax.jit
    def found(K, dampings):
        joint = lambda d: predictive_covariance(K, G, queries, d, joint=True)
        own = lambda d: predictive_covariance(K, G, queries, d)
        return [jax.vmap(of)(dampings) for of in (joint, own, lambda d: influence(K, G, asked, d))]

    wide, q, of_data = X.astype(float), queries.astype(float), -2 * X.astype(float) * y[:, None]
    _, s, Vt = np.linalg.svd(wide, full_matrices=False)
    s = np.where(s > 1e-6 * s[0], s, 0)
    ratios = np.array([10.0, 1e-1, 1e-2, 1.6e-4, 1e-5, 1e-6])
    dampings = ratios * 2 * s[0] ** 2
    K = gram(G).with_eigh()
    rest = lambda a: a - a @ Vt.T @ Vt
    products = lambda a, b, d: (a @ Vt.T / (2 * s**2 + d)) @ (b @ Vt.T).T + rest(a) @ rest(b).T / d
    results = map(np.asarray, found(K, jnp.asarray(dampings, dtype)))
    for ratio, d, joint, own, of in zip(ratios, dampings, *results, strict=True):
        rounding = 40 * jnp.finfo(dtype).eps / min(ratio, 1) ** 0.5
        scale, other = (np.sqrt(np.diag(products(a, a, d))) for a in (q, of_data))
        assert np.abs((joint - products(q, q, d)) / np.outer(scale, scale)).max() < rounding
        assert np.abs(own / scale**2 - 1).max() < rounding
        assert np.abs((of - products(-2 * q, of_data, d)) / np.outer(2 * scale, other)).max() < rounding


def test_frozen_leaves_and_compiled_functions():
    """The parameters are those that are selected; operators are arguments."""
    data = data_for("mse")
    head, params = select_params(model_fn, PARAMS, "v")
    G = create_ggn_mv(head, params, data, "mse")
    J = jax.vmap(lambda x: jnp.kron(jnp.tanh(x @ PARAMS["w"] + PARAMS["b"])[None], jnp.eye(C)))(data["input"])
    expected = jnp.einsum("ncp,pq,ndq->ncd", J, inverse(2 * jnp.einsum("ncp,ncq->pq", J, J)), J)
    found = jax.jit(lambda K, G, x: predictive_covariance(K, G, x, DAMPING))(gram(G), G, data["input"])
    assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_prior_for_each_leaf_and_a_fisher():
    """A tree of dampings for a diagonal; gradients of the loss within an empirical Fisher matrix."""
    data = data_for("cross_entropy")
    G = create_ggn_mv(model_fn, PARAMS, data, "cross_entropy")
    prior = jax.tree.map(lambda p: jnp.full(p.shape, 0.1 * p.size), PARAMS)
    d, p = ravel_pytree(diagonal(G))[0], ravel_pytree(prior)[0]
    J = jax.vmap(jax.jacrev(lambda p, x: model_fn(x, UNRAVEL(p))), (None, 0))(FLAT, data["input"])
    found = predictive_covariance(Diagonal(diagonal(G)), G, data["input"], prior)
    assert_close(found, jnp.einsum("ncp,ndp->ncd", J / (d + p)[None, None], J))
    F = create_fisher_mv(model_fn, PARAMS, data, "cross_entropy", kind="empirical")
    assert_close(influence(Diagonal(diagonal(G)), F, data, 1.0), influence(Diagonal(diagonal(G)), G, data, 1.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision(dtype):
    """Sums are in float32, so covariances are as good as the model's own numbers."""
    data = data_for("mse")
    G = create_ggn_mv(model_fn, PARAMS, data, "mse")
    want = predictive_covariance(gram(G), G, data["input"], 1.0)
    cast = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)
    low = create_ggn_mv(model_fn, cast(PARAMS), cast(data), "mse")
    got = predictive_covariance(gram(low), low, cast(data["input"]), 1.0)
    blocks, low_blocks = (predictive_covariance(block_diagonal(of).dense_blocks(), of, x, 1.0) for of, x in ((G, data["input"]), (low, cast(data["input"]))))
    assert got.dtype == low_blocks.dtype == jnp.float32
    assert float(jnp.max(jnp.abs(low_blocks.astype(blocks.dtype) - blocks))) < (1e-4 if dtype == "float32" else 0.1) * float(jnp.max(blocks))
    assert float(jnp.max(jnp.abs(got.astype(want.dtype) - want))) < (1e-4 if dtype == "float32" else 0.1) * float(jnp.max(want))


def test_errors():
    data = data_for("mse")
    G = create_ggn_mv(model_fn, PARAMS, data, "mse")
    D = Diagonal(diagonal(G))
    tree = lambda input, params: {"a": model_fn(input, params)}
    heads = create_ggn_mv(tree, PARAMS, {**data, "target": {"a": data["target"]}}, multi_head({"a": "mse"}))
    cases = [
        (lambda: predictive_covariance(D, D, data["input"], 1.0), TypeError, "G: got Diagonal, expected the matrix of a model"),
        (lambda: predictive_covariance(D, heads, data["input"], 1.0), TypeError, "G: got a model that predicts a dict"),
        (lambda: predictive_covariance(D, G, data["input"], 1.0, joint=1), TypeError, "joint"),
        (lambda: influence(D, D, data, 1.0), TypeError, "G: got Diagonal"),
        (lambda: log_marginal_likelihood(D, G, 1.0, key=jax.random.key(0)), ValueError, "key"),
        (lambda: log_marginal_likelihood(G, G, 1.0), ValueError, "key"),
        (lambda: log_marginal_likelihood(gram(G), G, -1.0), ValueError, "damping"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message.replace("(", r"\(")):
            call()


def test_evidence_of_many_parameters_in_float32():
    """P log δ is more than a million: neither it nor its rounding error is in the result."""
    P, delta = 200_000, 1e3
    inputs, y = normal(3, P) / P**0.5 * 40, normal(3, seed=1)

    def evidence(dtype, representation, damping=delta, **options):
        params = jnp.zeros(P, dtype)
        data = {"input": inputs.astype(dtype), "target": y.astype(dtype)}
        G = create_ggn_mv(lambda input, params: input @ params, params, data, "mse")
        found = log_marginal_likelihood(representation(G), G, damping, **options)
        return float(getattr(found, "value", found))

    X = np.asarray(inputs)
    exact = -np.sum(np.square(y)) - np.linalg.slogdet(np.eye(3) + 2 / delta * X @ X.T)[1] / 2
    of_diagonal = -np.sum(np.square(y)) - np.sum(np.log1p(2 / delta * np.sum(X**2, axis=0))) / 2
    entries = lambda G: Diagonal(diagonal(G))
    key = {"key": jax.random.key(0), "num_probes": 2, "num_steps": 5}
    for dtype, rtol in (("float64", 1e-10), ("float32", 1e-4)):
        assert_close(evidence(dtype, gram), exact, rtol=rtol)
        assert_close(evidence(dtype, entries), of_diagonal, rtol=rtol)
        assert_close(evidence(dtype, entries, jnp.full(P, delta, dtype)), of_diagonal, rtol=rtol)
    for damping in (delta, jnp.full(P, delta)):
        wide, narrow = (evidence(dtype, lambda G: G, damping, **key) for dtype in ("float64", "float32"))
        assert_close(narrow, wide, atol=0.01)
        assert abs(wide - exact) < 0.5


@pytest.mark.parametrize("damping", [0.5, 1e-4])  # from products, and from what is left of gradients
def test_covariances_have_derivatives_where_eigenvalues_are_equal(damping):
    bend = lambda input, params: jnp.tanh(input @ params)
    x, queries, params = jnp.eye(4)[:3], jnp.r_[normal(2, 4), jnp.eye(4)[:1]], jnp.full(4, 0.3)
    G = create_ggn_mv(bend, params, {"input": x, "target": None}, "none")
    assert np.ptp(np.asarray(gram(G).eigh()[0])) < 1e-12

    def ours(params, joint):
        at = G.at(params)
        found = predictive_covariance(gram(at), at, queries, damping, joint=joint)
        return jnp.sum(jnp.sin(found))

    def dense(params, joint):
        J, A = (jax.jacfwd(lambda p, x=x: bend(x, p))(params) for x in (queries, x))
        found = J @ jnp.linalg.inv(A.T @ A + damping * jnp.eye(4)) @ J.T
        return jnp.sum(jnp.sin(found if joint else jnp.diagonal(found)))

    for joint in (False, True):
        exact = jax.grad(dense)(params, joint)
        assert_close(ours(params, joint), dense(params, joint), rtol=1e-8)
        assert_close(jax.grad(ours)(params, joint), exact, rtol=1e-7)
        assert_close(jax.jit(jax.grad(ours), static_argnums=1)(params, joint), exact, rtol=1e-7)


def wrong_matrices(G):
    """What is no matrix on the parameters of G, and what is said of it."""
    other = create_ggn_mv(line, jnp.ones(3), {"input": jnp.ones((2, 3)), "target": jnp.ones(2)}, "mse")
    return [
        (3, TypeError, "M: got int, expected an Operator"),
        (model_fn, TypeError, "M: got function, expected an Operator"),
        (square_root(G), TypeError, "M: got SquareRoot, expected an Operator"),
        (Diagonal(jnp.ones(3)), ValueError, "M: got tree structure"),
        (Diagonal(PARAMS | {"b": jnp.ones(5)}), ValueError, r"M\['b'\]: got shape \(5,\), expected \(4,\) as in the parameters of G"),
        (gram(other), ValueError, "M: got tree structure"),
        (block_diagonal(other).dense_blocks(), ValueError, "M: got tree structure"),
    ]


def test_matrices_of_other_models_are_refused():
    data = data_for("mse")
    G = create_ggn_mv(model_fn, PARAMS, data, "mse")
    for M, kind, message in wrong_matrices(G):
        for call in (
            lambda M: predictive_covariance(M, G, data["input"], 1.0),
            lambda M: influence(M, G, data, 1.0),
            lambda M: log_marginal_likelihood(M, G, 1.0),
        ):
            with pytest.raises(kind, match=message):
                call(M)


def test_inputs_and_queries_are_named():
    data = data_for("mse")
    G = create_ggn_mv(model_fn, PARAMS, data, "mse")
    D = Diagonal(diagonal(G))
    for inputs, message in (
        (None, "inputs: got no arrays"),
        (1.0, "inputs: got a scalar"),
        (jnp.ones((0, 2)), "inputs: got an empty batch"),
        ({"x": jnp.ones((3, 2)), "y": jnp.ones(())}, r"inputs\['y'\]: got a scalar"),
        ({"x": jnp.ones((3, 2)), "y": jnp.ones(2)}, "inputs: got different batch sizes"),
    ):
        with pytest.raises(ValueError, match=message):
            predictive_covariance(D, G, inputs, 1.0)
    for queries, kind, message in (
        (None, TypeError, "queries: got NoneType, expected a mapping"),
        (1.0, TypeError, "queries: got float, expected a mapping"),
        ({"input": data["input"]}, ValueError, r"queries: got the keys \['input'\]"),
        (jax.tree.map(lambda a: a[:0], data), ValueError, "queries: got an empty batch"),
        ({**data, "input": 1.0}, ValueError, r"queries\['input'\]: got a scalar"),
    ):
        with pytest.raises(kind, match=message):
            influence(D, G, queries, 1.0)


def test_the_prior_of_a_subtree():
    params = {"first": {"w": normal(2, 2, seed=1), "b": normal(2, seed=2)}, "last": normal(2, 2, seed=3)}
    deep = lambda input, params: jnp.tanh(input @ params["first"]["w"] + params["first"]["b"]) @ params["last"]
    G = create_ggn_mv(deep, params, {"input": normal(3, 2), "target": normal(3, 2)}, "mse")
    D = Diagonal(diagonal(G))
    found = log_marginal_likelihood(D, G, {"first": 0.5, "last": 2.0})
    assert_close(found, log_marginal_likelihood(D, G, {"first": {"w": 0.5, "b": 0.5}, "last": 2.0}))
    numbers = jax.tree.map(jnp.zeros_like, params) | {"last": jnp.full((2, 2), 2.0)}
    numbers["first"] = jax.tree.map(lambda a: a + 0.5, numbers["first"])
    assert_close(found, log_marginal_likelihood(D, G, numbers))


def test_leaves_without_entries():
    more = PARAMS | {"e": jnp.zeros((0, 3))}
    data = data_for("mse")
    G, H = (create_ggn_mv(model_fn, params, data, "mse") for params in (PARAMS, more))
    for name in ("gram", "diagonal", "blocks"):
        M, N = (representations(of)[name][0] for of in (G, H))
        for fn in (
            lambda M, G: predictive_covariance(M, G, data["input"], DAMPING),
            lambda M, G: predictive_covariance(M, G, data["input"], DAMPING, joint=True),
            lambda M, G: influence(M, G, data, DAMPING),
            lambda M, G: log_marginal_likelihood(M, G, DAMPING),
        ):
            assert_close(fn(N, H), fn(M, G))
    assert_close(influence(H, H, data, DAMPING), influence(G, G, data, DAMPING), rtol=1e-6, atol=1e-7)
