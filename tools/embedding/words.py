"""Write how similar words are to embeddings and to people: ``embedding_words.md``.

Spearman's correlation of cosines with the scores of WordSim-353, SimLex-999 and MEN, of
the pairs whose words a text has often enough, by EDRep and by gensim's skip-grams of
the same text. Texts, each where it is found:

bigrams
    how often two words follow each other, symspellpy's or the file ``--bigrams``;
wikipedia
    the articles among gensim's test data, or the file ``--wikipedia``;
glosses
    the words and glosses of WordNet, from ``--wordnet``, by default where Debian's
    package wordnet-base has them.

The scores come from ``--data``, or else from gensim's test data, which lack MEN.
"""

from __future__ import annotations

import bz2
import functools
import html
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.embedding._common import (
    WORDNET,
    Absent,
    Row,
    brief_seconds,
    embed,
    finish,
    machine_note,
    package_folder,
    parser,
    run_peer,
    study,
    threads_of,
    timed,
    unit_rows,
    wordnet_lines,
)
from tools.embedding.communities import Setting
from tools.features._common import table

WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
BIGRAMS = "frequency_bigramdictionary_en_243_342.txt"
SETS = {
    "WordSim-353": ("EN-WS-353-ALL.txt", "wordsim353.tsv"),
    "SimLex-999": ("EN-SIMLEX-999.txt", "simlex999.txt"),
    "MEN": ("EN-MEN-TR-3k.txt", ""),
}
# That of the published figures of bigrams.
OF_BIGRAMS = Setting(length=1, epochs=30, learning_rate=0.5, dim=64)
OF_TEXTS = Setting(length=1, epochs=30, learning_rate=0.5, dim=64)
WINDOW, MIN_COUNT, SUBSAMPLE = 5, 5, 1e-4
ONE_STEP, TWO_STEPS = "EDRep", "EDRep, two steps"
Pair = tuple[str, str, float]
Sentences = list[list[str]]


class Text(NamedTuple):
    """A text, and how it is called."""

    name: str
    sentences: Sentences

    @property
    def title(self) -> str:
        """The heading of a row."""
        return f"{self.name}, {sum(map(len, self.sentences)):,} words"


# ----------------------------------------------------------------------------- texts


def words_of(text: str) -> list[str]:
    """Return the words of a text, in small letters."""
    return re.findall(r"[a-z]+", text.lower())


def plain_paragraphs(markup: str) -> Iterator[str]:
    """Yield the paragraphs of an article of Wikipedia without their markup."""
    text = html.unescape(html.unescape(markup))
    text = re.sub(
        r"(?s)<!--.*?-->|<(ref|math|gallery)\b[^>]*?(/>|>.*?</\1>)", " ", text
    )
    # From the inside out: they are nested.
    for pattern in (r"\{\{[^{}]*\}\}", r"(?s)\{\|[^{}]*?\|\}"):
        count = 1
        while count:
            text, count = re.subn(pattern, " ", text)
    text = re.sub(r"\[\[(?:File|Image|Category)[^\[\]]*(\[\[[^\[\]]*\]\][^\[\]]*)*\]\]",
                  " ", text)  # fmt: skip
    text = re.sub(r"\[\[[^\[\]|]*\|([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[?https?://[^\s\]]*|</?[a-z][^>]*>|''+", " ", text)
    for line in text.split("\n"):
        # Links to other languages, headings and remains of tables say nothing.
        if not re.match(r"\s*([|!{}=]|\[\[[a-z-]+:)", line):
            yield line


def wikipedia(path: Path) -> Text:
    """Return the articles of a dump."""
    with bz2.open(path, "rt", encoding="utf-8") as dump:
        articles = re.findall(r"(?s)<text[^>]*>(.*?)</text>", dump.read())
    lines = (line for article in articles for line in plain_paragraphs(article))
    return Text("wikipedia", [words for words in map(words_of, lines) if words])


def glosses(folder: Path) -> Text:
    """Return the words of each synset of WordNet, followed by its gloss."""
    sentences = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in wordnet_lines(folder, part):
            head, _, gloss = line.partition(" | ")
            fields = head.split(" ")
            count = int(fields[3], 16)
            lemmas = [word.partition("(")[0] for word in fields[4 : 4 + 2 * count : 2]]
            names = [word.lower() for word in lemmas if word.isalpha()]
            sentences.append(names + words_of(gloss))
    return Text("glosses of WordNet", sentences)


