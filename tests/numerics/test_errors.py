"""Bad input: each error by its type and message, and before anything is compiled."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import POLICIES, linear
from ggn_nb import (
    Stream,
    create_fisher_mv,
    create_fisher_mv_without_data,
    create_ggn_mv,
    create_ggn_mv_without_data,
    create_hessian_mv,
    create_hessian_mv_without_data,
    create_loss_hessian_mv,
)
from ggn_nb.losses.binary_cross_entropy import binary_cross_entropy
from ggn_nb.losses.common import first_columns
from ggn_nb.losses.cross_entropy import cross_entropy
from ggn_nb.losses.gamma import gamma
from ggn_nb.losses.gaussian import gaussian
from ggn_nb.losses.mse import mse
from ggn_nb.tools.timing import count_compiles

W, X, Y = jnp.ones((3, 2)), np.ones((4, 3)), np.array([0, 1, 0, 1])
DATA = {"input": X, "target": Y}
ROW = jnp.ones(3)
identity = lambda jv, pred, target: jv


def bound(params=W, data=DATA, loss="cross_entropy", model_fn=linear, **options):
    return create_ggn_mv(model_fn, params, data, loss, **options)


def unbound(params=W, loss="cross_entropy", factor=1.0, model_fn=linear, **options):
    return create_ggn_mv_without_data(model_fn, params, loss, factor, **options)


@pytest.fixture(autouse=True)
def parameters_were_copied():
    """Arrays are copied by a program that is compiled once for each shape: here, not where errors are looked for."""
    jnp.array(W)
    mse().square_root_mv(np.ones(2), np.ones(2))


def refused(run, error, *parts):
    """`run` raises `error` with all `parts` in its message, in any case, and compiles nothing."""
    with count_compiles() as compiled, pytest.raises(error) as raised:
        run()
    assert type(raised.value) in (error if isinstance(error, tuple) else (error,))
    for part in parts:
        assert re.search(part, str(raised.value), re.IGNORECASE), f"no {part!r} in {raised.value}"
    assert compiled.count == 0


def table(*rows):
    """Parametrise by rows (id, …)."""
    return pytest.mark.parametrize("row", [row[1:] for row in rows], ids=[row[0] for row in rows])


class Unhashable:
    __hash__ = None

    def __call__(self, *args, **kwargs):
        return 0.0


# --- the loss

EITHER = re.escape("Either loss_fn or loss_hessian_mv must be provided.")
ONE = re.escape("Only one of loss_fn or loss_hessian_mv must be provided.")
NOT_NONE = re.escape("loss_fn cannot be None")


def test_no_loss():
    refused(lambda: create_loss_hessian_mv(None), ValueError, NOT_NONE)
    refused(lambda: bound(loss=None), ValueError, EITHER)
    refused(lambda: create_ggn_mv(linear, W, DATA), ValueError, EITHER)
    refused(lambda: unbound(loss=None), ValueError, NOT_NONE)


def test_two_losses():
    for loss in ("mse", lambda f, y: f):
        refused(lambda: bound(loss=loss, loss_hessian_mv=identity), ValueError, ONE)
        refused(lambda: unbound(loss=loss, loss_hessian_mv=identity), ValueError, ONE)


@pytest.mark.parametrize("loss", ["MSE", "hinge", "", 3, 1.5, b"mse", ["mse"], {"mse"}, ..., np.ones(2)], ids=repr)
@pytest.mark.parametrize("make", [create_loss_hessian_mv, lambda l: bound(loss=l), lambda l: unbound(loss=l)], ids=["loss", "bound", "unbound"])
def test_unknown_loss(loss, make):
    refused(lambda: make(loss), ValueError, "unsupported loss function provided", "loss_fn", re.escape(repr(loss)), "expected", "cross_entropy")


@pytest.mark.parametrize("name", ["model_fn", "loss_fn", "loss_hessian_mv"])
def test_functions_must_be_callable_and_hashable(name):
    base = {"model_fn": linear, "params": W, "data": DATA}
    extra = {} if name == "loss_hessian_mv" else {"loss_fn": "mse"}
    refused(lambda: create_ggn_mv(**(base | extra | {name: Unhashable()})), TypeError, name, "got an unhashable Unhashable", "expected")
    if name != "loss_fn":
        for wrong in ("mlp", 3, W):
            refused(lambda: create_ggn_mv(**(base | extra | {name: wrong})), TypeError, name, type(wrong).__name__, "expected a callable")


# --- the vector

TREE = {"w": W, "b": (ROW, None)}


def tree_model(input, params):
    return input @ params["w"] + jnp.sum(params["b"][0])


VECTORS = table(
    ("bare", W, ValueError, "tree structure"),
    ("none", None, ValueError, "tree structure"),
    ("missing", {"w": W}, ValueError, "tree structure"),
    ("list for tuple", {"w": W, "b": [ROW, None]}, ValueError, "tree structure"),
    ("extra leaf", {"w": W, "b": (ROW, ROW)}, ValueError, "tree structure"),
    ("transposed", {"w": W.T, "b": (ROW, None)}, ValueError, r"vec\['w'\]", r"\(2, 3\)", r"\(3, 2\)"),
    ("broadcastable", {"w": W, "b": (jnp.ones(1), None)}, ValueError, r"vec\['b'\]\[0\]", r"\(1,\)", r"\(3,\)"),
    ("scalar", {"w": W, "b": (1.0, None)}, ValueError, r"vec\['b'\]\[0\]", r"\(\)", r"\(3,\)"),
    ("batched", {"w": jnp.ones((1, 3, 2)), "b": (ROW, None)}, ValueError, r"vec\['w'\]", r"\(1, 3, 2\)"),
    ("single", {"w": W.astype(jnp.float32), "b": (ROW, None)}, TypeError, r"vec\['w'\]", "float32", "float64"),
    ("half", {"w": W, "b": (ROW.astype(jnp.bfloat16), None)}, TypeError, r"vec\['b'\]\[0\]", "bfloat16", "float64"),
    ("integer", {"w": W.astype(int), "b": (ROW, None)}, TypeError, r"vec\['w'\]", "int64", "float64"),
    ("numpy integer", {"w": W, "b": (np.ones(3, int), None)}, TypeError, r"vec\['b'\]\[0\]", "int64", "float64"),
    ("boolean", {"w": W, "b": (np.ones(3, bool), None)}, TypeError, r"vec\['b'\]\[0\]", "bool", "float64"),
    ("complex", {"w": W.astype(complex), "b": (ROW, None)}, TypeError, r"vec\['w'\]", "complex128", "float64"),
)


@VECTORS
@pytest.mark.parametrize("linearize", POLICIES)
def test_vector_that_does_not_match(row, linearize):
    vec, error, *parts = row
    G = bound(TREE, model_fn=tree_model, linearize=linearize)
    refused(lambda: G(vec), error, "vec", "got", "expected", "params", *parts)
    refused(lambda: jax.jit(G)(vec), error, "vec", "got", "expected", *parts)
    mv = unbound(TREE, model_fn=tree_model)
    refused(lambda: mv(vec, DATA), error, "vec", "got", "expected", "params", *parts)


# --- the parameters


@table(
    ("integer", {"w": W, "n": np.arange(3)}, r"params\['n'\]", "int64", "floating"),
    ("python integer", {"w": W, "n": 3}, r"params\['n'\]", "int", "floating"),
    ("boolean", {"w": W, "n": True}, r"params\['n'\]", "bool", "floating"),
    ("complex", (np.ones(2, complex),), r"params\[0\]", "complex128", "floating"),
    ("text", {"w": W, "name": "net"}, r"params\['name'\]", "str", "array"),
    ("key", {"w": W, "key": jax.random.key(0)}, r"params\['key'\]", "key", "floating"),
)
def test_parameters_must_be_floating(row):
    params, *parts = row
    for make in (bound, unbound):
        refused(lambda: make(params), TypeError, "params", "got", "expected", *parts)


# --- the data


@table(
    ("none", None, TypeError, "NoneType", "mapping"),
    ("array", X, TypeError, "ndarray", "mapping"),
    ("pair", (X, Y), TypeError, "tuple", "mapping"),
    ("empty", {}, ValueError, "missing.*input.*target"),
    ("no target", {"input": X}, ValueError, "missing.*target"),
    ("no input", {"target": Y, "inputs": X}, ValueError, "inputs", "missing.*input"),
)
@pytest.mark.parametrize("vmap_over_data", [True, False], ids=["vmap", "whole"])
def test_data_without_the_needed_keys(row, vmap_over_data):
    data, error, *parts = row
    refused(lambda: bound(data=data, vmap_over_data=vmap_over_data), error, "data", "got", "'input' and 'target'", *parts)
    mv = unbound(vmap_over_data=vmap_over_data)
    refused(lambda: mv(W, data), error, "data", "got", "'input' and 'target'", *parts)


BATCHES = table(
    ("target", {"input": X, "target": Y[:3]}, r"data\['input'\] has 4", r"data\['target'\] has 3", "expected"),
    ("leaves", {"input": {"a": X, "b": X[:1]}, "target": Y}, r"\['a'\] has 4", r"\['b'\] has 1", "expected"),
    ("scalar", {"input": X, "target": 1.0}, r"data\['target'\]", "got a scalar", "expected a leading batch axis"),
    ("scalar leaf", {"input": {"x": X, "n": np.int32(3)}, "target": Y}, r"data\['input'\]\['n'\]", "scalar", "expected"),
    ("empty", {"input": X[:0], "target": Y[:0]}, "empty batch", "expected at least one sample"),
    ("no arrays", {"input": None, "target": None}, "no arrays", "expected"),
)


@BATCHES
def test_batch_sizes(row):
    data, *parts = row
    refused(lambda: bound(data=data), ValueError, "data", "got", *parts)
    refused(lambda: bound(data=data, num_curv_samples=4), ValueError, "data", "got", *parts)
    refused(lambda: unbound()(W, data), ValueError, "data", "got", *parts)


@pytest.mark.parametrize("data", [{"input": X, "target": Y[:3]}, {"input": X[:0], "target": Y[:0]}, {"input": None, "target": None}])
def test_batches_that_are_seen_whole(data):
    """Their parts may differ in length, but prediction and target fit, and there is something."""
    refused(lambda: bound(data=data, vmap_over_data=False), ValueError, "got", "expected")


# --- the numbers of samples and the factor


@pytest.mark.parametrize("name", ["num_curv_samples", "num_total_samples"])
@pytest.mark.parametrize("number", [0, -1, -0.5, 0.0, np.int32(0), np.array(-3.0)], ids=repr)
def test_numbers_of_samples_are_positive(name, number):
    refused(lambda: bound(**{name: number}), ValueError, name, re.escape(f"got {number}"), "expected a number greater than 0")


def test_numbers_of_samples_that_are_jax_arrays_are_positive():
    with pytest.raises(ValueError, match="num_curv_samples: got 0, expected a number greater than 0"):
        bound(num_curv_samples=jnp.array(0))


@pytest.mark.parametrize("name", ["num_curv_samples", "num_total_samples", "factor"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -np.inf], ids=repr)
def test_numbers_are_finite(name, number):
    make = unbound if name == "factor" else bound
    refused(lambda: make(**{name: number}), ValueError, name, f"got {number}", "expected")


@pytest.mark.parametrize("name", ["num_curv_samples", "num_total_samples", "factor"])
@pytest.mark.parametrize("number", ["3", True, 1j, [2], np.array([3]), jnp.ones(2), {"n": 3}, ...], ids=repr)
def test_numbers_are_single_real_numbers(name, number):
    make = unbound if name == "factor" else bound
    refused(lambda: make(**{name: number}), TypeError, name, "got", "expected")


def test_factor_has_no_default():
    with pytest.raises(TypeError, match="factor"):
        create_ggn_mv_without_data(linear, W, "mse")


# --- the prediction and the loss

AS_DICT = lambda input, params: {"logits": input @ params}
AS_TUPLE = lambda input, params: (input @ params, None)
AS_NOTHING = lambda input, params: None
AS_NUMBER = lambda input, params: jnp.sum(input @ params)
AS_INTEGER = lambda input, params: jnp.round(input @ params).astype(int)
AS_COMPLEX = lambda input, params: (input @ params).astype(complex)
NO_CLASS = lambda input, params: (input @ params)[:0]

MISFITS = table(
    *[(f"dict, {loss}", AS_DICT, loss, TypeError, "pred", "dict") for loss in ("mse", "cross_entropy", "binary_cross_entropy", "none")],
    ("tuple", AS_TUPLE, "mse", TypeError, "pred", "tuple"),
    ("nothing", AS_NOTHING, "cross_entropy", TypeError, "pred", "NoneType"),
    ("number", AS_NUMBER, "cross_entropy", ValueError, "pred", r"\(\)", "class"),
    ("no class", NO_CLASS, "cross_entropy", ValueError, "pred", r"\(0,\)", "class"),
    *[(f"integer, {loss}", AS_INTEGER, loss, TypeError, "pred", "int64", "floating") for loss in ("mse", "cross_entropy", "binary_cross_entropy", "none")],
    ("complex", AS_COMPLEX, "mse", TypeError, "pred", "complex128", "floating"),
    ("integer, custom", AS_INTEGER, lambda f, y: f**2.0, TypeError, "pred", "int64", "floating"),
    ("integer loss", linear, lambda f, y: jnp.argmax(f), TypeError, "loss_fn", "int64", "floating"),
    ("complex loss", linear, lambda f, y: f.astype(complex), TypeError, "loss_fn", "complex128", "floating"),
    ("loss of two", linear, lambda f, y: (f, f), TypeError, "loss_fn", "tuple", "array"),
    ("loss of nothing", linear, lambda f, y: None, TypeError, "loss_fn", "NoneType", "array"),
)


@MISFITS
@pytest.mark.parametrize("linearize", POLICIES)
def test_prediction_that_does_not_fit_the_loss(row, linearize):
    model_fn, loss, error, *parts = row
    refused(lambda: bound(model_fn=model_fn, loss=loss, linearize=linearize), error, "expected", *parts)


@MISFITS
def test_prediction_that_does_not_fit_the_loss_without_data(row):
    model_fn, loss, error, *parts = row
    mv = unbound(model_fn=model_fn, loss=loss)
    refused(lambda: jax.eval_shape(mv, W, DATA), error, "expected", *parts)


def test_prediction_that_does_not_fit_is_refused_before_the_model_runs():
    mv = unbound(model_fn=AS_DICT)
    refused(lambda: mv(W, DATA), TypeError, "pred", "dict")


@table(
    ("shape", lambda jv, pred, target: jv[:1], ValueError, "shape"),
    ("tree", lambda jv, pred, target: (jv,), ValueError, "tree structure"),
    ("nothing", lambda jv, pred, target: None, ValueError, "tree structure"),
    ("dtype", lambda jv, pred, target: jv.astype(jnp.float32), TypeError, "float32", "float64"),
)
def test_given_hessian_product_that_does_not_fit_the_prediction(row):
    mv, error, *parts = row
    refused(lambda: bound(loss=None, loss_hessian_mv=mv), error, "loss_hessian_mv", "got", "expected", *parts)
    without = unbound(loss=None, loss_hessian_mv=mv)
    refused(lambda: jax.eval_shape(without, W, DATA), error, "loss_hessian_mv", "got", "expected", *parts)


def test_policy_must_be_known():
    for policy in ("never", True, ["cached"]):
        for make in (bound, unbound):
            refused(lambda: make(linearize=policy), ValueError, "linearize", re.escape(repr(policy)), "'cached', 'rematerialized', 'factored', 'recomputed'")


@pytest.mark.parametrize("make", [bound, unbound], ids=["bound", "unbound"])
def test_batch_size_must_be_a_number_of_samples(make):
    for size, error in ((0, ValueError), (-3, ValueError), (2.0, TypeError), ("2", TypeError), (True, TypeError)):
        refused(lambda: make(batch_size=size), error, "batch_size", re.escape(repr(size)))


# --- the losses alone

ANY = pytest.mark.parametrize("loss", ["mse", "cross_entropy", "binary_cross_entropy", "none", lambda f, y: f**2], ids=["mse", "cross_entropy", "binary_cross_entropy", "none", "custom"])
OPERANDS = table(
    ("shape", jnp.ones(2), ROW, ValueError, "jv", r"\(2,\)", r"\(3,\)"),
    ("broadcastable", jnp.ones(1), ROW, ValueError, "jv", r"\(1,\)", r"\(3,\)"),
    ("more axes", jnp.ones((3, 3)), ROW, ValueError, "jv", r"\(3, 3\)", r"\(3,\)"),
    ("integer vector", np.arange(3), ROW, TypeError, "jv", "int64"),
    ("integer prediction", ROW, np.arange(3), TypeError, "pred", "int64"),
)


@ANY
@OPERANDS
def test_operands_of_a_hessian_product(loss, row):
    jv, pred, error, *parts = row
    refused(lambda: create_loss_hessian_mv(loss)(jv, pred), error, "got", "expected", *parts)


@pytest.mark.parametrize("loss", [mse(), cross_entropy(), binary_cross_entropy()], ids=lambda l: l.name)
def test_operands_of_a_factor(loss):
    for S, size in ((loss.square_root_mv, loss.column_structure(ROW).shape[0]), (loss.square_root_transpose_mv, 3)):
        refused(lambda: S(np.ones(5 - size), ROW), ValueError, rf"got shape \({5 - size},\)", rf"expected \({size},\)", "pred")
        refused(lambda: S({"a": ROW}, ROW), TypeError, "got dict", "expected")
        refused(lambda: S(np.arange(3), ROW), TypeError, "int64", "expected")


@pytest.mark.parametrize("target", [np.zeros(3, int), np.zeros((2, 1), int), 0, np.zeros(2)], ids=repr)
def test_labels_of_the_cross_entropy(target):
    with pytest.raises((ValueError, TypeError), match=r"target: got .*expected integer labels of shape \(2,\), or distributions of shape \(2, 3\)"):
        cross_entropy().value(jnp.ones((2, 3)), target)


# Numbers in a target: known outside of jit, where they are looked at wherever they are read.
NUMBERS = table(
    *[(f"label {label}", cross_entropy(), np.array([0, label]), "labels from 0 to C − 1") for label in (3, -1, 99)],
    ("no distribution", cross_entropy(), np.zeros((2, 3), int), "sum to 1"),
    ("sum of two", cross_entropy(), np.full((2, 3), 2 / 3), "sum to 1"),
    ("no number", cross_entropy(), np.full((2, 3), np.nan), "sum to 1"),
    ("negative mass", cross_entropy(), np.array([[2.0, -1.0, 0.0], [0.0, 1.0, 0.0]]), "numbers ≥ 0"),
    *[(f"probability {y}", binary_cross_entropy(pos_weight=2.0), np.full((2, 3), y), r"labels in \[0, 1\]") for y in (1.5, -0.5, np.nan)],
)


@NUMBERS
def test_numbers_in_the_target_of_a_loss(row):
    loss, target, *parts = row
    f = jnp.ones((2, 3))
    for call in (loss.value, loss.gradient, lambda f, y: loss.hessian_mv(f, f, y), lambda f, y: loss.square_root_mv(first_columns(loss, f, f), f, y)):
        with pytest.raises(ValueError, match="target: got values that") as raised:
            call(f, target)
        for part in parts:
            assert re.search(part, str(raised.value))


@NUMBERS
@pytest.mark.parametrize("linearize", POLICIES)
def test_numbers_in_the_target_of_an_operator(row, linearize):
    loss, target, *parts = row
    with pytest.raises(ValueError, match="target: got values that") as raised:
        create_ggn_mv(linear, jnp.ones((3, 3)), {"input": X[:2], "target": target}, loss, linearize=linearize)
    for part in parts:
        assert re.search(part, str(raised.value))


@table(
    ("negative", {"weight": -np.ones(4)}, ValueError, "weight: got a negative or non-finite number"),
    ("not finite", {"weight": np.full(4, np.nan)}, ValueError, "weight: got a negative or non-finite number"),
    ("truth values", {"weight": np.ones(4, bool)}, TypeError, "weight: got dtype bool"),
    ("numbers as a mask", {"mask": np.ones(4)}, TypeError, "mask: got dtype float64"),
    ("too few", {"weight": np.ones(3)}, ValueError, "different batch sizes"),
    ("too many axes", {"weight": np.ones((4, 3))}, ValueError, "weight: got shape"),
    ("another key", {"weights": np.ones(4)}, ValueError, "unknown"),
)
def test_weights_and_masks_of_the_data(row):
    more, error, message = row
    for run in (lambda: bound(data=DATA | more), lambda: unbound()(W, DATA | more)):
        with pytest.raises(error, match=message):
            run()


def test_a_mean_needs_something_that_counts():
    for more in ({"weight": np.zeros(4)}, {"mask": np.zeros(4, bool)}):
        with pytest.raises(ValueError, match="weight: got nothing that counts"):
            bound(data=DATA | more, reduction="mean")
    with pytest.raises(ValueError, match="reduction: got 'max', expected 'sum' or 'mean'"):
        bound(reduction="max")


# --- what is of another kind altogether


class SomeClass:
    """No loss."""


KINDS = table(
    ("a class as a loss", lambda: bound(loss=SomeClass), ValueError, "loss_fn=<class"),
    ("a class as a product", lambda: create_ggn_mv(linear, W, DATA, loss_hessian_mv=SomeClass), TypeError, "loss_hessian_mv: got the class SomeClass"),
    ("an ignored label too large", lambda: cross_entropy(ignore_index=2**70), ValueError, f"ignore_index: got {2**70}, expected a number that int64 holds"),
    ("a target of text", lambda: mse().value(np.ones(2), "ab"), TypeError, "target: got dtype <U2, expected an array of numbers"),
    ("a ragged target", lambda: mse().value(np.ones(2), [1.0, [2.0]]), TypeError, r"target: got \[1.0, \[2.0\]\], expected an array of numbers"),
    ("smoothing by a truth value", lambda: cross_entropy(label_smoothing=True), TypeError, "label_smoothing: got dtype bool, expected real numbers"),
    ("a scale that is a truth value", lambda: gaussian(scale=np.array([True])), TypeError, "scale: got dtype bool, expected real numbers"),
    ("a curvature that is an array", lambda: gamma(curvature=np.array(["hessian"] * 2)), ValueError, "curvature: got array"),
    ("a check that is text", lambda: Stream([DATA], check="no"), TypeError, "check: got 'no', expected True or False"),
    ("a progress that is a number", lambda: Stream([DATA], progress=1), TypeError, "progress: got 1, expected True or False"),
    ("a prefetch that is a truth value", lambda: Stream([DATA], prefetch=True), ValueError, "prefetch: got True, expected an integer"),
)


@KINDS
def test_other_kinds(row):
    refused(*row)


CREATE = {create: (linear, W, DATA, "cross_entropy") for create in (create_ggn_mv, create_hessian_mv, create_fisher_mv)}
CREATE |= {create: (linear, W, "cross_entropy", 1.0) for create in (create_ggn_mv_without_data, create_hessian_mv_without_data, create_fisher_mv_without_data)}


@pytest.mark.parametrize("create", CREATE, ids=lambda create: create.__name__)
def test_unknown_keywords_name_the_function_that_was_called(create):
    refused(lambda: create(*CREATE[create], bach_size=3), TypeError, rf"^{create.__name__}: got the keywords \['bach_size'\], expected some of .*'batch_size'")


def test_a_model_without_its_parameters():
    with pytest.raises(KeyError) as raised: bound({}, model_fn=lambda input, params: input @ params["w"])
    assert "params: got {}, without arrays" in raised.value.__notes__


def test_one_of_several_words_is_no_array_of_them():
    words = np.array(["sum", "mean"])
    refused(lambda: mse().total(ROW, ROW, reduction=words), ValueError, r"reduction: got array\(\['sum', 'mean'\]", "expected 'sum' or 'mean'")
