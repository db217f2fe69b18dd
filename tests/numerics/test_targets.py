"""Targets that are given are checked, weights of zero are harmless, and what a loss claims is so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import create_ggn_mv, create_loss, create_loss_hessian_mv, multi_head
from ggn_nb.losses.closed_form import registered_losses
from ggn_nb.losses.common import first_columns
from ggn_nb.operators.samples import enable_x64
from ggn_nb.tools.testing import assert_close
from jax import random

F, U = random.normal(random.key(0), (2, 4, 3))
LABELS = jnp.array([0, 2, 1, 0])
REAL = random.normal(random.key(1), (4, 3))
BINARY, SOFT = (REAL > 0).astype(float), jax.nn.softmax(REAL)

# name, options, a target in the domain, the same with the second position outside of it
LOSSES = [
    ("mse", {}, REAL, REAL.at[1].set(jnp.nan)),
    ("gaussian", {"scale": 0.5}, REAL, REAL.at[1].set(jnp.inf)),
    ("gaussian", {"precision": jnp.eye(3)}, REAL, REAL.at[1].set(jnp.nan)),
    ("laplace", {}, REAL, REAL.at[1].set(jnp.nan)),
    ("huber", {}, REAL, REAL.at[1].set(jnp.nan)),
    ("huber", {"curvature": "fisher"}, REAL, REAL.at[1].set(jnp.nan)),
    ("student_t", {}, REAL, REAL.at[1].set(jnp.nan)),
    ("student_t", {"curvature": "hessian"}, REAL, REAL.at[1].set(jnp.nan)),
    ("poisson", {}, REAL**2, (REAL**2).at[1].set(-1.0)),
    ("negative_binomial", {}, REAL**2, (REAL**2).at[1].set(-1.0)),
    ("gamma", {}, REAL**2, (REAL**2).at[1].set(-1.0)),
    ("binary_cross_entropy", {}, BINARY, BINARY.at[1].set(-1.0)),
    ("binary_cross_entropy", {"pos_weight": 2.0}, BINARY, BINARY.at[1].set(-1.0)),
    ("cross_entropy", {}, LABELS, LABELS.at[1].set(3)),
    ("cross_entropy", {"class_weight": jnp.array([0.5, 1.0, 2.0])}, LABELS, LABELS.at[1].set(7)),
    ("cross_entropy", {"label_smoothing": 0.2}, LABELS, LABELS.at[1].set(-1)),
    ("cross_entropy", {}, SOFT, SOFT.at[1].multiply(2.0)),
    ("heteroscedastic_gaussian", {}, REAL[:, 0], REAL[:, 0].at[1].set(jnp.nan)),
    ("heteroscedastic_gaussian", {"curvature": "hessian"}, REAL[:, 0], REAL[:, 0].at[1].set(jnp.nan)),
]
losses = pytest.mark.parametrize(("name", "options", "inside", "outside"), LOSSES, ids=[f"{n} {' '.join(o)} {t.ndim}" for n, o, t, _ in LOSSES])


def made(name, options):
    """A loss, a prediction and a vector for it."""
    size = 2 if name == "heteroscedastic_gaussian" else 3
    return create_loss(name, **options), F[:, :size], U[:, :size]


def methods(loss, u):
    """The methods that read a target: (pred, target, **given) -> result. A product may have no use for it."""
    if loss.target_use == "unused": return [loss.value, loss.gradient, loss.total]
    found = [loss.value, loss.gradient, loss.weight_sum, loss.counted, loss.total]
    products = [loss.hessian_mv, lambda *a, **k: create_loss_hessian_mv(loss)(*a, **k)]
    if loss.formulas.square_root_mv is not None:
        products += [lambda u, f, *a, **k: loss.square_root_mv(first_columns(loss, u, f), f, *a, **k), loss.square_root_transpose_mv]
    return found + [lambda f, y, mv=mv, **given: mv(u, f, y, **given) for mv in products]


@losses
def test_a_target_of_a_wrong_shape_is_refused_wherever_it_is_given(name, options, inside, outside):
    loss, f, u = made(name, options)
    for wrong in (inside[:3], inside[..., None], np.ones((4, 7)), np.ones(())):
        for method in methods(loss, u):
            with pytest.raises((ValueError, TypeError), match="target: got "):
                jax.eval_shape(method, f, wrong)
        for method in (lambda f, y: loss.faults(f, y), lambda f, y: loss.faults(f, y, reads_target=True)):
            with pytest.raises((ValueError, TypeError), match="target: got "):
                method(f, wrong)


@losses
def test_numbers_outside_of_the_domain_are_refused_wherever_they_are_given(name, options, inside, outside):
    loss, f, u = made(name, options)
    second = jnp.array([True, False, True, True])
    for method in methods(loss, u):
        if method not in (loss.weight_sum, loss.counted):
            with pytest.raises(ValueError, match="target: got values that"):
                method(f, outside)
            method(f, outside, mask=second)
            method(f, outside, weight=second.astype(float))
    assert any(bool(present) for present in loss.faults(f, outside).values())
    assert not any(bool(present) for present in loss.faults(f, inside).values())


@losses
def test_an_operator_looks_at_the_target_that_it_is_given(name, options, inside, outside):
    loss, f, u = made(name, options)
    model = lambda input, params: input * params
    make = lambda target, **more: create_ggn_mv(model, jnp.ones(f.shape[1]), {"input": f, "target": target} | more, loss)
    make(inside)
    for wrong in (outside, jnp.ones((4, 7))):
        with pytest.raises((ValueError, TypeError), match="target: got "):
            make(wrong)


def test_predictions_of_one_number_and_targets_of_seven():
    data = {"input": jnp.ones((10, 2)), "target": jnp.zeros((10, 7))}
    for vmapped in (True, False):
        with pytest.raises(ValueError, match="target: got .*expected finite real numbers"):
            create_ggn_mv(lambda input, params: input @ params, jnp.ones((2, 1)), data, "mse", vmap_over_data=vmapped)


def test_integers_and_truth_values_are_numbers_of_the_squared_error():
    loss = create_loss("mse")
    assert_close(loss.value(jnp.array([3.0, 0.0, 1.0]), jnp.array([2, 2, 1])), jnp.array([1.0, 4.0, 0.0]))
    assert_close(loss.value(jnp.array(3.0), True), jnp.array(4.0))


def test_a_head_has_its_target_checked_and_no_loss_has_none():
    loss = multi_head({"a": "mse", "b": "none"})
    f = {"a": F, "b": F}
    with pytest.raises(ValueError, match="target: got"):
        loss.value(f, {"a": F[:3], "b": None})
    assert_close(loss.hessian_mv(f, f, {"a": None, "b": object()}), {"a": 2 * F, "b": F})
    assert_close(create_loss("none").hessian_mv(U, F, {"any": "thing"}), U)


@pytest.mark.parametrize("name", ["mse", "poisson", "binary_cross_entropy", "gaussian"])
def test_nothing_of_an_unused_target_is_left_in_a_compiled_product(name):
    loss = create_loss(name)
    with_target = jax.jit(lambda u, f, y: loss.hessian_mv(u, f, y)).lower(U, F, F**2).compile()
    without = jax.jit(lambda u, f, y: loss.hessian_mv(u, f)).lower(U, F, F**2).compile()
    for cost in ("flops", "bytes accessed"):
        assert with_target.cost_analysis().get(cost) == without.cost_analysis().get(cost)


# What cannot be known


@losses
def test_a_target_outside_of_the_domain_is_nan_under_jit_and_nothing_else_is(name, options, inside, outside):
    loss, f, u = made(name, options)
    bad = np.arange(4) == 1
    results = [loss.value, loss.gradient, jax.grad(lambda f, y: loss.total(f, y))]
    if loss.target_use == "required":
        results += [lambda f, y: loss.hessian_mv(u, f, y)]
        if loss.formulas.square_root_mv is not None:
            results += [lambda f, y: loss.square_root_mv(first_columns(loss, u, f), f, y)]
    rows = lambda result: np.asarray(result).reshape(4, -1)
    for result in results:
        compiled = jax.jit(result)
        got, want = rows(compiled(f, outside)), rows(compiled(f, inside))
        assert np.isnan(got[bad]).any(axis=1).all()
        np.testing.assert_allclose(got[~bad], want[~bad], rtol=1e-12)
    assert bool(jnp.isnan(jax.jit(loss.total)(f, outside)))
    if loss.target_use != "required":
        assert bool(jnp.isfinite(jax.jit(loss.hessian_mv)(u, f, outside)).all())
    for given in ({"mask": jnp.asarray(~bad)}, {"weight": jnp.asarray(~bad).astype(float)}):
        compiled = jax.jit(lambda f, y: (loss.value(f, y, **given), loss.gradient(f, y, **given), loss.hessian_mv(u, f, y, **given)))
        assert_close(compiled(f, outside), compiled(f, inside))


# Labels and distributions


HOT = np.eye(3)[LABELS]
SAME = {"small": np.uint8(LABELS), "of NumPy": np.asarray(LABELS), "one-hot": HOT, "truth values": HOT.astype(bool), "whole numbers": HOT.astype(int), "half": HOT.astype(jnp.bfloat16)}


@pytest.mark.parametrize("kind", SAME)
def test_kinds_of_labels(kind):
    """Of any integer dtype, and as one-hot vectors of any dtype, with all options at once."""
    loss, same = create_loss("cross_entropy", class_weight=jnp.array([0.5, 2.0, 1.0]), label_smoothing=0.2), SAME[kind]
    for of in (loss.value, loss.gradient, loss.weight_sum, lambda f, y: loss.hessian_mv(U, f, y)):
        assert_close(of(F, same), of(F, LABELS), rtol=1e-14)


def test_distributions_in_half_precision_are_valid():
    """Their sums are off by a few thousandths."""
    half = SOFT.astype(jnp.bfloat16)
    assert float(jnp.max(jnp.abs(half.astype(float).sum(axis=1) - 1))) > 1e-3
    assert not any(bool(present) for present in create_loss("cross_entropy").faults(F, half).values())


# Labels that fit several axes


@pytest.mark.parametrize("shape", [(3, 3, 3), (2, 3, 3), (3, 2, 3), (5, 4, 4, 4)])
def test_labels_that_fit_several_axes_need_the_axis(shape):
    f, labels = random.normal(random.key(0), shape), jnp.zeros(shape[:-1], int)
    fits = [a for a in range(len(shape)) if shape[:a] + shape[a + 1 :] == labels.shape]
    for call in (lambda loss: loss.value(f, labels), lambda loss: loss.hessian_mv(f, f, labels), lambda loss: loss.faults(f, labels)):
        for stated in (-1, 2, -2):
            if shape[:stated] + shape[stated:][1:] == labels.shape:
                call(create_loss("cross_entropy", axis=stated))
                last = create_loss("cross_entropy", axis=-1).value(jnp.moveaxis(f, stated, -1), labels)
                assert_close(create_loss("cross_entropy", axis=stated).value(f, labels), last)
        if len(fits) == 1:
            call(create_loss("cross_entropy"))
        else:
            with pytest.raises(ValueError, match="axis: not stated.*axis=-1"):
                call(create_loss("cross_entropy"))
    assert_close(create_loss("cross_entropy").hessian_mv(f, f), create_loss("cross_entropy", axis=-1).hessian_mv(f, f))


def test_as_many_samples_as_classes():
    loss = create_loss("cross_entropy")
    f, labels = random.normal(random.key(0), (3, 3)), jnp.array([2, 0, 1])
    assert_close(loss.value(f, labels), -jax.nn.log_softmax(f)[jnp.arange(3), labels])
    assert repr(loss) == "cross_entropy(ignore_index=-100)"
    assert loss.axis == -1
    data = {"input": random.normal(random.key(1), (3, 3)), "target": labels}
    for vmapped in (True, False):
        create_ggn_mv(lambda input, params: input @ params, jnp.eye(3), data, loss, vmap_over_data=vmapped)


def test_an_operator_on_images_as_wide_as_there_are_classes():
    data = {"input": random.normal(random.key(1), (4, 3, 3, 3)), "target": jnp.zeros((4, 3, 3), int)}
    model = lambda input, params: input * params
    with pytest.raises(ValueError, match="axis: not stated"):
        create_ggn_mv(model, jnp.ones((3, 3, 3)), data, "cross_entropy")
    create_ggn_mv(model, jnp.ones((3, 3, 3)), data, create_loss("cross_entropy", axis=0))


# Weights of zero where a formula overflows

OVERFLOWS = [("poisson", {}), ("negative_binomial", {"concentration": 1.5}), ("gamma", {"concentration": 2.5}), ("mse", {}), ("binary_cross_entropy", {}), ("student_t", {})]


@pytest.mark.combinations
@pytest.mark.parametrize(("name", "options"), OVERFLOWS, ids=[name for name, _ in OVERFLOWS])
@pytest.mark.parametrize("far", [1e3, -1e30])
def test_weight_zero_where_the_formula_overflows(name, options, far):
    loss = create_loss(name, **options)
    f = jnp.array([0.3, far, -0.2], jnp.float32)
    y, u, w = jnp.array([1.0, 1.0, 0.5], jnp.float32), jnp.ones(3, jnp.float32), jnp.array([2.0, 0.0, 1.0], jnp.float32)
    keep = np.array([0, 2])
    alone = lambda method, *args: method(*[a[keep] for a in args])
    total = lambda f, w: loss.total(f, y, weight=w)
    slopes = [jax.grad(total)(f, w), jax.jit(jax.grad(total))(f, w), jax.jacfwd(total)(f, w), loss.gradient(f, y, weight=w)]
    want = alone(lambda f, y, w: w * loss.gradient(f, y), f, y, w)
    for slope in slopes:
        assert float(slope[1]) == 0
        assert_close(slope[keep], want, rtol=1e-5)
    hessians = [jax.hessian(total)(f, w) @ u, jax.jvp(jax.grad(lambda f: total(f, w)), (f,), (u,))[1]]
    curvature = alone(lambda f, y, w: w * jax.vmap(jax.hessian(lambda f, y: loss.value(f, y)))(f, y), f, y, w)
    for product in hessians:
        assert float(product[1]) == 0
        assert_close(product[keep], curvature, rtol=1e-4)
    by_weight = jax.grad(total, argnums=1)(f, w)
    value = loss.value(f, y)
    assert bool(jnp.all(jnp.isfinite(by_weight)))
    assert_close(by_weight, jnp.where(jnp.isfinite(value), value, 0), rtol=1e-5)
    product = lambda f: jnp.vdot(u, loss.hessian_mv(u, f, y, weight=w))
    assert float(jax.grad(product)(f)[1]) == 0 and bool(jnp.all(jnp.isfinite(jax.grad(product)(f))))


@pytest.mark.parametrize("name", ["negative_binomial", "gamma"])
def test_options_are_differentiated_where_a_position_of_weight_zero_overflows(name):
    f, y, w = jnp.array([0.3, 1e3, -1e3], jnp.float32), jnp.ones(3, jnp.float32), jnp.array([2.0, 0.0, 0.0], jnp.float32)
    total = lambda a, f, y, w: create_loss(name, concentration=a).total(f, y, weight=w)
    assert_close(jax.grad(total)(1.5, f, y, w), jax.grad(total)(1.5, f[:1], y[:1], w[:1]), rtol=1e-5)


def test_a_weight_given_to_a_product_costs_one_softmax():
    """What makes a position of weight zero harmless to derivatives is not in the product itself."""
    loss = create_loss("cross_entropy")
    f = random.normal(random.key(0), (64, 100))
    text = jax.jit(lambda u, f, w: loss.hessian_mv(u, f, weight=w)).lower(f, f, f[:, 0]).compile().as_text()
    assert text.count(" exponential(") == 1


# What a loss claims

CLAIMS = [
    ("mse", {}, True, True, True),
    ("none", {}, True, False, False),
    ("gaussian", {}, True, True, True),
    ("gaussian", {"scale": 0.5}, True, True, True),
    ("gaussian", {"precision": jnp.eye(3) / 2}, True, True, True),
    ("poisson", {}, True, True, True),
    ("cross_entropy", {}, True, True, True),
    ("cross_entropy", {"label_smoothing": 0.0}, True, True, True),
    ("cross_entropy", {"label_smoothing": 0.1}, True, False, False),
    ("cross_entropy", {"class_weight": jnp.array([0.5, 2.0, 1.0])}, True, False, False),
    ("binary_cross_entropy", {}, True, True, True),
    ("binary_cross_entropy", {"pos_weight": 2.0}, True, False, False),
    ("binary_cross_entropy", {"class_weight": 2.0}, True, False, False),
    ("laplace", {}, False, True, True),
    *[(name, {"curvature": c}, c == "hessian", c == "fisher", True) for name in ("huber", "student_t", "gamma", "negative_binomial", "heteroscedastic_gaussian") for c in ("hessian", "fisher")],
]


@pytest.mark.parametrize(("name", "options", "is_hessian", "is_fisher", "is_likelihood"), CLAIMS)
def test_what_a_loss_claims(name, options, is_hessian, is_fisher, is_likelihood):
    loss, f, _ = made(name, options)
    assert (loss.is_hessian, loss.is_fisher, loss.is_likelihood) == (is_hessian, is_fisher, is_likelihood)
    again = jax.tree.unflatten(jax.tree.structure(loss), jax.tree.leaves(loss))
    assert again.is_likelihood == is_likelihood
    target = None if name == "none" else loss.sample(random.key(3), f)
    H = jax.jit(jax.vmap(jax.hessian(lambda f, y: loss.total(f, y)), (0, None if target is None else 0)))(f, target)
    identity = jnp.eye(f.shape[1])
    columns = jax.jit(lambda f, y: jax.vmap(lambda u: loss.hessian_mv(u, f, y))(identity))
    got = jnp.stack([columns(f[i], None if target is None else target[i]) for i in range(4)])
    assert bool(jnp.allclose(got, H)) == is_hessian


@pytest.mark.parametrize(
    ("name", "options", "use"),
    [
        ("gaussian", {}, "unused"),
        ("gaussian", {"precision": jnp.eye(3)}, "unused"),
        *[(name, {"curvature": c}, use) for name in ("student_t", "heteroscedastic_gaussian") for c, use in (("hessian", "required"), ("fisher", "unused"))],
    ],
)
def test_whether_products_use_the_target(name, options, use):
    assert create_loss(name, **options).target_use == use


def test_every_loss_is_in_the_table_of_claims():
    assert {name for name, *_ in CLAIMS} >= {name for name, make in registered_losses().items() if make.__module__.startswith("ggn_nb")}


LIKELIHOODS = [case for case in CLAIMS if case[-1]]


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o, *_ in LIKELIHOODS])
def test_a_likelihood_has_gradients_of_mean_zero_at_its_samples(name, options):
    """E ∇ℓ = 0 and E ∇ℓ ∇ℓᵀ = E ∇²ℓ at samples, within five standard errors: so for likelihoods, and not with weights."""
    loss, f, _ = made(name, options)
    ys = jax.vmap(loss.sample, (0, None))(random.split(random.key(0), 4000), f[0])
    g = jax.vmap(loss.gradient, (None, 0))(f[0], ys)
    error = jnp.std(g, axis=0) / len(g) ** 0.5
    assert bool(jnp.all(jnp.abs(jnp.mean(g, axis=0)) < 5 * error + 1e-12))


def test_heads_with_weights_are_no_likelihood():
    heads = {"a": "mse", "b": "cross_entropy"}
    assert multi_head(heads).is_likelihood
    assert multi_head(heads, {"a": 1, "b": 1.0}).is_likelihood
    for weighted in (multi_head(heads, {"a": 2.0, "b": 1.0}), multi_head({"a": "none"}), multi_head({"a": create_loss("cross_entropy", label_smoothing=0.1)})):
        assert not weighted.is_likelihood and not weighted.is_fisher
    assert jax.jit(lambda loss: jnp.asarray(loss.is_likelihood))(multi_head(heads))
    assert not jax.jit(lambda loss: jnp.asarray(loss.is_likelihood))(multi_head(heads, {"a": 1.0, "b": 1.0}))
    assert multi_head(heads).scales is None


# Options and shapes, each by name

CE, BCE = (lambda **o: create_loss("cross_entropy", **o)), (lambda **o: create_loss("binary_cross_entropy", **o))
EMPTY = jnp.ones((0, 3))
REFUSED = {
    "smoothing of each class": (lambda: CE(label_smoothing=[0.1, 0.2]), ValueError, r"label_smoothing: got shape \(2,\), expected one number"),
    "smoothing, no number": (lambda: CE(label_smoothing="a"), TypeError, "label_smoothing: got 'a'"),
    "class weights, one number": (lambda: CE(class_weight=2.0).value(F, LABELS), ValueError, r"class_weight: got shape \(\)"),
    "class weights, too many": (lambda: CE(class_weight=jnp.ones(4)).hessian_mv(U, F, LABELS), ValueError, r"class_weight: got shape \(4,\)"),
    "ignored, no whole number": (lambda: CE(ignore_index=0.5), TypeError, "ignore_index: got 0.5"),
    "axis, no number": (lambda: CE(axis="last"), TypeError, "axis: got 'last'"),
    "axis, truth value": (lambda: CE(axis=True), TypeError, "axis: got True"),
    "pos_weight": (lambda: BCE(pos_weight=jnp.ones(2)).hessian_mv(U, F, 0 * F), ValueError, r"pos_weight: got shape \(2,\)"),
    "binary class weights": (lambda: BCE(class_weight=jnp.ones(2)).hessian_mv(U, F), ValueError, r"class_weight: got shape \(2,\)"),
    **{f"{name}, {option} None": (lambda name=name, option=option: create_loss(name, **{option: None}), TypeError, f"{option}: got None, expected real numbers")
       for name, option in [("student_t", "df"), ("student_t", "scale"), ("huber", "delta"), ("laplace", "scale"), ("gamma", "concentration"), ("negative_binomial", "concentration")]},
    "weights of heads None": (lambda: multi_head({"a": "mse"}, {"a": None}), TypeError, "weights: got None"),
    "weights of heads, shape": (lambda: multi_head({"a": "mse"}, {"a": jnp.ones(2)}), ValueError, r"weights: got shape \(2,\)"),
    "no heads": (lambda: multi_head({"a": {}}), ValueError, "losses: got no heads"),
    **{f"empty prediction, {name}": (lambda name=name: create_loss(name).hessian_mv(EMPTY, EMPTY), ValueError, r"pred: got shape \(0, 3\), expected at least one") for name in ("mse", "cross_entropy", "none")},
    "empty prediction, value": (lambda: create_loss("mse").total(EMPTY, EMPTY, reduction="mean"), ValueError, "pred: got shape"),
    "eight bits": (lambda: create_loss("mse").value(F.astype(jnp.float8_e4m3fn), F), TypeError, "pred: got dtype float8_e4m3fn, expected a real floating-point dtype, float16, bfloat16, float32 or float64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", ["mse", "cross_entropy", "binary_cross_entropy"])
def test_an_operator_without_predictions_is_refused(name):
    data = {"input": jnp.ones((4, 2)), "target": jnp.zeros((4, 0), int)}
    with pytest.raises(ValueError, match="pred: got shape"):
        create_ggn_mv(lambda input, params: input @ params, jnp.ones((2, 0)), data, name)


PARAMS = {
    "numbers of Python": ([1.0, 2.0], TypeError, r"params\[0\]: got a Python float in a list, expected an array"),
    "none": (None, ValueError, "params: got None, expected at least one array"),
    "eight bits": (jnp.ones(2, jnp.float8_e5m2), TypeError, "params: got dtype float8_e5m2"),
}


@pytest.mark.parametrize("case", PARAMS)
def test_parameters_are_arrays_in_a_precision_that_can_be_differentiated(case):
    params, error, message = PARAMS[case]
    model = lambda input, params: input * jnp.sum(jnp.asarray(jax.tree.leaves(params)).astype(F.dtype))
    with pytest.raises(error, match=message):
        create_ggn_mv(model, params, {"input": F, "target": F}, "mse")
    for fine in (np.float64(2.0), np.ones(2), jnp.float32(2.0), [np.float32(1), np.float32(2)]):
        create_ggn_mv(model, fine, {"input": F, "target": F}, "mse")


BIG = 3_000_000_000  # more than int32 holds


def test_large_integers_are_read_as_real_numbers():
    with enable_x64(False):
        f = jnp.zeros(2)
        for y in (np.array([BIG, 2**40]), np.array([BIG, 2**40], np.uint64), [BIG, 2**40]):
            assert_close(create_loss("mse").value(f, y), jnp.array([float(BIG) ** 2, 2.0**80]), rtol=1e-6)
            assert_close(create_loss("mse").gradient(f, y), jnp.array([-2.0 * BIG, -(2.0**41)]), rtol=1e-6)
        y = np.array([BIG])
        assert_close(create_loss("heteroscedastic_gaussian").gradient(jnp.zeros((1, 2)), y)[0, 0], jnp.array(-float(BIG)), rtol=1e-6)


@pytest.mark.parametrize("y", [
    np.array([2**40, 0]), np.array([2**32 - 100, 0], np.uint32), np.array([2**64 - 100, 0], np.uint64), np.array([-(2**40), 0]),
    np.array([[2**32 + 1, 0, 0], [0, 1, 0]]),
], ids=["int64", "uint32", "uint64", "negative", "one-hot"])
def test_labels_that_do_not_fit_into_int32_are_out_of_range(y):
    with enable_x64(False), pytest.raises(ValueError, match="target: got values that cross_entropy does not take"):
        create_loss("cross_entropy").value(jnp.zeros((2, 3)), y)


def test_labels_of_short_types_are_read():
    loss, f = create_loss("cross_entropy"), jnp.zeros((2, 3))
    for dtype in (np.int8, np.uint8, np.uint32, np.int64):
        assert_close(loss.value(f, np.array([2, 0], dtype)), loss.value(f, jnp.array([2, 0])))
    assert_close(loss.value(f, np.array([-100, 0], np.int8)), jnp.array([0.0, np.log(3)]))
