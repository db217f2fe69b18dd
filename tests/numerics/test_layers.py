"""What the layers read is right in every program, and so is all that is made of it."""

import os
from dataclasses import replace
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import ALL_CASES, QUICK, batched, coupled, reference, run_cases, run_python, targets
from ggn_nb import (
    DenseBlocks,
    Diagonal,
    Stream,
    block_diagonal,
    create_fisher_mv,
    create_ggn_mv,
    create_hessian_mv,
    diagonal,
    eigsh,
    explain,
    gram,
    inverse,
    logdet,
    multi_head,
    sample,
    select_params,
    solve,
    square_root,
    trace,
)
from ggn_nb.layers.columns import SignedColumns
from ggn_nb.layers.diagonal import _diagonal, _trace
from ggn_nb.layers.factored import factored_product
from ggn_nb.layers.inner import inner_products
from ggn_nb.layers.model_pairs import pairs_of
from ggn_nb.losses.cross_entropy import cross_entropy
from ggn_nb.losses.mse import mse
from ggn_nb.operators.square_root import with_root
from ggn_nb.tools.testing import assert_close
from ggn_nb.tools.timing import count_compiles
from hypothesis import strategies as st
from jax import lax
from jax.flatten_util import ravel_pytree
from layer_programs import AROUND, STORED, USES, D, Program, fixed

N, C = 2, 3
PARTS, MODELS, PROGRAMS_AT_ONCE = 5, 5, 12


# Older JAX transposes a loop only as its own derivatives make it: a model with one, and with a vjp that is written by hand, is
# read leaf by leaf there.
LOOPS_SAY_WHAT_IS_LINEAR = "linear" in jax.make_jaxpr(lambda x: lax.scan(lambda c, _: (c, None), x, length=1))(1.0).eqns[0].params


def model_of(programs):
    """One model of several programs, whose results are mixed, and its parameters."""

    def model_fn(input, params):
        results = [program(jnp.roll(input, i), p) for i, (program, p) in enumerate(zip(programs, params, strict=True))]
        return jnp.concatenate(results) @ fixed(len(programs) * D, C)

    rng = np.random.default_rng(len(programs))
    is_shape = lambda x: isinstance(x, tuple) and all(isinstance(n, int) for n in x)
    normal = lambda shape: jnp.asarray(rng.standard_normal(shape))
    return model_fn, [jax.tree.map(normal, program.shapes(), is_leaf=is_shape) for program in programs]


@partial(jax.jit, compiler_options=QUICK)
def all_of(G, v):
    """The pairs of an operator, and what the layers make of them."""
    pairs = pairs_of(G.problem, G.samples)
    in_blocks = replace(G.problem, blocks=tuple(range(len(pairs.leaves))))
    K = inner_products(pairs, pairs)
    return pairs, {
        "diagonal": jax.tree.unflatten(jax.tree.structure(v), _diagonal(pairs, None)),
        "product": factored_product(G.problem, pairs, G.samples, v),
        "blocks": factored_product(in_blocks, pairs, G.samples, v),
        "traces": [_trace(pairs, None), jnp.trace(K), jnp.sum(K**2)],
        "inner products": K,
    }


@partial(jax.jit, static_argnums=(0, 3), compiler_options=QUICK)
def oracle(model_fn, params, data, loss, v):
    """The same from J and H."""
    flat, unravel = ravel_pytree(params)
    flat_v = ravel_pytree(v)[0]

    def one(x, y):
        predict = lambda p: (lambda f: (f, f))(model_fn(input=x, params=unravel(p)))
        J, f = jax.jacrev(predict, has_aux=True)(flat)
        return J, jax.hessian(lambda f: jnp.sum(reference(loss)(f, y)))(f)

    J, H = jax.vmap(one)(data["input"], data["target"])
    G = jnp.einsum("ncp,ncd,ndq->pq", J, H, J)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    of_leaf = np.repeat(np.arange(len(sizes)), sizes)
    return {
        "diagonal": unravel(jnp.diag(G)),
        "product": unravel(G @ flat_v),
        "blocks": unravel(jnp.where(of_leaf[:, None] == of_leaf, G, 0.0) @ flat_v),
        "traces": [jnp.trace(G), jnp.trace(G), jnp.sum(G**2)],
        "inner products": 2 * jnp.einsum("ncp,mdp->ncmd", J, J).reshape(C * N, C * N),
    }


