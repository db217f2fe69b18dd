"""Streams: any source, any shape of batch, the same in each pass, in the background; and sums over them."""

import subprocess
import sys
import threading
import types
from collections import UserDict
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import run_python
from ggn_nb import Stream
from ggn_nb.operators.batches import Batch, masked_samples
from ggn_nb.operators.passes import checksum
from ggn_nb.operators.samples import Samples, number_samples, read_samples
from ggn_nb.operators.streams import enable_x64, run_ahead, sum_over_batches
from ggn_nb.tools.testing import assert_close
from ggn_nb.tools.timing import count_compiles

X, Y = np.random.default_rng(0).standard_normal((11, 3)), np.arange(11)
ways = pytest.mark.parametrize("prefetch", [0, 1, 3])


def batches(size=4, x=X, y=Y):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def whole(stream):
    """The samples of a stream without the rows that fill up: inputs and targets."""
    found = [jax.tree.map(lambda leaf, b=b: leaf[b.counted], b.samples) for b in stream]
    return [np.concatenate([getattr(samples, part) for samples in found]) for part in ("input", "target")]


def same_as_arrays(stream):
    """Three passes over `stream` give `X` and `Y` each time."""
    for _ in range(3):
        x, y = whole(stream)
        assert_close((x.astype(X.dtype), y.astype(Y.dtype)), (X, Y), rtol=1e-6)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [t for t in threading.enumerate() if t.name == "ggn_nb.operators.streams"] == []


class Tensor:
    """A tensor of some other library."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None):
        return self.values


class Loader:
    """Makes a new iterator each time, and knows its length."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        yield from self.items


# --- samples


