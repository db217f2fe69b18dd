"""Products on a subset of the parameters: principal submatrices, what is frozen, what is refused."""

import re
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import (
    POLICIES,
    baked_in,
    batched,
    data_case,
    dense_of,
    inner,
    linear,
    log_softmax_at,
    model_case,
    oracle_of,
    random_like,
    reference,
)
from ggn_nb import create_ggn_mv, create_ggn_mv_without_data, select_params
from ggn_nb.tools.testing import assert_close
from ggn_nb.tools.timing import count_compiles
from jax.flatten_util import ravel_pytree

policies = pytest.mark.parametrize("linearize", POLICIES)


@cache
def oracle(model, loss):
    """The dense matrix of all parameters."""
    case = model_case(model)
    return oracle_of(case.model_fn, case.params, data_case(model, loss), reference(loss))


def principal(matrix, params, chosen):
    """The rows and columns of the parameters that a tree of booleans, a prefix of `params`, says True to."""
    full = jax.tree.map(lambda flag, part: jax.tree.map(lambda p: np.full(np.shape(p), flag), part), chosen, params)
    kept = np.flatnonzero(np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(full)]))
    assert 0 < kept.size
    return matrix[kept][:, kept]


# --- principal submatrices

OUT = {"conv": False, "hidden": False, "out": True}
NORMS = dict.fromkeys(("qkv", "mix", "up", "down"), False) | {"norm1": True, "norm2": True}
HEAD = dict.fromkeys(("token", "position", "layers", "norm"), False) | {"head": True}
MIDDLE = HEAD | {"layers": True, "head": False}
WEIGHTS = {"weight": True, "bias": False}

# The model, three ways to say the same, the last of which is a tree of booleans written by hand.
SUBSETS = {
    "mlp, last layer": ("mlp", "^1/", lambda path, leaf: path.startswith("1"), [False, True]),
    "mlp, weights": ("mlp", re.compile("WEIGHT", re.IGNORECASE), lambda path, leaf: leaf.ndim == 2, [WEIGHTS, WEIGHTS]),
    "mlp, one array": ("mlp", "0/bias", lambda path, leaf: path == "0/bias", [{"weight": False, "bias": True}, False]),
    "mlp, everything": ("mlp", "", lambda path, leaf: True, True),
    "cnn, output": ("cnn", "^out", lambda path, leaf: "out" in path, OUT),
    "cnn, convolutions": ("cnn", "conv/[0-9]+/", lambda path, leaf: "conv" in path, OUT | {"conv": [True], "out": False}),
    "cnn, first and last": ("cnn", "^(conv|out)/", lambda path, leaf: "hidden" not in path, OUT | {"conv": True}),
    "transformer, head": ("transformer-scan", "head/", lambda path, leaf: path.startswith("head"), HEAD),
    "transformer, blocks": ("transformer-scan", "^layers", lambda path, leaf: leaf.shape[0] == 2, MIDDLE),
    "transformer, norms": (
        "transformer",
        "norm[12]?/",
        lambda path, leaf: "norm" in path,
        MIDDLE | {"layers": NORMS, "norm": True},
    ),
    "transformer, embedding": ("transformer", "^token$", lambda path, leaf: path == "token", HEAD | {"token": True, "head": False}),
}


@pytest.mark.combinations
@policies
@pytest.mark.parametrize("way", ["pattern", "predicate", "tree"])
@pytest.mark.parametrize("name", SUBSETS)
def test_principal_submatrix(name, way, linearize):
    model, *selects = SUBSETS[name]
    case = model_case(model)
    fn, selected = select_params(case.model_fn, case.params, dict(zip(("pattern", "predicate", "tree"), selects, strict=True))[way])
    G = create_ggn_mv(fn, selected, data_case(model, "cross_entropy"), "cross_entropy", linearize=linearize)
    assert_close(dense_of(G, selected), principal(oracle(model, "cross_entropy"), case.params, selects[2]), rtol=1e-9)