def check(programs, loss="mse"):
    """All of the layers against the oracle, and the rule of each first leaf against what is known of it."""
    model_fn, params = model_of(programs)
    data = {"input": fixed(N, D, seed=len(programs)), "target": targets(np.random.default_rng(0), loss, (N, C))}
    v = jax.tree.map(lambda p: jnp.asarray(np.random.default_rng(1).standard_normal(p.shape)), params)
    pairs, got = all_of(create_ggn_mv(model_fn, params, data, loss, linearize="recomputed"), v)
    want = oracle(model_fn, params, data, loss, v)
    assert_close(got["traces"], want["traces"])
    if loss == "mse":
        assert_close(got["inner products"], want["inner products"])
    found = params_like(params, pairs.leaves)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(want["product"]))
    for i, program in enumerate(programs):
        for name in ("diagonal", "product", "blocks"):
            try:
                assert_close(got[name][i], want[name][i], atol=1e-13 * largest)
            except AssertionError as error:
                raise AssertionError(f"{name} of {program}") from error
        if LOOPS_SAY_WHAT_IS_LINEAR and any(program.around == "custom_vjp" for program in programs):
            continue
        assert not any("cannot be read" in pair.note for pair in found[i][0][0]), program
        rules = {pair.kind for pair in found[i][0][0]}
        expected = {"": rules, "both": {"embedding", "dense"}, "unused": set()}.get(program.rule(), {program.rule()})
        assert rules == expected, (program, found[i][0][0])


def params_like(params, values):
    """The values in the place of the leaves."""
    return jax.tree.unflatten(jax.tree.structure(params), values)


def drawn(seed):
    """Programs in which each use, each way of storing and each surrounding comes before one comes again."""
    rng = np.random.default_rng(seed)
    decks = [np.concatenate([rng.permutation(list(each)) for _ in range(4)]) for each in (USES, STORED, AROUND)]
    return [Program(*map(str, parts)) for parts in zip(*decks, strict=False)][:PROGRAMS_AT_ONCE]


@pytest.mark.parametrize("part", range(PARTS if ALL_CASES else 1))
def test_random_programs(part):
    """A part of 300 programs, no two of a part alike; a third of the first, or with `--flags slow` all."""
    seen = set()

    def each(seed, loss):
        check(programs := drawn([part, seed]), loss)
        seen.update(programs)

    run_cases(MODELS, each, seed=st.integers(0, 2**32 - 1), loss=st.sampled_from(["mse", "cross_entropy"]))
    assert len(seen) >= (300 if ALL_CASES else 100) // PARTS
    jax.clear_caches()  # a process may hold so many compiled programs, and no more


BIASES = {name: use for name, use in USES.items() if "bias" in name or "output used" in name or name in ("subtracted", "shared weight")}


@pytest.mark.combinations
@pytest.mark.parametrize("around", ["nothing", "scan"])
@pytest.mark.parametrize("part", [0, 1])
def test_biases(part, around):
    """Biases of layers, and leaves that only look like it."""
    check([Program(name, "as it is", around) for name in list(BIASES)[part::2]])


def test_which_biases_belong_to_layers():
    """A bias that its weight's output meets first, and at all positions alike, keeps nothing."""
    belong = {"dense bias", "bias of positions", "bias of columns", "bias of heads", "bias of experts", "bias of filters", "bias of groups"}
    belong |= {"bias before scale", "bias of a sum", "two biases", "bias in a function"}
    for names in (list(BIASES)[::2], list(BIASES)[1::2]):
        programs = [Program(name, "as it is", "nothing") for name in names if len(BIASES[name].shapes) > 1]
        model_fn, params = model_of(programs)
        data = {"input": fixed(N, D), "target": fixed(N, C)}
        rules = explain(create_ggn_mv(model_fn, params, data, "mse", linearize="recomputed")).rules
        for i, program in enumerate(programs):
            kept = [rule.kept for rule in rules if rule.leaf.startswith(f"params[{i}]") and rule.rule == "bias"]
            assert (min(kept, default=1) == 0) == (program.use in belong), program


