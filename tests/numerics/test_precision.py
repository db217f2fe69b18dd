"""Half, single and double precision, extreme logits, and JAX without 64-bit numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import LOSSES, POLICIES, batched, oracle_of, reference, run_python, targets
from ggn_nb import create_ggn_mv, create_ggn_mv_without_data, create_loss_hessian_mv
from ggn_nb.losses.binary_cross_entropy import binary_cross_entropy
from ggn_nb.losses.common import first_columns
from ggn_nb.losses.cross_entropy import cross_entropy
from ggn_nb.losses.mse import mse
from ggn_nb.tools.testing import assert_close

# For a sum of thousands of samples: half-precision results are off by rounding, not by the number of samples.
BOUND = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2}
dtypes = pytest.mark.parametrize("dtype", BOUND)
MANY = 4096


def to(dtype, tree):
    """`tree` with its floating-point leaves in `dtype`."""
    return jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def two_layers(input, params):
    hidden = jnp.tanh(input @ params["w"] + params["b"])
    return hidden @ params["v"]


def shift(input, params):
    return input[:3] + params["b"]


def scale(input, params):
    return input[:3] * params["b"]


def embed(input, params):
    return params["table"][(input[0] > 0).astype(jnp.int32)]


def loop(input, params):
    return jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h * params["b"]), input[:3])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


SUMS = {
    two_layers: {"w": normal(1, 4, 3), "b": normal(2, 3), "v": normal(3, 3, 3)},
    shift: {"b": normal(4, 3)},
    scale: {"b": 1.0 + normal(5, 3) / 4},
    loop: {"b": 1.0 + normal(6, 3) / 4},
    embed: {"table": normal(7, 2, 3)},
}


# A scatter-add sums in the table's own dtype, here as in a gradient (said in nbs/07_ggn.ipynb): no half-precision tables.
@pytest.mark.combinations
@pytest.mark.parametrize(
    ("dtype", "model_fn"),
    [(dtype, fn) for dtype in ("float32", "bfloat16") for fn in SUMS if (dtype, fn) != ("bfloat16", embed)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize(
    ("loss", "linearize", "vmap_over_data"),
    [("cross_entropy", "cached", True), ("mse", "recomputed", False), ("optax", "recomputed", True)],
)
def test_sums_over_thousands_of_samples(dtype, model_fn, loss, linearize, vmap_over_data):
    """Against the float64 oracle at the same rounded numbers."""
    rng = np.random.default_rng(8)
    params, x = to(dtype, (SUMS[model_fn], 1.0 + normal(9, MANY, 4)))
    vec = jax.tree.map(lambda p: jnp.ones_like(p) + jnp.arange(p.size, dtype=p.dtype).reshape(p.shape) ** 2 / 4, params)
    y = targets(rng, loss, (MANY, 3))
    data = {"input": x, "target": to(dtype, y)}
    fn = model_fn if vmap_over_data else batched(model_fn)
    G = create_ggn_mv(fn, params, data, LOSSES[loss], linearize=linearize, vmap_over_data=vmap_over_data)

    exact = to("float64", (params, data, vec))
    assert_close(to("float64", G(vec)), exact_product(model_fn, *exact, reference(loss)), rtol=BOUND[dtype])
    assert jax.tree.map(lambda leaf: leaf.dtype, G(vec)) == jax.tree.map(lambda leaf: leaf.dtype, params)


def exact_product(model_fn, params, data, vec, loss):
    """The dense matrix, summed over the samples, times the vector."""
    matrix = oracle_of(model_fn, params, data, loss)
    flat, unravel = jax.flatten_util.ravel_pytree(vec)
    return unravel(matrix @ flat)


WITH_OPTIONS = [cross_entropy(label_smoothing=0.1), binary_cross_entropy(class_weight=3)]


@pytest.mark.parametrize("loss", [mse(), cross_entropy(), binary_cross_entropy(), *WITH_OPTIONS], ids=repr)
def test_half_precision_is_rounded_once(loss):
    """Products over 4096 classes are computed in float32: each entry is as near as bfloat16 can be."""
    f, v = to("bfloat16", (normal(11, MANY), 1.0 + normal(12, MANY)))
    for mv, u in ((loss.hessian_mv, v), (loss.square_root_mv, first_columns(loss, v, f)), (loss.square_root_transpose_mv, v)):
        got, wide = mv(u, f), mv(*to("float64", (u, f)))
        assert got.dtype == u.dtype
        assert jnp.all(jnp.abs(got.astype(jnp.float64) - wide) <= 2.0**-8 * jnp.abs(wide) + 1e-6 * jnp.max(jnp.abs(wide)))


def test_many_entries_of_a_custom_loss_in_half_precision():
    """The value of a custom loss is summed in float32, and so is what its derivative shares."""
    loss = lambda f, y: jnp.logaddexp(f, jnp.zeros_like(f)) * jnp.mean(f)
    f, v = to("bfloat16", (1.0 + normal(13, MANY), normal(14, MANY)))
    wide = create_loss_hessian_mv(loss)(*to("float64", (v, f)))
    got = create_loss_hessian_mv(loss)(v, f)
    assert got.dtype == jnp.bfloat16
    assert_close(to("float64", got), wide, rtol=5e-2)


@dtypes
@pytest.mark.parametrize("weight", [None, np.array([0.5, 3.0])], ids=["", "weight"])
def test_weights_of_classes_and_samples_keep_the_dtype(dtype, weight):
    """Options and weights in double precision do not change the dtype of a result."""
    f, v = to(dtype, (normal(23, 2, 3), normal(24, 2, 3)))
    labels, probabilities = jnp.array([0, 2]), to(dtype, jnp.abs(jnp.sin(normal(25, 2, 3))))
    classes = np.array([0.5, 2.0, 3.0])
    for loss, y in [(cross_entropy(class_weight=classes, label_smoothing=0.2), labels),
                    (binary_cross_entropy(pos_weight=classes, class_weight=[1, 2, 3]), probabilities)]:
        for method in ("hessian_mv", "square_root_mv", "square_root_transpose_mv"):
            mv, u = getattr(loss, method), first_columns(loss, v, f) if method == "square_root_mv" else v
            got, wide = mv(u, f, y, weight=weight), mv(*to("float64", (u, f, y)), weight=weight)
            assert got.dtype == f.dtype
            assert_close(to("float64", got), wide, rtol=2 * BOUND[dtype])
        for of in (loss.value, loss.gradient):
            got, wide = of(f, y, weight=weight), of(*to("float64", (f, y)), weight=weight)
            assert got.dtype == f.dtype
            assert_close(to("float64", got), wide, rtol=2 * BOUND[dtype])


@dtypes
@pytest.mark.parametrize("loss", LOSSES)
def test_hessian_products_keep_the_dtype(dtype, loss):
    rng = np.random.default_rng(15)
    f, v = to(dtype, (normal(16, 2, 3), normal(17, 2, 3)))
    y = to(dtype, targets(rng, loss, (2, 3)))
    got = create_loss_hessian_mv(LOSSES[loss])(v, f, y)
    wide = create_loss_hessian_mv(reference(loss))(*to("float64", (v, f, y)))
    assert got.dtype == f.dtype
    assert_close(to("float64", got), wide, rtol=2 * BOUND[dtype])


@pytest.mark.parametrize("linearize", POLICIES)
def test_parameters_of_several_dtypes(linearize):
    params = {"half": normal(18, 3, 3).astype(jnp.bfloat16), "single": normal(19, 3).astype(jnp.float32), "double": normal(20, 3)}

    def model_fn(input, params):
        wide = to("float64", params)
        return jnp.tanh(input @ wide["half"] + wide["single"]) * wide["double"]

    data = {"input": normal(21, 4, 3), "target": jnp.array([0, 1, 2, 0])}
    G = create_ggn_mv(model_fn, params, data, "cross_entropy", linearize=linearize)
    exact = exact_product(model_fn, *to("float64", (params, data, params)), reference("cross_entropy"))
    got = G(params)
    assert jax.tree.map(lambda leaf: leaf.dtype, got) == jax.tree.map(lambda leaf: leaf.dtype, params)
    for name in params:
        assert_close(got[name].astype(jnp.float64), exact[name], rtol=BOUND[params[name].dtype.name])


@dtypes
def test_factor_neither_changes_the_dtype_nor_overflows_before_it_is_used(dtype):
    x = jnp.asarray([[1.0, 2.0]], dtype)
    data, params = {"input": x, "target": None}, jnp.ones((2, 1), dtype)
    G = create_ggn_mv(lambda input, params: input @ params, params, data, "none", num_total_samples=300, num_curv_samples=3)
    assert_close(G(params), 100 * jnp.asarray([[3.0], [6.0]], dtype))


# --- extreme logits


@dtypes
@pytest.mark.parametrize(
    ("logits", "p"),
    [
        ([1e4, -1e4, 0.0], [1, 0, 0]),
        ([-1e4, -1e4, 1e4], [0, 0, 1]),
        ([1e4, 1e4, -1e4], [0.5, 0.5, 0]),
        ([-1e4, -1e4, -1e4, -1e4], [0.25, 0.25, 0.25, 0.25]),
    ],
    ids=str,
)
def test_cross_entropy_of_extreme_logits(dtype, logits, p):
    f, p = jnp.asarray(logits, dtype), np.asarray(p, float)
    H = np.diag(p) - np.outer(p, p)
    for v in np.concatenate([np.eye(len(p)), np.ones((1, len(p))), [np.arange(len(p)) * 1.0]]):
        got = cross_entropy().hessian_mv(jnp.asarray(v, dtype), f)
        assert_close(got, jnp.asarray(H @ v, dtype), atol=1e-7)
        again = cross_entropy().square_root_mv(cross_entropy().square_root_transpose_mv(jnp.asarray(v, dtype), f), f)
        assert_close(again, jnp.asarray(H @ v, dtype), atol=1e-7 if dtype in ("float32", "float64") else 5e-3)


@dtypes
def test_value_and_gradient_of_cross_entropy_at_extreme_logits(dtype):
    f, label = jnp.asarray([[1e4, 0.0, -1e4], [1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], dtype), jnp.array([2, 0, 1])
    assert_close(cross_entropy().value(f, label), jnp.asarray([2e4, 0.0, 1e4], dtype))
    assert_close(cross_entropy().gradient(f, label), jnp.asarray([[1, 0, -1], [0, 0, 0], [0, -1, 1]], dtype))


@dtypes
def test_binary_cross_entropy_of_extreme_logits(dtype):
    f, v = jnp.asarray([1e4, -1e4, 0.0], dtype), jnp.asarray([1.0, -2.0, 3.0], dtype)
    for mv in (binary_cross_entropy().hessian_mv, create_loss_hessian_mv("binary_cross_entropy")):
        assert_close(mv(v, f), jnp.asarray([0, 0, 0.75], dtype))
    for S in (binary_cross_entropy().square_root_mv, binary_cross_entropy().square_root_transpose_mv):
        assert_close(jnp.abs(S(v, f)), jnp.asarray([0, 0, 1.5], dtype))


@dtypes
def test_mse_of_extreme_predictions(dtype):
    f, v = jnp.asarray([1e4, -1e4, 1e4], dtype), jnp.asarray([1.0, -2.0, 0.5], dtype)
    y = jnp.asarray([-1e4, -1e4, 0.0], dtype)
    assert_close(mse().hessian_mv(v, f), jnp.asarray([2.0, -4.0, 1.0], dtype))
    assert_close(mse().value(f, y), jnp.asarray([4e8, 0.0, 1e8], dtype))
    for slope in (mse().gradient(f, y), jax.grad(mse().total)(f, y)):
        assert_close(slope, jnp.asarray([4e4, 0.0, 2e4], dtype))


@pytest.mark.parametrize("gap", [0.5, 10.0, 40.0, 80.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saturated_curvature_keeps_its_relative_accuracy(gap, dtype):
    """For two classes H = p (1 − p) [[1, −1], [−1, 1]]; p (1 − p) = 1 / (2 + 2 cosh gap) however small."""
    curvature = 1 / (2 + 2 * np.cosh(gap))
    u, f = jnp.asarray([1.0, -1.0], dtype), jnp.asarray([gap, 0.0], dtype)
    rtol = 1e-10 if dtype == "float64" else 1e-4
    assert_close(cross_entropy().hessian_mv(u, f), jnp.asarray(2 * curvature * np.array([1.0, -1.0]), dtype), rtol=rtol)
    for sign in (1.0, -1.0):
        got = binary_cross_entropy().hessian_mv(u, sign * gap * jnp.ones(2, dtype))
        assert_close(got, jnp.asarray(curvature * np.array([1.0, -1.0]), dtype), rtol=rtol)


# --- cancellation in the cross-entropy: (H u)_k = p_k Σ_j p_j (u_k − u_j), in which no sum cancels by itself

NOISE, SCATTERED = np.random.default_rng(0).standard_normal((2, 1000))
SEVENTH = np.arange(1000) == 7
CANCELLING = {
    "open, large constant": ([0.1, 0, -0.1], [10_001, 10_002, 10_003]),
    "confident, large constant": ([15, 0, -3], [10_001, 10_002, 10_003]),
    "confident, one entry": ([15, 0, -3], [1, 0, 0]),
    "confident": ([25, 0, -3], [1, 2, -1]),
    "very confident": ([80, 0, -3], [1, 2, -1]),
    "just more than half": ([0.05, 0, -10], [10_001, 10_002, 10_003]),
    "just less than half": ([0, 0, -10], [10_001, 10_002, 10_003]),
    "equal logits": ([3, 3, 3, 3], [10_001, 10_002, 10_003, 10_000.5]),
    "constant vector": ([0.1, 0, -0.1], [1e4, 1e4, 1e4]),
    "1000 equal logits": (np.zeros(1000), 1e4 + NOISE),
    "1000 logits": (SCATTERED, 1e4 + NOISE),
    "1000 logits, confident": (SCATTERED + 25 * SEVENTH, 1e4 + NOISE),
    "1000 logits, an outlier": (1e-4 * SEVENTH, 1e4 * SEVENTH + 1e-3 * NOISE),
}
cancelling = pytest.mark.parametrize("case", CANCELLING)


def probabilities(f):
    p = np.exp(f - f.max())
    return p / p.sum()


def single_and_double(case):
    """Vector and logits in float32, and the same numbers in float64."""
    u, f = (jnp.asarray(a, jnp.float32) for a in CANCELLING[case][::-1])
    return u, f, np.asarray(u, np.float64), np.asarray(f, np.float64)


def relative_to(size, got, want):
    return np.max(np.abs(np.asarray(got, np.float64) - want) / np.maximum(size, 1e-300))


@cancelling
def test_entries_of_a_hessian_product_keep_their_digits(case):
    """Each entry within 2e-5 of itself, and all within 1e-6 of the largest."""
    u, f, wide_u, wide_f = single_and_double(case)
    p = probabilities(wide_f)
    want = p * ((wide_u[:, None] - wide_u) @ p)
    for got in (cross_entropy().hessian_mv(u, f), jax.jit(cross_entropy().hessian_mv)(u, f)):
        assert relative_to(np.abs(want), got, want) < 2e-5
        assert relative_to(np.max(np.abs(want)), got, want) < 1e-6


@cancelling
def test_entries_of_a_transposed_square_root_keep_their_digits(case):
    """q_k Σ_j a_j (v_k − v_j) at each class but the most likely one, m: a is p/(1 + q_m), and q_m at m."""
    u, f, wide_u, wide_f = single_and_double(case)
    q, m = np.sqrt(probabilities(wide_f)), np.argmax(wide_f)
    a = np.where(np.arange(len(q)) == m, q, q**2 / (1 + q[m]))
    want = np.delete(q * ((wide_u[:, None] - wide_u) @ a), m)
    got = cross_entropy().square_root_transpose_mv(u, f)
    assert relative_to(np.abs(want), got, want) < 2e-5
    assert relative_to(np.max(np.abs(want)), got, want) < 1e-6


@cancelling
def test_entries_of_a_square_root_keep_their_digits(case):
    """S u is right to the rounding of the terms S_kj u_j."""
    u, f, wide_u, wide_f = single_and_double(case)
    u, wide_u = u[:-1], wide_u[:-1]
    q, m = np.sqrt(probabilities(wide_f)), np.argmax(wide_f)
    v = q + np.eye(len(q))[m]
    S = q[:, None] * np.delete(np.eye(len(q)) - np.outer(v, v) / v[m], m, axis=1)
    got = cross_entropy().square_root_mv(u, f)
    assert relative_to(np.abs(S) @ np.abs(wide_u), got, S @ wide_u) < 2e-6


def test_formulas_that_are_not_used_lose_the_digits():
    """What the tests above would say of p (u − Σ p u), and of diag(q) − p qᵀ, a root with C columns."""
    u, f, wide_u, wide_f = single_and_double("open, large constant")
    p32, p = jax.nn.softmax(f), probabilities(wide_f)
    want = p * ((wide_u[:, None] - wide_u) @ p)
    assert relative_to(np.max(np.abs(want)), p32 * (u - jnp.sum(p32 * u)), want) > 1e-4
    u, f, _, wide_f = single_and_double("confident, one entry")
    q32, p = jnp.exp(jax.nn.log_softmax(f) / 2), probabilities(wide_f)
    want = np.sqrt(p[0]) * (p[1] + p[2])
    assert abs(float(q32[0] - jax.nn.softmax(f)[0] * q32[0]) / want - 1) > 0.1


@pytest.mark.parametrize("linearize", POLICIES)
@dtypes
def test_operator_at_extreme_logits(dtype, linearize):
    x = jnp.asarray([[1.0, 0.0], [0.0, 1.0]], dtype)
    params = jnp.asarray([[1e4, -1e4, 0.0], [1e4, 1e4, -1e4]], dtype)
    vec = jnp.asarray([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0]], dtype)
    data = {"input": x, "target": jnp.array([1, 2])}
    G = create_ggn_mv(lambda input, params: input @ params, params, data, "cross_entropy", linearize=linearize)
    assert_close(G(vec), jnp.asarray([[0, 0, 0], [-0.25, 0.25, 0]], dtype), atol=1e-7)


@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 1), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
def test_a_softmax_over_one_class_has_no_curvature(shape, level):
    f, v = jnp.full(shape, level), normal(22, *shape)
    for mv in (cross_entropy().hessian_mv, cross_entropy().square_root_mv, cross_entropy().square_root_transpose_mv):
        assert_close(mv(v, f), jnp.zeros(shape))
    mv = create_ggn_mv_without_data(lambda input, params: input * params, jnp.ones(shape), "cross_entropy", 1.0)
    got = mv(jnp.ones(shape), {"input": jnp.ones((2, *shape)), "target": None})
    assert_close(got, jnp.zeros(shape))


# --- JAX without 64-bit numbers

SINGLE = """
import jax, jax.numpy as jnp, numpy as np
from ggn_nb import create_ggn_mv, create_ggn_mv_without_data
assert not jax.config.jax_enable_x64
rng = np.random.default_rng(0)
X, w, v = rng.standard_normal((6, 3)), rng.standard_normal(3), rng.standard_normal(3)
model_fn = lambda input, params: input @ params["w"] * params["c"]
params, vec, data = {"w": w, "c": 1.0}, {"w": v, "c": 0.0}, {"input": X, "target": np.zeros(6)}
expected = 2 * X.T @ (X @ v)
for linearize in ("cached", "recomputed"):
    for single in (False, True):
        cast = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float32), tree) if single else tree
        G = create_ggn_mv(model_fn, cast(params), cast(data), "mse", num_total_samples=12, linearize=linearize)
        for got in (G(cast(vec))["w"], jax.jit(G)(cast(vec))["w"], jax.jit(lambda G, v: G(v))(G, cast(vec))["w"]):
            assert got.dtype == jnp.float32, got.dtype
            np.testing.assert_allclose(got, 2 * expected, rtol=1e-4)
p = jax.nn.softmax(jnp.arange(3.0))
mv = create_ggn_mv_without_data(lambda input, params: params * input, jnp.arange(3.0), "cross_entropy", 1)
got = mv(jnp.array([1.0, 0, 0]), {"input": jnp.ones((2, 1)), "target": None})
np.testing.assert_allclose(got, 2 * (np.diag(p) - np.outer(p, p))[0], rtol=1e-5)
print("reached the end")
"""


def test_without_64_bit_numbers():
    printed = run_python(SINGLE, JAX_ENABLE_X64="0", JAX_NUMPY_RANK_PROMOTION="allow")
    assert "reached the end" in printed
    assert "Warning" not in printed