@pytest.mark.parametrize("flags", [f for f in product([False, True], repeat=4) if any(f)], ids=lambda f: "".join("01"[x] for x in f))
def test_every_subset_of_a_small_network(flags):
    case, data = model_case("mlp"), data_case("mlp", "coupled")
    chosen = jax.tree.unflatten(jax.tree.structure(case.params), flags)
    fn, selected = select_params(case.model_fn, case.params, chosen)
    assert [leaf is None for leaf in jax.tree.leaves(selected, is_leaf=lambda leaf: leaf is None)] == [not f for f in flags]
    G = create_ggn_mv(fn, selected, data, reference("coupled"))
    assert_close(dense_of(G, selected), principal(oracle("mlp", "coupled"), case.params, chosen))


def test_other_operators_take_what_comes_back():
    case, data = model_case("mlp"), data_case("mlp", "mse")
    expected = principal(oracle("mlp", "mse"), case.params, [False, True])
    fn, selected = select_params(case.model_fn, case.params, "^1/")
    unbound = create_ggn_mv_without_data(fn, selected, "mse", 2.0)
    assert_close(dense_of(unbound.bind(data), selected), 2 * expected)
    fn, selected = select_params(batched(case.model_fn), case.params, "^1/")
    assert_close(dense_of(create_ggn_mv(fn, selected, data, "mse", vmap_over_data=False), selected), expected)


def test_a_selection_of_a_selection_is_their_intersection():
    case, data = model_case("cnn"), data_case("cnn", "cross_entropy")
    fn, selected = select_params(*select_params(case.model_fn, case.params, "weight"), "^(hidden|out)/")
    G = create_ggn_mv(fn, selected, data, "cross_entropy")
    chosen = {"conv": False, "hidden": WEIGHTS, "out": WEIGHTS}
    assert_close(dense_of(G, selected), principal(oracle("cnn", "cross_entropy"), case.params, chosen), rtol=1e-9)


# --- structures


class Affine(NamedTuple):
    w: jax.Array
    b: jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["inner", "unused"], meta_fields=["power"])
@dataclass(frozen=True)
class Wrapped:
    inner: object
    unused: object
    power: int


RNG = np.random.default_rng(8)
TREE = {
    "pair": (Affine(RNG.standard_normal((3, 2)), RNG.standard_normal(2)), [RNG.standard_normal((2, 2)), None]),
    "wrapped": Wrapped({"scale": RNG.standard_normal(2)}, None, 3),
}
DATA = {"input": RNG.standard_normal((4, 3)), "target": np.array([0, 1, 1, 0])}
PATHS = ["pair/0/w", "pair/0/b", "pair/1/0", "wrapped/inner/scale"]
PICKED = {
    "named tuple": ("pair/0", {"pair": (True, False), "wrapped": False}),
    "field": ("/b$", {"pair": (Affine(False, True), False), "wrapped": False}),
    "list": ("pair/1", {"pair": (False, [True, None]), "wrapped": False}),
    "dataclass": ("inner", {"pair": False, "wrapped": True}),
    "inside a dataclass": ("scale", {"pair": False, "wrapped": Wrapped({"scale": True}, None, 3)}),
    "tuple": ("^pair", {"pair": True, "wrapped": False}),
}


def nested(input, params):
    """A model whose parameters come in containers of all kinds."""
    affine, (mix, nothing) = params["pair"]
    assert nothing is None
    assert isinstance(affine, Affine)
    return jnp.tanh(input @ affine.w + affine.b) ** params["wrapped"].power @ mix * params["wrapped"].inner["scale"]


@pytest.mark.parametrize("name", PICKED)
def test_containers(name):
    pattern, chosen = PICKED[name]
    params = jax.tree.map(jnp.asarray, TREE)
    expected = principal(oracle_of(nested, params, DATA, log_softmax_at), params, chosen)
    for select in (pattern, chosen):
        fn, selected = select_params(nested, params, select)
        assert isinstance(selected["pair"][0], Affine)
        assert selected["wrapped"].power == 3
        assert_close(dense_of(create_ggn_mv(fn, selected, DATA, "cross_entropy"), selected), expected)


def test_predicates_see_paths_and_leaves():
    seen = []
    select_params(nested, TREE, lambda path, leaf: bool(seen.append((path, leaf))) or path == "pair/0/w")
    assert [path for path, _ in seen] == PATHS
    assert all(leaf is expected for (_, leaf), expected in zip(seen, jax.tree.leaves(TREE), strict=True))