def bigrams(path: Path) -> tuple[list[str], Any]:
    """Return words and a symmetric matrix of how often they follow each other."""
    import scipy.sparse

    with path.open(encoding="utf-8-sig") as lines:
        entries = [line.split() for line in lines]
    index: dict[str, int] = {}
    ends = np.array(
        [[index.setdefault(w, len(index)) for w in entry[:2]] for entry in entries]
    )
    counts = np.array([float(entry[2]) for entry in entries])
    n = len(index)
    matrix = scipy.sparse.coo_array((counts, ends.T), shape=(n, n)).tocsr()
    return list(index), (matrix + matrix.T).tocsr()


# ---------------------------------------------------------------------------- scores


def similarity_sets(folder: Path, peer_python: str | None) -> dict[str, list[Pair]]:
    """Return pairs of words and what people think of their similarity."""
    found = {}
    for name, (ours, theirs) in SETS.items():
        path = folder / ours
        if not path.is_file() and theirs:
            path = package_folder("gensim", peer_python) / "test/test_data" / theirs
        if path.is_file():
            found[name] = pairs_of(path.read_text(encoding="utf-8").splitlines())
    return found


def pairs_of(lines: Iterable[str]) -> list[Pair]:
    """Return pairs and scores of lines ``word word score``, each pair once."""
    fields = (line.split() for line in lines if not line.startswith("#"))
    found = {(a.lower(), b.lower()): float(c) for a, b, c in fields}
    return [(a, b, score) for (a, b), score in found.items()]


def spearman(
    rows: Any, index: dict[str, int], pairs: Iterable[Pair]
) -> tuple[float | None, int]:
    """Return the rank correlation of cosines with scores, and of how many pairs.

    None for fewer than three.
    """
    from scipy.stats import spearmanr

    known = [(index[a], index[b], s) for a, b, s in pairs if a in index and b in index]
    if len(known) < 3:
        return None, len(known)
    first, second, scores = zip(*known)
    unit = unit_rows(np.asarray(rows, float))
    cosines = (unit[list(first)] * unit[list(second)]).sum(axis=1)
    return float(spearmanr(cosines, scores).statistic), len(known)


def scored(
    text: str,
    method: str,
    words: Sequence[str],
    found: Sequence[Any],
    seconds: Sequence[float],
    sets: dict[str, list[Pair]],
) -> Row:
    """Return a row of the results: the mean over embeddings."""
    index = {word: i for i, word in enumerate(words)}
    scores: dict[str, Any] = {}
    for name, pairs in sets.items():
        values = [spearman(rows, index, pairs) for rows in found]
        known = [value for value, _ in values if value is not None]
        scores[name] = {
            "spearman": float(np.mean(known)) if known else None,
            "pairs": values[0][1],
        }
    return {
        "text": text,
        "method": method,
        "scores": scores,
        "seconds": list(seconds),
        "vocabulary": len(words),
    }


# --------------------------------------------------------------------------- methods


def measure_bigrams(
    path: Path,
    sets: dict[str, list[Pair]],
    seeds: Sequence[int],
    peer_python: str | None,
) -> list[Row]:
    """Return the rows of counted pairs."""
    from subquad.embedding import random_walk

    words, matrix = bigrams(path)
    title = f"bigrams, {matrix.nnz // 2:,} pairs"
    rows = []
    for method, weight in (("EDRep, counts", np.copy), ("EDRep, log counts", np.log1p)):
        weighted = matrix.copy()
        weighted.data = weight(weighted.data)
        walk = random_walk(weighted, length=OF_BIGRAMS.length, dtype=np.float32)
        null = np.asarray(matrix.sum(axis=1)).ravel() ** 0.75
        found = [embed(walk, OF_BIGRAMS, s, null_weights=null) for s in seeds]
        rows.append(scored(title, method, words, *zip(*found), sets))
    parts = {"data": matrix.data, "indices": matrix.indices, "indptr": matrix.indptr}
    parts["null_weights"] = null
    given = OF_BIGRAMS._asdict() | {"seeds": list(seeds)}
    try:
        theirs = run_peer("edrep", parts, peer_python, **given)
    except Absent as error:
        print(f"edrep: {error}", file=sys.stderr)
    else:
        rows.append(scored(title, "edrep 0.1.2, counts", words, *theirs, sets))
    return rows


