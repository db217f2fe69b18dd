"""The operator under JAX's transformations, as an argument, and with unusual models, parameters and data."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import POLICIES, baked_in, batched, dense_of, inner, linear, log_softmax_at, oracle_of, random_like, reference, run_python
from ggn_nb import (
    create_fisher_mv,
    create_fisher_mv_without_data,
    create_ggn_mv,
    create_ggn_mv_without_data,
    create_hessian_mv,
    create_hessian_mv_without_data,
    eigsh,
    logdet,
    multi_head,
    solve_many,
    verify,
)
from ggn_nb import solve as solve_damped
from ggn_nb.losses.create import LossHessian
from ggn_nb.losses.cross_entropy import cross_entropy
from ggn_nb.losses.custom import CustomLoss, HessianOnly
from ggn_nb.losses.heteroscedastic_gaussian import heteroscedastic_gaussian
from ggn_nb.losses.student_t import student_t
from ggn_nb.tools.testing import assert_close, dense_ggn
from ggn_nb.tools.timing import count_compiles
from jax.tree_util import Partial

RNG = np.random.default_rng(5)
PARAMS = {"w": RNG.standard_normal((3, 4)), "v": RNG.standard_normal((4, 3))}
DATA = {"input": RNG.standard_normal((5, 3)), "target": np.array([0, 1, 2, 1, 0])}
MANY = [jax.tree.map(lambda leaf, k=k: leaf * (0.5 + k / 10), PARAMS) for k in range(10)]

policies = pytest.mark.parametrize("linearize", POLICIES)
losses = pytest.mark.parametrize("loss", ["cross_entropy", log_softmax_at], ids=["built-in", "custom"])


def net(input, params):
    """A network with one hidden layer."""
    return jnp.tanh(input @ params["w"]) @ params["v"]


def make(params=PARAMS, loss="cross_entropy", model_fn=net, data=DATA, **options):
    return create_ggn_mv(model_fn, params, data, loss, **options)


def dense(params=PARAMS, model_fn=net, data=DATA, loss="cross_entropy"):
    """The oracle for `make`."""
    return oracle_of(model_fn, params, data, reference(loss))


def apply(G, vec):
    return G(vec)


def solve(G, b):
    """Damped conjugate gradients."""
    return jax.scipy.sparse.linalg.cg(lambda v: jax.tree.map(lambda g, x: g + x, G(v), v), b, maxiter=3)[0]


# --- transformations


@policies
@losses
def test_jit_of_the_operator_gives_the_same(linearize, loss):
    G = make(loss=loss, linearize=linearize)
    vec = random_like(PARAMS)
    assert_close(jax.jit(G)(vec), G(vec))
    assert_close(jax.jit(apply)(G, vec), G(vec))
    assert_close(jax.jit(lambda v: G(v))(vec), G(vec))
    expected = dense(loss="cross_entropy") @ jax.flatten_util.ravel_pytree(vec)[0]
    assert_close(jax.flatten_util.ravel_pytree(G(vec))[0], expected)


@policies
def test_creation_inside_jit(linearize):
    vec = random_like(PARAMS)
    run = jax.jit(lambda params, data, v: make(params, data=data, linearize=linearize)(v))
    assert_close(run(PARAMS, DATA, vec), make()(vec))
    G = jax.jit(lambda params: make(params, linearize=linearize))(PARAMS)
    assert_close(G(vec), make()(vec))


@policies
def test_vmap_over_vectors(linearize):
    G = make(linearize=linearize)
    vecs = [random_like(PARAMS, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *vecs)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(G, vecs))
    assert_close(jax.vmap(G)(stacked), expected)
    assert_close(jax.jit(jax.vmap(apply, in_axes=(None, 0)))(G, stacked), expected)
    assert_close(jax.lax.map(G, stacked), expected)


@policies
@losses
def test_grad_through_the_product_with_respect_to_the_vector(linearize, loss):
    G, vec = make(loss=loss, linearize=linearize), random_like(PARAMS)
    twice = jax.tree.map(lambda leaf: 2.0 * leaf, G(vec))
    assert_close(jax.grad(lambda v: inner(v, G(v)))(vec), twice)
    assert_close(jax.jvp(G, (vec,), (vec,))[1], G(vec))
    assert_close(jax.linear_transpose(G, vec)(vec)[0], G(vec))


@policies
@losses
def test_grad_through_the_product_with_respect_to_the_parameters(linearize, loss):
    vec = random_like(PARAMS)
    flat = jax.flatten_util.ravel_pytree(vec)[0]
    ours = jax.grad(lambda p: inner(vec, make(p, loss, linearize=linearize)(vec)))
    theirs = jax.grad(lambda p: flat @ dense_ggn(net, p, jax.tree.map(jnp.asarray, DATA), log_softmax_at) @ flat)
    params = jax.tree.map(jnp.asarray, PARAMS)
    assert_close(ours(params), theirs(params))


@policies
def test_grad_with_respect_to_inputs_and_targets(linearize):
    vec, quartic = random_like(PARAMS), lambda f, y: (f - y) ** 4
    data = {"input": jnp.asarray(DATA["input"]), "target": jnp.ones((5, 3))}
    flat = jax.flatten_util.ravel_pytree(vec)[0]
    ours = jax.grad(lambda d: inner(vec, make(loss=quartic, data=d, linearize=linearize)(vec)))
    params = jax.tree.map(jnp.asarray, PARAMS)
    theirs = jax.grad(lambda d: flat @ dense_ggn(net, params, d, quartic) @ flat)
    assert_close(ours(data), theirs(data), rtol=1e-9)


@policies
def test_operators_are_stacked_scanned_and_mapped(linearize):
    operators, vec = [make(p, linearize=linearize) for p in MANY[:3]], random_like(PARAMS)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *operators)
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[G(vec) for G in operators])
    assert_close(jax.lax.scan(lambda carry, G: (carry, G(vec)), None, stacked)[1], expected)
    assert_close(jax.vmap(lambda G: G(vec))(stacked), expected)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *MANY[:3])
    assert_close(jax.vmap(lambda p: make(p, linearize=linearize)(vec))(params), expected)


@policies
def test_operator_survives_flattening(linearize):
    G, vec = make(linearize=linearize), random_like(PARAMS)
    again = jax.tree.unflatten(jax.tree.structure(G), jax.tree.leaves(G))
    assert all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(G))
    assert_close(again(vec), G(vec))


def test_cached_operators_hold_a_linearisation_and_recomputed_ones_do_not():
    count = {policy: len(jax.tree.leaves(make(linearize=policy))) for policy in POLICIES}
    assert count["recomputed"] == len(jax.tree.leaves((PARAMS, DATA, cross_entropy()))) + 1  # and the factor
    assert count["cached"] > count["recomputed"]
    assert len(jax.tree.leaves(make())) == count["cached"]  # the documented default


# --- one program


@policies
@losses
def test_solver_compiles_once_for_ten_parameter_sets(linearize, loss):
    b, solver = random_like(PARAMS), jax.jit(solve)
    operators = [make(p, loss, linearize=linearize) for p in MANY]
    with count_compiles() as compiled:
        first, *others = [solver(G, b) for G in operators]
    assert compiled.count == 1
    assert all(inner(first, other) != inner(first, first) for other in others)
    for k, got in ((3, others[2]), (9, others[8])):
        flat, unravel = jax.flatten_util.ravel_pytree(b)
        matrix = dense(MANY[k]) + jnp.eye(flat.size)
        assert_close(got, unravel(jax.scipy.sparse.linalg.cg(lambda v: matrix @ v, flat, maxiter=3)[0]))


@policies
@losses
@pytest.mark.parametrize("vmap_over_data", [True, False], ids=["vmap", "whole"])
def test_new_parameters_and_data_compile_nothing(linearize, loss, vmap_over_data):
    vec, solver = random_like(PARAMS), jax.jit(solve)
    model_fn = batched(net)

    def everything(k):
        data = {"input": DATA["input"] + k, "target": (DATA["target"] + k) % 3}
        fn = net if vmap_over_data else model_fn
        G = make(MANY[k], loss, fn, data, vmap_over_data=vmap_over_data, linearize=linearize)
        return solver(G, vec), G(vec)

    everything(0)
    with count_compiles() as compiled:
        for k in range(1, 10):
            everything(k)
    assert compiled.count == 0


@losses
def test_unbound_product_compiles_once(loss):
    vec = random_like(PARAMS)
    run = lambda k: create_ggn_mv_without_data(net, MANY[k], loss, k + 1.0)(vec, {**DATA, "input": DATA["input"] * k})
    run(0)
    with count_compiles() as compiled:
        results = [run(k) for k in range(1, 10)]
    assert compiled.count == 0
    assert_close(results[0], jax.tree.map(lambda leaf: 2.0 * leaf, make(MANY[1], loss)(vec)))


@pytest.mark.parametrize("linearize", POLICIES)
def test_an_eager_product_is_one_program(linearize):
    """Nothing runs op by op: a first call compiles one program."""
    fn, vec = lambda input, params: net(input, params) ** 2, random_like(PARAMS)
    G = make(model_fn=fn, linearize=linearize)
    with count_compiles() as compiled:
        G(vec)
    assert compiled.count == 1


@policies
@losses
def test_nothing_is_baked_into_a_program_that_takes_the_operator(linearize, loss):
    G, b = make(loss=loss, linearize=linearize), random_like(PARAMS)
    assert baked_in(lambda v: np.ones(7) * v, 1.0) == [(7,)]  # the finder finds
    assert baked_in(solve, G, b) == []
    assert baked_in(jax.jit(apply), G, b) == []
    assert baked_in(lambda p, d, v: make(p, loss, data=d, linearize=linearize)(v), PARAMS, DATA, b) == []


FOLDING = """
import jax, jax.numpy as jnp
from ggn_nb import create_ggn_mv

