"""Two independent implementations: kfac-jax and laplax."""

from contextlib import contextmanager
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ggn_cases import POLICIES, batched, data_case, linear, model_case, random_like
from ggn_nb import create_ggn_mv, create_loss_hessian_mv
from ggn_nb.tools.testing import assert_close

WHY = "{} is not installed: pip install 'ggn_nb[peers]'"


@contextmanager
def lenient():
    """JAX's own defaults, for code that does not run under the strict settings."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("linearize", POLICIES)
@pytest.mark.parametrize("vmap_over_data", [True, False], ids=["vmap", "whole"])
@pytest.mark.parametrize("loss", ["mse", "cross_entropy"])
def test_kfac_jax(loss, linearize, vmap_over_data):
    """kfac-jax averages over the batch, and its squared error has the same weight as ours."""
    kfac_jax = pytest.importorskip("kfac_jax", reason=WHY.format("kfac_jax"))
    if version("kfac-jax") == "0.0.8" and jax.__version_info__ >= (0, 9, 2):
        pytest.skip(f"kfac-jax 0.0.8 runs with jax < 0.9.2, not with {jax.__version__}")
    case, data = model_case("mlp"), data_case("mlp", loss)
    register = {
        "mse": kfac_jax.register_squared_error_loss,
        "cross_entropy": kfac_jax.register_softmax_cross_entropy_loss,
    }[loss]

    def total(params, batch):
        pred = batched(case.model_fn)(batch[0], params)
        register(pred, batch[1])
        return jnp.sum(pred)

    vec = random_like(case.params)
    with lenient():
        peer = kfac_jax.ImplicitExactCurvature(total)
        expected = peer.multiply_ggn((case.params, (data["input"], data["target"])), vec)
    model_fn = case.model_fn if vmap_over_data else batched(case.model_fn)
    options = dict(vmap_over_data=vmap_over_data, linearize=linearize, num_total_samples=1)
    assert_close(create_ggn_mv(model_fn, case.params, data, loss, **options)(vec), expected)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "binary_cross_entropy", "none"])
def test_laplax_product(loss):
    curv = pytest.importorskip("laplax.curv.ggn", reason=WHY.format("laplax"))
    case, data = model_case("mlp"), data_case("mlp", loss)
    vec, options = random_like(case.params), dict(num_curv_samples=3, num_total_samples=12)
    with lenient():
        expected = curv.create_ggn_mv(case.model_fn, case.params, data, loss, **options)(vec)
    assert_close(create_ggn_mv(case.model_fn, case.params, data, loss, **options)(vec), expected)


@pytest.mark.parametrize("loss", ["mse", "cross_entropy", "binary_cross_entropy", "none"])
def test_laplax_loss_hessian(loss):
    """laplax takes the cross-entropy of one vector of logits."""
    curv = pytest.importorskip("laplax.curv.ggn", reason=WHY.format("laplax"))
    rng = np.random.default_rng(0)
    f, v = jnp.asarray(rng.standard_normal(4)), jnp.asarray(rng.standard_normal(4))
    with lenient():
        expected = curv.create_loss_hessian_mv(loss)(v, pred=f, target=None)
    assert_close(create_loss_hessian_mv(loss)(v, pred=f, target=None), expected)


def test_laplax_custom_loss():
    curv = pytest.importorskip("laplax.curv.ggn", reason=WHY.format("laplax"))
    rng = np.random.default_rng(1)
    params, x = jnp.asarray(rng.standard_normal((3, 2))), jnp.asarray(rng.standard_normal((4, 3)))
    data, loss = {"input": x, "target": x[:, :2]}, lambda f, y: jnp.sum((f - y) ** 4) + jnp.prod(f)
    with lenient():
        expected = curv.create_ggn_mv(linear, params, data, loss)(params)
    assert_close(create_ggn_mv(linear, params, data, loss)(params), expected)
