"""Every loss against an independent reference: shapes, weights, masks, claims, half precision, bad input."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import ggn_nb.losses
from ggn_cases import run_cases
from ggn_nb import CustomLoss, Loss, create_ggn_mv, create_loss, multi_head, verify
from ggn_nb.losses.closed_form import registered_losses, registered_rows
from ggn_nb.losses.common import first_columns, loss_results
from ggn_nb.losses.custom import HessianOnly
from ggn_nb.losses.table import evaluate_row, row_cells
from ggn_nb.tools.testing import assert_close, dense_from_mv
from ggn_nb.tools.timing import count_compiles
from hypothesis import strategies as st
from jax.scipy import stats

CLASSES = jnp.array([0.5, 2.0, 1.0])
PRECISION = jnp.array([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]])


def weighted_cross_entropy(f, y, w=jnp.ones(3), smoothing=0.0):
    """−Σ_c w_c t_c log p_c with a one-hot, smoothed target."""
    hot = optax.smooth_labels(jax.nn.one_hot(y, f.shape[-1], dtype=f.dtype), smoothing) if y.ndim < f.ndim else y
    return -jnp.sum(jnp.broadcast_to(w, f.shape) * hot * jax.nn.log_softmax(f), axis=-1)


def precise_gaussian(f, y):
    """−log N(y; f, Λ⁻¹), position by position."""
    flat = jax.vmap(lambda f, y: -stats.multivariate_normal.logpdf(y, f, jnp.linalg.inv(PRECISION)))
    return flat(f.reshape(-1, 3), y.reshape(-1, 3)).reshape(f.shape[:-1])


def binary(f, y, pos_weight=1.0, class_weight=1.0):
    """−c (π y log p + (1 − y) log(1 − p))."""
    c, pi = (jnp.broadcast_to(jnp.asarray(w, f.dtype), f.shape) for w in (class_weight, pos_weight))
    return -c * (pi * y * jax.nn.log_sigmoid(f) + (1 - y) * jax.nn.log_sigmoid(-f))


def negative_binomial(f, y, r=1.5):
    return -stats.nbinom.logpmf(y, r, r / (r + jnp.exp(f)))


def gamma(f, y, a=2.5):
    return -stats.gamma.logpdf(y, a, scale=jnp.exp(f) / a)


real = lambda rng, shape: rng.standard_normal(shape)
counts = lambda rng, shape: rng.poisson(2.0, shape).astype(float)
unit = lambda rng, shape: rng.uniform(size=shape)
positive = lambda rng, shape: rng.gamma(2.0, size=shape)
labels = lambda rng, shape: rng.integers(0, shape[-1], shape[:-1])
soft = lambda rng, shape: rng.dirichlet(np.ones(shape[-1]), shape[:-1])
one_of_two = lambda rng, shape: rng.standard_normal(shape[:-1])


class Variant(NamedTuple):
    name: str
    options: dict
    reference: Callable  # (f, y) -> one number for each position
    target: Callable  # (rng, shape of the prediction) -> targets
    size: int | None = None  # of the vector of a position; None: each entry is a position


VARIANTS = {
    "mse": Variant("mse", {}, lambda f, y: (f - y) ** 2, real),
    "cross entropy": Variant("cross_entropy", {}, weighted_cross_entropy, labels, 3),
    "cross entropy, soft": Variant("cross_entropy", {}, weighted_cross_entropy, soft, 3),
    "cross entropy, classes": Variant("cross_entropy", {"class_weight": CLASSES}, lambda f, y: weighted_cross_entropy(f, y, CLASSES), labels, 3),
    "cross entropy, smooth": Variant("cross_entropy", {"label_smoothing": 0.2}, lambda f, y: weighted_cross_entropy(f, y, smoothing=0.2), labels, 3),
    "cross entropy, both": Variant(
        "cross_entropy", {"class_weight": CLASSES, "label_smoothing": 0.2}, lambda f, y: weighted_cross_entropy(f, y, CLASSES, 0.2), labels, 3
    ),
    "cross entropy, soft classes": Variant("cross_entropy", {"class_weight": CLASSES}, lambda f, y: weighted_cross_entropy(f, y, CLASSES), soft, 3),
    "binary": Variant("binary_cross_entropy", {}, binary, unit),
    "binary, positive": Variant("binary_cross_entropy", {"pos_weight": 3.0}, lambda f, y: binary(f, y, 3.0), unit),
    "binary, labels": Variant(
        "binary_cross_entropy", {"pos_weight": CLASSES, "class_weight": CLASSES[::-1]}, lambda f, y: binary(f, y, CLASSES, CLASSES[::-1]), unit
    ),
    "gaussian": Variant("gaussian", {}, lambda f, y: -stats.norm.logpdf(y, f), real),
    "gaussian, scale": Variant("gaussian", {"scale": CLASSES}, lambda f, y: -stats.norm.logpdf(y, f, jnp.broadcast_to(CLASSES, f.shape)), real),
    "gaussian, precision": Variant("gaussian", {"precision": PRECISION}, precise_gaussian, real, 3),
    "heteroscedastic": Variant(
        "heteroscedastic_gaussian",
        {"curvature": "hessian"},
        lambda f, y: -stats.norm.logpdf(y, f[..., 0], jnp.exp(f[..., 1] / 2)),
        one_of_two,
        2,
    ),
    "poisson": Variant("poisson", {}, lambda f, y: -stats.poisson.logpmf(y, jnp.exp(f)), counts),
    "negative binomial": Variant("negative_binomial", {"concentration": 1.5}, negative_binomial, counts),
    "gamma": Variant("gamma", {"concentration": 2.5}, gamma, positive),
    "student t": Variant("student_t", {"df": 3.0, "scale": 0.7, "curvature": "hessian"}, lambda f, y: -stats.t.logpdf(y, 3.0, f, 0.7), real),
    "huber": Variant("huber", {"delta": 0.7}, lambda f, y: optax.huber_loss(f, y, delta=0.7), real),
    "laplace": Variant("laplace", {"scale": 0.7}, lambda f, y: -stats.laplace.logpdf(y, f, 0.7), real),
}


def draw(variant, lead, seed):
    """A prediction, a vector and targets with leading axes `lead`."""
    rng = np.random.default_rng(seed)
    shape = (*lead, variant.size or 3)
    f, u = (jnp.asarray(a) for a in rng.standard_normal((2, *shape)))
    return f, u, jnp.asarray(variant.target(rng, shape)), rng


def weights_for(kind, positions, rng):
    """Weights and masks, and the weight of each position that they mean."""
    shape = positions[: {"none": 0, "scalar": 0, "sample": 1, "position": len(positions), "mask": 1, "both": len(positions)}[kind]]
    w = jnp.asarray(rng.uniform(0.1, 2.0, shape) * (rng.uniform(size=shape) > 0.2))
    m = jnp.asarray(rng.uniform(size=shape) > 0.4)
    spread = lambda a: jnp.broadcast_to(a.reshape(a.shape + (1,) * (len(positions) - a.ndim)), positions)
    if kind == "none":
        return {}, jnp.ones(positions)
    if kind == "mask":
        return {"mask": m}, spread(m).astype(float)
    if kind == "both":
        return {"weight": w, "mask": m}, spread(w * m.astype(float))
    return {"weight": w}, spread(w)


KINDS = ("none", "scalar", "sample", "position", "mask", "both")
LEADS = [(2,), (2, 4), (3, 2, 2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_against_jax_hessian(name):
    """Value, gradient, Hessian and square root, 26 cases for each of the variants with `--flags slow`: 520 in all."""
    variant = VARIANTS[name]
    loss = create_loss(variant.name, **variant.options)

    def check(lead, kind, seed):
        f, u, y, rng = draw(variant, lead, seed)
        positions = f.shape if variant.size is None else f.shape[:-1]
        given, w = weights_for(kind, positions, rng)
        total = lambda f: jnp.sum(w * variant.reference(f, y))
        assert_close(loss.value(f, y, **given), w * variant.reference(f, y), rtol=1e-10, atol=1e-12)
        gradient, hu = jax.jvp(jax.grad(total), (f,), (u,))
        assert_close(loss.gradient(f, y, **given), gradient, rtol=1e-10, atol=1e-12)
        if loss.is_hessian:
            assert_close(loss.hessian_mv(u, f, y, **given), hu, rtol=1e-10, atol=1e-12)
        if name not in INDEFINITE:
            ssu = loss.square_root_mv(loss.square_root_transpose_mv(u, f, y, **given), f, y, **given)
            assert_close(ssu, loss.hessian_mv(u, f, y, **given), rtol=1e-10, atol=1e-12)
        if float(w.sum()) > 0 and "classes" not in name and "both" not in name:
            assert_close(loss.total(f, y, reduction="mean", **given), total(f) / w.sum(), rtol=1e-10, atol=1e-12)

    run_cases(26, check, lead=st.sampled_from(LEADS), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6))


INDEFINITE = {"heteroscedastic", "student t"}


@pytest.mark.parametrize("name", VARIANTS)
def test_full_hessian(name):
    """The dense matrix of everything at once: a product that mixed positions would be caught."""
    variant = VARIANTS[name]
    loss = create_loss(variant.name, **variant.options)
    f, _, y, _ = draw(variant, (2, 2), 0)
    if loss.is_hessian:
        full = jax.hessian(lambda f: jnp.sum(variant.reference(f, y)))(f).reshape(f.size, f.size)
        assert_close(dense_from_mv(lambda u: loss.hessian_mv(u, f, y), f), full, rtol=1e-10)


@pytest.mark.parametrize("name", sorted(set(VARIANTS) - {"laplace"}))
def test_verify_passes(name):
    variant = VARIANTS[name]
    f, _, y, rng = draw(variant, (2, 4), 1)
    given, _ = weights_for("both", f.shape if variant.size is None else f.shape[:-1], rng)
    loss = create_loss(variant.name, **variant.options)
    verify(loss, f, y, raise_on_failure=True)
    verify(loss, f, y, **given, raise_on_failure=True)


# Fisher information: E[(∂ℓ)²] under the density e^{−ℓ}, by sums and integrals over targets.

REAL, COUNTS = np.linspace(-4000.0, 4000.0, 1_600_001), np.arange(4000.0)
FISHER = {
    "mse": ({}, lambda f, y: (f - y) ** 2 + math.log(math.pi) / 2, REAL),
    "gaussian": ({"scale": 0.7}, lambda f, y: -stats.norm.logpdf(y, f, 0.7), REAL),
    "binary_cross_entropy": ({}, binary, np.arange(2.0)),
    "poisson": ({}, lambda f, y: -stats.poisson.logpmf(y, jnp.exp(f)), COUNTS[:200]),
    "negative_binomial": ({"concentration": 1.5, "curvature": "fisher"}, negative_binomial, COUNTS),
    "gamma": ({"concentration": 2.5, "curvature": "fisher"}, gamma, np.linspace(1e-9, 100.0, 1_000_001)),
    "student_t": ({"df": 3.0, "scale": 0.7}, lambda f, y: -stats.t.logpdf(y, 3.0, f, 0.7), REAL),
    "huber": (
        {"delta": 0.7, "curvature": "fisher"},
        lambda f, y: optax.huber_loss(f, y, delta=0.7)
        + math.log(math.sqrt(2 * math.pi) * math.erf(0.7 / math.sqrt(2)) + 2 * math.exp(-(0.7**2) / 2) / 0.7),
        REAL,
    ),
    "laplace": ({"scale": 0.7}, lambda f, y: -stats.laplace.logpdf(y, f, 0.7), REAL),
}


@pytest.mark.combinations
@pytest.mark.parametrize("name", FISHER)
@pytest.mark.parametrize("f", [-0.7, 0.4])
def test_fisher_information(name, f):
    options, nll, grid = FISHER[name]
    loss = create_loss(name, **options)
    assert loss.is_fisher
    y, at = jnp.asarray(grid), jnp.full(grid.shape, f)
    score = jax.grad(lambda f: jnp.sum(nll(f, y)))(at)
    step = 1.0 if grid is COUNTS or grid.size <= 200 else grid[1] - grid[0]
    density = jnp.exp(-nll(at, y)) * step
    assert abs(float(jnp.sum(density)) - 1) < 1e-4, "the reference is no density on this grid"
    mean_square = jnp.sum(density * score**2)
    assert_close(loss.hessian_mv(jnp.ones(()), jnp.asarray(f)), mean_square, rtol=1e-3)
    drawn = loss.sample(jax.random.key(0), jnp.full(200_000, f))
    assert abs(float(jnp.mean(loss.gradient(jnp.full(200_000, f), drawn) ** 2) / mean_square) - 1) < 0.05


@pytest.mark.parametrize("name", ["heteroscedastic_gaussian", "cross_entropy"])
def test_fisher_information_of_vectors(name):
    loss = create_loss(name)
    f = jnp.array([0.3, -0.4])
    if name == "cross_entropy":
        y, density = jnp.arange(2), jax.nn.softmax(f)
    else:
        y = jnp.linspace(-20, 20, 40_001)
        density = stats.norm.pdf(y, f[0], jnp.exp(f[1] / 2)) * (y[1] - y[0])
    scores = jax.vmap(lambda y: loss.gradient(f, y))(y)
    assert loss.is_fisher
    assert_close(density @ scores, jnp.zeros(2), atol=1e-10)
    assert_close(dense_from_mv(lambda u: loss.hessian_mv(u, f), f), jnp.einsum("n,ni,nj->ij", density, scores, scores), rtol=1e-8, atol=1e-10)


# Losses that are another one, and options for each entry


def test_a_gaussian_of_variance_one_half_is_the_squared_error():
    f, _, y, _ = draw(VARIANTS["mse"], (4,), 0)
    half, square = create_loss("gaussian", scale=0.5**0.5), create_loss("mse")
    assert_close(half.gradient(f, y), square.gradient(f, y), rtol=1e-14)
    assert_close(half.hessian_mv(f, f), square.hessian_mv(f, f), rtol=1e-14)


def test_student_t_with_many_degrees_of_freedom_is_the_gaussian():
    """Up to O(1/ν), constants included."""
    f, _, y, _ = draw(VARIANTS["student t"], (4,), 0)
    assert_close(create_loss("student_t", df=1e8, scale=CLASSES).value(3 * f, 3 * y), create_loss("gaussian", scale=CLASSES).value(3 * f, 3 * y), rtol=1e-5)


def test_student_t_with_options_for_each_entry():
    f, u, y, rng = draw(VARIANTS["student t"], (4,), 0)
    df, scale = jnp.array([2.0, 4.0, 8.0]), jnp.asarray(rng.uniform(0.1, 1.1, (4, 3)))
    fisher, exact = (create_loss("student_t", df=df, scale=scale, curvature=curvature) for curvature in ("fisher", "hessian"))
    nu = jnp.broadcast_to(df, f.shape)
    by_jvp = jax.jvp(jax.grad(lambda f: -jnp.sum(stats.t.logpdf(y, nu, f, scale))), (f,), (u,))
    assert_close((exact.gradient(f, y), exact.hessian_mv(u, f, y)), by_jvp, rtol=1e-12)
    assert_close(fisher.hessian_mv(u, f), (nu + 1) / (nu + 3) / scale**2 * u, rtol=1e-14)
    assert_close(fisher.square_root_mv(fisher.square_root_transpose_mv(u, f), f), fisher.hessian_mv(u, f), rtol=1e-14)


# The table of losses: each row's expressions are evaluated, for options of which the row says nothing too.

ROWS = [(name, i) for name, rows in sorted(registered_rows().items()) for i in range(len(rows))]
NUMBERS = {"scale": 0.7, "delta": 0.7, "df": 3.0, "concentration": 1.5}
rows = pytest.mark.parametrize(("name", "i"), ROWS)


def loss_of_row(name, i):
    """A row, its loss, and the options that made it: those of the row, and numbers that are not the defaults."""
    row, make = registered_rows()[name][i], registered_losses()[name]
    free = {} if "precision" in row.options else {k: v for k, v in NUMBERS.items() if k in inspect.signature(make).parameters}
    options = free | dict(row.options)
    return row, make(**options), options


def data_of_row(name, loss, lead, seed=0):
    """A prediction, a vector and targets, for positions of shape `lead`."""
    variant = next((v for v in VARIANTS.values() if v.name == name), VARIANTS["mse"])
    size = 2 if name == "heteroscedastic_gaussian" else 3
    f, u, y, _ = draw(variant._replace(size=None if loss.axis is None else size), lead, seed)
    if loss.axis is None:
        return f[..., 0], u[..., 0], y[..., 0]
    return f, u, draw(variant, lead, seed)[2] if name != "gaussian" else y


@rows
def test_rows_of_the_table(name, i):
    row, loss, options = loss_of_row(name, i)
    for seed in range(5):
        f, _, y = data_of_row(name, loss, (), seed)
        said = evaluate_row(row, options | {"f": f, "y": y})
        assert_close(loss.value(f, None if loss.read_target is None else y), jnp.asarray(said["value"]), rtol=1e-10, atol=1e-12)
        dense = lambda mv, like: dense_from_mv(lambda u: mv(u, f, y), like).reshape(*f.shape, *like.shape)
        assert_close(dense(loss.hessian_mv, f), jnp.broadcast_to(said["hessian"], f.shape * 2), rtol=1e-10, atol=1e-12)
        if "square_root" in said:
            S = dense(loss.square_root_mv, first_columns(loss, f, f))
            assert_close(S, jnp.broadcast_to(said["square_root"], S.shape), rtol=1e-10, atol=1e-12)
        else:
            with pytest.raises(ValueError, match="no square root"):
                loss.square_root_mv(f, f, y)
    assert all(row_cells(row))


@pytest.mark.parametrize("name", sorted(registered_losses()))
def test_every_loss_has_a_row_for_each_curvature(name):
    """The first row is that of the defaults; where H may be chosen, there is one for the other choice."""
    said, options = registered_rows()[name], inspect.signature(registered_losses()[name]).parameters
    assert said[0].options == {}
    if "curvature" in options:
        other = {"hessian": "fisher", "fisher": "hessian"}[options["curvature"].default]
        assert {"curvature": other} in [row.options for row in said]


@pytest.mark.parametrize("wrong", ["hessian", "value", "square_root"])
def test_a_wrong_row_is_noticed(wrong, monkeypatch):
    said = registered_rows()["huber"]
    broken = said[0]._replace(**{wrong: getattr(said[0], wrong) + " + 1e-6"})
    monkeypatch.setitem(ggn_nb.losses.closed_form._ROWS, "huber", (broken, *said[1:]))
    with pytest.raises(AssertionError):
        test_rows_of_the_table("huber", 0)


def operations(loss, f, u, y) -> float:
    """What XLA counts of a compiled product: operations, and numbers read and written."""
    cost = jax.jit(loss.hessian_mv).lower(u, f, y).compile().cost_analysis()
    return sum(cost.get(what, 0.0) for what in ("flops", "transcendentals", "bytes accessed"))


def cost_of_positions(name, loss, n) -> float:
    """Of n positions."""
    f, u, y = data_of_row(name, loss, (n,))
    return operations(loss, f, u, y)


def cost_of_size(name, row, c) -> float:
    """Of one position with C entries."""
    sized = {"class_weight": jnp.ones(c), "precision": jnp.eye(c)}
    loss = registered_losses()[name](**{k: sized.get(k, v) for k, v in row.options.items()})
    f = jnp.asarray(np.random.default_rng(c).standard_normal((1, c)))
    return operations(loss, f, f, jnp.zeros(1, int) if name == "cross_entropy" else f)


@rows
def test_cost_of_the_table(name, i):
    """O(1): in proportion to the number of positions. O(C), O(C²): growing so with the size C of one position."""
    row, loss, _ = loss_of_row(name, i)
    cost = (lambda n: cost_of_positions(name, loss, n)) if row.cost == "O(1)" else (lambda c: cost_of_size(name, row, c))
    power = {"O(1)": 1, "O(C)": 1, "O(C**2)": 2}[row.cost]
    bound = 0.1 if jax.__version_info__ < (0, 12) else 0.15  # what XLA counts beside the formula has grown
    assert abs(math.log(cost(4096) / cost(1024), 4) - power) < bound


@rows
def test_positions_are_not_mixed(name, i):
    _, loss, _ = loss_of_row(name, i)
    f, _, y = data_of_row(name, loss, (4,))
    blocks = np.asarray(dense_from_mv(lambda u: loss.hessian_mv(u, f, y), f)).reshape(4, -1, 4, f.size // 4)
    for a in range(4):
        for b in range(4):
            assert a == b or not blocks[a, :, b].any()


# What is put where nothing counts, what a loss prints, and what it is


@pytest.mark.parametrize("name", VARIANTS)
def test_what_stands_at_positions_that_do_not_count_is_a_valid_target(name):
    variant = VARIANTS[name]
    loss = create_loss(variant.name, **variant.options)
    f, _, y, _ = draw(variant, (4,), 0)
    read = lambda y: loss.read_target(y, f, **loss.options_in(f.dtype))
    assert bool(jnp.all(read(jnp.full(y.shape, read(y).fill, y.dtype)).valid))


DIFFERENT = [
    ("gamma", {}, {"curvature": "fisher"}),
    ("negative_binomial", {}, {"curvature": "fisher"}),
    ("huber", {}, {"curvature": "fisher"}),
    ("huber", {}, {"delta": 2.0}),
    ("student_t", {}, {"curvature": "hessian"}),
    ("heteroscedastic_gaussian", {}, {"curvature": "hessian"}),
    ("heteroscedastic_gaussian", {}, {"axis": 0}),
    ("cross_entropy", {}, {"axis": -3}),
    ("cross_entropy", {}, {"label_smoothing": 0.1}),
    ("cross_entropy", {}, {"ignore_index": None}),
    ("binary_cross_entropy", {"pos_weight": 2.0}, {"class_weight": 2.0}),
    ("gaussian", {"scale": CLASSES}, {"precision": PRECISION}),
]


@pytest.mark.parametrize(("name", "some", "other"), DIFFERENT)
def test_losses_that_differ_print_differently(name, some, other):
    first, second = (repr(create_loss(name, **options)) for options in (some, other))
    assert first != second
    assert "\n" not in first + second
    assert "at 0x" not in first + second


def test_losses_of_the_same_options_share_a_program():
    """Options are leaves; what is static is equal, and holds nothing that the table says."""
    structure = lambda loss: jax.tree.structure(loss)
    for name, make in registered_losses().items():
        assert structure(make()) == structure(make()), name
        assert not any(isinstance(part, type(registered_rows()["mse"][0])) for part in vars(make()).values())
    assert structure(create_loss("huber", delta=2.0)) == structure(create_loss("huber"))
    assert structure(create_loss("huber", curvature="fisher")) != structure(create_loss("huber"))


@pytest.mark.parametrize("linearize", ["cached", "recomputed"])
def test_custom_losses_made_by_hand_are_arguments_of_a_program(linearize):
    square = CustomLoss(lambda f, y: (f - y) ** 2)
    only = HessianOnly(lambda jv, pred, target: 2 * jv)
    rng = np.random.default_rng(0)
    x, W, v = (jnp.asarray(rng.standard_normal(s)) for s in ((6, 3), (3, 2), (3, 2)))
    data = {"input": x, "target": jnp.zeros((6, 2))}
    for loss in (square, only):
        G = create_ggn_mv(lambda input, params: input @ params, W, data, loss, linearize=linearize)
        assert_close(jax.jit(lambda G, v: G(v))(G, v), 2 * x.T @ (x @ v))
        assert jax.tree.leaves(loss) == []
        assert jax.tree.structure(loss) == jax.tree.structure(jax.tree.map(lambda a: a, loss))
    carried = CustomLoss(jax.tree_util.Partial(lambda c, f, y: c * f**2, jnp.asarray(3.0)))
    assert_close(jax.jit(lambda loss, u: loss.hessian_mv(u, u))(carried, jnp.ones(2)), jnp.full(2, 6.0))


def test_what_a_loss_must_write():
    class Nothing(Loss):
        """Writes nothing."""

    with pytest.raises(TypeError, match="faults.*hessian_mv.*weight_sum"):
        Nothing()
    only = HessianOnly(lambda jv, pred, target: 2 * jv)
    for method, call in {
        "value": lambda: only.value(F),
        "value ": lambda: only.total(F),
        "gradient": lambda: only.gradient(F),
        "square_root_mv": lambda: only.square_root_mv(F, F),
        "square_root_transpose_mv": lambda: only.square_root_transpose_mv(F, F),
        "sample": lambda: only.sample(jax.random.key(0), F),
    }.items():
        with pytest.raises(ValueError, match=f"{method.strip()}: got a HessianOnly, expected a loss that has this method"):
            call()


@pytest.mark.parametrize("name", ggn_nb.losses.__all__)
def test_public_names_are_documented(name):
    subject = getattr(ggn_nb.losses, name)
    text = inspect.getdoc(subject)
    assert "Example:" in text
    assert ">>> " in text
    for argument in inspect.signature(subject).parameters if inspect.isfunction(subject) else ():
        assert f"`{argument}`" in text, argument


# Half precision and extreme predictions


@pytest.mark.combinations
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision(name, dtype):
    """One rounding of the result: the products compute in float32. The bound is two units in the last place of the largest entry."""
    variant = VARIANTS[name]
    loss = create_loss(variant.name, **variant.options)
    f, u, y, _ = draw(variant, (4, 8), 2)
    f, u = f.astype(dtype), u.astype(dtype)
    y = y.astype(jnp.float32) if jnp.issubdtype(y.dtype, jnp.floating) else y
    wide = (a.astype(jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a for a in (u, f, y))
    u_, f_, y_ = wide
    bound = 2 * float(jnp.finfo(dtype).eps)
    assert_close(loss.hessian_mv(u, f, y), loss.hessian_mv(u_, f_, y_).astype(dtype), rtol=bound)
    assert_close(loss.gradient(f, y), loss.gradient(f_, y_).astype(dtype), rtol=bound)
    if name not in INDEFINITE:
        u, u_ = (first_columns(loss, v, f) for v in (u, u_))
        assert_close(loss.square_root_mv(u, f, y), loss.square_root_mv(u_, f_, y_).astype(dtype), rtol=bound)


EXPONENTIAL = {"poisson": 80.0, "negative binomial": 1e4, "gamma": 80.0, "heteroscedastic": 80.0}


@pytest.mark.combinations
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_extreme_predictions(name, dtype):
    """Finite at ±10⁴; at ±80 where the loss itself is exponential in the prediction."""
    variant = VARIANTS[name]
    loss = create_loss(variant.name, **variant.options)
    f, u, y, rng = draw(variant, (50,), 3)
    far = EXPONENTIAL.get(name, 1e4)
    f = jnp.asarray(rng.choice([-far, 0.0, far], f.shape), dtype)
    u, y = u.astype(dtype), y.astype(dtype) if jnp.issubdtype(y.dtype, jnp.floating) else y
    if name == "heteroscedastic":
        f = f.at[:, 0].set(0)
    for result in (loss.value(f, y), loss.gradient(f, y), loss.hessian_mv(u, f, y)):
        assert bool(jnp.all(jnp.isfinite(result)))
        assert result.dtype == dtype


# Weights, masks and ignored labels


@pytest.mark.parametrize("name", VARIANTS)
def test_garbage_that_does_not_count(name):
    variant = VARIANTS[name]
    loss = create_loss(variant.name, **variant.options)
    f, u, y, _ = draw(variant, (4, 2), 4)
    garbage = jnp.asarray(-77 if jnp.issubdtype(y.dtype, jnp.integer) else jnp.nan, y.dtype)
    zeroed = lambda a: a.at[1].set(0)
    for given in ({"mask": jnp.arange(4) != 1}, {"weight": jnp.array([1.0, 0.0, 2.0, 0.5])}):
        by_jax = jax.jit(jax.grad(lambda f, y: loss.total(f, y, **given)))
        slope = jax.jit(jax.grad(lambda w, f, y: loss.total(f, y, weight=w, mask=given.get("mask"))))
        product, value, gradient = (zeroed(of(*args, **given)) for of, args in (
            (loss.hessian_mv, (u, f, y)), (loss.value, (f, y)), (loss.gradient, (f, y))))
        for junk in (jnp.inf, -jnp.inf, jnp.nan):
            bad_u, bad_f, bad_y = u.at[1].set(junk), f.at[1].set(junk), y.at[1].set(garbage)
            assert_close(loss.hessian_mv(bad_u, bad_f, bad_y, **given), product)
            assert_close(loss.value(bad_f, bad_y, **given), value)
            assert_close(loss.gradient(bad_f, bad_y, **given), gradient)
            assert_close(by_jax(bad_f, bad_y), gradient, atol=1e-14)
            assert bool(jnp.all(jnp.isfinite(slope(jnp.array([1.0, 0.0, 2.0, 0.5]), bad_f, bad_y))))


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_through_weights(name):
    """d/dw of a total is the value, and of a Hessian product the product: at weight zero too, and mixed with the prediction."""
    variant = VARIANTS[name]
    loss = create_loss(variant.name, **variant.options)
    f, u, y, _ = draw(variant, (3,), 5)
    w = jnp.array([0.0, 1.0, 2.5])
    per_sample = lambda a: a.reshape(3, -1).sum(axis=1)
    assert_close(jax.grad(lambda w: loss.total(f, y, weight=w))(w), per_sample(loss.value(f, y)), atol=1e-13)
    slope = jax.grad(lambda w: jnp.vdot(u, loss.hessian_mv(u, f, y, weight=w)))(w)
    assert_close(slope, per_sample(u * loss.hessian_mv(u, f, y)), atol=1e-13)
    mixed = jax.jacobian(lambda w: jax.grad(lambda f: loss.total(f, y, weight=w))(f))(w)
    assert_close(jnp.stack([mixed[i, ..., i] for i in range(3)]), loss.gradient(f, y), atol=1e-13)
    if name not in INDEFINITE:
        assert bool(jnp.all(jnp.isfinite(jax.grad(lambda w: jnp.vdot(u, loss.square_root_mv(first_columns(loss, u, f), f, y, weight=w)))(w))))


def test_ignored_labels():
    f, y = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 3))), jnp.array([[0, -100, 2, 1], [-100, -100, 0, 2]])
    keep = y >= 0
    for ignore, labels in ((-100, y), (7, jnp.where(keep, y, 7)), (255, jnp.where(keep, y, 255).astype(jnp.uint8))):
        loss = create_loss("cross_entropy", ignore_index=ignore)
        plain = optax.softmax_cross_entropy_with_integer_labels(f, jnp.where(keep, y, 0))
        assert_close(loss.total(f, labels, reduction="mean"), jnp.sum(jnp.where(keep, plain, 0)) / keep.sum().astype(float))
        assert_close(loss.hessian_mv(f, f, labels), jnp.where(keep[..., None], create_loss("cross_entropy").hessian_mv(f, f), 0))
    with pytest.raises(ValueError, match="target"):
        create_loss("cross_entropy", ignore_index=None).value(f, y)


def test_mean_with_class_weights():
    """As PyTorch: Σ w_y ℓ / Σ w_y."""
    f, y = jnp.asarray(np.random.default_rng(0).standard_normal((6, 3))), jnp.array([0, 1, 2, 2, -100, 1])
    w = np.where(np.asarray(y) >= 0, np.asarray(CLASSES)[np.asarray(y) % 3], 0)
    plain = np.array([-jax.nn.log_softmax(f)[i, c] for i, c in enumerate(np.asarray(y) % 3)])
    expected = np.sum(np.where(w > 0, w * plain, 0)) / w.sum()
    loss = create_loss("cross_entropy", class_weight=CLASSES)
    assert_close(loss.total(f, y, reduction="mean"), jnp.asarray(expected))
    assert_close(loss.weight_sum(f, y), jnp.asarray(w.sum()))
    w = w * (sample := np.linspace(0.5, 2, 6))
    assert_close(loss.total(f, y, weight=sample, reduction="mean"), jnp.asarray(np.sum(np.where(w > 0, w * plain, 0)) / w.sum()))


def test_derivatives_by_class_weights():
    """The loss is linear in them: the derivative is the loss of the class, at weight 0 too, where the class has no curvature."""
    f, u, y, _ = draw(VARIANTS["cross entropy"], (7,), 0)
    classes = jnp.array([0.5, 2.0, 0.0])
    slope = jax.jit(jax.grad(lambda w: CE(class_weight=w).total(f, y)))(classes)
    assert_close(slope, jnp.zeros(3).at[y].add(CE().value(f, y)), rtol=1e-14)
    by_root = jax.jit(jax.grad(lambda w: jnp.sum(CE(class_weight=w).square_root_mv(u[:, :-1], f, y))))(classes)
    assert bool(jnp.all(jnp.isfinite(by_root)))
    assert_close(CE(class_weight=classes).hessian_mv(u, f, jnp.full(7, 2)), jnp.zeros((7, 3)))


def test_ignored_and_masked_logits_with_all_options():
    f, u, y, _ = draw(VARIANTS["cross entropy"], (7,), 1)
    mask, full = np.arange(7) != 2, np.array([0.0, 1, 0, 1, 1, 1, 1])
    loss = CE(class_weight=CLASSES, label_smoothing=0.2)
    total = lambda f: jnp.sum(full * weighted_cross_entropy(f, y, CLASSES, 0.2))
    bad_f, bad_y = f.at[0].set(jnp.inf), y.at[0].set(-100).at[2].set(77)
    assert_close(loss.total(bad_f, bad_y, mask=mask), total(f), rtol=1e-14)
    by_jvp = jax.jit(lambda f, u: jax.jvp(jax.grad(total), (f,), (u,))[1])(f, u)
    assert_close(loss.hessian_mv(u, bad_f, bad_y, mask=mask), by_jvp, rtol=1e-13)
    assert_close(CE(ignore_index=1).value(f, jnp.full(7, 1)), jnp.zeros(7))


def test_images_with_all_options():
    """(B, C, H, W) against the same numbers with the classes last, whole and one by one."""
    rng = np.random.default_rng(0)
    u, f = jnp.asarray(rng.standard_normal((2, 2, 3, 4, 2)))
    y, last = jnp.asarray(rng.integers(0, 3, (2, 4, 2))), lambda x: jnp.moveaxis(x, -3, -1)
    here, there = (partial(loss_results, CE(axis=axis, class_weight=CLASSES, label_smoothing=0.2)) for axis in (-3, -1))
    got, want = jax.jit(here)(u, f, y), jax.jit(there)(last(u), last(f), y)
    assert_close(jax.jit(jax.vmap(here))(u, f, y), got, rtol=1e-14)
    assert_close({name: a if name == "value" else last(a) for name, a in got.items()}, want, rtol=1e-14)


def test_binary_cross_entropy_is_that_of_two_classes():
    """One of them has the logit zero. `pos_weight` is the weight of the other class, `class_weight` that of the position."""
    f, u = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5)))
    y, c = jnp.array([0, 1, 1, 0, 1]), jnp.array([1.0, 2.0, 0.5, 3.0, 0.0])
    beside_zero = lambda a: jnp.stack([jnp.zeros_like(a), a], axis=-1)
    plain, two = create_loss("binary_cross_entropy"), create_loss("cross_entropy")
    assert_close(plain.value(f, y), two.value(beside_zero(f), y), rtol=1e-14)
    assert_close(plain.hessian_mv(u, f), two.hessian_mv(beside_zero(u), beside_zero(f))[:, 1], rtol=1e-14)
    weighted = create_loss("binary_cross_entropy", pos_weight=4.0, class_weight=c)
    classes = create_loss("cross_entropy", class_weight=jnp.array([1.0, 4.0]))
    assert_close(weighted.value(f, y), classes.value(beside_zero(f), y, weight=c), rtol=1e-14)
    product = classes.hessian_mv(beside_zero(u), beside_zero(f), y, weight=c)
    assert_close(weighted.hessian_mv(u, f, y), product[:, 1], rtol=1e-14)


def test_many_binary_labels():
    """Weights for each of the labels fit the samples under `jax.vmap`; truth values, integers and numbers are the same labels."""
    loss = create_loss("binary_cross_entropy", pos_weight=CLASSES, class_weight=CLASSES[::-1])
    f, u, _, rng = draw(VARIANTS["binary, labels"], (4,), 6)
    y = jnp.asarray(rng.integers(0, 2, (4, 3))).astype(float)
    by_hand = lambda f: binary(f, y, CLASSES, CLASSES[::-1])
    product = jax.jvp(jax.grad(lambda f: by_hand(f).sum()), (f,), (u,))[1]
    assert_close(jax.vmap(loss.hessian_mv)(u, f, y), product, rtol=1e-14)
    for dtype in (float, int, bool, jnp.uint8, jnp.float32):
        assert_close(loss.hessian_mv(u, f, y.astype(dtype)), product, rtol=1e-14)
        assert_close(loss.value(f, y.astype(dtype)), by_hand(f), rtol=1e-14)
    with pytest.raises(ValueError, match="target: got values that binary_cross_entropy does not take"):
        loss.value(f, y.astype(int) + 1)
    with pytest.raises(ValueError, match="target: got None, expected one"):
        loss.hessian_mv(u, f)


def test_what_of_binary_cross_entropy_needs_no_label():
    f, u = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)))
    for loss, use in ((create_loss("binary_cross_entropy", pos_weight=2.0), "required"), (create_loss("binary_cross_entropy", class_weight=2.0), "unused")):
        assert loss.target_use == use
    loss = create_loss("binary_cross_entropy")
    assert loss.target_use == "unused"
    assert_close(loss.hessian_mv(u, f, jnp.full(3, -1.0)), loss.hessian_mv(u, f))


def test_weights_of_binary_labels_are_differentiated():
    f, y = jnp.asarray(np.random.default_rng(0).standard_normal(3)), jnp.array([1.0, 0.0, 0.3])
    slope = jax.grad(lambda w: create_loss("binary_cross_entropy", pos_weight=w).total(f, y))(CLASSES)
    assert_close(slope, y * jax.nn.softplus(-f), rtol=1e-14)


@pytest.mark.parametrize(("option", "value"), [("pos_weight", -1.0), ("class_weight", jnp.inf)])
def test_weights_of_binary_labels_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option}: got {value}, expected finite numbers ≥ 0"):
        create_loss("binary_cross_entropy", **{option: value})


def test_scales_of_laplace():
    """One for each entry of the last axis, and residuals of ±10⁴."""
    scale = jnp.array([0.1, 0.5, 10.0])
    loss, f, u = create_loss("laplace", scale=scale), jnp.array([1e4, -1e4, 3.0]), jnp.array([1.0, -2.0, 0.5])
    assert_close(loss.hessian_mv(u, f), u / scale**2, rtol=1e-14)
    for dtype in ("float64", "float32"):
        far = f[:2].astype(dtype)
        assert create_loss("laplace", scale=0.5).value(far, 0 * far).tolist() == [2e4, 2e4]
    with pytest.raises(ValueError, match="scale: got shape"):
        loss.value(jnp.ones((4, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="scale: got 0.0, expected finite numbers > 0"):
        create_loss("laplace", scale=0.0)
    with pytest.raises(ValueError, match="target: got values that laplace does not take, expected finite real numbers"):
        loss.value(f, f.at[0].set(jnp.inf))


def test_weights_of_nested_heads():
    """A head that has heads of its own takes its tree of weights; a product is weighted like a value."""
    loss = multi_head({"box": "mse", "label": "cross_entropy"}, {"box": 0.5, "label": 2.0})
    f, w = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4))), jnp.array([0.0, 1.0, 2.0])
    pred, target, of_heads = {"box": f, "label": f}, {"box": 0 * f, "label": jnp.array([0, 3, 2])}, {"box": None, "label": w}
    weighted = loss.value(pred, target, weight=of_heads)
    plain = loss.hessian_mv(pred, pred, target)
    assert_close(loss.hessian_mv(pred, pred, target, weight=of_heads), {"box": plain["box"], "label": w[:, None] * plain["label"]})
    nested = multi_head({"first": loss})
    assert_close(nested.value({"first": pred}, {"first": target}, weight={"first": of_heads}), {"first": weighted})


HEADS = multi_head({"box": "mse", "label": "cross_entropy"})
BOTH_HEADS, THEIR_TARGETS = {"box": jnp.ones((3, 4)), "label": jnp.ones((3, 5))}, {"box": jnp.ones((3, 4)), "label": jnp.zeros(3, int)}
WRONG_HEADS = {
    "pred: got heads": lambda: HEADS.total({"box": jnp.ones((3, 4))}, THEIR_TARGETS),
    "target: got heads": lambda: HEADS.total(BOTH_HEADS, {"box": 1, "class": 2}),
    "jv: got heads": lambda: HEADS.hessian_mv([1.0, 2.0], BOTH_HEADS),
    "u: got heads": lambda: HEADS.square_root_mv([1.0, 2.0], BOTH_HEADS),
    "v: got heads": lambda: HEADS.square_root_transpose_mv([1.0, 2.0], BOTH_HEADS),
    "weight: got heads": lambda: HEADS.total(BOTH_HEADS, THEIR_TARGETS, weight={"box": jnp.ones(3)}),
    "mask: got heads": lambda: HEADS.total(BOTH_HEADS, THEIR_TARGETS, mask={"box": jnp.ones(3, bool)}),
    "weights: got heads": lambda: multi_head({"a": "mse"}, {"b": 1.0}),
    "weights: got -1.0": lambda: multi_head({"a": "mse"}, {"a": -1.0}),
    "Unsupported loss function provided": lambda: multi_head({"a": "hinge"}),
    "losses: got no heads": lambda: multi_head({}),
    "losses: got no heads, expected": lambda: multi_head({"a": {}, "b": []}),
}


@pytest.mark.parametrize("message", WRONG_HEADS)
def test_wrong_heads_are_refused(message):
    with pytest.raises(ValueError, match=f"^{message}"):
        WRONG_HEADS[message]()


@pytest.mark.parametrize("axis", [-3, 1, -1, 3])
def test_class_axis(axis):
    """Segmentation, (B, C, H, W) or (B, H, W, C)."""
    f = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 4, 3)))
    last = jnp.moveaxis(f, axis, -1)
    y = jnp.asarray(np.random.default_rng(1).integers(0, 3, last.shape[:-1]))
    here, there = (create_loss("cross_entropy", axis=a) for a in (axis, -1))
    for given in ({}, {"weight": jnp.array([1.0, 2.0])}, {"mask": jnp.asarray(np.random.default_rng(2).uniform(size=y.shape) > 0.5)}):
        assert_close(here.value(f, y, **given), there.value(last, y, **given))
        for method in ("hessian_mv", "square_root_mv", "square_root_transpose_mv"):
            u, u_last = (first_columns(here, f, f), first_columns(there, last, last)) if method == "square_root_mv" else (f, last)
            expected = jnp.moveaxis(getattr(there, method)(u_last, last, y, **given), -1, axis)
            assert_close(getattr(here, method)(u, f, y, **given), expected)
    hot = jax.nn.one_hot(y, 3, axis=axis, dtype=f.dtype)
    assert_close(here.value(f, hot), there.value(last, y))
    assert here.sample(jax.random.key(0), f).shape == y.shape


@pytest.mark.parametrize("policy", ["cached", "recomputed"])
def test_operator_on_sequences_with_weights(policy):
    """(B, T, C) with a mask for each position: the product of the sums, however the samples are grouped."""
    rng = np.random.default_rng(0)
    x, W = jnp.asarray(rng.standard_normal((4, 5, 2))), jnp.asarray(rng.standard_normal((2, 3)))
    y, mask = jnp.asarray(rng.integers(0, 3, (4, 5))), jnp.asarray(rng.uniform(size=(4, 5)) > 0.3)
    w, v = jnp.asarray(rng.uniform(size=(4, 5))), jnp.asarray(rng.standard_normal((2, 3)))
    model = lambda input, params: jnp.tanh(input @ params)
    data = {"input": x, "target": jnp.where(mask, y, 99), "weight": w, "mask": mask}
    flat_f = lambda p: model(x, p).reshape(-1, 3)
    wm = (w * mask.astype(float)).reshape(-1)
    nll = lambda f: jnp.sum(wm * optax.softmax_cross_entropy_with_integer_labels(f, y.reshape(-1)))
    jv = jax.jvp(flat_f, (W,), (v,))[1]
    hjv = jax.jvp(jax.grad(nll), (flat_f(W),), (jv,))[1]
    expected = jax.vjp(flat_f, W)[1](hjv)[0]
    for vmapped in (True, False):
        G = create_ggn_mv(model, W, data, "cross_entropy", vmap_over_data=vmapped, linearize=policy)
        assert_close(G(v), expected)
        mean = create_ggn_mv(model, W, data, "cross_entropy", vmap_over_data=vmapped, linearize=policy, reduction="mean")
        assert_close(mean(v), expected / wm.sum())


def test_mean_does_not_depend_on_grouping():
    """Sums over ragged chunks, divided once by the sum of all weights, give the mean of the whole."""
    rng = np.random.default_rng(0)
    x, W, v = (jnp.asarray(rng.standard_normal(s)) for s in ((7, 2), (2, 3), (2, 3)))
    data = {"input": x, "target": jnp.array([0, 1, 2, -100, 1, 0, 2]), "weight": jnp.asarray(rng.uniform(size=7))}
    model = lambda input, params: jnp.tanh(input @ params)
    whole = create_ggn_mv(model, W, data, "cross_entropy", reduction="mean")(v)
    for cuts in ((3,), (1, 2, 6), (4, 5)):
        pieces = [{k: a[s] for k, a in data.items()} for s in map(slice, (0, *cuts), (*cuts, 7))]
        total = sum(create_ggn_mv(model, W, piece, "cross_entropy")(v) for piece in pieces)
        counted = sum(create_loss("cross_entropy").weight_sum(model(p["input"], W), p["target"], weight=p["weight"]) for p in pieces)
        assert_close(total / counted, whole)


# Bad input

F, Y = jnp.ones((4, 3)), jnp.array([0, 1, 2, 0])
CE = lambda **options: create_loss("cross_entropy", **options)
REFUSED = {
    "mask of a wrong shape": (lambda: CE().value(F, Y, mask=jnp.ones(3, bool)), ValueError, "mask: got shape"),
    "mask from the right": (lambda: CE().value(F, Y, mask=jnp.ones((1, 4), bool)), ValueError, "mask: got shape"),
    "mask of numbers": (lambda: CE().value(F, Y, mask=jnp.ones(4)), TypeError, "mask: got dtype"),
    "weight of truth values": (lambda: CE().value(F, Y, weight=jnp.ones(4, bool)), TypeError, "weight: got dtype bool"),
    "weight for classes": (lambda: CE().value(F, Y, weight=jnp.ones((4, 3))), ValueError, "weight: got shape"),
    "negative weight, whole number": (lambda: CE().hessian_mv(F, F, weight=jnp.array([1, 2, -3, 4])), ValueError, "weight: got a negative"),
    "negative weight": (lambda: CE().hessian_mv(F, F, weight=-jnp.ones(4)), ValueError, "weight: got a negative"),
    "infinite weight": (lambda: CE().hessian_mv(F, F, weight=jnp.full(4, jnp.inf)), ValueError, "weight: got a negative or non-finite"),
    "label too large": (lambda: CE().value(F, Y + 1), ValueError, "target: got values that cross_entropy does not take"),
    "negative label": (lambda: CE().hessian_mv(F, F, Y - 1), ValueError, "target: got values that cross_entropy does not take"),
    "float labels": (lambda: CE().value(F, Y.astype(float)), TypeError, "target: got float"),
    "labels of a wrong shape": (lambda: CE().value(F, Y[:2]), ValueError, "target: got int"),
    "no distribution": (lambda: CE().value(F, F), ValueError, "target: got values"),
    "class weights of a wrong shape": (lambda: CE(class_weight=jnp.ones(4)).value(F, Y), ValueError, "class_weight: got shape"),
    "class weights need a target": (lambda: CE(class_weight=jnp.ones(3)).hessian_mv(F, F), ValueError, "target: got None"),
    "negative class weights": (lambda: CE(class_weight=-jnp.ones(3)), ValueError, "class_weight: got"),
    "smoothing": (lambda: CE(label_smoothing=1.5), ValueError, "label_smoothing: got 1.5"),
    "axis": (lambda: CE(axis=2).value(F, Y), ValueError, "pred: got shape"),
    "unknown option": (lambda: CE(temperature=2.0), TypeError, "temperature"),
    "reduction": (lambda: CE().total(F, Y, reduction="average"), ValueError, "reduction: got 'average'"),
    "binary labels": (lambda: create_loss("binary_cross_entropy").value(F, 2 * F), ValueError, "target: got values"),
    "pos_weight": (lambda: create_loss("binary_cross_entropy", pos_weight=jnp.ones(2)).value(F, F), ValueError, "pos_weight: got shape"),
    "counts": (lambda: create_loss("poisson").value(F, -F), ValueError, "target: got values"),
    "positive": (lambda: create_loss("gamma").value(F, 0 * F), ValueError, "target: got values"),
    "broadcast": (lambda: create_loss("mse").value(F, jnp.ones((4, 1))), ValueError, "target: got"),
    "scale": (lambda: create_loss("gaussian", scale=0.0), ValueError, "scale: got 0"),
    "scale and precision": (lambda: create_loss("gaussian", scale=1.0, precision=jnp.eye(3)), ValueError, "precision"),
    "scale of a wrong shape": (lambda: create_loss("gaussian", scale=jnp.ones(2)).value(F, F), ValueError, r"scale: got shape \(2,\), expected the last axes"),
    "precision": (lambda: create_loss("gaussian", precision=-jnp.eye(3)), ValueError, "precision"),
    "precision, one number": (lambda: create_loss("gaussian", precision=2.0), ValueError, r"precision: got shape \(\), expected a square matrix"),
    "precision, whole numbers": (lambda: create_loss("gaussian", precision=jnp.eye(3, dtype=int)), TypeError, "precision: got dtype int64"),
    "precision, not a number": (
        lambda: create_loss("gaussian", precision=jnp.full((2, 2), jnp.nan)),
        ValueError,
        "precision: got a matrix that is not positive definite",
    ),
    "axis, no whole number": (lambda: create_loss("heteroscedastic_gaussian", axis=1.0), TypeError, "axis: got 1.0, expected a whole number"),
    "axis of one number": (
        lambda: create_loss("heteroscedastic_gaussian").value(jnp.ones(()), jnp.ones(())),
        ValueError,
        r"pred: got shape \(\), expected an axis -1",
    ),
    "target, not a number": (
        lambda: create_loss("heteroscedastic_gaussian").value(F[:, :2], jnp.full(4, jnp.nan)),
        ValueError,
        "target: got values that heteroscedastic_gaussian does not take",
    ),
    "scale of Student's t": (lambda: create_loss("student_t", scale=-1.0), ValueError, "scale: got -1.0, expected finite numbers > 0"),
    "degrees of freedom of a wrong shape": (
        lambda: create_loss("student_t", df=jnp.ones(2)).hessian_mv(F, F),
        ValueError,
        r"df: got shape \(2,\), expected the last axes",
    ),
    "delta": (lambda: create_loss("huber", delta=-1.0), ValueError, "delta: got -1"),
    "curvature": (lambda: create_loss("huber", curvature="gauss"), ValueError, "curvature: got 'gauss'"),
    "indefinite": (lambda: create_loss("student_t", curvature="hessian").square_root_mv(F, F, F), ValueError, "indefinite"),
    "heads": (lambda: multi_head({"a": "mse"}).value({"b": F}, {"b": F}), ValueError, "pred: got heads"),
    "heads of the target": (lambda: multi_head({"a": "mse"}).value({"a": F}, {"b": F}), ValueError, "target: got heads"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


MODEL = lambda input, params: input @ params
DATA = {"input": jnp.ones((4, 2)), "target": Y}
REFUSED_BY_THE_OPERATOR = {
    "label": ({"target": Y + 1}, ValueError, "target: got values"),
    "float labels": ({"target": Y.astype(float)}, TypeError, "target: got float"),
    "weight": ({"weight": -jnp.ones(4)}, ValueError, "weight: got a negative"),
    "weight of a wrong length": ({"weight": jnp.ones(3)}, ValueError, r"data\['weight'\] has 3"),
    "mask": ({"mask": jnp.ones(4)}, TypeError, "mask: got dtype"),
    "misspelt": ({"weights": jnp.ones(4)}, ValueError, r"unknown \['weights'\]"),
}


@pytest.mark.parametrize("case", REFUSED_BY_THE_OPERATOR)
@pytest.mark.parametrize("policy", ["cached", "recomputed"])
def test_refused_by_the_operator(case, policy):
    change, error, message = REFUSED_BY_THE_OPERATOR[case]
    with pytest.raises(error, match=message):
        create_ggn_mv(MODEL, jnp.ones((2, 3)), DATA | change, "cross_entropy", linearize=policy)


def test_options_are_arguments_of_a_program():
    """New class weights, weights or masks of the same shape compile nothing, and nothing is baked in."""
    apply = jax.jit(lambda G, v: G(v))
    make = lambda s: create_ggn_mv(MODEL, jnp.ones((2, 3)), DATA | {"weight": s * jnp.ones(4)}, CE(class_weight=s * CLASSES))
    v = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)))
    once = apply(make(1.0), v)
    other = make(2.0)
    with count_compiles() as compiled:
        twice = apply(other, v)
    assert compiled.count == 0
    assert_close(twice, 4 * once)
    assert jax.make_jaxpr(apply)(make(1.0), v).consts == []
