"""What data may be: whole batches of any size, arrays of any library, keys, parts that are missing or do not count, slow sources."""

import threading
import time
from array import array
from collections import UserDict, deque
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import QUICK, linear, oracle_of, run_python
from ggn_nb import Stream, create_fisher_mv, create_ggn_mv, create_ggn_mv_without_data, create_hessian_mv
from ggn_nb.losses.multi_head import multi_head
from ggn_nb.operators.batches import common_length
from ggn_nb.operators.samples import Samples, counting_samples, enable_x64, harmless_inputs, read_samples
from ggn_nb.operators.streams import run_ahead
from ggn_nb.tools.testing import assert_close

RNG = np.random.default_rng(0)
N = 13
X, Y, W, M = RNG.standard_normal((N, 3)), RNG.standard_normal((N, 2)), RNG.uniform(size=N), RNG.uniform(size=N) < 0.6
LABELS = RNG.integers(0, 2, N)
PARAMS = jnp.asarray(RNG.standard_normal((3, 2)))
VECS = jnp.asarray(RNG.standard_normal((4, 3, 2)))
VEC = VECS[0]
DATA = {"input": X, "target": Y}


def cut(sizes, data=DATA):
    """The data in batches of these sizes."""
    ends = np.cumsum(sizes)
    return [jax.tree.map(lambda a, e=e, n=n: a[e - n : e], data) for n, e in zip(sizes, ends, strict=True)]


def both(data):
    """The same data in memory and in a stream of one batch."""
    return [data, Stream([data])]


def product(source, loss="mse", model=linear, **options):
    return create_ggn_mv(model, PARAMS, source, loss, **options)(VEC)


PLAIN = product(DATA)  # agrees with the oracle: see test_dense_oracle.py


# --- batches that are seen as a whole


def normalised(input, params):
    """Batch normalisation in training mode: each prediction depends on the whole batch."""
    f = jnp.tanh(input @ params)
    return (f - jnp.mean(f, 0, keepdims=True)) / jnp.sqrt(jnp.var(f, 0, keepdims=True) + 0.1)


def contrastive(f, y):
    """One number for a batch: each sample should be most like itself."""
    return -jnp.sum(jax.nn.log_softmax(f @ y.T, axis=1) * jnp.eye(len(f)))


def mean_square(f, y):
    return jnp.mean((f - y) ** 2)


def square(f, y):
    return (f - y) ** 2


@partial(jax.jit, static_argnums=(0, 1), compiler_options=QUICK)
def dense_of_batch(kind, loss, x, y):
    """JᵀHJ, the Hessian, or Jᵀ(Σᵢ gᵢgᵢᵀ)J with the gradient gᵢ of the loss of sample i alone."""
    p, n = PARAMS.ravel(), len(y)
    predict = lambda p: normalised(x, p.reshape(3, 2)).ravel()
    total = lambda f: jnp.sum(loss(f.reshape(y.shape), y))
    if kind == "hessian":
        return jax.hessian(lambda p: total(predict(p)))(p)
    J, f = jax.jacobian(predict)(p), predict(p)
    if kind == "ggn":
        return J.T @ jax.hessian(total)(f) @ J
    alone = lambda f, y: jnp.sum(loss(f[None], y[None]))
    g = jax.vmap(jax.grad(alone))(f.reshape(y.shape), y)
    scores = jnp.einsum("ni,nip->np", g, J.reshape(n, 2, 6))
    return scores.T @ scores


KINDS = {"ggn": create_ggn_mv, "hessian": create_hessian_mv, "fisher": partial(create_fisher_mv, kind="empirical")}
WHOLE = {"mse": ("mse", square, 2), "array": (square, square, 2), "scalar": (mean_square, mean_square, None), "contrastive": (contrastive, contrastive, None)}


