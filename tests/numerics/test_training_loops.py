"""New functions, parameters and batches in each step: one program for equal functions, no growth, and never a wrong one."""

import copy
import dataclasses
import functools
import gc
import pickle
import types
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import Operator, create_ggn_mv, create_ggn_mv_without_data, register_operator, select_params, static_field
from ggn_nb.losses import CustomLoss
from ggn_nb.tools.functions import function_as_pytree, static_function
from ggn_nb.tools.programs import program
from ggn_nb.tools.testing import assert_close
from ggn_nb.tools.timing import count_compiles

RNG = np.random.default_rng(3)
X, Y = RNG.standard_normal((6, 3)), RNG.standard_normal(6)
DATA = {"input": jnp.asarray(X), "target": jnp.asarray(Y)}
PARAMS, VEC = jnp.ones(3), jnp.asarray(RNG.standard_normal(3))


def expected(shift, scale=1.0):
    """2 Σ x̃ x̃ᵀ v for the model scale · (x − shift)ᵀ θ and the squared error, in NumPy."""
    x = float(scale) * (X - np.asarray(shift, np.float64))
    return 2 * x.T @ (x @ np.asarray(VEC))


def structure(fn):
    return jax.tree.structure(function_as_pytree(fn, "fn"))


def product(fn, loss="mse", **options):
    return create_ggn_mv(fn, PARAMS, DATA, loss, **options)(VEC)


def assert_one_program(calls):
    """The first of `calls` compiles, and the others do not."""
    calls[0]()
    with count_compiles() as compiled:
        results = [call() for call in calls]
    assert compiled.count == 0
    return results


# --- equal functions are one program


class Statistics(NamedTuple):
    mean: object
    name: str


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean"], meta_fields=["power"])
@dataclasses.dataclass(frozen=True)
class Registered:
    mean: object
    power: int = 1

    def centre(self, input, params):
        return (input - self.mean) ** self.power @ params


def centred(mean, input, params):
    return (input - mean) @ params


def closure(mean):
    return lambda input, params: (input - mean) @ params


def nested(mean):
    def centre(x):
        return x - mean

    def model(input, params):
        def inner(x):
            return centre(x) @ params

        return inner(input)

    return model


def default(mean):
    def model(input, params, mean=mean, *, also=(mean,)):
        return (input - (mean + also[0]) / 2) @ params

    return model


def in_containers(mean):
    held = {"all": [mean, (mean, "text")], "options": {"eps": 0.0, "name": None}}
    return lambda input, params: (input - held["all"][1][0] + held["options"]["eps"]) @ params


def global_variable(mean):
    global MEAN
    MEAN = mean
    return lambda input, params: shifted_by_global(input) @ params


def shifted_by_global(x):
    return x - MEAN


MAKERS = {
    "closure": closure,
    "nested": nested,
    "default": default,
    "containers": in_containers,
    "global variable": global_variable,
    "named tuple": lambda mean: (lambda s: lambda input, params: (input - s.mean) @ params)(Statistics(mean, "x")),
    "partial": lambda mean: functools.partial(centred, mean),
    "partial of a keyword": lambda mean: functools.partial(lambda input, params, mean: centred(mean, input, params), mean=mean),
    "jit": lambda mean: jax.jit(closure(mean)),
    "jit of a partial": lambda mean: jax.jit(functools.partial(centred, mean)),
    "method of a pytree": lambda mean: Registered(mean).centre,
    "closure over a method": lambda mean: (lambda f: lambda input, params: f(input, params))(Registered(mean).centre),
    "checkpoint": lambda mean: jax.checkpoint(closure(mean)),
    "vmap": lambda mean: lambda input, params: jax.vmap(closure(mean), (0, None))(input[None], params)[0],
}


@pytest.mark.parametrize(("name", "kind"), [*((name, jnp.asarray) for name in MAKERS), ("closure", np.asarray), ("global variable", np.asarray)])
def test_a_new_function_in_each_step(name, kind):
    make, means = MAKERS[name], [kind(RNG.standard_normal(3)) for _ in range(3)]
    for mean, got in zip(means, assert_one_program([lambda m=m: product(make(m)) for m in means]), strict=True):
        assert_close(got, jnp.asarray(expected(mean)))


