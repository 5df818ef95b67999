"""Write the table of the example's tasks: ``docs/_generated/paramixer_tasks.md``.

The adding problem and temporal order, and Fashion-MNIST where its files are (else the
digits of scikit-learn), by both patterns and by softmax attention: per cent of wrong
answers on unseen sequences, the steps it took to get there, and milliseconds a step.
Each training ends as soon as less than `--until` per cent are wrong.

``--quick`` is a try of seconds. The whole table takes about an hour on two processors,
the most of it softmax attention of the longest sequences.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.features._common import ROOT, table, write

KINDS = ("chord", "cdil", "softmax")
# Most steps of a training, which is shorter where it succeeds.
STEPS = {"adding": 2000, "order": 3000, "fashion": 3000, "digits": 1500}


def example() -> Any:
    """Return the example as a module."""
    name = "paramixer"
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def page(
    lengths: Sequence[int],
    tasks: Sequence[str],
    *,
    until: float,
    steps: int | None = None,
    arguments: Sequence[str] = (),
) -> str:
    """Return the table, a row for each task and length."""
    module = example()
    rows = []
    for name in tasks:
        for length in lengths if name in ("adding", "order") else lengths[:1]:
            options = module.parser().parse_args(
                [*("--task", name, "--length", str(length), "--until", str(until))]
                + ["--steps", str(steps or STEPS[name]), *arguments]
            )
            task = module.task_of(options)
            row = [f"{name}, n = {task.length}"]
            for kind in KINDS:
                print(f"{row[0]}, {kind}", flush=True)
                model = module.model_of(kind, task, options)
                row.append(cell(module.train(model, task, options)))
            rows.append(row)
    return table(["", *KINDS], rows)


def cell(outcome: Any) -> str:
    """Return what a training came to."""
    milliseconds = 1e3 * outcome.seconds / outcome.steps
    return f"{outcome.error:.1f} %, {outcome.steps} steps of {milliseconds:.3g} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a try: nothing is learnt")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--tasks", nargs="+", choices=tuple(STEPS))
    parser.add_argument("--steps", type=int, help="of each training, at most")
    parser.add_argument(
        "--until", type=float, default=0.5, help="per cent of errors to stop at"
    )
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST")
    options = parser.parse_args(arguments)
    folder = options.data or example().FASHION
    images = "fashion" if folder.is_dir() else "digits"
    tasks = options.tasks or ["adding", "order", images]
    rest = ["--data", str(folder)]
    if options.quick:
        options.lengths, options.steps = [32], 4
        rest += ["--batch", "4", "--width", "8", "--unseen", "100"]
    given = {"until": options.until, "steps": options.steps, "arguments": rest}
    text = page(options.lengths, tasks, **given)
    if options.quick:
        print(text)
    else:
        write("paramixer_tasks", text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
