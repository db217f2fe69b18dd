"""A with G = A Aᵀ: against the dense definition of G, for every loss, data of every kind, and on several devices."""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import ggn_nb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import (
    Curvature,
    CustomLoss,
    Stream,
    create_fisher_mv,
    create_ggn_mv,
    create_ggn_mv_without_data,
    create_hessian_mv,
    create_loss,
    diagonal,
    gram,
    multi_head,
    select_params,
    square_root,
    verify,
)
from ggn_nb.losses import ClosedFormLoss, Formulas, registered_losses
from ggn_nb.operators.square_root import loss_columns, num_columns, with_root
from ggn_nb.tools.testing import assert_close, random_like
from ggn_nb.tools.timing import count_compiles
from jax import random
from jax.flatten_util import ravel_pytree

N, C = 5, 4
X = random.normal(random.key(0), (N, 3))
W = {"w": random.normal(random.key(1), (3, C)) / 2, "b": jnp.full(C, 0.1)}
Y = random.normal(random.key(2), (N, C))
LABELS = jnp.array([0, 3, 1, 1, 2])
COUNT = {"weight": jnp.array([0.5, 2.0, 1.0, 0.0, 1.5]), "mask": jnp.array([True, True, False, True, True])}


def linear(input, params): return jnp.tanh(input @ params["w"] + params["b"])
def positive(input, params): return jax.nn.softplus(input @ params["w"])
def mean_and_log_variance(input, params): return jnp.stack([input @ params["w"], linear(input, params)], axis=-1)
def tokens(input, params): return jnp.outer(jnp.sin(input), linear(input, params))  # (3, C)


def data(target=Y, **given): return {"input": X, "target": target} | given


def check(G, dense=None, products=False):
    """A Aᵀ is the dense matrix, and A and Aᵀ are adjoint; returns A."""
    A = square_root(G)
    D = A.dense()
    assert D.shape == A.shape == A.T.shape[::-1]
    assert_close(D @ D.T, jnp.asarray(G.dense_oracle() if dense is None else dense))
    if not products: return A
    u, v = random_like(random.key(5), A.structure), random_like(random.key(6), A.T.structure)
    forth, back = A(u), A.T(v)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), back) == jax.tree.map(lambda s: (s.shape, s.dtype), A.structure)
    assert_close(ravel_pytree(forth)[0], D @ ravel_pytree(u)[0])
    assert_close(ravel_pytree(back)[0], ravel_pytree(v)[0] @ D)
    return A


# Losses with a square root of their own

MODELS = {"gamma": positive, "negative_binomial": positive, "heteroscedastic_gaussian": mean_and_log_variance}
OTHER_TARGETS = {"cross_entropy": LABELS, "none": None}


@pytest.mark.parametrize("name", registered_losses())
def test_losses_with_a_square_root(name):
    loss, model = create_loss(name), MODELS.get(name, linear)
    target = OTHER_TARGETS[name] if name in OTHER_TARGETS else jax.vmap(loss.sample, in_axes=(None, 0))(random.key(3), jax.vmap(partial(model, params=W))(X))
    G = create_ggn_mv(model, W, data(target, **COUNT), loss, linearize="recomputed")
    A = check(G)
    assert A.operator is G  # nothing is put in the place of its loss
    assert not np.any(jax.tree.leaves(A.T(W))[0][2:4])  # masked, and of weight 0


def test_options_of_the_operator():
    """Chunks, what is stored, means, one call for all samples, some of the parameters: A of the same G."""
    labels = LABELS.at[1].set(-100)  # is ignored
    all_at_once = lambda input, params: jax.vmap(lambda x: linear(x, params))(input)
    for options in ({"reduction": "mean"}, {"batch_size": 2}, {"batch_size": 2, "linearize": "cached"}, {"linearize": "rematerialized", "num_total_samples": 50}):
        check(create_ggn_mv(linear, W, data(labels, **COUNT), "cross_entropy", **options), products="num_total_samples" in options)
    A = check(create_ggn_mv(all_at_once, W, data(labels, **COUNT), "cross_entropy", vmap_over_data=False, batch_size=2), products=True)
    assert A.structure.shape == (N, C - 1)  # the rank of a position's H
    model, some = select_params(linear, W, "b")
    assert check(create_ggn_mv(model, some, data(), "mse")).shape == (C, N * C)


