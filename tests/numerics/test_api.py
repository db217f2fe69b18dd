"""The public names, their signatures, and the ways in which they are called."""

import functools
import inspect
from collections import UserDict
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import ggn_nb
import ggn_nb.operators.creation
import ggn_nb.operators.curvature
import ggn_nb.operators.fisher
import ggn_nb.operators.ggn
import ggn_nb.operators.hessian
import ggn_nb.losses.create
import ggn_nb.losses.closed_form
import ggn_nb.losses.custom
import ggn_nb.losses.loss
import ggn_nb.operators.operator
import ggn_nb.operators.samples
import ggn_nb.operators.square_root
import ggn_nb.operators.streamed
import ggn_nb.operators.streams
import ggn_nb.operators.subset
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import BUILT_IN, LOSSES, linear
from ggn_nb import (
    ClosedFormLoss,
    CustomLoss,
    Loss,
    LossFn,
    LossHessian,
    create_fisher_mv,
    create_ggn_mv,
    create_ggn_mv_without_data,
    create_hessian_mv,
    create_loss,
    create_loss_hessian_mv,
)
from ggn_nb.losses.closed_form import registered_losses
from ggn_nb.losses.mse import mse
from ggn_nb.tools.testing import assert_close

W, V, X = (jnp.asarray(np.random.default_rng(k).standard_normal(s)) for k, s in enumerate([(3, 2), (3, 2), (4, 3)]))
DATA = {"input": X, "target": jnp.zeros((4, 2))}
LABELLED = {"input": X, "target": jnp.array([0, 1, 0, 1])}

HOMES = {
    "create_ggn_mv": ggn_nb.operators.ggn,
    "create_ggn_mv_without_data": ggn_nb.operators.ggn,
    "create_loss_hessian_mv": ggn_nb.losses.create,
    "LossFn": ggn_nb.losses.create,
    "LossHessian": ggn_nb.losses.create,
    "Loss": ggn_nb.losses.loss,
    "ClosedFormLoss": ggn_nb.losses.closed_form,
    "register_loss": ggn_nb.losses.closed_form,
    "CustomLoss": ggn_nb.losses.custom,
    "create_loss": ggn_nb.losses.create,
    "create_hessian_mv": ggn_nb.operators.hessian,
    "create_hessian_mv_without_data": ggn_nb.operators.hessian,
    "create_fisher_mv": ggn_nb.operators.fisher,
    "create_fisher_mv_without_data": ggn_nb.operators.fisher,
    "Hessian": ggn_nb.operators.hessian,
    "Fisher": ggn_nb.operators.fisher,
    "Operator": ggn_nb.operators.operator,
    "register_operator": ggn_nb.operators.operator,
    "Diagonal": ggn_nb.operators.operator,
    "Curvature": ggn_nb.operators.curvature,
    "Streamed": ggn_nb.operators.streamed,
    "GGN": ggn_nb.operators.ggn,
    "Unbound": ggn_nb.operators.creation,
    "Samples": ggn_nb.operators.samples,
    "Stream": ggn_nb.operators.streams,
    "select_params": ggn_nb.operators.subset,
}


@pytest.mark.parametrize("name", HOMES)
def test_names_are_in_the_package_and_where_they_are_defined(name):
    assert getattr(ggn_nb, name) is getattr(HOMES[name], name)
    assert getattr(ggn_nb, name).__module__ == HOMES[name].__name__
    assert name in HOMES[name].__all__
    assert inspect.getdoc(getattr(ggn_nb, name))


def spelled(fn):
    """(name, kind, default) of each parameter."""
    return [(p.name, p.kind.name, p.default) for p in inspect.signature(fn).parameters.values()]


def either(name, default=inspect.Parameter.empty):
    return (name, "POSITIONAL_OR_KEYWORD", default)


def keyword(name, default):
    return (name, "KEYWORD_ONLY", default)


REST = ("kwargs", "VAR_KEYWORD", inspect.Parameter.empty)
SIGNATURES = {
    create_loss_hessian_mv: [either("loss_fn"), REST],
    create_loss: [either("loss_fn"), ("options", "VAR_KEYWORD", inspect.Parameter.empty)],
    create_ggn_mv_without_data: [
        *map(either, ("model_fn", "params", "loss_fn", "factor")),
        keyword("vmap_over_data", True),
        keyword("loss_hessian_mv", None),
    ],
    create_ggn_mv: [
        *map(either, ("model_fn", "params", "data")),
        either("loss_fn", None),
        keyword("num_curv_samples", None),
        keyword("num_total_samples", None),
        keyword("vmap_over_data", True),
        keyword("loss_hessian_mv", None),
    ],
}


