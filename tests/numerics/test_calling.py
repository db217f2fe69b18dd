"""How a model is called, and what is said to whoever hands in another form of it, or a prediction that is none."""

from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.tree_util import Partial

from ggn_nb import create_fisher_mv, create_ggn_mv, create_ggn_mv_without_data, create_hessian_mv, select_params
from ggn_nb.tools.testing import assert_close

X, W = random.normal(random.key(0), (5, 3)), random.normal(random.key(1), (3, 2))
DATA = {"input": X, "target": jnp.zeros((5, 2))}
WANT = 2 * X.T @ X @ W


def linear(input, params): return input @ params
def params_first(params, x): return x @ params
def input_first(x, theta): return x @ theta


@wraps(params_first)
def turned(input, params): return params_first(params, input)


@wraps(params_first)
def renamed(*args, **both): return params_first(both["params"], both["input"])


class Model:
    def forward(self, input, params): return input @ params
    __call__ = forward


RIGHT = {
    "function": linear, "jitted": jax.jit(linear), "partial": partial(lambda c, input, params: c * linear(input, params), 1.0),
    "partial of arrays": Partial(lambda c, input, params: c * linear(input, params), jnp.ones(())), "object": Model(), "method": Model().forward,
    "more keywords": lambda input, params, train=False: linear(input, params), "keywords alone": lambda *, params, input: linear(input, params),
    "any keywords": lambda **both: linear(**both), "checkpoint": jax.checkpoint(linear), "jitted partial": jax.jit(partial(linear)),
    "wrapper of another": turned, "partial wrapper": partial(turned), "jitted wrapper": jax.jit(turned), "wrapper of any": renamed,
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_can_be_called_is_called(name):
    """Also where a wrapper shows the signature of what it wraps, and takes another."""
    assert_close(create_ggn_mv(RIGHT[name], W, DATA, "mse")(W), WANT)
    assert_close(create_ggn_mv_without_data(RIGHT[name], W, "mse", 1.0)(W, DATA), WANT)
    model_fn, params = select_params(RIGHT[name], W, ".*")
    assert_close(create_ggn_mv(model_fn, params, DATA, "mse")(W), WANT)


def of_library(module):
    "An object of a class that is derived from one in `module`, called as the libraries do"
    base = type("Base", (), {"__module__": module, "apply": lambda self, variables, *args, rngs=None, **kwargs: args})
    return type("Network", (base,), {"__module__": "research", "__call__": lambda self, x: x @ W})()


class Torch:
    __module__ = "torch.nn.modules.module"
    def __call__(self, *args, **kwargs): raise AssertionError("it was called")


Transformed = type("Transformed", (tuple,), {"__module__": "haiku._src.transform"})
OTHER_FORMS = {
    "params first": (params_first, r"got params_first\(params, x\), expected", "lambda input, params: params_first(params, input)"),
    "input first": (input_first, r"got input_first\(x, theta\)", "lambda input, params: input_first(input, params)"),
    "lambda": (lambda p, x: x @ p, r"got <lambda>\(p, x\)", "lambda input, params: f(params, input)"),
    "key": (lambda params, rng, x: x, r"got <lambda>\(params, rng, x\)", "lambda input, params: f(params, None, input)"),
    "closed over": (lambda input: input @ W, r"got <lambda>\(input\)", "a function of both"),
    "empty partial": (partial(params_first), r"got params_first\(params, x\)", "lambda input, params: params_first(params, input)"),
    "partial": (partial(lambda c, p, x: c * x @ p, 2.0), r"got partial\(p, x\)", "lambda input, params: f(params, input)"),
    "jitted": (jax.jit(params_first), "got params_first", "params_first(params, input)"),
    "equinox": (of_library("equinox._module"), r"got Network\(x\) of equinox", "lambda input, params: equinox.combine(params, static)(input)"),
    "linen": (of_library("flax.linen.module"), r"got Network\(x\) of flax.linen", "lambda input, params: module.apply({'params': params}, input)"),
    "apply": (of_library("flax.linen.module").apply, r"got .*of flax.linen", "module.apply({'params': params}, input)"),
    "nnx": (of_library("flax.nnx.module"), r"got Network\(x\) of flax.nnx", "lambda input, params: nnx.merge(graph, params, rest)(input)"),
    "haiku": (Transformed(), "got Transformed of haiku", "lambda input, params: model.apply(params, None, input)"),
    "torch": (Torch(), "got Torch.* of torch", "as a function of JAX arrays"),
}


@pytest.mark.parametrize("name", OTHER_FORMS)
def test_another_form_is_told_the_line_to_write(name):
    model_fn, got, remedy = OTHER_FORMS[name]
    for make in (lambda: create_ggn_mv(model_fn, W, DATA, "mse"), lambda: create_hessian_mv(model_fn, W, DATA, "mse"),
                 lambda: create_ggn_mv_without_data(model_fn, W, "mse", 1.0)(W, DATA), lambda: create_ggn_mv(*select_params(model_fn, W, ".*"), DATA, "mse")):
        with pytest.raises(TypeError, match=f"^model_fn: {got}.*called as model_fn\\(input=x, params=params\\)") as error: make()
        assert str(error.value).endswith(remedy) or remedy in str(error.value)


@pytest.mark.parametrize("name", ["params first", "lambda", "equinox", "linen", "apply", "nnx", "haiku", "torch"])
def test_it_is_told_before_anything_is_traced(name):
    """Without data too, and by one exception alone."""
    with pytest.raises(TypeError, match="^model_fn: got") as error: create_ggn_mv_without_data(OTHER_FORMS[name][0], W, "mse", 1.0)
    assert error.value.__cause__ is error.value.__context__ is None


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint, partial])
def test_errors_of_the_model_itself_pass(wrap):
    def faulty(input, params): return params_first(input=input, params=params)
    with pytest.raises(TypeError, match="params_first.*unexpected keyword argument 'input'"): create_ggn_mv(wrap(faulty), W, DATA, "mse")