# Square roots from the Hessian

by_token = CustomLoss(lambda f, y: jax.nn.logsumexp(f - y, axis=-1))
centred = CustomLoss(lambda f, y: jnp.sum((f - jnp.mean(f, axis=0, keepdims=True) - y) ** 2, axis=-1))
TOKENS = random.normal(random.key(4), (N, 3, C))
PER_TOKEN = {"weight": random.uniform(random.key(7), (N, 3)), "mask": random.uniform(random.key(8), (N, 3)) < 0.7}


@pytest.mark.parametrize("options", [{}, {"vmap_over_data": False}, {"vmap_over_data": False, "batch_size": 2}], ids=str)
def test_functions_position_by_position(options):
    """Weights, masks and NaN where nothing counts; one eigendecomposition for each position of each sample."""
    model = tokens if options.get("vmap_over_data", True) else lambda input, params: jax.vmap(lambda x: tokens(x, params))(input)
    target = jnp.where(PER_TOKEN["mask"][..., None], TOKENS, jnp.nan)
    A = check(create_ggn_mv(model, W, data(target, **PER_TOKEN), by_token, **options), dense=create_ggn_mv(tokens, W, data(TOKENS, **PER_TOKEN), by_token).dense_oracle(), products=options == {})
    assert A.operator.problem.loss.by_position
    assert A.structure.shape == (N, 3, C)


def test_functions_whose_positions_depend_on_each_other():
    G = create_ggn_mv(tokens, W, data(TOKENS, weight=PER_TOKEN["weight"]), centred)
    assert not check(G, products=True).operator.problem.loss.by_position
    neighbours = lambda f, y: jnp.sum((f - jnp.roll(f, 1, axis=0) - y) ** 2, axis=-1)
    assert not with_root(create_ggn_mv(tokens, W, data(TOKENS), neighbours)).problem.loss.by_position


def test_other_functions():
    """One value for a sample, one for each entry, a tree as prediction, two values of one size, or a product alone."""
    check(create_ggn_mv(tokens, W, data(TOKENS), lambda f, y: jnp.sum((f - y) ** 4)))
    assert check(create_ggn_mv(linear, W, data(), lambda f, y: (f - y) ** 4)).operator.problem.loss.by_position
    pair = lambda input, params: {"a": tokens(input, params), "b": jnp.cos(tokens(input, params))[:, :2]}
    joint = lambda f, y: jnp.sum(f["a"] ** 2, axis=-1) + jax.nn.logsumexp(f["b"], axis=-1) + jnp.sum(f["b"] * f["b"], axis=-1)
    assert check(create_ggn_mv(pair, W, data(None), joint)).structure["b"].shape == (N, 3, 2)
    square = lambda input, params: jnp.outer(linear(input, params), linear(input, params))  # (C, C)
    columns = lambda f, y: jax.nn.logsumexp(f, axis=0)  # the wrong axis: it is found out that the first one does not number the positions
    assert not with_root(create_ggn_mv(square, W, data(None), columns)).problem.loss.by_position
    product = lambda jv, pred, target: 3 * jv + jnp.sum(jv) * jnp.ones_like(jv)
    check(create_ggn_mv(linear, W, data(None, **COUNT), loss_hessian_mv=product), products=True)


def test_a_square_root_that_was_given_is_used():
    root = lambda u, pred, target: 2**0.5 * u
    square = CustomLoss(lambda f, y: (f - y) ** 2, square_root=root, square_root_transpose=root)
    G = create_ggn_mv(linear, W, data(**COUNT), square)
    assert check(G).operator is G
    half = replace(square, square_root_transpose=None)
    names = {loss: [check.name for check in verify(loss, Y, Y).checks] for loss in (square, half)}
    assert "S Sᵀ = H" in names[square] and "S Sᵀ = H" not in names[half]
    assert check(create_ggn_mv(linear, W, data(**COUNT), half)).operator.problem.loss.loss.square_root is not None
    wrong = replace(square, square_root_transpose=lambda v, pred, target: v[1:])
    with pytest.raises(ValueError, match="^square_root: got a product of shape"): square_root(create_ggn_mv(linear, W, data(**COUNT), wrong))


