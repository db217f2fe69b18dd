"""On many devices and in several processes: the same numbers, laid out like the parameters, with one exchange for each product."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import ggn_nb
import pytest

SETUP = """
import sys
from dataclasses import replace
from functools import partial
import jax, jax.numpy as jnp, numpy as np
if len(sys.argv) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # so that all processes run their collectives in the same order
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
jax.config.update("jax_enable_x64", True)
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from ggn_nb import Stream, create_fisher_mv, create_ggn_mv, create_hessian_mv
from ggn_nb.tools.models import mlp
from ggn_nb.tools.testing import assert_close
from ggn_nb.tools.timing import collective_bytes

rng = np.random.default_rng(0)
N, K = 32, 3
model_fn, params = mlp(jax.random.key(0), (4, 8, 8), activation=jnp.tanh, dtype=jnp.float64)
data = {"input": rng.standard_normal((N, 4)), "target": rng.integers(0, 8, N), "weight": rng.uniform(size=N), "mask": rng.uniform(size=N) < 0.8}
params, data = jax.device_get((params, jax.tree.map(jnp.asarray, data)))
normal = lambda *lead: jax.tree.map(lambda p: rng.standard_normal((*lead, *p.shape)), params)
vec, vecs = normal(), normal(K)
KINDS = {"ggn": create_ggn_mv, "hessian": create_hessian_mv, "fisher": create_fisher_mv,
         "monte carlo": partial(create_fisher_mv, kind="monte_carlo", key=jax.random.key(3))}

def agree(got, want): assert_close(jax.device_get(got), jax.device_get(want), rtol=1e-12)

def like(tree, other):
    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)

def put(tree, mesh, *spec): return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*spec))), tree)

def exchanged(A, v): return collective_bytes(jax.jit(lambda A, v: A(v)).lower(A, v).compile().as_text())

size = sum(p.nbytes for p in jax.tree.leaves(params))
log_p = lambda x, y, p: jax.nn.log_softmax(model_fn(input=x, params=p))[y]
cross_entropy = lambda p, d: -jnp.sum(d["weight"] * jax.vmap(log_p, in_axes=(0, 0, None))(d["input"], d["target"], p))
"""

REPLICATED = """
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
spread, there, v, vs = put(data, mesh, "data"), *(put(t, mesh) for t in (params, vec, vecs))
gradient = collective_bytes(jax.jit(jax.grad(cross_entropy)).lower(there, spread).compile().as_text())
assert gradient == size
mean = {"reduction": "mean"}
OPTIONS = {"ggn": ({}, {"linearize": "rematerialized"} | mean, {"linearize": "recomputed"}, {"batch_size": 8} | mean, {"batch_size": 12}, {"batch_size": 12, "linearize": "cached"}),
           "hessian": ({}, {"batch_size": 12} | mean), "fisher": (mean,), "monte carlo": ({"batch_size": 8},)}
for kind, create in KINDS.items():
    for options in OPTIONS[kind]:
        A, want = create(model_fn, there, spread, "cross_entropy", **options), create(model_fn, params, data, "cross_entropy", **options)
        got = A(v)
        agree(got, want(vec))
        like(got, there)
        assert exchanged(A, v) == gradient, (kind, options)
        if kind == "ggn" and "reduction" not in options:
            got = A.matmat(vs, vector_batch_size=2)
            agree(got, want.matmat(vecs))
            like(got, vs)
print("reached the end")
"""

OTHER_LAYOUTS = """
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
want, want_hessian = (create(model_fn, params, data, "cross_entropy") for create in (create_ggn_mv, create_hessian_mv))
product, products, product_hessian = want(vec), want.matmat(vecs), want_hessian(vec)

# parameters sharded, over the axis of the data, the other axis, both; each leaf along its last axis
everywhere = put(data, mesh, "data")
for axes in ("data", "model", ("data", "model")):
    cut = lambda tree: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*[None] * (a.ndim - 1), axes))), tree)
    there, v, vs = map(cut, (params, vec, vecs))
    H = create_hessian_mv(model_fn, there, everywhere, "cross_entropy")
    agree(got := H(v), product_hessian)
    like(got, there)
    for options in ({}, {"batch_size": 8}):
        G = create_ggn_mv(model_fn, there, everywhere, "cross_entropy", **options)
        agree(got := G(v), product)
        like(got, there)
        if not options:
            agree(got := G.matmat(vs), products)
            like(got, vs)
        assert exchanged(G, v) <= (10 if options else 3) * size  # left to the partitioner

# data over both axes; only a part of the data sharded; parameters on one device
there, v, vs = (put(t, mesh) for t in (params, vec, vecs))
for spread in (put(data, mesh, ("data", "model")), data | {"input": put(data["input"], mesh, "data")}):
    for p, u in ((there, v), (params, vec)):
        G = create_ggn_mv(model_fn, p, spread, "cross_entropy", batch_size=16)
        agree(G(u), product)
        assert exchanged(G, u) == size