# --- losses, weights, policies, kinds of data


def mlp(input, params):
    return jnp.tanh(input @ params["w"] + params["b"][None]) @ params["v"]


MLP = {"b": fixed(3, seed=1), "v": fixed(3, C, seed=2), "w": fixed(2, 3, seed=3)}
ROWS, T = 4, 2  # samples, positions of each


def data_for(loss="mse", **more):
    rng = np.random.default_rng(5)
    return {"input": fixed(ROWS, T, 2), "target": targets(rng, loss, (ROWS, T, C))} | more


@partial(jax.jit, static_argnums=2, compiler_options=QUICK)
def found_by(G, v, in_blocks):
    """What the public functions say of an operator, which is an argument."""
    return diagonal(G), trace(G), G(v), block_diagonal(G)(v) if in_blocks else None


def check_operator(create, rtol=1e-10):
    """The public functions against the dense matrix of the operator."""
    G = create(linearize="factored")
    v = jax.tree.map(lambda s: jnp.asarray(np.random.default_rng(1).standard_normal(s.shape)), G.structure)
    dense = create(linearize="recomputed").dense_oracle()
    flat_v, unravel = ravel_pytree(v)
    sizes = [leaf.size for leaf in jax.tree.leaves(v)]
    same = np.equal.outer(*[np.repeat(range(len(sizes)), sizes)] * 2)
    want = map(jnp.asarray, (np.diag(dense), np.trace(dense), dense @ flat_v, (dense * same) @ flat_v))
    for got, expected in zip(found_by(G, v, True), want, strict=True):
        expected = unravel(expected) if expected.ndim else expected
        assert_close(got, expected, rtol=rtol, atol=rtol * float(np.max(np.abs(dense))))


def indefinite(pred, target):
    return jnp.sum(pred[..., 0] * pred[..., 1] + jnp.sin(pred[..., 2] - target[..., 2]))


WEIGHT, MASK = jnp.asarray([0.5, 0.0, 2.0, 1.5]), jnp.asarray([[True, False], [True, True], [False, True], [True, True]])
IGNORED = jnp.asarray([[0, -100], [2, 1], [-100, -100], [1, 1]])
LOSS_CASES = {
    "mean": ("mse", {}, {"reduction": "mean"}),
    "weights and mask": ("cross_entropy", {"weight": WEIGHT, "mask": MASK}, {"reduction": "mean", "batch_size": 3}),
    "ignore_index": (cross_entropy(axis=-1, ignore_index=-100), {"target": IGNORED}, {"reduction": "mean"}),
    "none": ("none", {"target": None}, {}),
    "binary": ("binary_cross_entropy", {}, {"batch_size": 2}),
    "custom, coupled": (coupled, {}, {}),
    "Hessian only": (None, {}, {"loss_hessian_mv": lambda jv, pred, target: (3 + pred**2) * jv}),
}


@pytest.mark.parametrize("name", LOSS_CASES)
def test_losses(name):
    loss, more, options = LOSS_CASES[name]
    data = data_for(loss if isinstance(loss, str) else "mse") | more
    check_operator(partial(create_ggn_mv, mlp, MLP, data, loss, **options))


def test_indefinite_losses():
    G = create_ggn_mv(mlp, MLP, data_for(), indefinite, linearize="recomputed")
    dense = G.dense_oracle()
    assert np.linalg.eigvalsh(dense)[0] < -0.1
    assert_close(diagonal(G), ravel_pytree(MLP)[1](jnp.asarray(np.diag(dense))))
    assert_close(trace(G), jnp.asarray(np.trace(dense)))


def heads_model(input, params):
    h = jnp.tanh(input @ params["w"] + params["b"][None])
    return {"class": h @ params["v"], "value": jnp.sum(h, axis=-1)}


def through_scan(input, params):
    step = lambda h, w: (jnp.tanh(h @ w), None)
    return lax.scan(step, jnp.tanh(input @ params["v"]), params["e"])[0][:, :C]


