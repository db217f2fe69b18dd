"""The exact diagonal as other packages make it, on the cases of `ggn_nb.tools.timing`."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from ggn_nb.tools.models import mlp
from ggn_nb.tools.timing import timing_case
from jax import random
from jax.flatten_util import ravel_pytree
from peers import from_torch, layers_of, make_torch_layer, with_layers


def case_of(name: str, num_samples: int | None = None) -> tuple[Callable, Any, dict]:
    """A case of `timing_case`, or the "small MLP": a perceptron of 630 parameters, by default on 128 samples."""
    if name != "small MLP":
        return timing_case(name, num_samples)
    model_fn, params = mlp(random.key(0), (20, 20, 10))
    size = num_samples or 128
    inputs = random.normal(random.key(1), (size, 20))
    return model_fn, params, {"input": inputs, "target": random.randint(random.key(2), (size,), 0, 10)}


@dataclass(frozen=True)
class Peer:
    """A package's diagonal: how it is made, and the way back into arrays."""

    provides: str  # the name that it is imported by
    cases: tuple[str, ...]  # that it can do at their size
    make: Callable[..., Callable]  # (model_fn, params, data) -> zero-argument function
    convert: Callable[[Any, Any], Any] = lambda found, params: found  # its result, like the parameters

    def __call__(self, model_fn: Callable, params: Any, data: dict) -> Callable:
        return self.make(model_fn, params, data)


def make_laplax(model_fn, params, data) -> Callable:
    """laplax: as many products as there are parameters."""
    from laplax.curv.ggn import create_ggn_mv
    from laplax.util.mv import diagonal

    mv = jax.jit(create_ggn_mv(model_fn, params, data, "cross_entropy"))
    return lambda: diagonal(mv, layout=params)


def like_leaves(flat: jax.Array, params: Any) -> Any:
    """A vector as a tree like the parameters."""
    return ravel_pytree(params)[1](flat)


# PyTorch: images have their channels first, and so they are flattened.


def twin_of(params: Any) -> Any:
    """The same model in PyTorch, of layers that BackPACK knows."""
    from torch import nn

    parts: list = []
    for layer in layers_of(params):
        if layer["weight"].ndim == 4:
            parts += [make_torch_layer(layer), nn.ReLU(), nn.AvgPool2d(2)]
            continue
        if parts and isinstance(parts[-1], nn.AvgPool2d):
            parts += [nn.Flatten(-3)]
            layer = layer | {"weight": channels_first(layer["weight"], params)}
        parts += [make_torch_layer(layer), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def channels_first(weight: jax.Array, params: Any, back: bool = False) -> jax.Array:
    """A dense weight on flattened images with its rows in PyTorch's order; or back."""
    channels = params["conv"][-1]["bias"].size
    pixels = weight.shape[0] // channels
    shape = (channels, pixels, -1) if back else (pixels, channels, -1)
    return weight.reshape(shape).swapaxes(0, 1).reshape(weight.shape)


def tensors_of(data: dict) -> tuple[Any, Any]:
    """Inputs and labels as tensors."""
    import torch

    x = np.array(data["input"])
    x = torch.from_numpy(x if x.ndim == 2 else x.transpose(0, 3, 1, 2).copy())
    return x, torch.from_numpy(np.array(data["target"])).long()


def like_params(tensors: list, params: Any) -> Any:
    """Weights and biases of all layers, in turn, as a tree like the parameters."""
    arrays = [from_torch(tensor) for tensor in tensors]
    layers = [{"weight": w, "bias": b} for w, b in zip(arrays[::2], arrays[1::2], strict=True)]
    if not isinstance(params, list):
        layers[-2]["weight"] = channels_first(layers[-2]["weight"], params, back=True)
    return with_layers(params, layers)


def make_backpack(model_fn, params, data) -> Callable:
    """BackPACK: `DiagGGNExact` beside a gradient."""
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact
    from torch import nn

    model, loss = extend(twin_of(params)), extend(nn.CrossEntropyLoss(reduction="sum"))
    x, y = tensors_of(data)

    def diagonal():
        with backpack(DiagGGNExact()):
            loss(model(x), y).backward()
        return [parameter.diag_ggn_exact for parameter in model.parameters()]

    return diagonal


AT_ONCE = 4  # samples: it holds a number for each of them, each column and each parameter


def make_curvlinops(model_fn, params, data) -> Callable:
    """curvlinops: the squares of the Jacobian times the square root, a few samples at a time."""
    import torch
    from curvlinops import GGNDiagonalLinearOperator

    model, (x, y) = twin_of(params), tensors_of(data)
    loss, weights = torch.nn.CrossEntropyLoss(reduction="sum"), dict(model.named_parameters())
    batches = list(zip(x.split(AT_ONCE), y.split(AT_ONCE), strict=True))
    ones = [torch.ones_like(weight) for weight in weights.values()]
    options = {"check_deterministic": False, "num_data": len(x)}
    return lambda: GGNDiagonalLinearOperator(model, loss, weights, batches, **options) @ ones


PEERS = {
    "laplax": Peer("laplax.util.mv.diagonal", ("small MLP",), make_laplax, like_leaves),
    "curvlinops": Peer("curvlinops.GGNDiagonalLinearOperator", ("small MLP", "MLP", "CNN"), make_curvlinops, like_params),
    "BackPACK": Peer("backpack.extensions.DiagGGNExact", ("small MLP", "MLP", "CNN"), make_backpack, like_params),
}


def is_there(name: str) -> bool:
    """Whether a name can be imported: curvlinops 3.0.1 has no diagonal yet, its repository has."""
    module, attribute = name.rsplit(".", 1)
    return bool(find_spec(module.split(".")[0])) and hasattr(import_module(module), attribute)


def peers_for(case: str) -> list[str]:
    """The packages that can do a case, as far as they are installed."""
    return [name for name, peer in PEERS.items() if case in peer.cases and is_there(peer.provides)]
