"""The policy never changes the number: each combination of options gives that of the definition, or is refused by name."""

import os
import re
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import random_like, run_cases
from ggn_nb import Stream, create_fisher_mv, create_ggn_mv, create_hessian_mv, create_loss
from ggn_nb.tools.testing import assert_close
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

N, CLASSES, DRAWS = 6, 3, 2
RNG = np.random.default_rng(5)
KEY = jax.random.key(3)
PARAMS = {name: jnp.asarray(RNG.standard_normal(shape)) for name, shape in (("u", (2, 3)), ("v", (3, CLASSES)))}
VEC = random_like(PARAMS)
DATA = {"input": RNG.standard_normal((N, 2)), "target": RNG.integers(0, CLASSES, N), "index": np.arange(N),
        "weight": RNG.uniform(0.5, 2, N), "mask": np.arange(N) != 1}


# --- models and losses, of one sample or of all at once, and which of them couple the samples of a call


def by_rows(input, params):
    """Each prediction from its own sample."""
    return jnp.tanh(input @ params["u"]) @ params["v"]


def batch_norm(input, params):
    """Each prediction from the mean and variance of the batch too."""
    hidden = jnp.tanh(input @ params["u"])
    centred = hidden - jnp.mean(hidden, axis=0, keepdims=True)
    return centred / jnp.sqrt(0.1 + jnp.mean(centred**2, axis=0, keepdims=True)) @ params["v"]


def cross_entropy(pred, target):
    """The definition of the built-in loss, a value for each sample."""
    return -jnp.sum(jax.nn.one_hot(target, CLASSES, dtype=pred.dtype) * jax.nn.log_softmax(pred), axis=-1)


def mean_square(pred, target):
    """One value for all that it is called with: their mean."""
    return jnp.mean((pred - jax.nn.one_hot(target, CLASSES, dtype=pred.dtype)) ** 2)


def contrastive(pred, target):
    """A value for each sample, which tells it from the other classes of the batch."""
    alike = jnp.equal(target[:, None], target[None]).astype(pred.dtype)
    return -jnp.sum(alike * jax.nn.log_softmax(pred @ pred.T), axis=-1)


class Case(NamedTuple):
    model: object
    loss: object
    couples: bool  # do the samples of one call depend on each other?
    alone: bool  # can it be called with one sample, without a batch axis?
    given: object = None  # the loss as it is given to the package, if not as that function


CASES = {
    "by rows": Case(by_rows, cross_entropy, couples=False, alone=True, given="cross_entropy"),
    "batch norm": Case(batch_norm, cross_entropy, couples=True, alone=False, given="cross_entropy"),
    "mean loss": Case(by_rows, mean_square, couples=True, alone=True),
    "contrastive": Case(by_rows, contrastive, couples=True, alone=False),
}
KINDS = {
    "ggn": create_ggn_mv,
    "hessian": create_hessian_mv,
    "exact": create_fisher_mv,
    "empirical": partial(create_fisher_mv, kind="empirical"),
    "monte carlo": partial(create_fisher_mv, kind="monte_carlo", key=KEY, num_samples=DRAWS),
}
PAIRS = [(case, kind) for case in CASES for kind in KINDS if CASES[case].given or kind in ("ggn", "hessian")]
OPTIONS = {
    "linearize": [None, "cached", "rematerialized", "recomputed", jax.checkpoint_policies.dots_saveable],
    "batch_size": [None, 1, 3, N],
    "order": [range(N), [3, 0, 5, 1, 4, 2]],
    "ends": [None, (3, 6), (4, 6)],  # of the batches of a stream; None: no stream
    "vmap_over_data": [True, False],
    "reduction": ["sum", "mean"],
    "parts": [(), ("weight",), ("weight", "mask")],
}


# --- the definition, dense in float64


def weights(case, data):
    """Of the values that the loss returns; one value for all samples has none but 1."""
    counted = jnp.where(data["mask"], data["weight"], 0)
    return jnp.mean(counted) if case.loss is mean_square else counted


