"""The tools that other tests and notebooks rely on: strict comparison, the dense oracle, timings."""

import doctest
import time
from dataclasses import asdict
from typing import NamedTuple

import ggn_nb.tools.models
import ggn_nb.tools.testing
import ggn_nb.tools.timing
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import linear
from ggn_nb.tools.testing import assert_close, default_rtol, dense_from_mv, dense_ggn
from ggn_nb.tools.timing import (
    CASES,
    Timings,
    compare,
    compile_seconds,
    count_compiles,
    keep_measurement,
    measured_where,
    read_measurements,
    time_once,
    timing_case,
)

ONE, NAN = jnp.ones(3), float("nan")


class Pair(NamedTuple):
    left: object
    right: object


EQUAL = [
    (ONE, np.ones(3)),
    (1.0, 1.0),
    ({"a": [ONE, None]}, {"a": [ONE, None]}),
    (jnp.zeros((0, 3)), jnp.zeros((0, 3))),
    (jnp.array([jnp.inf, -jnp.inf]), jnp.array([jnp.inf, -jnp.inf])),
    (ONE, ONE + 1e-11),
    (ONE.astype(jnp.float32), ONE.astype(jnp.float32) + jnp.float32(5e-6)),
    (jnp.array([1.0, 1e-12]), jnp.array([1.0, 0.0])),  # relative to the largest entry of the leaf
    (jnp.arange(3), jnp.arange(3)),
]

DIFFERENT = {
    "value": (ONE, ONE + 1e-9, "differs by"),
    "one value": (ONE, ONE.at[1].set(2.0), r"at \(1,\)"),
    "sign": (ONE, -ONE, "differs by"),
    "nan": (jnp.array([NAN, 1.0]), jnp.ones(2), "nan"),
    "expected nan": (jnp.ones(2), jnp.array([NAN, 1.0]), "nan"),
    "inf": (jnp.array([jnp.inf]), jnp.array([1.0]), "inf"),
    "expected inf": (jnp.array([1.0]), jnp.array([jnp.inf]), "inf"),
    "other inf": (jnp.array([jnp.inf]), jnp.array([-jnp.inf]), "inf"),
    "shape": (ONE, jnp.ones(4), r"shape \(3,\), expected \(4,\)"),
    "broadcast": (jnp.ones((1, 3)), ONE, "shape"),
    "scalar": (1.0, ONE, "shape"),
    "dtype": (ONE.astype(jnp.float32), ONE, "dtype float32, expected float64"),
    "integer": (jnp.arange(3), jnp.arange(3.0), "dtype"),
    "off by one": (jnp.arange(3), jnp.arange(3) + 1, "0, expected 1"),
    "large integers": (jnp.array([2**60]), jnp.array([2**60 + 1]), "expected 1152921504606846977"),
    "key": ({"a": ONE}, {"b": ONE}, "tree structure"),
    "missing key": ({"a": ONE}, {"a": ONE, "b": ONE}, "tree structure"),
    "more keys": ({"a": ONE, "b": ONE}, {"a": ONE}, "tree structure"),
    "list": ([ONE], (ONE,), "tree structure"),
    "named": (Pair(ONE, ONE), (ONE, ONE), "tree structure"),
    "none": ([ONE, None], [ONE, ONE], "tree structure"),
    "small leaf": ({"a": ONE * 1e6, "b": ONE}, {"a": ONE * 1e6, "b": ONE * 1.001}, r"\['b'\]"),
    "empty": (jnp.zeros((0, 3)), jnp.zeros((0, 2)), "shape"),
}


@pytest.mark.parametrize(("a", "b"), EQUAL)
def test_assert_close_accepts(a, b):
    assert_close(a, b)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_assert_close_refuses(kind):
    a, b, message = DIFFERENT[kind]
    with pytest.raises(AssertionError, match=message):
        assert_close(a, b)


def test_assert_close_tolerances():
    assert_close(ONE, ONE + 0.1, atol=0.11)
    assert_close(ONE, ONE + 0.1, rtol=0.11)
    for tolerance in ({"atol": 0.09}, {"rtol": 0.09}):
        with pytest.raises(AssertionError):
            assert_close(ONE, ONE + 0.1, **tolerance)
    assert [default_rtol(d) for d in ("float64", "float32", "int32", bool)] == [1e-10, 1e-5, 0.0, 0.0]
    assert default_rtol(jnp.bfloat16) == 2e-2


def test_dense_oracle_by_hand():
    """Two samples of a model f = W x with the squared error: G = 2 Σ x xᵀ ⊗ I."""
    x = np.array([[1.0, 2.0], [0.0, -1.0]])
    data = {"input": jnp.asarray(x), "target": jnp.zeros((2, 3))}
    expected = np.kron(2 * x.T @ x, np.eye(3))
    squared = lambda f, y: (f - y) ** 2
    params = jnp.ones((2, 3))
    assert_close(dense_ggn(linear, params, data, squared), jnp.asarray(expected))
    assert_close(dense_ggn(linear, params, data, squared, vmap_over_data=False), jnp.asarray(expected))
    assert_close(dense_ggn(linear, params, data, squared, factor=0.5), jnp.asarray(expected / 2))


def test_dense_from_mv_is_not_transposed():
    A = jnp.arange(9.0).reshape(3, 3)
    like = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    assert_close(dense_from_mv(lambda v: unravel(A @ jax.flatten_util.ravel_pytree(v)[0]), like), A)