# Indefinite Hessians

heavy_tails = create_loss("student_t", curvature="hessian", scale=0.3)
saddle = CustomLoss(lambda f, y: f[0] ** 2 - 0.25 * f[1] ** 2 + f[2] ** 4)


def test_how_indefinite_a_hessian_is():
    """Eigenvalues 2, −½ and 0 at f₂ = 0: the smallest is −¼ times the largest."""
    model = lambda input, params: linear(input, params) * jnp.array([1.0, 1.0, 0.0, 1.0])
    G = create_ggn_mv(model, W, data(None), saddle)
    with pytest.raises(ValueError, match="^G: got a loss whose Hessian is indefinite, CustomLoss.*smallest eigenvalue is -0.25 times the largest"): square_root(G)
    G = create_ggn_mv(linear, W, data(), heavy_tails)
    with pytest.raises(ValueError, match="student_t.*smallest eigenvalue is -0.1.*curvature='fisher'"): square_root(G)
    both = multi_head([heavy_tails, saddle])
    with pytest.raises(ValueError, match="indefinite, student_t"): square_root(create_ggn_mv(lambda input, params: [linear(input, params)] * 2, W, data([Y, Y]), both))
    for v in jax.tree.leaves(jax.jit(lambda G: square_root(G).T(W))(G)): assert np.all(np.isnan(v))


def sum_of_columns(G):
    """factor · Σ sign (Jᵀs)(Jᵀs)ᵀ from the columns at each sample."""
    problem = replace(with_root(G, signed=True).problem, vmap_over_data=False)
    flat, unravel = ravel_pytree(problem.params)

    def one(samples):
        predict = lambda p: problem.model_fn(input=samples.input, params=unravel(p))
        pred, vjp = jax.vjp(predict, flat)
        columns, signs = loss_columns(problem, pred, samples)
        assert {len(leaf) for leaf in jax.tree.leaves(columns)} == {num_columns(problem, pred, samples)}
        rows = jax.vmap(lambda s: vjp(s)[0])(columns)
        return rows.T @ (rows if signs is None else signs[:, None] * rows)

    return problem.factor * jnp.sum(jax.jit(jax.vmap(one))(G.samples), axis=0)


def test_signed_columns_add_up_to_the_hessian():
    two = lambda input, params: {"a": linear(input, params), "b": [tokens(input, params), positive(input, params)]}
    heads = multi_head({"a": heavy_tails, "b": multi_head([by_token, "mse"], [2.0, 0.5])}, {"a": 3.0, "b": 0.5})
    targets = {"a": Y, "b": [TOKENS, Y]}
    for G in (create_ggn_mv(linear, W, data(None, **COUNT), saddle), create_ggn_mv(two, W, data(targets, **COUNT), heads, reduction="mean")):
        assert_close(sum_of_columns(G), jnp.asarray(G.dense_oracle()))
    F = create_fisher_mv(linear, W, data(LABELS), "cross_entropy", kind="monte_carlo", key=random.key(0), num_samples=3)
    assert_close(sum_of_columns(F), F.dense())


def test_columns_without_signs_are_those_of_the_root():
    """Also where eigenvalues are equal, so that the eigenvectors are not determined."""
    G = create_ggn_mv(linear, W, data(None), lambda f, y: jnp.sum(f) ** 2 + jnp.sum(f**2))
    A = square_root(G)
    problem = replace(A.operator.problem, vmap_over_data=False)
    sample = jax.tree.map(lambda a: a[0], G.samples)
    columns, signs = loss_columns(problem, linear(X[0], W), sample, signed=False)
    assert signs is None
    rows = jax.vmap(lambda s: ravel_pytree(jax.vjp(lambda p: linear(X[0], p), W)[1](s)[0])[0])(columns)
    assert_close(rows.T, A.dense()[:, :C])


