"""Copies of operators, by `copy` and `pickle`: they multiply as before, or are refused with a message that says why."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import (
    Diagonal, Stream, create_fisher_mv, create_ggn_mv, create_ggn_mv_without_data, create_hessian_mv, select_params,
)
from ggn_nb.tools.testing import assert_close

RNG = np.random.default_rng(6)
PARAMS = {"u": jnp.asarray(RNG.standard_normal((3, 4))), "v": jnp.asarray(RNG.standard_normal((4, 2)))}
DATA = {"input": RNG.standard_normal((5, 3)), "target": RNG.standard_normal((5, 2))}
CLASSES = {"input": RNG.standard_normal((5, 3)), "target": RNG.integers(0, 2, 5)}


def model(input, params):
    return jnp.tanh(input @ params["u"]) @ params["v"]


def quartic(pred, target):
    return (pred - target) ** 4


def ggn(**options):
    return create_ggn_mv(model, PARAMS, DATA, "mse", **options)


OPERATORS = {
    "kept": ggn,
    "rematerialized": lambda: ggn(linearize="rematerialized"),
    "policy": lambda: ggn(linearize=jax.checkpoint_policies.dots_saveable),
    "names": lambda: ggn(linearize=jax.checkpoint_policies.save_only_these_names("h")),
    "recomputed": lambda: ggn(linearize="recomputed"),
    "chunks": lambda: ggn(batch_size=2, linearize="cached"),
    "function": lambda: create_ggn_mv(model, PARAMS, DATA, quartic),
    "local function": lambda: create_ggn_mv(model, PARAMS, DATA, lambda f, y: (f - y) ** 2),
    "selected": lambda: create_ggn_mv(*select_params(model, PARAMS, "v"), DATA, "mse"),
    "hessian": lambda: create_hessian_mv(model, PARAMS, DATA, "mse"),
    "exact": lambda: create_fisher_mv(model, PARAMS, CLASSES, "cross_entropy", reduction="mean"),
    "monte carlo": lambda: create_fisher_mv(model, PARAMS, CLASSES, "cross_entropy", kind="monte_carlo", key=jax.random.key(0)),
    "empirical": lambda: create_fisher_mv(model, PARAMS, CLASSES, "cross_entropy", kind="empirical"),
    "diagonal": lambda: Diagonal(PARAMS),
    "sum": lambda: ggn() + ggn(linearize="recomputed"),
    "scaled": lambda: 2 * ggn(),
    "damped": lambda: ggn().damped({"u": 1.0, "v": 0.5}),
    "flat": lambda: ggn().flat(),
    "streamed": lambda: create_ggn_mv(model, PARAMS, Stream([DATA, CLASSES | {"target": DATA["target"]}]), "mse"),
    "streamed from a generator": lambda: create_ggn_mv(model, PARAMS, Stream(lambda: iter([DATA])), "mse"),
    "unbound": lambda: create_ggn_mv_without_data(model, PARAMS, "mse", 1.0),
}
WAYS = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda A: pickle.loads(pickle.dumps(A))}
# What cannot be pickled, a function that no module has by its name, and what the message calls it.
REFUSED = {"names": "linearize|save_only_these_names", "local function": "loss_fn|<lambda>",
           "streamed from a generator": "source|<lambda>"}


def product(A):
    """With ones, of whatever the operator takes."""
    ones = lambda tree: jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), tree)
    return A(ones(PARAMS), DATA) if hasattr(A, "bind") else A(ones(A.structure))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPERATORS)
def test_a_copy_multiplies_as_before(name, way):
    A = OPERATORS[name]()
    if way == "pickle" and name in REFUSED:
        with pytest.raises((TypeError, AttributeError, pickle.PicklingError), match=REFUSED[name]): WAYS[way](A)
    else:
        assert_close(product(WAYS[way](A)), product(A))


def test_a_pickle_is_as_large_as_what_it_was_made_from():
    kept, recomputed = (pickle.dumps(ggn(linearize=linearize)) for linearize in ("cached", "recomputed"))
    assert len(kept) <= len(recomputed) + 100