def test_a_single_array_is_a_tree_with_an_empty_path():
    w = jnp.asarray(RNG.standard_normal((3, 2)))
    for select in (True, "^$", lambda path, leaf: path == ""):
        fn, selected = select_params(linear, w, select)
        assert selected is w
        assert jax.tree.leaves(fn) == []
        assert_close(fn(input=DATA["input"], params=selected), linear(DATA["input"], w))


class CallableBooleans(NamedTuple):
    """A tree of booleans that can be called, as a module of a neural network library can."""

    w: bool
    b: bool

    def __call__(self, *args):
        raise AssertionError("taken for a predicate")


def test_a_tree_of_booleans_may_be_callable():
    _, selected = select_params(lambda input, params: input @ params.w + params.b, Affine(*TREE["pair"][0]), "w")
    assert selected.b is None
    params = CallableBooleans(*TREE["pair"][0])
    _, selected = select_params(lambda input, params: input @ params.w + params.b, params, CallableBooleans(False, True))
    assert selected.w is None
    assert selected.b is params.b


# --- what is frozen


def gathered(input, params):
    """A model with integers and a Python number among its parameters."""
    return params["scale"] * (input @ params["w"])[..., params["index"]]


@policies
def test_frozen_leaves_may_be_integers_and_numbers(linearize):
    params = {"w": jnp.asarray(RNG.standard_normal((3, 4))), "index": np.array([3, 0, 3]), "scale": 2}
    fn, selected = select_params(gathered, params, "w")
    assert selected == {"w": params["w"], "index": None, "scale": None}
    G = create_ggn_mv(fn, selected, DATA, "cross_entropy", linearize=linearize)
    alone = lambda input, params: 2 * (input @ params)[jnp.array([3, 0, 3])]
    assert_close(dense_of(G, selected), oracle_of(alone, params["w"], DATA, log_softmax_at))


def test_a_model_that_carries_arrays_keeps_them_as_leaves():
    scaled = jax.tree_util.Partial(lambda scale, input, params: scale * nested(input, params), jnp.asarray(3.0))
    fn, selected = select_params(scaled, TREE, "^pair")
    assert len(jax.tree.leaves(fn)) == 1 + 1
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(fn))
    x = DATA["input"][0]
    assert_close(fn(input=x, params=selected), 3 * nested(x, TREE))


def quadratic(params, vec, linearize="cached"):
    """v·Gv on the first layer of `nested`, as a function of all parameters."""
    fn, selected = select_params(nested, params, "pair/0")
    return inner(vec, create_ggn_mv(fn, selected, DATA, "cross_entropy", linearize=linearize)(vec))


@policies
def test_derivatives_with_respect_to_frozen_values(linearize):
    params = jax.tree.map(jnp.asarray, TREE)
    _, selected = select_params(nested, params, "pair/0")
    vec, direction = random_like(selected), random_like(params, 1)
    moved = lambda t: jax.tree.map(lambda p, d: p + t * d, params, direction)
    got = jax.grad(lambda t: quadratic(moved(t), vec, linearize))(0.0)
    assert abs(got) > 1e-3
    assert_close(got, (quadratic(moved(1e-5), vec) - quadratic(moved(-1e-5), vec)) / 2e-5, rtol=1e-7)


# --- compiled programs


def apply(G, vec):
    return G(vec)


def operator(k, linearize, select="pair/0"):
    params = jax.tree.map(lambda leaf: leaf * (1 + k / 10), TREE)
    fn, selected = select_params(nested, params, select)
    return create_ggn_mv(fn, selected, DATA, "cross_entropy", linearize=linearize)


@policies
def test_new_frozen_values_compile_nothing(linearize):
    run = jax.jit(apply)
    vec = random_like(select_params(nested, TREE, "pair/0")[1])
    both = lambda k, select: (run(operator(k, linearize, select), vec), operator(k, linearize, select)(vec))
    first = both(0, "pair/0")
    with count_compiles() as compiled:
        others = [
            both(1, "pair/0"),
            both(2, lambda path, leaf: "pair/0" in path),
            both(3, {"pair": (True, False), "wrapped": False}),
        ]
    assert compiled.count == 0
    for as_argument, called in others:
        assert_close(as_argument, called)
        assert inner(first[0], called) != inner(first[0], first[0])


