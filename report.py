"""Show finished or running runs side by side, as Markdown tables.

    python report.py runs/NAME [runs/OTHER ...]

Reads run folders and nothing else: config.yaml, history.jsonl and, where a run is finished, summary.json.
"""

import argparse
import html
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from errors import USAGE, UserError, plain, told


@dataclass(frozen=True)
class Run:
    """What a run folder says. `summary` is empty while the run goes on."""

    name: str
    config: dict
    history: list[dict]
    summary: dict


def read_run(path: Path) -> Run:
    """Read a run folder; UserError if it is none."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        config["model"]["name"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        raise UserError(f"{path} is not a run folder: it has no readable config.yaml", USAGE) from None
    history, summary = path / "history.jsonl", path / "summary.json"
    try:
        rows = (
            [json.loads(line) for line in history.read_text(encoding="utf-8").splitlines()] if history.exists() else []
        )
        figures = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: history.jsonl or summary.json is damaged ({error})") from None
    return Run(path.name, config, rows, figures)


def epochs_table(run: Run) -> str:
    """One row per epoch; a phase's first epoch names it, so that the change stands out."""
    rows, phase = [], None
    for row in run.history:
        rows.append(
            [
                _text(row["phase"]) if row["phase"] != phase else "",
                str(row["epoch"]),
                f"{row['lr']:.1e}",
                f"{row['train_loss']:.3f}",
                _percent(row["train_top1"]),
                f"{row['val_loss']:.3f}",
                _percent(row["val_top1"]),
                _percent(row["val_top5"]),
                f"{row['images_per_second']:.0f}",
            ]
        )
        phase = row["phase"]
    head = ["phase", "epoch", "lr", "train loss", "train top-1", "val loss", "val top-1", "val top-5", "images/s"]
    return _table(head, rows)


def comparison_table(runs: list[Run]) -> str:
    """One row per run, with its best validation and its test figures."""
    rows = []
    for run in runs:
        best = max(run.history, key=lambda row: row["val_top1"], default={})
        rows.append(
            [
                _text(run.name),
                _text(run.config["model"]["name"]),
                " + ".join(f"{_text(name)} {count}" for name, count in _epochs_by_phase(run).items()) or "-",
                str(best.get("epoch", "-")),
                _percent(best.get("val_top1")),
                _percent(run.summary.get("test_top1")),
                _percent(run.summary.get("test_top5")),
                f"{sum(row['seconds'] for row in run.history) / 60:.1f}",
            ]
        )
    head = ["run", "model", "epochs", "best epoch", "best val top-1", "test top-1", "test top-5", "minutes"]
    return _table(head, rows)


def phase_changes(run: Run) -> list[str]:
    """A sentence per phase change: validation top-1 in the epoch before and in the one after."""
    return [
        f"{_text(run.name)}: {_text(before['phase'])} -> {_text(after['phase'])}: "
        f"validation top-1 {before['val_top1']:.1%} -> {after['val_top1']:.1%} in one epoch "
        f"({100 * (after['val_top1'] - before['val_top1']):+.1f} points)"
        for before, after in zip(run.history, run.history[1:], strict=False)
        if before["phase"] != after["phase"]
    ]


def _epochs_by_phase(run: Run) -> dict[str, int]:
    counts = {}
    for row in run.history:
        counts[row["phase"]] = counts.get(row["phase"], 0) + 1
    return counts


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _text(value) -> str:
    """A name that somebody else chose, as Markdown without tags, links or further cells."""
    return html.escape(plain(str(value)), quote=False).replace("|", "\\|").replace("[", "\\[")


def _table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up as plain text too."""
    cells = [head, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, in the order to show them")
    runs = [read_run(path) for path in parser.parse_args().runs]
    for run in runs:
        print(f"### {_text(run.name)}\n\n{epochs_table(run) if run.history else 'no epoch finished yet'}\n")
    for run in runs:
        for sentence in phase_changes(run):
            print(sentence)
    print(f"\n### Side by side\n\n{comparison_table(runs)}")


if __name__ == "__main__":
    with told():
        main()
