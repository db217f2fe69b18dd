"""The kinds of Fisher matrices: draws by any key, losses that are no likelihoods, weighted heads, and targets that nobody reads."""

from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from jax.flatten_util import ravel_pytree

from ggn_nb import CustomLoss, Stream, create_fisher_mv, create_fisher_mv_without_data, create_ggn_mv, create_loss, multi_head
from ggn_nb.losses import registered_losses
from ggn_nb.tools.testing import assert_close

N = 7
X = random.normal(random.key(0), (N, 3))
W = random.normal(random.key(1), (3, 4))
LABELS = jnp.array([0, 1, 2, 3, 2, 1, 0])
DATA = {"input": X, "target": LABELS, "weight": jnp.linspace(0.5, 2.0, N), "index": jnp.arange(N) * 5 + 2}
KEYS = {
    "threefry": random.key(3),
    "rbg": random.key(3, impl="rbg"),
    "unsafe_rbg": random.key(3, impl="unsafe_rbg"),
    "raw threefry": random.key_data(random.key(3)),
    "raw rbg": random.key_data(random.key(3, impl="rbg")),
    "raw, NumPy": np.asarray(random.key_data(random.key(3))),
}


def linear(input, params): return input @ params


def sampled(key, data=DATA, loss="cross_entropy", **options):
    return create_fisher_mv(linear, W, data, loss, kind="monte_carlo", key=key, num_samples=2, **options)


def rows(data, which): return jax.tree.map(lambda a: a[jnp.asarray(which)], data)


# Keys


@pytest.mark.parametrize("name", KEYS)
def test_draws_depend_on_key_and_index_alone(name):
    """Sample i draws by the key and its index, however the samples are cut and ordered. RBG's keys under vmap do not do so by themselves."""
    key = KEYS[name]
    want = sampled(key).dense()
    for batch_size in (1, 3): assert_close(sampled(key, batch_size=batch_size).dense(), want)
    turned = rows(DATA, [4, 2, 6, 0, 1, 5, 3])
    assert_close(sampled(key, turned, batch_size=2).dense(), want)
    stream = Stream([rows(DATA, part) for part in ([6], [5, 4, 3], [2, 1], [0])])
    assert_close(sampled(key, stream).dense(), want)
    whole = create_fisher_mv(linear, W, DATA, "cross_entropy", kind="monte_carlo", key=key, num_samples=2, vmap_over_data=False)
    assert_close(whole.dense(), want)


@pytest.mark.parametrize("name", KEYS)
def test_draws_of_each_sample_are_its_own(name):
    """The matrix is the sum of those of the single samples, each alone with its index; and other indices draw otherwise."""
    alone = sum(sampled(KEYS[name], rows(DATA, [i])).dense() for i in range(N))
    assert_close(sampled(KEYS[name]).dense(), alone)
    moved = sampled(KEYS[name], DATA | {"index": DATA["index"] + 1}).dense()
    assert float(jnp.linalg.norm(moved - alone)) > 0.1


@pytest.mark.parametrize("name", KEYS)
def test_keys_may_be_traced(name):
    key = jnp.asarray(KEYS[name])
    by_key = jax.jit(lambda key, batch_size: sampled(key, batch_size=batch_size)(W), static_argnums=1)
    for batch_size in (None, 2): assert_close(by_key(key, batch_size), sampled(key)(W))


def test_a_generator_that_is_the_default_of_jax():
    default = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", "rbg")
    try:
        for key in (random.key(3), random.PRNGKey(3)): assert_close(sampled(key, batch_size=2).dense(), sampled(KEYS["rbg"]).dense())
        assert_close(sampled(KEYS["threefry"]).dense(), sampled(KEYS["raw threefry"]).dense())
    finally:
        jax.config.update("jax_default_prng_impl", default)


def test_keys_differ():
    """All words of a key count, and the mean over many draws is the exact matrix, whatever the generator."""
    words = np.array([1, 2, 3, 4], np.uint32)
    found = [sampled(words + np.eye(4, dtype=np.uint32)[i]).dense() for i in range(4)] + [sampled(words).dense()]
    for i, a in enumerate(found):
        for b in found[:i]: assert float(jnp.linalg.norm(a - b)) > 0.1
    exact = create_fisher_mv(linear, W, DATA, "cross_entropy").dense()
    for key in (KEYS["rbg"], KEYS["unsafe_rbg"]):
        many = create_fisher_mv(linear, W, DATA, "cross_entropy", kind="monte_carlo", key=key, num_samples=20_000).dense()
        assert float(jnp.linalg.norm(many - exact) / jnp.linalg.norm(exact)) < 0.02


