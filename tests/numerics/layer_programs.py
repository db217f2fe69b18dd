"""Small programs for the tests of the layers: a use of weights, how the weights are stored, and what is around the use."""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

D = 4  # all programs take and return vectors of so many numbers


def fixed(*shape, seed=0):
    """Numbers that are no parameters."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def out(y):
    """D numbers of the entries of `y`, mixed."""
    y = y.reshape(-1)
    return jnp.tanh(y @ fixed(y.size, D) / np.sqrt(y.size))


# --- uses: (shapes of the weights, (h, *weights) -> h, the rule that reads the first weight)


class Use(NamedTuple):
    shapes: tuple
    fn: Callable
    rule: str  # of the first weight, where it is stored so that it can be read


def einsum(formula, *shape, x=(2, 2)):
    def fn(h, w):
        a = h.reshape(x) if prod(x) == D else fixed(*x) * h[0]
        return out(jnp.einsum(formula, a, w))

    return Use((shape,), fn, "dense")


def conv(kernel, x, spec, strides=None, padding="SAME", **options):
    """A convolution of h as an image of shape `x`."""
    rank = len(kernel) - 2

    def fn(h, w):
        image = jnp.resize(h, x) * fixed(*x, seed=1)
        y = lax.conv_general_dilated(image, w, strides or (1,) * rank, padding, dimension_numbers=spec, **options)
        return out(y)

    return Use((kernel,), fn, "convolution" if options.get("batch_group_count", 1) == 1 else "")


def conv_transpose(kernel, x, **options):
    def fn(h, w):
        return out(lax.conv_transpose(jnp.resize(h, x) * fixed(*x), w, **options))

    return Use((kernel,), fn, "convolution")


def tokens(h):
    """Some of these are no rows of a table of 3, some of them are the same."""
    return jnp.floor(8 * jnp.abs(h)).astype(int) % 6 - 1


def embedding(**options):
    return Use(((3, 2),), lambda h, w: out(w.at[tokens(h)].get(**options) * h[:, None]), "embedding")


def norm(h, scale, shift=None):
    h = h - jnp.mean(h) if shift is not None else h
    h = h / jnp.sqrt(jnp.mean(h**2) + 1e-3) * scale
    return h if shift is None else h + shift


def attention(h, wq, wk, wv):
    x = h.reshape(2, 2) @ fixed(2, 3)
    q, k, v = (jnp.einsum("td,dhk->thk", x, w) for w in (wq, wk, wv))
    a = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k))
    return out(jnp.einsum("hts,shk->thk", a, v))


USES = {
    "vector": Use(((D, D),), lambda h, w: jnp.tanh(h @ w), "dense"),
    "transposed": Use(((3, D),), lambda h, w: out(w @ h), "dense"),
    "positions": Use(((2, 3),), lambda h, w: out(h.reshape(2, 2) @ w), "dense"),
    "left": Use(((3, 2),), lambda h, w: out(w @ h.reshape(2, 2)), "dense"),
    "einsum ab,bc->ca": einsum("ab,bc->ca", 2, 3),
    "einsum ab,cb->ac": einsum("ab,cb->ac", 3, 2),
    "einsum ab,cab->c": einsum("ab,cab->c", 3, 2, 2),
    "einsum ab,bac->c": einsum("ab,bac->c", 2, 2, 3),
    "einsum ab,acb->ac": einsum("ab,acb->ac", 2, 3, 2),
    "einsum ab,abc->cba": einsum("ab,abc->cba", 2, 2, 3),
    "einsum abc,cdb->da": einsum("abc,cdb->da", 2, 3, 3, x=(2, 3, 2)),
    "einsum abcd,bed->ecab": einsum("abcd,bed->ecab", 2, 3, 2, x=(2, 2, 3, 2)),
    "einsum ab,ab->b": einsum("ab,ab->b", 2, 2),
    "einsum a,b->ab": Use(((3,),), lambda h, w: out(jnp.einsum("a,b->ab", h, w)), "dense"),
    "vmap": Use(((2, 3),), lambda h, w: out(jax.vmap(lambda x: x @ w)(h.reshape(2, 2))), "dense"),
    "vmap out": Use(((3, 2),), lambda h, w: out(jax.vmap(lambda x: w @ x, 1, 1)(h.reshape(2, 2))), "dense"),
    "experts": Use(((2, 2, 3),), lambda h, w: out(jax.vmap(jnp.matmul)(h.reshape(2, 2), w)), "dense"),
    "two layers": Use(((D, 3), (3, D), (3,)), lambda h, w, v, b: jnp.tanh(jnp.sin(h @ w + b) @ v), "dense"),
    "lstm": Use(
        ((D, 8), (2, 8), (8,)),
        lambda h, w, u, b: out(jnp.tanh(jnp.split(h @ w + h[:2] @ u + b, 4)[0]) * jnp.split(h @ w, 4)[1]),
        "dense",
    ),
    "glu": Use(((D, 3), (3, 8)), lambda h, w, v: out(jax.nn.sigmoid(h @ v.T[:D]) * (h @ w)), "dense"),
    "attention": Use(((3, 2, 2),) * 3, attention, "dense"),
    "bias": Use(((D,),), lambda h, b: jnp.tanh(h + b), ""),
    "dense bias": Use(((D, 3), (3,)), lambda h, w, b: out(h @ w + b), "dense"),
    "bias of positions": Use(((2, 3), (3,)), lambda h, w, b: out(h.reshape(2, 2) @ w + b[None]), "dense"),
    "bias of columns": Use(((3, 2), (3, 1)), lambda h, w, b: out(w @ h.reshape(2, 2) + b), "dense"),
    "bias of heads": Use(
        ((2, 3, 2), (3, 1, 2)), lambda h, w, b: out(jnp.einsum("td,dhk->htk", h.reshape(2, 2), w) + b), "dense"
    ),
    "bias of heads, moved": Use(
        ((2, 3, 2), (2, 3)), lambda h, w, b: out(jnp.einsum("td,dhk->kth", h.reshape(2, 2), w) + b[:, None]), "dense"
    ),
    "bias of experts": Use(
        ((2, 2, 3), (2, 1, 3)), lambda h, w, b: out(jax.vmap(jnp.matmul)(h.reshape(2, 1, 2), w) + b), "dense"
    ),
    "bias of filters": Use(
        ((3, 2, 2), (3, 1)), lambda h, w, b: out(lax.conv(h.reshape(1, 2, 2), w, (1,), "SAME")[0] + b), "convolution"
    ),
    "bias of groups": Use(
        ((2, 1, 4), (4,)),
        lambda h, w, b: out(
            lax.conv_general_dilated(
                h.reshape(1, 2, 2), w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2
            )
            + b[None, None]
        ),
        "convolution",
    ),
    "bias after reshape": Use(((D, 6), (3, 2)), lambda h, w, b: out((h @ w).reshape(2, 3).T + b), "dense"),
    "bias after scale": Use(((D, 3), (3,)), lambda h, w, b: out(2 * (h @ w) + b), "dense"),
    "bias before scale": Use(((D, 3), (3,)), lambda h, w, b: out(-2 * (h @ w + b)), "dense"),
    "scaled bias": Use(((D, 3), (3,)), lambda h, w, b: out(h @ w - 3 * b), "dense"),
    "scaled bias added": Use(((D, 3), (3,)), lambda h, w, b: out(h @ (w / 3) + 3 * b), "dense"),
    "bias of scaled": Use(((D, 3), (3,)), lambda h, w, b: out(h @ (2 * w) + b), "dense"),
    "subtracted": Use(((D, 3), (3,)), lambda h, w, b: out(b - h @ w), "dense"),
    "bias of a sum": Use(((D, 3), (2, 3), (3,)), lambda h, w, u, b: out(h @ w + (h[:2] @ u + b)), "dense"),
    "bias at positions": Use(((2, 3), (2, 3)), lambda h, w, b: out(h.reshape(2, 2) @ w + b), "dense"),
    "bias of one": Use(((D, 3), (1,)), lambda h, w, b: out(h @ w + b), "dense"),
    "wider bias": Use(((2, 3), (2, 3)), lambda h, w, b: out(h[None, :2] @ w + b), "dense"),
    "bias of wider": Use(((2, 3), (3,)), lambda h, w, b: out(h[None, :2] @ w + h[:2, None] + b[None]), "dense"),
    "output used twice": Use(((D, 3), (3,)), lambda h, w, b: out(h @ w + b) + jnp.sin(h @ w)[0], "dense"),
    "output used before": Use(
        ((D, 3), (3,)), lambda h, w, b: (lambda y: out(y + b) + jnp.sin(y)[0])(h @ w), "dense"
    ),
    "two biases": Use(((D, 3), (3,), (3,)), lambda h, w, b, c: out(h @ w + b + c), "dense"),
    "shared bias": Use(((D, 3), (3, 3), (3,)), lambda h, w, v, b: out(jnp.tanh(h @ w + b) @ v + b), "dense"),
    "bias is weight": Use(((D, 3), (3, 3)), lambda h, w, v: out(jnp.tanh(h @ w + v[0]) @ v), "dense"),
    "shared weight": Use(((D, D), (D,), (D,)), lambda h, w, b, c: out(jnp.sin(h @ w + b) @ w + c), "dense"),
    "bias in a function": Use(
        ((D, 3), (3,)), lambda h, w, b: out(jax.jit(jnp.add)(jax.jit(jnp.matmul)(h, w), b)), "dense"
    ),
    "bias of a table": Use(((3, 2), (2,)), lambda h, w, b: out(w[tokens(h)] + b[None]), "embedding"),
    "broadcast bias": Use(((2,),), lambda h, b: out(jnp.sin(h.reshape(2, 2) + b[None])), ""),
    "number": Use(((),), lambda h, b: jnp.tanh(h - b), ""),
    "scale": Use(((2, 1),), lambda h, s: out(h.reshape(2, 2) * s), "scale"),
    "layer norm": Use(((D,), (D,)), norm, "scale"),
    "RMS norm": Use(((D,),), norm, "scale"),
    "take": Use(((3, 2),), lambda h, w: out(jnp.take(w, tokens(h) % 6 - 3, axis=0) * h[:, None]), "embedding"),
    "take along 1": Use(((2, 3),), lambda h, w: out(jnp.take(w, tokens(h) % 6 - 3, axis=1) * h[:2, None]), "embedding"),
    "fill": embedding(mode="fill", fill_value=0.0),
    "fill with 1": embedding(mode="fill", fill_value=1.0),
    "clip": embedding(mode="clip"),
    "rows": Use(((3,),), lambda h, w: out(w[tokens(h)]), "embedding"),
    "one row": Use(((3, D),), lambda h, w: jnp.tanh(w[tokens(h)[0]] * h), "embedding"),
    "each row": Use(((3, 2),), lambda h, w: out(jax.vmap(lambda i: w[i])(tokens(h))), "embedding"),
    "window": Use(((5, 2),), lambda h, w: out(lax.dynamic_slice_in_dim(w, tokens(h)[0], 2)), "embedding"),
    "window along 1": Use(((2, 5),), lambda h, w: out(lax.dynamic_slice_in_dim(w, tokens(h)[0], 2, 1)), "embedding"),
    "windows": Use(
        ((5, 2),), lambda h, w: out(jax.vmap(lambda i: lax.dynamic_slice_in_dim(w, i, 2))(tokens(h))), "embedding"
    ),
    "entries": Use(((3, 2),), lambda h, w: out(w[tokens(h), tokens(h[::-1]) % 2]), ""),
    "one hot": Use(((3, 2),), lambda h, w: out(jax.nn.one_hot(tokens(h), 3) @ w), "dense"),
    "conv 1": conv((3, 2, 3), (1, 4, 2), ("NHC", "HIO", "NHC")),
    "conv 1 strides": conv((2, 2, 1), (2, 5, 2), ("NHC", "HIO", "NHC"), (2,), [(1, 2)]),
    "conv 1 dilated": conv((3, 2, 2), (1, 2, 4), ("NCH", "OIH", "NCH"), padding=[(2, 2)], rhs_dilation=(2,)),
    "conv 1 stretched": conv((3, 2, 2), (1, 2, 4), ("NCH", "OIH", "NCH"), padding=[(1, 0)], lhs_dilation=(2,)),
    "conv 1 cropped": conv((2, 1, 2), (1, 5, 1), ("NHC", "HIO", "NHC"), padding=[(-1, -1)]),
    "conv 2": conv((2, 2, 1, 2), (1, 3, 3, 1), ("NHWC", "HWIO", "NHWC")),
    "conv 2 all": conv((2, 3, 2, 3), (2, 3, 4, 2), ("NHWC", "HWIO", "NHWC"), (1, 2), [(1, 0), (2, 1)], rhs_dilation=(1, 2)),
    "conv 2 order": conv((3, 2, 2, 1), (3, 1, 2, 3), ("HCNW", "OHWI", "WNHC"), padding="VALID"),
    "conv 2 groups": conv((2, 1, 2, 4), (1, 2, 2, 4), ("NHWC", "HWIO", "NHWC"), feature_group_count=2),
    "conv 2 depthwise": conv((2, 2, 1, 2), (1, 3, 2, 2), ("NHWC", "HWIO", "NHWC"), feature_group_count=2),
    "conv 2 batch groups": conv((2, 2, 2, 2), (2, 2, 2, 2), ("NHWC", "HWIO", "NHWC"), batch_group_count=2),
    "conv 3": conv((2, 1, 2, 1, 2), (1, 2, 2, 2, 1), ("NDHWC", "DHWIO", "NDHWC")),
    "conv per image": Use(
        ((2, 2, 1, 2),),
        lambda h, w: out(
            jax.vmap(lambda x, w: lax.conv(x[None, None], w[..., None], (1, 1), "SAME"))(jnp.tile(h, 2).reshape(2, 2, 2), w)
        ),
        "convolution",
    ),
    "transposed conv": conv_transpose((3, 1, 2), (1, 3, 1), strides=(2,), padding="SAME", dimension_numbers=("NHC", "HIO", "NHC")),
    "transposed kernel": conv_transpose(
        (3, 2, 1), (1, 3, 1), strides=(2,), padding="VALID", dimension_numbers=("NHC", "HIO", "NHC"), transpose_kernel=True
    ),
    "filter is input": Use(
        ((1, 1, 4),), lambda h, w: out(lax.conv_general_dilated(w, h[None, None, :2], (1,), "VALID")), ""
    ),
    "square": Use(((3, D),), lambda h, w: jnp.tanh(w.T @ (w @ h)), "dense"),
    "tied": Use(((3, 2),), lambda h, w: out(w.at[tokens(h)].get(mode="clip") @ w.T), "both"),
    "overlapping": Use(((D, 3),), lambda h, w: out(jnp.concatenate([h[:3] @ w[:3], h[1:] @ w[1:]])), "dense"),
    "disjoint": Use(((D, 3),), lambda h, w: out(jnp.concatenate([h[:2] @ w[:2], h[2:] @ w[2:]])), "dense"),
    "meets both": Use(((2, 2),), lambda h, w: out(h.reshape(2, 2) @ w + w), ""),
    "complex": Use(((2, D),), lambda h, w: out(jnp.imag(lax.dot(w, lax.complex(h, jnp.sin(h))))), ""),
    "as complex": Use(((D, 3),), lambda h, w: out(jnp.abs(lax.complex(h, 2 * h) @ w.astype(complex))), ""),
    "inverse": Use(((2, 2),), lambda h, w: out(jnp.linalg.solve(w + 3 * jnp.eye(2), h[:2])), ""),
    "whole": Use(((2, 2),), lambda h, w: out(w) * h, ""),
    "unused": Use(((3,), (D,)), lambda h, w, b: jnp.tanh(h + b), "unused"),
    "cut off": Use(((3,), (D,)), lambda h, w, b: jnp.tanh(h + b) + lax.stop_gradient(jnp.sum(w)), "unused"),
}


# --- how a weight is stored: (shape of the leaf, leaf -> weight, may the weight be read still?)


class Stored(NamedTuple):
    shapes: Callable  # shape of the weight -> shapes of leaves
    weight: Callable  # (shape, *leaves) -> weight
    is_view: bool


def number_of(w):
    return jnp.sin(jnp.asarray(w.size, float))


STORED = {
    "as it is": Stored(lambda s: (s,), lambda s, w: w, True),
    "transposed": Stored(lambda s: (s[::-1],), lambda s, w: w.T, True),
    "flat": Stored(lambda s: ((prod(s),),), lambda s, w: w.reshape(s), True),
    "padded": Stored(lambda s: ((2, *(n + 1 for n in s)),), lambda s, w: w[(1, *(slice(1, None) for _ in s))], True),
    "every other": Stored(lambda s: (tuple(2 * n for n in s),), lambda s, w: lax.slice(w, (0,) * w.ndim, w.shape, (2,) * w.ndim), True),
    "reversed": Stored(lambda s: (s,), lambda s, w: jnp.flip(w), True),
    "split": Stored(lambda s: ((3, *s),), lambda s, w: jnp.split(w, 3)[1].reshape(s), True),
    "unstacked": Stored(lambda s: ((2, *s),), lambda s, w: jnp.moveaxis(w, 0, -1)[..., 1], True),
    "scaled": Stored(lambda s: (s,), lambda s, w: w * number_of(w), True),
    "divided": Stored(lambda s: (s,), lambda s, w: -(w / 3) / number_of(w), True),
    "negated": Stored(lambda s: (s,), lambda s, w: -w, True),
    "compiled": Stored(lambda s: (s[::-1],), lambda s, w: jax.jit(lambda w: 2 * jnp.transpose(w))(w), True),
    "masked": Stored(lambda s: (s,), lambda s, w: w * jnp.sign(fixed(*s) - 0.5), False),
    "masked by where": Stored(lambda s: (s,), lambda s, w: jnp.where(fixed(*s) > 0, w, 0.5), False),
    "sum": Stored(lambda s: (s, s), lambda s, w, v: w + v, False),
    "twice": Stored(lambda s: (s,), lambda s, w: jnp.sin(w) + w, False),
    "low rank": Stored(
        lambda s: (s, (prod(s), 1), (1, 2)), lambda s, w, a, b: w + (a @ b).sum(axis=1).reshape(s), False
    ),
    "weight norm": Stored(lambda s: (s, ()), lambda s, w, g: w * (g / jnp.sqrt(jnp.sum(w**2) + 0.1)), False),
    "stacked": Stored(lambda s: (s, s), lambda s, w, v: jnp.stack([w, v])[1] + 0 * w, False),
    "repeated": Stored(lambda s: ((1, *s),), lambda s, w: jnp.broadcast_to(w, (2, *s))[1], False),
}


# --- what is around a use: (how many copies of the weights, (f, h, weights) -> h, may they be read still?)


class Around(NamedTuple):
    copies: int  # 0: the weights as they are
    fn: Callable  # (f(h, weights), h, weights) -> h
    is_clear: bool = True


def by_custom_jvp(f, h, p):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return g(h, p)


def by_custom_vjp(f, h, p):
    g = jax.custom_vjp(f)
    g.defvjp(lambda h, p: jax.vjp(f, h, p), lambda vjp, c: vjp(c))
    return g(h, p)


def cond(f, h, p):
    return lax.cond(h[0] > 0, lambda: f(h, p), lambda: f(h[::-1], p))


def scan(f, h, p, **options):
    return lax.scan(lambda h, p: (f(h, p), None), h, p, **options)[0]


def shared(f, h, p, **options):
    return lax.scan(lambda h, x: (f(h + x, p), h), h, fixed(2, D), **options)[0]


def nested(f, h, p):
    """Stacked inside of shared."""
    return shared(lambda h, p: scan(f, h, p), h, p)


def nested_too(f, h, p):
    """Shared inside of stacked, of stacked."""
    p = jax.tree.map(lambda a: a[:, None], p)
    return scan(lambda h, p: scan(lambda h, p: shared(f, h, p), h, p), h, p)


def grid(f, h, p):
    """Stacked over two axes, the inner one transposed to be the outer."""
    p = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]).swapaxes(0, 1), p)
    return scan(lambda h, p: scan(f, h, p, reverse=True), h, p)


def while_loop(f, h, p):
    return lax.fori_loop(0, 2, lambda i, h: f(h * (i + 1.0), p), h)


def layer_of_loop(f, h, p):
    return lax.fori_loop(0, 2, lambda i, h: f(h, jax.tree.map(lambda a: a[i], p)), h)


def in_carry(f, h, p):
    return lax.scan(lambda c, x: ((f(c[0] + x, c[1]), c[1]), None), (h, p), fixed(2, D))[0][0]


AROUND = {
    "nothing": Around(0, lambda f, h, p: f(h, p)),
    "jit": Around(0, lambda f, h, p: jax.jit(f)(h, p)),
    "nested jit": Around(0, lambda f, h, p: jax.jit(lambda h, p: jax.jit(f)(jnp.sin(h), p))(h, p)),
    "checkpoint": Around(0, lambda f, h, p: jax.checkpoint(f)(h, p)),
    "custom_jvp": Around(0, by_custom_jvp),
    "custom_vjp": Around(0, by_custom_vjp, False),
    "cond": Around(0, cond, False),
    "used twice": Around(0, lambda f, h, p: f(f(h, p), p)),
    "residual": Around(0, lambda f, h, p: h + f(jnp.cos(h), p)),
    "unrolled": Around(2, lambda f, h, p: f(f(h, jax.tree.map(lambda a: a[0], p)), jax.tree.map(lambda a: a[1], p))),
    "scan": Around(2, scan),
    "reversed scan": Around(2, partial(scan, reverse=True)),
    "unrolled scan": Around(2, partial(scan, unroll=2)),
    "shared scan": Around(0, shared),
    "reversed shared scan": Around(0, partial(shared, reverse=True)),
    "checkpoint in scan": Around(2, lambda f, h, p: scan(jax.checkpoint(f), h, p)),
    "checkpoint around scan": Around(2, lambda f, h, p: jax.checkpoint(lambda h, p: scan(f, h, p))(h, p)),
    "checkpoint twice": Around(2, lambda f, h, p: jax.checkpoint(lambda h, p: scan(jax.checkpoint(f), h, p))(h, p)),
    "nested scans": Around(2, nested),
    "nested scans too": Around(2, nested_too),
    "grid of scans": Around(4, grid),
    "fori_loop": Around(0, while_loop),
    "layer of a loop": Around(2, layer_of_loop, False),
    "in the carry": Around(0, in_carry, False),
    "vmap": Around(0, lambda f, h, p: out(jax.vmap(f, (0, None))(jnp.stack([h, jnp.sin(h)]), p))),
    "map": Around(0, lambda f, h, p: out(lax.map(lambda h: f(h, p), jnp.stack([h, jnp.sin(h)])))),
}


class Program(NamedTuple):
    use: str
    stored: str
    around: str

    def shapes(self):
        """Of the leaves, for each weight."""
        copies = AROUND[self.around].copies
        front = (copies,) if copies else ()
        return tuple(tuple((*front, *s) for s in STORED[self.stored].shapes(shape)) for shape in USES[self.use].shapes)

    def __call__(self, h, params):
        use, stored = USES[self.use], STORED[self.stored]

        def f(h, params):
            return use.fn(h, *(stored.weight(s, *leaves) for s, leaves in zip(use.shapes, params, strict=True)))

        return AROUND[self.around].fn(f, h, params)

    def rule(self):
        """What reads the first leaf; "": not known."""
        readable = STORED[self.stored].is_view and AROUND[self.around].is_clear
        return USES[self.use].rule if readable else ""
