"""Write the tables of measured results from the JSON that the benchmarks stored.

``benchmarks/results/*.json`` -> ``docs/_generated/performance.md``, or ``gpu.md`` in
its place for those of a GPU, and between the markers of ``README.md``; those of a study
-> its own page. With ``--check``, say whether they are what the JSON makes.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import cuda, machine  # noqa: E402
from benchmarks.harness import load_operations  # noqa: E402
from benchmarks.registry import Options, Row  # noqa: E402

PAGE = ROOT / "docs" / "_generated" / "performance.md"
GPU_PAGE = PAGE.with_name("gpu.md")
README = ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


def duration(seconds: float | None) -> str:
    """Return seconds in the unit that suits them."""
    if seconds is None:
        return "–"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def size(count: Any) -> str:
    """Return bytes in MiB."""
    return f"{count / 2**20:.0f} MiB" if isinstance(count, float) else "–"


def machine_line(machine: dict[str, Any]) -> str:
    """Return what the timings depend on."""
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return (
        f"{machine['processor']}, {machine['threads']} threads, x86-64-"
        f"{machine['isa']}, {machine['blas']}, Python {machine['python']}, {versions}"
    )


def rows_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows that were timed."""
    return [row for row in document["rows"] if row["status"] == "ok"]


def page(documents: list[dict[str, Any]]) -> str:
    """Return every row, by operation."""
    lines = []
    for document in documents:
        for operation in dict.fromkeys(row["op"] for row in document["rows"]):
            lines += [f"**{operation}**", "", machine_line(document["machine"]), ""]
            lines += [
                "| case | | median | limit | of limit | × ours | error | memory |",
                "| --- | --- | --- | --- | --- | --- | --- | --- |",
            ]
            for row in rows_of(document):
                if row["op"] != operation:
                    continue
                ratio, ours = row["ratio_to_limit"], row.get("ratio_to_subquad")
                lines.append(
                    f"| {row['case']} | {row['peer']} | {duration(row['median'])} "
                    f"| {duration(row['limit'])} "
                    f"| {'–' if ratio is None else format(ratio, '.2f')} "
                    f"| {'–' if ours is None else format(ours, '.2f')} "
                    f"| {'–' if row['error'] is None else format(row['error'], '.1e')} "
                    f"| {size(row.get('extra_memory'))} |"
                )
            lines.append("")
            summary = document["summaries"].get(operation)
            if summary:
                lines += ["```text", *summary, "```", ""]
    return "\n".join(lines)


NOT_MEASURED = "not measured"

# What the README shows.
SHOWN = {
    "log_normalizer",
    "log_normalizer_vjp",
    "gaussian",
    "logcumsumexp",
    "logcumsumexp_vjp",
    "causal_attention",
    "causal_attention_vjp",
    "attention_step",
    "log_features",
    "log_features_vjp",
    "trigonometric_features",
    "hadamard_transform",
    "random_feature_attention",
    "causal_product",
    "feature_fit",
    "sparse_factor_product",
    "sparse_factor_product_training",
    "factor_values",
    "factor_values_training",
    "paramixer",
    "paramixer_training",
    "operator_chain",
    "embedding_step",
    "edrep",
}


def gpu_outline() -> list[Row]:
    """Return a row for everything that would be measured on a GPU."""
    options = Options(threads=1, rates=None, device=cuda.Place())
    return [
        {"op": name, "case": case.name, "peer": peer.name, "status": "skipped"}
        for name, operation in load_operations().items()
        if name.startswith("gpu_")
        for case in operation.cases(options)
        for peer in case.peers
    ]