def measure_text(
    text: Text,
    sets: dict[str, list[Pair]],
    seeds: Sequence[int],
    peer_python: str | None,
) -> list[Row]:
    """Return the rows of a text."""
    from subquad.embedding import cooccurrence
    from subquad.factors import OperatorChain

    options = {"window": WINDOW, "min_count": MIN_COUNT, "subsample": SUBSAMPLE}
    found: dict[str, list[tuple[Any, float]]] = {ONE_STEP: [], TWO_STEPS: []}
    for seed in seeds:
        counting = functools.partial(
            cooccurrence, text.sentences, random_state=seed, dtype=np.float32
        )
        (pairs, vocabulary), of_pairs = timed(functools.partial(counting, **options))
        null = vocabulary.counts**0.75
        walk = OperatorChain(pairs.matrices * 2, mean_of_partial_products=True)
        for method, operator in ((ONE_STEP, pairs), (TWO_STEPS, walk)):
            rows, of_fit = embed(operator, OF_TEXTS, seed, null_weights=null)
            found[method].append((rows, of_pairs + of_fit))
    words = vocabulary.words
    results = [
        scored(text.title, method, words, *zip(*fits), sets)
        for method, fits in found.items()
    ]
    counts = Counter(word for sentence in text.sentences for word in sentence)
    index = {word: i for i, word in enumerate(counts)}
    ids = [index[word] for sentence in text.sentences for word in sentence]
    inputs = {
        "ids": np.array(ids, np.int32),
        "words": np.array(list(index)),
        "ends": np.cumsum([len(sentence) for sentence in text.sentences]),
        "wanted": np.array(words),
    }
    given = {"dim": OF_TEXTS.dim, "epochs": OF_TEXTS.epochs, "window": WINDOW}
    given |= {"min_count": MIN_COUNT, "sample": SUBSAMPLE, "seeds": list(seeds)}
    try:
        theirs = run_peer("word2vec", inputs, peer_python, **given)
    except Absent as error:
        print(f"word2vec: {error}", file=sys.stderr)
    else:
        name = "skip-grams, gensim"
        results.append(scored(text.title, name, words, *theirs, sets))
    return results


def page(document: Row) -> str:
    """Return the table: a row for each text and method."""
    names = list(document["rows"][0]["scores"]) if document["rows"] else []
    head = ["text", "", *names, "pairs", "time"]
    rows = []
    for row in document["rows"]:
        scores = row["scores"]
        rows.append(
            [
                row["text"],
                row["method"],
                *(three_digits(scores[name]["spearman"]) for name in names),
                ", ".join(str(scores[name]["pairs"]) for name in names),
                brief_seconds(float(np.median(row["seconds"]))),
            ]
        )
    return table(head, rows) + machine_note(document)


def three_digits(value: float | None) -> str:
    """Return a correlation with three digits."""
    return "–" if value is None else f"{value:.3f}".replace("-", "−")


def main(arguments: Sequence[str] | None = None) -> int:
    """Embed the words of all texts and write the page."""
    command = parser(__doc__)
    command.add_argument("--bigrams", type=Path, help="lines of two words and a count")
    command.add_argument("--wikipedia", type=Path, help="a dump, xml.bz2")
    command.add_argument("--wordnet", type=Path, default=WORDNET, help="a folder")
    command.add_argument("--seeds", type=int, default=3)
    options = command.parse_args(arguments)
    threads = threads_of(options)
    python = options.peer_python
    sets = similarity_sets(options.data / "wordsim", python)
    seeds = range(1 if options.quick else options.seeds)
    rows = []
    path = options.bigrams or packaged("symspellpy", BIGRAMS, python)
    if path is not None:
        print(f"bigrams: {path}", file=sys.stderr, flush=True)
        rows += measure_bigrams(path, sets, seeds, python)
    texts: list[Text] = []
    if not options.quick:
        place = f"test/test_data/{WIKIPEDIA}"
        path = options.wikipedia or packaged("gensim", place, python)
        texts += [] if path is None else [wikipedia(path)]
        if (options.wordnet / "data.noun").is_file():
            texts.append(glosses(options.wordnet))
    for text in texts:
        print(text.title, file=sys.stderr, flush=True)
        rows += measure_text(text, sets, seeds, python)
    settings = {
        "bigrams": OF_BIGRAMS._asdict(),
        "texts": OF_TEXTS._asdict(),
        "window": WINDOW,
        "min_count": MIN_COUNT,
        "subsample": SUBSAMPLE,
    }
    return finish(study("words", threads, rows, **settings), page, options)


def packaged(package: str, name: str, python: str | None) -> Path | None:
    """Return a file of a package, None and a word on stderr where it is missing."""
    try:
        return package_folder(package, python) / name
    except Absent as error:
        print(f"{name}: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    raise SystemExit(main())
