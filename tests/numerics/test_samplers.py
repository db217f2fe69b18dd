"""Samplers in float32: their distributions, and the mean square of the gradient, for small and large parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_nb import create_loss
from scipy import stats

N = 40_000
TINY, MOST = (float(x) for x in (jnp.finfo(jnp.float32).tiny, jnp.finfo(jnp.float32).max))


def drawn(name, f, seed=0, **options):
    """Targets at N equal predictions in float32, and the loss."""
    loss = create_loss(name, **{k: v if isinstance(v, str) else jnp.float32(v) for k, v in options.items()})
    at = jnp.full(N, f, jnp.float32)
    y = loss.sample(jax.random.key(seed), at)
    assert y.dtype == jnp.float32
    assert bool(jnp.all(jnp.isfinite(y)))
    return np.asarray(y, np.float64), loss, at


def distance(y, cdf):
    """Of the empirical distribution function from another, at the draws; ties are taken at their right end."""
    points, counts = np.unique(y, return_counts=True)
    return np.max(np.abs(np.cumsum(counts) / len(y) - cdf(points)))


def check_score(y, loss, at):
    """Mean 0, mean square H, within five standard errors, and a hundredth."""
    g = np.asarray(loss.gradient(at, jnp.asarray(y, jnp.float32)), np.float64)
    H = float(loss.hessian_mv(jnp.ones(N, jnp.float32), at)[0])
    assert np.all(np.isfinite(g))
    assert abs(g.mean()) < 5 * (H / N) ** 0.5
    assert abs((g**2).mean() - H) < 5 * (g**2).std() / N**0.5 + 0.01 * H


LIMIT = 2 / N**0.5  # of `distance`: p ≈ 10⁻³


@pytest.mark.parametrize("a", [0.01, 0.05, 0.5, 1.0, 30.0, 1e4, 1e8])
@pytest.mark.parametrize("f", [-3.0, 5.0])
def test_gamma(a, f):
    y, loss, at = drawn("gamma", f, concentration=a, curvature="fisher")
    mu, a = np.exp(float(at[0])), float(np.float32(a))
    assert y.min() >= TINY  # the next float > 0 where there is none: that is where their distribution begins
    assert distance(y, stats.gamma(a, scale=mu / a).cdf) < LIMIT
    assert np.all(np.isfinite(np.asarray(loss.value(at, jnp.asarray(y, jnp.float32)))))
    check_score(y, loss, at)


@pytest.mark.parametrize("df", [0.01, 0.1, 1.0, 4.0, 1e3, 1e8])
def test_student_t(df):
    y, loss, at = drawn("student_t", 0.0, df=df, scale=0.5)
    df = float(np.float32(df))
    inside = np.abs(y) < MOST / 2
    law = stats.t(df, scale=0.5)
    ends = distance(y[inside], lambda x: (law.cdf(x) - law.cdf(-MOST)) / (law.cdf(MOST) - law.cdf(-MOST)))
    assert ends < LIMIT / inside.mean() ** 0.5
    assert abs((~inside).mean() - 2 * law.sf(MOST)) < 5 * (law.sf(MOST) / N) ** 0.5 + 1e-4
    assert np.all(np.isfinite(np.asarray(loss.value(at, jnp.asarray(y, jnp.float32)))))
    check_score(y, loss, at)


@pytest.mark.parametrize("f", [-10.0, 0.0, 3.0, 8.25, 8.375, 14.0, 18.0, 25.0])
def test_poisson(f):
    y, loss, at = drawn("poisson", f)
    mu = np.exp(f)
    assert np.all(y == np.round(y))
    half = 0.5 if mu < 2**24 else 0.0
    assert distance(y, lambda x: stats.poisson.cdf(np.floor(x + half), mu)) < LIMIT
    check_score(y, loss, at)


@pytest.mark.parametrize("r", [0.01, 0.1, 1.0, 1e3, 1e8])
@pytest.mark.parametrize("f", [0.0, 10.0])
def test_negative_binomial(r, f):
    y, loss, at = drawn("negative_binomial", f, concentration=r, curvature="fisher")
    r, mu = float(np.float32(r)), np.exp(f)
    assert np.all(y == np.round(y))
    assert distance(y, stats.nbinom(r, r / (r + mu)).cdf) < LIMIT
    check_score(y, loss, at)


def test_counts_beyond_integers():
    """Rates that no integer reaches have counts, and rates that are no float have the largest one."""
    y, loss, at = drawn("poisson", 60.0)
    assert abs(y.mean() / np.exp(60.0) - 1) < 1e-6
    assert np.all(drawn("poisson", 200.0)[0] == MOST)
    y, _, _ = drawn("negative_binomial", 40.0, concentration=2.0)
    assert abs(np.median(y) / (np.exp(40.0) * stats.gamma(2, scale=0.5).median()) - 1) < 0.02
    assert np.all(drawn("negative_binomial", 60.0, concentration=0.01)[0] >= 0)