EMPTY = {
    "no inputs": ((0, 3), lambda input, params: jnp.tanh(input @ params["v"])[:, :C] + jnp.zeros((T, 0)) @ params["e"]),
    "no outputs": ((2, 0), lambda input, params: jnp.concatenate([input @ params["v"], input @ params["e"]], axis=1)[:, :C]),
    "unused": ((0,), lambda input, params: jnp.tanh(input @ params["v"])[:, :C]),
    "no layers": ((0, 4, 4), through_scan),
    "no positions": ((2, 3), lambda input, params: (input @ params["v"])[:, :C] + jnp.sum(input[:0] @ params["e"])),
    "no rows": ((0, 3), lambda input, params: (input @ params["v"])[:, :C] + params["e"][jnp.zeros(0, int)].sum()),
}


@pytest.mark.parametrize("name", EMPTY)
def test_weights_and_places_without_entries(name):
    """They have no gradients, and harm no others."""
    shape, model_fn = EMPTY[name]
    params = {"e": jnp.ones(shape), "v": fixed(2, 4, seed=7)}
    create = partial(create_ggn_mv, model_fn, params, data_for(), "mse")
    check_operator(create)
    G = create(linearize="recomputed")
    dense = G.dense_oracle()
    assert_close(block_diagonal(G, blocks=0).dense_blocks().dense(), jnp.asarray(dense))
    A = np.asarray(square_root(G).dense())
    assert_close(gram(G).dense(), jnp.asarray(A.T @ A))


def test_rows_of_a_table_take_no_square_of_the_positions():
    """Of 4096 positions: memory as of the pairs, and the diagonal of a loop over the samples."""
    num_positions, table = 4096, fixed(50, 2)
    rows = np.random.default_rng(0).integers(0, 60, size=(3, num_positions))  # some are no rows
    model = lambda input, params: jnp.tanh(params.at[input].get(mode="fill", fill_value=0)).mean(axis=0)
    G = create_ggn_mv(model, table, {"input": jnp.asarray(rows), "target": jnp.zeros((3, 2))}, "mse", linearize="recomputed")
    assert_close(diagonal(G), jnp.asarray(np.diag(G.dense_oracle())).reshape(table.shape))
    for fn in (diagonal, trace):
        assert jax.jit(fn).lower(G).compile().memory_analysis().temp_size_in_bytes < 8 * num_positions * 100


def test_predictions_that_are_trees():
    data = data_for() | {"target": {"class": IGNORED % 3, "value": fixed(ROWS, T)}}
    heads = multi_head({"class": cross_entropy(axis=-1), "value": mse()}, {"class": 2.0, "value": 0.5})
    check_operator(partial(create_ggn_mv, heads_model, MLP, data, heads, reduction="mean"))
    loss = lambda pred, target: jnp.sum((pred["value"] - target["value"]) ** 4) + jnp.sum(jnp.cosh(pred["class"]))
    check_operator(partial(create_ggn_mv, heads_model, MLP, data, loss))


def test_models_of_a_whole_batch():
    options = {"vmap_over_data": False, "reduction": "mean"}
    check_operator(partial(create_ggn_mv, batched(mlp), MLP, data_for(), "mse", **options))


@pytest.mark.parametrize("kind", ["exact", "monte_carlo", "empirical"])
def test_fisher_kinds(kind):
    key = jax.random.key(3) if kind == "monte_carlo" else None
    check_operator(partial(create_fisher_mv, mlp, MLP, data_for("cross_entropy"), "cross_entropy", kind=kind, key=key))


def test_frozen_leaves():
    model_fn, params = select_params(mlp, MLP, "^[vw]")
    check_operator(partial(create_ggn_mv, model_fn, params, data_for(), "mse"))


