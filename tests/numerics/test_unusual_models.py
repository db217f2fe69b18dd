"""Whatever JAX can differentiate in a model has a product, whatever the policy; what it cannot is refused by name."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import QUICK
from ggn_nb import Stream, create_fisher_mv, create_ggn_mv, create_hessian_mv, select_params
from ggn_nb.operators.operator import bytes_of
from ggn_nb.tools.models import cnn, mlp, transformer
from ggn_nb.tools.testing import assert_close
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import io_callback
from jax.experimental.ode import odeint
from jax.extend.core import Primitive
from jax.flatten_util import ravel_pytree

D, N = 4, 5
RNG = np.random.default_rng(5)
PARAMS = {"a": jnp.asarray(RNG.standard_normal(D)), "w": jnp.asarray(RNG.standard_normal((D, D)))}
DATA = {"input": jnp.asarray(RNG.standard_normal((N, D))), "target": None}
VEC = jax.tree.map(lambda p: jnp.asarray(RNG.standard_normal(p.shape)), PARAMS)
KINDS = {"ggn": create_ggn_mv, "hessian": create_hessian_mv}


# Complex numbers


def spectral(input, params):
    kernel = lax.complex(params["a"][:3], params["w"][0, :3])
    return jnp.tanh(jnp.fft.irfft(jnp.fft.rfft(input) * kernel, n=D))


def spectral_in_space(input, params):
    z = jnp.fft.fftn(params["w"] * input[None]) * jnp.fft.ifft2(jnp.outer(params["a"], input))
    return jnp.abs(z[1]) + jnp.angle(z[2])


def complex_products(input, params):
    z = lax.complex(params["w"], jnp.sin(params["w"].T)) @ lax.complex(input, jnp.ones(D))
    z = jnp.exp(lax.complex(jnp.zeros(D), z.real)) * z
    return z.real * z.imag


@jax.custom_jvp
def sine(x):
    return jnp.sin(x)


@sine.defjvp
def _(primals, tangents):
    """By a complex step: complex numbers in the rule alone."""
    (x,), (t,) = primals, tangents
    return sine(x), jnp.imag(jnp.sin(lax.complex(x, jnp.full(x.shape, 1e-30)))) * 1e30 * t


def complex_step(input, params):
    return jnp.tanh(sine(params["w"] @ input))


# Effects, callbacks, algebra, integers, random numbers, control flow


def printing(input, params):
    h = jnp.tanh(params["w"] @ input)
    jax.debug.callback(lambda h: None, h)
    return jnp.sin(h)


def writing(input, params):
    z = io_callback(lambda x: np.asarray(x), jax.ShapeDtypeStruct(input.shape, input.dtype), input)
    return jnp.sin(jnp.tanh(params["w"] @ input)) * z


def in_numpy(fn, *args):
    return jax.pure_callback(fn, jax.ShapeDtypeStruct(args[0].shape, args[0].dtype), *args, vmap_method="expand_dims")


@jax.custom_jvp
def by_python(x):
    return in_numpy(np.sin, x)


@by_python.defjvp
def _(primals, tangents):
    return by_python(*primals), in_numpy(np.cos, *primals) * tangents[0]


def calling_python(input, params):
    return by_python(params["w"] @ input) * params["a"]


def algebra(input, params):
    A = params["w"] @ params["w"].T + jnp.eye(D) + jnp.diag(input) ** 2
    values, _ = jnp.linalg.eigh(A)
    return jnp.linalg.solve(A, input) + values + jnp.linalg.cholesky(A) @ input + jnp.linalg.svd(A, full_matrices=False)[1]


def whole_numbers(input, params):
    i, positive = jnp.argmax(params["w"] @ input), params["a"] > 0
    noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (D,))
    h = jnp.where(positive, jnp.sin(params["w"][i]), params["a"]) * noise * jnp.round(params["a"])
    return h + jnp.sort(params["a"] * input)[::-1] + lax.top_k(params["w"][0] * input, D)[0]


def control_flow(input, params):
    h = lax.cond(input[0] > 0, lambda: jnp.sin(params["w"] @ input), lambda: params["a"] * input)
    h = lax.switch(jnp.int32(params["a"][0] > 0), [jnp.sin, lambda h: h**2], h)
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h + w), None), h, params["w"])
    h = h + lax.map(lambda w: jnp.sin(w @ h), params["w"])
    return lax.fori_loop(0, 2, lambda i, h: jnp.sin(h * params["a"]), h)


def nested_policies(input, params):
    named = lambda h: jnp.sin(checkpoint_name(jnp.tanh(params["w"] @ h), "h"))
    h = jax.checkpoint(named, policy=jax.checkpoint_policies.save_only_these_names("h"))(input)
    return lax.stop_gradient(params["a"]) * jax.checkpoint(jax.named_call(jnp.sin, name="sine"))(params["w"] @ h)


# What does not depend on the parameters, or not on all of them


def constant(input, params):
    return jnp.sin(input)


def partly_constant(input, params):
    return {"used": jnp.sin(params["w"] @ input), "constant": jnp.cos(input)}


def fused_parts(input, params):
    return jnp.concatenate([jnp.sin(params["a"] * input)[:2], jnp.cos(input)[:2]])


# Derivatives that are known backwards only


@jax.custom_vjp
def fused(x, w):
    return jnp.sin(w @ x)


def fused_forward(x, w):
    return fused(x, w), (x, w)


def fused_backward(stored, u):
    x, w = stored
    u = u * jnp.cos(w @ x)
    return w.T @ u, jnp.outer(u, x)


fused.defvjp(fused_forward, fused_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def applied(fn, x):
    return fn(x)


applied.defvjp(lambda fn, x: (fn(x), x), lambda fn, x, u: jax.vjp(fn, x)[1](u))


def reverse_only(input, params):
    return fused(input, params["w"]) * params["a"]


def reverse_only_inside(input, params):
    h, _ = lax.scan(lambda h, b: (fused(h * b, params["w"]), None), input, params["a"])
    h = h + jnp.sum(jax.vmap(fused, in_axes=(0, None))(params["w"], params["w"]), axis=0)
    h = jax.jit(lambda h: jnp.sin(jax.checkpoint(fused)(h, params["w"])))(h)
    return lax.cond(input[0] > 0, lambda: applied(jnp.tanh, h), lambda: h) + jnp.sin(params["a"])


def reverse_only_in_a_loop(input, params):
    h, _ = lax.scan(lambda h, b: (fused(h * b, params["w"]), None), input, params["a"])
    return h * params["a"]


def reverse_only_spectral(input, params):
    return {"used": spectral(fused(input, params["w"]), params), "constant": jnp.cos(input)}


MODELS = [
    spectral, spectral_in_space, complex_products, complex_step, printing, writing, calling_python, algebra, whole_numbers, control_flow,
    nested_policies, constant, partly_constant, fused_parts, reverse_only, reverse_only_inside, reverse_only_spectral,
]
OPTIONS = {
    "rematerialized": {"linearize": "rematerialized"},
    "recomputed": {"linearize": "recomputed"},
    "batch_size": {"batch_size": 2},
    "cached, batch_size": {"batch_size": 2, "linearize": "cached"},
    "nothing": {"linearize": jax.checkpoint_policies.nothing_saveable},
    "everything": {"linearize": jax.checkpoint_policies.everything_saveable},
    "dots": {"linearize": jax.checkpoint_policies.dots_saveable},
}
REPRESENTATIVES = [spectral, complex_products, partly_constant, reverse_only_in_a_loop]


def half_square(pred, target):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(pred)) / 2


def expected(model, kind):
    """The product by reverse mode alone, in float64: JᵀJ v, or the derivative of the gradient."""
    flat, unravel = ravel_pytree(PARAMS)
    predict = lambda p: ravel_pytree(jax.vmap(lambda x: model(x, unravel(p)))(DATA["input"]))[0]
    if kind == "ggn":
        J = jax.jit(jax.jacrev(predict), compiler_options=QUICK)(flat)
        return unravel(J.T @ (J @ ravel_pytree(VEC)[0]))
    gradient = jax.grad(lambda p: jnp.sum(predict(p) ** 2) / 2)
    return unravel(jax.jit(jax.jacrev(gradient), compiler_options=QUICK)(flat) @ ravel_pytree(VEC)[0])


AGREE = partial(assert_close, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_products_are_right(model):
    kinds = ["ggn"] if model is calling_python else list(KINDS)  # the rule of that model has no derivative itself
    for kind in kinds:
        AGREE(KINDS[kind](model, PARAMS, DATA, half_square)(VEC), expected(model, kind))


@pytest.mark.combinations
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", REPRESENTATIVES, ids=lambda model: model.__name__)
def test_products_are_right_under_each_policy(model, kind):
    want, make = expected(model, kind), partial(KINDS[kind], model)
    for name, options in OPTIONS.items():
        if model is spectral and name == "cached, batch_size" and jax.__version_info__ < (0, 8):
            continue  # jaxlib 0.7.0 aborts the process at any Fourier transform in a loop
        if kind == "ggn" or name in ("rematerialized", "recomputed", "cached, batch_size"):
            product = lambda params, v, options=options: make(params, DATA, half_square, **options)(v)
            AGREE(jax.jit(product, compiler_options=QUICK)(PARAMS, VEC), want)


@pytest.mark.parametrize("model", [spectral, reverse_only], ids=lambda model: model.__name__)
def test_products_are_right_in_every_other_way(model):
    want = expected(model, "ggn")
    batches = [jax.tree.map(lambda a: a[i : i + 2], DATA) for i in range(0, N, 2)]
    AGREE(create_ggn_mv(model, PARAMS, Stream(batches), half_square)(VEC), want)
    two = jax.tree.map(lambda v: jnp.stack([v, 2 * v]), VEC)
    for options in ({}, {"linearize": "recomputed"}):
        G = create_ggn_mv(model, PARAMS, DATA, half_square, **options)
        AGREE(G.matmat(two), jax.tree.map(lambda v: jnp.stack([v, 2 * v]), want))
        AGREE(jax.jit(lambda G, v: G(v))(G, VEC), want)
        AGREE(jax.jit(G)(VEC), want)
    whole = lambda input, params: jax.vmap(lambda x: model(x, params))(input)
    AGREE(create_ggn_mv(whole, PARAMS, DATA, half_square, vmap_over_data=False)(VEC), want)
    made_inside = jax.jit(lambda params, v: create_ggn_mv(model, params, DATA, half_square)(v))
    AGREE(made_inside(PARAMS, VEC), want)
    targets = DATA | {"target": jnp.zeros((N, D))}
    exact = create_fisher_mv(model, PARAMS, targets, "mse", kind="exact")
    AGREE(exact(VEC), create_ggn_mv(model, PARAMS, targets, "mse")(VEC))


def test_a_head_that_the_selected_parameters_do_not_reach():
    two_heads = lambda input, params: {"a": params["a"] * input, "w": jnp.tanh(params["w"] @ input)}
    model, params = select_params(two_heads, PARAMS, "^w$")
    want = create_ggn_mv(two_heads, PARAMS, DATA, half_square)(VEC | {"a": jnp.zeros(D)})
    for options in ({}, OPTIONS["rematerialized"], OPTIONS["recomputed"]):
        AGREE(create_ggn_mv(model, params, DATA, half_square, **options)({"a": None, "w": VEC["w"]})["w"], want["w"])


def test_a_model_with_an_effect_runs_once():
    runs = []

    def counted(input, params):
        jax.debug.callback(lambda: runs.append(1))
        return jnp.tanh(params["w"] @ input)

    G = create_ggn_mv(counted, PARAMS, jax.tree.map(lambda a: a[:1], DATA), half_square, linearize="rematerialized")
    G(VEC), G(VEC)
    jax.effects_barrier()
    assert len(runs) == 1


def test_a_model_is_traced_as_often_as_before():
    """For the looks at its result, and once to linearise it and for every product: whatever reads the program."""
    traces = []

    def counted(input, params):
        traces.append(1)
        return jnp.tanh(params["w"] @ input)

    G = create_ggn_mv(counted, PARAMS, DATA, half_square, linearize="rematerialized")
    made = len(traces)
    G(VEC), G(VEC)
    assert made == len(traces) == 2


# What is refused


def unknown_steps(input, params):
    return lax.while_loop(lambda h: jnp.sum(h**2) > 0.01, lambda h: 0.5 * jnp.sin(h * params["a"]), params["w"] @ input)


def traced_bounds(input, params):
    return lax.fori_loop(0, jnp.int32(input[0] > 0) + 2, lambda i, h: jnp.sin(h * params["a"]), params["w"] @ input)


def adjoint_solver(input, params):
    return odeint(lambda y, t, w: jnp.sin(w @ y), input, jnp.array([0.0, 1.0]), params["w"])[-1]


def without_rule(input, params):
    return in_numpy(np.sin, params["w"] @ input)


own_operation = Primitive("own_operation")
own_operation.def_abstract_eval(lambda x: x)


def without_derivative(input, params):
    return own_operation.bind(params["a"]) * input


@jax.custom_vjp
def clipped_gradient(x):
    return x


clipped_gradient.defvjp(lambda x: (x, None), lambda _, u: (jnp.clip(u, -1, 1),))


def not_linear_backwards(input, params):
    return clipped_gradient(params["w"] @ input)


@jax.custom_vjp
def foreign(x):
    return jnp.sin(x)


foreign.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cos, u: (in_numpy(np.multiply, cos, u),))


def foreign_backwards(input, params):
    return foreign(params["w"] @ input)


REFUSED = {
    unknown_steps: "model_fn: got a loop whose number of steps is not known beforehand; expected a fixed number of steps: jax.lax.scan",
    traced_bounds: "model_fn: got a loop whose number of steps is not known beforehand; expected a fixed number",
    adjoint_solver: "model_fn: got a derivative with .*; expected .*for a differential equation a fixed number of steps by jax.lax.scan",
    without_rule: "model_fn: got a call of Python, which has no derivative; expected .*jax.custom_jvp",
    without_derivative: "model_fn: got the operation 'own_operation', which has no derivative; expected .*jax.custom_jvp",
    not_linear_backwards: "model_fn: got a derivative with '.*', which is not linear, or has no transpose; expected a backward rule",
    foreign_backwards: "model_fn: got a call of Python, which has no derivative",
}


@pytest.mark.parametrize("model", REFUSED, ids=lambda model: model.__name__)
def test_what_has_no_product_is_refused_when_the_operator_is_made(model):
    for options in ({}, {"linearize": "recomputed"}, {"batch_size": 2})[: 1 if model is adjoint_solver else 3]:
        with pytest.raises(ValueError, match=REFUSED[model]) as caught:
            create_ggn_mv(model, PARAMS, DATA, half_square, **options)
        assert caught.value.__cause__ is not None
    if model in (not_linear_backwards, foreign_backwards, adjoint_solver):
        return  # the gradient is what it is given to be; its derivative may exist
    with pytest.raises(ValueError, match="model_fn: got "):
        create_hessian_mv(model, PARAMS, DATA, half_square)


@pytest.mark.parametrize("error", [TypeError, ValueError, NotImplementedError, AssertionError])
def test_errors_of_the_model_stay_its_own(error):
    def failing(input, params):
        raise error("the model's own")

    for create in KINDS.values():
        with pytest.raises(error, match="^the model's own"):
            create(failing, PARAMS, DATA, half_square)


# What is kept


def kept_case(name):
    key = jax.random.key(0)
    if name == "mlp":
        return *mlp(key, (16, 64, 64, 4)), {"input": jnp.ones((64, 16)), "target": jnp.zeros(64, int)}
    if name == "cnn":
        model = cnn(key, image_shape=(16, 16, 2), channels=(8, 8), hidden=16, num_classes=4)
        return *model, {"input": jnp.ones((16, 16, 16, 2)), "target": jnp.zeros(16, int)}
    tokens = jnp.zeros((4, 16), int)
    sizes = dict(num_layers=2, width=32, num_heads=2, vocab_size=32, max_len=16)
    return *transformer(key, scan=name == "transformer", **sizes), {"input": tokens, "target": tokens}


CASES = ["mlp", "cnn", "transformer", "unrolled transformer"]


@pytest.mark.combinations
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_policies_keep_what_they_promise(name, kind):
    model_fn, params, data = kept_case(name)
    make = lambda how: lambda params, data: KINDS[kind](model_fn, params, data, "cross_entropy", linearize=how).linearization
    kept = lambda how: bytes_of(jax.eval_shape(make(how), params, data))
    recomputed, rematerialized, cached = map(kept, ("recomputed", "rematerialized", "cached"))
    assert 0 == recomputed < rematerialized <= cached
    if (name, kind) not in {("cnn", "ggn")}:  # there the masks and averages are what is smallest, and all that is needed
        assert rematerialized < 0.85 * cached


def in_other_arrangements(input, params):
    """A model that reads slices of a stacked leaf, a leaf transposed, and its input in another shape and dtype."""
    h = input.reshape(4, 4).astype(params["layers"].dtype).T.reshape(-1)
    for i in range(2):
        h = jnp.tanh(params["layers"][i] @ h)
    return h @ params["last"].T


def kept_of(name, dtype=float):
    layers = jax.random.normal(jax.random.key(2), (2, 16, 16), dtype) / 4
    last = jax.random.normal(jax.random.key(3), (4, 16), dtype)
    return {"mlp": mlp(jax.random.key(0), (16, 64, 4), dtype=dtype),
            "other arrangements": (in_other_arrangements, {"layers": layers, "last": last})}[name]


@pytest.mark.combinations
@pytest.mark.parametrize("options", [{}, {"batch_size": 16}, {"linearize": "rematerialized"}, {"batch_size": 7, "linearize": "cached"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "other arrangements"])
def test_nothing_is_kept_twice(name, kind, options):
    """Distinct numbers everywhere, so that a copy of parameters or inputs would show."""
    model_fn, params = kept_of(name)
    data = {"input": jax.random.normal(jax.random.key(1), (64, 16), jnp.float32), "target": jnp.zeros(64, int)}
    if name == "mlp":
        data["input"] = data["input"].astype(float)
    make = lambda params, data: KINDS[kind](model_fn, params, data, "cross_entropy", **{"linearize": "cached"} | options)
    in_loop = name != "mlp" and "batch_size" in options  # what becomes of a chunk's input in the loop is an intermediate
    whole = params if in_loop else (params, data["input"])
    own = {float(x) for leaf in jax.tree.leaves(whole) for x in np.ravel(leaf) if x}
    for A in (make(params, data), jax.jit(make)(params, data)):
        for leaf in jax.tree.leaves(A.linearization):
            shared = own & set(map(float, np.ravel(leaf)))
            assert len(shared - {1.0}) < 4, leaf.shape
        buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(A.linearization)]
        assert len(set(buffers)) == len(buffers)


@pytest.mark.parametrize("name, options", [("mlp", {}), ("mlp", {"batch_size": 16}), ("other arrangements", {})])
def test_nothing_is_kept_twice_in_half_precision(name, options):
    model_fn, params = kept_of(name, jnp.bfloat16)
    data = {"input": jnp.ones((64, 16), jnp.bfloat16), "target": jnp.zeros(64, int)}
    G = create_ggn_mv(model_fn, params, data, "cross_entropy", linearize="cached", **options)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)] + [data["input"].size]
    widest = 64 if name == "mlp" else 16  # activations, and what they become: at most four arrays a layer
    assert max(sizes) >= 512
    assert bytes_of(G.linearization) <= 2 * 64 * (2 * 2 * widest + 2 * 4)


def test_a_linear_model_keeps_its_prediction_alone():
    data = {"input": jnp.ones((64, 16)), "target": jnp.zeros((64, 4))}
    G = create_ggn_mv(lambda input, params: input @ params, jnp.ones((16, 4)), data, "mse")
    assert [leaf.shape for leaf in jax.tree.leaves(G.linearization)] == [(64, 4)]
