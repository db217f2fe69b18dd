"""Products where solvers take them: in loops, many at once, and in functions that others map over devices."""

import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import POLICIES, oracle_of, random_like, run_python
from ggn_nb import Diagonal, create_fisher_mv, create_ggn_mv, create_hessian_mv, register_operator
from ggn_nb.losses import cross_entropy
from ggn_nb.tools.models import cnn
from ggn_nb.tools.testing import assert_close
from ggn_nb.tools.timing import count_compiles
from jax.scipy.sparse.linalg import cg

KEYS = jax.random.split(jax.random.key(0), 4)
N = 6
model_fn, params = cnn(KEYS[0], image_shape=(4, 4, 2), channels=(3,), hidden=5, num_classes=3, dtype=jnp.float64)
data = {"input": jax.random.normal(KEYS[1], (N, 4, 4, 2)), "target": jnp.arange(N) % 3}
vec = random_like(params)
flat, unravel = jax.flatten_util.ravel_pytree(vec)
many = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf, 2.0 * leaf, 0.0 * leaf, leaf - 1.0]), vec)

policies = pytest.mark.parametrize("options", [{"linearize": policy} for policy in POLICIES] + [{"batch_size": 4}], ids=str)
kinds = pytest.mark.parametrize("create", [create_ggn_mv, create_hessian_mv, create_fisher_mv], ids=lambda fn: fn.__name__)
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="only there convolutions are rearranged")


def make(create=create_ggn_mv, **options):
    return create(model_fn, params, data, "cross_entropy", **options)


def dense():
    """The Gauss-Newton matrix of the case by its definition."""
    return oracle_of(model_fn, params, data, cross_entropy().value)


# --- convolutions in loops


def steps(A, b):
    """Three steps of a power method."""
    return jax.lax.fori_loop(0, 3, lambda _, v: A(v), b)


LOOPS = {
    "fori_loop": lambda A: steps(A, vec),
    "cg": lambda A: cg(A.damped(0.1), vec, maxiter=3)[0],
    "map": lambda A: jax.lax.map(A, many),
    "flat": lambda A: steps(A.flat(), flat),
    "sum": lambda A: steps(2.0 * A + A, vec),
    "groups": lambda A: A.matmat(many, vector_batch_size=2),
    "singles": lambda A: A.matmat(many, vector_batch_size=1),
    "vmap": lambda A: jax.lax.fori_loop(0, 3, lambda _, vs: jax.vmap(A)(vs), many),
    "linearized": lambda A: steps(A.linearized(), vec),
}


def orders(program):
    """The orders of axes of all convolutions in a lowered program."""
    return set(re.findall(r"stablehlo.convolution.*? dim_numbers = (\S+x\S+?->\[.*?\])", program.replace(", ", ",")))


FAST = {"[b,0,1,f]x[0,1,i,o]->[b,0,1,f]"}


def check_loop(loop, A):
    """There is a loop, and every convolution has its channels last."""
    program = jax.jit(loop).lower(A).as_text()
    assert "stablehlo.while" in program
    assert orders(program) == FAST


@on_cpu
@pytest.mark.parametrize("loop", LOOPS)
def test_convolutions_in_a_loop_have_their_channels_last(loop):
    check_loop(LOOPS[loop], make())


@pytest.mark.combinations
@on_cpu
@policies
@kinds
def test_convolutions_in_conjugate_gradients_have_their_channels_last(create, options):
    check_loop(LOOPS["cg"], make(create, **options))


@on_cpu
def test_convolutions_are_found_and_rearranged_when_the_operator_is_captured_or_made_in_a_loop():
    slow = lambda p: jax.vmap(lambda x: model_fn(input=x, params=p))(data["input"])
    assert orders(jax.jit(jax.grad(lambda p: slow(p).sum())).lower(params).as_text()) != FAST  # the finder finds
    assert orders(jax.jit(lambda b: steps(make(), b)).lower(vec).as_text()) == FAST

    def step(p, _):
        G = create_ggn_mv(model_fn, p, data, "cross_entropy")
        return jax.tree.map(jnp.add, p, G(vec)), None

    assert orders(jax.jit(lambda p: jax.lax.scan(step, p, length=2)[0]).lower(params).as_text()) == FAST