def model_fn(input, params):
    h = input[None]
    for kernel in params["kernels"]:
        h = jax.lax.conv_general_dilated(h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        h = jax.lax.reduce_window(jax.nn.relu(h), -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return h.reshape(-1) @ params["out"]

a, b, c, d, e = jax.random.split(jax.random.key(0), 5)
params = {
    "kernels": [jax.random.normal(a, (3, 3, 3, 16)) / 5, jax.random.normal(b, (3, 3, 16, 16)) / 12],
    "out": jax.random.normal(c, (8 * 8 * 16, 10)) / 32,
}
data = {"input": jax.random.normal(d, (32, 32, 32, 3)), "target": jax.random.randint(e, (32,), 0, 10)}
G = create_ggn_mv(model_fn, params, data, "cross_entropy", linearize=POLICY)
gap = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)) / jnp.max(jnp.abs(y)), jax.jit(G)(params), G(params))
assert max(map(float, jax.tree.leaves(gap))) < 1e-4, gap
print("reached the end")
"""


@policies
def test_jit_of_the_operator_folds_no_constants(linearize):
    printed = run_python(f"POLICY = {linearize!r}\n" + FOLDING, JAX_ENABLE_X64="0")
    assert "reached the end" in printed
    assert "onstant folding" not in printed


# --- models


MODELS = {}


def case(params, data=DATA):
    """Register a model function with its parameters and data."""
    return lambda fn: MODELS.setdefault(fn.__name__, (fn, params, data)) and fn


W = RNG.standard_normal((3, 3))


@case(W)
def captures_an_array(input, params, A=jnp.asarray(RNG.standard_normal((3, 3)))):
    return input @ A @ params


@case({"used": W, "unused": np.ones(2), "none": None})
def ignores_some_parameters(input, params):
    return input @ params["used"]


@case({"full": W, "empty": np.zeros((0, 4))})
def has_an_empty_leaf(input, params):
    return input @ params["full"] + jnp.sum(params["empty"])


@case({"scale": 0.5, "shift": np.float64(0.25), "gain": jnp.asarray(2.0)})
def has_scalar_parameters(input, params):
    return jnp.tanh(input * params["scale"] + params["shift"]) * params["gain"]


@case(W)
def loops(input, params):
    return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ params), input)


@case(W)
def branches(input, params):
    return jax.lax.cond(input[0] > 0, jnp.tanh, jnp.sin, input @ params)


@case(W)
def is_jitted(input, params):
    return jax.jit(jnp.matmul)(input, params)


@case(W)
def is_rematerialised(input, params):
    return jax.checkpoint(lambda p: jnp.tanh(jnp.tanh(input @ p) @ p))(params)


@case(W)
def has_its_own_derivative(input, params):
    double = jax.custom_jvp(lambda x: 2.0 * x)
    double.defjvp(lambda primals, tangents: (2.0 * primals[0], 2.0 * tangents[0]))
    return double(input @ params)


KEYS = jax.random.split(jax.random.key(1), 5)


@case(W, {"input": {"x": DATA["input"], "key": KEYS, "index": np.arange(5), "none": None}, "target": DATA["target"]})
def takes_random_keys_and_integers(input, params):
    noise = jax.random.uniform(input["key"]) + input["index"].astype(jnp.float64)
    return input["x"] @ params * (1.0 + noise)


@pytest.mark.combinations
@policies
@pytest.mark.parametrize("name", MODELS)
def test_model(name, linearize):
    model_fn, params, data = MODELS[name]
    params = jax.tree.map(jnp.asarray, params)
    given = MODELS[name][1]
    G = create_ggn_mv(model_fn, given, data, "cross_entropy", linearize=linearize)
    expected = oracle_of(model_fn, params, data, log_softmax_at)
    assert jnp.any(expected != 0)
    assert_close(dense_of(G, params), expected)
    flat, vec = jax.flatten_util.ravel_pytree, random_like(params)
    for product in (G(vec), jax.jit(G)(vec), jax.jit(apply)(G, vec)):
        assert_close(flat(product)[0], expected @ flat(vec)[0])


@policies
@pytest.mark.parametrize("array", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_arrays_of_a_partial_model_are_leaves(array, linearize):
    A = array(RNG.standard_normal((3, 3)))
    model_fn = jax.tree_util.Partial(lambda A, input, params: input @ A @ params, A)
    params = jnp.asarray(W)
    G = create_ggn_mv(model_fn, params, DATA, "cross_entropy", linearize=linearize)
    assert baked_in(apply, G, params) == []
    assert any(np.shape(leaf) == A.shape and np.array_equal(leaf, A) for leaf in jax.tree.leaves(G))
    plain = lambda input, params: input @ jnp.asarray(A) @ params
    assert_close(dense_of(G, params), dense(params, plain))


def test_new_arrays_in_a_partial_model_compile_nothing():
    matmul = lambda A, input, params: input @ A @ params
    operators = [make(W, model_fn=jax.tree_util.Partial(matmul, jnp.asarray(W + k))) for k in range(4)]
    solver, b = jax.jit(solve), jnp.asarray(W)
    with count_compiles() as compiled:
        for G in operators:
            solver(G, b)
    assert compiled.count == 1


@dataclass(frozen=True)
class Scaled:
    """A model that is a frozen dataclass: equal ones are one static value."""

    scale: float

    def __call__(self, input, params):
        return self.scale * input @ params


@policies
def test_frozen_dataclass_models_share_a_program(linearize):
    run = lambda scale: make(W, model_fn=Scaled(scale), linearize=linearize)(jnp.asarray(W))
    first = run(2.0)
    with count_compiles() as compiled:
        again = run(2.0)
    assert compiled.count == 0
    assert_close(again, first)
    assert_close(run(4.0), make(W, model_fn=lambda input, params: 4.0 * input @ params)(jnp.asarray(W)))


@policies
@pytest.mark.parametrize("vmap_over_data", [True, False], ids=["vmap", "whole"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy", log_softmax_at], ids=["mse", "cross_entropy", "custom"])
def test_model_that_ignores_its_parameters_gives_zero(linearize, vmap_over_data, loss):
    data = DATA | {"target": DATA["input"]} if loss == "mse" else DATA
    G = make(PARAMS, loss, lambda input, params: input, data, linearize=linearize, vmap_over_data=vmap_over_data)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    assert_close(G(random_like(PARAMS)), zero)
    assert_close(jax.jit(G)(random_like(PARAMS)), zero)


def test_no_parameters_at_all():
    assert make({}, model_fn=lambda input, params: input)({}) == {}


@policies
@pytest.mark.parametrize("param", [2.0, np.float64(2), np.asarray(2.0), jnp.asarray(2.0)], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("vec", [3.0, np.float64(3), np.asarray(3.0), jnp.asarray(3.0)], ids=lambda v: type(v).__name__)
def test_one_number_as_parameters(param, vec, linearize):
    x = DATA["input"][:, 0]
    G = make(param, "mse", lambda input, params: params * input, {"input": x, "target": x}, linearize=linearize)
    assert_close(G(vec), jnp.asarray(3.0 * 2 * np.sum(x**2)))


def test_numpy_in_jax_out():
    vec = jax.tree.map(np.ones_like, PARAMS)
    product = make()(vec)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(product))
    assert_close(product, make()(jax.tree.map(jnp.asarray, vec)))


def test_arguments_are_left_alone():
    params, data = jax.tree.map(np.copy, (PARAMS, DATA))
    make(params, data=data)(jax.tree.map(np.ones_like, PARAMS))
    assert_close((params, data), (PARAMS, DATA))


def test_other_keys_of_the_data_are_refused():
    """A mistyped weight would change the result without a word."""
    for more in ({"weights": np.ones(5)}, {"name": "digits"}, {"fold": object()}):
        with pytest.raises(ValueError, match=rf"data: got the keys .*expected 'input', 'target' and maybe .*{next(iter(more))}"):
            make(data=DATA | more)


@policies
def test_weights_and_masks_of_the_samples(linearize):
    """As if each sample were repeated by its weight, and the masked one were not there, whatever it holds."""
    weight, mask = np.array([1.0, 2.0, 0.0, 3.0, 1.0]), np.array([True, True, True, True, False])
    data = {"input": DATA["input"].copy(), "target": DATA["target"].copy()}
    data["target"][4] = 99
    rows = np.repeat(np.arange(5), (weight * mask).astype(int))
    repeated = {key: DATA[key][rows] for key in DATA}
    vec, given = random_like(PARAMS), data | {"weight": weight, "mask": mask}
    assert_close(make(data=given, linearize=linearize)(vec), make(data=repeated, num_curv_samples=1, num_total_samples=1)(vec))
    assert_close(make(data=given, reduction="mean", linearize=linearize)(vec), make(data=repeated, reduction="mean")(vec))
    data["target"][4] = -100  # an ignored label does as well as a mask
    ignored = make(data=data | {"weight": weight}, reduction="mean", linearize=linearize)
    assert_close(ignored(vec), make(data=repeated, reduction="mean")(vec))


@policies
@pytest.mark.parametrize("extra", [{"table": np.ones((7, 2))}, {"rate": 2.0}, {"step": np.int32(3), "none": None}], ids=str)
def test_no_common_batch_axis_is_needed_with_num_curv_samples(extra, linearize):
    data = {"input": {"x": DATA["input"], **extra}, "target": DATA["target"]}
    options = dict(vmap_over_data=False, num_curv_samples=5, num_total_samples=10, linearize=linearize)
    G = make(W, model_fn=lambda input, params: input["x"] @ params, data=data, **options)
    assert_close(dense_of(G, jnp.asarray(W)), 2 * dense(W, linear))


@policies
def test_traced_sample_numbers_and_factor(linearize):
    vec = random_like(PARAMS)
    by = lambda factor: jax.tree.map(lambda leaf: factor * leaf, make()(vec))
    bound = jax.jit(lambda n, m: make(num_curv_samples=n, num_total_samples=m, linearize=linearize)(vec))
    assert_close(bound(4, 6), by(1.5))
    assert_close(bound(4.0, 6.0), by(1.5))
    assert_close(jax.jit(lambda m: make(num_total_samples=m)(vec))(15), by(3.0))
    assert_close(jax.jit(lambda n: make(num_curv_samples=n)(vec))(3), by(1.0))
    unbound = jax.jit(lambda c: create_ggn_mv_without_data(net, PARAMS, "cross_entropy", c)(vec, DATA))
    for factor in (2, 0.5, jnp.float32(0.25), jnp.bfloat16(4.0)):
        assert_close(unbound(factor), by(float(factor)))
    slope = jax.grad(lambda c: inner(vec, create_ggn_mv_without_data(net, PARAMS, "cross_entropy", c)(vec, DATA)))
    assert_close(slope(3.0), inner(vec, make()(vec)))


@policies
def test_models_and_losses_may_capture_traced_values(linearize):
    vec = jnp.asarray(W)

    def scaled(s):
        model_fn = lambda input, params: s * input @ params
        return make(W, lambda f, y: s * jnp.sum(f**2), model_fn, linearize=linearize)(vec)

    expected = jax.tree.map(lambda leaf: 16.0 * leaf, make(W, "none", linear)(vec))
    assert_close(jax.jit(scaled)(2.0), expected)
    assert_close(jax.vmap(scaled)(jnp.array([2.0, 0.0])), jnp.stack([expected, jnp.zeros_like(expected)]))


def test_keywords_partial_and_methods_as_models():
    class Model:
        def forward(self, input, params):
            return input @ params

        def __call__(self, *, params, input):
            return input @ params

    vec, expected = jnp.asarray(W), make(W, model_fn=linear)(jnp.asarray(W))
    for model_fn in (Model().forward, Model(), partial(lambda c, input, params: c * input @ params, 1.0)):
        assert_close(make(W, model_fn=model_fn)(vec), expected)


def test_no_two_classes_have_equal_structures():
    """Programs are found by structure: of equal ones, the Hessian's could be taken for the Gauss-Newton matrix (seen with JAX 0.10)."""
    kinds = [create_ggn_mv, create_hessian_mv, *(partial(create_fisher_mv, kind=kind, **options) for kind, options in (
        ("exact", {}), ("empirical", {}), ("monte_carlo", {"key": jax.random.key(0)})))]
    bound = [jax.tree.structure(create(net, PARAMS, DATA, "cross_entropy", linearize="recomputed")) for create in kinds]
    without = (create_ggn_mv_without_data, create_hessian_mv_without_data, create_fisher_mv_without_data)
    unbound = [jax.tree.structure(create(net, PARAMS, "cross_entropy", 1.0)) for create in without]
    wrapped = [HessianOnly(Partial(linear)), CustomLoss(Partial(linear)), LossHessian(HessianOnly(Partial(linear)))]
    for trees in (bound, unbound, list(map(jax.tree.structure, wrapped))):
        assert all(a != b for i, a in enumerate(trees) for b in trees[:i])