def test_samples_are_read_once_and_for_all():
    x, y = X.copy(), Tensor(Y.copy())
    data = {"input": {"x": x, "fixed": jnp.asarray(X)}, "target": y, "mask": None}
    samples = read_samples(data)
    x[:], y.values[:] = np.nan, -1
    assert_close(samples, Samples({"x": jnp.asarray(X), "fixed": jnp.asarray(X)}, jnp.asarray(Y)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(samples))
    assert samples.input["fixed"] is data["input"]["fixed"]
    assert read_samples(samples) is samples


def test_reading_samples_compiles_nothing():
    with count_compiles() as compiles:
        number_samples(read_samples({"input": np.ones((7, 13)), "target": [np.ones(7), np.ones(7, np.float16)]}), 3)
    assert compiles.count == 0


def test_samples_within_a_trace_are_read_too():
    def total(x):
        samples = read_samples({"input": x, "target": X})
        return samples.input.sum() + samples.target.sum()

    assert_close(jax.jit(total)(X), jnp.asarray(2 * X.sum()))
    assert_close(jax.grad(total)(jnp.asarray(X)), jnp.ones_like(X))
    shape = jax.ShapeDtypeStruct((11, 3), jnp.float32)
    assert read_samples({"input": shape, "target": None}).input is shape
    assert read_samples({"input": 3, "target": True}).input.shape == ()


@pytest.mark.parametrize("leaf", ["text", object(), np.array(["a"]), np.array([None]), np.ma.ones(3), b"bytes"], ids=lambda leaf: type(leaf).__name__)
def test_leaves_that_are_no_arrays_are_named(leaf):
    with pytest.raises(TypeError, match=r"^data\['input'\]\['x'\]: got .*, expected"):
        read_samples({"input": {"x": leaf}, "target": None})


def test_samples_are_numbered_unless_they_have_numbers():
    samples = Samples(jnp.asarray(X), None)
    assert number_samples(samples).index.tolist() == list(range(11))
    assert number_samples(samples, 5).index.tolist() == list(range(5, 16))
    assert jax.jit(number_samples)(samples, 5).index.tolist() == list(range(5, 16))
    assert number_samples(samples._replace(index=jnp.asarray(Y[::-1])), 5).index.tolist() == Y[::-1].tolist()


# --- sources


SOURCES = {
    "list": lambda: batches(),
    "tuple": lambda: tuple(batches()),
    "loader": lambda: Loader(batches()),
    "function that returns a list": lambda: batches,
    "function that returns an iterator": lambda: lambda: iter(batches()),
    "generator function": lambda: Loader(batches()).__iter__,
    "pairs as lists": lambda: [list(pair) for pair in batches()],
    "mappings": lambda: [UserDict(zip(("input", "target"), pair, strict=True)) for pair in batches()],
    "tensors": lambda: [tuple(map(Tensor, pair)) for pair in batches()],
    "numbers": lambda: [{"input": x.tolist(), "target": y.tolist()} for x, y in batches()],
    "jax": lambda: jax.tree.map(jnp.asarray, batches()),
    "reversed": lambda: [(x[::-1], y[::-1]) for x, y in reversed(batches(11, X[::-1], Y[::-1]))],
    "one batch": lambda: batches(11),
    "one sample each": lambda: batches(1),
}


@ways
@pytest.mark.parametrize("source", SOURCES)
def test_sources(source, prefetch):
    same_as_arrays(Stream(SOURCES[source](), prefetch=prefetch))


@pytest.mark.parametrize("once", [iter([]), (b for b in batches()), zip(X, Y, strict=True), map(len, []), enumerate([])], ids=lambda once: type(once).__name__)
def test_what_is_read_once_is_refused(once):
    with pytest.raises(TypeError, match="can be read only once, expected .* or a function without arguments that makes it"):
        Stream(once)


@pytest.mark.parametrize("wrong", [None, 3, {"input": X, "target": Y}, object()], ids=lambda w: type(w).__name__)
def test_what_is_no_source_is_refused(wrong):
    with pytest.raises(TypeError, match=f"data: got {type(wrong).__name__}, expected an iterable of batches"):
        Stream(wrong)


@ways
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("left_early", [True, False])
@pytest.mark.parametrize("make", [lambda: (b for b in batches()), lambda: iter(batches())], ids=["generator", "iterator"])
def test_a_function_that_returns_the_same_iterator_is_refused(make, left_early, check, prefetch):
    once = make()
    stream = Stream(lambda: once, check=check, prefetch=prefetch)
    for _ in stream:
        if left_early:
            break
    with pytest.raises(ValueError, match="data: got a function that returned the same .* twice, expected one that makes a new"):
        next(iter(stream))


@ways
def test_an_iterable_that_gives_nothing_the_second_time(prefetch):
    class Once:
        def __init__(self):
            self.made = iter(batches())

        def __iter__(self):
            return self.made

    stream = Stream(Once(), check=False, prefetch=prefetch)
    assert len(list(stream)) == 3
    with pytest.raises(ValueError, match="data: got no batches in this pass, after 3 in an earlier one: a source must give a new"):
        list(stream)


@ways
@pytest.mark.parametrize("source", [[], lambda: [], lambda: iter(())], ids=["list", "function", "iterator"])
def test_no_batches(source, prefetch):
    with pytest.raises(ValueError, match=r"data: got no batches$"):
        list(Stream(source, prefetch=prefetch))


@ways
def test_functions_that_return_no_batches_or_take_arguments(prefetch):
    with pytest.raises(TypeError, match="data: got a function that returns int"):
        list(Stream(lambda: 3, prefetch=prefetch))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'path'"):
        list(Stream(lambda path: [], prefetch=prefetch))


def test_nothing_is_read_before_the_first_pass():
    def source():
        raise AssertionError

    stream = Stream(source)
    iter(stream)
    assert repr(stream) == "Stream(function, prefetch=2, check=True)"


@pytest.mark.parametrize("prefetch", [-1, 1.5, None, "2"])
def test_prefetch_is_a_number_of_batches(prefetch):
    with pytest.raises(ValueError, match="prefetch: got .*, expected an integer of at least 0"):
        Stream([], prefetch=prefetch)


# --- batches


class Pair(NamedTuple):
    left: object
    right: object


def test_nested_parts_keep_their_structure():
    x = {"a": Tensor(X), "b": Pair(X[:, 0], [[1.0], [2.0]] * 5 + [[3.0]]), "none": None, "list": [Y, jnp.asarray(Y)]}
    (batch,) = Stream([{"input": x, "target": None, "weight": Y / 2, "mask": Y > 3}])
    assert isinstance(batch, Batch)
    column = jnp.array([[1.0], [2.0]] * 5 + [[3.0]])
    expected = {"a": jnp.asarray(X), "b": Pair(jnp.asarray(X[:, 0]), column), "none": None, "list": [jnp.asarray(Y)] * 2}
    assert_close(batch.samples, Samples(expected, None, weight=jnp.asarray(Y / 2), mask=jnp.asarray(Y > 3)))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((batch.samples, batch.counted)))
    assert batch.counted.tolist() == [True] * 11
    assert batch.start == 0