@policies
def test_solvers_agree_with_the_dense_matrix(options):
    G, A = make(**options), dense()
    want = cg(lambda v: A @ v + 0.1 * v, flat, maxiter=3)[0]
    assert_close(jax.jit(LOOPS["cg"])(G), unravel(want), rtol=1e-8)
    assert_close(jax.jit(steps)(G, vec), unravel(A @ (A @ (A @ flat))), rtol=1e-8)
    assert_close(G.dense(), A, rtol=1e-8)


def test_names_and_printing_of_a_model_with_convolutions_go_on(capfd):
    def named(input, params):
        jax.debug.print("seen")
        with jax.named_scope("my_stem"):
            return model_fn(input=input, params=params)

    G = create_ggn_mv(named, params, data, "cross_entropy", linearize="recomputed")
    assert_close(G(vec), make()(vec))
    jax.effects_barrier()
    assert "seen" in capfd.readouterr().out
    assert "my_stem" in jax.jit(lambda G: G(vec)).lower(G).compile().as_text()


# --- many vectors


@pytest.mark.combinations
@policies
@pytest.mark.parametrize("size", [None, 1, 3, 8])
def test_products_with_many_vectors(options, size):
    G = make(**options)
    want = jax.vmap(lambda v: unravel(dense() @ jax.flatten_util.ravel_pytree(v)[0]))(many)
    assert_close(G.matmat(many, vector_batch_size=size), want, rtol=1e-8)
    assert_close(jax.jit(lambda G, vs: G.matmat(vs, vector_batch_size=size))(G, many), want, rtol=1e-8)


def test_derivatives_of_products_with_many_vectors():
    groups = lambda d, size: (Diagonal(d) + Diagonal(d)).matmat(many, vector_batch_size=size)
    total = lambda d, size: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(groups(d, size)))
    assert_close(jax.grad(total)(vec, 2), jax.grad(total)(vec, 5))
    assert_close(jax.jvp(lambda d: groups(d, 2), (vec,), (vec,)), jax.jvp(lambda d: groups(d, 5), (vec,), (vec,)))


def stacked(num_vectors):
    """So many vectors, made without a program."""
    return jax.tree.map(lambda leaf: jax.device_put(np.ones((num_vectors, *leaf.shape), leaf.dtype)), params)


@policies
def test_no_program_grows_with_the_number_of_vectors(options):
    G = make(**options)
    lines = lambda k: len(jax.jit(lambda G, vs: G.matmat(vs, vector_batch_size=4)).lower(G, stacked(k)).as_text().splitlines())
    assert lines(12) == lines(32) == lines(256)  # from 12 on: with 8, two constants are equal, which JAX 0.7 writes once


@policies
def test_groups_take_one_program(options):
    G, vecs = make(**options).linearized(), stacked(23)
    with count_compiles() as compiled:
        G.matmat(vecs, vector_batch_size=5)
    assert compiled.count == 1
    with count_compiles() as compiled:
        make(**options).linearized().matmat(vecs, vector_batch_size=5)
    assert compiled.count == 0


def test_groups_are_vectorised_by_the_operator():
    """In a compiled function too, `multiply_many` gets the groups."""
    sizes = []

    class Noted(Diagonal):
        def multiply_many(self, vecs):
            sizes.append(vecs.shape[0])
            return Diagonal.multiply_many(self, vecs)

    A = register_operator(Noted)(jnp.arange(3.0))
    jax.jit(lambda A, V: A.matmat(V, vector_batch_size=4))(A, jnp.ones((9, 3)))
    assert set(sizes) == {3}  # three groups of three