def test_number_of_arrays():
    counts = [len(jax.tree.leaves(function_as_pytree(make(jnp.ones(3)), "fn"))) for make in MAKERS.values()]
    assert counts == [1] * len(MAKERS)


HELD = {
    "key": (lambda key: lambda input, params: (input - jax.random.normal(key, (3,))) @ params, map(jax.random.key, range(3))),
    "number": (lambda number: lambda input, params: (input - number) @ params, map(np.float64, range(3))),
    "integers": (lambda at: lambda input, params: (input - jnp.arange(5.0)[at]) @ params, [np.array([k, 0, 1]) for k in range(3)]),
}
SHIFTS = {"key": lambda key: jax.random.normal(key, (3,)), "number": lambda x: np.full(3, x), "integers": lambda at: np.arange(5.0)[at]}


@pytest.mark.parametrize("name", HELD)
def test_numbers_integers_and_keys(name):
    make, values = HELD[name]
    values = list(values)
    for value, got in zip(values, assert_one_program([lambda v=v: product(make(v)) for v in values]), strict=True):
        assert_close(got, jnp.asarray(expected(SHIFTS[name](value))))


LOSSES = {
    "closure": lambda weight: lambda pred, target: weight * (pred - target) ** 2,
    "partial": lambda weight: functools.partial(lambda w, pred, target: w * (pred - target) ** 2, weight),
    "jit": lambda weight: jax.jit(lambda pred, target: weight * (pred - target) ** 2),
    "custom": lambda weight: CustomLoss(
        lambda pred, target: weight * (pred - target) ** 2,
        square_root=lambda u, pred, target: jnp.sqrt(2 * weight) * u,
        square_root_transpose=lambda v, pred, target: jnp.sqrt(2 * weight) * v,
        sampler=lambda key, pred: pred,
    ),
}


@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES)
def test_a_new_loss_in_each_step(make):
    weights = [jnp.asarray(float(k)) for k in (1, 2, 3)]
    calls = [lambda w=w: product(closure(jnp.zeros(3)), make(w)) for w in weights]
    for weight, got in zip(weights, assert_one_program(calls), strict=True):
        assert_close(got, jnp.asarray(float(weight) * expected(np.zeros(3))))


def test_a_new_hessian_product_in_each_step():
    hessian = lambda weight: lambda jv, pred, target: weight * jv
    calls = [lambda k=k: create_ggn_mv(closure(jnp.zeros(3)), PARAMS, DATA, loss_hessian_mv=hessian(jnp.asarray(k)))(VEC) for k in (2.0, 6.0)]
    once, thrice = assert_one_program(calls)
    assert_close(3 * once, thrice)


POLICIES = {
    "names": lambda: jax.checkpoint_policies.save_only_these_names("a"),
    "but names": lambda: jax.checkpoint_policies.save_anything_except_these_names("a"),
    "either": lambda: jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable, jax.checkpoint_policies.save_only_these_names("a", "b")
    ),
    "lambda": lambda: lambda primitive, *_, **__: primitive.name == "tanh",
}


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
def test_a_new_policy_in_each_step(make):
    for got in assert_one_program([lambda: product(closure(jnp.zeros(3)), linearize=make())] * 3):
        assert_close(got, jnp.asarray(expected(np.zeros(3))))


def test_other_policies_are_other_programs():
    names = jax.checkpoint_policies.save_only_these_names
    assert static_function(names("a"), "policy") == static_function(names("a"), "policy")
    assert static_function(names("a"), "policy") != static_function(names("b"), "policy")


def test_traced_arrays_in_a_function():
    @jax.jit
    def traced(mean):
        fn = closure(mean)
        assert len(jax.tree.leaves(function_as_pytree(fn, "fn"))) == 1
        return product(fn)

    mean = jnp.asarray(RNG.standard_normal(3))
    assert_close(traced(mean), jnp.asarray(expected(mean)))
    slope = jax.grad(lambda t: product(closure(mean + t)) @ VEC)(0.0)
    differ = (expected(np.asarray(mean) + 1e-6) - expected(np.asarray(mean) - 1e-6)) @ np.asarray(VEC) / 2e-6
    assert_close(slope, jnp.asarray(differ), rtol=1e-6)


