"""A user's script: type checkers have nothing to say about it, and it runs."""

import jax
import jax.numpy as jnp
from ggn_nb import (
    Diagonal,
    Operator,
    SquareRoot,
    Stream,
    create_fisher_mv,
    create_ggn_mv,
    create_ggn_mv_without_data,
    create_hessian_mv,
    create_loss,
    register_operator,
    select_params,
    square_root,
    static_field,
    verify,
)
from ggn_nb.losses import cross_entropy, mse


def model(input: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    return input @ params["w"]


params = {"w": jnp.ones((3, 2))}
data = {"input": jnp.ones((4, 3)), "target": jnp.zeros(4, int)}
G = create_ggn_mv(model, params, data, "cross_entropy", reduction="mean", batch_size=2, linearize="cached")
H = create_hessian_mv(model, params, data, cross_entropy(label_smoothing=0.1), num_total_samples=100)
F = create_fisher_mv(model, params, Stream([data]), "cross_entropy", kind="monte_carlo", key=jax.random.key(0))
mv = create_ggn_mv_without_data(model, params, mse(), 1.0)
both: Operator = (0.5 * G + H).damped({"w": 1.0})
shape: tuple[int, int] = both.shape
dense: jax.Array = F.flat().dense()
product = both @ params
root: SquareRoot = square_root(G)
columns = root.T(params)
same: SquareRoot = root.T.T
sizes: tuple[int, int] = root.T.shape


@register_operator
class Power(Operator):
    entries: jax.Array
    exponent: int = static_field(default=2)

    @property
    def structure(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(self.entries.shape, self.entries.dtype)

    def multiply(self, vec: jax.Array) -> jax.Array:
        return self.entries**self.exponent * vec


def solve(A: Operator, b: object) -> object:
    return A(b)


solve(Power(jnp.ones(2), exponent=3), jnp.ones(2))
for operator in (G, F, Diagonal(params), mv.bind(data | {"target": jnp.zeros((4, 2))})):
    solve(operator, params)
print(verify(G).passed, verify("mse", jnp.ones(2)))
print(select_params(model, params, "w"), create_loss("huber", delta=2.0))
