"""Laplace's approximation by this package and by laplax: covariances of predictions, their time and memory.

    python laplace_posterior.py CONTESTANT POSTERIOR FOLDER

FOLDER has problem.npz, as `save_problem` writes it. Writes the covariances to FOLDER, and prints as JSON the
seconds and bytes that they took, compilation included. It reads /proc, so it needs Linux.
"""

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ggn_nb import Diagonal, block_diagonal, create_ggn_mv, diagonal, eigsh, predictive_covariance
from ggn_nb.tools.models import cnn
from jax import random
from jax.flatten_util import ravel_pytree
from peak_memory import read_peak

POSTERIORS = ("full", "low rank", "diagonal")


class Problem(NamedTuple):
    """A trained network for digits, its training data, a prior precision, and inputs to predict for."""

    model_fn: Callable
    params: Any
    data: dict
    inputs: Any
    damping: float
    rank: int


def network(channels: tuple[int, ...] = (4, 8), hidden: int = 36) -> tuple[Callable, Any]:
    """The convolutional network, untrained: 1,894 parameters."""
    return cnn(random.key(0), (8, 8, 1), channels, hidden)


def save_problem(problem: Problem, folder: Path) -> None:
    """Write what `load_problem` reads."""
    arrays = {"params": ravel_pytree(problem.params)[0], **problem.data, "inputs": problem.inputs}
    np.savez(folder / "problem.npz", **arrays, damping=problem.damping, rank=problem.rank)


def load_problem(folder: Path) -> Problem:
    """The problem, in float32."""
    found = np.load(folder / "problem.npz")
    model_fn, params = network()
    params = ravel_pytree(params)[1](jnp.asarray(found["params"]))
    data = {"input": jnp.asarray(found["input"]), "target": jnp.asarray(found["target"])}
    inputs = jnp.asarray(found["inputs"])
    return Problem(model_fn, params, data, inputs, float(found["damping"]), int(found["rank"]))


def by_eigenpairs(problem: Problem, values: jax.Array, vectors: jax.Array) -> jax.Array:
    """J (U Λ Uᵀ + δI)⁻¹ Jᵀ for each input; the rows of `vectors` are Uᵀ."""
    flat, unravel = ravel_pytree(problem.params)
    of_input = lambda x: jax.jacrev(lambda p: problem.model_fn(input=x, params=unravel(p)))(flat)
    factors = values / (values + problem.damping)

    def covariance(x):
        J = of_input(x)
        JU = J @ vectors.T
        return (J @ J.T - (factors * JU) @ JU.T) / problem.damping

    return jax.jit(jax.vmap(covariance))(problem.inputs)


def ours(problem: Problem, posterior: str) -> jax.Array:
    """Covariances (N, C, C) by this package."""
    G = create_ggn_mv(problem.model_fn, problem.params, problem.data, "cross_entropy")
    if posterior == "low rank":
        values, trees = eigsh(G, problem.rank, tolerance=1e-4)
        return by_eigenpairs(problem, values, jax.vmap(lambda t: ravel_pytree(t)[0])(trees))
    if posterior == "full":
        one = jax.tree.map(lambda _: "all", problem.params)
        M = block_diagonal(G, one).dense_blocks()
    else:
        M = Diagonal(diagonal(G))
    return predictive_covariance(M, G, problem.inputs, problem.damping)


def by_laplax(problem: Problem, posterior: str) -> jax.Array:
    """The same by laplax."""
    from laplax.curv.cov import create_posterior_fn
    from laplax.curv.ggn import create_ggn_mv as create_laplax_mv
    from laplax.eval.pushforward import lin_pred_cov, lin_pred_mean, lin_setup, set_lin_pushforward

    model_fn, params = problem.model_fn, problem.params
    mv = jax.jit(create_laplax_mv(model_fn, params, problem.data, "cross_entropy"))
    low_rank = {"key": random.key(0), "rank": problem.rank}
    kind = {"full": "full", "low rank": "lanczos", "diagonal": "diagonal"}[posterior]
    posterior_fn = create_posterior_fn(kind, mv, layout=params, **(low_rank if posterior == "low rank" else {}))
    predict = set_lin_pushforward(
        model_fn,
        params,
        posterior_fn,
        {"prior_prec": problem.damping},
        pushforward_fns=[lin_setup, lin_pred_mean, lin_pred_cov],
    )
    return jax.jit(jax.vmap(predict))(problem.inputs)["pred_cov"]


CONTESTANTS = {"ggn_nb": ours, "laplax": by_laplax}


def bytes_now() -> int:
    """What this process holds."""
    return 1024 * int(re.search(r"VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def measure(contestant: str, posterior: str, folder: Path) -> dict[str, float]:
    """Seconds, and the most bytes beyond those held before."""
    problem = load_problem(folder)
    before, start = bytes_now(), time.perf_counter()
    covariances = jax.block_until_ready(CONTESTANTS[contestant](problem, posterior))
    found = {"seconds": time.perf_counter() - start, "bytes": read_peak() - before}
    np.save(folder / f"{contestant}, {posterior}.npy", covariances)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("posterior", choices=POSTERIORS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.contestant, arguments.posterior, arguments.folder)))