# --- transfers


@pytest.mark.parametrize("options", [{}, {"linearize": "recomputed"}, {"batch_size": 4}], ids=str)
def test_products_and_algebra_move_nothing_to_the_device(options):
    G, two = make(**options), jax.device_put(2.0)
    tree = jax.tree.map(jnp.ones_like, params)
    with jax.transfer_guard("disallow"):
        G(vec)
        G.flat()(flat)
        G.dense()
        for size in (None, 1, 2, 5):
            G.matmat(many, vector_batch_size=size)
        for A in (2 * G, two * G, -G, G + G, G - 2.0 * G, G.damped(0.1), G.damped(1), G.damped(two), G.damped(tree), G.linearized()):
            A(vec)
        jax.jit(LOOPS["cg"])(G)


# --- in functions that the caller maps over devices

MAPPED = """
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp, numpy as np
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ggn_nb import create_fisher_mv, create_ggn_mv, create_ggn_mv_without_data, create_hessian_mv, create_hessian_mv_without_data
from ggn_nb.losses import cross_entropy
from ggn_nb.tools.models import cnn
from ggn_nb.tools.testing import assert_close

mesh = Mesh(jax.devices(), ("i",))
rng = np.random.default_rng(0)
def model(input, params): return jnp.tanh(input @ params["w"]) @ params["v"]
params = {"w": jnp.asarray(rng.standard_normal((3, 4))), "v": jnp.asarray(rng.standard_normal((4, 3)))}
data = {"input": jnp.asarray(rng.standard_normal((16, 3))), "target": jnp.arange(16) % 3}
vecs = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal((8, *p.shape))), params)
vec = jax.tree.map(lambda v: v[0], vecs)

log_p = lambda p, x, y: jax.nn.log_softmax(model(x, p))[y]
loss = lambda p: -jnp.sum(jax.vmap(partial(log_p, p))(data["input"], data["target"]))
hessian = lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1]
def gauss_newton(v):
    pred, jv = jax.jvp(lambda p: model(data["input"], p), (params,), (v,))
    p = jax.nn.softmax(pred)
    hjv = p * jv - p * jnp.sum(p * jv, axis=-1, keepdims=True)
    return jax.vjp(lambda q: model(data["input"], q), params)[1](hjv)[0]

KINDS = {"ggn": (create_ggn_mv, create_ggn_mv_without_data, gauss_newton),
         "hessian": (create_hessian_mv, create_hessian_mv_without_data, hessian)}
OPTIONS = {"ggn": ({}, {"linearize": "recomputed"}, {"batch_size": 3}, {"vmap_over_data": False}),
           "hessian": ({}, {"batch_size": 2, "linearize": "cached"})}

def agree(got, want): assert_close(jax.device_get(got), jax.device_get(want), rtol=1e-10)

def mapped(fn, in_specs, out_specs, **options):
    return jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options))

def total(fn, vec, **options):
    "fn(params, data, vec), summed over devices, each with its part of the data"
    summed = lambda p, d, v: jax.lax.psum(fn(p, d, v), "i")
    return mapped(summed, (P(), P("i"), P()), P(), **options)(params, data, vec)

for kind, (create, without_data, product) in KINDS.items():
    want, wants = product(vec), jax.vmap(product)(vecs)
    for options in OPTIONS[kind]:
        make = lambda p, d: create(model, p, d, "cross_entropy", **options)
        unscaled = {key: value for key, value in options.items() if key != "linearize"}

        # each device its part of the data; the caller adds up
        agree(total(lambda p, d, v: without_data(model, p, "cross_entropy", 1.0, **unscaled)(v, d), vec), want)
        agree(total(lambda p, d, v: make(p, d)(v), vec), want)
        agree(total(lambda p, d, vs: make(p, d).matmat(vs, vector_batch_size=3), vecs), wants)

        # each device its part of the vectors; the operator is an argument, captured, or made inside
        spread = lambda fn, *args, **options: mapped(fn, (*[P()] * len(args), P("i")), P("i"), **options)(*args, vecs)
        G = make(params, data)
        agree(spread(lambda G, vs: (2.0 * G).damped(1.0).matmat(vs, vector_batch_size=1), G), jax.tree.map(lambda w, v: 2.0 * w + v, wants, vecs))
        agree(spread(lambda vs: jax.lax.map(G, vs)), wants)
        agree(spread(lambda p, d, vs: make(p, d).matmat(vs), params, data), wants)
        agree(mapped(lambda G, v: G(v), (P(), P()), P())(G, vec), want)

G, flat = create_ggn_mv(model, params, data, "cross_entropy"), lambda v: jax.flatten_util.ravel_pytree(v)[0]
want, wants = gauss_newton(vec), jax.vmap(gauss_newton)(vecs)
damped = lambda p, d, v: create_ggn_mv(model, p, d, "cross_entropy").damped(0.25).flat()(flat(v))
agree(total(damped, vec), flat(jax.tree.map(jnp.add, want, vec)))  # four devices add 0.25 v
agree(total(lambda p, d, v: create_ggn_mv(model, p, d, "cross_entropy")(v), vec, check_vma=False), want)
agree(spread(lambda G, vs: G.matmat(vs), G, check_vma=False), wants)

# made outside, of arrays that are spread over the same devices
put = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))
for options in ({}, {"batch_size": 8}):
    G = create_ggn_mv(model, put(params), put(data, "i"), "cross_entropy", **options)
    agree(G(put(vec)), want)
    for vma in (True, False):
        agree(spread(lambda G, vs: G.matmat(vs), G, check_vma=vma), wants)
        agree(mapped(lambda G, v: G(v), (P(), P()), P(), check_vma=vma)(G, vec), want)

# weights, masks and means of each device's own samples; random labels by the key of each
for options in ({}, {"batch_size": 2}):
    local = lambda p, d, v: create_ggn_mv(model, p, d, "cross_entropy", reduction="mean", **options)(v)
    weighted = data | {"weight": jnp.arange(16.0), "mask": jnp.arange(16) % 5 > 0}
    parts = [local(params, jax.tree.map(lambda a: a[i : i + 4], weighted), vec) for i in range(0, 16, 4)]
    summed = mapped(lambda p, d, v: jax.lax.psum(local(p, d, v), "i"), (P(), P("i"), P()), P())(params, weighted, vec)
    agree(summed, jax.tree.map(lambda *leaves: sum(leaves), *parts))
    F = lambda d, key: create_fisher_mv(model, params, d, "cross_entropy", kind="monte_carlo", key=key, **options)(vec)
    drawn = mapped(lambda d, key: jax.lax.psum(F(d, key), "i"), (P("i"), P()), P())(data, jax.random.key(1))
    parts = [F(jax.tree.map(lambda a: a[i : i + 4], data), jax.random.key(1)) for i in range(0, 16, 4)]
    agree(drawn, jax.tree.map(lambda *leaves: sum(leaves), *parts))

# convolutions
fn, weights = cnn(jax.random.key(0), image_shape=(4, 4, 1), channels=(2,), hidden=3, num_classes=3, dtype=jnp.float64)
images = {"input": jnp.asarray(rng.standard_normal((8, 4, 4, 1))), "target": jnp.arange(8) % 3}
make = lambda p, d, **o: create_ggn_mv(fn, p, d, "cross_entropy", **o)
for options in ({}, {"batch_size": 1}):
    got = mapped(lambda p, d: jax.lax.psum(make(p, d, **options)(p), "i"), (P(), P("i")), P())(weights, images)
    agree(got, make(weights, images)(weights))
print("reached the end")
"""


def test_in_functions_that_the_caller_maps_over_devices():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    assert "reached the end" in run_python(MAPPED, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