DTYPES = ["float64", "float32", "float16", "bfloat16", "int32", "uint8", "bool", "complex64"]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_kept(dtype, order):
    x = np.array(np.arange(12).reshape(4, 3), jnp.dtype(dtype), order=order)
    stream = Stream([(x, x[:, ::2])])
    for _ in range(2):
        (batch,) = stream
        assert_close(batch.samples, Samples(jnp.asarray(x), jnp.asarray(x[:, ::2])))


BAD = {
    "three parts": ((X, Y, Y), ValueError, r"data: got a tuple of length 3, expected a pair \(input, target\) or a mapping"),
    "one part": ([X], ValueError, "data: got a list of length 1"),
    "an array": (X, TypeError, "data: got ndarray, expected a mapping"),
    "other names": ({"image": X, "label": Y}, ValueError, r"data: got .* missing \['input', 'target'\]"),
    "more names": ({"input": X, "target": Y, "id": Y}, ValueError, r"data: got .* unknown \['id'\]"),
    "text": ((X, np.array(["a"] * 11)), TypeError, r"data\['target'\]: got ndarray of dtype <U1, expected numbers or truth values"),
    "an object": (({"x": object()}, Y), TypeError, r"data\['input'\]\['x'\]: got object of dtype object"),
    "ragged lists": (([[1], [2, 3]], Y), ValueError, r"data\['input'\]: got list, expected an array"),
    "sizes": ((X, Y[:3]), ValueError, r"data: got different .* data\['input'\] has 11, data\['target'\] has 3"),
    "size of the weight": ({"input": X, "target": Y, "weight": Y[:3]}, ValueError, r"data: got .* data\['weight'\] has 3"),
    "a scalar": ((X, 3.0), ValueError, r"data\['target'\]: got a scalar, expected a leading batch axis"),
    "empty": ((X[:0], Y[:0]), ValueError, "data: got an empty batch"),
    "nothing": ((None, None), ValueError, "data: got no arrays"),
    "masked": ((np.ma.masked_less(X, 0), Y), TypeError, r"data\['input'\]: got a MaskedArray"),
}


@ways
@pytest.mark.parametrize("bad", BAD)
def test_bad_batches_are_named(bad, prefetch):
    batch, error, message = BAD[bad]
    good = (X, Y)
    stream = Stream([good, good, batch], prefetch=prefetch)
    with pytest.raises(error, match=f"^batch 2: {message}"):
        list(stream)


def test_tensors_that_cannot_be_read_say_why():
    class OnDevice:
        def __array__(self, dtype=None):
            raise RuntimeError("copy the tensor to the host first")

    with pytest.raises(TypeError, match=r"batch 0: data\['input'\]: got OnDevice, expected an array: copy the tensor to the host first"):
        list(Stream([(OnDevice(), Y)]))


@ways
def test_a_buffer_may_be_used_again(prefetch):
    def source():
        buffer = np.zeros((256, 64))
        for i in range(6):
            buffer[:] = i
            yield buffer, None

    kept = list(Stream(source, prefetch=prefetch))
    for i, batch in enumerate(kept):
        assert_close(batch.samples.input, jnp.full((256, 64), float(i)))


def test_arrays_of_jax_are_not_copied():
    x = jnp.asarray(X)
    (batch,) = Stream([(x, None)])
    assert batch.samples.input.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()


# --- one shape


@ways
@pytest.mark.parametrize("sizes", [(4, 4, 3), (3, 1, 5, 2), (1, 1), (5,), (2, 7, 2)], ids=str)
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray, Tensor], ids=["numpy", "jax", "tensor"])
def test_ragged_batches(kind, sizes, prefetch):
    ends = np.cumsum(sizes)
    x = np.arange(float(ends[-1]))
    source = [(kind(x[end - n : end]), kind(x[end - n : end] > 2)) for n, end in zip(sizes, ends, strict=True)]
    got = list(Stream(source, prefetch=prefetch))
    assert [len(b.counted) for b in got] == [max(n, sizes[0]) for n in sizes]
    assert [int(b.counted.sum()) for b in got] == list(sizes)
    assert [b.start for b in got] == [end - n for n, end in zip(sizes, ends, strict=True)]
    for b in got:
        for leaf in jax.tree.leaves(b.samples):
            assert jnp.all(leaf[~b.counted] == leaf[0])
    assert_close(jnp.concatenate([b.samples.input[b.counted] for b in got]), jnp.asarray(x))
    exact = sum_over_batches(Stream(source, prefetch=prefetch), jax.jit(lambda b: jnp.sum(b.samples.input, where=b.counted)))
    assert_close(exact, jnp.asarray(x.sum()))