@pytest.mark.combinations
@pytest.mark.parametrize("kind, loss", [("ggn", name) for name in WHOLE] + [("hessian", "mse"), ("hessian", "scalar"), ("hessian", "contrastive"), ("fisher", "array"), ("fisher", "scalar")])
@pytest.mark.parametrize("sizes", [(3, 3, 2, 3), (2, 3, 3)], ids=str)
def test_a_model_of_the_whole_batch_is_taken_batch_by_batch(sizes, kind, loss):
    loss, values, positions = WHOLE[loss]
    batches = cut(sizes)
    want = sum(dense_of_batch(kind, values, b["input"], b["target"]) for b in batches)
    make = partial(KINDS[kind], normalised, PARAMS, Stream(batches), loss, vmap_over_data=False)
    A = make()
    assert_close(A.matmat(VECS).reshape(4, 6), VECS.reshape(4, 6) @ want, rtol=1e-9)
    assert_close(A(VEC).ravel(), want @ VEC.ravel(), rtol=1e-9)
    if kind == "ggn":
        divisor = positions * sum(sizes) if positions else len(sizes)
        assert_close(make(reduction="mean")(VEC).ravel(), want @ VEC.ravel() / divisor, rtol=1e-9)


SIZES = [(4, 4, 5), (4, 4, 2, 3), (1, 12)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_model_of_one_sample_does_not_see_how_batches_are_cut(sizes):
    for options in ({}, {"reduction": "mean"}, {"batch_size": 3}):
        assert_close(product(Stream(cut(sizes)), **options), product(DATA, **options))
    A = create_ggn_mv(linear, PARAMS, Stream(cut(sizes)), mean_square)
    assert_close(A(VEC), product(DATA, mean_square))
    assert A.num_samples == N


# --- arrays of any library


class Tensor:
    """What most libraries have."""

    def __init__(self, values):
        self.values = np.array(values)

    def __array__(self, dtype=None, copy=None):
        return self.values


class Exchanged:
    """A tensor with nothing but DLPack."""

    def __init__(self, values):
        self.values = np.array(values)

    def __dlpack__(self, **options):
        return self.values.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class Refusing(Exchanged):
    """A tensor whose `__array__` fails, as PyTorch's does in bfloat16."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("unsupported scalar type")


READ = {
    "numpy": np.asarray,
    "fortran": np.asfortranarray,
    "big endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "tensor": Tensor,
    "dlpack": Exchanged,
    "failing __array__": Refusing,
    "list": lambda a: a.tolist(),
    "list of NumPy scalars": lambda a: [[np.float64(e) for e in row] for row in a],
    "deque": lambda a: deque(a.tolist()),
    "buffer": memoryview,
    "jax": jnp.asarray,
}


@pytest.mark.parametrize("kind", READ)
def test_arrays_are_read_alike_in_memory_and_in_streams(kind):
    x, y = READ[kind](X), READ[kind](Y)
    for source in (*both({"input": x, "target": y}), Samples(x, y), Stream([(x, y)])):
        assert_close(product(source), PLAIN)


def test_columns_of_numbers_are_arrays_and_lists_of_arrays_are_pytrees():
    weighted = DATA | {"weight": W.tolist(), "mask": M.tolist()}
    for source in both(weighted):
        assert_close(product(source), product(DATA | {"weight": W, "mask": M}))
    pair = lambda input, params: input[0] @ params + input[1] @ params
    for kind in (list, tuple):
        for source in both({"input": kind([X, X.tolist()]), "target": Y}):
            assert_close(product(source, model=pair), product(DATA, model=lambda input, params: 2 * input @ params))


def test_a_buffer_is_copied_whatever_carries_it():
    for wrap in (np.asarray, Tensor, Exchanged, memoryview, lambda a: Samples(a, None).input):
        buffer = np.ones((4, 2))
        read = read_samples(Samples(wrap(buffer), None))
        getattr(wrap(buffer), "values", buffer)[:] = 7
        buffer[:] = 7
        assert_close(read.input, jnp.ones((4, 2)))


def test_tensors_of_pytorch():
    torch = pytest.importorskip("torch")
    x, y = torch.tensor(X), torch.tensor(Y)
    for source in both({"input": x, "target": y}):
        assert_close(product(source), PLAIN)
    half = read_samples({"input": x.to(torch.bfloat16), "target": None}).input
    assert half.dtype == jnp.bfloat16
    with pytest.raises(TypeError, match=r"data\['input'\]: got Tensor, expected an array: .*requires? grad"):
        read_samples({"input": x.requires_grad_(), "target": None})


def test_tables_of_pandas():
    pandas = pytest.importorskip("pandas")
    for source in both({"input": pandas.DataFrame(X), "target": pandas.DataFrame(Y), "weight": pandas.Series(W)}):
        assert_close(product(source), product(DATA | {"weight": W}))


class Datum:
    """A container that is no pytree."""

    def __init__(self):
        self.x = X


UNREAD = {
    "mapping": (lambda: UserDict(x=X), TypeError, "got a UserDict, which is no pytree, expected an array or a pytree of arrays"),
    "mapping with numbers as keys": (lambda: UserDict(zip(range(N), X, strict=True)), TypeError, "got a UserDict, which is no pytree"),
    "object": (Datum, TypeError, "got Datum of dtype object, expected numbers or truth values, in an array or a pytree of arrays"),
    "set": (lambda: {1, 2}, TypeError, "got set of dtype object"),
    "generator": (lambda: (row for row in X), TypeError, "got generator of dtype object"),
    "text": (lambda: "abc", TypeError, "got str of dtype <U3, expected numbers"),
    "array of text": (lambda: np.array(["a"] * N), TypeError, "got ndarray of dtype <U1, expected numbers"),
    "dates": (lambda: np.zeros(N, "datetime64[D]"), TypeError, r"got ndarray of dtype datetime64\[D\], expected numbers"),
    "records": (lambda: np.zeros(N, [("a", "f8")]), TypeError, "got ndarray of dtype .*, expected numbers"),
    "ragged": (lambda: [[1.0], [2.0, 3.0]], ValueError, "got list, expected an array"),
    "masked": (lambda: np.ma.ones(N), TypeError, "got a MaskedArray, expected an array without a mask"),
    "long": (lambda: X.astype(np.longdouble), TypeError, "got ndarray of dtype float128, expected at most 64 bits a number"),
}


@pytest.mark.parametrize("part", ["input", "target", "weight", "mask"])
@pytest.mark.parametrize("kind", UNREAD)
def test_what_cannot_be_read_is_named(kind, part):
    make, error, message = UNREAD[kind]
    if kind == "long" and np.finfo(np.longdouble).bits == 64:
        pytest.skip("longdouble has 64 bits here")
    for prefix, wrap in (("", lambda data: data), ("batch 0: ", lambda data: Stream([data]))):
        with pytest.raises(error, match=rf"^{prefix}data\['{part}'\]: {message}"):
            product(wrap(DATA | {part: make()}))


@pytest.mark.parametrize("rows, message", [(list(X), r"data\['input'\]\[0\] has 3, data\['target'\] has 13"), (tuple(map(tuple, X)), r"data\['input'\]\[0\]\[0\]: got a scalar"), (["a"] * N, r"data\['input'\]\[0\]: got str")])
def test_lists_that_are_no_columns_name_the_leaf(rows, message):
    for source in both({"input": rows, "target": Y}):
        with pytest.raises((TypeError, ValueError), match=message):
            product(source)


LARGE = {"labels": ("target", LABELS + 2**40, "int32"), "one label": ("target", np.where(np.arange(N) == 7, 2**32 + 1, LABELS), "int32"), "index": ("index", np.arange(N) + 2**33, "int32"),
         "unsigned": ("target", LABELS.astype(np.uint64) + np.uint64(2**32), "uint32"), "list": ("target", (LABELS + 2**40).tolist(), "int32"), "floats": ("input", 1e300 * X, "float32")}


@pytest.mark.parametrize("case", LARGE)
def test_numbers_that_would_be_cut_off_are_refused(case):
    part, values, dtype = LARGE[case]
    data = DATA | {"target": LABELS} | {part: values}
    with enable_x64(False):
        for source in both(data):
            with pytest.raises(ValueError, match=rf"data\['{part}'\]: got .*, which {dtype} cannot hold, expected smaller numbers.*jax_enable_x64"):
                create_ggn_mv(linear, PARAMS.astype(jnp.float32), source, "cross_entropy")
    assert read_samples(data) is not None


def test_numbers_that_are_rounded_are_read():
    with enable_x64(False):
        for source in both({"input": np.where(X > 2, np.inf, X), "target": LABELS, "weight": W.tolist()}):
            A = create_ggn_mv(linear, PARAMS.astype(jnp.float32), source, "cross_entropy")
            assert A(PARAMS.astype(jnp.float32)).dtype == jnp.float32


# --- keys of random numbers


def dropout(input, params):
    return jnp.where(jax.random.bernoulli(input["key"], 0.5, input["x"].shape), input["x"], 0) @ params


KEYS = jax.random.split(jax.random.key(3), N)
KEYED = {"input": {"x": X, "key": KEYS}, "target": Y}
DROPPED = {"input": X * np.asarray(jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (3,)))(KEYS)), "target": Y}


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"batch_size": 4, "linearize": "cached"}, {"linearize": "rematerialized"}], ids=str)
def test_keys_are_data(options):
    want = product(DROPPED | {"mask": M})
    keyed = KEYED | {"mask": M}
    for source in [keyed] if "linearize" in options else [keyed, Stream(cut((5, 5, 3), keyed)), Stream(cut((2, 6, 5), keyed), prefetch=0)]:
        A = create_ggn_mv(dropout, PARAMS, source, "mse", **options)
        assert_close(A(VEC), want)
        assert_close(A.matmat(VECS[:1])[0], want)


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_keys_of_any_kind_are_filled_up(impl):
    keys = jax.random.split(jax.random.key(3, impl=impl), 5)
    *_, last = Stream([{"input": keys[:3], "target": None}, {"input": keys[3:], "target": None}])
    assert last.samples.input.dtype == keys.dtype
    assert jnp.all(last.samples.input == keys[jnp.array([3, 4, 3])])


def test_keys_are_compared_between_passes():
    turns = iter([cut((7, 6), KEYED), cut((7, 6), KEYED), cut((7, 6), KEYED | {"input": {"x": X, "key": KEYS[::-1]}})])
    stream = Stream(lambda: next(turns))
    list(stream), list(stream)
    with pytest.raises(ValueError, match="batch 0 differs from batch 0 of an earlier pass: the content changed"):
        list(stream)


# --- parts that some batches have


SOME = {
    "weight first": (W, None, None),
    "weight later": (None, W, None),
    "mask": (None, M, None),
    "weight and mask": (W, M, None),
}


@pytest.mark.parametrize("vmap_over_data", [True, False])
@pytest.mark.parametrize("case", SOME)
def test_a_batch_may_have_parts_of_its_own(case, vmap_over_data):
    weight, mask, batches = np.ones(N), np.ones(N, bool), cut((5, 5, 3))
    for i, (batch, given) in enumerate(zip(batches, SOME[case], strict=True)):
        if given is None:
            continue
        rows = slice(5 * i, 5 * i + 5)
        joined, part = (mask, "mask") if given.dtype == bool else (weight, "weight")
        joined[rows] = given[rows]
        batch[part] = given[rows]
    sources = Stream(batches), DATA | {"weight": weight, "mask": mask}
    for reduction in ("sum", "mean"):
        got, want = (product(source, vmap_over_data=vmap_over_data, reduction=reduction) for source in sources)
        assert_close(got, want)
    if (case, vmap_over_data) == ("weight and mask", True):
        draw = partial(create_fisher_mv, linear, PARAMS, kind="monte_carlo", key=jax.random.key(1))
        got, want = (draw(source, "mse").matmat(VECS) for source in sources)
        assert_close(got, want)


def two_heads(input, params):
    return {"a": input @ params, "b": jnp.sin(input @ params)}


TWO = multi_head({"a": "mse", "b": "mse"})


@pytest.mark.combinations
@pytest.mark.parametrize("sizes", [(5, 5, 3), (2, 6, 5)], ids=str)
@pytest.mark.parametrize("parts", ["mask", "weight", "both"])
def test_a_head_may_have_parts_of_its_own(parts, sizes):
    """Also where a batch is filled up: the rows that are added count in no head."""
    given = {"mask": {"a": M, "b": None}, "weight": {"a": None, "b": W}}
    data = {"input": X, "target": {"a": Y, "b": Y}} | {part: given[part] for part in given if parts in (part, "both")}
    for reduction in ("sum", "mean") if sizes[0] == 2 else ():
        got, want = (product(source, TWO, two_heads, reduction=reduction) for source in (Stream(cut(sizes, data)), data))
        assert_close(got, want)
    counted = {"a": jnp.asarray(M if parts != "weight" else np.ones(N), float), "b": jnp.asarray(W if parts != "mask" else np.ones(N))}
    weighted = lambda p: sum(jnp.sum(c[:, None] * (two_heads(X, p)[head] - Y) ** 2) for head, c in counted.items())
    hessian = create_hessian_mv(two_heads, PARAMS, Stream(cut(sizes, data)), TWO)(VEC)
    assert_close(hessian, jax.jvp(jax.grad(weighted), (PARAMS,), (VEC,))[1])


def test_a_head_may_be_weighted_in_some_batches():
    data = {"input": X, "target": {"a": Y, "b": Y}}
    first, second = cut((7, 6), data)
    weight = {"a": np.concatenate([W[:7], np.ones(6)]), "b": np.ones(N)}
    stream = Stream([first | {"weight": {"a": W[:7], "b": None}}, second])
    for reduction in ("sum", "mean"):
        assert_close(product(stream, TWO, two_heads, reduction=reduction), product(data | {"weight": weight}, TWO, two_heads, reduction=reduction))


@pytest.mark.parametrize("numbered", [0, 1])
def test_an_index_in_some_batches_is_refused(numbered):
    batches = cut((7, 6))
    batches[numbered]["index"] = np.arange(len(batches[numbered]["target"]))
    with pytest.raises(ValueError, match=rf"^batch 1: data\['index'\]: got {'one' if numbered else 'none'}, expected one in all batches, or in no batch"):
        product(Stream(batches))


WRONG = {"negative": ({"weight": -W[:4]}, ValueError, "weight: got a negative"), "truth values": ({"weight": M[:4]}, TypeError, "weight: got dtype bool"), "numbers": ({"mask": W[:4]}, TypeError, "mask: got dtype float64")}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_in_a_batch_is_said_of_it(wrong):
    part, error, message = WRONG[wrong]
    batches = cut((4, 4, 5))
    batches[1] |= part
    options = {"vmap_over_data": False} if wrong == "numbers" else {}
    with pytest.raises(error, match=f"^batch 1: {message}"):
        product(Stream(batches), **options)


# --- slow sources


def reading():
    return [t for t in threading.enumerate() if t.name == run_ahead.__module__]


def leave_by_break(stream, asked):
    for _ in stream:
        assert asked.wait(timeout=60)
        break


def leave_by_error(stream, asked):
    with pytest.raises(ZeroDivisionError):
        for _ in stream:
            assert asked.wait(timeout=60)
            raise ZeroDivisionError


def leave_by_product(stream, asked):
    def model(input, params):
        assert asked.wait(timeout=60)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        create_ggn_mv(model, PARAMS, stream, "mse")


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_error, leave_by_product])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_loop_that_is_left_does_not_wait_for_its_source(prefetch, leave):
    asked, answer, closed = threading.Event(), threading.Event(), threading.Event()

    def source():
        try:
            yield X, Y
            asked.set()
            answer.wait(timeout=100)
            yield X, Y
        finally:
            closed.set()

    stream = Stream(source, prefetch=prefetch)
    begun = time.perf_counter()
    leave(stream, asked)
    assert time.perf_counter() - begun < 60
    (thread,) = reading()
    assert not closed.is_set()
    answer.set()
    thread.join(timeout=60)
    assert reading() == [] and closed.is_set()
    assert stream._record.longest.num_batches is None  # a pass that was left is not a complete one
    assert len(list(stream)) == 2


BLOCKED = """
import time
import numpy as np
from ggn_nb import Stream
def source():
    yield np.ones(3), None
    time.sleep(1000)
left, left_open = Stream(source), iter(Stream(source))
for _ in left: break
next(left_open)
print("reached the end")
"""


def test_a_source_that_never_answers_does_not_hold_up_the_exit():
    begun = time.perf_counter()
    assert run_python(BLOCKED).strip() == "reached the end"
    assert time.perf_counter() - begun < 100


def test_errors_in_the_middle_of_a_source_arrive():
    def source():
        yield from cut((4, 4))
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        product(Stream(source))
    assert reading() == []


@pytest.mark.parametrize("vmap_over_data", [True, False])
def test_empty_streams_and_batches_are_refused(vmap_over_data):
    with pytest.raises(ValueError, match="data: got no batches"):
        product(Stream([]), vmap_over_data=vmap_over_data)
    with pytest.raises(ValueError, match="batch 1: data: got an empty batch"):
        product(Stream(cut((5, 0, 8))), vmap_over_data=vmap_over_data)


def test_dtypes_may_change_between_batches():
    first, second = cut((7, 6), DATA | {"weight": W})
    narrow = jax.tree.map(lambda a: a.astype(np.float32), second)
    model = lambda input, params: input @ params.astype(input.dtype)
    for reduction in ("sum", "mean"):
        got = product(Stream([first, narrow]), model=model, reduction=reduction)
        assert_close(got, product(DATA | {"weight": W}, reduction=reduction), rtol=1e-5)


# --- samples that do not count


HEADS = {"a": np.array([[True, False], [True, True], [False, False], [False, False]]), "b": np.array([False, False, True, False])}
COUNTS = {
    "nothing given": ({}, None),
    "whole numbers": ({"weight": np.array([0, 1, 0, 2])}, [0, 1, 0, 1]),
    "mask": ({"mask": HEADS["b"]}, [0, 0, 1, 0]),
    "positions": ({"mask": HEADS["a"]}, [1, 1, 0, 0]),
    "weight": ({"weight": np.array([0.0, 1.0, 0.0, 1e-30])}, [0, 1, 0, 1]),
    "weight of positions": ({"weight": np.array([[0, 0], [0, 1.0], [2, 1], [0, 0]])}, [0, 1, 1, 0]),
    "weight for all positions": ({"weight": np.array([0.0, 1, 1, 1]), "mask": HEADS["a"]}, [0, 1, 0, 0]),
    "mask for all positions": ({"weight": np.array([[0, 1.0], [1, 1], [1, 0], [0, 0]]), "mask": HEADS["b"]}, [0, 0, 1, 0]),
    "disjoint": ({"weight": np.array([[0, 1.0], [1, 1], [1, 0], [0, 0]]), "mask": HEADS["a"]}, [0, 1, 0, 0]),
    "heads": ({"mask": HEADS}, [1, 1, 1, 0]),
    "heads and one weight": ({"mask": HEADS, "weight": np.array([0.0, 1, 1, 1])}, [0, 1, 1, 0]),
    "heads and their weights": ({"mask": HEADS, "weight": {"a": np.array([0.0, 1, 1, 1]), "b": np.array([1.0, 1, 0, 1])}}, [0, 1, 0, 0]),
    "a head without": ({"mask": {"a": HEADS["a"], "b": None}}, None),
    "one mask for weighted heads": ({"mask": HEADS["b"], "weight": {"a": np.zeros(4), "b": np.ones(4)}}, [0, 0, 1, 0]),
    "weight of one head, mask of the other": ({"mask": {"a": HEADS["b"], "b": None}, "weight": {"a": None, "b": np.array([1.0, 0, 0, 0])}}, [1, 0, 1, 0]),
}


@pytest.mark.parametrize("case", COUNTS)
def test_which_samples_count(case):
    parts, want = COUNTS[case]
    samples = read_samples({"input": np.ones(4), "target": None} | parts)
    for found in (counting_samples(samples), jax.jit(counting_samples)(samples)):
        assert (found if want is None else found.tolist()) == want


INPUTS = {"f": np.array([[np.nan, 1], [-0.0, np.inf], [3, 4], [5, 6]]), "h": jnp.arange(4, dtype=jnp.bfloat16), "i": np.arange(4), "u": np.arange(4, dtype=np.uint8), "b": np.arange(4) % 2 == 1,
          "c": np.arange(4) * 1j, "key": jax.random.split(jax.random.key(0), 4), "e": np.ones((4, 0))}
bits = lambda leaf: np.asarray(jax.random.key_data(leaf) if leaf.dtype == KEYS.dtype else leaf).tobytes()


@pytest.mark.parametrize("counts, rows", [([0, 1, 0, 1], [1, 1, 1, 3]), ([1, 1, 1, 1], [0, 1, 2, 3]), ([0, 0, 0, 0], [0, 1, 2, 3]), ([0, 0, 1, 1], [2, 2, 2, 3]), ([1, 0, 0, 0], [0] * 4)], ids=str)
def test_inputs_that_do_not_count_are_those_of_the_first_that_does(counts, rows):
    samples, counts, rows = read_samples({"input": INPUTS, "target": None}), np.array(counts, bool), np.array(rows)
    for found in (harmless_inputs(samples, jnp.asarray(counts)), jax.jit(harmless_inputs)(samples, counts)):
        for got, leaf in zip(jax.tree.leaves(found.input), jax.tree.leaves(samples.input), strict=True):
            kept = rows == np.arange(4)
            assert bits(got[kept]) == bits(leaf[kept])  # to the bit
            if got.dtype == KEYS.dtype:
                assert bits(got) == bits(leaf[rows])
            else:
                np.testing.assert_array_equal(np.asarray(got), np.asarray(leaf)[rows])
    assert harmless_inputs(samples, None) is samples
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), samples)
    found = jax.vmap(harmless_inputs)(twice, jnp.stack([counts, counts[::-1]]))
    assert bits(found.input["i"][0]) == bits(harmless_inputs(samples, jnp.asarray(counts)).input["i"])


def test_derivatives_of_inputs_that_do_not_count_are_zero():
    x, mask = jnp.array([0.0, 2.0, -1.0, 4.0, np.nan]), jnp.array([False, True, False, True, False])

    def total(x):
        samples = Samples(x, None, mask=mask)
        return jnp.sum(jnp.log(harmless_inputs(samples, counting_samples(samples)).input))

    for gradient in (jax.grad(total), jax.jit(jax.jacfwd(total))):
        assert gradient(x).tolist() == [0.0, 0.5, 0.0, 0.25, 0.0]
    assert jnp.diag(jax.hessian(total)(x)).tolist() == [0.0, -0.25, 0.0, -1 / 16, 0.0]


def logarithmic(input, params):
    """A model that cannot bear padding: log 0, 0/0, NaN."""
    return (jnp.log(input) / jnp.sum(input, keepdims=True)) @ jnp.exp(params)


@pytest.mark.parametrize("kind, by, fill", [("ggn", "mask", 0.0), ("ggn", "mask", np.nan), ("ggn", "weight", -1.0), ("ggn", "both", np.inf), ("hessian", "mask", np.nan), ("hessian", "weight", 0.0), ("fisher", "both", np.nan)])
def test_padding_in_a_stream_is_harmless(kind, by, fill):
    x, counts = np.abs(X) + 0.1, np.arange(N) % 3 != 0
    padded = np.where(counts[:, None], x, fill)
    parts = {"mask": counts, "weight": W * counts}
    data = {"input": padded, "target": Y} | {part: parts[part] for part in parts if by in (part, "both")}
    kept = {"input": x[counts], "target": Y[counts], "weight": W[counts] if by != "mask" else np.ones(counts.sum())}
    loss = "mse" if kind != "fisher" else square
    for options in ({}, {"reduction": "mean", "batch_size": 2}):
        want = KINDS[kind](logarithmic, PARAMS, kept, loss, **options)
        got = KINDS[kind](logarithmic, PARAMS, Stream(cut((5, 5, 3), data)), loss, **options)
        assert_close(got(VEC), want(VEC))
    assert_close(got.matmat(VECS), want.matmat(VECS))


def test_a_batch_in_which_nothing_counts_adds_nothing():
    mask = np.arange(N) >= 5
    for data in (DATA | {"mask": mask}, DATA | {"weight": W * mask}):
        want = product({"input": X[5:], "target": Y[5:]} if "mask" in data else {"input": X[5:], "target": Y[5:], "weight": W[5:]})
        assert_close(product(Stream(cut((5, 5, 3), data))), want)


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from ggn_nb.operators.samples import Samples, counting_samples, harmless_inputs
rows = np.array([3, 3, 3, 3, 4, 3, 6, 7])
x, mask = np.arange(16.0).reshape(8, 2), rows == np.arange(8)
keys = jax.random.split(jax.random.key(0), 8)
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"), axis_types=(kind,) * 2)
    put = lambda a: jax.device_put(a, NamedSharding(mesh, P("data")))
    samples = Samples({"x": put(np.where(mask[:, None], x, np.nan)), "key": put(keys)}, None, mask=put(mask))
    shown = lambda samples: harmless_inputs(samples, counting_samples(samples))
    for found in (shown(samples), jax.jit(shown)(samples)):
        assert np.array_equal(jax.device_get(found.input["x"]), x[rows])
        assert found.input["x"].sharding.is_equivalent_to(samples.input["x"].sharding, 2)
        assert np.array_equal(jax.random.key_data(found.input["key"]), jax.random.key_data(keys)[rows])
    assert "all-gather(%" not in "".join(l for l in jax.jit(shown).lower(samples).compile().as_text().splitlines() if "f64[8,2]" in l)
print("reached the end")
"""


def test_samples_that_are_shared_among_devices():
    code = 'import jax; jax.config.update("jax_enable_x64", True)' + SHARDED
    assert "reached the end" in run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_NUMPY_DTYPE_PROMOTION="standard")


