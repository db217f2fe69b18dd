"""Functions as losses: rules of their own, masks that take values away, broadcasts, and what cannot be differentiated."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import CustomLoss, create_ggn_mv, create_loss, create_loss_hessian_mv
from ggn_nb.tools.testing import assert_close
from jax import random

F, U = random.normal(random.key(0), (2, 4))
T = jnp.array([0.2, 0.3, 0.1, 0.4])

# Functions with a reverse rule


@jax.custom_vjp
def calls_itself(f, y):
    return jnp.sum((f - y) ** 4)


calls_itself.defvjp(lambda f, y: (calls_itself(f, y), (f, y)), lambda kept, g: (4 * g * (kept[0] - kept[1]) ** 3, None))


@jax.custom_vjp
def keeps_its_value(f, y):
    return jnp.exp(jnp.sum(f * y))


def keep(f, y):
    value = keeps_its_value(f, y)
    return value, (value, y)


keeps_its_value.defvjp(keep, lambda kept, g: (g * kept[0] * kept[1], None))


@jax.custom_vjp
def of_each_entry(f, y):
    return (f - y) ** 4


of_each_entry.defvjp(lambda f, y: (of_each_entry(f, y), (f, y)), lambda kept, g: (4 * g * (kept[0] - kept[1]) ** 3, None))

inside_of_another = lambda f, y: jnp.sum(jax.jit(calls_itself)(jnp.sin(f), y)) + jnp.sum(f**2)
PLAIN = {
    calls_itself: lambda f, y: jnp.sum((f - y) ** 4),
    keeps_its_value: lambda f, y: jnp.exp(jnp.sum(f * y)),
    of_each_entry: lambda f, y: jnp.sum((f - y) ** 4),
    inside_of_another: lambda f, y: jnp.sum((jnp.sin(f) - y) ** 4) + jnp.sum(f**2),
}
rules = pytest.mark.parametrize("loss_fn", PLAIN, ids=["calls itself", "keeps its value", "entries", "inside of another"])


@rules
def test_a_function_with_a_reverse_rule(loss_fn):
    loss, want = CustomLoss(loss_fn), jax.hessian(PLAIN[loss_fn])(F, T) @ U
    for product in (loss.hessian_mv, jax.jit(loss.hessian_mv), create_loss_hessian_mv(loss_fn)):
        assert_close(product(U, F, T), want)
    many = jax.jit(jax.vmap(loss.hessian_mv))(jnp.stack([U, F]), jnp.stack([F, U]), jnp.stack([T, T]))
    assert_close(many[0], want)


@rules
@pytest.mark.parametrize("linearize", ["cached", "recomputed"])
def test_an_operator_of_a_function_with_a_reverse_rule(loss_fn, linearize):
    data = {"input": random.normal(random.key(1), (5, 4)), "target": jnp.tile(T, (5, 1)) / 3}
    model = lambda input, params: jnp.tanh(input * params)
    make = partial(create_ggn_mv, model, F, data, linearize=linearize)
    assert_close(make(loss_fn)(U), make(PLAIN[loss_fn])(U))


# What cannot be differentiated twice

on_host = lambda f, y: jax.pure_callback(lambda f: np.sum(f**2), jax.ShapeDtypeStruct((), F.dtype), f)
in_a_loop = lambda f, y: jax.lax.while_loop(lambda x: x < 3, lambda x: x * 2, 1 + jnp.sum(f**2))


@jax.custom_vjp
def once(f, y):
    return jnp.sum(f**2)


once.defvjp(lambda f, y: (once(f, y), f), lambda f, g: (g * jax.pure_callback(lambda f: 2 * f, jax.ShapeDtypeStruct(f.shape, f.dtype), f), None))


@pytest.mark.parametrize("loss_fn", [on_host, in_a_loop, once], ids=["callback", "while loop", "rule with a callback"])
def test_a_function_that_cannot_be_differentiated_twice_is_refused_by_name(loss_fn):
    data = {"input": jnp.ones((5, 4)), "target": jnp.zeros((5, 4))}
    for call in (
        lambda: CustomLoss(loss_fn).hessian_mv(U, F, T),
        lambda: create_ggn_mv(lambda input, params: input * params, F, data, loss_fn),
        lambda: create_ggn_mv(lambda input, params: input * params, F, data, loss_fn, linearize="recomputed"),
    ):
        with pytest.raises(ValueError, match="loss_fn: got a function that JAX cannot differentiate .*hessian_mv"):
            call()
    if loss_fn is not in_a_loop:
        assert np.isfinite(CustomLoss(loss_fn).value(F, T))


# Broadcasts

BROADCASTS = {
    "column and row": ((10, 1), (10,), r"\(10, 10\) for a prediction of shape \(10, 1\)"),
    "row and column": ((10,), (10, 1), r"\(10, 10\) for a prediction of shape \(10,\)"),
    "one prediction": ((), (10,), r"\(10,\) for a prediction of shape \(\)"),
    "seven outputs": ((10, 1), (10, 7), r"\(10, 7\) for a prediction of shape \(10, 1\)"),
}


@pytest.mark.parametrize("case", BROADCASTS)
def test_more_values_than_entries_are_refused(case):
    shape, target, message = BROADCASTS[case]
    with jax.numpy_rank_promotion("allow"):
        loss, f, y = CustomLoss(lambda f, y: (f - y) ** 2), jnp.ones(shape), jnp.zeros(target)
        for call in (loss.value, loss.gradient, loss.total, loss.weight_sum, partial(loss.hessian_mv, f), jax.jit(partial(loss.hessian_mv, f))):
            with pytest.raises(ValueError, match=f"loss_fn: returned values of shape {message}.*let the function sum"):
                call(f, y)
        summed = CustomLoss(lambda f, y: jnp.sum((f - y) ** 2))
        summed.hessian_mv(f, f, y)


def test_an_operator_refuses_more_values_than_entries():
    data = {"input": jnp.ones((10, 2)), "target": jnp.zeros(10)}
    with jax.numpy_rank_promotion("allow"), pytest.raises(ValueError, match="loss_fn: returned values of shape"):
        create_ggn_mv(lambda input, params: input @ params, jnp.ones((2, 1)), data, lambda f, y: (f - y) ** 2, vmap_over_data=False)


# Masks take values away

by_class = CustomLoss(lambda f, t: -t * jax.nn.log_softmax(f))
OFF = {"mask": jnp.array([True, True, True, False])}, {"weight": jnp.array([1.0, 1.0, 1.0, 0.0])}
off = pytest.mark.parametrize("given", OFF, ids=["mask", "weight"])


@off
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_masked_value_still_moves_the_others(given, dtype):
    f, u, t = (a.astype(dtype) for a in (F, U, T))
    left = lambda f: jnp.sum((-T * jax.nn.log_softmax(f))[:3])
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    want = jax.grad(left)(F)
    assert abs(float(want[3])) > 0.05
    by_jax = jax.grad(lambda f, t: by_class.total(f, t, **given))
    for gradient in (partial(by_class.gradient, **given), jax.jit(partial(by_class.gradient, **given)), by_jax):
        assert_close(gradient(f, t).astype(float), want, rtol=rtol)
    product = by_class.hessian_mv(u, f, t, **given).astype(float)
    assert_close(product, jax.hessian(left)(F) @ U, rtol=rtol)


@off
def test_a_masked_value_of_leaves_that_match_by_chance(given):
    """Values (4,), and leaves of four entries of which none belongs to a position."""
    spread = lambda f, t: t * (f["a"] @ jnp.arange(4.0)) ** 2 + jnp.exp(f["b"][::-1])
    f, u = {"a": F, "b": U}, {"a": U, "b": F}
    left = lambda f: jnp.sum(spread(f, T)[:3])
    assert_close(CustomLoss(spread).gradient(f, T, **given), jax.grad(left)(f))
    assert_close(CustomLoss(spread).hessian_mv(u, f, T, **given), jax.jvp(jax.grad(left), (f,), (u,))[1])


ENTRYWISE = {
    "log": (lambda f, t: -t * jnp.log(f), [-1.0, 0.0, np.nan, np.inf]),
    "root": (lambda f, t: t * jnp.sqrt(f), [-1.0, 0.0, np.nan]),
    "exp": (lambda f, t: t * jnp.exp(f), [1e4, np.nan, np.inf]),
}


@off
@pytest.mark.parametrize("case", ENTRYWISE)
def test_garbage_at_masked_entries(case, given):
    loss_fn, garbage = ENTRYWISE[case]
    loss, f = CustomLoss(loss_fn), jnp.array([0.5, 2.0, 1.0])
    first = jax.vmap(jax.grad(loss_fn))(f, T[:3])
    second = U[:3] * jax.vmap(jax.grad(jax.grad(loss_fn)))(f, T[:3])
    for junk in garbage:
        bad = jnp.append(f, junk)
        for u in (U, U.at[3].set(jnp.nan)):
            assert_close(loss.gradient(bad, T, **given), jnp.append(first, 0.0))
            assert_close(jax.jit(lambda u, f: loss.hessian_mv(u, f, T, **given))(u, bad), jnp.append(second, 0.0))
        if not np.isfinite(loss_fn(junk, 0.4)):
            assert_close(jax.grad(lambda f: loss.total(f, T, **given))(bad), jnp.append(first, 0.0))


def test_what_counts_and_is_not_finite_stays_so():
    loss = CustomLoss(lambda f, t: -t * jnp.log(f))
    bad = jnp.array([0.5, 2.0, jnp.nan, jnp.nan])
    for given in OFF:
        assert np.isnan(loss.gradient(bad, T, **given)).tolist() == [False, False, True, False]


def test_rows_of_logits_as_optax_has_them():
    nll = lambda f, y: -jnp.take_along_axis(jax.nn.log_softmax(f), y[:, None], axis=1)[:, 0]
    f, u = random.normal(random.key(2), (2, 3, 4))
    y = jnp.array([0, 99, 2])
    ce = create_loss("cross_entropy")
    for junk in (jnp.nan, jnp.inf):
        bad = f.at[1].set(junk)
        for given in ({"mask": jnp.array([True, False, True])}, {"weight": jnp.array([2.0, 0.0, 0.5])}):
            assert_close(CustomLoss(nll).hessian_mv(u, bad, y, **given), ce.hessian_mv(u, f, y.at[1].set(0), **given))
            assert_close(CustomLoss(nll).gradient(bad, y, **given), ce.gradient(f, y.at[1].set(0), **given))


def test_the_slope_of_a_weight_is_the_value():
    w = jnp.array([1.0, 0.0, 2.0, 0.0])
    assert_close(jax.grad(lambda w: by_class.total(F, T, weight=w))(w), by_class.value(F, T))
    mixed = jax.jacobian(lambda w: by_class.gradient(F, T, weight=w))(w)
    assert_close(mixed, jax.jacobian(lambda f: by_class.value(f, T))(F).T)


# What is known by hand


def test_a_sampler_makes_a_likelihood_and_square_roots_stay():
    square = lambda f, y: (f - y) ** 2
    S = lambda u, f, y: 2**0.5 * u
    loss = CustomLoss(square, square_root=S, square_root_transpose=S, sampler=lambda key, f: f + random.normal(key, f.shape) * 0.5**0.5)
    assert loss.is_likelihood and not CustomLoss(square).is_likelihood
    assert jax.tree.unflatten(jax.tree.structure(loss), jax.tree.leaves(loss)).is_likelihood
    for given in ({}, *OFF):
        assert_close(loss.square_root_mv(loss.square_root_transpose_mv(U, F, T, **given), F, T, **given), loss.hessian_mv(U, F, T, **given))
    assert loss.sample(random.key(0), F).shape == F.shape


@pytest.mark.parametrize(("pred", "error", "message"), [({}, ValueError, "pred: got {}, expected at least one array"), (F.astype(jnp.float8_e4m3fn), TypeError, "pred: got dtype float8_e4m3fn")])
def test_predictions_that_no_loss_takes(pred, error, message):
    with pytest.raises(error, match=message):
        CustomLoss(lambda f, y: jnp.zeros(())).value(pred)
