"""Embeddings of words from the text that they stand in.

Words that stand near each other are counted, each row of counts is divided by its sum,
and `subquad.EDRep` places the words on a sphere so that those of similar company lie
close: the cosine of two rows says how similar their words are.

    python examples/words.py                        # Python's own manual: seconds
    python examples/words.py --text book.txt.gz --query king bread run
    python examples/words.py --text book.txt --similarity wordsim353.txt

Each line, or paragraph, of a text is a sentence: no pair of words crosses its end. A
file of ``word word score`` lines, what people think of the similarity of two words, is
compared with the cosines: Spearman's rank correlation.

The algorithm: L. Dall'Amico, E. M. Belliardo, "Efficient distributed representations
with linear-time attention scores normalization", arXiv:2303.17475.
"""

from __future__ import annotations

import argparse
import gzip
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import subquad as sq


def sentences(text: str) -> Iterator[list[str]]:
    """Yield the words of each line, in small letters."""
    for line in text.splitlines():
        words = re.findall(r"[^\W\d_]+", line.lower())
        if words:
            yield words


def manual() -> str:
    """Return the manual of Python that comes with it, a paragraph a line."""
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics.values()).split("\n\n")
    return "\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)


def read(path: Path) -> str:
    """Return the text of a file."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        return lines.read()


def neighbours(embedding: Any, row: int, count: int) -> list[tuple[int, float]]:
    """Return the rows of the largest cosines with one row, and these."""
    cosines = embedding @ embedding[row]
    cosines[row] = -np.inf
    count = min(count, len(cosines) - 1)
    return [(int(i), float(cosines[i])) for i in np.argsort(-cosines)[:count]]


def scores(path: Path) -> Iterator[tuple[str, str, float]]:
    """Yield two words and their score of each line that has them; a header has not."""
    for line in read(path).splitlines():
        try:
            first, second, score = line.lower().split()
            scored = first, second, float(score)
        except ValueError:
            continue
        yield scored


def rank_correlation(embedding: Any, index: dict[str, int], path: Path) -> str:
    """Say how well cosines agree with what people think."""
    from scipy.stats import spearmanr

    pairs = [
        (embedding[index[a]] @ embedding[index[b]], score)
        for a, b, score in scores(path)
        if a in index and b in index
    ]
    if len(pairs) < 3:
        return f"{path.name}: {len(pairs)} pairs, too few to compare"
    value = spearmanr(*zip(*pairs, strict=True)).statistic
    return f"{path.name}: rank correlation {value:.3f}, {len(pairs)} pairs"


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--text", type=Path, help="a file (default: Python's manual)")
    result.add_argument("--query", nargs="+", help="words to show the neighbours of")
    result.add_argument("--neighbours", type=int, default=8, help="of each word")
    result.add_argument("--window", type=int, default=5, help="largest distance")
    result.add_argument("--min-count", type=int, default=5, help="rarer words drop out")
    result.add_argument(
        "--subsample",
        type=float,
        default=1e-3,
        help="words of more than this share of a text are partly dropped",
    )
    result.add_argument("--dim", type=int, default=64, help="dimensions")
    result.add_argument("--epochs", type=int, default=30)
    result.add_argument("--similarity", type=Path, nargs="+", default=[])
    result.add_argument("--seed", type=int, default=0)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed the words of a text and print neighbours."""
    options = parser().parse_args(arguments)
    text = manual() if options.text is None else read(options.text)

    started = time.perf_counter()
    affinities, vocabulary = sq.cooccurrence(
        sentences(text),
        window=options.window,
        min_count=options.min_count,
        subsample=options.subsample,
        random_state=options.seed,
        dtype=np.float32,
    )
    words, counts, index = vocabulary
    counted = time.perf_counter()
    model = sq.EDRep(
        min(options.dim, len(words)),
        max_iter=options.epochs,
        learning_rate=0.5,
        # Frequent words are near everything: how much so is taken off.
        null_weights=counts**0.75,
        random_state=options.seed,
    )
    embedding = model.fit_transform(affinities)
    done = time.perf_counter()
    print(
        f"{counts.sum()} words, {len(words)} of them different: counted in "
        f"{counted - started:.2f} s, embedded in {done - counted:.2f} s"
    )

    queries = options.query or words[50:500:50]
    for word in queries:
        if word not in index:
            print(f"{word}: not in the text {options.min_count} times")
            continue
        near = neighbours(embedding, index[word], options.neighbours)
        print(f"{word}: " + ", ".join(f"{words[i]} {c:.2f}" for i, c in near))
    for path in options.similarity:
        print(rank_correlation(embedding, index, path))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
