"""Linear algebra as one writes it with other libraries, on the matrix of a case.

All that use JAX multiply by the same compiled product; curvlinops has its own, in PyTorch. Flat vectors are
in the order of `jax.flatten_util.ravel_pytree`.
"""

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ggn_nb import create_ggn_mv
from jax import random
from jax.flatten_util import ravel_pytree
from layer_peers import case_of, like_params, tensors_of, twin_of


class Case(NamedTuple):
    """The matrix of a model on data with cross-entropy, and a damping."""

    model_fn: Callable
    params: Any
    data: dict
    G: Any
    damping: jax.Array


SAMPLES = {"small MLP": 128, "CNN": 8, "MLP": 4}
DAMPING = {"small MLP": 1.0, "CNN": 5.0, "MLP": 20.0}  # about a hundredth of the largest eigenvalue


def make_case(name: str, num_samples: int | None = None) -> Case:
    """A case by its name."""
    model_fn, params, data = case_of(name, num_samples or SAMPLES[name])
    G = create_ggn_mv(model_fn, params, data, "cross_entropy")
    return Case(model_fn, params, data, G, jnp.asarray(DAMPING[name]))


@jax.jit
def multiply(G: Any, vec: jax.Array) -> jax.Array:
    """G v, of flat vectors."""
    return G.flat()(vec)


@jax.jit
def multiply_damped(G: Any, damping: jax.Array, vec: jax.Array) -> jax.Array:
    """(G + δI) v, of flat vectors."""
    return multiply(G, vec) + damping * vec


def norm(vec: jax.Array) -> jax.Array:
    """The Euclidean norm: that of lineax is the largest entry."""
    return jnp.sqrt(jnp.vdot(vec, vec))


# (G + δI) x = b, until |b - (G + δI) x| is the tolerance times |b|


SCALE = 2.0**40  # lineax returns NaN in float32 where A is small beside 100 P times the rounding error


@partial(jax.jit, static_argnums=(3, 4))
def lineax_cg(G: Any, damping: jax.Array, b: jax.Array, tolerance: float, max_steps: int) -> jax.Array:
    """Conjugate gradients of lineax."""
    import lineax

    like = jax.ShapeDtypeStruct(b.shape, b.dtype)
    scaled = lambda vec: SCALE * multiply_damped(G, damping, vec)
    A = lineax.FunctionLinearOperator(scaled, like, lineax.positive_semidefinite_tag)
    solver = lineax.CG(rtol=0.0, atol=tolerance * norm(b), norm=norm, max_steps=max_steps)
    return SCALE * lineax.linear_solve(A, b, solver, throw=False).value


def solve_by_lineax(case: Case, b: jax.Array, tolerance: float, max_steps: int) -> Callable:
    return partial(lineax_cg, case.G, case.damping, b, tolerance, max_steps)


@partial(jax.jit, static_argnums=(3, 4))
def jax_cg(G: Any, damping: jax.Array, b: jax.Array, tolerance: float, max_steps: int) -> jax.Array:
    """Conjugate gradients of JAX."""
    A = partial(multiply_damped, G, damping)
    return jax.scipy.sparse.linalg.cg(A, b, tol=tolerance, maxiter=max_steps)[0]


def solve_by_jax(case: Case, b: jax.Array, tolerance: float, max_steps: int) -> Callable:
    return partial(jax_cg, case.G, case.damping, b, tolerance, max_steps)


def scipy_operator(product: Callable, size: int) -> Any:
    """A compiled product for SciPy, with vectors through NumPy."""
    from scipy.sparse.linalg import LinearOperator

    on_arrays = lambda vec: np.asarray(product(vec.astype(np.float32)))
    return LinearOperator((size, size), matvec=on_arrays, dtype=np.float32)


def solve_by_scipy(case: Case, b: jax.Array, tolerance: float, max_steps: int) -> Callable:
    from scipy.sparse.linalg import cg

    A = scipy_operator(partial(multiply_damped, case.G, case.damping), b.size)
    b = np.asarray(b)
    return lambda: cg(A, b, rtol=tolerance, maxiter=max_steps)[0]


