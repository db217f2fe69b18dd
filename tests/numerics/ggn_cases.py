"""What the numerical tests share: reference losses, small models, transformations of models, hypothesis runs."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import ggn_nb
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ggn_nb.tools.models import cnn, mlp, transformer
from ggn_nb.tools.testing import dense_from_mv, dense_ggn
from hypothesis import HealthCheck, given, settings
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

BUILT_IN = ("mse", "cross_entropy", "binary_cross_entropy", "none")
POLICIES = ("cached", "rematerialized", "recomputed")


def log_softmax_at(pred, target):
    """−log softmax(pred)[target] at each position, written with a one-hot target."""
    hot = jax.nn.one_hot(target, pred.shape[-1], dtype=pred.dtype)
    return -jnp.sum(hot * jax.nn.log_softmax(pred), axis=-1)


# loss(pred, target), for one sample or a batch: what the oracle differentiates.
REFERENCE = {
    "mse": lambda f, y: (f - y) ** 2,
    "cross_entropy": log_softmax_at,
    "binary_cross_entropy": lambda f, y: jnp.logaddexp(0.0, f) - y * f,
    "none": lambda f, y: f**2 / 2,
}


def coupled(pred, target):
    """A scalar loss whose Hessian mixes the last axis and depends on the target."""
    return jnp.sum(jnp.logaddexp(0.0, jnp.sum(pred, axis=-1)) + jnp.sum((pred - target) ** 4, axis=-1))


def quartic(pred, target):
    """An array-valued loss, one entry for each entry of the prediction."""
    return (pred - target) ** 4


CUSTOM = {
    "coupled": coupled,
    "quartic": quartic,
    "optax": optax.softmax_cross_entropy_with_integer_labels,
    "huber": optax.huber_loss,
}
LOSSES = {name: name for name in BUILT_IN} | CUSTOM
LABELLED = {"cross_entropy", "optax"}


def reference(name):
    """The loss called `name` as a function of (pred, target)."""
    return REFERENCE.get(name) or CUSTOM[name]


def targets(rng, name, shape):
    """Targets for predictions of `shape` that suit the loss called `name`."""
    if name in LABELLED:
        return jnp.asarray(rng.integers(0, shape[-1], shape[:-1]))
    if name == "binary_cross_entropy":
        return jnp.asarray(rng.uniform(size=shape))
    return jnp.asarray(rng.standard_normal(shape))


class Case(NamedTuple):
    model_fn: object
    params: object
    input: jax.Array
    pred_shape: tuple  # of the whole batch


@cache
def model_case(name):
    """A small model in float64 with three or two samples."""
    key, rng = jax.random.key(3), np.random.default_rng(3)
    if name == "mlp":
        x = jnp.asarray(rng.standard_normal((3, 4)))
        return Case(*mlp(key, (4, 3, 3), jnp.tanh, dtype=jnp.float64), x, (3, 3))
    if name == "cnn":
        x = jnp.asarray(rng.standard_normal((3, 4, 4, 1)))
        return Case(*cnn(key, (4, 4, 1), (2,), 3, 3, dtype=jnp.float64), x, (3, 3))
    sizes = dict(num_layers=2, width=4, num_heads=2, vocab_size=5, max_len=3, dtype=jnp.float64)
    x = jnp.asarray(rng.integers(0, 5, (2, 3)))
    model_fn, params = transformer(key, scan=name == "transformer-scan", **sizes)
    louder = jax.tree.map(lambda p: p + 0.3 * jnp.asarray(rng.standard_normal(p.shape)), params)
    return Case(model_fn, louder, x, (2, 3, 5))


@cache
def data_case(name, loss):
    """The data of `model_case(name)`, with targets that suit `loss`."""
    case = model_case(name)
    return {"input": case.input, "target": targets(np.random.default_rng(4), loss, case.pred_shape)}


# Large programs that run once: compiled without optimisation, which is faster.
QUICK = {"xla_backend_optimization_level": "0", "xla_llvm_disable_expensive_passes": True}
dense_of = jax.jit(dense_from_mv, compiler_options=QUICK)


def oracle_of(model_fn, params, data, loss):
    """The dense matrix of `dense_ggn`, summed over samples."""
    one = lambda params, datum: dense_ggn(model_fn, params, datum, loss, vmap_over_data=False)
    total = lambda params, data: jnp.sum(jax.vmap(one, in_axes=(None, 0))(params, data), axis=0)
    return jax.jit(total, compiler_options=QUICK)(*jax.tree.map(jnp.asarray, (params, data)))


def batched(model_fn):
    """`model_fn`, written for a whole batch: what `vmap_over_data=False` expects."""
    return lambda input, params: jax.vmap(lambda x: model_fn(input=x, params=params))(input)


def linear(input, params):
    """The model with the simplest Jacobian."""
    return input @ params


def random_like(tree, seed=0):
    """A tree of normal numbers, shaped like `tree`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(np.shape(a)), a.dtype), tree)


def inner(a, b):
    """The inner product of two trees."""
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def subjaxprs(value):
    """The jaxprs in a parameter of an equation, with the constants that each holds."""
    if isinstance(value, ClosedJaxpr):
        yield value.jaxpr, value.consts
    elif isinstance(value, Jaxpr):
        yield value, []
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from subjaxprs(each)


def baked(jaxpr, consts):
    """The arrays of more than one entry that a program holds as constants, at any depth."""
    found = [np.shape(const) for const in consts if np.size(const) > 1]
    for equation in jaxpr.eqns:
        found += [np.shape(v.val) for v in equation.invars if isinstance(v, Literal) and np.size(v.val) > 1]
        for value in equation.params.values():
            for inner_jaxpr, inner_consts in subjaxprs(value):
                found += baked(inner_jaxpr, inner_consts)
    return found


def baked_in(fn, *args):
    """The shapes of the arrays that the program of `fn(*args)` holds as constants."""
    closed = jax.make_jaxpr(fn)(*args)
    return baked(closed.jaxpr, closed.consts)


ALL_CASES = os.environ.get("GGN_NB_ALL_CASES") == "True"


def run_cases(number, check, **strategies):
    """Run `check` on `number` examples, the same ones each time: a third of them, or with `--flags slow` all."""
    number, seen = number if ALL_CASES else -(-number // 3), []

    def counted(**drawn):
        seen.append(drawn)
        check(**drawn)

    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    run = settings(max_examples=number, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)
    run(given(**strategies)(counted))()
    assert len(seen) >= number


def run_python(code, **env):
    """Run `code` in a fresh process with strict settings, and return what it printed on both streams."""
    strict = {"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    path = os.pathsep.join([str(Path(ggn_nb.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | strict | {"PYTHONPATH": path} | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