@partial(jax.jit, static_argnums=(0, 1))
def matrix(case, kind, data):
    """Jᵀ H J, or the Hessian, of one call with these samples."""
    flat, unravel = ravel_pytree(PARAMS)
    predict = lambda p: case.model(input=data["input"], params=unravel(p))
    total = lambda f: jnp.sum(weights(case, data) * case.loss(f, data["target"]))
    if kind == "hessian":
        return jax.hessian(lambda p: total(predict(p)))(flat)
    pred, J = predict(flat), jax.jacrev(predict)(flat)
    if kind in ("ggn", "exact"):
        return jnp.einsum("icp,icjd,jdq->pq", J, jax.hessian(total)(pred), J)
    draw = lambda i, f: jax.vmap(lambda k: create_loss(case.given).sample(k, f))(jax.random.split(jax.random.fold_in(KEY, i), DRAWS))
    target = data["target"][:, None] if kind == "empirical" else jax.vmap(draw)(data["index"], pred)
    scores = jax.vmap(jax.vmap(jax.grad(case.loss), in_axes=(None, 0)))(pred, target)
    g = jnp.einsum("ikc,icp->ikp", scores, J)
    return jnp.einsum("i,ikp,ikq->pq", weights(case, data), g, g) / target.shape[1]


def oracle(case, kind, calls, reduction):
    """The sum over the calls of model and loss; for a mean, divided by the weights of all values that the loss returned."""
    total = np.asarray(sum(matrix(case, kind, call) for call in calls))
    return total / sum(np.sum(weights(case, call)) for call in calls) if reduction == "mean" else total


def pick(data, rows):
    return {name: leaf[np.asarray(rows)] for name, leaf in data.items()}


def refusals(case, linearize, batch_size, ends, vmap_over_data, parts, calls):
    """The options that may be refused: with them the number would be another one, or there is none."""
    names = []
    if ends and linearize not in (None, "recomputed"): names.append("linearize")
    if vmap_over_data: return names
    if case.couples and batch_size and batch_size < max(len(call["target"]) for call in calls): names.append("batch_size")
    return names + list(parts) * (case.loss is mean_square)  # one value has no weight for each sample


# --- each combination


def spread(data):
    """On all devices, where there are several and the samples can be shared out among them."""
    if len(data["target"]) % jax.device_count(): return data
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    return jax.device_put(data, sharding)


def check(name, kind, linearize, batch_size, order, ends, vmap_over_data, reduction, parts):
    case = CASES[name]
    vmap_over_data = vmap_over_data and case.alone
    ones = {"weight": np.ones(N), "mask": np.ones(N, bool)}
    data = pick(DATA | {part: ones[part] for part in ones if part not in parts}, order)
    batches = [pick(data, range(start, end)) for start, end in zip((0, *ends), ends)] if ends else [data]
    calls = batches if not vmap_over_data else [pick(data, [i]) for i in range(N)]
    given = [spread({k: v for k, v in batch.items() if k not in ones or k in parts}) for batch in batches]
    source = Stream(given, prefetch=0) if ends else given[0]
    options = dict(vmap_over_data=vmap_over_data, reduction=reduction, batch_size=batch_size, linearize=linearize)
    make = partial(KINDS[kind], case.model, PARAMS, source, case.given or case.loss, **options)
    try: A = make()
    except ValueError as error:
        named = re.sub(r"^batch \d+: ", "", str(error))
        assert named.startswith(tuple(refusals(case, linearize, batch_size, ends, vmap_over_data, parts, calls))), error
    else:
        flat, unravel = ravel_pytree(VEC)
        assert_close(A(VEC), unravel(oracle(case, kind, calls, reduction) @ flat), rtol=1e-9)


@pytest.mark.combinations
@pytest.mark.parametrize("name, kind", PAIRS)
def test_the_policy_never_changes_the_number(name, kind):
    run_cases(8 if jax.device_count() == 1 else 4, partial(check, name, kind), **{option: st.sampled_from(values) for option, values in OPTIONS.items()})


def test_the_same_on_two_devices():
    if jax.device_count() > 1: pytest.skip("there are several already")
    env = os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "never and (ggn or monte)"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\d passed", done.stdout), done.stdout + done.stderr