def test_operators_are_arguments_and_results():
    run = jax.jit(lambda G, v: G(v))
    means = [jnp.asarray(RNG.standard_normal(3)) for _ in range(3)]
    make = lambda mean: create_ggn_mv(closure(mean), PARAMS, DATA, "mse", linearize="recomputed")
    for mean, got in zip(means, assert_one_program([lambda m=m: run(make(m), VEC) for m in means]), strict=True):
        assert_close(got, jnp.asarray(expected(mean)))
    assert_close(jax.jit(lambda: make(means[0]))()(VEC), jnp.asarray(expected(means[0])))


# --- functions that differ are different programs


class Plain:
    """Compared by identity, and may change."""

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, input, params):
        return self.scale * (input @ params)


class EqualByName(Plain):
    """What it says about equality leaves out what it computes."""

    def __eq__(self, other):
        return True

    def __hash__(self):
        return 0


@dataclasses.dataclass(frozen=True)
class Config:
    scale: object


class Namespace:
    scale = 1.0


def typed(value):
    """A model that computes by the type of what it closes over."""
    factor = lambda: {bool: 1.0, int: 2.0, float: 3.0, str: 4.0, tuple: 5.0}[type(value)] + (repr(value) == "-0.0")
    return lambda input, params: factor() * (input @ params)


def typed_inside(value):
    held = (value, (value,))
    return lambda input, params: (1.0 + isinstance(held[1][0], float)) * (input @ params)


PAIRS = {
    "1 and 1.0": (typed, 1, 1.0, 2.0, 3.0),
    "1 and True": (typed, 1, True, 2.0, 1.0),
    "0.0 and -0.0": (typed, 0.0, -0.0, 3.0, 4.0),
    "inside a tuple": (typed_inside, 1, 1.0, 1.0, 2.0),
    "text": (lambda name: lambda input, params: {"a": 1.0, "b": 2.0}[name] * (input @ params), "a", "b", 1.0, 2.0),
    "code": (lambda fn: lambda input, params: fn(input @ params), lambda x: 2.0 * x, lambda x: 3.0 * x, 2.0, 3.0),
    "frozen dataclass": (lambda c: lambda input, params: (1.0 + isinstance(c.scale, float)) * (input @ params), Config(1), Config(1.0), 1.0, 2.0),
    "dictionary": (lambda d: lambda input, params: d["scale"] * (input @ params), {"scale": 1.0}, {"scale": 2.0}, 1.0, 2.0),
    "set": (lambda s: lambda input, params: (1.0 + ("b" in s)) * (input @ params), {"a"}, {"b"}, 1.0, 2.0),
    "plain objects": (lambda o: lambda input, params: o(input, params), Plain(1.0), Plain(2.0), 1.0, 2.0),
    "equal by name": (lambda o: lambda input, params: o(input, params), EqualByName(1.0), EqualByName(2.0), 1.0, 2.0),
    "bound methods": (lambda o: o.__call__, Plain(1.0), Plain(2.0), 1.0, 2.0),
    "static field": (lambda power: Registered(jnp.zeros(3), power).centre, 1, 1.0, 1.0, 1.0),
}


@pytest.mark.parametrize("name", PAIRS)
def test_functions_that_differ(name):
    make, one, other, first, second = PAIRS[name]
    assert structure(make(one)) != structure(make(other))
    for value, scale in [(one, first), (other, second), (one, first)]:
        assert_close(product(make(value)), jnp.asarray(expected(np.zeros(3), scale)))


def test_nan_equals_itself():
    assert structure(typed(float("nan"))) == structure(typed(float("nan")))


