"""Models of Flax, Equinox and Haiku: their matrices, and the messages when they are handed in as they are."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import create_ggn_mv, diagonal, gram, logdet, select_params
from ggn_nb.tools.testing import random_like
from jax import random
from jax.flatten_util import ravel_pytree

KEY = random.key(0)
X = random.normal(KEY, (5, 4), jnp.float32)
DATA = {"input": X, "target": jnp.arange(5) % 3}


@pytest.fixture(autouse=True)
def promotion():
    """The libraries' own code needs the usual promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# Models with batch norm and dropout, in evaluation mode: `model_fn, params`


def linen():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.tanh(nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x)))
            return nn.Dense(3)(nn.Dropout(0.2, deterministic=not train)(x))

    net = Net()
    return net, net.init(KEY, X)


def linen_model(train=False):
    net, variables = linen()
    options = {"train": True, "mutable": ["batch_stats"], "rngs": {"dropout": KEY}} if train else {}

    def model_fn(input, params):
        pred = net.apply(variables | {"params": params}, input, **options)
        return pred[0] if train else pred

    return model_fn, variables["params"]


def nnx_net():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.out = nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
            self.norm, self.dropout = nnx.BatchNorm(3, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)

        def __call__(self, x):
            return self.out(self.dropout(jnp.tanh(self.norm(self.hidden(x)))))

    net = Net(nnx.Rngs(0))
    net.eval()
    return net


def nnx_model():
    nnx, net = pytest.importorskip("flax.nnx"), nnx_net()
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    return lambda input, params: nnx.merge(graph, params, rest)(input), params


def equinox_net():
    equinox = pytest.importorskip("equinox")
    return equinox.nn.MLP(4, 3, 3, 1, activation=jnp.tanh, dtype=jnp.float32, key=KEY)


def equinox_model():
    equinox = pytest.importorskip("equinox")
    params, static = equinox.partition(equinox_net(), equinox.is_inexact_array)
    return lambda input, params: equinox.combine(params, static)(input), params


def equinox_selected():
    return select_params(lambda input, params: params(input), equinox_net(), "weight")


def haiku_model():
    haiku = pytest.importorskip("haiku")
    net = haiku.without_apply_rng(haiku.transform(lambda x: haiku.nets.MLP([3, 3], activation=jnp.tanh)(x)))
    return lambda input, params: net.apply(params, input), net.init(KEY, X)


def haiku_batch_norm():
    haiku = pytest.importorskip("haiku")

    def forward(x, train):
        return haiku.Linear(3)(haiku.BatchNorm(True, True, 0.9)(jnp.tanh(haiku.Linear(3)(x)), train))

    net = haiku.transform_with_state(forward)
    params, state = net.init(KEY, X, True)
    return lambda input, params: net.apply(params, state, None, input[None], False)[0][0], params


MODELS = [linen_model, nnx_model, equinox_model, equinox_selected, haiku_model, haiku_batch_norm]


def dense(model_fn, params):
    """Σ Jᵀ (diag p − p pᵀ) J, in float64 from the Jacobians of single samples."""
    flat, unravel = ravel_pytree(params)
    predict = lambda p: jax.vmap(lambda x: model_fn(input=x, params=unravel(p)))(X)
    J = np.asarray(jax.jacobian(predict)(flat), np.float64)
    p = np.asarray(jax.nn.softmax(predict(flat)), np.float64)
    return np.einsum("nip,nij,njq->pq", J, np.einsum("ni,ij->nij", p, np.eye(3)) - p[:, :, None] * p[:, None], J)


def close(found, want):
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-4 * np.max(np.abs(want)))


@pytest.mark.parametrize("model", MODELS)
def test_product_diagonal_and_gram(model):
    model_fn, params = model()
    G = create_ggn_mv(model_fn, params, DATA, "cross_entropy")
    want, v = dense(model_fn, params), random_like(KEY, params)
    close(ravel_pytree(G(v))[0], want @ ravel_pytree(v)[0])
    close(ravel_pytree(diagonal(G))[0], np.diag(want))
    assert jax.tree.structure(diagonal(G)) == jax.tree.structure(params)
    close(logdet(gram(G), 0.5), np.linalg.slogdet(want + 0.5 * np.eye(len(want)))[1])