def gpu_table(rows: list[Row]) -> list[str]:
    """Return the rows of one operation; who has no time has no figure either."""
    lines = [
        "| case | | median | limit | share of the limit | × ours | error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        head = f"| {row['case']} | {row['peer']} "
        if row["status"] != "ok":
            text = NOT_MEASURED if row["status"] == "skipped" else row["status"]
            lines.append(f"{head}| {text} | – | – | – | – |")
            continue
        ratio, ours = row["ratio_to_limit"], row["ratio_to_subquad"]
        lines.append(
            f"{head}| {duration(row['median'])} | {duration(row['limit'])} "
            f"| {'–' if ratio is None else format(1 / ratio, '.0%')} "
            f"| {'–' if ours is None else format(ours, '.2f')} "
            f"| {'–' if row['error'] is None else format(row['error'], '.1e')} |"
        )
    return lines


def gpu_page(documents: list[dict[str, Any]]) -> str:
    """Return the results of each card, or what there will be to measure."""
    lines = []
    for document in documents:
        facts = document["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in facts.get("versions", {}).items())
        lines += [machine.device_line(facts), "", versions, ""]
        for step in document.get("steps", []):
            lines.append(
                f"- {step['name']}: {step['status']}, {step['seconds']:.0f} s"
                + (f"; {step['note']}" if step["note"] else "")
            )
        lines.append("")
        lines += gpu_tables(document["rows"] or gpu_outline())
    if not documents:
        text = "Not measured: no results of a card are stored. These are the cases."
        lines += [text, "", *gpu_tables(gpu_outline())]
    return "\n".join(lines)


def gpu_tables(rows: list[Row]) -> list[str]:
    """Return a table for each operation."""
    lines = []
    for operation in dict.fromkeys(row["op"] for row in rows):
        lines += [f"**{operation}**", ""]
        lines += gpu_table([row for row in rows if row["op"] == operation])
        lines.append("")
    return lines


def short(documents: list[dict[str, Any]]) -> str:
    """Return one line a case: ours, the share of the limit, the ratio of each peer."""
    lines = [
        "| case | subquad | share of the limit | peers take |",
        "| --- | --- | --- | --- |",
    ]
    machine = ""
    for document in documents:
        rows = rows_of(document)
        for key in dict.fromkeys((row["op"], row["case"]) for row in rows):
            if key[0] not in SHOWN:
                continue
            case = [row for row in rows if (row["op"], row["case"]) == key]
            ours = next((row for row in case if row["peer"] == "subquad"), None)
            if ours is None:
                continue
            alone = document["machine"]["threads"] == 1
            if not alone:
                machine = machine_line(document["machine"])
            peers = ", ".join(
                f"{row['peer']} {row['ratio_to_subquad']:.3g} ×"
                for row in case
                if row is not ours
            )
            share = ours["ratio_to_limit"]
            lines.append(
                f"| {key[0]}, {key[1]}{', 1 thread' if alone else ''} "
                f"| {duration(ours['median'])} "
                f"| {'–' if share is None else format(1 / share, '.0%')} | {peers} |"
            )
    return "\n".join([*lines, "", f"Measured on {machine}."])


def study_path(document: dict[str, Any]) -> Path:
    """Return the page of a study."""
    return PAGE.with_name(f"embedding_{document['study']}.md")


def study_page(document: dict[str, Any]) -> str:
    """Return what a study makes of its results."""
    module = importlib.import_module(f"tools.embedding.{document['study']}")
    text: str = module.page(document)
    return text


def main() -> int:
    """Write the tables, or compare them."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    everything = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    documents = [each for each in everything if "study" not in each]
    studies = [each for each in everything if "study" in each]
    of_cards = [each for each in documents if "device" in each["machine"]]
    documents = [each for each in documents if each not in of_cards]
    readme = README.read_text(encoding="utf-8")
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    wanted = {
        PAGE: page(documents),
        GPU_PAGE: gpu_page(of_cards),
        README: f"{head}{BEGIN}\n{short(documents)}\n{END}{tail}",
        **{study_path(each): study_page(each) for each in studies},
    }
    if "--check" in sys.argv[1:]:
        stale = [
            path
            for path, text in wanted.items()
            if not path.exists() or path.read_text(encoding="utf-8") != text
        ]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what benchmarks/results makes")
        return len(stale)
    for path, text in wanted.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