def torch_matrix(case: Case) -> tuple[Any, Any, Callable, Callable]:
    """G and G + δI of curvlinops, and the ways of flat vectors there and back."""
    import torch
    from curvlinops import GGNLinearOperator
    from curvlinops.diag import DiagonalLinearOperator

    torch.set_num_threads(1)  # its threads and those of JAX would wait for each other
    unravel, model = ravel_pytree(case.params)[1], twin_of(case.params)
    weights = list(model.parameters())
    loss, batches = torch.nn.CrossEntropyLoss(reduction="sum"), [tensors_of(case.data)]
    G = GGNLinearOperator(model, loss, dict(model.named_parameters()), batches, check_deterministic=False)
    damping = DiagonalLinearOperator([torch.full_like(w, float(case.damping)).detach() for w in weights])

    def there(vec):
        return torch.cat([w.detach().flatten() for w in twin_of(unravel(vec)).parameters()])

    def back(flat):
        parts = flat.split([w.numel() for w in weights])
        tensors = [part.reshape(w.shape) for part, w in zip(parts, weights, strict=True)]
        return ravel_pytree(like_params(tensors, case.params))[0]

    return G, G + damping, there, back


def solve_by_curvlinops(case: Case, b: jax.Array, tolerance: float, max_steps: int) -> Callable:
    from curvlinops import CGInverseLinearOperator

    _, A, there, back = torch_matrix(case)
    options = {"max_iter": max_steps, "max_tridiag_iter": 1, "tolerance": tolerance}
    inverse, tensor = CGInverseLinearOperator(A, **options), there(b)
    return lambda: back(inverse @ tensor)


# The same for the rows of b


def solve_many_by_lineax(case: Case, b: jax.Array, tolerance: float, max_steps: int) -> Callable:
    return partial(lineax_cg_many, case.G, case.damping, b, tolerance, max_steps)


def solve_many_by_jax(case: Case, b: jax.Array, tolerance: float, max_steps: int) -> Callable:
    return partial(jax_cg_many, case.G, case.damping, b, tolerance, max_steps)


def along_rows(solver: Callable) -> Callable:
    """A solver vmapped over right-hand sides, compiled."""
    vmapped = lambda G, damping, b, *static: jax.vmap(lambda row: solver(G, damping, row, *static))(b)
    return jax.jit(vmapped, static_argnums=(3, 4))


lineax_cg_many, jax_cg_many = along_rows(lineax_cg), along_rows(jax_cg)


def solve_many_by_curvlinops(case: Case, b: jax.Array, tolerance: float, max_steps: int) -> Callable:
    import torch
    from curvlinops import CGInverseLinearOperator

    _, A, there, back = torch_matrix(case)
    options = {"max_iter": max_steps, "max_tridiag_iter": 1, "tolerance": tolerance}
    inverse, tensor = CGInverseLinearOperator(A, **options), torch.stack([there(row) for row in b], 1)
    return lambda: jnp.stack([back(column) for column in (inverse @ tensor).T])


# The k largest eigenvalues of G; all but laplax until residuals are the tolerance times the largest


def eigsh_by_scipy(case: Case, k: int, tolerance: float) -> Callable:
    from scipy.sparse.linalg import eigsh

    A = scipy_operator(partial(multiply, case.G), case.G.shape[0])
    return lambda: eigsh(A, k, which="LA", tol=tolerance)[0][::-1]


def eigsh_by_curvlinops(case: Case, k: int, tolerance: float) -> Callable:
    from scipy.sparse.linalg import eigsh

    A = torch_matrix(case)[0].to_scipy()
    return lambda: eigsh(A, k, which="LA", tol=tolerance)[0][::-1]


def count_products(case: Case, k: int, tolerance: float) -> int:
    """How many products SciPy takes for eigenpairs."""
    from scipy.sparse.linalg import eigsh

    number = 0

    def product(vec):
        nonlocal number
        number += 1
        return multiply(case.G, vec)

    eigsh(scipy_operator(product, case.G.shape[0]), k, which="LA", tol=tolerance)
    return number


def laplax_lanczos(G: Any, key: jax.Array, rank: int) -> Any:
    """Its low-rank terms: values and vectors by so many products, without restarts."""
    from laplax.curv.lanczos import lanczos_lowrank

    options = {"layout": G.shape[0], "rank": rank, "calc_dtype": jnp.float32}
    return lanczos_lowrank(partial(multiply, G), key=key, **options)


def eigsh_by_laplax(case: Case, k: int, tolerance: float) -> Callable:
    """With as many products as SciPy takes."""
    number = count_products(case, k, tolerance)
    values = jax.jit(lambda G, key: laplax_lanczos(G, key, number).S[: -k - 1 : -1])
    return partial(values, case.G, random.key(0))


# Quadrature of the spectrum: for each random vector, nodes and weights


def density_by_matfree(case: Case, num_probes: int, num_steps: int) -> Callable:
    from matfree import decomp, stochtrace

    size = case.G.shape[0]
    tridiagonal = decomp.tridiag_sym(num_steps)
    sampler = stochtrace.sampler_signs(jnp.zeros(size), num=num_probes)

    @jax.jit
    def quadrature(G, key):
        def of_vector(vec):
            T = tridiagonal(lambda v: multiply(G, v), vec).J_small
            nodes, vectors = jnp.linalg.eigh(T)
            return nodes, size * vectors[0] ** 2

        return jax.vmap(of_vector)(sampler(key))

    return partial(quadrature, case.G, random.key(0))


