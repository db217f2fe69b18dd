"""Values, and products that could cancel, in float32: against numbers of 60 digits, or against float64."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import create_loss
from ggn_nb.losses.binary_cross_entropy import binary_cross_entropy_value
from ggn_nb.losses.closed_form import registered_losses, registered_rows
from ggn_nb.tools.testing import dense_from_mv

# Loss, options, prediction, target, value by mpmath with 60 digits, and |f ∂ℓ/∂f|. All inputs are floats of float32.
ROWS = [
    ('poisson', {}, 13.8125, 1000000.0, 12.3538792661, 42000.0),
    ('poisson', {}, 13.75, 1000000.0, 2107.54289072, 870000.0),
    ('poisson', {}, 10.0, 1000000.0, 2837544.85045, 9800000.0),
    ('poisson', {}, 27.625, 1000000000000.0, 18090606.5193, 170000000000.0),
    ('poisson', {}, -40.0, 0, 4.24835425529e-18, 1.7e-16),
    ('poisson', {}, -20.0, 3, 61.7917594713, 60.0),
    ('poisson', {}, 0.0, 1, 1.0, 0.0),
    ('poisson', {}, 2.25, 9, 2.03956331644, 1.1),
    ('poisson', {}, 2.75, 15, 2.29190326803, 1.8),
    ('poisson', {}, 6.9140625, 1000, 4.3928319085, 44.0),
    ('negative_binomial', {'concentration': 0.046875}, 0.25, 2, 3.93616955591, 0.0063),
    ('negative_binomial', {'concentration': 0.046875}, 13.8125, 1000000.0, 17.0408169683, 0.002),
    ('negative_binomial', {'concentration': 0.046875}, 14.5, 1000000.0, 17.0496684947, 0.34),
    ('negative_binomial', {'concentration': 0.046875}, -20.0, 1, 20.000000046, 20.0),
    ('negative_binomial', {'concentration': 0.046875}, -3.0, 0, 0.0339251522007, 0.072),
    ('negative_binomial', {'concentration': 0.046875}, 2.25, 9, 5.4252399017, 0.0054),
    ('negative_binomial', {'concentration': 2.5}, 0.25, 2, 1.72191430673, 0.12),
    ('negative_binomial', {'concentration': 2.5}, 13.8125, 1000000.0, 14.3094791894, 0.1),
    ('negative_binomial', {'concentration': 2.5}, 14.5, 1000000.0, 14.7815598425, 18.0),
    ('negative_binomial', {'concentration': 2.5}, -20.0, 1, 20.0000000029, 20.0),
    ('negative_binomial', {'concentration': 2.5}, -3.0, 0, 0.049297803022, 0.15),
    ('negative_binomial', {'concentration': 2.5}, 2.25, 9, 2.81845035, 0.23),
    ('negative_binomial', {'concentration': 10000.0}, 0.25, 2, 1.47724696184, 0.18),
    ('negative_binomial', {'concentration': 10000.0}, 13.8125, 1000000.0, 10.1791751818, 410.0),
    ('negative_binomial', {'concentration': 10000.0}, 14.5, 1000000.0, 1886.30342945, 72000.0),
    ('negative_binomial', {'concentration': 10000.0}, -20.0, 1, 20.0000000021, 20.0),
    ('negative_binomial', {'concentration': 10000.0}, -3.0, 0, 0.0497869444307, 0.15),
    ('negative_binomial', {'concentration': 10000.0}, 2.25, 9, 2.04000123832, 1.1),
    ('negative_binomial', {'concentration': 1000000.0}, 0.25, 2, 1.47717334094, 0.18),
    ('negative_binomial', {'concentration': 1000000.0}, 13.8125, 1000000.0, 10.4391314858, 21000.0),
    ('negative_binomial', {'concentration': 1000000.0}, 14.5, 1000000.0, 114921.969057, 4800000.0),
    ('negative_binomial', {'concentration': 1000000.0}, -20.0, 1, 20.0000000021, 20.0),
    ('negative_binomial', {'concentration': 1000000.0}, -3.0, 0, 0.0497870671285, 0.15),
    ('negative_binomial', {'concentration': 1000000.0}, 2.25, 9, 2.03956769748, 1.1),
    ('negative_binomial', {'concentration': 1073741824.0}, 0.25, 2, 1.47717259794, 0.18),
    ('negative_binomial', {'concentration': 1073741824.0}, 13.8125, 1000000.0, 12.3501407997, 41000.0),
    ('negative_binomial', {'concentration': 1073741824.0}, 14.5, 1000000.0, 297828.597837, 14000000.0),
    ('negative_binomial', {'concentration': 1073741824.0}, -20.0, 1, 20.0000000021, 20.0),
    ('negative_binomial', {'concentration': 1073741824.0}, -3.0, 0, 0.0497870683667, 0.15),
    ('negative_binomial', {'concentration': 1073741824.0}, 2.25, 9, 2.03956332052, 1.1),
    ('gamma', {'concentration': 0.0078125}, 0.0, 1.0, 4.89328976232, 0.0),
    ('gamma', {'concentration': 0.0078125}, 0.0078125, 1.0078125, 4.90107190276, 1.9e-09),
    ('gamma', {'concentration': 0.0078125}, 5.0, 150.0, 9.90392549982, 0.00042),
    ('gamma', {'concentration': 0.0078125}, -3.0, 0.046875, 1.83303287652, 0.0014),
    ('gamma', {'concentration': 0.046875}, 0.0, 1.0, 3.22530617425, 0.0),
    ('gamma', {'concentration': 0.046875}, 0.0078125, 1.0078125, 3.23308831471, 1.1e-08),
    ('gamma', {'concentration': 0.046875}, 5.0, 150.0, 8.23594412877, 0.0025),
    ('gamma', {'concentration': 0.046875}, -3.0, 0.046875, 0.165118832897, 0.0082),
    ('gamma', {'concentration': 2.0}, 0.0, 1.0, 0.61370563888, 0.0),
    ('gamma', {'concentration': 2.0}, 0.0078125, 1.0078125, 0.621487780244, 4.7e-07),
    ('gamma', {'concentration': 2.0}, 5.0, 150.0, 5.62445444451, 0.11),
    ('gamma', {'concentration': 2.0}, -3.0, 0.046875, -2.44300447988, 0.35),
    ('gamma', {'concentration': 15.5}, 0.0, 1.0, -0.446105879725, 0.0),
    ('gamma', {'concentration': 15.5}, 0.0078125, 1.0078125, -0.43832373214, 3.7e-06),
    ('gamma', {'concentration': 15.5}, 5.0, 150.0, 4.56540912875, 0.83),
    ('gamma', {'concentration': 15.5}, -3.0, 0.046875, -3.47878143594, 2.7),
    ('gamma', {'concentration': 100000.0}, 0.0, 1.0, -4.83752336595, 0.0),
    ('gamma', {'concentration': 100000.0}, 0.0078125, 1.0078125, -4.82969514083, 0.024),
    ('gamma', {'concentration': 100000.0}, 5.0, 150.0, 5.84868858458, 5300.0),
    ('gamma', {'concentration': 100000.0}, -3.0, 0.046875, 170.136002438, 18000.0),
    ('gamma', {'concentration': 100000000.0}, 0.0, 1.0, -8.29140183794, 0.0),
    ('gamma', {'concentration': 100000000.0}, 0.0078125, 1.0078125, -8.23753502594, 24.0),
    ('gamma', {'concentration': 100000000.0}, 5.0, 150.0, 5672.29588989, 5300000.0),
    ('gamma', {'concentration': 100000000.0}, -3.0, 0.046875, 178022.444926, 18000000.0),
    ('student_t', {'df': 0.0078125, 'scale': 1.0}, 0.0, 0, 3.12455256759, 0.0),
    ('student_t', {'df': 0.0078125, 'scale': 0.25}, 0.75, 0, 5.2908590077, 1.0),
    ('student_t', {'df': 0.0078125, 'scale': 1.0}, 1e+30, 0, 75.1867421138, 1.0),
    ('student_t', {'df': 0.125, 'scale': 1.0}, 0.0, 0, 1.81362033251, 0.0),
    ('student_t', {'df': 0.125, 'scale': 0.25}, 0.75, 0, 2.84070940703, 1.1),
    ('student_t', {'df': 0.125, 'scale': 1.0}, 1e+30, 0, 80.6955530883, 1.1),
    ('student_t', {'df': 3.0, 'scale': 1.0}, 0.0, 0, 1.00088884962, 0.0),
    ('student_t', {'df': 3.0, 'scale': 0.25}, 0.75, 0, 2.38718321074, 3.0),
    ('student_t', {'df': 3.0, 'scale': 1.0}, 1e+30, 0, 275.113875432, 4.0),
    ('student_t', {'df': 29.875, 'scale': 1.0}, 0.0, 0, 0.927305173474, 0.0),
    ('student_t', {'df': 29.875, 'scale': 0.25}, 0.75, 0, 3.60615781118, 7.1),
    ('student_t', {'df': 29.875, 'scale': 1.0}, 1e+30, 0, 2081.25522028, 31.0),
    ('student_t', {'df': 30.125, 'scale': 1.0}, 0.0, 0, 0.927235766321, 0.0),
    ('student_t', {'df': 30.125, 'scale': 0.25}, 0.75, 0, 3.60907628053, 7.2),
    ('student_t', {'df': 30.125, 'scale': 1.0}, 1e+30, 0, 2097.97022306, 31.0),
    ('student_t', {'df': 1000000.0, 'scale': 1.0}, 0.0, 0, 0.918938783205, 0.0),
    ('student_t', {'df': 1000000.0, 'scale': 0.25}, 0.75, 0, 4.03262867219, 9.0),
    ('student_t', {'df': 1000000.0, 'scale': 1.0}, 1e+30, 0, 62169860.5996, 1000000.0),
    ('student_t', {'df': 10000000000.0, 'scale': 1.0}, 0.0, 0, 0.91893853323, 0.0),
    ('student_t', {'df': 10000000000.0, 'scale': 0.25}, 0.75, 0, 4.03264417053, 9.0),
    ('student_t', {'df': 10000000000.0, 'scale': 1.0}, 1e+30, 0, 575646273307.0, 10000000000.0),
    ('gaussian', {'scale': 1e-14}, 10000.0, 0, 5e+35, 1e+36),
    ('gaussian', {'scale': 1e-14}, -10000.0, 0, 5e+35, 1e+36),
    ('heteroscedastic_gaussian', {}, (10000.0, 80.0), 0, 40.9189385332, 40.0),
    ('heteroscedastic_gaussian', {}, (0.0, -80.0), 0, -39.0810614668, 40.0),
    ('heteroscedastic_gaussian', {}, (1e+25, 120.0), 0, 60.9227723572, 60.0),
]


@pytest.mark.parametrize("name", sorted({row[0] for row in ROWS}))
def test_values(name):
    """Right to 10⁻⁵ of the value, or to what the last digit of the prediction is worth."""
    for _, options, f, y, want, slope in (row for row in ROWS if row[0] == name):
        loss = create_loss(name, **{k: jnp.float32(v) for k, v in options.items()})
        got = loss.value(jnp.float32(f), jnp.float32(y))
        assert got.dtype == jnp.float32
        assert abs(float(got) - want) <= 1e-5 * abs(want) + 1e-6 * (slope + (want != 0 and y > 0)), (options, f, y, float(got), want)
        exact = create_loss(name, **options).value(jnp.float64(f), jnp.float64(y))
        assert abs(float(exact) - want) <= 1e-10 * (abs(want) + slope + 1), (options, f, y)


@pytest.mark.parametrize("name", ["poisson", "negative_binomial", "gamma", "student_t"])
def test_values_are_continuous_and_differentiable(name):
    """Where a formula changes to another: no step in the value, and the slope is the gradient."""
    f, switches = jnp.linspace(-3.0, 6.0, 400), {"concentration": (14.999999, 15.000001), "df": (29.999999, 30.000001)}
    option = {"negative_binomial": "concentration", "gamma": "concentration", "student_t": "df"}.get(name)
    for y in (0.0, 3.0, 14.999999, 15.000001, 40.0):
        if name == "gamma" and y == 0: continue
        target, values = jnp.full_like(f, y), []
        for value in switches.get(option, (None,)):
            loss = create_loss(name, **({} if option is None else {option: value}))
            values.append(loss.value(f, target))
            slope = jax.grad(lambda f: jnp.sum(loss.value(f, target)))(f)
            assert np.allclose(slope, loss.gradient(f, target), rtol=1e-10, atol=1e-10)
        assert np.allclose(values[0], values[-1], rtol=1e-5, atol=1e-5)
    if name in ("poisson", "negative_binomial"):
        loss, at = create_loss(name), jnp.full((2,), 2.5)
        assert abs(np.diff(loss.value(at, jnp.array([15 - 1e-9, 15 + 1e-9])))[0]) < 1e-8


@pytest.mark.parametrize("f", [0.0, 5.0, 15.0, 30.0, 80.0])
@pytest.mark.parametrize("y", [0.0, 1.0])
def test_binary_cross_entropy_where_the_probability_is_near_one(f, y):
    loss, at = create_loss("binary_cross_entropy"), (jnp.float32(f), jnp.float32(y))
    off = np.exp(-f) if y == 1 else np.exp(f)
    want = np.log1p(off), -off / (1 + off) if y == 1 else off / (1 + off)
    for got, exact in zip((loss.value(*at), loss.gradient(*at)), want):
        assert abs(float(got) / exact - 1) < 1e-6


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_binary_cross_entropy_of_certain_labels(dtype):
    """Right or wrong with certainty, at ±10⁴: exact values and slopes, by the formula, by JAX, and of the loss."""
    f, y = jnp.array([1e4, 1e4, -1e4, -1e4], dtype), jnp.array([1, 0, 1, 0], dtype)
    loss, size = create_loss("binary_cross_entropy"), float(f[0])
    value, slope = jax.vmap(jax.value_and_grad(binary_cross_entropy_value))(f, y)
    for got in (value, loss.value(f, y)):
        assert got.dtype == dtype
        assert got.tolist() == [0, size, size, 0]
    for got in (slope, loss.gradient(f, y), jax.grad(loss.total)(f, y)):
        assert got.dtype == dtype
        assert got.tolist() == [0, 1, -1, 0]


def test_root_of_binary_cross_entropy():
    """S² agrees with H for as long as H is a float32 number."""
    loss, f = create_loss("binary_cross_entropy"), jnp.linspace(-86, 86, 1001, dtype=jnp.float32)
    one = jnp.ones_like(f)
    np.testing.assert_allclose(loss.square_root_mv(one, f) ** 2 / loss.hessian_mv(one, f), 1, rtol=4e-6)


def test_derivative_of_the_curvature_of_binary_cross_entropy():
    """p (1 − p) (1 − 2p), and zero, not NaN, far out."""
    loss, f = create_loss("binary_cross_entropy"), jnp.array([-3.0, -0.2, 0.0, 1.5, 1e4, -1e4])
    p = jax.nn.sigmoid(f)
    slope = jax.grad(lambda f: jnp.sum(loss.hessian_mv(jnp.ones_like(f), f)))(f)
    np.testing.assert_allclose(slope, p * (1 - p) * (1 - 2 * p), rtol=1e-14, atol=1e-17)
    assert slope[4:].tolist() == [0, 0]


@pytest.mark.parametrize("s", [-80.0, -1.0, 0.0, 2.0, 80.0])
def test_fisher_products_of_extreme_variances(s):
    """Each entry by itself, for log-variances whose exponentials are near the ends of float32."""
    f, u = np.float32([[0.3, s], [-2.0, s]]), np.float32([[1.7, 0.6], [-0.1, 3.0]])
    got = create_loss("heteroscedastic_gaussian").hessian_mv(jnp.asarray(u), jnp.asarray(f))
    want = u.astype(np.float64) * [np.exp(-s), 0.5]
    assert got.dtype == jnp.float32
    assert np.max(np.abs(np.asarray(got, np.float64) / want - 1)) < 2**-20


# Cross-entropy: S and its transpose at confident classes, and H of a vector with a large constant


def softmax(f):
    """In float64, with 1 − p of each class: what the others have."""
    e = np.exp(np.asarray(f, np.float64) - np.max(f))
    others = np.array([np.delete(e, i).sum() for i in range(len(e))])
    return e / e.sum(), others / e.sum()


@pytest.mark.parametrize("margin", [0.0, 3.0, 8.0, 15.0, 22.0, 30.0])
def test_roots_of_confident_cross_entropy(margin):
    f = [margin, 0.0, -3.0]
    p, rest = softmax(f)
    q = np.sqrt(p)
    b = np.append(1, q[1:] / (1 + q[0]))
    S = q[:, None] * (np.eye(3)[:, 1:] - np.outer(b, q[1:]))
    np.testing.assert_allclose(S @ S.T, np.diag(p * rest) - np.outer(p, p) * (1 - np.eye(3)), rtol=1e-12)
    loss, at = create_loss("cross_entropy"), jnp.array(f, jnp.float32)
    got = dense_from_mv(lambda u: loss.square_root_mv(u, at), at[1:])
    transposed = dense_from_mv(lambda u: loss.square_root_transpose_mv(u, at), at)
    assert np.max(np.abs(np.asarray(got, np.float64) / S - 1)) < 3e-6
    assert np.max(np.abs(np.asarray(transposed, np.float64) / S.T - 1)) < 3e-6


def test_a_constant_in_the_vector_is_not_seen():
    f, u = np.float32([0.1, 0.0, -0.1]), np.float32([10001.0, 10002.0, 10003.0])
    p, _ = softmax(f)
    w = u.astype(np.float64) - 10002
    q = np.sqrt(p)
    a = np.array([q[0], p[1] / (1 + q[0]), p[2] / (1 + q[0])])
    for method, want in (("hessian_mv", p * (w - p @ w)), ("square_root_transpose_mv", (q * (w - a @ w))[1:])):
        got = getattr(create_loss("cross_entropy"), method)(jnp.asarray(u), jnp.asarray(f))
        assert np.max(np.abs(np.asarray(got, np.float64) - want)) < 1e-6 * np.max(np.abs(want))


# The loss that CONTRIBUTING.md writes as an example, from its own text


@pytest.fixture
def example(monkeypatch):
    """The names that the page's Python blocks define."""
    import ggn_nb.losses.closed_form as closed_form

    text = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
    monkeypatch.setattr(closed_form, "_MAKERS", registered_losses())
    monkeypatch.setattr(closed_form, "_ROWS", registered_rows())
    names = {"__name__": "example"}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
    return names