def changing(how):
    """A function that makes a model with what is now in a place that changes, and one that changes it."""
    place = {"object": Plain(1.0), "list": [1.0], "dict": {"scale": 1.0}, "class": Namespace, "module": types.ModuleType("settings")}[how]
    if how == "list":
        return lambda: lambda input, params: place[0] * (input @ params), lambda value: place.__setitem__(0, value)
    if how == "dict":
        return lambda: lambda input, params: place["scale"] * (input @ params), lambda value: place.__setitem__("scale", value)
    return lambda: lambda input, params: place.scale * (input @ params), lambda value: setattr(place, "scale", value)


@pytest.mark.parametrize("how", ["object", "list", "dict", "class", "module"])
def test_what_changes_is_read_anew(how):
    make, change = changing(how)
    for scale in (1.0, 2.0, 1.0):
        change(scale)
        assert_close(product(make()), jnp.asarray(expected(np.zeros(3), scale)))


def test_global_variables_of_helpers_are_read_anew():
    variables = {"jnp": jnp}
    exec("def helper(x): return scale * x", variables)
    source = compile("model = lambda input, params: helper(input @ params)", "/tmp/notebook.py", "exec")
    structures = []
    for scale in (1.0, 2.0, 1.0):
        variables["scale"] = scale
        exec(source, variables)
        structures.append(structure(variables["model"]))
        assert_close(product(variables["model"]), jnp.asarray(expected(np.zeros(3), scale)))
    assert structures[0] == structures[2] != structures[1]


def test_what_is_taken_over_stays():
    mean, scales = np.zeros(3), {"by": 1.0}
    model = lambda input, params: scales["by"] * ((input - mean) @ params)
    G = create_ggn_mv(model, PARAMS, DATA, "mse", linearize="recomputed")
    mean[:], scales["by"] = 5.0, 7.0
    assert_close(G(VEC), jnp.asarray(expected(np.zeros(3))))
    assert_close(product(model), jnp.asarray(expected(np.full(3, 5.0), 7.0)))


def counted_in_a_list(calls):
    def model(input, params):
        calls.append(1)
        return input @ params

    return model


def test_functions_with_side_effects_stay_whole():
    calls, total = [], 0

    def counted(input, params):
        nonlocal total
        total += 1
        return input @ params

    product(counted_in_a_list(calls)), product(counted)
    assert len(calls) > 1
    assert total > 1


def test_recursive_functions():
    def make():
        def power(x, n):
            return x if n == 0 else 2.0 * power(x, n - 1)

        return lambda input, params: power(input @ params, 2)

    assert_close(product(make()), jnp.asarray(expected(np.zeros(3), 4.0)))


# --- arrays whose numbers are needed while a program is made