@policies
def test_nothing_is_baked_into_programs(linearize):
    G = operator(0, linearize)
    vec = random_like(G.problem.params)
    assert baked_in(apply, G, vec) == []
    assert baked_in(lambda v: G(v), vec) != []  # captured
    frozen = ravel_pytree([TREE["pair"][1], TREE["wrapped"]])[0]
    assert_close(ravel_pytree(G.problem.model_fn)[0], frozen)


@policies
def test_selection_inside_jit(linearize):
    params = jax.tree.map(jnp.asarray, TREE)
    vec = random_like(select_params(nested, params, "pair/0")[1])
    assert_close(jax.jit(partial(quadratic, linearize=linearize))(params, vec), quadratic(params, vec))
    G = operator(0, linearize)
    assert_close(jax.jit(G)(vec), G(vec))
    vecs = jax.tree.map(lambda v: jnp.stack([v, -v]), vec)
    assert_close(jax.vmap(G)(vecs), jax.tree.map(lambda g: jnp.stack([g, -g]), G(vec)))


# --- what is no array


@partial(jax.tree_util.register_dataclass, data_fields=["w", "b", "act", "name", "power", "nothing"], meta_fields=["width"])
@dataclass(frozen=True)
class Layer:
    """A module whose leaves are arrays, functions, text and numbers, as in Equinox."""

    w: object
    b: object
    act: object
    name: object
    power: object
    nothing: object = None
    width: int = 2

    def __call__(self, x):
        assert (self.name, self.width, self.nothing) == ("layer", 2, None)
        return self.act(x @ self.w + self.b.astype(float)) ** range(5)[self.power]


def layer(k=0.0, **others):
    return Layer(**{"w": jnp.ones((3, 2)) / 2 + k, "b": jnp.arange(2) - 1, "act": jnp.tanh, "name": "layer", "power": 3} | others)


def call_layer(input, params):
    return params(input)


ACTIVATIONS = {"of JAX": lambda: jnp.tanh, "lambda": lambda: lambda x: jnp.tanh(x), "partial": lambda: partial(jax.nn.gelu, approximate=True)}


@pytest.mark.combinations
@policies
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_frozen_leaves_may_be_no_arrays(act, linearize):
    run = jax.jit(apply)
    for k, compiles in [(0.0, None), (0.5, 0)]:
        module = layer(k, act=ACTIVATIONS[act]())
        with count_compiles() as compiled:
            fn, selected = select_params(call_layer, module, "^w$")
            G = create_ggn_mv(fn, selected, DATA, "cross_entropy", linearize=linearize)
            products = G(selected), run(G, selected)
        assert compiles is None or compiled.count == compiles
        assert [leaf.dtype for leaf in jax.tree.leaves(fn)] == [module.b.dtype]
        alone = lambda input, params, b=module.b: ACTIVATIONS[act]()(input @ params + b.astype(float)) ** 3
        assert_close(dense_of(G, selected), oracle_of(alone, module.w, DATA, log_softmax_at))
        assert_close(*products)


def test_other_leaves_are_other_programs():
    structures = [jax.tree.structure(select_params(call_layer, layer(power=p), "^w$")[0]) for p in (2, 2.0, 3, 2)]
    assert len({*structures}) == 3
    assert structures[0] == structures[3]


def test_a_module_of_equinox():
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    fn, selected = select_params(lambda input, params: params(input), module, "layers/1/")
    arrays, static = eqx.partition(module, eqx.is_array)
    matrix = oracle_of(lambda input, params: eqx.combine(params, static)(input), arrays, DATA, log_softmax_at)
    size = sum(leaf.size for leaf in jax.tree.leaves(selected))
    assert_close(dense_of(create_ggn_mv(fn, selected, DATA, "cross_entropy"), selected), matrix[-size:, -size:])


# --- what is refused


class Tensor:
    """An array of another library."""

    def __array__(self):
        return np.ones(3)


W = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "n": jnp.arange(2), "name": "first"}
KINDS = "expected a regular expression, a predicate or a tree of booleans"
REFUSED = {
    "model": (dict(model_fn="model"), TypeError, "model_fn: got str, expected a callable"),
    "number": (dict(select=3), TypeError, f"select: got 3, {KINDS}"),
    "None": (dict(select=None), TypeError, f"select: got None, {KINDS}"),
    "list of paths": (dict(select=["w"]), TypeError, f"select: got ['w'], {KINDS}"),
    "numbers for booleans": (dict(select={"w": 1, "b": 0, "n": 0}), TypeError, KINDS),
    "array of booleans": (dict(select=np.ones(3, bool)), TypeError, KINDS),
    "bytes": (dict(select=re.compile(b"w")), TypeError, f"select: got re.compile(b'w'), {KINDS}"),
    "bad pattern": (dict(select="w["), ValueError, "select: got 'w[', expected a regular expression: unterminated"),
    "pattern of nothing": (dict(select="kernel"), ValueError, "got 'kernel', which selects nothing, expected some of the 3 leaves 'b', 'n', 'w'"),
    "predicate of nothing": (dict(select=lambda path, leaf: False), ValueError, "which selects nothing"),
    "tree of nothing": (dict(select={"w": False, "b": False, "n": False}), ValueError, "which selects nothing"),
    "no parameters": (dict(params=[]), ValueError, "which selects nothing, expected some of the 0 leaves"),
    "many leaves": (dict(params=list(range(9)), select="x"), ValueError, "the 9 leaves '0', '1', '2', '3', '4', …"),
    "answer of a number": (dict(select=lambda path, leaf: 1), TypeError, "select: got 1 from the predicate at 'b', expected True or False"),
    "answer of None": (dict(select=lambda path, leaf: None), TypeError, "select: got None from the predicate at 'b'"),
    "answer of an array": (dict(select=lambda path, leaf: np.asarray(leaf) > 0), TypeError, "from the predicate at 'b', expected True"),
    "missing key": (dict(select={"w": True}), ValueError, "select: got tree structure PyTreeDef({'w': *}), expected a prefix of that of params"),
    "another container": (dict(select=[True, False, False]), ValueError, "expected a prefix of that of params"),
    "deeper than the parameters": (dict(select={"w": [True], "b": False, "n": False}), ValueError, "expected a prefix of that of params"),
    "selected integers": (dict(select="n"), TypeError, "params['n']: got dtype int64, expected a real floating-point dtype"),
    "frozen list of text": (dict(params=W | {"name": np.array(["a"])}), TypeError, "params['name']: got dtype <U1, expected an array of numbers"),
    "frozen set": (dict(params=W | {"name": {1}}), TypeError, "params['name']: got set, expected an array of numbers, or a value that can be hashed"),
    "frozen tensor": (dict(params=W | {"name": Tensor()}), TypeError, "params['name']: got Tensor, expected an array of numbers"),
    "selected function": (dict(params=W | {"name": jnp.tanh}, select="name"), TypeError, "params['name']: got PjitFunction, expected an array"),
    "selected text": (dict(params=W, select="name"), TypeError, "params['name']: got str, expected an array"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    arguments, error, message = REFUSED[name]
    numeric = {key: leaf for key, leaf in W.items() if key != "name"}
    arguments = dict(model_fn=linear, params=numeric, select="w") | arguments
    with count_compiles() as compiled, pytest.raises(error, match=re.escape(message)):
        select_params(**arguments)
    assert compiled.count == 0


@pytest.mark.parametrize("wrong", [lambda params: params, lambda params: {"w": params["w"]}], ids=["all parameters", "missing None"])
def test_the_model_takes_the_selected_parameters_alone(wrong):
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    fn, selected = select_params(lambda input, params: input @ params["w"] + params["b"], params, "w")
    with pytest.raises(ValueError, match="params: got tree structure .* expected that of the selected parameters"):
        fn(input=DATA["input"][0], params=wrong(params))
    with pytest.raises(ValueError, match="vec: got tree structure"):
        create_ggn_mv(fn, selected, DATA, "cross_entropy")(wrong(params))
