"""The examples run, at sizes that take seconds."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_character_language_model(capsys):
    pytest.importorskip("torch")
    sizes = "--steps 3 --context 32 --batch 2 --width 32 --layers 1 --tokens 120"
    assert load("character_language_model").main(sizes.split()) == 0
    printed = capsys.readouterr().out
    losses = printed.split("loss on unseen text")[1].splitlines()[1:3]
    assert [line.split()[0] for line in losses] == ["log-domain", "softmax"]
    # Before much is learned a character costs about as much as any other.
    assert all(2.0 < float(line.split()[1]) < 6.0 for line in losses)
    assert "written with the state of constant size" in printed


def test_a_step_is_the_model():
    torch = pytest.importorskip("torch")
    example = load("character_language_model")
    torch.manual_seed(0)
    text = torch.randint(0, 10, (1, 12))
    for kind in (example.LinearAttention, example.SoftmaxAttention):
        model = example.Model(10, kind, 32, 2)
        with torch.no_grad():
            expected = model(text)[0]
            states = model.start()
            for t in range(text.shape[1]):
                logits, states = model.step(text[0, t], states)
                torch.testing.assert_close(logits, expected[t], rtol=1e-4, atol=1e-5)