def test_a_ragged_stream_compiles_once():
    @jax.jit
    def moments(batch):
        counted = batch.counted[:, None]
        return jnp.sum(batch.samples.input, where=counted), jnp.sum(batch.samples.input ** 2, where=counted)

    stream = Stream(batches())
    with count_compiles() as compiles:
        got = [moments(batch) for batch in stream]
    assert compiles.count == 1
    assert_close(tuple(map(sum, zip(*got, strict=True))), (jnp.sum(X), jnp.sum(X**2)))
    with count_compiles() as compiles:
        sum_over_batches(Stream(batches(5)), lambda batch: batch.counted.astype(jnp.float32))
        sum_over_batches(stream, lambda batch: batch.samples.target)
    first = compiles.count
    with count_compiles() as compiles:
        sum_over_batches(stream, lambda batch: batch.samples.target)
    assert (first > 0, compiles.count) == (True, 0)


@ways
def test_a_sum_may_see_batches_as_they_are(prefetch):
    """As a model needs it whose samples depend on each other: here, on the mean of their batch."""
    shapes = []

    @jax.jit
    def centred(batch):
        shapes.append(batch.samples.input.shape)
        return ((batch.samples.input - batch.samples.input.mean(0, keepdims=True)) ** 2).sum(0)

    stream = Stream(batches(), prefetch=prefetch)
    got = sum_over_batches(stream, centred, pad=False)
    assert_close(got, sum(jnp.asarray(((x - x.mean(0)) ** 2).sum(0)) for x, _ in batches()))
    assert shapes == [(4, 3), (3, 3)]
    assert len(list(stream)) == 3


MASKS = {
    "none": None,
    "samples": np.array([True, False, True]),
    "positions": np.array([[True, False], [False, True], [True, True]]),
    "heads": {"a": np.array([True, False, True]), "b": None},
}


@pytest.mark.parametrize("mask", MASKS)
def test_rows_that_were_added_are_masked_out(mask):
    rows = np.ones((3, 2))
    part = {"input": rows, "target": None, "mask": MASKS[mask]}
    last = jax.tree.map(lambda leaf: leaf[:2], part)
    *_, batch = Stream([part, last])
    samples = masked_samples(batch, numbered=True)
    assert samples.index.tolist() == [3, 4, 5]
    assert masked_samples(batch, numbered=False).index is None
    if MASKS[mask] is None:
        assert samples.mask.tolist() == [True, True, False]
    for got, given in zip(jax.tree.leaves(samples.mask), jax.tree.leaves(MASKS[mask]), strict=False):
        assert got[:2].tolist() == given[:2].tolist()
        assert not got[2].any()


# --- the same in each pass


def varying(*passes):
    """A source with other batches in each pass."""
    turns = iter(passes)
    return lambda: next(turns)


FIRST = batches()
OTHER = [FIRST[0], (FIRST[1][0] + 1e-12, FIRST[1][1]), FIRST[2]]
CHANGED = {
    "order": (FIRST[::-1], "data: batch 0 is batch 2 of an earlier pass: the order changed"),
    "content": (OTHER, "data: batch 1 differs from batch 1 of an earlier pass: the content changed"),
    "dtype": ([FIRST[0], (X[4:8].astype(np.float32), Y[4:8]), FIRST[2]], "batch 1 differs"),
    "structure": ([FIRST[0], ([X[4:8]], Y[4:8]), FIRST[2]], "batch 1 differs"),
    "samples within a batch": ([FIRST[0], (X[7:3:-1], Y[7:3:-1]), FIRST[2]], "batch 1 differs"),
    "sizes": (batches(3), "batch 0 differs"),
    "fewer": (FIRST[:2], "data: got 2 batches, expected 3 as in an earlier pass"),
    "more": ([*FIRST, FIRST[0]], "data: got more than 3 batches, the number in an earlier pass"),
}