def test_arrays_of_numpy_times_an_operator():
    G = make()
    for multiply in (lambda: np.array([1.0, 2.0]) * G, lambda: G * np.array([1.0, 2.0])):
        with pytest.raises(TypeError, match=r"factor: got array\(\[1., 2.\]\), expected a real number"): multiply()
    with pytest.raises(TypeError): np.ones(24) @ G
    vec = random_like(PARAMS)
    twice = jax.tree.map(lambda leaf: 2 * leaf, G(vec))
    for factor in (np.float64(2), np.array(2.0), np.float32(2)): assert_close((factor * G)(vec), twice)


INDEFINITE = {"student_t": student_t(curvature="hessian"), "heteroscedastic": heteroscedastic_gaussian(curvature="hessian")}


@pytest.mark.parametrize("name", INDEFINITE)
@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in a head"])
def test_an_indefinite_loss_makes_no_semi_definite_matrix(name, nested):
    loss, x, w = INDEFINITE[name], RNG.standard_normal((20, 3)), jnp.ones((3, 2))
    target = np.full((20, 2) if name == "student_t" else 20, 9.0)
    data, model = {"input": x, "target": target}, linear
    if nested:
        loss, model = multi_head({"a": "mse", "b": multi_head([loss])}), lambda input, params: {"a": input @ params, "b": [input @ params]}
        data = {"input": x, "target": {"a": np.zeros((20, 2)), "b": [target]}}
    G = create_ggn_mv(model, w, data, loss)
    assert not G.is_psd
    assert not G.damped(1.0).is_psd
    assert verify(G).passed
    assert create_ggn_mv(model, w, data | {"target": None}, multi_head({"a": "mse", "b": ["mse"]}) if nested else "mse").is_psd
    matrix = np.asarray(G.dense())
    lowest = np.linalg.eigvalsh(matrix)[0]
    assert_close(eigsh(G, k=1, which="SA")[0], jnp.array([lowest]), rtol=1e-6)
    b, key = jnp.arange(6.0).reshape(3, 2), jax.random.key(0)
    if lowest < -2:
        with pytest.raises(ValueError, match="not positive definite"): solve_damped(G, b, damping=1.0)
        with pytest.raises(ValueError, match="not positive definite"): logdet(G, damping=1.0, key=key)
    damping = 1.0 + 2 * abs(lowest)
    expected = np.linalg.solve(matrix + damping * np.eye(6), b.ravel()).reshape(3, 2)
    assert_close(solve_damped(G, b, damping=damping).x, jnp.asarray(expected), rtol=1e-6)
    assert_close(solve_many(G, jnp.stack([b, -b]), damping=damping).x, jnp.stack([expected, -expected]), rtol=1e-6)