def test_samplers_that_want_threefry_get_it():
    """JAX draws Poisson numbers with Threefry keys alone."""
    assert_close(sampled(KEYS["rbg"], DATA | {"target": None}, "poisson", batch_size=2).dense(),
                 sampled(KEYS["rbg"], DATA | {"target": None}, "poisson").dense())


WRONG_KEYS = {
    "none": (None, ValueError, "got None"), "an integer": (0, TypeError, "got 0"), "text": ("0", TypeError, "got '0'"),
    "several": (random.split(random.key(0), 3), ValueError, r"got shape \(3,\)"),
    "several raw": (random.key_data(random.split(random.key(0), 3)), ValueError, r"got shape \(3, 2\)"),
    "three words": (jnp.zeros(3, jnp.uint32), ValueError, r"got shape \(3,\)"),
    "floats": (jnp.zeros(2), TypeError, "got dtype float64"), "other integers": (np.zeros(2, np.int32), TypeError, "got dtype int32"),
}


@pytest.mark.parametrize("name", WRONG_KEYS)
def test_wrong_keys(name):
    key, error, message = WRONG_KEYS[name]
    with pytest.raises(error, match=f"^key: {message}.*expected one JAX random key"): sampled(key)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_what_draws_need_is_refused_where_nothing_is_drawn(kind):
    make = partial(create_fisher_mv, linear, W, DATA, "cross_entropy", kind=kind)
    with pytest.raises(ValueError, match=f"^key: got a key, expected None.*kind='{kind}'"): make(key=random.key(0))
    with pytest.raises(ValueError, match="^num_samples: got 3, expected 1"): make(num_samples=3)


def test_numbers_of_samples():
    want = sampled(KEYS["threefry"]).dense()
    make = partial(create_fisher_mv, linear, W, DATA, "cross_entropy", kind="monte_carlo", key=KEYS["threefry"])
    for two in (np.int64(2), np.uint8(2), jnp.array(2)): assert_close(make(num_samples=two).dense(), want)
    for wrong, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(error, match=f"^num_samples: got {wrong!r}"): make(num_samples=wrong)


# Losses that are no likelihoods

NO_LIKELIHOODS = {
    "class weights": lambda: create_loss("cross_entropy", class_weight=jnp.array([1.0, 2.0, 3.0, 4.0])),
    "smoothing": lambda: create_loss("cross_entropy", label_smoothing=0.1),
    "pos_weight": lambda: create_loss("binary_cross_entropy", pos_weight=3.0),
    "weights of labels": lambda: create_loss("binary_cross_entropy", class_weight=3.0),
    "none": lambda: create_loss("none"),
    "function": lambda: create_loss(lambda f, y: (f - y) ** 2),
}


@pytest.mark.parametrize("name", NO_LIKELIHOODS)
def test_losses_that_are_no_likelihoods_are_refused(name):
    """A loss scaled by w has scores scaled by w, and their second moment would be w² F."""
    for loss in (NO_LIKELIHOODS[name](), multi_head({"a": "mse", "b": multi_head([NO_LIKELIHOODS[name]()])}, {"a": 2.0, "b": 1.0})):
        for given in ({"kind": "monte_carlo", "key": random.key(0)}, {"kind": "exact"}):
            with pytest.raises(ValueError, match=f"^kind: got '{given['kind']}', expected .*no negative log-likelihood.*create_ggn_mv"):
                create_fisher_mv_without_data(linear, W, loss, 1.0, **given)


@pytest.mark.parametrize("name, remedy", [("huber", "curvature='fisher'"), ("gamma", "curvature='fisher'"), ("student_t", "curvature='fisher'")])
def test_exact_names_a_remedy_that_works(name, remedy):
    data = {"input": X, "target": None}
    model = (lambda input, params: jax.nn.softplus(input @ params)) if name == "gamma" else linear
    loss = create_loss(name, curvature="hessian")
    with pytest.raises(ValueError, match=f"take its {remedy}, or kind='monte_carlo'"): create_fisher_mv(model, W, data, loss)
    create_fisher_mv(model, W, data, create_loss(name, curvature="fisher"))(W)
    create_fisher_mv(model, W, data, loss, kind="monte_carlo", key=random.key(0))(W)