# --- parts of several lengths


def inside_and_boundary(input, params):
    return jnp.concatenate([input["inside"] @ params, 2 * input["boundary"] @ params])


def domain(start):
    return {"input": {"inside": X[start : start + 5], "boundary": X[start + 5 : start + 7]}, "target": Y[start + 1 : start + 3], "index": np.array(start)}


def residual(f, y):
    return jnp.sum(f**2) * jnp.sum(y**2)


@pytest.mark.parametrize("make", [create_ggn_mv, create_hessian_mv])
def test_parts_may_have_several_lengths_where_a_batch_is_seen_as_a_whole(make):
    batches = [domain(0), domain(3), domain(6)]
    total = lambda p: sum(residual(inside_and_boundary(b["input"], p), b["target"]) for b in batches)
    want = jax.jvp(jax.grad(total), (PARAMS,), (VEC,))[1]  # the model is linear: GGN and Hessian agree
    A = make(inside_and_boundary, PARAMS, Stream(batches), residual, vmap_over_data=False, num_curv_samples=3)
    assert_close(A(VEC), want)
    assert_close(A.matmat(VECS[:1])[0], want)
    assert A.num_samples is None and "an unknown number of samples in Stream" in repr(A)


def test_parts_of_several_lengths_without_a_scale():
    mv = create_ggn_mv_without_data(inside_and_boundary, PARAMS, residual, factor=1.0, vmap_over_data=False)
    each = [mv(VEC, batch) for batch in (domain(0), domain(3))]
    assert_close(mv(VEC, Stream([domain(0), domain(3)])), sum(each))


