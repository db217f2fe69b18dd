"""Properties over random shapes, trees and losses. Every run draws the same examples."""

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import (
    BUILT_IN,
    LOSSES,
    POLICIES,
    QUICK,
    batched,
    coupled,
    dense_of,
    inner,
    oracle_of,
    random_like,
    reference,
    run_cases,
    targets,
)
from ggn_nb import create_ggn_mv, create_loss_hessian_mv
from ggn_nb.losses.binary_cross_entropy import binary_cross_entropy
from ggn_nb.losses.closed_form import none
from ggn_nb.losses.common import first_columns
from ggn_nb.losses.cross_entropy import cross_entropy
from ggn_nb.losses.mse import mse
from ggn_nb.tools.testing import assert_close
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

LOSS_OBJECTS = {loss.name: loss for loss in (mse(), cross_entropy(axis=-1), binary_cross_entropy(), none())}
PER_LOSS, PER_KIND = 40, 4

seeds = st.integers(0, 2**32 - 1)
with_classes = [(1,), (2,), (4,), (1, 1), (3, 1), (3, 3), (2, 4), (1, 2, 3), (2, 3, 2), (1, 2, 1, 3), (2, 2, 2, 2)]


# --- the losses alone


def test_every_built_in_loss_has_an_object():
    assert tuple(LOSS_OBJECTS) == BUILT_IN


@cache
def everything(name, shape):
    """One program: all that a loss gives for (pred, target, u, v), beside what JAX gives."""
    loss = LOSS_OBJECTS[name]

    def run(f, y, u, v):
        hessian_mv, w = partial(loss.hessian_mv, pred=f), first_columns(loss, u, f)
        H = jax.hessian(lambda f: jnp.sum(reference(name)(f, y)))(f).reshape(f.size, f.size)
        return {
            "value": (loss.value(f, y), reference(name)(f, y)),
            "gradient": (loss.gradient(f, y), jax.grad(lambda f: jnp.sum(reference(name)(f, y)))(f)),
            "Hv": (hessian_mv(v), (H @ v.reshape(-1)).reshape(shape)),
            "S Sᵀ v": (loss.square_root_mv(loss.square_root_transpose_mv(v, f), f), hessian_mv(v)),
            "adjoint": (jnp.vdot(loss.square_root_mv(w, f), v), jnp.vdot(w, loss.square_root_transpose_mv(v, f))),
            "symmetry": (jnp.vdot(u, hessian_mv(v)), jnp.vdot(v, hessian_mv(u))),
            "linearity": (hessian_mv(2.0 * u - 3.0 * v), 2.0 * hessian_mv(u) - 3.0 * hessian_mv(v)),
            "vmap": (jax.vmap(hessian_mv)(jnp.stack([u, v])), jnp.stack([hessian_mv(u), hessian_mv(v)])),
        }, jnp.vdot(v, hessian_mv(v)), H

    return jax.jit(run, compiler_options=QUICK)


@pytest.mark.parametrize("name", BUILT_IN)
def test_loss_agrees_with_jax_and_with_itself(name):
    def check(shape, seed, scale):
        rng = np.random.default_rng(seed)
        f, u, v = (jnp.asarray(rng.standard_normal(shape)) for _ in range(3))
        pairs, quadratic, H = everything(name, shape)(scale * f, targets(rng, name, shape), u, v)
        size = 1e-10 * (1.0 + 10.0 * float(jnp.max(jnp.abs(H)))) * max(1, math.prod(shape))
        for what, (ours, theirs) in pairs.items():
            try:
                assert_close(ours, theirs, atol=0.0 if what in ("value", "Hv") else size, rtol=1e-10 if scale < 10 else 1e-8)
            except AssertionError as error:
                if what == "Hv" and jnp.max(jnp.abs(ours - theirs)) < 1e-13:  # JAX's own cancellation
                    continue
                raise AssertionError(f"{what}: {error}") from None
        assert quadratic >= -size

    shapes = with_classes if name == "cross_entropy" else [(), *with_classes]
    run_cases(PER_LOSS, check, shape=st.sampled_from(shapes), seed=seeds, scale=st.sampled_from([0.1, 1.0, 20.0]))


def test_product_of_a_custom_loss_on_a_tree():
    def loss(pred, target):
        return jnp.sum(pred["a"] ** 2 * target["w"]) * jnp.sum(pred["b"][0] ** 4) + jnp.prod(pred["a"])

    @jax.jit
    def by_hessian(jv, pred, target):
        flat, unravel = ravel_pytree(pred)
        return unravel(jax.hessian(lambda f: loss(unravel(f), target))(flat) @ ravel_pytree(jv)[0])

    def check(n, m, seed):
        rng = np.random.default_rng(seed)
        draw = lambda: {"a": jnp.asarray(rng.standard_normal(n)), "b": (jnp.asarray(rng.standard_normal(m)), None)}
        pred, jv, target = draw(), draw(), {"w": jnp.asarray(rng.standard_normal(n))}
        assert_close(create_loss_hessian_mv(loss)(jv, pred, target), by_hessian(jv, pred, target))

    run_cases(10, check, n=st.integers(1, 2), m=st.integers(1, 2), seed=seeds)


# --- the operator on random trees


class Pair(NamedTuple):
    left: Any
    right: Any


@partial(jax.tree_util.register_dataclass, data_fields=["first", "second"], meta_fields=["tag"])
@dataclass
class Record:
    first: Any
    second: Any
    tag: str = "static"


