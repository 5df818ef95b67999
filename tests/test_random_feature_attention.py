"""Attention on random features, and what other implementations of it get wrong."""

from __future__ import annotations

import functools
import pickle
import warnings

import numpy as np
import pytest

import subquad as sq
from _arrays import to_numpy
from subquad import RandomFeatures, random_feature_attention
from subquad.features import InaccurateFeaturesWarning

WIDTH = 8


def tokens(seed=0, *shape, size=1.0):
    rng = np.random.default_rng(seed)
    q, k, v = rng.standard_normal((3, *shape, WIDTH))
    return size * q, size * k, v


def fitted(family="cderf", n_components=32, size=0.3, convert=np.asarray, **options):
    """Features that were fitted to other rows than those of the tests."""
    q, k, _ = tokens(99, 300, size=size)
    features = RandomFeatures(
        n_components, family=family, scale=WIDTH**-0.5, random_state=0, **options
    )
    return features.fit(convert(q), keys=convert(k))


def dense(features, q, k, v, mask=None):
    """The ratio of sums over features, in extended precision."""
    lq = np.asarray(features.log_query_features(q)).astype(np.longdouble)
    lk = np.asarray(features.log_key_features(k)).astype(np.longdouble)
    terms = lq[..., :, None, :] + lk[..., None, :, :]
    logs = terms.max(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = logs + np.log(np.exp(terms - logs[..., None]).sum(-1))
        if mask is not None:
            logs = np.where(mask, logs, -np.inf)
        w = np.exp(logs - logs.max(-1, keepdims=True))
    return ((w / w.sum(-1, keepdims=True)) @ v).astype(np.float64)


# ------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", ["positive", "saderf+", "csderf", "cderf"])
def test_is_linear_attention_of_log_features(family, causal):
    q, k, v = tokens(0, 2, 3, 9)
    features = fitted(family)
    y = random_feature_attention(q, k, v, features, causal=causal)
    expected = sq.linear_attention(
        features.log_query_features(q), features.log_key_features(k), v, causal=causal
    )
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("norm", [1.0, 3.0, 30.0])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", ["positive", "oprf", "csderf", "cderf"])
def test_no_epsilon_at_any_norm(family, causal, norm):
    """The ratio of sums over the same features, to the rounding of log-features."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 40, WIDTH))
    q *= norm / np.linalg.norm(q, axis=-1, keepdims=True)
    k *= norm / np.linalg.norm(k, axis=-1, keepdims=True)
    features = fitted(family)
    y = random_feature_attention(q, k, v, features, causal=causal)
    expected = dense(features, q, k, v, np.tri(40, dtype=bool) if causal else None)
    # A weight's exponent is a difference of log-features, each rounded to eps/2 of its
    # size; the weights' errors are relative, and add up to at most that of the values.
    size = np.abs(features.log_query_features(q)).max()
    size += np.abs(features.log_key_features(k)).max()
    tolerance = 4 * size * np.finfo(np.float64).eps * np.abs(v).max()
    np.testing.assert_allclose(y, expected, atol=tolerance, rtol=0)


def test_approaches_softmax_attention():
    q, k, v = tokens(0, 64)
    w = np.exp(q @ k.T * WIDTH**-0.5)
    exact = w @ v / w.sum(1, keepdims=True)
    errors = []
    for n_components in (64, 1024, 16384):
        features = fitted("csderf", n_components, 1.0)
        error = random_feature_attention(q, k, v, features) - exact
        errors.append(np.linalg.norm(error) / np.linalg.norm(exact))
    # With the root of the number of features, 4 times at each step.
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.1


def test_heads_and_broadcasting():
    q, k, v = tokens(0, 2, 3, 9)
    calibration = tokens(1, 3, 200, size=0.3)
    features = RandomFeatures(16, family="cderf", scale=WIDTH**-0.5, random_state=0)
    features.fit(calibration[0], keys=calibration[1])
    y = random_feature_attention(q, k, v, features, causal=True)
    assert y.shape == v.shape
    alone = RandomFeatures(16, family="cderf", scale=WIDTH**-0.5, random_state=0)
    alone.fit(calibration[0][1], keys=calibration[1][1])
    np.testing.assert_allclose(
        y[:, 1],
        random_feature_attention(q[:, 1], k[:, 1], v[:, 1], alone, causal=True),
        rtol=1e-10,
        atol=1e-12,
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_library(xp, dtype):
    q, k, v = (a.astype(dtype) for a in tokens(0, 2, 9))
    convert = functools.partial(xp.asarray, dtype=dtype)
    there = fitted(convert=convert)
    here = fitted(convert=functools.partial(np.asarray, dtype=dtype))
    mask = np.arange(9) != 4
    y = random_feature_attention(
        *map(convert, (q, k, v)), there, causal=True, key_mask=xp.asarray(mask)
    )
    assert type(y) is xp.array_type()
    assert to_numpy(y).dtype == dtype
    expected = random_feature_attention(q, k, v, here, causal=True, key_mask=mask)
    # Log-features of about 10, and what they were fitted to agrees to 1e-7 and more.
    tolerance = 256 * np.finfo(dtype).eps
    np.testing.assert_allclose(to_numpy(y), expected, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_torch(causal):
    torch = pytest.importorskip("torch")
    features = fitted(n_components=8, convert=torch.from_numpy)
    arrays = [torch.from_numpy(a).requires_grad_() for a in tokens(0, 2, 3)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: random_feature_attention(q, k, v, features, causal=causal),
        arrays,
        fast_mode=True,
    )


def test_compiles_as_one_graph():
    torch = pytest.importorskip("torch")
    features = pickle.loads(pickle.dumps(fitted(convert=torch.from_numpy)))
    q, k, v = map(torch.from_numpy, tokens(0, 9))

    def attend(q, k, v):
        return random_feature_attention(q, k, v, features, causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    np.testing.assert_allclose(compiled(q, k, v), attend(q, k, v), atol=1e-13)


def test_gradients_of_jax():
    jax = pytest.importorskip("jax")
    features = fitted(convert=jax.numpy.asarray)
    here = fitted()
    q, k, v = tokens(0, 5)

    def loss(attend, q, k, v):
        return (attend(q, k, v) ** 2).sum()

    grads = jax.jit(
        jax.grad(
            functools.partial(
                loss,
                lambda q, k, v: random_feature_attention(
                    q, k, v, features, causal=True
                ),
            ),
            argnums=(0, 1, 2),
        )
    )(q, k, v)
    rng = np.random.default_rng(1)
    for place, grad in enumerate(grads):
        step = 1e-5 * rng.standard_normal(q.shape)
        moved = [
            [a + sign * step if i == place else a for i, a in enumerate((q, k, v))]
            for sign in (1, -1)
        ]
        values = [
            loss(
                lambda q, k, v: random_feature_attention(q, k, v, here, causal=True),
                *arrays,
            )
            for arrays in moved
        ]
        # Central differences err by the square of the step, and eps over it.
        np.testing.assert_allclose(
            np.sum(np.asarray(grad) * step), (values[0] - values[1]) / 2, rtol=1e-5
        )


# ---------------------------------------------------------------------- streaming


def test_decoding_equals_the_whole():
    q, k, v = tokens(0, 2, 20)
    features = fitted()
    whole = random_feature_attention(q, k, v, features, causal=True)
    head, tail = slice(0, 13), slice(13, 20)
    first, state = random_feature_attention(
        q[:, head], k[:, head], v[:, head], features, causal=True, return_state=True
    )
    rest = random_feature_attention(
        q[:, tail], k[:, tail], v[:, tail], features, causal=True, state=state
    )
    parts = np.concatenate([first, rest], axis=1)
    np.testing.assert_allclose(parts, whole, rtol=1e-12, atol=1e-13)
    log_q, log_k = features.log_query_features(q), features.log_key_features(k)
    for t in range(13, 20):
        y, state = state.step(log_q[:, t], log_k[:, t], v[:, t])
        np.testing.assert_allclose(y, whole[:, t], rtol=1e-12, atol=1e-13)


def test_never_fits():
    q, k, v = tokens(0, 9)
    features = fitted()
    before = features.log_key_features(k)
    random_feature_attention(100 * q, 100 * k, v, features)
    np.testing.assert_array_equal(features.log_key_features(k), before)
    with pytest.raises(ValueError, match="not fitted"):
        random_feature_attention(q, k, v, RandomFeatures())
    with pytest.raises(TypeError, match="features must be a RandomFeatures"):
        random_feature_attention(q, k, v, "cderf")
    with pytest.raises(ValueError, match="signs"):
        random_feature_attention(q, k, v, fitted("trigonometric"))


# -------------------------------------------- what other implementations get wrong


def ours(n_components=64, family="positive", **options):
    """Softmax attention of features in the place of FAVOR+'s, as a function."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InaccurateFeaturesWarning)
        features = fitted(family, n_components, **options)

    def attend(q, k, v, causal=False, mask=None):
        return random_feature_attention(q, k, v, features, causal=causal, key_mask=mask)

    attend.log_features = features.log_query_features, features.log_key_features
    return attend


class Peer:
    """performer-pytorch behind the same face."""

    def __init__(self, n_components=64):
        module = pytest.importorskip("performer_pytorch.performer_pytorch")
        self.torch = pytest.importorskip("torch")
        self.torch.manual_seed(0)
        self.module = module
        self.layers = {
            causal: module.FastAttention(WIDTH, n_components, causal=causal)
            for causal in (False, True)
        }
        matrix = self.layers[False].projection_matrix
        self.layers[True].projection_matrix = matrix
        self.matrix = matrix.double().numpy()

    def __call__(self, q, k, v, causal=False, mask=None):
        assert mask is None
        arrays = [self.torch.from_numpy(np.asarray(a, np.float32)) for a in (q, k, v)]
        batch = [a.reshape(-1, 1, *a.shape[-2:]) for a in arrays]
        return self.layers[causal](*batch).detach().numpy().reshape(v.shape)

    @property
    def log_features(self):
        def log_features(x):
            x = x * WIDTH**-0.25
            return x @ self.matrix.T - 0.5 * (x * x).sum(-1, keepdims=True)

        return log_features, log_features


def peers(reason):
    """Pass ours through an assertion, and see the peer's fail it."""

    def decorate(check):
        @pytest.mark.parametrize("who", ["subquad", "performer-pytorch"])
        @pytest.mark.filterwarnings("default")
        @functools.wraps(check)
        def test(who):
            if who == "subquad":
                check(ours())
                return
            peer = Peer()
            with pytest.raises(AssertionError):
                check(peer)

        test.__doc__ = f"{check.__doc__} The peer: {reason}."
        # pytest reads the arguments of what was wrapped.
        del test.__wrapped__
        return test

    return decorate


@peers("1e-4 is added to all features, and the maximum is taken without the norm")
def test_equals_the_ratio_at_norm_four(attend):
    """Sums over the same features, to float32's rounding of log-features below 100."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 40, WIDTH))
    q *= 4.0 * WIDTH**0.25 / np.linalg.norm(q, axis=-1, keepdims=True)
    k *= 4.0 * WIDTH**0.25 / np.linalg.norm(k, axis=-1, keepdims=True)
    log_q, log_k = (f(x) for f, x in zip(attend.log_features, (q, k), strict=True))
    w = np.exp(log_q) @ np.swapaxes(np.exp(log_k), -1, -2)
    expected = w @ v / w.sum(-1, keepdims=True)
    tolerance = 100 * 4 * np.finfo(np.float32).eps * np.abs(v).max()
    np.testing.assert_allclose(attend(q, k, v), expected, atol=tolerance)


@peers("an epsilon beside a maximum over all keys, those of the future included")
def test_the_future_does_not_leak(attend):
    """Another last key leaves the rows before it as they were, bit by bit."""
    q, k, v = tokens(0, 1, 50, size=2.0)
    before = attend(q, k, v, causal=True)
    k = k.copy()
    k[:, -1] *= 10.0
    after = attend(q, k, v, causal=True)
    np.testing.assert_array_equal(after[:, :-1], before[:, :-1])


def test_batch_mates_do_not_matter():
    """A sequence has the same attention beside any other, bit by bit."""
    q, k, v = tokens(0, 2, 30, size=2.0)
    attend = ours()
    both = attend(q, k, v)
    k[1] *= 10.0
    np.testing.assert_array_equal(attend(q, k, v)[0], both[0])
    np.testing.assert_allclose(attend(q[0], k[0], v[0]), both[0], atol=1e-13)


def check_haar(draw):
    """The first entry of a random rotation is as often negative as positive."""
    negative = sum(draw(seed) < 0 for seed in range(200))
    # Five standard deviations of 200 tosses.
    assert 65 < negative < 135


def test_rotations_are_haar():
    """QR needs the signs of its diagonal: LAPACK's is never positive."""

    def draw(seed):
        features = RandomFeatures(2 * WIDTH, family="positive", random_state=seed)
        return features.fit(np.zeros((2, WIDTH))).projection_[0, 0]

    check_haar(draw)


@pytest.mark.filterwarnings("default")
def test_rotations_of_the_peer_are_not_haar():
    module = pytest.importorskip("performer_pytorch.performer_pytorch")
    torch = pytest.importorskip("torch")

    def draw(seed):
        torch.manual_seed(seed)
        return float(module.gaussian_orthogonal_random_matrix(WIDTH, WIDTH)[0, 0])

    with pytest.raises(AssertionError):
        check_haar(draw)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_does_not_exist(causal):
    """Keys behind the mask, NaN too, change nothing; a row without keys is 0."""
    q, k, v = tokens(0, 2, 12)
    mask = np.ones((2, 12), bool)
    mask[:, 9:] = False
    attend = ours()
    expected = attend(q[:, :9], k[:, :9], v[:, :9], causal=causal)
    for junk in (7.0, np.nan, np.inf):
        k[:, 9:], v[:, 9:] = junk, junk
        y = attend(q, k, v, causal=causal, mask=mask)
        np.testing.assert_allclose(y[:, :9], expected, rtol=1e-12, atol=1e-14)
    mask[1] = False
    np.testing.assert_array_equal(attend(q, k, v, causal=causal, mask=mask)[1], 0.0)


@pytest.mark.filterwarnings("default")
def test_padding_of_the_peer_takes_weight():
    module = pytest.importorskip("performer_pytorch.performer_pytorch")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    layer = module.SelfAttention(WIDTH, heads=1, dim_head=WIDTH, nb_features=64).eval()
    x = torch.randn(1, 12, WIDTH)
    mask = torch.arange(12)[None] < 9
    with torch.no_grad():
        padded, alone = layer(x, mask=mask)[:, :9], layer(x[:, :9])
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(padded.numpy(), alone.numpy(), atol=1e-3)