@ways
@pytest.mark.parametrize("change", CHANGED)
def test_changes_between_passes(change, prefetch):
    later, message = CHANGED[change]
    stream = Stream(varying(FIRST, FIRST, later, FIRST), prefetch=prefetch)
    list(stream), list(stream)
    with pytest.raises(ValueError, match=f"{message}.*Shuffling and random augmentation are the usual causes.*check=False"):
        list(stream)
    assert len(list(stream)) == 3  # the first pass still is what counts
    stream = Stream(varying(FIRST, later, FIRST), check=False, prefetch=prefetch)
    assert [len(list(stream)) for _ in range(3)] == [3, len(later), 3]


def test_changes_are_raised_where_they_happen():
    stream = Stream(varying(FIRST, OTHER))
    list(stream)
    again = iter(stream)
    assert_close(next(again).samples.target, jnp.asarray(Y[:4]))
    with pytest.raises(ValueError, match="batch 1 differs"):
        next(again)


def test_passes_that_were_left_early_count_too():
    stream = Stream(varying(FIRST, OTHER, FIRST, FIRST[:2]), prefetch=0)
    left = iter(stream)
    next(left), next(left)
    left.close()
    with pytest.raises(ValueError, match="batch 1 differs"):
        list(stream)
    assert len(list(stream)) == 3
    with pytest.raises(ValueError, match="got 2 batches, expected 3"):
        list(stream)


def test_passes_may_be_nested():
    stream = Stream(batches())
    assert [(a.start, b.start) for a in stream for b in stream] == [(i, j) for i in (0, 4, 8) for j in (0, 4, 8)]


def test_equal_batches_are_no_change():
    stream = Stream([(X, Y)] * 3)
    assert [len(list(stream)) for _ in range(2)] == [3, 3]


def test_a_checksum_sees_every_byte():
    zeros = np.zeros((3, 2), np.float32)
    seen = {checksum(Samples(zeros, None))}
    for i in range(24):
        other = zeros.copy()
        other.view(np.uint8).reshape(-1)[i] = 1
        seen.add(checksum(Samples(other, None)))
    assert len(seen) == 25


# --- in the background


@ways
def test_errors_of_the_source_arrive_with_their_traceback(prefetch):
    def source():
        yield from batches()
        raise KeyError("no such file")

    seen = []
    with pytest.raises(KeyError, match="no such file") as raised:
        for batch in Stream(source, prefetch=prefetch):
            seen.append(batch.start)
    assert seen == [0, 4, 8]
    assert raised.traceback[-1].name == "source"


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, MemoryError, StopIteration])
def test_any_exception_of_the_source_arrives(error):
    def source():
        raise error

    with pytest.raises(RuntimeError if error is StopIteration else error):
        list(Stream(source))


@ways
def test_the_source_is_closed_when_the_loop_ends_early(prefetch):
    events = []

    def source():
        try:
            yield from batches(1)
        finally:
            events.append(threading.current_thread().name)

    stream = Stream(source, prefetch=prefetch)
    for _ in stream:
        break
    with pytest.raises(ZeroDivisionError):
        for _ in stream:
            raise ZeroDivisionError
    sum_over_batches(stream, lambda batch: batch.samples.input)
    assert events == 3 * ["ggn_nb.operators.streams" if prefetch else "MainThread"]


def test_threads_run_while_they_are_needed():
    running = lambda: [t for t in threading.enumerate() if t.name == "ggn_nb.operators.streams"]
    again = iter(Stream(batches()))
    assert running() == []
    next(again)
    (thread,) = running()
    assert thread.daemon
    del again
    assert running() == []


LEFT_OPEN = """
import itertools
import numpy as np
from ggn_nb import Stream
endless = Stream(lambda: itertools.repeat((np.ones((100, 100)), None)), prefetch=1000)
left_open = iter(endless)
next(left_open)
print("reached the end")
"""


def test_an_iterator_that_is_left_open_does_not_disturb_the_exit():
    assert run_python(LEFT_OPEN).strip() == "reached the end"


@pytest.mark.parametrize("prefetch", [1, 2, 5])
def test_reading_overlaps_with_work(prefetch):
    """Each batch is used only when the next one is being made."""
    begun = [threading.Event() for _ in range(8)]

    def source():
        for event in begun:
            event.set()
            yield X, Y

    stream = iter(Stream(source, prefetch=prefetch))
    for event in begun[1:]:
        next(stream)
        assert event.wait(timeout=60)
    assert len(list(stream)) == 1