def test_the_example_of_the_contributing_page_is_stable(example):
    f = np.concatenate([[0.0], np.geomspace(1e-6, 40.0, 60), [85.0, 100.0]]).astype(np.float32)
    r = f.astype(np.float64)
    value = np.where(r < 1e-2, r**2 / 2 - r**4 / 12, r + np.log1p(np.exp(-2 * r)) - np.log(2))
    want = {"value": value, "gradient": np.tanh(r), "curvature": 4 / (np.exp(r) + np.exp(-r)) ** 2, "deviation": 2 / (np.exp(r) + np.exp(-r))}
    tiny = np.finfo(np.float32).tiny
    for name, exact in want.items():
        for sign in (1, -1):
            got = np.asarray(example[f"log_cosh_{name}"](jnp.asarray(sign * f), jnp.zeros_like(f)), np.float64)
            exact_here = sign * exact if name == "gradient" else exact
            assert np.all(np.abs(got - exact_here) <= 1e-5 * np.abs(exact_here) + 4 * tiny), name
    loss = example["log_cosh"]()
    at = jnp.asarray(f)
    assert np.allclose(jax.grad(lambda f: jnp.sum(loss.value(f, jnp.zeros_like(f))))(at), np.tanh(r), rtol=1e-5, atol=0)


@pytest.mark.parametrize("margin", [0.0, 1.0, 5.0, 12.0, 20.0, 40.0, 80.0])
@pytest.mark.parametrize("label", [0, 1])
def test_cross_entropy_of_a_nearly_certain_class(margin, label):
    """Value and gradient relative to their own size: 2 e^(−margin) where the label is the certain class."""
    f = np.array([margin, 0.0, 0.0])
    rest = 2 * np.exp(-margin)
    p = np.array([1.0, np.exp(-margin), np.exp(-margin)]) / (1 + rest)
    value = (f.max() - f + np.log1p(rest))[label]
    gradient = p - np.eye(3)[label]
    if label == 0: gradient[0] = -rest / (1 + rest)
    loss, pred = create_loss("cross_entropy"), jnp.asarray(f, jnp.float32)
    np.testing.assert_allclose(float(loss.value(pred, jnp.array(label))), value, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(loss.gradient(pred, jnp.array(label))), gradient, rtol=2e-6)