def test_a_custom_likelihood_is_sampled():
    normal = CustomLoss(lambda f, y: jnp.sum((f - y) ** 2) / 2, sampler=lambda key, f: f + random.normal(key, f.shape, f.dtype))
    F = create_fisher_mv(linear, W, {"input": X, "target": None}, normal, kind="monte_carlo", key=random.key(0), num_samples=20_000)
    exact = np.kron(X.T @ X, np.eye(4))
    assert np.linalg.norm(F.dense() - exact) < 0.03 * np.linalg.norm(exact)


# Heads with weights

HEADS = multi_head({"a": "cross_entropy", "b": multi_head(["binary_cross_entropy", "mse"], [1.0, 4.0])}, {"a": 3.0, "b": 0.25})


def heads(input, params):
    f = jnp.tanh(input @ params)
    return {"a": f[:2], "b": [f[2:3] * f[:1], f[3:]]}


def scores(i, values):
    "∇ℓ of each head of sample i in the parameters, from the definition of each density"
    (label, bit, number), x = values, X[i]
    logs = [lambda p: -jax.nn.log_softmax(heads(x, p)["a"])[label],
            lambda p: jax.nn.softplus((1 - 2 * bit) * heads(x, p)["b"][0][0]),
            lambda p: (heads(x, p)["b"][1][0] - number) ** 2]
    return [jax.grad(log)(W).ravel() for log in logs]


def probability(i, values):
    "Of targets of sample i; the normal density with variance ½ by three points, exact for polynomials up to degree 5"
    (label, bit, number), pred = values, heads(X[i], W)
    p = jax.nn.sigmoid(pred["b"][0][0])
    at_mean = jnp.abs(number - pred["b"][1][0]) < 1e-6
    return jax.nn.softmax(pred["a"])[label] * jnp.where(bit == 1, p, 1 - p) * jnp.where(at_mean, 2 / 3, 1 / 6)


def test_weighted_heads_have_the_fisher_matrix_of_each_times_its_weight():
    """The mean over all targets, of each head by itself: Σ c E[g gᵀ]. And both kinds, exactly and by draws, against it."""
    want, scales = 0.0, (3.0, 0.25 * 1.0, 0.25 * 4.0)
    for i in range(3):
        mean = heads(X[i], W)["b"][1][0]
        for values in product((0, 1), (0, 1), (mean - np.sqrt(1.5), mean, mean + np.sqrt(1.5))):
            terms = [c * jnp.outer(g, g) for c, g in zip(scales, scores(i, values), strict=True)]
            want = want + probability(i, values) * sum(terms)
    data = {"input": X[:3], "target": None}
    exact = create_fisher_mv(heads, W, data, HEADS).dense()
    assert_close(exact, want)
    assert_close(exact, create_ggn_mv(heads, W, data, HEADS).dense())
    drawn = create_fisher_mv(heads, W, data, HEADS, kind="monte_carlo", key=random.key(2), num_samples=40_000).dense()
    assert float(jnp.linalg.norm(drawn - want) / jnp.linalg.norm(want)) < 0.03


def test_one_weighted_head_draws_as_without_weight():
    """c = 9 multiplies the matrix by 9, not by 81."""
    one = partial(create_fisher_mv, lambda input, params: [input @ params], W, DATA | {"target": None}, kind="monte_carlo", key=random.key(0))
    assert_close(one(multi_head(["cross_entropy"], [9.0])).dense(), 9 * one(multi_head(["cross_entropy"])).dense())


def test_the_empirical_matrix_is_made_of_the_gradients_of_the_loss_as_given():
    target = {"a": jnp.array([0, 1, 1]), "b": [jnp.array([[0.0], [1.0], [0.0]]), jnp.array([[0.3], [-1.0], [2.0]])]}
    F = create_fisher_mv(heads, W, {"input": X[:3], "target": target}, HEADS, kind="empirical")
    total = lambda p, i: HEADS.total(heads(X[i], p), jax.tree.map(lambda y: y[i], target))
    gradients = [jax.grad(total)(W, i).ravel() for i in range(3)]
    assert_close(F.dense(), sum(jnp.outer(g, g) for g in gradients))


