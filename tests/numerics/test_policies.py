"""Whatever the memory policy, the batch size, the number of vectors or the way the data arrives, the numbers agree."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import Stream, create_fisher_mv, create_ggn_mv, create_ggn_mv_without_data, create_hessian_mv
from ggn_nb.operators.chunks import chunk_sizes
from ggn_nb.tools.models import cnn, mlp, transformer
from ggn_nb.tools.testing import assert_close, dense_from_mv
from ggn_nb.tools.timing import count_compiles

RNG = np.random.default_rng(8)
N = 11
AGREE = partial(assert_close, rtol=1e-12)


def case(name):
    """Model, parameters and data with weights and a mask."""
    key = jax.random.key(0)
    if name == "mlp":
        model, x, y = mlp(key, (3, 6, 4), activation=jnp.tanh, dtype=jnp.float64), RNG.standard_normal((N, 3)), RNG.integers(0, 4, N)
    elif name == "cnn":
        model = cnn(key, image_shape=(8, 8, 2), channels=(3, 3), hidden=5, num_classes=4, dtype=jnp.float64)
        x, y = RNG.standard_normal((N, 8, 8, 2)), RNG.integers(0, 4, N)
    else:
        model = transformer(key, num_layers=1, width=8, num_heads=2, vocab_size=7, max_len=5, dtype=jnp.float64)
        x, y = RNG.integers(0, 7, (N, 5)), RNG.integers(0, 7, (N, 5))
        y[2, 3:] = -100
    weight = RNG.uniform(0, 2, N)
    mask = RNG.uniform(size=N) < 0.8
    return *model, {"input": jnp.asarray(x), "target": jnp.asarray(y), "weight": jnp.asarray(weight), "mask": jnp.asarray(mask)}


CASES = {name: case(name) for name in ("mlp", "cnn", "transformer")}
KINDS = {
    "ggn": create_ggn_mv,
    "hessian": create_hessian_mv,
    "fisher": create_fisher_mv,
    "empirical": partial(create_fisher_mv, kind="empirical"),
    "monte carlo": partial(create_fisher_mv, kind="monte_carlo", key=jax.random.key(3), num_samples=2),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def random_like(params, k=None):
    shape = () if k is None else (k,)
    return jax.tree.map(lambda p: jnp.asarray(RNG.standard_normal(shape + p.shape), p.dtype), params)


def in_batches(data, size):
    """A factory of batches, ragged at the end."""
    n = len(data["target"])
    return lambda: (jax.tree.map(lambda a: a[i : i + size], data) for i in range(0, n, size))


POLICIES = [
    dict(linearize="rematerialized"),
    dict(batch_size=4),
    dict(linearize="recomputed"),
    dict(linearize="cached", batch_size=4),
    dict(linearize="rematerialized", batch_size=5),
    dict(linearize=jax.checkpoint_policies.nothing_saveable),
    dict(linearize=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    *(dict(batch_size=b) for b in (1, 10, 11, 100)),
]


@pytest.mark.combinations
@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("name", CASES)
def test_policies_agree(name, kind):
    model_fn, params, data = CASES[name]
    make = partial(KINDS[kind], model_fn, params, data, "cross_entropy", reduction="mean")
    vec = random_like(params)
    want = make()(vec)
    for options in POLICIES if name == "mlp" else POLICIES[:4]:
        AGREE(make(**options)(vec), want)


@pytest.mark.combinations
@kinds
@pytest.mark.parametrize("scale", [("sum", None), ("sum", 50), ("mean", None), ("mean", 3)], ids=str)
def test_kinds_agree_in_batches_and_streams(kind, scale):
    model_fn, params, data = CASES["mlp"]
    options = dict(zip(("reduction", "num_total_samples"), scale, strict=True))
    make = lambda data, **more: KINDS[kind](model_fn, params, data, "cross_entropy", **options, **more)
    vec = random_like(params)
    want = make(data)(vec)
    AGREE(make(data, batch_size=4)(vec), want)
    AGREE(make(Stream(in_batches(data, 4)))(vec), want)
    AGREE(make(Stream(in_batches(data, 5)), batch_size=2)(vec), want)


@pytest.mark.parametrize("kind", ["ggn", "monte carlo"])
def test_batched_models_agree_in_batches_and_streams(kind):
    model_fn, params, data = CASES["transformer"]
    whole = lambda input, params: jax.vmap(lambda x: model_fn(input=x, params=params))(input)
    vec = random_like(params)
    want = KINDS[kind](model_fn, params, data, "cross_entropy")(vec)
    for options in ({}, {"batch_size": 4}):
        AGREE(KINDS[kind](whole, params, data, "cross_entropy", vmap_over_data=False, **options)(vec), want)
    AGREE(KINDS[kind](whole, params, Stream(in_batches(data, 4)), "cross_entropy", vmap_over_data=False)(vec), want)


def test_position_masks_in_a_stream():
    model_fn, params, data = CASES["transformer"]
    data = data | {"mask": jnp.asarray(RNG.uniform(size=(N, 5)) < 0.7), "weight": jnp.asarray(RNG.uniform(size=(N, 5)))}
    vec = random_like(params)
    for reduction in ("sum", "mean"):
        make = lambda data: create_ggn_mv(model_fn, params, data, "cross_entropy", reduction=reduction)
        AGREE(make(Stream(in_batches(data, 4)))(vec), make(data)(vec))


@pytest.mark.combinations
@kinds
@pytest.mark.parametrize("options", [{}, {"linearize": "recomputed"}, {"batch_size": 4}, {"stream": 4}], ids=str)
def test_columns_are_single_products(kind, options):
    model_fn, params, data = CASES["mlp"]
    options = dict(options)
    source = Stream(in_batches(data, size)) if (size := options.pop("stream", None)) else data
    A = KINDS[kind](model_fn, params, source, "cross_entropy", **options)
    vecs = random_like(params, 5)
    want = jax.tree.map(lambda *c: jnp.stack(c), *[A(jax.tree.map(lambda v, k=k: v[k], vecs)) for k in range(5)])
    for size in (None, 1, 2, 9):
        AGREE(A.matmat(vecs, vector_batch_size=size), want)
    if source is data:
        AGREE(jax.jit(lambda A, V: A.matmat(V))(A, vecs), want)
        AGREE(jax.jit(lambda A, V: A.matmat(V, vector_batch_size=2))(A, vecs), want)


def test_many_vectors_are_refused_by_name():
    model_fn, params, data = CASES["mlp"]
    A = create_ggn_mv(model_fn, params, data, "cross_entropy")
    vecs = random_like(params, 3)
    shorter = jax.tree.map(lambda v: v[:2], vecs)
    first, *rest = jax.tree.leaves(vecs)
    uneven = jax.tree.unflatten(jax.tree.structure(vecs), [first, *jax.tree.leaves(shorter)[1:]])
    for wrong, error in ((random_like(params), ValueError), (uneven, ValueError), (vecs[:1], ValueError), (jax.tree.map(lambda v: v[:0], vecs), ValueError),
                         (jax.tree.map(lambda v: v.astype(jnp.float32), vecs), TypeError)):
        with pytest.raises(error, match="vecs"): A.matmat(wrong)
    with pytest.raises(ValueError, match="vector_batch_size: got 0"): A.matmat(vecs, vector_batch_size=0)
    with pytest.raises(TypeError, match="vector_batch_size: got 1.5"): A.matmat(vecs, vector_batch_size=1.5)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_matrix_from_columns_is_symmetric(kind):
    model_fn, params, data = CASES["mlp"]
    A = KINDS[kind](model_fn, params, data, "cross_entropy", batch_size=3)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    columns = A.matmat(jax.vmap(unravel)(jnp.eye(flat.size)))
    dense = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(v)[0])(columns)
    assert_close(dense, dense.T)
    assert_close(dense, dense_from_mv(A, params))


def test_chunks_compile_once_and_memory_is_flat():
    model_fn, params = mlp(jax.random.key(0), (16, 64, 64, 4), activation=jnp.tanh, dtype=jnp.float64)
    vec = random_like(params)

    def program(n, **options):
        data = {"input": jnp.asarray(RNG.standard_normal((n, 16))), "target": jnp.zeros(n, int)}
        A = create_ggn_mv(model_fn, params, data, "cross_entropy", linearize="recomputed", **options)
        return jax.jit(lambda A, v: A(v)).lower(A, vec).compile().memory_analysis().temp_size_in_bytes

    whole, chunked = [program(n) for n in (256, 1024)], [program(n, batch_size=64) for n in (256, 1024, 1000)]
    assert whole[1] > 3 * whole[0]
    assert chunked[1] < 1.1 * chunked[0] < 0.5 * whole[0]
    assert chunked[2] < 2.2 * chunked[0]  # the last, smaller chunk has a program of its own


def test_kept_chunks_bound_what_a_product_needs():
    model_fn, params = mlp(jax.random.key(0), (16, 64, 64, 4), activation=jnp.tanh, dtype=jnp.float64)
    data = {"input": jnp.asarray(RNG.standard_normal((1024, 16))), "target": jnp.zeros(1024, int)}
    whole, chunked = (create_ggn_mv(model_fn, params, data, "cross_entropy", linearize="cached", batch_size=b) for b in (None, 64))
    kept = [sum(leaf.nbytes for leaf in jax.tree.leaves(G.linearization)) for G in (whole, chunked)]
    assert kept[1] == kept[0]  # neither the chunks' inputs nor, for each chunk, what depends on the parameters alone
    needed = [jax.jit(lambda G, v: G(v)).lower(G, params).compile().memory_analysis().temp_size_in_bytes for G in (whole, chunked)]
    assert needed[1] < 0.5 * needed[0]


def test_kept_chunks_want_a_row_for_each_sample():
    summed = lambda input, params: jnp.sum(input, axis=0) * params
    make = lambda n: create_ggn_mv(summed, jnp.ones(2), {"input": jnp.ones((n, 2)), "target": None}, "none", vmap_over_data=False, batch_size=2, linearize="cached")
    assert_close(make(2)(jnp.ones(2)), jnp.full(2, 4.0))  # one chunk
    with pytest.raises(ValueError, match=r"model_fn: got a prediction of shape \(2,\) for 3 samples, expected a row for each"):
        create_ggn_mv(summed, jnp.ones(2), {"input": jnp.ones((6, 2)), "target": None}, "none", vmap_over_data=False, batch_size=3, linearize="cached")


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("linearize", ["recomputed", "cached"])
def test_convolutions_in_chunks_are_those_that_a_cpu_computes_fast(kind, linearize):
    """XLA's own rearrangement stops at loops: in each convolution of a loop the channels must come last already."""
    model_fn, params, data = CASES["cnn"]
    A = KINDS[kind](model_fn, params, data, "cross_entropy", batch_size=4, linearize=linearize)
    program = str(jax.make_jaxpr(lambda A, v: A(v))(A, params))
    found = re.findall(r"lhs_spec=(\(.*?\)), rhs_spec=(\(.*?\)), out_spec=(\(.*?\))", program)
    assert len(found) >= 8
    assert set(found) == {("(0, 3, 1, 2)", "(3, 2, 0, 1)", "(0, 3, 1, 2)")}


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"linearize": "rematerialized"}, {"stream": 4}], ids=str)
def test_new_parameters_compile_nothing(options):
    model_fn, params, data = CASES["mlp"]
    options = dict(options)
    source = Stream(in_batches(data, size)) if (size := options.pop("stream", None)) else data
    vec, vecs = random_like(params), random_like(params, 3)

    def run(scale):
        A = create_ggn_mv(model_fn, jax.tree.map(lambda p: p * scale, params), source, "cross_entropy", **options)
        return A(vec), A.matmat(vecs)

    run(jnp.asarray(1.0))
    with count_compiles() as compiled:
        run(jnp.asarray(0.5))
    assert compiled.count == 0