def test_batch_norm_in_training_mode_hides_what_is_before_it():
    """Called sample by sample; called for the whole batch it does not."""
    largest = {}
    for at_once in (True, False):
        model_fn, params = linen_model(train=True)
        G = create_ggn_mv(model_fn, params, DATA, "cross_entropy", vmap_over_data=not at_once)
        largest[at_once] = jnp.abs(G(random_like(KEY, params))["Dense_0"]["kernel"]).max()
    assert largest[False] == 0 and largest[True] > 0


# What is said


def mistakes():
    """Model, parameters, error and words of its message or note, by name."""
    net, variables = linen()
    nnx_module, mlp = nnx_net(), equinox_net()
    equinox, haiku = pytest.importorskip("equinox"), pytest.importorskip("haiku")
    nnx = pytest.importorskip("flax.nnx")
    pair = haiku.transform(lambda x: haiku.Linear(3)(x))
    params = variables["params"]
    split = "write graph, params, rest = nnx.split(model, nnx.Param, ...)"
    partition = "write params, static = equinox.partition(model, equinox.is_inexact_array)"
    counted = {"w": jnp.ones((4, 3)), "step": jnp.array(3)}
    matmul = lambda input, params: input @ params["w"]
    training = lambda input, params: net.apply(variables | {"params": params}, input, train=True, rngs={"dropout": KEY})
    no_key = lambda input, params: net.apply(variables | {"params": params}, input, train=True, mutable=["batch_stats"])[0]
    with_state = lambda input, params: net.apply(variables | {"params": params}, input, mutable=["batch_stats"])
    return {
        "linen module": (net, params, TypeError, "write params = variables['params']"),
        "all collections": (lambda input, params: net.apply(params, input), variables, ValueError, "select_params(model_fn, variables"),
        "collections forgotten": (lambda input, params: net.apply({"params": params}, input), params, Exception, "give module.apply all collections"),
        "training mode": (training, params, Exception, "use_running_average=True"),
        "dropout": (no_key, params, Exception, "deterministic=True"),
        "a pair": (with_state, params, TypeError, "of a pair (prediction, state), the first alone"),
        "nnx module": (nnx_module, nnx.state(nnx_module, nnx.Param), TypeError, split),
        "nnx module as parameters": (lambda input, params: params(input), nnx_module, ValueError, split),
        "nnx state": (lambda input, params: params(input), nnx.state(nnx_module), ValueError, "expected what is differentiated alone"),
        "equinox module": (mlp, equinox.filter(mlp, equinox.is_array), TypeError, partition),
        "equinox module as parameters": (lambda input, params: params(input), mlp, TypeError, partition),
        "equinox without functions": (lambda input, params: params(input), equinox.filter(mlp, equinox.is_array), TypeError, "equinox.combine(params, static)"),
        "haiku pair": (pair, pair.init(KEY, X), TypeError, "model.apply(params, None, input)"),
        "haiku apply": (pair.apply, pair.init(KEY, X), TypeError, "apply_fn(params, None, input)"),
        "a counter": (matmul, counted, TypeError, "to hold it fixed, write model_fn, params = ggn_nb.select_params"),
        "a function": (matmul, counted | {"step": jnp.tanh}, TypeError, "to hold it fixed, write model_fn"),
    }


def test_mistakes_are_refused_with_what_to_write():
    for name, (model_fn, params, kind, words) in mistakes().items():
        with pytest.raises(kind) as caught:
            create_ggn_mv(model_fn, params, DATA, "cross_entropy")
        said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
        assert words in said, (name, said)


def test_what_is_said_helps():
    """A counter is held fixed by `select_params`, with a predicate or a pattern."""
    model_fn = lambda input, params: input @ params["w"] * params["step"]
    params = {"w": jnp.ones((4, 3), jnp.float32), "step": jnp.array(3)}
    for select in ("w", lambda path, leaf: jnp.issubdtype(leaf.dtype, jnp.floating)):
        assert create_ggn_mv(*select_params(model_fn, params, select), DATA, "cross_entropy").shape == (12, 12)
    with pytest.raises(TypeError, match=re.escape("write lambda path, leaf: isscalar(leaf)")):
        select_params(model_fn, params, jnp.isscalar)