def test_compare_warms_up_and_interleaves():
    calls = []
    thunks = {name: lambda name=name: calls.append(name) or jnp.ones(2) for name in "abc"}
    timings = compare(thunks, rounds=8, warmup=2, reference="b")
    assert sorted(calls[:6]) == sorted("aabbcc")
    rounds = [tuple(calls[k : k + 3]) for k in range(6, len(calls), 3)]
    assert len(rounds) == 8
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(times) for name, times in timings.seconds.items()} == {"a": 8, "b": 8, "c": 8}
    assert timings.ratios["b"] == 1.0
    assert all(low <= timings.ratios[name] <= high for name, (low, high) in timings.quartiles.items())
    assert set("abc") <= set(str(timings))


def test_ratios_are_medians_of_rounds():
    timings = Timings({"a": [1.0, 2.0, 4.0], "b": [2.0, 6.0, 4.0]}, "a", measured_where("float32"))
    assert timings.ratios == {"a": 1.0, "b": 2.0}
    assert timings.medians == {"a": 2.0, "b": 4.0}


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_dtype_of_what_was_timed_is_recorded(dtype, tmp_path):
    """The default type is float64 here; what is recorded is the type of the reference's result."""
    timed = {"other": lambda: jnp.ones(2), "reference": lambda: {"a": jnp.ones(2, dtype), "n": jnp.arange(2)}}
    timings = compare(timed, rounds=1, reference="reference")
    assert timings.context["dtype"] == jnp.dtype(dtype).name
    assert f"dtype {jnp.dtype(dtype).name}" in str(timings)
    keep_measurement("case", asdict(timings), timings.context, tmp_path / "new")
    assert [Timings(**stored) for stored in read_measurements("case", tmp_path / "new")] == [timings]


def test_measurements_without_a_dtype_stay_readable():
    context = measured_where("float32")
    del context["dtype"]
    timings = Timings({"a": [1.0]}, "a", context | {"float_dtype": "float32"})
    assert "float_dtype float32" in str(timings)


BAD_RACES = [
    (dict(contestants={}), ValueError, "contestants"),
    (dict(contestants=[len]), TypeError, "contestants"),
    (dict(contestants={"a": 3}), TypeError, "contestants.*'a'"),
    (dict(contestants={1: list}), TypeError, "contestants"),
    (dict(contestants={"a": list}, reference="b"), ValueError, "reference.*'b'"),
    (dict(contestants={"a": list}, rounds=0), ValueError, "rounds.*0"),
    (dict(contestants={"a": list}, warmup=-1), ValueError, "warmup.*-1"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_RACES)
def test_compare_refuses(arguments, error, message):
    arguments = dict(arguments)
    with pytest.raises(error, match=message):
        compare(arguments.pop("contestants"), **arguments)


class Clock:
    """A clock that stands still until it is told to go on."""

    now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    return clock


class Late:
    """A result that takes a while after somebody asks."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def block_until_ready(self):
        self.clock.wait(self.seconds)


def test_time_once_waits_for_the_result(clock):
    assert time_once(lambda: Late(clock, 2.0)) == 2.0
    assert time_once(lambda: [Late(clock, 1.0), {"b": Late(clock, 3.0)}, None]) == 4.0
    assert time_once(lambda: clock.wait(5.0)) == 5.0


def test_compare_times_each_call_alone(clock):
    """Each round takes longer than the one before; the ratios do not see it."""
    calls = dict.fromkeys(("quick", "slow"), 0)

    def late(name, seconds):
        calls[name] += 1
        return Late(clock, seconds * calls[name])

    timings = compare({"quick": lambda: late("quick", 1.0), "slow": lambda: late("slow", 3.0)}, rounds=4, warmup=1)
    assert timings.seconds == {"quick": [2.0, 3.0, 4.0, 5.0], "slow": [6.0, 9.0, 12.0, 15.0]}
    assert timings.ratios == {"quick": 1.0, "slow": 3.0}


def test_compile_seconds_traces_and_does_not_run(clock):
    ran = []

    def traced(x):
        clock.wait(2.0)
        jax.debug.callback(lambda: ran.append(1))
        return jnp.tanh(x)

    assert [compile_seconds(traced, jnp.ones(3)) for _ in range(2)] == [2.0, 2.0]
    assert not ran


def test_count_compiles_counts():
    fn, x, y = jax.jit(lambda x: jnp.tanh(x) * 3.25), np.ones(3), np.ones(4)
    with count_compiles() as first:
        fn(x), fn(x), fn(y)
    with count_compiles() as second:
        fn(x)
    fn(np.ones(5))
    assert (first.count, second.count) == (2, 0)


@pytest.mark.parametrize("name", CASES)
def test_cases_are_in_float32_whatever_the_default(name):
    _, params, data = timing_case(name, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert len(data["input"]) == len(data["target"]) == 2


PUBLIC = {
    ggn_nb.tools.testing: {"assert_close", "default_rtol", "dense_from_mv", "dense_ggn"},
    ggn_nb.tools.models: {"cnn", "mlp", "num_params", "transformer"},
    ggn_nb.tools.timing: {
        "Timings",
        "collective_bytes",
        "compare",
        "compile_seconds",
        "count_compiles",
        "keep_measurement",
        "measured_where",
        "time_once",
        "timing_case",
        "timing_gradient",
    },
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_public_names_have_examples_that_run(module):
    assert set(module.__all__) == PUBLIC[module]
    examples = {test.name.rpartition(".")[2]: test for test in doctest.DocTestFinder().find(module) if test.examples}
    assert set(examples) >= PUBLIC[module]
    runner = doctest.DocTestRunner(verbose=False)
    for test in examples.values():
        test.globs = {}
        assert runner.run(test).failed == 0
