"""A character-level language model, with log-domain attention and with softmax.

Two models of one size, seed and number of steps read the language reference that comes
with Python: one attends by `subquad.linear_attention`, whose log-features are queries
and keys themselves, the other by torch's softmax attention. Both losses on unseen text
are printed. Then each writes text, and the time for a token is printed over the number
of tokens before it: the state of the first has one size, the keys of the second are
all kept.

    python examples/character_language_model.py            # a few minutes
    python examples/character_language_model.py --steps 20 # a try
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import time
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

import subquad as sq


class LinearAttention(nn.Module):
    """Log-domain attention; old tokens fade at another rate for every feature."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        d_k = width // heads
        half_lives = torch.logspace(0.0, 11.0, d_k, base=2.0)
        self.register_buffer("log_decay", -math.log(2.0) / half_lives)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        log_decay = self.log_decay.expand(k.shape)
        return sq.linear_attention(q, k, v, causal=True, log_decay=log_decay)

    def start(self, like: torch.Tensor) -> sq.AttentionState:
        *batch, d = like.shape
        return sq.AttentionState.init(tuple(batch), d, d, like=like)

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: object
    ) -> tuple[torch.Tensor, object]:
        return state.step(q, k, v, self.log_decay.expand(k.shape))


class SoftmaxAttention(nn.Module):
    """torch's attention, with rotary positions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        pairs = width // heads // 2
        self.register_buffer("frequency", 10000.0 ** -(torch.arange(pairs) / pairs))

    def rotate(self, x: torch.Tensor, first: int) -> torch.Tensor:
        angle = torch.arange(first, first + x.shape[-2])[:, None] * self.frequency
        a, b = x.chunk(2, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            self.rotate(q, 0), self.rotate(k, 0), v, is_causal=True
        )

    def start(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *batch, d = like.shape
        return (like.new_zeros(*batch, 0, d),) * 2

    def step(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: object
    ) -> tuple[torch.Tensor, object]:
        keys, values = state
        t = keys.shape[-2]
        keys = torch.cat([keys, self.rotate(k[..., None, :], t)], dim=-2)
        values = torch.cat([values, v[..., None, :]], dim=-2)
        y = functional.scaled_dot_product_attention(
            self.rotate(q[..., None, :], t), keys, values
        )
        return y[..., 0, :], (keys, values)


class Block(nn.Module):
    """Attention and a multilayer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int, attention: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.norm = nn.LayerNorm(width)
        self.projections = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        # Half of the channels come from the token before.
        before = functional.pad(normed, (0, 0, 1, 0))[..., :-1, :]
        q, k, v = self.project(normed, before)
        y = self.attention(*(a.transpose(-2, -3) for a in (q, k, v)))
        x = x + self.out(y.transpose(-2, -3).flatten(-2))
        return x + self.perceptron(x)

    def project(
        self, normed: torch.Tensor, before: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        half = normed.shape[-1] // 2
        mixed = torch.cat([normed[..., :half], before[..., half:]], dim=-1)
        return self.projections(mixed).unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def start(self, x: torch.Tensor) -> tuple[torch.Tensor, object]:
        like = x.new_zeros(*x.shape[:-1], self.heads, x.shape[-1] // self.heads)
        return torch.zeros_like(x), self.attention.start(like)

    def step(self, x: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
        before, attended = state
        normed = self.norm(x)
        y, attended = self.attention.step(*self.project(normed, before), attended)
        x = x + self.out(y.flatten(-2))
        return x + self.perceptron(x), (normed, attended)


class Model(nn.Module):
    """Predicts the next character."""

    def __init__(
        self, n_characters: int, attention: type[nn.Module], width: int, layers: int
    ) -> None:
        super().__init__()
        heads = 4
        self.embedding = nn.Embedding(n_characters, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, attention(width, heads)) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, n_characters)

    def forward(self, characters: torch.Tensor) -> torch.Tensor:
        x = self.embedding(characters)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def start(self) -> list[object]:
        like = self.embedding.weight.new_zeros(self.embedding.embedding_dim)
        return [block.start(like) for block in self.blocks]

    def step(
        self, character: torch.Tensor, states: list[object]
    ) -> tuple[torch.Tensor, list[object]]:
        x = self.embedding(character)
        after = []
        for block, state in zip(self.blocks, states, strict=True):
            x, state = block.step(x, state)
            after.append(state)
        return self.head(self.norm(x)), after


def loss_of(model: nn.Module, text: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy, in nats a character."""
    logits = model(text[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


def train(model: nn.Module, text: torch.Tensor, options: argparse.Namespace) -> None:
    """Minimise the loss on windows drawn at random."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=options.steps, pct_start=0.1
    )
    starts = len(text) - options.context - 1
    started = time.perf_counter()
    for step in range(options.steps):
        at = torch.randint(starts, (options.batch,), generator=generator)
        batch = torch.stack([text[i : i + options.context + 1] for i in at])
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, options.steps // 6) == 0:
            seconds = time.perf_counter() - started
            print(
                f"  step {step + 1}: loss {loss.item():.3f}, {seconds:.0f} s",
                flush=True,
            )


@torch.no_grad()
def evaluate(model: nn.Module, text: torch.Tensor, context: int) -> float:
    """Return the loss on text that was not trained on."""
    windows = text[: len(text) // (context + 1) * (context + 1)].view(-1, context + 1)
    losses = [loss_of(model, part) * len(part) for part in windows[:128].split(16)]
    return float(sum(losses) / len(windows[:128]))


@torch.no_grad()
def write(
    model: Model, prompt: torch.Tensor, marks: Sequence[int], seed: int
) -> tuple[list[int], list[tuple[int, float]]]:
    """Continue a text; return it, and the milliseconds a token takes at some places."""
    generator = torch.Generator().manual_seed(seed)
    states = model.start()
    for character in prompt:
        logits, states = model.step(character, states)
    written: list[int] = []
    times: list[tuple[int, float]] = []
    window = 50
    for t in range(len(prompt), max(marks) + window):
        if t in marks:
            started = time.perf_counter()
        character = torch.multinomial(
            (logits / 0.7).softmax(-1), 1, generator=generator
        )[0]
        written.append(int(character))
        logits, states = model.step(character, states)
        if t - window + 1 in marks:
            elapsed = time.perf_counter() - started
            times.append((t - window + 1, 1e3 * elapsed / window))
    return written, times


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, default=4000, help="length of the text written"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    topics = pydoc_data.topics.topics
    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    index = {character: i for i, character in enumerate(alphabet)}
    characters = torch.tensor([index[character] for character in text])
    split = len(characters) * 9 // 10
    print(
        f"{len(text)} characters, {len(alphabet)} different; the last tenth is unseen"
    )

    kinds = {"log-domain": LinearAttention, "softmax": SoftmaxAttention}
    losses, models = {}, {}
    for name, kind in kinds.items():
        torch.manual_seed(options.seed)
        model = Model(len(alphabet), kind, options.width, options.layers)
        size = sum(p.numel() for p in model.parameters())
        print(f"\n{name} attention, {size} parameters")
        train(model, characters[:split], options)
        losses[name] = evaluate(model, characters[split:], options.context)
        models[name] = model

    print("\nloss on unseen text, nats a character")
    for name, loss in losses.items():
        print(f"  {name:<12} {loss:.3f}")

    marks = [m for m in (100, 500, 1000, 2000, 4000, 8000) if m < options.tokens]
    marks = marks or [options.tokens]
    prompt = characters[split : split + 64]
    print("\nmilliseconds a token, after so many tokens")
    print("  " + " " * 12 + "".join(f"{m:>8}" for m in marks))
    for name, model in models.items():
        written, times = write(model, prompt, marks, options.seed)
        print(f"  {name:<12}" + "".join(f"{ms:>8.2f}" for _, ms in times))
        if name == "log-domain":
            sample = "".join(alphabet[i] for i in written[:300])
    print("\nwritten with the state of constant size:\n" + sample)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