def test_streams():
    data = data_for("cross_entropy", weight=WEIGHT)
    batches = [jax.tree.map(lambda a: a[i : i + 3], data) for i in (0, 3)]
    G = create_ggn_mv(mlp, MLP, data, "cross_entropy", reduction="mean", linearize="recomputed")
    streamed = create_ggn_mv(mlp, MLP, Stream(lambda: batches), "cross_entropy", reduction="mean")
    assert_close(diagonal(streamed), diagonal(G))
    assert_close(trace(streamed), trace(G))
    assert_close(block_diagonal(streamed)(MLP), block_diagonal(G)(MLP))
    options = {"estimator": "signs", "key": jax.random.key(0), "num_probes": 2}
    assert_close(diagonal(streamed, **options), diagonal(G, **options))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision(dtype):
    cast = lambda tree, dtype: jax.tree.map(lambda a: a.astype(dtype), tree)
    half, data = cast(MLP, dtype), data_for()
    G = create_ggn_mv(mlp, half, cast(data, dtype), "mse", linearize="factored")
    wide = create_ggn_mv(mlp, cast(half, "float64"), cast(cast(data, dtype), "float64"), "mse", linearize="recomputed")
    rtol = {"bfloat16": 5e-2, "float16": 5e-3, "float32": 1e-5}[dtype]
    assert_close(diagonal(G), cast(diagonal(wide), "float32"), rtol=rtol)
    assert_close(trace(G), cast(trace(wide), "float32"), rtol=rtol)


def test_nothing_is_compiled_for_new_numbers():
    G = create_ggn_mv(mlp, MLP, data_for(), "mse", linearize="recomputed")
    other = create_ggn_mv(mlp, jax.tree.map(jnp.sin, MLP), data_for(), "mse", linearize="recomputed")
    of_both = lambda G: (diagonal(G), trace(G), diagonal(G, "signs", key=jax.random.key(1)))
    of_both(G)
    with count_compiles() as compiled:
        of_both(other)
    assert compiled.count == 0


def test_nothing_depends_on_the_parameters():
    G = create_ggn_mv(lambda input, params: input, MLP, data_for() | {"target": fixed(ROWS, T, 2)}, "mse", linearize="recomputed")
    assert_close(diagonal(G), jax.tree.map(jnp.zeros_like, MLP))
    assert float(trace(G)) == 0
    assert {rule.rule for rule in explain(G).rules} == {"unused"}


# --- estimators


@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_all_signs_have_the_diagonal_for_their_mean(loss):
    """Every vector of signs of one sample's columns, each once."""
    data = {"input": fixed(1, 2), "target": targets(np.random.default_rng(0), loss, (1, C))}
    model_fn = lambda input, params: mlp(input[None], params)[0]
    G = with_root(create_ggn_mv(model_fn, MLP, data, loss, linearize="recomputed"))
    columns = G.problem.loss.column_structure(jnp.zeros((1, C))).size
    signs = jnp.asarray(list(product((-1.0, 1.0), repeat=columns)))
    given = SignedColumns(jax.random.key(0), 1)
    every = lambda problem, pred, samples: (given.columns(problem, pred, samples, signs), None)
    squares = _diagonal(pairs_of(G.problem, G.samples, every), None)
    exact = jax.tree.leaves(diagonal(G))
    assert_close([s / len(signs) for s in squares], exact, rtol=1e-12)


def test_all_labels_have_the_diagonal_for_their_mean():
    """Each label, with its probability."""
    data = {"input": fixed(1, 2), "target": jnp.asarray([1])}
    model_fn = lambda input, params: mlp(input[None], params)[0]
    G = create_ggn_mv(model_fn, MLP, data, "cross_entropy", linearize="recomputed")
    p = jax.nn.softmax(model_fn(data["input"][0], MLP))
    log_p = lambda y: lambda params: jax.nn.log_softmax(model_fn(data["input"][0], params))[y]
    scores = [jax.grad(log_p(y))(MLP) for y in range(C)]
    exact = jax.tree.map(lambda *g: sum(p[y] * g[y] ** 2 for y in range(C)), *scores)
    assert_close(diagonal(G), exact, rtol=1e-12)
    keys = range(60)
    drawn = [diagonal(G, "monte_carlo", key=jax.random.key(k)).value["v"] for k in keys]
    each = [score["v"] ** 2 for score in scores]
    seen = [int(np.argmin([jnp.max(jnp.abs(d - e)) for e in each])) for d in drawn]
    assert all(np.allclose(d, each[y], rtol=1e-12) for d, y in zip(drawn, seen, strict=True))
    assert np.all(np.abs(np.bincount(seen, minlength=C) / len(drawn) - p) < 4 * np.sqrt(p * (1 - p) / len(drawn)))