@pytest.mark.parametrize("fn", SIGNATURES, ids=lambda fn: fn.__name__)
def test_signature(fn):
    ours, seed = spelled(fn), SIGNATURES[fn]
    assert ours[: len(seed)] == seed
    for _, kind, default in ours[len(seed) :]:  # what is new is a keyword with a default
        assert kind == "KEYWORD_ONLY"
        assert default is not inspect.Parameter.empty


def test_policy_keyword_is_documented_by_its_default():
    for create in (create_ggn_mv, create_hessian_mv, create_fisher_mv):
        assert inspect.signature(create).parameters["linearize"].default is None
        assert "cached" in repr(create(linear, W, LABELLED, "cross_entropy"))
        assert "recomputed" in repr(create(linear, W, LABELLED, "cross_entropy", batch_size=2))


@pytest.mark.parametrize("loss", LOSSES)
def test_signature_of_a_hessian_product(loss):
    assert spelled(create_loss_hessian_mv(LOSSES[loss])) == [either("jv"), either("pred"), either("target", None), REST]


def test_signatures_of_the_products():
    G, mv = create_ggn_mv(linear, W, DATA, "mse"), create_ggn_mv_without_data(linear, W, "mse", 1.0)
    assert [name for name, *_ in spelled(G)] == ["vec"]
    assert [name for name, *_ in spelled(mv)] == ["vec", "data"]
    assert_close(G(vec=V), mv(vec=V, data=DATA))


def test_loss_names():
    expected = {
        "MSE": "mse",
        "CROSS_ENTROPY": "cross_entropy",
        "BINARY_CROSS_ENTROPY": "binary_cross_entropy",
        "NONE": "none",
    }
    assert issubclass(LossFn, StrEnum)
    assert {member.name: member.value for member in LossFn} == expected
    assert tuple(sorted(LossFn)) == tuple(sorted(BUILT_IN))


@pytest.mark.parametrize("name", BUILT_IN)
def test_losses_by_name_and_by_the_function_that_makes_them(name):
    make = registered_losses()[name]
    for loss in (create_loss(name), create_loss(LossFn(name)), create_loss(make), make(), create_loss(make())):
        assert isinstance(loss, ClosedFormLoss)
        assert isinstance(loss, Loss)
        assert loss.name == name
    for _, kind, default in spelled(make):  # options are keywords, and all of them have defaults
        assert kind == "KEYWORD_ONLY"
        assert default is not inspect.Parameter.empty


def test_every_loss_has_the_methods_of_the_interface():
    methods = [name for name, member in vars(Loss).items() if inspect.isfunction(member)]
    assert {"value", "gradient", "hessian_mv", "square_root_mv", "square_root_transpose_mv", "sample", "total", "weight_sum"} <= set(methods)
    for kind in (ClosedFormLoss, CustomLoss):
        assert issubclass(kind, Loss)
        for name in methods:
            assert spelled(getattr(kind, name)) == spelled(getattr(Loss, name))


def test_kinds_of_losses():
    loss = lambda f, y: (f - y) ** 2
    assert isinstance(create_loss(loss), CustomLoss)
    assert isinstance(create_loss_hessian_mv(loss), LossHessian)
    assert isinstance(create_loss_hessian_mv("mse").loss, ClosedFormLoss)
    assert create_loss("cross_entropy", axis=-3, label_smoothing=0.1).axis == -3


# --- how the seed's users call a loss Hessian