# Targets that nobody reads

LIKELIHOODS = [("huber", {"curvature": "fisher"})] + [(name, {}) for name in registered_losses() if name != "none"]


def positive(input, params): return jax.nn.softplus(input @ params)
def mean_and_log_variance(input, params): return jnp.stack([input @ params, jnp.tanh(input @ params)], axis=-1)


MODELS = {"gamma": positive, "negative_binomial": positive, "heteroscedastic_gaussian": mean_and_log_variance}


@pytest.mark.parametrize("name, options", LIKELIHOODS, ids=str)
def test_no_target_is_needed(name, options):
    """Draws come from the model: without a target, with one that is valid, in chunks, on a stream and as a mean."""
    loss, model = create_loss(name, **options), MODELS.get(name, linear)
    one = loss.sample(random.key(0), model(X[0], W))
    some = jnp.ones((N, *one.shape), one.dtype)
    data = {"input": X, "target": None, "weight": DATA["weight"]}
    make = partial(create_fisher_mv, model, W, loss_fn=loss, kind="monte_carlo", key=random.key(0), num_samples=2)
    want = make(data=data)(W)
    positions = jnp.sum(DATA["weight"]) * some[0].size
    assert bool(jnp.all(jnp.isfinite(want)))
    assert_close(make(data=data | {"target": some}, batch_size=3)(W), want)
    assert_close(make(data=data, reduction="mean")(W), want / positions)
    if name == "huber":
        stream = Stream([rows(data, range(4)), rows(data, range(4, N))])
        assert_close(make(data=stream, reduction="mean")(W), want / positions)
    if loss.is_fisher: create_fisher_mv(model, W, data, loss)(W)


def test_a_head_may_lack_its_target():
    loss = multi_head({"a": "cross_entropy", "b": "huber"}, {"a": 2.0, "b": 1.0})
    model = lambda input, params: {"a": input @ params, "b": jnp.tanh(input @ params)[:2]}
    full = {"a": LABELS, "b": jnp.zeros((N, 2))}
    make = lambda target: create_fisher_mv(model, W, {"input": X, "target": target}, loss, kind="monte_carlo", key=random.key(0)).dense()
    for target in (None, full | {"b": None}, {"a": None, "b": None}): assert_close(make(target), make(full))


def test_targets_still_say_what_counts():
    """Labels to be ignored, without which the matrix is that of the other samples."""
    ignored = DATA | {"target": LABELS.at[jnp.array([1, 4])].set(-100)}
    rest = rows(DATA, [0, 2, 3, 5, 6])
    assert_close(sampled(KEYS["rbg"], ignored).dense(), sampled(KEYS["rbg"], rest).dense())
    with pytest.raises(ValueError, match="^target: got values"): sampled(KEYS["rbg"], DATA | {"target": LABELS + 2})
    with pytest.raises(ValueError, match="^weight: got a negative"): sampled(KEYS["rbg"], DATA | {"target": None, "weight": -DATA["weight"]})


def test_the_empirical_matrix_needs_its_target():
    with pytest.raises(ValueError, match="^target: got None"): create_fisher_mv(linear, W, DATA | {"target": None}, "cross_entropy", kind="empirical")


@pytest.mark.parametrize(("index", "error", "got"), [
    (np.arange(N) + 0.5, TypeError, "dtype float"),
    (np.ones(N, bool), TypeError, "dtype bool"),
    (np.ones((N, 2), int), ValueError, r"shape \(7, 2\)"),
], ids=["floats", "truth values", "two axes"])
def test_an_index_holds_an_integer_for_each_sample(index, error, got):
    message = rf"data\['index'\]: got {got}.*, expected integers of shape \(7,\)"
    data = DATA | {"index": index}
    with pytest.raises(error, match=message): sampled(random.key(0), data)
    with pytest.raises(error, match=message): sampled(random.key(0), Stream([data]))


def test_what_is_no_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="kind: got array"): create_fisher_mv(linear, W, DATA, "cross_entropy", kind=np.array(["exact", "exact"]))
