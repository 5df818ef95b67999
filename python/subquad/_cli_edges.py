"""Edges of a graph from text, a sparse matrix or GML: what ``subquad embed`` reads."""

from __future__ import annotations

import collections
import csv
import dataclasses
import gzip
import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np
import numpy.typing as npt

from ._cli_common import Failed, Start, Unusable, why

Ids = npt.NDArray[np.integer[Any]]
Weights = npt.NDArray[np.float64]
SparseMatrix = Any

_BLOCK_BYTES = 2**21
_LONGEST_LINE = 2**20
_COLUMNS = "source, target, and perhaps weight"
_HEADERS = {
    (b"source", b"target"),
    (b"src", b"dst"),
    (b"from", b"to"),
    (b"head", b"tail"),
}
# Integers of one spelling only: 007 is a name, and not node 7.
_INTEGER = re.compile(rb"(?:0|[1-9][0-9]{0,17})\Z")
_MOST_DIGITS = 18
_COMMENT = re.compile(rb"^[ \t]*#", re.MULTILINE)
# Integers below 2^53 and powers of ten up to 10^22 are float64, so that their quotient
# is the nearest float64 to the decimal number.
_EXACT_DIGITS = 15
_LONGEST_NUMBER = 32
_BLANK, _TOKEN, _DELIMITER, _NEWLINE = range(4)


@dataclasses.dataclass(frozen=True)
class Graph:
    """Adjacency in compressed rows, and the names of its rows where they have some.

    `notes` are what a user should hear of how the file was understood.
    """

    adjacency: SparseMatrix
    names: list[bytes] | None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return int(self.adjacency.shape[0])

    def row_of(self) -> Callable[[bytes], int | None]:
        """Return the function that finds the row of a node, None for no node."""
        if self.names is not None:
            return {name: row for row, name in enumerate(self.names)}.get
        size = len(self)

        def row(name: bytes) -> int | None:
            if not _INTEGER.match(name) or int(name) >= size:
                return None
            return int(name)

        return row


def read_graph(path: Path, *, directed: bool, start: Start) -> Graph:
    """Read the graph of a file, whichever kind it is of."""
    try:
        with path.open("rb") as file:
            magic = file.peek(4)[:4]
            if not magic:
                raise Unusable(f"{path}: the file is empty")
            if magic.startswith(b"PK"):
                return _from_matrix(path, file, directed)
            if path.name.endswith((".gml", ".gml.gz")):
                return _from_gml(path, directed)
            reader = _Text(path)
            for block in blocks(path, file, start):
                reader.take(block)
            return reader.graph(directed)
    except OSError as error:
        raise Unusable(f"{path}: cannot be read: {why(error)}") from error


def blocks(path: Path, file: Any, start: Start) -> Iterator[bytes]:
    """Yield the contents of a text file, unpacked if it is packed, in whole lines."""
    advance = start("edges", float(path.stat().st_size))
    packed = file.peek(2)[:2] == b"\x1f\x8b"
    text: BinaryIO = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if packed else file
    line, rest, place = 1, b"", 0
    while True:
        try:
            data = text.read(_BLOCK_BYTES)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise Unusable(f"{path}: damaged or cut short ({error})") from None
        if b"\0" in data:
            raise Unusable(
                f"{path}: not text in UTF-8, a sparse matrix of scipy (.npz) or "
                "GML (.gml)"
            )
        cut = data.rfind(b"\n") + 1
        block, rest = (rest + data[:cut], data[cut:]) if cut else (b"", rest + data)
        if len(rest) > _LONGEST_LINE:
            line += block.count(b"\n")
            raise Unusable(f"{path}: line {line} is longer than {_LONGEST_LINE} bytes")
        if not data and rest:
            block = rest + b"\n"
        if block:
            yield block.removeprefix(b"\xef\xbb\xbf") if line == 1 else block
            line += block.count(b"\n")
        if not data:
            return
        if file.seekable():
            advance(float(file.tell() - place))
            place = file.tell()