def test_ragged_stream_compiles_one_product():
    model_fn, params, data = CASES["mlp"]
    fresh = lambda input, params: model_fn(input=input, params=params)
    A = create_ggn_mv(fresh, params, Stream(in_batches(data, 4)), "cross_entropy")
    A(random_like(params))
    with count_compiles() as compiled:
        A(random_like(params))
    assert compiled.count == 0


def test_streams_have_no_linearisation_to_keep():
    model_fn, params, data = CASES["mlp"]
    stream = Stream(in_batches(data, 4))
    for create in (create_ggn_mv, create_hessian_mv, create_fisher_mv):
        with pytest.raises(ValueError, match="linearize: got 'cached', expected 'recomputed': with a stream"):
            create(model_fn, params, stream, "cross_entropy", linearize="cached")
    with pytest.raises(TypeError, match="data: got list, expected a mapping.*Stream"):
        create_ggn_mv(model_fn, params, [data], "cross_entropy")
    with pytest.raises(ValueError, match="weight"):
        create_ggn_mv(model_fn, params, Stream(in_batches(data | {"weight": -data["weight"] - 1}, 4)), "cross_entropy")
    assert "11 samples" in repr(create_ggn_mv(model_fn, params, stream, "cross_entropy"))


def test_unbound_products_take_streams_and_batches():
    model_fn, params, data = CASES["mlp"]
    vec = random_like(params)
    want = create_ggn_mv_without_data(model_fn, params, "cross_entropy", 0.5)(vec, data)
    mv = create_ggn_mv_without_data(model_fn, params, "cross_entropy", 0.5, batch_size=3)
    AGREE(mv(vec, data), want)
    AGREE(mv(vec, Stream(in_batches(data, 4))), want)
    kept = create_ggn_mv_without_data(model_fn, params, "cross_entropy", 0.5, linearize="rematerialized").bind(data)
    AGREE(kept.linearized()(vec), want)