CONCRETE = {
    "numpy": lambda a: lambda input, params: np.sqrt(a) * (input @ params),
    "control flow": lambda a: lambda input, params: (2.0 if float(a) > 0 else 1.0) * (input @ params),
    "shape": lambda a: (lambda shape: lambda input, params: 2.0 * (input.reshape(shape) @ params)[0])(np.array([1, 3])),
    "mask": lambda a: (lambda mask: lambda input, params: 2.0 * (input[mask] @ params[mask]))(np.array([True] * 3)),
    "loop": lambda a: lambda input, params: sum((input @ params for _ in range(int(a) // 2)), jnp.zeros(())),
}


@pytest.mark.parametrize(("name", "kind"), [*((name, np.asarray) for name in CONCRETE), ("control flow", jnp.asarray), ("loop", jnp.asarray)])
def test_numbers_that_are_needed(name, kind):
    make, four = CONCRETE[name], kind(4.0)
    result = jnp.asarray(expected(np.zeros(3), 2.0))
    assert_close(product(make(four)), result)
    assert_close(jax.jit(lambda p: create_ggn_mv(make(four), p, DATA, "mse")(VEC))(PARAMS), result)
    assert_close(create_ggn_mv_without_data(make(four), PARAMS, "mse", 1.0)(VEC, DATA), result)


def test_the_error_of_a_model_is_its_own():
    mean = jnp.ones(3)
    with pytest.raises(jax.errors.TracerBoolConversionError) as raised:
        product(lambda input, params: (input - mean) @ params if params[0] > 0 else 0.0)
    assert raised.value.__context__ is None


# --- programs are forgotten


@register_operator
class Through(Operator):
    """A diagonal matrix whose entries a static function knows."""

    like: jax.Array
    fn: object = static_field()

    @property
    def structure(self):
        return jax.ShapeDtypeStruct(self.like.shape, self.like.dtype)

    def multiply(self, vec):
        return self.fn(vec)


class Held:
    """Holds an array, and is compared by identity."""

    def __init__(self, k):
        self.scale = jnp.full(1000, float(k))

    def __call__(self, x):
        return self.scale.mean() * x


def test_products_forget_functions():
    references, vec = [], jnp.ones(3)
    for k in range(80):
        held = Held(k)
        references.append(weakref.ref(held))
        assert_close(Through(vec, held)(vec), k * vec)
    del held
    gc.collect()
    assert [reference() is not None for reference in references] == [False] * 16 + [True] * 64


def test_a_program_in_use_is_not_forgotten():
    call = program(lambda f, x: f(x))
    steady, x = jax.tree_util.Partial(lambda x: 3.0 * x), jnp.ones(3)
    call(steady, x)
    for k in range(70):
        call(jax.tree_util.Partial(Held(k)), x)
        with count_compiles() as compiled:
            call(steady, x)
        assert compiled.count == 0


def test_arrays_of_closures_are_not_kept():
    size, step = 2**18, lambda k: product((lambda mean: lambda input, params: (input - mean[:3]) @ params)(jnp.full(size, k)))
    step(0.0)
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    for k in range(5):
        step(float(k))
    gc.collect()
    assert sum(array.nbytes for array in jax.live_arrays()) < before + 8 * size


def test_program_is_a_drop_in():
    @functools.partial(program, static_argnums=(0, 3), donate_argnums=(2,))
    def apply(name, tree, total, times):
        return {"name": getattr(jnp, name)(tree["x"]) * times + total}

    total = jnp.ones(3)
    assert_close(apply("negative", {"x": jnp.ones(3)}, total, 2), {"name": -jnp.ones(3)})
    assert total.is_deleted()
    assert_close(apply("negative", {"x": jnp.ones(2)}, jnp.ones(2), 3), {"name": -2 * jnp.ones(2)})
    assert apply.eval_shape("negative", {"x": jnp.ones(3)}, jnp.ones(3), 2)["name"].shape == (3,)
    assert_close(jax.grad(lambda x: apply("sin", {"x": x}, jnp.ones(3), 2)["name"].sum())(jnp.zeros(3)), 2 * jnp.ones(3))
    assert apply.__name__ == "apply"


# --- copies, files, devices


def of_module(input, params):
    return input @ params


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("fn", [of_module, functools.partial(centred, jnp.ones(3)), functools.partial(centred, np.ones(3))])
def test_copies(fn, again):
    apart = function_as_pytree(fn, "fn")
    assert jax.tree.structure(again(apart)) == jax.tree.structure(apart)
    model, selected = select_params(lambda_free, {"w": PARAMS, "act": of_module, "n": 2}, "w")
    assert jax.tree.structure(again(model)) == jax.tree.structure(model)
    assert_close(again(model)(input=DATA["input"], params=selected), 2 * DATA["input"] @ PARAMS)


def lambda_free(input, params):
    return params["n"] * params["act"](input, params["w"])


def test_lambdas_are_not_pickled():
    with pytest.raises((pickle.PicklingError, AttributeError), match="closure.<locals>.<lambda>"):
        pickle.dumps(function_as_pytree(closure(jnp.ones(3)), "fn"))
    apart = function_as_pytree(closure(jnp.ones(3)), "fn")
    assert copy.deepcopy(apart) is apart


def test_nothing_is_transferred_implicitly():
    fn, params = closure(np.ones(3)), {"w": np.ones(3), "b": np.ones(3), "n": 2}
    with jax.transfer_guard("disallow"):
        function_as_pytree(fn, "fn")
        select_params(of_module, params, "w")
