"""A user's mistakes, which a type checker finds before anything runs: one on each marked line."""

import jax.numpy as jnp
from ggn_nb import create_fisher_mv, create_ggn_mv, create_hessian_mv

params, data = jnp.ones(2), {"input": jnp.ones((3, 2)), "target": jnp.ones(3)}
model = lambda input, params: input @ params
create_ggn_mv(model, params, data, "mse", reduction="max")  # error
create_ggn_mv(model, params, data, "mse", batchsize=2)  # error
create_ggn_mv(model, params, data, "mse", linearize="never")  # error
create_hessian_mv(model, params, data, "mse", batch_size="2")  # error
create_fisher_mv(model, params, data, "mse", kind="true")  # error
create_ggn_mv(model, params, data, "mse").matmul(params)  # error
create_ggn_mv(model, params, 3, "mse")  # error
