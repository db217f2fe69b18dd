"""Poisson, negative binomial, gamma and Huber: the ends of the floats, digits of large numbers, options of each entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import create_loss
from ggn_nb.tools.testing import assert_close

TWO = {"concentration": 2.0}
L2, L3, INF = np.log(2), np.log(3), np.inf
# name, options, targets, values and slopes at the predictions −10⁴, −10⁴, 10⁴
FAR = [
    ("poisson", {}, [0, 3, 3], [0, 3e4 + np.log(6), INF], [0, -3, INF]),
    ("negative_binomial", TWO, [0, 3, 3], [0, 3e4 + L2, 2e4 - 4 * L2], [0, -3, 2]),
    ("gamma", TWO, [3, 3, 3], [INF, INF, 2e4 - 2 * L2 - L3], [-INF, -INF, 2]),
    ("huber", {}, [0, 0, 0], [9999.5, 9999.5, 9999.5], [-1, -1, 1]),
]


@pytest.mark.parametrize(("name", "options", "target", "value", "slope"), FAR, ids=[case[0] for case in FAR])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_far_predictions(name, options, target, value, slope, dtype):
    """Finite or infinite as the formula says, and never NaN; the slope by the formula and by JAX."""
    loss, f, y, want = create_loss(name, **options), *(jnp.array(a, dtype) for a in ([-1e4, -1e4, 1e4], target, value))
    assert_close(loss.value(f, y), want, rtol=0 if name == "huber" else 1e-6)
    for found in (loss.gradient(f, y), jax.jit(jax.grad(loss.total))(f, y)):
        assert found.dtype == dtype
        assert found.tolist() == slope


COUNTS = np.float32([0, 1, 10, 1e3, 1e6, 1e6, 1e20, 1e6])
DIGITS = {
    "poisson": ({}, np.log(np.maximum(COUNTS, 1)) + np.float32([-3, 0, 1e-3, 0, 0, 1e-3, 0, -2]), COUNTS, 16),
    "negative_binomial": (
        {"concentration": np.float32([1e4, 1e6, 1e6, 1e-3, 1e6, 3.0, 1e8])},
        np.float32([0.3, 0.3, 13.8, 13.9, 0.3, 20.0, 2.0]), np.float32([2, 2, 1e6, 1e6, 0, 1e6, 9]), 32,
    ),
}


@pytest.mark.parametrize("name", DIGITS)
def test_digits_of_large_counts_and_concentrations(name):
    """In float32, right to a few ε, apart from what the last digit of the prediction is worth."""
    options, f, y, few = DIGITS[name]
    wide, at = create_loss(name, **{k: v.astype(np.float64) for k, v in options.items()}), (f.astype(np.float64), y.astype(np.float64))
    want = wide.value(*at)
    error = np.abs(np.asarray(create_loss(name, **options).value(f, y), np.float64) - want)
    assert np.all(error < few * np.finfo(np.float32).eps * (np.abs(want) + np.abs(at[0] * wide.gradient(*at))))


def test_the_curvature_of_a_large_count_by_jax():
    value = lambda f: create_loss("poisson").value(f, jnp.full(1, 1e6))[0]
    at = jnp.log(jnp.full(1, 1e6))
    assert_close(create_loss("poisson").hessian_mv(jnp.ones(1), at), jax.jit(jax.hessian(value))(at)[0], rtol=1e-14)


def test_a_large_concentration_is_close_to_poisson():
    f, y = jnp.array([-0.4, 0.1, 1.0, 1.5, -0.2]), jnp.array([0.0, 1.0, 2.0, 5.0, 20.0])
    assert_close(create_loss("negative_binomial", concentration=1e6).value(f, y), create_loss("poisson").value(f, y), rtol=1e-4)


def test_a_large_delta_is_half_the_squared_error():
    f, y = jnp.array([-0.4, 0.1, 30.0]), jnp.array([0.0, 1.0, -2.0])
    assert_close(create_loss("huber", delta=100.0).value(f, y), (f - y) ** 2 / 2, rtol=1e-14)


def test_slopes_at_the_kinks_of_huber():
    loss, kinks = create_loss("huber"), jnp.array([-1.0, 0.0, 1.0])
    assert loss.gradient(kinks, 0 * kinks).tolist() == jax.grad(loss.total)(kinks, 0 * kinks).tolist() == [-1, 0, 1]


@pytest.mark.parametrize("dtype", [int, jnp.uint8, jnp.float32])
def test_counts_are_numbers_of_every_kind(dtype):
    f, y = jnp.array([-0.4, 0.1, 1.0]), jnp.array([0.0, 1.0, 20.0])
    for name in ("poisson", "negative_binomial"):
        assert_close(create_loss(name).value(f, y.astype(dtype)), create_loss(name).value(f, y))


def test_ends_of_samplers():
    """No counts at a rate of zero, and with a very small concentration most targets are tiny, and none is zero."""
    assert create_loss("poisson").sample(jax.random.key(0), jnp.full(3, -1e4, jnp.float32)).tolist() == [0, 0, 0]
    tiny = create_loss("gamma", concentration=1e-3).sample(jax.random.key(0), jnp.zeros(1000, jnp.float32))
    assert tiny.min() > 0
    assert jnp.median(tiny) < 1e-30


OPTIONS = [("negative_binomial", "concentration"), ("gamma", "concentration"), ("huber", "delta")]
each_option = pytest.mark.parametrize(("name", "option"), OPTIONS, ids=[name for name, _ in OPTIONS])


@each_option
@pytest.mark.parametrize("curvature", ["hessian", "fisher"])
def test_an_option_for_each_entry(name, option, curvature):
    """The product is that of one loss for each of the entries; the Fisher information needs no target."""
    f, u, y = jnp.array([-0.4, 0.1, 1.0]), jnp.array([1.0, -2.0, 0.5]), jnp.array([0.3, 1.5, 20.0])
    numbers = [0.5, 1.5, 3.0]
    make = lambda value: create_loss(name, **{option: value}, curvature=curvature)
    target = [] if curvature == "fisher" else [y]
    alone = [make(number).hessian_mv(*(a[i : i + 1] for a in (u, f, *target))) for i, number in enumerate(numbers)]
    assert_close(make(jnp.array(numbers)).hessian_mv(u, f, *target), jnp.concatenate(alone), rtol=1e-14)


@each_option
def test_options_are_refused(name, option):
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match=f"{option}: got {wrong}, expected finite numbers > 0"):
            create_loss(name, **{option: wrong})
    with pytest.raises(ValueError, match=rf"{option}: got shape \(5,\), expected the last axes"):
        create_loss(name, **{option: jnp.ones(5)}).value(jnp.ones((4, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="curvature: got 'ggn', expected 'hessian' or 'fisher'"):
        create_loss(name, curvature="ggn")


@pytest.mark.parametrize(("name", "wrong", "expected"), [
    ("poisson", -1.0, "counts, or any finite real numbers ≥ 0"), ("poisson", np.nan, "counts"), ("negative_binomial", -1.0, "counts"),
    ("gamma", 0.0, "finite real numbers > 0"), ("huber", np.nan, "finite real numbers")])
def test_targets_are_refused(name, wrong, expected):
    with pytest.raises(ValueError, match=f"target: got values that {name} does not take, expected {expected}"):
        create_loss(name).value(jnp.zeros(2), jnp.array([1.0, wrong]))