@pytest.mark.parametrize("wrap", [partial(jax.vmap, in_axes=(None, 0)), jax.checkpoint])
def test_wrappers_of_another_form_are_refused_too(wrap):
    """By the line to write where the signature is still known when it is called, and by JAX's own words otherwise."""
    with pytest.raises((TypeError, ValueError), match="model_fn: got params_first|'input'|len\\(args\\)=0"): create_ggn_mv(wrap(params_first), W, DATA, "mse")


# State beside the parameters


def batch_norm(input, params):
    "With means that were found in training"
    return (input - params["batch_stats"]["mean"]) @ params["params"]


@pytest.mark.parametrize("name", ["batch_stats", "cache", "intermediates"])
def test_state_is_not_differentiated(name):
    params = {"params": W, name: {"mean": jnp.ones(3)}}
    for make in (lambda: create_ggn_mv(batch_norm, params, DATA, "mse"), lambda: select_params(batch_norm, params, "")):
        with pytest.raises(ValueError, match=rf"^params: got \['{name}'\] beside 'params'.*select_params\(model_fn, variables, '\^params/'\)"): make()


def test_state_is_held_fixed_as_the_message_says():
    variables = {"params": {"w": W}, "batch_stats": {"mean": jnp.ones(3), "count": jnp.array(7)}}
    model = lambda input, params: (input - params["batch_stats"]["mean"]) @ params["params"]["w"]
    model_fn, params = select_params(model, variables, "^params/")
    centred = X - 1
    assert_close(create_ggn_mv(model_fn, params, DATA, "mse")(params)["params"]["w"], 2 * centred.T @ centred @ W)


def test_other_names_beside_params_are_parameters():
    model = lambda input, params: params["scale"] * (input @ params["params"])
    assert create_ggn_mv(model, {"params": W, "scale": jnp.ones(())}, DATA, "mse").shape == (7, 7)


# Predictions

PREDICTIONS = {
    "nothing": (lambda f: None, "NoneType"), "empty": (lambda f: {}, "dict"), "text": (lambda f: "7", "str"), "text in a tree": (lambda f: {"a": f, "b": "7"}, "str"),
    "numbers": (lambda f: [1.0, 2.0], "float"), "a number": (lambda f: 3.5, "float"), "an integer": (lambda f: 3, "int"),
    "classes": (lambda f: jnp.argmax(f), "dtype int"), "truth values": (lambda f: f > 0, "dtype bool"),
    "complex": (lambda f: jnp.fft.fft(f), "dtype complex128"), "state": (lambda f: (f, {"count": jnp.array(3)}), "dtype int"),
}
KINDS = {"ggn": create_ggn_mv, "hessian": create_hessian_mv, "empirical": partial(create_fisher_mv, kind="empirical")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PREDICTIONS)
def test_predictions_that_are_none(name, kind):
    change, got = PREDICTIONS[name]
    model = lambda input, params: change(input @ params)
    for loss in ("mse", lambda f, y: jnp.sum(f**2.0)):
        for options in ({}, {"batch_size": 2}):
            with pytest.raises(TypeError, match=f"^pred: got {got}.* from model_fn, expected an array of a real floating-point dtype"):
                KINDS[kind](model, W, DATA, loss, **options)


def test_a_complex_prediction_is_told_what_to_return():
    with pytest.raises(TypeError, match=r"return jnp.stack\(\[z.real, z.imag\]\)"): create_ggn_mv(lambda input, params: jnp.fft.fft(input @ params), W, DATA, "mse")
    model = lambda input, params: (lambda z: jnp.stack([z.real, z.imag]))(jnp.fft.fft(input @ params))
    G = create_ggn_mv(model, W, DATA | {"target": jnp.zeros((5, 2, 2))}, "mse")
    assert_close(G(W), 2 * WANT)  # the Fourier transform of two numbers is √2 times an isometry


def test_trees_and_constants_are_predictions():
    model = lambda input, params: {"a": input @ params, "b": np.ones(2)}
    loss = lambda f, y: jnp.sum((f["a"] - y) ** 2) + jnp.sum(f["b"])
    assert_close(create_ggn_mv(model, W, DATA, loss)(W), WANT)