def nodes(children):
    """Trees one level deeper than `children`."""
    some = st.lists(children, min_size=1, max_size=2)
    return st.one_of(
        some,
        some.map(tuple),
        some.map(lambda c: dict(zip("ab", c))),
        some.map(lambda c: Pair(*c, *[None] * (2 - len(c)))),
        some.map(lambda c: Record(*c, *[None] * (2 - len(c)))),
    )


leaf_shapes = st.sampled_from([(), (1,), (2,), (1, 2)]).map(lambda shape: ("float", shape))
more_leaves = st.one_of(leaf_shapes, leaf_shapes, st.none(), st.just(("int", ())), st.just(("int", (2,))))
is_spec = lambda node: isinstance(node, tuple) and not isinstance(node, Pair) and bool(node) and isinstance(node[0], str)


def trees(leaves):
    """A bare leaf, or a tree up to two levels deep."""
    return st.one_of(leaves, nodes(leaves), nodes(st.one_of(leaves, nodes(leaves))))


def fill(spec, rng, batch=()):
    """Arrays for a tree of ("float" or "int", shape)."""

    def array(leaf):
        kind, shape = leaf
        values = rng.standard_normal(batch + shape) if kind == "float" else rng.integers(-2, 3, batch + shape)
        return jnp.asarray(values)

    return jax.tree.map(array, spec, is_leaf=is_spec)


def numbers(tree):
    """All numbers of a tree as one float64 vector."""
    return jnp.concatenate([jnp.ones(1)] + [jnp.ravel(leaf).astype(jnp.float64) for leaf in jax.tree.leaves(tree)])


def make_model(pred_shape, tree_valued=False):
    """A smooth model of any parameter tree and any input tree."""

    def model_fn(input, params):
        x, p = numbers(input), numbers(params)
        k = jnp.arange(1.0, math.prod(pred_shape) + 1.0)
        mixed = jnp.sin(jnp.outer(jnp.outer(k, p).reshape(-1), x)).reshape(k.size, -1)
        pred = jnp.mean(mixed, axis=1).reshape(pred_shape) + jnp.sum(p[1:]) * jnp.ones(pred_shape)
        return {"main": pred, "rest": (pred**2, None)} if tree_valued else pred

    return model_fn


def tree_loss(pred, target):
    """A loss of a prediction that is a tree, with a target that is one."""
    return coupled(pred["main"], target["y"]) + jnp.sum(pred["rest"][0] ** 2)


def doubled_mse(jv, pred, target):
    """A given Hessian product that uses the prediction and the target."""
    return jv * (1.0 + pred**2) + 0.0 * target


def doubled_mse_reference(pred, target):
    """A loss whose Hessian is that of `doubled_mse`."""
    return pred**2 / 2 + pred**4 / 12


KINDS = [*LOSSES, "given", "tree"]


@pytest.mark.combinations
@pytest.mark.parametrize("linearize", POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_operator_on_random_trees(kind, linearize):
    def check(params, inputs, pred_shape, extra_target, seed):
        rng, n = np.random.default_rng(seed), 2
        params, inputs = fill(params, rng), fill({"tree": inputs, "x": ("float", (1,))}, rng, (n,))
        model_fn = make_model(pred_shape, kind == "tree")
        target = targets(rng, kind, (n, *pred_shape))
        given, loss, oracle_loss = {}, LOSSES.get(kind), None
        if kind == "given":
            given, oracle_loss = {"loss_hessian_mv": doubled_mse}, doubled_mse_reference
        elif kind == "tree":
            loss = oracle_loss = tree_loss
            target = {"y": target, "unused": fill(extra_target, rng, (n,))}
        else:
            oracle_loss = reference(kind)
        data = {"input": inputs, "target": target}

        make = lambda fn, vmapped: create_ggn_mv(
            fn, params, data, loss, vmap_over_data=vmapped, linearize=linearize, **given
        )
        G, whole = make(model_fn, True), make(batched(model_fn), False)
        dense = dense_of(G, params)
        expected = oracle_of(model_fn, params, data, oracle_loss)
        size = 1e-12 * float(jnp.max(jnp.abs(expected)))

        assert_close(dense, expected)
        assert_close(dense_of(whole, params), expected)
        assert_close(dense, dense.T, atol=size)
        assert jnp.min(jnp.linalg.eigvalsh((dense + dense.T) / 2)) >= -10 * size
        u, v = random_like(params, seed), random_like(params, seed + 1)
        both = jax.tree.map(lambda a, b: 2.0 * a - 3.0 * b, u, v)
        by_parts = jax.tree.map(lambda a, b: 2.0 * a - 3.0 * b, G(u), G(v))
        assert_close(G(both), by_parts, atol=100 * size)
        assert jnp.abs(inner(u, G(v)) - inner(v, G(u))) <= 100 * size * (1 + inner(u, u) + inner(v, v))

    needs_classes = kind in ("cross_entropy", "optax", "coupled", "tree")
    pred_shapes = [(3,), (1,), (2, 2), (1, 2, 2)] + ([] if needs_classes else [()])
    run_cases(
        PER_KIND // 2,
        check,
        params=trees(leaf_shapes),
        inputs=trees(more_leaves),
        pred_shape=st.sampled_from(pred_shapes),
        extra_target=trees(more_leaves),
        seed=st.integers(0, 2**31),
    )


def test_at_least_two_hundred_examples():
    assert PER_LOSS * len(BUILT_IN) + PER_KIND * len(KINDS) >= 200
