"""The Gauss-Newton product as other packages make it, on the cases of `ggn_nb.tools.timing`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ggn_nb import create_ggn_mv
from ggn_nb.tools.timing import timing_gradient, timing_product


@dataclass(frozen=True)
class Product:
    """A product, with the way into and out of the arrays of the package that makes it."""

    multiply: Callable[[Any], Any]
    convert: Callable[[Any], Any] = lambda vec: vec  # a vector like the parameters
    convert_back: Callable[[Any], Any] = lambda result: result

    def __call__(self, vec: Any) -> Any:
        return self.convert_back(self.multiply(self.convert(vec)))


def make_gradient(model_fn, params, data) -> Product:
    """One gradient, the unit, whatever the vector."""
    return Product(lambda vec: timing_gradient(model_fn, params, data))


def make_by_hand(model_fn, params, data) -> Product:
    """What a user of JAX would write, with nothing checked."""
    return Product(partial(timing_product, model_fn, params, data))


def make_ours(model_fn, params, data, policy: str, divisor: int | None = None) -> Product:
    """This package's product, with a policy; of a `divisor`-th of the samples at once."""
    batch_size = None if divisor is None else len(data["target"]) // divisor
    options = {"linearize": policy, "batch_size": batch_size}
    return Product(create_ggn_mv(model_fn, params, data, "cross_entropy", **options))


def make_laplax(model_fn, params, data) -> Product:
    """laplax, bound to its data and jitted, which is how it is used."""
    from laplax.curv.ggn import create_ggn_mv as create_laplax_mv

    return Product(jax.jit(create_laplax_mv(model_fn, params, data, "cross_entropy")))


def make_kfac_jax(model_fn, params, data) -> Product:
    """kfac-jax, which divides by the length of the leading axis of the predictions."""
    import kfac_jax

    def total(params, batch):
        logits = jax.vmap(lambda x: model_fn(input=x, params=params))(batch[0])
        logits = logits.reshape(-1, logits.shape[-1])
        kfac_jax.register_softmax_cross_entropy_loss(logits, batch[1].reshape(-1))
        return jnp.sum(logits)

    curvature = kfac_jax.ImplicitExactCurvature(total)
    batch, scale = (data["input"], data["target"]), float(data["target"].shape[0])

    @jax.jit
    def multiply(params, batch, vec):
        mean = curvature.multiply_ggn((params, batch), vec)
        return jax.tree.map(lambda leaf: leaf * scale, mean)

    return Product(partial(multiply, params, batch))


# PyTorch: weights of a dense layer are transposed there, and images have their channels first.

TO_TORCH = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}
FROM_TORCH = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}


def to_torch(x: jax.Array) -> Any:
    """An array of parameters as a tensor."""
    import torch

    return torch.from_numpy(np.array(x).transpose(TO_TORCH[x.ndim]).copy())


def from_torch(tensor: Any) -> jax.Array:
    """A tensor of parameters as an array."""
    return jnp.asarray(tensor.detach().numpy().transpose(FROM_TORCH[tensor.ndim]))


def layers_of(params: Any) -> list[dict]:
    """The layers of a multilayer perceptron or a convolutional network, in order."""
    if isinstance(params, list):
        return params
    return [*params["conv"], params["hidden"], params["out"]]


def with_layers(params: Any, layers: list[dict]) -> Any:
    """A tree like the parameters, with other layers."""
    if isinstance(params, list):
        return layers
    return {"conv": layers[:-2], "hidden": layers[-2], "out": layers[-1]}


def make_torch_layer(layer: dict[str, jax.Array]) -> Any:
    """A dense layer or a convolution in PyTorch, with the same parameters."""
    from torch import nn

    shape = layer["weight"].shape
    dense = len(shape) == 2
    twin = nn.Linear(*shape) if dense else nn.Conv2d(*shape[2:], 3, padding=1)
    twin.weight.data, twin.bias.data = to_torch(layer["weight"]), to_torch(layer["bias"])
    return twin


def make_torch_twin(params: Any) -> tuple[Any, list]:
    """The same model in PyTorch, and its layers."""
    from torch import nn

    layers, parts = [make_torch_layer(layer) for layer in layers_of(params)], []
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            parts += [layer, nn.ReLU(), nn.AvgPool2d(2)]
            continue
        if parts and isinstance(parts[-1], nn.AvgPool2d):
            parts += [make_channels_last()]
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts[:-1]), layers


def make_channels_last() -> Any:
    """A layer that flattens images as JAX does, channels last."""
    from torch import nn

    class ChannelsLast(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1).flatten(1)

    return ChannelsLast()


def make_curvlinops(model_fn, params, data) -> Product:
    """curvlinops, on the same model in PyTorch."""
    import torch
    from curvlinops import GGNLinearOperator
    from torch import nn

    model, layers = make_torch_twin(params)
    weights = [parameter for layer in layers for parameter in (layer.weight, layer.bias)]
    x = np.array(data["input"])
    x = torch.from_numpy(x if x.ndim == 2 else x.transpose(0, 3, 1, 2).copy())
    batches = [(x, torch.from_numpy(np.array(data["target"])).long())]
    loss = nn.CrossEntropyLoss(reduction="sum")
    G = GGNLinearOperator(model, loss, weights, batches, check_deterministic=False)

    def convert(vec):
        return [to_torch(layer[name]) for layer in layers_of(vec) for name in ("weight", "bias")]

    def convert_back(result):
        arrays = [from_torch(tensor) for tensor in result]
        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        return with_layers(params, [{"weight": w, "bias": b} for w, b in pairs])

    return Product(lambda vec: G @ vec, convert, convert_back)


OURS = {
    "ggn_nb, cached": partial(make_ours, policy="cached"),
    "ggn_nb, rematerialized": partial(make_ours, policy="rematerialized"),
    "ggn_nb, recomputed": partial(make_ours, policy="recomputed"),
    "ggn_nb, cached, batch_size": partial(make_ours, policy="cached", divisor=4),
}
MODULES = {"laplax": "laplax.curv.ggn", "kfac-jax": "kfac_jax", "curvlinops": "curvlinops"}
PEERS = {"laplax": make_laplax, "kfac-jax": make_kfac_jax, "curvlinops": make_curvlinops}
MAKERS = {"gradient": make_gradient, "by hand": make_by_hand, **OURS, **PEERS}


def peers_in(case: str) -> list[str]:
    """The installed packages that can do a case: kfac-jax all, the others no transformer."""
    able = ["kfac-jax"] if "transformer" in case else list(PEERS)
    return [peer for peer in able if find_spec(MODULES[peer].split(".")[0])]


def import_peer(contestant: str) -> None:
    """Import what a contestant needs, so that its first product does not."""
    if contestant in MODULES:
        import_module(MODULES[contestant])