# Fisher matrices and several heads


@pytest.mark.parametrize("kind", ["monte_carlo", "empirical", "exact"])
def test_fisher_kinds(kind):
    """The draws of a square root are those of the matrix; the oracle of the empirical one is made of gradients."""
    drawn = {"key": random.key(3), "num_samples": 3} if kind == "monte_carlo" else {}
    make = partial(create_fisher_mv, data=data(LABELS, **COUNT), loss_fn="cross_entropy", kind=kind, **drawn)
    F = make(linear, W)
    A = check(F, dense=None if kind == "empirical" else F.dense(), products=kind == "monte_carlo")
    assert A.structure.shape == (N, {"monte_carlo": 3, "empirical": 1, "exact": C - 1}[kind])
    all_at_once = lambda input, params: jax.vmap(lambda x: linear(x, params))(input)
    if kind != "exact": assert_close(square_root(make(all_at_once, W, vmap_over_data=False, batch_size=2)).dense(), A.dense())


def test_several_heads_with_scales():
    """A mean has one scale for each head; one of them has no square root of its own."""
    heads = multi_head({"a": "cross_entropy", "b": by_token}, {"a": 2.0, "b": 0.5})
    model = lambda input, params: {"a": linear(input, params), "b": tokens(input, params)}
    given = data({"a": LABELS, "b": TOKENS}, weight={"a": COUNT["weight"], "b": PER_TOKEN["weight"]}, mask=COUNT["mask"])
    A = check(create_ggn_mv(model, W, given, heads, reduction="mean"), products=True)
    assert jax.tree.map(lambda s: s.shape, A.structure) == {"a": (N, C - 1), "b": (N, 3, C)}
    scores = create_fisher_mv(model, W, given | {"target": None}, multi_head({"a": "cross_entropy", "b": "mse"}), kind="monte_carlo", key=random.key(0))
    check(scores, dense=scores.dense())


# Precision, compilation, devices


@pytest.mark.parametrize("loss", ["cross_entropy", by_token], ids=["own", "from the Hessian"])
def test_half_precision(loss):
    """The products of half-precision numbers are those of the same numbers in float64, to half precision."""
    half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
    double = lambda tree: jax.tree.map(lambda a: a.astype(float) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)
    given = half(data(LABELS if loss == "cross_entropy" else Y))
    A = square_root(create_ggn_mv(linear, half(W), given, loss))
    want = square_root(create_ggn_mv(linear, double(half(W)), double(given), loss))
    u, v = random_like(random.key(0), A.structure), half(W)
    assert u.dtype == jnp.bfloat16
    assert_close(double(A(u)), want(double(u)), rtol=5e-2)
    assert_close(double(A.T(v)), want.T(double(v)), rtol=5e-2)
    assert A.dense().dtype == jnp.float32


def test_programs_take_the_root_as_an_argument():
    """Other parameters and data of the same shapes compile nothing; the stored linearisation is shared; copies work."""
    normal = jax.jit(lambda A, v: A(A.T(v)))
    G = create_ggn_mv(linear, W, data(), "mse")
    A = square_root(G)
    assert A.operator.linearization is G.linearization
    assert_close(normal(A, W), G(W))
    moved = G.at(jax.tree.map(lambda a: 2 * a, W))
    with count_compiles() as compiles: product = normal(square_root(moved), W)
    assert compiles.count == 0
    assert_close(product, moved(W))
    again = copy.deepcopy(A)
    assert_close(again.T @ W, A.T(W))
    assert again.T.T is again
    assert_close(jax.jit(lambda G, v: square_root(G).T(v))(create_ggn_mv(tokens, W, data(TOKENS), by_token), W),
                 jax.jit(lambda A, v: A.T(v))(square_root(create_ggn_mv(tokens, W, data(TOKENS), lambda f, y: jnp.sum(jax.nn.logsumexp(f - y, axis=-1)))), W))
    us = random.normal(random.key(0), (3, *A.structure.shape))
    assert_close(jax.vmap(A)(us), jax.tree.map(lambda *a: jnp.stack(a), *map(A, us)))


