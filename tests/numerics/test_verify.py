"""`verify` is silent on what is right, and speaks of what is wrong: rare outcomes, dtypes, large operators, lists."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import Operator, create_ggn_mv, create_loss, is_psd, multi_head, register_operator, static_field, verify
from ggn_nb.losses import CustomLoss, registered_losses
from ggn_nb.losses.custom import HessianOnly
from ggn_nb.operators.verification import _fisher_check
from ggn_nb.tools.testing import dense_from_mv

FISHER = "H is the Fisher information of the samples"
LOW = {"bfloat16": jnp.bfloat16, "float16": jnp.float16}


def failed(report):
    return [check.name for check in report.checks if not check.passed]


# Rare outcomes

RARE = [
    ("cross_entropy", {}, [[10.0, 0.0, 0.0]] * 3),
    ("cross_entropy", {}, [40.0] + [0.0] * 9),
    ("cross_entropy", {}, [[20.0, 0.0]] * 12),
    ("binary_cross_entropy", {}, [-40.0, -40.0]),
    ("poisson", {}, [-10.0]),
    ("poisson", {}, [-40.0]),
    ("poisson", {}, [10.0]),
    ("negative_binomial", {"concentration": 0.5, "curvature": "fisher"}, [-20.0]),
]


@pytest.mark.combinations("name")
@pytest.mark.parametrize(("name", "options", "pred"), RARE)
def test_rare_outcomes_raise_no_alarm_and_hide_no_error(name, options, pred):
    """As it was, an outcome that no draw shows was an error of any number of standard errors."""
    loss, f = create_loss(name, **options), jnp.array(pred)
    assert failed(verify(loss, f)) == []
    H = np.asarray(dense_from_mv(lambda u: loss.hessian_mv(u, f), f))
    assert not _fisher_check(loss, f, 1.2 * H, jax.random.key(0)).passed


def test_a_wrong_sampler_is_found():
    loss = create_loss("poisson")
    wrong = replace(loss, formulas=replace(loss.formulas, sample=lambda key, f: loss.formulas.sample(key, f + 0.1)))
    assert failed(verify(wrong, jnp.array([1.0]))) == [FISHER]
    same = lambda key, f: jnp.broadcast_to(f[0] + jax.random.normal(key) * 0.5**0.5, f.shape)
    mse = create_loss("mse")
    dependent = replace(mse, formulas=replace(mse.formulas, sample=same))
    assert failed(verify(dependent, jnp.zeros(3))) == [FISHER]


# Every loss, every dtype

OPTIONS = {"student_t": {"df": 3.0, "scale": 0.5}, "gamma": {"concentration": 0.7}, "negative_binomial": {"concentration": 2.0}}
USUAL = [-3.0, 0.0, 2.0]


@pytest.mark.combinations
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", sorted(registered_losses()))
def test_no_false_alarm(name, dtype):
    loss = create_loss(name, **OPTIONS.get(name, {}))
    pairs = [[-3.0, 2.0], [0.0, -1.0], [2.0, 0.5]]
    f = jnp.asarray(USUAL if loss.axis is None else pairs, LOW.get(dtype, dtype))
    assert failed(verify(loss, f)) == []


@pytest.mark.parametrize("margin", [5.0, 12.0, 25.0])
def test_no_false_alarm_of_a_confident_class_in_float32(margin):
    assert failed(verify("cross_entropy", jnp.array([margin, 0.0, -3.0], jnp.float32))) == []


# Operators: asymmetry and nonlinearity, small and large


@register_operator
class Bent(Operator):
    """One thing that is wrong, by name."""

    weights: jax.Array
    kind: str = static_field()

    @property
    def structure(self):
        return jax.ShapeDtypeStruct(self.weights.shape, self.weights.dtype)

    def multiply(self, vec):
        v = self.weights * vec
        wrong = {
            "right": lambda: v,
            "skew": lambda: v + 0.03 * (jnp.roll(vec, 1) - jnp.roll(vec, -1)),
            "shift": lambda: jnp.roll(v, 1),
            "affine": lambda: v + jnp.asarray(0.1, v.dtype),
            "size": lambda: jnp.abs(v),
            "square": lambda: v * v,
        }
        return wrong[self.kind]()


FOUND = {"right": None, "skew": "A is symmetric", "shift": "A is symmetric", "affine": "A is linear", "size": "A is linear", "square": "A is linear"}


@pytest.mark.combinations
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("size", [1, 7, 513, 200_000])
@pytest.mark.parametrize("kind", FOUND)
def test_what_is_no_symmetric_linear_map_is_found(kind, size, dtype):
    """Of many parameters only inner products are seen: a skew part is small beside uᵀAu, and was not noticed."""
    if kind in ("skew", "shift") and size == 1:
        pytest.skip("one number is symmetric")
    found = failed(verify(Bent(jnp.linspace(1.0, 2.0, size, dtype=dtype), kind)))
    assert (found == []) if FOUND[kind] is None else (FOUND[kind] in found)


@pytest.mark.combinations
@pytest.mark.parametrize("width", [2, 200])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_hessian_product_of_ones_own_that_is_not_symmetric_is_found(dtype, width):
    x = jax.random.normal(jax.random.key(0), (6, 3), dtype)
    params = jax.random.normal(jax.random.key(1), (3, width), dtype)
    data = {"input": x, "target": jnp.zeros((6, width), dtype)}
    turned = HessianOnly(lambda jv, pred, target: jv + jnp.asarray(0.3, jv.dtype) * jnp.roll(jv, 1, axis=-1) * jnp.arange(width).astype(jv.dtype))
    G = create_ggn_mv(lambda input, params: input @ params, params, data, turned)
    assert "G is symmetric" in failed(verify(G))


# Lists and numbers of Python


def test_lists_are_read_as_arrays():
    given = {"target": [[0.5], [1.0]], "weight": [1, 2], "mask": [True, False]}
    want = verify("mse", jnp.array([[1.0], [2.0]]), **{name: jnp.array(value) for name, value in given.items()})
    assert verify("mse", [[1.0], [2.0]], **given).checks == want.checks
    assert verify("mse", 1.0, 2).passed
    assert verify(lambda f, y: (f - y) ** 4, jnp.ones(2), [0.5, 1.0], weight=[1.0, 2.0]).passed
    heads = multi_head({"a": "mse", "b": "poisson"})
    assert verify(heads, {"a": 1.0, "b": 0.5}, {"a": 1, "b": 2}, raise_on_failure=True).passed
    assert is_psd("mse", [1.0, 2.0], [0, 1], weight=[1, 2], mask=[True, False])
    assert is_psd(lambda f, y: (f - y) ** 4, jnp.ones(2), [0.5, 1.0], weight=2)


@pytest.mark.parametrize("check", [verify, is_psd])
@pytest.mark.parametrize("name", ["target", "weight", "mask"])
def test_what_is_no_number_is_refused_by_name(check, name):
    for wrong in (["one", "two"], [object(), None]):
        with pytest.raises(TypeError, match=f"^{name}: got"):
            check("mse", jnp.ones(2), **({"target": jnp.ones(2)} | {name: wrong}))
    with pytest.raises(TypeError, match="^pred: got"):
        check("mse", ["one"], [1.0])


# What numbers positions

CLASSES_FIRST = create_loss("cross_entropy", axis=0)


@pytest.mark.parametrize("loss, pred", [
    (CLASSES_FIRST, jnp.eye(4)),
    (multi_head({"a": CLASSES_FIRST, "b": "mse"}), {"a": jnp.eye(4), "b": jnp.eye(4)}),
    (multi_head(["mse", [CLASSES_FIRST]]), [jnp.eye(4), [jnp.eye(4)]]),
    (lambda pred, target: jax.nn.logsumexp(pred - target), jnp.eye(4)),
])
def test_what_is_one_position_is_not_cut(loss, pred):
    target = None if not callable(loss) else jnp.zeros((4, 4))
    assert "H is the same in chunks" not in [check.name for check in verify(loss, pred, target, raise_on_failure=True).checks]


@pytest.mark.parametrize("loss, shapes, axes", [
    ("mse", (5, 4, 3), 3),
    ("cross_entropy", (5, 4, 3), 2),
    (create_loss("cross_entropy", axis=1), (5, 4, 3), 1),
    (lambda pred, target: jnp.sum(pred**4, axis=(1, 2)), (5, 4, 3), 1),
    (lambda pred, target: jnp.sum(pred["a"] ** 4) + jnp.sum(pred["b"] ** 4), {"a": (5, 4), "b": (5,)}, 0),
    (multi_head({"a": "cross_entropy", "b": "mse"}), {"a": (5, 4, 3), "b": (5, 4)}, 2),
    (multi_head({"a": "cross_entropy", "b": "cross_entropy"}), {"a": (5, 4, 3), "b": (5, 6, 3)}, 1),
    (multi_head({"a": "cross_entropy", "b": "mse"}), {"a": (5, 4, 3), "b": ()}, 0),
])
def test_axes_of_positions(loss, shapes, axes):
    pred = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: type(x) is tuple)
    assert create_loss(loss).num_position_axes(pred, None) == axes


# No false alarm, and none that is swallowed

THREE, TWELVE = jnp.array([-1.0, 0.5, 2.0]), jnp.linspace(-2, 3, 12).reshape(3, 4)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("gap", [0, 1e-4, 1e-2])
@pytest.mark.parametrize("name, mean", [("mse", lambda f: f), ("poisson", jnp.exp), ("gamma", jnp.exp), ("negative_binomial", jnp.exp),
                                        ("binary_cross_entropy", jax.nn.sigmoid), ("cross_entropy", jax.nn.softmax)])
def test_a_gradient_may_be_zero(name, mean, gap, dtype):
    """At a fit, or next to one, the gradient is a difference of larger numbers."""
    pred = THREE.astype(dtype)
    target = mean(pred + gap * pred[::-1])
    verify(name, pred, target, raise_on_failure=True)


@pytest.mark.parametrize("loss, pred, target", [
    (create_loss("gaussian", scale=jnp.array([1.0, 2, 3])), THREE, THREE + 1),
    (create_loss("binary_cross_entropy", pos_weight=jnp.array([1.0, 2, 3])), THREE, jnp.array([0.0, 1, 1])),
    (create_loss("gamma", concentration=1 + TWELVE**2), TWELVE, jnp.exp(TWELVE) + 1),
    (create_loss("huber", delta=jnp.array([1.0, 2, 3])), THREE, THREE + 1.5),
], ids=lambda x: getattr(x, "name", ""))  # fmt: skip
def test_options_of_the_shape_of_the_prediction(loss, pred, target):
    verify(loss, pred, target, raise_on_failure=True)


def test_a_square_root_that_always_raises_is_no_missing_one():
    ce = create_loss("cross_entropy")
    apply = lambda method: lambda v, pred, target: getattr(ce, method)(v, pred, target)
    wrong = CustomLoss(lambda pred, target: ce.value(pred, target), apply("square_root_mv"), apply("square_root_transpose_mv"))
    with pytest.raises(ValueError, match=r"^u: got shape \(3, 4\), expected \(3, 3\)"):
        verify(wrong, TWELVE, jnp.arange(3))