# a model of the whole batch
whole = lambda input, params: jax.vmap(lambda x: model_fn(input=x, params=params))(input)
for options in ({}, {"batch_size": 8}):
    G = create_ggn_mv(whole, there, everywhere, "cross_entropy", vmap_over_data=False, **options)
    agree(G(v), product)
    like(G(v), there)

# a stream of sharded batches
batches = lambda: (put(jax.tree.map(lambda a: a[i : i + 8], data), mesh, "data") for i in range(0, N, 8))
G = create_ggn_mv(model_fn, there, Stream(batches), "cross_entropy")
agree(G(v), product)
like(G(v), there)
agree(G.matmat(vs), products)

# a mesh with explicit axes, which is what jax.make_mesh makes
explicit = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
for options in ({}, {"batch_size": 12}):
    G = create_ggn_mv(model_fn, put(params, explicit), put(data, explicit, "data"), "cross_entropy", **options)
    agree(G(put(vec, explicit)), product)
    agree(G.matmat(put(vecs, explicit), vector_batch_size=2), products)
    for mixed in (data | {"target": put(data["target"], explicit)}, data):  # others are laid out otherwise, or nowhere
        G = create_ggn_mv(model_fn, put(params, explicit), mixed | {"input": put(data["input"], explicit, "data")}, "cross_entropy", **options)
        agree(G(vec), product)
    agree(G(jax.tree.map(lambda a: put(a, explicit, "data") if a.shape[0] % 4 == 0 else a, vec)), product)

# half precision, derivatives with respect to weights, captured operators
halves = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
half = lambda data, params, vec: create_ggn_mv(model_fn, params, data | {"input": halves(data["input"])}, "cross_entropy", batch_size=8)(vec)
assert_close(jax.device_get(half(everywhere, halves(there), halves(v))), jax.device_get(half(data, halves(params), halves(vec))), rtol=3e-2)
for options in ({}, {"batch_size": 8}):
    G, single = (create_ggn_mv(model_fn, *at, "cross_entropy", linearize="recomputed", **options) for at in ((there, everywhere), (params, data)))
    quadratic = lambda w, G, v: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, v, replace(G, samples=G.samples._replace(weight=w))(v))))
    agree(jax.grad(quadratic)(everywhere["weight"], G, v), jax.grad(quadratic)(data["weight"], single, vec))
agree(jax.jit(create_ggn_mv(model_fn, there, everywhere, "cross_entropy"))(v), product)
print("reached the end")
"""

TWO_PROCESSES = """
mesh = Mesh(np.array(jax.devices()), ("data",))
assert jax.process_count() == 2 and mesh.size == 4
mine = slice(jax.process_index() * N // 2, (jax.process_index() + 1) * N // 2)
spread = jax.tree.map(lambda a: jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), a[mine]), data)
assert not spread["input"].is_fully_addressable
there, v, vs = (put(t, mesh) for t in (params, vec, vecs))
for options in ({}, {"batch_size": 12, "reduction": "mean"}):
    G, want = (create_ggn_mv(model_fn, *at, "cross_entropy", **options) for at in ((there, spread), (params, data)))
    agree(G(v), want(vec))
    like(G(v), there)
    agree(G.matmat(vs, vector_batch_size=2), want.matmat(vecs))
for kind in ("hessian", "monte carlo"):
    A, want = (KINDS[kind](model_fn, *at, "cross_entropy", batch_size=12) for at in ((there, spread), (params, data)))
    agree(A(v), want(vec))
cut = lambda tree: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*[None] * (a.ndim - 1), "data"))), tree)
product = create_ggn_mv(model_fn, cut(params), spread, "cross_entropy")(cut(vec))
like(product, cut(params))
agree(jax.jit(lambda t: t, out_shardings=NamedSharding(mesh, P()))(product), create_ggn_mv(model_fn, params, data, "cross_entropy")(vec))
weight, target = spread["weight"], spread["target"]
refused = (({"weight": -weight}, "weight: got a negative"), ({"target": target + 8}, "target"), ({"weight": 0 * weight}, "weight: got nothing"))
for wrong, word in refused:
    try: create_ggn_mv(model_fn, there, spread | wrong, "cross_entropy", reduction="mean")
    except ValueError as error: assert word in str(error), error
    else: raise AssertionError(word)
print("reached the end")
"""


def start(code, devices, *args):
    """A fresh process with strict settings and so many devices."""
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    path = os.pathsep.join([str(Path(ggn_nb.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | strict | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", SETUP + code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(processes):
    """Wait until all have reached the end; none is left behind."""
    try:
        for process in processes:
            output = process.communicate(timeout=400)[0]
            assert process.returncode == 0 and "reached the end" in output, output
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.parametrize("code", [REPLICATED, OTHER_LAYOUTS], ids=["replicated", "other layouts"])
def test_many_devices(code):
    finish([start(code, 8)])


def test_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    finish([start(TWO_PROCESSES, 2, rank, port) for rank in range(2)])