def test_nothing_overlaps_without_a_thread():
    begun = []

    def source():
        for i in range(3):
            begun.append(i)
            yield X, Y

    for taken, _ in enumerate(Stream(source, prefetch=0), start=1):
        assert len(begun) == taken


@pytest.mark.parametrize("number", [1, 2, 5])
def test_no_more_is_read_ahead_than_was_asked_for(number):
    made, signal = [], threading.Semaphore(0)

    def source():
        for i in range(20):
            made.append(i)
            signal.release()
            yield i

    for taken, _ in enumerate(run_ahead(source(), number), start=1):
        expected = min(taken + number, 20)
        while len(made) < expected:
            assert signal.acquire(timeout=60)
        assert len(made) == expected


@ways
def test_settings_of_a_thread_reach_the_batches(prefetch):
    stream = Stream(batches(), prefetch=prefetch)
    for x64, dtype in ((False, jnp.float32), (True, jnp.float64)):
        with enable_x64(x64):
            assert {batch.samples.input.dtype for batch in stream} == {jnp.dtype(dtype)}


DEVICES = """
import jax, numpy as np
from ggn_nb import Stream
first, second = jax.devices()
ragged = [(np.ones(n), None) for n in (4, 3)]
for device in (first, second):
    with jax.default_device(device):
        for prefetch in (0, 2):
            for batch in Stream(ragged, prefetch=prefetch):
                assert batch.samples.input.devices() == batch.counted.devices() == {device}
there = jax.device_put(ragged, second)
for prefetch in (0, 2):
    for batch in Stream(there, prefetch=prefetch): assert batch.samples.input.devices() == {second}
print("reached the end")
"""


def test_batches_go_to_the_default_device_and_arrays_of_jax_stay():
    assert "reached the end" in run_python(DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=2")


# --- progress


class Bar:
    """What of `tqdm` is used."""

    shown = []

    def __init__(self, *, total, unit):
        self.total, self.count, self.closed = total, 0, False
        self.shown.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True

    def update(self):
        self.count += 1


@ways
def test_progress(prefetch, monkeypatch):
    monkeypatch.setattr(Bar, "shown", [])
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    known, unknown = (Stream(source, progress=True, prefetch=prefetch) for source in (Loader(batches()), batches))
    for stream in (known, unknown, unknown):
        list(stream)
    for _ in known:
        break
    assert [(bar.total, bar.count, bar.closed) for bar in Bar.shown] == [(3, 3, True), (None, 3, True), (3, 3, True), (3, 0, True)]


def test_progress_needs_tqdm(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match="progress: needs tqdm, which is not installed: pip install tqdm, or pass progress=False"):
        Stream(batches(), progress=True)
    assert len(list(Stream(batches()))) == 3


def test_progress_by_tqdm(capsys):
    pytest.importorskip("tqdm")
    list(Stream(batches(), progress=True))
    assert "3/3" in capsys.readouterr().err


# --- sums


@ways
@pytest.mark.parametrize("size", [1, 3, 4, 11])
def test_sums_are_those_of_everything_at_once(size, prefetch):
    @jax.jit
    def gram(batch, scale):
        x = jnp.where(batch.counted[:, None], batch.samples.input, 0)
        return {"xx": scale * x.T @ x, "n": jnp.sum(batch.counted), "none": None}

    got = sum_over_batches(Stream(batches(size), prefetch=prefetch), gram, 2.0)
    assert_close(got, {"xx": jnp.asarray(2 * X.T @ X), "n": jnp.sum(jnp.ones(11, bool)), "none": None})


def test_sums_in_half_precision_are_rounded_once():
    many = Stream([(np.full((1, 2), 1 + 2**-7, np.float32), None)] * 600, check=False)
    for dtype in (jnp.bfloat16, jnp.float16):
        got = sum_over_batches(many, lambda batch, dtype=dtype: batch.samples.input[0].astype(dtype))
        assert_close(got, jnp.full(2, 600 * (1 + 2**-7), dtype), rtol=0)


def test_sums_keep_dtypes_and_accept_numbers():
    value = {"f": np.float32(0.5), "i": 3, "p": 0.25, "c": jnp.array(1j, jnp.complex64), "b": jnp.ones(2, jnp.int8)}
    got = sum_over_batches(Stream(batches()), lambda batch: value)
    expected = jax.tree.map(lambda v: (3 * jnp.asarray(v)).astype(jnp.asarray(v).dtype), value)
    assert_close(got, expected)


def test_what_fn_returns_is_not_donated():
    kept = jnp.ones(3)
    for _ in range(2):
        assert_close(sum_over_batches(Stream(batches()), lambda batch: kept), jnp.full(3, 3.0))
    assert_close(kept, jnp.ones(3))


def test_sums_over_one_batch_are_arrays_of_their_own():
    kept = jnp.ones(3)
    got = sum_over_batches(Stream(batches(11)), lambda batch: kept)
    kept.delete()
    assert_close(got, jnp.ones(3))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_few_batches_are_alive_at_a_time(prefetch):
    """JAX would let a loop that waits for nothing run ahead of the device without bound."""
    values, unfinished = [], []

    def source():
        for made in range(12):
            unfinished.append(made + 1 - sum(value.is_ready() for value in values))
            yield np.eye(400), None

    def fn(batch):
        values.append(slow(batch.samples.input))
        return values[-1]

    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda i, x: jnp.tanh(x @ x), x))
    sum_over_batches(Stream(source, prefetch=prefetch), fn)
    assert max(unfinished) <= prefetch + 3