def test_one_datum_without_a_batch_axis():
    mv = create_ggn_mv_without_data(linear, PARAMS, "mse", factor=1.0, vmap_over_data=False)
    rows = [{"input": x, "target": y} for x, y in zip(X, Y, strict=True)]
    assert_close(mv(VEC, Stream(rows)), PLAIN)


def test_parts_of_several_lengths_are_refused_where_samples_are_taken_one_by_one():
    for source in (domain(0), Stream([domain(0)])):
        with pytest.raises(ValueError, match="data.*: got (different batch sizes|a scalar)"):
            create_ggn_mv(inside_and_boundary, PARAMS, source, residual)
    with pytest.raises(ValueError, match=r"batch 1: data: got different batch sizes, expected one: data\['input'\] has 6, data\['target'\] has 5"):
        first, second = cut((7, 6))
        product(Stream([first, second | {"target": Y[:5]}]))
    with pytest.raises(ValueError, match="got different batch sizes"):
        create_fisher_mv(inside_and_boundary, PARAMS, Stream([domain(0) | {"index": None}]), "mse", kind="monte_carlo", key=jax.random.key(0), vmap_over_data=False)
    assert common_length(Samples(X, Y), required=False) == N


# --- transfers


@pytest.mark.parametrize("kind, options", [("ggn", {}), ("ggn", {"batch_size": 4}), ("ggn", {"num_total_samples": 100}), ("hessian", {"vmap_over_data": False}), ("fisher", {}), ("monte carlo", {})], ids=str)
def test_all_transfers_are_explicit(kind, options):
    data = {"input": X, "target": LABELS, "weight": W, "mask": M}
    make = KINDS.get(kind) or partial(create_fisher_mv, kind="monte_carlo", key=jax.random.key(0))
    with jax.transfer_guard("disallow"):
        for source in (data, Stream(cut((5, 5, 3), data), prefetch=0), Stream(cut((5, 5, 3), data))):
            A = make(linear, PARAMS, source, "cross_entropy", **options)
            A(VEC)
            A.matmat(VECS)


def test_the_plain_product_is_that_of_the_oracle():
    want = oracle_of(linear, PARAMS, DATA, square).reshape(6, 6) @ VEC.ravel()
    assert_close(PLAIN.ravel(), want)


def test_sequences_of_the_standard_library_are_columns():
    for kind in (lambda w: array("d", w), lambda w: deque(w.tolist()), lambda w: w.tolist()):
        for source in both(DATA | {"weight": kind(W)}):
            assert_close(product(source), product(DATA | {"weight": W}))