@pytest.mark.parametrize("estimator", ["signs", "monte_carlo"])
def test_standard_errors(estimator):
    """Their squares are the mean squared errors, over many keys: entry by entry the errors are no normal numbers."""
    G = create_ggn_mv(mlp, MLP, data_for("cross_entropy"), "cross_entropy", linearize="recomputed")
    for fn in (diagonal, trace):
        exact = np.asarray(ravel_pytree(fn(G))[0])[None]
        found = [fn(G, estimator, key=jax.random.key(k), num_probes=4) for k in range(60)]
        value, deviation = (np.stack([ravel_pytree(tree)[0] for tree in trees]) for trees in zip(*found, strict=True))
        squared = np.mean((value - exact) ** 2, axis=0)
        assert 0.6 < np.mean(squared / np.mean(deviation**2, axis=0)) < 1.5
        bias = np.mean(value - exact, axis=0) / np.sqrt(squared / len(found))
        assert np.mean(bias**2) < 3


@pytest.mark.parametrize("estimator", ["signs", "monte_carlo"])
def test_draws_do_not_depend_on_batches_and_order(estimator):
    create = partial(create_ggn_mv, mlp, MLP, linearize="recomputed")
    data = data_for("cross_entropy", index=jnp.arange(ROWS))
    options = {"key": jax.random.key(7), "num_probes": 2}
    want = diagonal(create(data, "cross_entropy"), estimator, **options)
    backwards = jax.tree.map(lambda a: a[::-1], data)
    assert_close(diagonal(create(data, "cross_entropy", batch_size=3), estimator, **options), want)
    assert_close(diagonal(create(backwards, "cross_entropy"), estimator, **options), want)


def test_errors():
    data = data_for("cross_entropy")
    G = create_ggn_mv(mlp, MLP, data, "cross_entropy", linearize="recomputed")
    key = jax.random.key(0)
    for fn in (diagonal, trace):
        for arguments, options, error, message in (
            ((G, "signs"), {}, ValueError, "key"),
            ((G,), {"key": key}, ValueError, "key: got a key"),
            ((G,), {"num_probes": 2}, ValueError, "num_probes: got 2"),
            ((G, "signs"), {"key": key, "num_probes": 0}, ValueError, "num_probes"),
            ((G, "guess"), {"key": key}, ValueError, "estimator: got 'guess'"),
            ((create_ggn_mv(mlp, MLP, data_for(), coupled), "monte_carlo"), {"key": key}, ValueError, "monte_carlo"),
            ((create_ggn_mv(mlp, MLP, data_for(), indefinite), "signs"), {"key": key}, ValueError, "indefinite"),
            ((create_hessian_mv(mlp, MLP, data, "cross_entropy"),), {}, TypeError, "Hessian"),
        ):
            with pytest.raises(error, match=message):
                fn(*arguments, **options)