def test_derivatives_of_products():
    """Through S of equal eigenvalues: uᵀ AᵀA u by A and by the columns of a loss that is the same, with its own S."""
    us = random.normal(random.key(0), (N, C))

    def size(w, loss):
        G = create_ggn_mv_without_data(linear, W, loss, 1.0).bind(data(weight=w))
        return sum(jnp.sum(a**2) for a in jax.tree.leaves(square_root(G)(us)))

    by_hand, own = (jax.grad(size)(COUNT["weight"] + 1, loss) for loss in (lambda f, y: (f - y) ** 2, "mse"))
    assert_close(by_hand, own)
    whole = jax.grad(size)(COUNT["weight"] + 1, lambda f, y: jnp.sum((f - y) ** 2))
    assert_close(whole, own)


DEVICES = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from ggn_nb import create_ggn_mv, square_root
from ggn_nb.tools.testing import assert_close

rng = np.random.default_rng(0)
params, N = {"w": rng.standard_normal((3, 4)), "b": rng.standard_normal(4)}, 8
data = {"input": rng.standard_normal((N, 3)), "target": rng.integers(0, 4, N), "weight": rng.uniform(size=N), "mask": np.arange(N) != 2}
model = lambda input, params: jnp.tanh(input @ params["w"] + params["b"])
params, data = jax.device_get((params, jax.tree.map(jnp.asarray, data)))
v = jax.tree.map(lambda p: rng.standard_normal(p.shape), params)
negative_log = lambda f, y: jax.nn.logsumexp(f) - f[y]
agree = lambda got, want: assert_close(jax.device_get(got), jax.device_get(want), rtol=1e-12)
for explicit in (False, True):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"), axis_types=(kind,) * 2)
    put = lambda tree, *spec: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*spec))), tree)
    there, spread = put(params), put(data, "data")
    for loss, options in (("cross_entropy", {"batch_size": 4}), (negative_log, {}))[: 1 + (not explicit)]:
        A, want = (square_root(create_ggn_mv(model, *at, loss, **options)) for at in ((there, spread), (params, data)))
        u, columns = rng.standard_normal(A.structure.shape), A.T(put(v))
        agree(columns, want.T(v))
        assert columns.sharding.spec[0] in ("data", ("data",)), columns.sharding
        agree(A(put(u, "data")), want(u))
        agree(A(put(u)), want(u))
        agree(A(columns), want.operator(v))

# in a function that the caller maps by shard_map
own = Mesh(np.array(jax.devices()), ("data",))
def product(params, samples, v):
    A = square_root(create_ggn_mv(model, params, samples, "cross_entropy"))
    return A.T(v), jax.tree.map(lambda a: jax.lax.psum(a, "data"), A(A.T(v)))