def test_gradients_through_weights_in_chunks():
    model_fn, params, data = CASES["mlp"]
    vec = random_like(params)

    def quadratic(w, **options):
        product = create_ggn_mv(model_fn, params, data | {"weight": w}, "cross_entropy", reduction="mean", **options)(vec)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, vec, product)))

    for size in (4, 5):
        assert_close(jax.grad(partial(quadratic, batch_size=size))(data["weight"]), jax.grad(quadratic)(data["weight"]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_sums_of_chunks_are_wide(dtype):
    """Many equal chunks: a running sum in half precision would stop growing."""
    params = jnp.ones(2, dtype)
    data = {"input": jnp.ones((4096, 2), dtype), "target": None}
    for linearize in ("recomputed", "cached"):
        G = create_ggn_mv(lambda input, params: input @ params, params, data, "none", batch_size=2, linearize=linearize, num_total_samples=1)
        assert_close(G(params), jnp.full(2, 2, dtype))


def test_chunk_sizes_cover_the_data():
    for n in range(1, 60):
        for b in range(1, 65):
            count, size, rest = chunk_sizes(n, b)
            assert count * size + rest == n
            assert max(size, rest) <= b or count == 1


def test_many_vectors_of_a_usual_size():
    """Large enough for the kernels that a backend keeps for large arrays; jaxlib 0.10.2 fails here (jax#39103)."""
    key = jax.random.key(0)
    model_fn, params = mlp(key, (5, 16, 10))
    data = {"input": jax.random.normal(key, (512, 5)), "target": jax.random.randint(key, (512,), 0, 10)}
    G = create_ggn_mv(model_fn, params, data, "cross_entropy")
    vecs = jax.tree.map(lambda p: jax.random.normal(key, (8, *p.shape), p.dtype), params)
    assert_close(G.matmat(vecs, vector_batch_size=8), G.matmat(vecs, vector_batch_size=1), rtol=1e-4)