BAD_RESULTS = {
    "text": (lambda batch: {"a": "text"}, TypeError, r"fn's result\['a'\]: got str, expected an array of numbers"),
    "truth values": (lambda batch: batch.counted, TypeError, "fn's result: got dtype bool, expected numbers"),
    "other shapes": (lambda batch: jnp.ones(batch.start + 1), ValueError, r"fn's result: got shape \(5,\), expected \(1,\) as in the"),
    "broadcast": (lambda batch: jnp.ones((3, 1) if batch.start else (3, 3)), ValueError, r"fn's result: got shape \(3, 1\)"),
    "other structure": (lambda batch: batch.start * [jnp.ones(1)], ValueError, "fn's result: got tree structure"),
    "other dtypes": (lambda batch: jnp.ones(1, int if batch.start else float), TypeError, "fn's result: got dtype int64"),
}


@ways
@pytest.mark.parametrize("bad", BAD_RESULTS)
def test_bad_results(bad, prefetch):
    fn, error, message = BAD_RESULTS[bad]
    with pytest.raises(error, match=message):
        sum_over_batches(Stream(batches(), prefetch=prefetch), fn)


def test_bad_arguments_of_a_sum():
    with pytest.raises(TypeError, match="stream: got list, expected a Stream"):
        sum_over_batches(batches(), len)
    with pytest.raises(TypeError, match="fn: got str, expected a callable"):
        sum_over_batches(Stream(batches()), "gram")


# --- other libraries


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True}], ids=len)
def test_torch(options):
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    loader = partial(torch.utils.data.DataLoader, data, batch_size=4, **options)
    same_as_arrays(Stream(loader()))
    stream = Stream(loader(shuffle=True))
    list(stream)
    with pytest.raises(ValueError, match="Shuffling"):
        list(stream)


def test_torch_tensors_that_need_a_step_first():
    torch = pytest.importorskip("torch")
    x = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(TypeError, match=r"batch 0: data\['input'\]: got Tensor, expected an array: .*detach"):
        list(Stream([(x, None)]))


def test_tensorflow():
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices((X, Y))
    same_as_arrays(Stream(data.batch(4)))
    same_as_arrays(Stream(data.map(lambda x, y: {"input": x, "target": y}).batch(4).prefetch(2)))


def test_hugging_face():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input": X.tolist(), "target": Y.tolist()})
    same_as_arrays(Stream(lambda: data.iter(batch_size=4)))
    same_as_arrays(Stream(lambda: data.with_format("numpy").iter(batch_size=4)))
    with pytest.raises(TypeError, match="read only once"):
        Stream(data.iter(batch_size=4))


def test_grain():
    grain = pytest.importorskip("grain")
    data = grain.MapDataset.source(list(zip(X, Y, strict=True))).batch(4)
    same_as_arrays(Stream(data))
    same_as_arrays(Stream(data.to_iter_dataset()))


def test_no_other_library_is_imported():
    code = (
        "import sys, ggn_nb, numpy as np; list(ggn_nb.Stream([(np.ones(2), None)]));"
        "print({'torch', 'tensorflow', 'tqdm', 'datasets', 'grain'} & sys.modules.keys())"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