split = P("data")
columns, total = jax.jit(jax.shard_map(product, mesh=own, in_specs=(P(), split, P()), out_specs=(split, P())))(params, data, v)
G = create_ggn_mv(model, params, data, "cross_entropy")
agree(columns, square_root(G).T(v))
agree(total, G(v))
print("reached the end")
"""


def test_on_several_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    root = str(Path(ggn_nb.__file__).parent.parent)
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", DEVICES], env=env, capture_output=True, text=True)
    assert done.stdout.endswith("reached the end\n"), done.stdout + done.stderr


# Refusals

G = partial(create_ggn_mv, linear, W, data())
REFUSED = {
    "Hessian": (lambda: create_hessian_mv(linear, W, data(), "mse"), TypeError, "got a Hessian, which may be indefinite"),
    "stream": (lambda: create_ggn_mv(linear, W, Stream([data()]), "mse"), TypeError, "got a GGN on a stream"),
    "sum": (lambda: G("mse") + G("mse"), TypeError, "got a Sum"),
    "damped": (lambda: G("mse").damped(1.0), TypeError, "got a Damped.*√δ I"),
    "unbound": (lambda: create_ggn_mv_without_data(linear, W, "mse", 1.0), TypeError, "got a Unbound"),
    "negative factor": (lambda: create_ggn_mv_without_data(linear, W, "mse", -2.0).bind(data()), ValueError, "got a matrix with the factor -2, expected one ≥ 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=f"^G: {message}"): square_root(make())


def test_wrong_vectors():
    A = square_root(G("mse"))
    with pytest.raises(ValueError, match=r"^u: got shape \(5, 3\), expected \(5, 4\) as in A.structure"): A(jnp.ones((N, 3)))
    with pytest.raises(TypeError, match="^u: got dtype float32"): A(jnp.ones((N, C), jnp.float32))
    with pytest.raises(ValueError, match="^v: got tree structure"): A.T @ W["w"]
    assert not isinstance(A, Curvature)


def test_positions_of_too_many_numbers():
    """The remedy works: a value for each position."""
    model = lambda input, params: jnp.broadcast_to(linear(input, params), (1100, C))
    of = lambda loss: create_ggn_mv(model, W, jax.tree.map(lambda a: a[:1], data(None)), loss)
    with pytest.raises(ValueError, match=r"^loss_fn: .* joins 4,400 numbers, expected at most 4,096.*one value for each position"): square_root(of(lambda f, y: jnp.sum(f**4)))
    v = random_like(random.key(0), W)
    A = square_root(of(lambda f, y: jnp.sum(f**4, axis=-1)))
    assert_close(A(A.T(v)), A.operator(v))


# Fewer columns than numbers


def squared_differences():
    """Σ_k (d_k)² over the differences d of neighbours, which do not see a constant."""
    D = lambda f: f[..., :-1] - f[..., 1:]
    back = lambda d: jnp.pad(d, [(0, 0)] * (d.ndim - 1) + [(0, 1)]) - jnp.pad(d, [(0, 0)] * (d.ndim - 1) + [(1, 0)])
    return Formulas(
        value=lambda f, y: jnp.sum(D(f) ** 2, axis=-1),
        gradient=lambda f, y: back(2 * D(f)),
        hessian_mv=lambda u, f, y: back(2 * D(u)),
        square_root_mv=lambda u, f, y: back(2**0.5 * u),
        square_root_transpose_mv=lambda v, f, y: 2**0.5 * D(v),
        nullity=1)


@pytest.mark.parametrize("axis", [-1, 0])
def test_formulas_whose_hessian_has_a_null_space(axis):
    loss = ClosedFormLoss("squared_differences", squared_differences(), read_target=None, axis=axis, target_use="unused")
    model = linear if axis == -1 else lambda input, params: jnp.stack([linear(input, params), linear(input, params) ** 2], axis=1)
    G = create_ggn_mv(model, W, data(None, weight=COUNT["weight"]), loss)
    A = check(G, products=True)
    assert A.structure.shape == ((N, C - 1) if axis == -1 else (N, C - 1, 2))
    pred = jax.vmap(partial(model, params=W))(X)[0]
    assert all(check.passed for check in verify(loss, pred).checks)
    with pytest.raises(ValueError, match=r"^u: got shape .* as in column_structure\(pred\)"): loss.square_root_mv(pred, pred)
    with pytest.raises(ValueError, match="^axis: got None.*nullity, 1"): ClosedFormLoss("squared_differences", squared_differences())


def test_cross_entropy_has_columns_for_all_classes_but_one():
    """The Gram matrix of samples that all count has full rank; one class alone has a column of zeros."""
    G = create_ggn_mv(linear, W, data(LABELS), "cross_entropy")
    assert square_root(G).shape[1] == N * (C - 1) == np.linalg.matrix_rank(gram(G).dense())
    single = create_ggn_mv(lambda input, params: linear(input, params)[:1], W, data(jnp.zeros(N, int)), "cross_entropy")
    A = square_root(single)
    assert A.structure.shape == (N, 1) and not np.any(A.dense())
    assert jax.tree.all(jax.tree.map(lambda d: jnp.all(d == 0), diagonal(single)))