f, u = jnp.array([0.0, 1.0, -2.0]), jnp.array([1.0, 2.0, 3.0])
s = np.exp(f - 1) / np.sum(np.exp(f - 1))
q = 1 / (1 + np.exp(-f))
BY_HAND = {
    "mse": 2 * np.asarray(u),
    "cross_entropy": (np.diag(s) - np.outer(s, s)) @ u,
    "binary_cross_entropy": np.diag(q * (1 - q)) @ u,
    "none": np.asarray(u),
}
CALLS = {
    "positional": lambda mv: mv(u, f),
    "pred by keyword": lambda mv: mv(u, pred=f),
    "all by keyword": lambda mv: mv(jv=u, pred=f, target=None),
    "target by position": lambda mv: mv(u, f, jnp.asarray(s)),
    "target by keyword": lambda mv: mv(u, pred=f, target=jnp.array(1)),
    "more keywords": lambda mv: mv(u, f, key=3, weights="anything"),
    "numpy": lambda mv: mv(np.asarray(u), np.asarray(f)),
    "jit": lambda mv: jax.jit(mv)(u, f),
    "vmap over vectors": lambda mv: jax.vmap(mv, in_axes=(0, None))(u[None], f)[0],
    "vmap over samples": lambda mv: jax.vmap(mv)(u[None], f[None])[0],
    "vmap as the seed's product does": lambda mv: jax.vmap(mv)(u[None], pred=f[None], target=jnp.array([1]))[0],
    "leading axes": lambda mv: mv(u[None, None], f[None, None])[0, 0],
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("loss", BUILT_IN)
def test_built_in_hessian_product_by_hand(loss, call):
    for name in (loss, LossFn(loss)):
        assert_close(CALLS[call](create_loss_hessian_mv(name)), jnp.asarray(BY_HAND[loss]))
    assert_close(CALLS[call](create_loss_hessian_mv(loss_fn=loss, anything="else")), jnp.asarray(BY_HAND[loss]))


@pytest.mark.parametrize("loss", BUILT_IN)
def test_only_targets_that_a_product_reads_are_looked_at(loss):
    mv = create_loss_hessian_mv(loss)
    if loss != "cross_entropy":  # which looks for ignored labels, and so reads a target where there is one
        assert_close(mv(u, f, f), jnp.asarray(BY_HAND[loss]))
    else:
        with pytest.raises(ValueError, match="target: got values that cross_entropy does not take, expected labels"):
            mv(u, f, f)


@pytest.mark.parametrize("loss", [lambda f, y: jnp.sum((f - y) ** 2), lambda f, y: (f - y) ** 2], ids=["scalar", "array"])
def test_custom_hessian_product(loss):
    mv = create_loss_hessian_mv(loss)
    for got in (mv(u, f, f), mv(u, pred=f, target=f), mv(jv=u, pred=f, target=f, other=1), jax.jit(mv)(u, f, f)):
        assert_close(got, 2 * u)
    assert_close(jax.vmap(mv)(u[None], pred=f[None], target=f[None]), 2 * u[None])


# --- how the seed's users call the products


@functools.partial(jax.tree_util.register_dataclass, data_fields=["curvature"], meta_fields=[])
@dataclass(frozen=True)
class OwnLoss(Loss):
    """A loss that is neither a closed form nor differentiated."""

    curvature: jax.Array

    def hessian_mv(self, jv, pred, target=None, *, weight=None, mask=None, **kwargs):
        return self.curvature * jv

    def weight_sum(self, pred, target=None, *, weight=None, mask=None):
        return jnp.ones(())

    def faults(self, pred, target=None, *, weight=None, mask=None):
        return {}


G_MSE = 2 * X.T @ (X @ V)
BOUND = {
    "positional": lambda: create_ggn_mv(linear, W, DATA, "mse")(V),
    "enum": lambda: create_ggn_mv(linear, W, DATA, LossFn.MSE)(V),
    "keywords": lambda: create_ggn_mv(model_fn=linear, params=W, data=DATA, loss_fn="mse")(V),
    "given product": lambda: create_ggn_mv(linear, W, DATA, loss_hessian_mv=lambda jv, pred, target: 2 * jv)(V),
    "given product, only keywords used": lambda: create_ggn_mv(linear, W, DATA, loss_hessian_mv=lambda jv, **kwargs: 2 * jv)(V),
    "given created product": lambda: create_ggn_mv(linear, W, DATA, None, loss_hessian_mv=create_loss_hessian_mv("mse"))(V),
    "given partial": lambda: create_ggn_mv(linear, W, DATA, loss_hessian_mv=functools.partial(lambda c, jv, pred, target: c * jv, 2))(V),
    "custom": lambda: create_ggn_mv(linear, W, DATA, lambda f, y: jnp.sum(f**2))(V),
    "jitted custom": lambda: create_ggn_mv(linear, W, DATA, jax.jit(lambda f, y: jnp.sum(f**2)))(V),
    "whole batch": lambda: create_ggn_mv(linear, W, DATA, "mse", vmap_over_data=False)(V),
    "half of the samples": lambda: 0.5 * create_ggn_mv(linear, W, DATA, "mse", num_curv_samples=4, num_total_samples=8)(V),
    "a loss object": lambda: create_ggn_mv(linear, W, DATA, mse())(V),
    "the function that makes it": lambda: create_ggn_mv(linear, W, DATA, mse)(V),
    "a loss of one's own": lambda: create_ggn_mv(linear, W, DATA, OwnLoss(jnp.asarray(2.0)))(V),
    "a custom loss object": lambda: create_ggn_mv(linear, W, DATA, CustomLoss(jax.tree_util.Partial(lambda f, y: f**2)))(V),
    "the product of a loss object": lambda: create_ggn_mv(linear, W, DATA, loss_hessian_mv=LossHessian(mse()))(V),
    "unit weights": lambda: create_ggn_mv(linear, W, DATA | {"weight": jnp.ones(4), "mask": jnp.ones(4, bool)}, "mse")(V),
    "a mean over entries": lambda: 8.0 * create_ggn_mv(linear, W, DATA, "mse", reduction="mean")(V),
    "read-only data": lambda: create_ggn_mv(linear, W, MappingProxyType(DATA), "mse")(V),
    "another mapping": lambda: create_ggn_mv(linear, W, UserDict(DATA), "mse")(V),
    "no target": lambda: create_ggn_mv(linear, W, {"input": X, "target": None}, "mse")(V),
    "jit": lambda: jax.jit(create_ggn_mv(linear, W, DATA, "mse"))(V),
    "unbound": lambda: create_ggn_mv_without_data(linear, W, "mse", 1.0)(V, DATA),
    "unbound, keywords": lambda: create_ggn_mv_without_data(model_fn=linear, params=W, loss_fn="mse", factor=1)(vec=V, data=DATA),
    "unbound, given product": lambda: create_ggn_mv_without_data(linear, W, None, 1.0, loss_hessian_mv=lambda jv, pred, target: 2 * jv)(V, DATA),
    "unbound, jit": lambda: jax.jit(create_ggn_mv_without_data(linear, W, "mse", 1.0))(V, DATA),
    "unbound, bound later": lambda: create_ggn_mv_without_data(linear, W, "mse", 1.0).bind(DATA)(V),
    "linearised later": lambda: create_ggn_mv_without_data(linear, W, "mse", 1.0).bind(DATA).linearized()(V),
}


@pytest.mark.parametrize("call", BOUND)
def test_ways_to_the_same_product(call):
    assert_close(BOUND[call](), G_MSE)


def seen_by(vmap_over_data, tree=False):
    """What a custom loss, a given Hessian product, and the model get to see."""
    shapes = {}

    def model_fn(input, params):
        shapes["input"] = input["x"].shape
        return {"f": input["x"] @ params} if tree else input["x"] @ params

    def loss(pred, target):
        shapes["pred"], shapes["target"] = jax.tree.map(jnp.shape, (pred, target))
        return jnp.sum(jax.tree.leaves(pred)[0] ** 2)

    data = {"input": {"x": X}, "target": LABELLED["target"]}
    create_ggn_mv(model_fn, W, data, loss, vmap_over_data=vmap_over_data)(V)
    return shapes


def test_custom_losses_see_one_sample_or_everything():
    assert seen_by(True) == {"input": (3,), "pred": (2,), "target": ()}
    assert seen_by(False) == {"input": (4, 3), "pred": (4, 2), "target": (4,)}
    assert seen_by(True, tree=True)["pred"] == {"f": (2,)}
    assert seen_by(False, tree=True)["pred"] == {"f": (4, 2)}


def test_given_hessian_products_see_one_sample_or_everything():
    seen = []

    def given(jv, pred, target):
        seen.append((jv.shape, pred.shape, target.shape))
        return jv

    for vmap_over_data in (True, False):
        create_ggn_mv(linear, W, LABELLED, loss_hessian_mv=given, vmap_over_data=vmap_over_data)(V)
    assert set(seen) == {((2,), (2,), ()), ((4, 2), (4, 2), (4,))}


def test_operators_say_what_they_are():
    mv = create_ggn_mv_without_data(linear, W, "mse", 1.0)
    assert "6 parameters" in repr(mv)
    assert "cached" in repr(create_ggn_mv(linear, W, DATA, "mse"))
    assert "recomputed" in repr(create_ggn_mv(linear, W, DATA, "mse", linearize="recomputed"))
    assert isinstance(mv, ggn_nb.Unbound)
    assert isinstance(mv.bind(DATA), ggn_nb.GGN)