def delimiter_of(line: bytes) -> bytes | None:
    """Return what separates the fields of a line, None for blanks."""
    for delimiter in (b"\t", b";", b","):
        if delimiter in line:
            return delimiter
    return None


def fields_of(line: bytes, delimiter: bytes | None) -> list[bytes]:
    """Return the fields of a line, without quotes and blanks around them."""
    if delimiter is None:
        return line.split()
    if b'"' not in line:
        return [field.strip() for field in line.split(delimiter)]
    text = line.decode("utf-8", "surrogateescape")
    rows = csv.reader([text], delimiter=delimiter.decode(), skipinitialspace=True)
    try:
        fields = next(rows)
    except csv.Error:
        fields = text.split(delimiter.decode())
    return [field.strip().encode("utf-8", "surrogateescape") for field in fields]


def shown(field: bytes) -> str:
    """Return a field as messages show it."""
    text = field.decode("utf-8", "replace")
    return repr(text if len(text) <= 40 else text[:37] + "...")


class _Text:
    """The edges of lines of text, block by block.

    Blocks of integers are parsed by NumPy, and names are cut out of a block at once.
    Whatever is out of the ordinary in a block makes it go line by line, which says what
    is wrong, and where.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0
        self.head = b""
        self.columns = 0
        self.delimiter: bytes | None = None
        self.kinds = np.zeros(256, np.uint8)
        self.nodes: list[tuple[Ids, Ids]] = []
        self.weights: list[Weights] = []
        self.known: dict[bytes, int] | None = None
        self.notes: tuple[str, ...] = ()

    def take(self, block: bytes, *, last: bool = False) -> None:
        """Add the edges of some whole lines."""
        if not self.columns:
            # The line below it tells whether a line is a header.
            block = self.head = self._begin(self.head + block, last=last)
        if not self.columns:
            return
        commented = b"#" in block and _COMMENT.search(block) is not None
        plain = not commented and b'"' not in block
        parsed = self._numbers(block) if plain and self.known is None else None
        if parsed is None:
            fields = self._fields(block) if plain else None
            nodes, weights = fields or self._line_by_line(block)
            ids = self._rows(nodes)
            parsed = ids[::2], ids[1::2], weights
        sources, targets, weights = parsed
        highest = max(np.max(sources, initial=0), np.max(targets, initial=0))
        width = np.int32 if highest < 2**31 else np.int64
        self.nodes.append((sources.astype(width), targets.astype(width)))
        if weights is not None:
            self.weights.append(weights)
        self.line += block.count(b"\n")

    def _wrong(self, line: int, message: str) -> NoReturn:
        raise Unusable(f"{self.path}: line {self.line + line}: {message}")

    def _begin(self, block: bytes, *, last: bool) -> bytes:
        """Find columns and delimiter; return the block from its first edge on."""
        first: list[tuple[int, int, bytes]] = []
        number = place = 0
        while place < len(block) and len(first) < 2:
            end = block.index(b"\n", place)
            number += 1
            text = block[place:end].strip()
            if text and not text.startswith(b"#"):
                first.append((number, place, text))
            place = end + 1
        if not first:
            self.line += number
            return b""
        if len(first) < 2 and not last:
            return block
        self.delimiter = delimiter_of(first[0][2])
        fields = [fields_of(text, self.delimiter) for _, _, text in first]
        if _is_header(fields):
            if len(first) < 2:
                self._wrong(first[0][0], "a header, and no edges after it")
            if not _has_usual_names(fields[0]):
                line = f"line {self.line + first[0][0]}"
                note = (
                    f"{self.path}: {line} is taken for a header: {shown(first[0][2])}"
                )
                self.notes = (note,)
            first, fields = first[1:], fields[1:]
        number, place, _ = first[0]
        if len(fields[0]) not in (2, 3):
            message = f"expected 2 or 3 columns ({_COLUMNS}), got {len(fields[0])}"
            self._wrong(number, message)
        self.columns = len(fields[0])
        self.kinds[:] = _TOKEN
        self.kinds[[9, 11, 12, 13, 32]] = _BLANK
        if self.delimiter is not None:
            self.kinds[self.delimiter[0]] = _DELIMITER
        self.kinds[10] = _NEWLINE
        self.line += number - 1
        return block[place:]

    def _numbers(self, block: bytes) -> tuple[Ids, Ids, Weights | None] | None:
        """Return the edges of lines between integers, or None if one is not plain."""
        # Numbers are read up to the width of the longest, also the last one's.
        text = np.frombuffer(block + b"\n" * _LONGEST_NUMBER, np.uint8)
        kinds = self.kinds[text[: len(block)]]
        inside = kinds == _TOKEN
        borders = np.flatnonzero(inside[1:] != inside[:-1]) + 1
        if inside[0]:
            borders = np.concatenate([[0], borders])
        newlines = np.flatnonzero(kinds == _NEWLINE)
        if len(borders) != 2 * self.columns * len(newlines):
            return None
        places = borders.reshape(len(newlines), self.columns, 2)
        starts, ends = places[..., 0], places[..., 1]
        if (ends[:, -1] > newlines).any() or (starts[1:, 0] < newlines[:-1]).any():
            return None
        if self.delimiter is not None:
            found = np.flatnonzero(kinds == _DELIMITER)
            if len(found) != (self.columns - 1) * len(newlines):
                return None
            between = found.reshape(len(newlines), self.columns - 1)
            if (between < ends[:, :-1]).any() or (between >= starts[:, 1:]).any():
                return None
        nodes = [_integers(text, starts[:, k], ends[:, k]) for k in range(2)]
        if nodes[0] is None or nodes[1] is None:
            return None
        weights = None
        if self.columns == 3:
            weights = _decimals(text, starts[:, 2], ends[:, 2])
            if weights is None or not (np.isfinite(weights) & (weights >= 0)).all():
                return None
        return nodes[0], nodes[1], weights

    def _fields(self, block: bytes) -> tuple[list[bytes], Weights | None] | None:
        """Return the nodes of all lines, and the weights, or None."""
        kinds = self.kinds[np.frombuffer(block, np.uint8)]
        lines = np.flatnonzero(kinds == _NEWLINE)
        if self.delimiter is None:
            inside = kinds == _TOKEN
            marks = np.flatnonzero(inside[1:] & ~inside[:-1]) + 1
            marks = np.concatenate([[0], marks]) if inside[0] else marks
            per_line = self.columns
        else:
            marks = np.flatnonzero(kinds == _DELIMITER)
            per_line = self.columns - 1
        if len(marks) != per_line * len(lines):
            return None
        placed = marks.reshape(len(lines), per_line)
        if (placed[:, -1] > lines).any() or (placed[1:, 0] < lines[:-1]).any():
            return None
        if self.delimiter is None:
            fields = block.split()
        else:
            fields = block.replace(self.delimiter, b"\n").split(b"\n")[:-1]
            if (kinds == _BLANK).any():
                fields = [field.strip() for field in fields]
        if not all(fields):
            return None
        if self.columns == 2:
            return fields, None
        values = fields[2::3]
        if b"_" in b"".join(values):
            return None
        try:
            weights = np.array(list(map(float, values)))
        except ValueError:
            return None
        if not (np.isfinite(weights) & (weights >= 0)).all():
            return None
        del fields[2::3]
        return fields, weights

    def _line_by_line(self, block: bytes) -> tuple[list[bytes], Weights | None]:
        nodes: list[bytes] = []
        weights: list[float] = []
        weighted = self.columns == 3
        for number, line in enumerate(block.split(b"\n"), 1):
            text = line.strip()
            if not text or text.startswith(b"#"):
                continue
            fields = fields_of(text, self.delimiter)
            if len(fields) != self.columns:
                expected = f"expected {self.columns} columns ({_COLUMNS})"
                self._wrong(number, f"{expected}, got {len(fields)}")
            if not fields[0] or not fields[1]:
                which = "target" if fields[0] else "source"
                self._wrong(number, f"the {which} is empty")
            nodes += fields[:2]
            if weighted:
                weights.append(self._weight(number, fields[2]))
        return nodes, np.array(weights) if weighted else None

    def _rows(self, nodes: list[bytes]) -> Ids:
        """Return the numbers of some nodes."""
        if self.known is None:
            if all(map(_INTEGER.match, nodes)):
                return np.array(list(map(int, nodes)), np.int64)
            self._name_nodes()
            assert self.known is not None
        return np.fromiter(
            map(self.known.__getitem__, nodes), np.int64, count=len(nodes)
        )

    def _weight(self, line: int, field: bytes) -> float:
        try:
            weight = float(field) if b"_" not in field else None
        except ValueError:
            weight = None
        if weight is None:
            self._wrong(line, f"the weight {shown(field)} is not a number")
        if not math.isfinite(weight) or weight < 0:
            wrong = "negative" if weight < 0 else "not finite"
            self._wrong(line, f"the weight {shown(field)} is {wrong}")
        return weight

    def _name_nodes(self) -> None:
        """Go over from integers to names."""
        ids, sources, targets = _in_order(self._joined())
        self.known = collections.defaultdict(itertools.count(len(ids)).__next__)
        self.known.update((b"%d" % node, row) for row, node in enumerate(ids.tolist()))
        self.nodes = [(sources, targets)]

    def _joined(self) -> tuple[Ids, Ids]:
        none = (np.zeros(0, np.int32), np.zeros(0, np.int32))
        joined = [np.concatenate(ends) for ends in zip(none, *self.nodes)]
        self.nodes = []
        return joined[0], joined[1]

    def graph(self, directed: bool) -> Graph:
        """Return the graph of all edges."""
        if not self.columns:
            self.take(b"", last=True)
        sources, targets = self._joined()
        if not len(sources):
            raise Unusable(f"{self.path}: there are no edges")
        weights = np.concatenate(self.weights) if self.columns == 3 else None
        self.weights = []
        if self.known is not None:
            names: list[bytes] | None = list(self.known)
            size = len(self.known)
        else:
            size = int(max(sources.max(), targets.max())) + 1
            names = None
            if not _all_there(sources, targets, size):
                ids, sources, targets = _in_order((sources, targets))
                names = [b"%d" % node for node in ids.tolist()]
                size = len(names)
        adjacency = _adjacency(sources, targets, weights, size, directed)
        return Graph(adjacency, names, self.notes)


def _has_usual_names(fields: list[bytes]) -> bool:
    return tuple(field.lower() for field in fields[:2]) in _HEADERS


def _is_header(lines: Sequence[list[bytes]]) -> bool:
    """Return whether the first of two lines names the columns."""
    fields = lines[0]
    if len(fields) < 2 or any(map(_is_number, fields[:3])):
        return False
    if _has_usual_names(fields):
        return True
    if len(lines) < 2:
        return False
    below = lines[1]
    if all(_INTEGER.match(field) for field in below[:2]):
        return True
    return len(fields) == len(below) == 3 and (
        not _is_number(fields[2]) and _is_number(below[2])
    )


def _is_number(field: bytes) -> bool:
    try:
        float(field)
    except ValueError:
        return False
    return True


def _integers(text: npt.NDArray[np.uint8], starts: Ids, ends: Ids) -> Ids | None:
    """Return the integers at some places, or None if one is not spelled as usual."""
    lengths = ends - starts
    longest = int(lengths.max(initial=0))
    if longest > _MOST_DIGITS:
        return None
    if ((text[starts] == ord("0")) & (lengths > 1)).any():
        return None
    values = np.zeros(len(starts), np.int64)
    for k in range(longest):
        digits = text[starts + k] - np.uint8(ord("0"))
        inside = lengths > k
        if (inside & (digits > 9)).any():
            return None
        values = np.where(inside, 10 * values + digits, values)
    return values


def _decimals(text: npt.NDArray[np.uint8], starts: Ids, ends: Ids) -> Weights | None:
    """Return the numbers at some places, or None if one is none."""
    lengths = ends - starts
    longest = int(lengths.max(initial=0))
    if longest > _LONGEST_NUMBER:
        return None
    values = np.zeros(len(starts), np.int64)
    digits_seen = np.zeros(len(starts), np.int64)
    places = np.zeros(len(starts), np.int64)
    point_seen = np.zeros(len(starts), bool)
    plain = longest <= _EXACT_DIGITS + 1
    for k in range(longest if plain else 0):
        characters = text[starts + k]
        inside = lengths > k
        digits = characters - np.uint8(ord("0"))
        is_digit = inside & (digits <= 9)
        is_point = inside & (characters == ord("."))
        if (inside & ~is_digit & ~(is_point & ~point_seen)).any():
            plain = False
            break
        values = np.where(is_digit, 10 * values + digits, values)
        digits_seen += is_digit
        places += is_digit & point_seen
        point_seen |= is_point
    if plain and ((digits_seen > 0) & (digits_seen <= _EXACT_DIGITS)).all():
        quotients: Weights = values / 10.0**places
        return quotients
    columns = np.arange(longest)
    characters = text[starts[:, None] + columns]
    characters[columns >= lengths[:, None]] = 0
    # Digits grouped as Python groups them.
    if (characters == ord("_")).any():
        return None
    try:
        parsed: Weights = characters.view(f"S{longest}").ravel().astype(np.float64)
    except ValueError:
        return None
    return parsed


def _all_there(sources: Ids, targets: Ids, size: int) -> bool:
    """Return whether each of 0, ..., size - 1 is an end of some edge."""
    if size > 2 * len(sources):
        return False
    there = np.zeros(size, bool)
    there[sources] = True
    there[targets] = True
    return bool(there.all())


def _in_order(nodes: tuple[Ids, Ids]) -> tuple[Ids, Ids, Ids]:
    """Return the nodes as they first appear, and the ends of all edges among them."""
    sources, targets = nodes
    ends = np.stack([sources, targets], axis=1).ravel()
    ids, first, inverse = np.unique(ends, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rows = np.empty(len(ids), np.int32)
    rows[order] = np.arange(len(ids), dtype=np.int32)
    renamed = rows[inverse]
    return ids[order], renamed[::2], renamed[1::2]


def _sparse() -> Any:
    try:
        import scipy.sparse
    except ModuleNotFoundError:
        message = 'embed needs scipy: pip install "subquad[cli]"'
        raise Failed(message) from None
    return scipy.sparse


def _adjacency(
    sources: Ids, targets: Ids, weights: Weights | None, size: int, directed: bool
) -> SparseMatrix:
    """Return the adjacency matrix, entries of one place added up."""
    values = np.ones(len(sources), np.float32) if weights is None else weights
    if not directed:
        # An edge is two entries, but one on the diagonal.
        other = sources != targets
        sources, targets, values = (
            np.concatenate([sources, targets[other]]),
            np.concatenate([targets, sources[other]]),
            np.concatenate([values, values[other]]),
        )
    matrix = _sparse().coo_array((values, (sources, targets)), shape=(size, size))
    return matrix.tocsr()


def _check_compressed(matrix: SparseMatrix) -> None:
    """Raise a ValueError unless scipy's compiled code can trust the indices."""
    # check_format lets pass what ends with no entries, and differences that overflow.
    if (matrix.indptr[1:] < matrix.indptr[:-1]).any():
        raise ValueError("the index pointer decreases")
    matrix.check_format(full_check=True)
    if matrix.format == "bsr" and any(np.mod(matrix.shape, matrix.blocksize)):
        raise ValueError("the shape is no multiple of the block size")