def test_many_devices():
    code = """
import sys, jax, jax.numpy as jnp
jax.config.update("jax_enable_x64", True)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import numpy as np
from ggn_nb import block_diagonal, create_ggn_mv, diagonal, trace
from ggn_nb.tools.testing import assert_close
model = lambda input, params: jnp.tanh(input @ params["w"]) @ params["v"]
normal = lambda *s: np.random.default_rng(0).standard_normal(s)
params, data = {"w": normal(3, 4), "v": normal(4, 3)}, {"input": normal(8, 3), "target": np.arange(8) % 3}
mesh = Mesh(np.array(jax.devices()), ("data",))
put = lambda tree, *spec: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P(*spec))), tree)
assert mesh.size == 4
one = create_ggn_mv(model, params, data, "cross_entropy", linearize="recomputed")
many = create_ggn_mv(model, put(params), put(data, "data"), "cross_entropy", linearize="recomputed")
for fn in (diagonal, trace):
    for options in ({}, {"estimator": "signs", "key": jax.random.key(0)}, {"estimator": "monte_carlo", "key": jax.random.key(0)}):
        assert_close(jax.device_get(fn(many, **options)), jax.device_get(fn(one, **options)), rtol=1e-12)
assert_close(jax.device_get(block_diagonal(many)(put(params))), jax.device_get(block_diagonal(one)(jax.tree.map(jnp.asarray, params))), rtol=1e-12)
"""
    run_python(code, XLA_FLAGS=f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4")


def test_leaves_without_a_part_in_the_prediction():
    """Their dense blocks are zero; without entries they have no rows."""
    params = MLP | {"unused": jnp.ones(3), "empty": jnp.zeros((0, 4))}
    G = create_ggn_mv(mlp, params, data_for(), "mse")
    dense, of_leaf = np.asarray(G.dense()), np.repeat(np.arange(len(params)), [leaf.size for leaf in jax.tree.leaves(params)])
    for blocks, number in ((None, of_leaf), (jax.tree.map(lambda _: 0, params), 0 * of_leaf)):
        B = block_diagonal(G, blocks).dense_blocks()
        assert_close(np.asarray(B.dense()), dense * (number[:, None] == number))
        assert_close(solve(B, params, 1.0).x["unused"], jnp.ones(3))
        assert logdet(B, 1.0).shape == () and eigsh(B, 2)[0].shape == (2,)
        assert sample(B, jax.random.key(0), 1.0, 3)["empty"].shape == (3, 0, 4)
    again = DenseBlocks.on({"e": jnp.zeros(0), "w": jnp.zeros(2)}, [jnp.zeros((0, 0)), jnp.eye(2)])
    assert again.shape == (2, 2)


def test_a_weight_without_positions():
    """A window that is larger than its image: the convolution has no outputs."""
    def model(input, params):
        none = jax.lax.conv(input.reshape(1, 2, 2), params["w"], (1,), "VALID")
        return jnp.concatenate([none.ravel(), input @ params["v"]])

    params = {"w": jnp.ones((3, 2, 3)), "v": jnp.ones((4, 3))}
    data = {"input": jnp.ones((3, 4)), "target": jnp.zeros((3, 3))}
    create = lambda **options: create_ggn_mv(model, params, data, "mse", **options)
    expected = create()(params)
    for found in (create(linearize="factored")(params), block_diagonal(create(), {"w": 0, "v": 0})(params)):
        assert_close(found["v"], expected["v"])
        assert not found["w"].any()
    assert diagonal(create())["w"].shape == (3, 2, 3)


def test_what_has_the_exact_diagonal_alone():
    G, key = create_ggn_mv(mlp, MLP, data_for(), "mse"), jax.random.key(0)
    B = block_diagonal(G)
    for M in (B, B.dense_blocks(), gram(G), Diagonal(MLP), B.damped(1.0), 2 * B, B + Diagonal(MLP)):
        for fn in (diagonal, trace):
            with pytest.raises(ValueError, match="key: got a key, expected None with estimator='exact'"):
                fn(M, key=key)
            for number, message in ((2, "got 2, expected None"), (-3, "got -3, expected at least 1")):
                with pytest.raises(ValueError, match=f"num_probes: {message}"):
                    fn(M, num_probes=number)
            for estimator in ("signs", "monte_carlo"):
                with pytest.raises(ValueError, match=f"estimator: got '{estimator}', expected 'exact' for a {type(M).__name__}"):
                    fn(M, estimator, key=key)
    for fn in (diagonal, trace):
        with pytest.raises(TypeError, match="G: got a Inverse, expected a GGN or Fisher.*BlockDiagonal, DenseBlocks or Gram.*Diagonal.*sums, multiples and dampings"):
            fn(inverse(Diagonal(MLP), 10.0))


def test_a_label_for_all_is_no_text():
    G = create_ggn_mv(mlp, MLP, data_for(), "mse")
    with pytest.raises(ValueError, match="blocks: got 'layers', expected None, 'layer', or labels"):
        block_diagonal(G, "layers")
