"""Long sequences mixed by products of sparse factors, and by softmax attention.

A model embeds a sequence, mixes its rows once and reads the result off. The mixing is
`subquad.paramixer`, whose log n factors are made from the data, or its twin, softmax
attention of the same width; everything else is the same. The tasks:

adding
    the sum of the two numbers that are marked, anywhere in the sequence;
order
    which of two symbols came first, and which second, among others that mean nothing;
fashion
    Fashion-MNIST, an image as a sequence of 784 pixels. Its four files of idx format
    are those of Debian's package dataset-fashion-mnist, or where --data says;
digits
    the digits of scikit-learn, 64 pixels, where there is nothing else.

    python examples/paramixer.py                          # adding, n = 128: a minute
    python examples/paramixer.py --task order --steps 2500
    python examples/paramixer.py --length 2048 --pattern cdil
    python examples/paramixer.py --task fashion --steps 1500    # one epoch: minutes
    python examples/paramixer.py --steps 20               # a try

The recipe is that of R. Khalitov et al., arXiv:2204.10670 and arXiv:2109.08184: batches
of 40 fresh sequences, Adam at 1e-3, gradients clipped to norm 1, width 32.
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
import gzip
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

import subquad as sq

FASHION = Path("/usr/share/datasets/fashion-mnist")
Batch = tuple[torch.Tensor, torch.Tensor]


# ---------------------------------------------------------------------------- tasks


def two_places(generator: torch.Generator, batch: int, length: int) -> torch.Tensor:
    """Return two different places of each sequence, in order."""
    random = torch.rand(batch, length, generator=generator)
    return random.topk(2, dim=1).indices.sort(dim=1).values


@dataclasses.dataclass
class Task(abc.ABC):
    """Sequences and what is to be said of them; `draw` makes fresh ones."""

    length: int
    outputs: int
    has_positions = True

    @abc.abstractmethod
    def embedding(self, width: int) -> nn.Module:
        """Return what makes rows of a width from the elements of a sequence."""

    @abc.abstractmethod
    def draw(self, generator: torch.Generator, batch: int) -> Batch:
        """Return sequences and targets to learn from."""

    def unseen(self, count: int) -> Batch:
        """Return sequences and targets to be judged by."""
        return self.draw(torch.Generator().manual_seed(2**20), count)

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return what is minimised."""
        return functional.cross_entropy(outputs, targets)

    def wrong(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return which answers are not right."""
        return outputs.argmax(dim=-1) != targets


class Adding(Task):
    """0.5 + (a + b) / 4 of the marked numbers a and b among uniform ones of -1 to 1."""

    has_positions = False

    def __init__(self, length: int) -> None:
        super().__init__(length, 1)

    def embedding(self, width: int) -> nn.Module:
        return nn.Linear(2, width)

    def draw(self, generator: torch.Generator, batch: int) -> Batch:
        numbers = 2 * torch.rand(batch, self.length, generator=generator) - 1
        places = two_places(generator, batch, self.length)
        marks = torch.zeros_like(numbers).scatter(1, places, 1.0)
        targets = 0.5 + numbers.gather(1, places).sum(dim=1) / 4
        return torch.stack([numbers, marks], dim=-1), targets

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(outputs[:, 0], targets)

    def wrong(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs[:, 0] - targets).abs() >= 0.04


class Order(Task):
    """XX, XY, YX or YY: two symbols at two places, four other symbols elsewhere."""

    def __init__(self, length: int) -> None:
        super().__init__(length, 4)

    def embedding(self, width: int) -> nn.Module:
        return nn.Embedding(6, width)

    def draw(self, generator: torch.Generator, batch: int) -> Batch:
        tokens = torch.randint(4, (batch, self.length), generator=generator)
        symbols = torch.randint(2, (batch, 2), generator=generator)
        places = two_places(generator, batch, self.length)
        return tokens.scatter(1, places, 4 + symbols), 2 * symbols[:, 0] + symbols[:, 1]


class Images(Task):
    """Images as sequences of pixels, one at a time."""

    def __init__(self, seen: Batch, unseen: Batch) -> None:
        super().__init__(seen[0].shape[1], 10)
        self.seen, self.others = seen, unseen

    def embedding(self, width: int) -> nn.Module:
        return nn.Linear(1, width)

    def draw(self, generator: torch.Generator, batch: int) -> Batch:
        at = torch.randint(len(self.seen[0]), (batch,), generator=generator)
        return self.seen[0][at, :, None], self.seen[1][at]

    def unseen(self, count: int) -> Batch:
        return self.others[0][:count, :, None], self.others[1][:count]


def read_idx(path: Path) -> torch.Tensor:
    """Return the array of bytes in a compressed file of idx format."""
    data = gzip.decompress(path.read_bytes())
    n_dims = data[3]
    header = 4 + 4 * n_dims
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    return torch.frombuffer(bytearray(data[header:]), dtype=torch.uint8).reshape(shape)


def fashion(folder: Path) -> Images:
    """Return Fashion-MNIST."""
    parts = []
    for name in ("train", "t10k"):
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz").flatten(1)
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")
        parts.append((images.float() / 255, labels.long()))
    return Images(*parts)


def digits() -> Images:
    """Return the digits of scikit-learn; every fifth is unseen."""
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(data).float() / 16, torch.from_numpy(target)
    is_unseen = torch.arange(len(labels)) % 5 == 0
    seen, unseen = ((images[w], labels[w]) for w in (~is_unseen, is_unseen))
    return Images(seen, unseen)


def task_of(options: argparse.Namespace) -> Task:
    """Return the task that the command line names."""
    if options.task == "fashion":
        if not options.data.is_dir():
            raise SystemExit(
                f"--data: {options.data} is no folder; install dataset-fashion-mnist, "
                "or say where its files are, or take --task digits"
            )
        return fashion(options.data)
    if options.task == "digits":
        return digits()
    return {"adding": Adding, "order": Order}[options.task](options.length)


# --------------------------------------------------------------------------- models


class Paramixer(nn.Module):
    """log n sparse factors, whose values networks make from x, applied to v."""

    def __init__(self, length: int, width: int, pattern: str, residual: str) -> None:
        super().__init__()
        if pattern == "chord":
            k = len(sq.chord_offsets(length))
            n_factors = max(1, k - 1)
        else:
            n_factors, k = sq.cdil_offsets(length).shape
        self.pattern, self.residual = pattern, residual
        self.weight_in, self.bias_in = stacked_linear(n_factors, width, width)
        self.weight_out, self.bias_out = stacked_linear(n_factors, width, k)

    def forward(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = sq.FactorWeights(
            self.weight_in, self.bias_in, self.weight_out, self.bias_out
        )
        return sq.paramixer(x, v, weights, pattern=self.pattern, residual=self.residual)


def stacked_linear(
    count: int, columns: int, rows: int
) -> tuple[nn.Parameter, nn.Parameter]:
    """Return weights and biases of several layers, drawn as `nn.Linear` draws them."""
    bound = 1 / math.sqrt(columns)
    weight = torch.empty(count, rows, columns).uniform_(-bound, bound)
    bias = torch.empty(count, rows).uniform_(-bound, bound)
    return nn.Parameter(weight), nn.Parameter(bias)


class SoftmaxAttention(nn.Module):
    """Attention of one head, of queries and keys from x, added to v."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projections = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = self.projections(x).chunk(2, dim=-1)
        attended = functional.scaled_dot_product_attention(
            q[:, None], k[:, None], v[:, None]
        )
        return v + self.out(attended[:, 0])


class Model(nn.Module):
    """Rows of a sequence, mixed once and read off: all of them, or their mean."""

    def __init__(self, task: Task, mixing: nn.Module, width: int, head: str) -> None:
        super().__init__()
        self.embedding = task.embedding(width)
        self.positions = None
        if task.has_positions:
            self.positions = nn.Parameter(torch.randn(task.length, width))
        self.g = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.mixing = mixing
        self.reads_all = head == "flatten"
        inputs = task.length * width if self.reads_all else width
        self.head = nn.Linear(inputs, task.outputs)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        x = self.embedding(sequence)
        if self.positions is not None:
            x = x + self.positions
        y = self.mixing(x, self.g(x))
        return self.head(y.flatten(1) if self.reads_all else y.mean(dim=1))


def model_of(kind: str, task: Task, options: argparse.Namespace) -> Model:
    """Return a model of freshly drawn parameters: "chord", "cdil" or "softmax"."""
    torch.manual_seed(options.seed)
    if kind == "softmax":
        mixing: nn.Module = SoftmaxAttention(options.width)
    else:
        mixing = Paramixer(task.length, options.width, kind, options.residual)
    return Model(task, mixing, options.width, options.head)


# ------------------------------------------------------------------------- training


@dataclasses.dataclass
class Outcome:
    """What became of a training: per cent of answers that are wrong, at some steps."""

    errors: dict[int, float]
    losses: list[float]
    seconds: float

    @property
    def steps(self) -> int:
        """The steps that were taken."""
        return max(self.errors)

    @property
    def error(self) -> float:
        """The last error."""
        return self.errors[self.steps]


@torch.no_grad()
def error_of(model: nn.Module, task: Task, count: int = 1000) -> float:
    """Return per cent of unseen sequences that are answered wrongly."""
    wrong = [
        task.wrong(model(inputs), targets)
        for inputs, targets in zip(
            *(part.split(100) for part in task.unseen(count)), strict=True
        )
    ]
    return 100 * float(torch.cat(wrong).float().mean())


def train(
    model: nn.Module,
    task: Task,
    options: argparse.Namespace,
    report: Callable[[str], None] = print,
) -> Outcome:
    """Minimise the loss, until the error on unseen sequences is as small as wanted."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    outcome = Outcome({}, [], 0.0)
    for step in range(1, options.steps + 1):
        started = time.perf_counter()
        inputs, targets = task.draw(generator, options.batch)
        loss = task.loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        outcome.losses.append(loss.item())
        outcome.seconds += time.perf_counter() - started
        if step % options.every == 0 or step == options.steps:
            outcome.errors[step] = error_of(model, task, options.unseen)
            recent = outcome.losses[-options.every :]
            report(
                f"  step {step}: loss {sum(recent) / len(recent):.4f}, "
                f"error {outcome.error:.1f} %, {outcome.seconds:.0f} s"
            )
            if outcome.error <= options.until:
                break
    return outcome


def at_least(least: int) -> Callable[[str], int]:
    """Return what reads a number of the command line."""

    def number(text: str) -> int:
        if int(text) < least:
            message = f"must be at least {least}, got {text}"
            raise argparse.ArgumentTypeError(message)
        return int(text)

    return number


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument(
        "--task", choices=("adding", "order", "fashion", "digits"), default="adding"
    )
    result.add_argument(
        "--length", type=at_least(2), default=128, help="of adding and order"
    )
    result.add_argument("--pattern", choices=("chord", "cdil"), default="chord")
    result.add_argument(
        "--residual", choices=("none", "step", "input"), default="input"
    )
    result.add_argument("--head", choices=("flatten", "mean"), default="flatten")
    result.add_argument("--steps", type=at_least(1), default=1000)
    result.add_argument(
        "--every", type=at_least(1), default=250, help="steps between errors"
    )
    result.add_argument(
        "--until", type=float, default=0.0, help="per cent of errors to stop at"
    )
    result.add_argument(
        "--unseen", type=at_least(1), default=1000, help="sequences of each error"
    )
    result.add_argument("--batch", type=at_least(1), default=40)
    result.add_argument("--width", type=at_least(1), default=32)
    result.add_argument("--data", type=Path, default=FASHION, help="of fashion")
    result.add_argument(
        "--no-softmax", action="store_true", help="train no softmax attention"
    )
    result.add_argument("--seed", type=int, default=0)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a Paramixer and its twin, and compare."""
    options = parser().parse_args(arguments)
    task = task_of(options)
    kinds = [options.pattern] + ([] if options.no_softmax else ["softmax"])
    outcomes = {}
    for kind in kinds:
        model = model_of(kind, task, options)
        size = sum(p.numel() for p in model.parameters())
        print(f"{options.task}, n = {task.length}, {kind}, {size} parameters")
        outcomes[kind] = train(model, task, options)
    print("\nwrong answers on unseen sequences, and milliseconds a step")
    for kind, outcome in outcomes.items():
        milliseconds = 1e3 * outcome.seconds / outcome.steps
        print(f"  {kind:<8} {outcome.error:6.1f} % {milliseconds:8.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