def _from_matrix(path: Path, file: BinaryIO, directed: bool) -> Graph:
    sparse = _sparse()
    try:
        loaded = sparse.load_npz(file)
        if hasattr(loaded, "indptr"):
            _check_compressed(loaded)
        matrix = sparse.csr_array(loaded)
    except MemoryError:
        raise Failed(f"{path}: does not fit into memory") from None
    except Exception as error:  # noqa: BLE001 - damage shows as whatever meets it
        raise Unusable(
            f"{path}: damaged, or not saved by scipy.sparse.save_npz ({error})"
        ) from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise Unusable(
            f"{path}: the adjacency matrix must be square, got shape {matrix.shape}"
        )
    if matrix.dtype.kind not in "fiub" or matrix.dtype.itemsize > 8:
        raise Unusable(
            f"{path}: the adjacency matrix must hold real numbers, got {matrix.dtype}"
        )
    if matrix.dtype not in (np.float32, np.float64):
        matrix = matrix.astype(np.float64)
    if matrix.nnz == 0:
        raise Unusable(f"{path}: there are no edges, shape {matrix.shape}")
    wrong = ~(np.isfinite(matrix.data) & (matrix.data >= 0))
    if wrong.any():
        entry = int(np.argmax(wrong))
        row = int(np.searchsorted(matrix.indptr, entry, side="right")) - 1
        raise Unusable(
            f"{path}: the weight {matrix.data[entry]} from {row} to "
            f"{matrix.indices[entry]} must be finite and not negative"
        )
    if not directed and (matrix != matrix.T).nnz:
        raise Unusable(
            f"{path}: the adjacency matrix is not symmetric; --directed takes it as it "
            "is, A + A.T makes an undirected graph of it"
        )
    return Graph(matrix, None)