@pytest.mark.parametrize(("a", "y", "f"), [
    (0.01, 1e30, -20.0), (1e30, 1e-30, 40.0), (1e30, 1e-30, -80.0), (1e-30, 1e-30, -200.0), (1e30, 1e30, 200.0), (2.0, 3.0, 0.5),
])
def test_gamma_is_finite_wherever_it_fits(a, y, f):
    loss, one = create_loss("gamma", concentration=a), jnp.ones(1, jnp.float32)
    F, Y = jnp.full(1, f, jnp.float32), jnp.full(1, y, jnp.float32)
    x, d = a * y * np.exp(-f), np.log(y) - f
    np.testing.assert_allclose(loss.hessian_mv(one, F, Y), x, rtol=1e-6)
    np.testing.assert_allclose(loss.square_root_mv(loss.square_root_transpose_mv(one, F, Y), F, Y), x, rtol=2e-6)
    np.testing.assert_allclose(loss.gradient(F, Y), a - x, rtol=2e-6)
    np.testing.assert_allclose(jax.grad(loss.total)(F, Y), a - x, rtol=2e-6)
    np.testing.assert_allclose(jax.grad(lambda F: loss.hessian_mv(one, F, Y).sum())(F), -x, rtol=2e-6)
    value = loss.value(F, Y)
    assert np.isfinite(value).all()
    if x > 1e10: np.testing.assert_allclose(value, a * (np.expm1(d) - d), rtol=2e-6)