def density_by_curvlinops(case: Case, num_probes: int, num_steps: int) -> Callable:
    """Without reorthogonalisation."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    G, size = torch_matrix(case)[0], case.G.shape[0]

    def quadrature():
        found = [fast_lanczos(G, num_steps) for _ in range(num_probes)]
        nodes, weights = zip(*[(values, size * vectors[0] ** 2) for values, vectors in found])
        return np.stack(nodes), np.stack(weights)

    return quadrature


# log det(G + δI)


def logdet_by_matfree(case: Case, num_probes: int, num_steps: int) -> Callable:
    """P log δ + log det(G/δ + I): log det of the damped matrix at once would lose digits in float32."""
    from matfree import decomp, funm, stochtrace

    size = case.G.shape[0]
    tridiagonal = decomp.tridiag_sym(num_steps)
    sampler = stochtrace.sampler_signs(jnp.zeros(size), num=num_probes)

    @jax.jit
    def logdet(G, damping, key):
        of_matrix = funm.dense_funm_sym_eigh(lambda value: jnp.log1p(value / damping))
        integrand = funm.monte_carlo_funm_sym(of_matrix, tridiagonal)
        estimate = stochtrace.estimator_monte_carlo_mean_and_sem(integrand, sampler)
        mean, error = estimate(partial(multiply, G), key)
        return size * jnp.log(damping) + mean, error

    return partial(logdet, case.G, case.damping, random.key(0))


# Samples of N(0, (G + δI)⁻¹)


def sample_by_cholesky(case: Case, num_samples: int) -> Callable:
    """The dense matrix by as many products as there are parameters."""

    @jax.jit
    def samples(G, damping, key):
        columns = jax.lax.map(partial(multiply_damped, G, damping), jnp.eye(G.shape[0]), batch_size=64)
        L = jnp.linalg.cholesky(columns)
        noise = random.normal(key, (len(L), num_samples))
        return jax.scipy.linalg.solve_triangular(L.T, noise, lower=False).T

    return partial(samples, case.G, case.damping, random.key(0))


def sample_by_laplax(case: Case, num_samples: int, rank: int) -> Callable:
    """In the low rank that its Lanczos finds."""
    from laplax.curv.low_rank import (
        low_rank_curvature_to_precision,
        low_rank_posterior_state_to_scale,
        low_rank_prec_to_posterior_state,
    )

    @jax.jit
    def samples(G, damping, key):
        terms = laplax_lanczos(G, key, rank)
        state = low_rank_prec_to_posterior_state(low_rank_curvature_to_precision(terms, {"prior_prec": damping}))
        return jax.vmap(low_rank_posterior_state_to_scale(state))(random.normal(key, (num_samples, G.shape[0])))

    return partial(samples, case.G, case.damping, random.key(0))


PEERS = {
    "solve": {
        "lineax": solve_by_lineax,
        "jax.scipy": solve_by_jax,
        "scipy": solve_by_scipy,
        "curvlinops": solve_by_curvlinops,
    },
    "solve_many": {
        "lineax": solve_many_by_lineax,
        "jax.scipy": solve_many_by_jax,
        "curvlinops": solve_many_by_curvlinops,
    },
    "eigsh": {"scipy": eigsh_by_scipy, "laplax": eigsh_by_laplax, "curvlinops": eigsh_by_curvlinops},
    "spectral_density": {"matfree": density_by_matfree, "curvlinops": density_by_curvlinops},
    "logdet": {"matfree": logdet_by_matfree},
    "sample": {"Cholesky": sample_by_cholesky, "laplax": sample_by_laplax},
}
REQUIRED = {"Cholesky": "jax", "jax.scipy": "jax", "curvlinops": "curvlinops.ggn_diagonal"}


def is_there(peer: str) -> bool:
    """Whether it can be imported; of curvlinops later than 3.0.1, whose parameters are named."""
    package, *_ = (module := REQUIRED.get(peer, peer)).split(".")
    return bool(find_spec(package)) and bool(find_spec(module))


MOST_PARAMETERS = {"curvlinops": 1000, "Cholesky": 5000}


def peers_for(function: str, case: Case) -> dict[str, Callable]:
    """The ways by hand, as far as their packages are installed and the case is not too large for them."""
    size = case.G.shape[0]
    able = [peer for peer in PEERS[function] if size <= MOST_PARAMETERS.get(peer, size) and is_there(peer)]
    return {peer: PEERS[function][peer] for peer in able}