def _from_gml(path: Path, directed: bool) -> Graph:
    try:
        import networkx as nx
    except ModuleNotFoundError:
        message = f"{path}: a .gml file needs networkx: pip install networkx"
        raise Failed(message) from None
    notes: tuple[str, ...] = ()
    try:
        try:
            graph = nx.read_gml(path)
        except nx.NetworkXError:
            # Nodes without a label have numbers only.
            graph = nx.read_gml(path, label="id")
            if any("label" in data for _, data in graph.nodes(data=True)):
                why_ids = "not every node has a label of its own"
                notes = (f"{path}: nodes go by their ids: {why_ids}",)
    except OSError:
        raise
    except MemoryError:
        raise Failed(f"{path}: does not fit into memory") from None
    except Exception as error:  # noqa: BLE001 - damage shows as whatever meets it
        raise Unusable(f"{path}: not a graph in GML: {error}") from None
    if directed and not graph.is_directed():
        raise Unusable(f"{path}: --directed, and the file says undirected")
    names = [str(node).encode("utf-8", "surrogateescape") for node in graph]
    broken = next((name for name in names if b"\n" in name or b"\r" in name), None)
    if broken is not None:
        raise Unusable(f"{path}: the name {shown(broken)} has more than one line")
    if len(set(names)) < len(names):
        name, count = collections.Counter(names).most_common(1)[0]
        raise Unusable(f"{path}: {count} nodes have the name {shown(name)}")
    rows = dict(zip(graph, itertools.count()))
    if sorted(names) == sorted(b"%d" % row for row in range(len(names))):
        rows = {node: int(str(node)) for node in graph}
        names = []
    edges = [
        (rows[source], rows[target], _gml_weight(path, source, target, weight))
        for source, target, weight in graph.edges(data="weight", default=1)
    ]
    if not edges:
        raise Unusable(f"{path}: there are no edges")
    sources, targets, weights = map(np.array, zip(*edges))
    adjacency = _adjacency(
        sources, targets, weights.astype(np.float64), len(rows), graph.is_directed()
    )
    return Graph(adjacency, names or None, notes)


def _gml_weight(path: Path, source: Any, target: Any, weight: Any) -> float:
    try:
        value = float(weight)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise Unusable(
            f"{path}: the weight {weight!r} from {source!r} to {target!r} must be a "
            "finite number that is not negative"
        )
    return value
