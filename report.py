"""Show finished or running runs side by side.

    python report.py runs/NAME [runs/OTHER ...]                # tables in the terminal
    python report.py runs/* --output report.html               # one page with everything, to open or to send
    python report.py runs/* --markdown                         # the comparison, for a README
    python report.py runs/* --plots plots                      # each figure as PNG and SVG

Reads only run folders: config.yaml, history.jsonl, summary.json of a finished run, and predictions/ of one that
predict.py has judged. An existing output file is replaced completely or not at all.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import glob
import html
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import comparison
from commandline import Parser, expanded
from errors import USAGE, UserError, reported
from files import replace
from runfolder import Run, read_run
from text import NAME_LENGTH, plain

OVER_SEEDS = "Mean ± standard deviation over runs that differ in seed or in fold alone"
COMPACT = ("run", "model", "phases", "best epoch", "val top-1", "test top-1", "test top-5", "minutes")  # on a terminal


def read_runs(paths: list[Path]) -> list[Run]:
    """Read run folders; those that share a name are named by their paths.

    Raises:
        UserError: as `read_run`, or a folder is named twice.
    """
    absolute = [os.path.abspath(path) for path in paths]
    for path in absolute:
        if absolute.count(path) > 1:
            raise UserError(f"{path} is named twice", USAGE)
    runs = [read_run(path) for path in paths]
    names = [run.name for run in runs]
    for index, run in enumerate(runs):
        if names.count(run.name) > 1:  # cut at the left: paths mostly differ near their ends
            runs[index] = dataclasses.replace(run, name=plain(absolute[index])[-NAME_LENGTH:])
    return runs


def epochs_table(run: Run) -> str:
    """One row per epoch; only a phase's first epoch names it, so that changes stand out."""
    return _table(comparison.epochs(run))


def comparison_table(runs: list[Run]) -> str:
    """One row per run, with its best validation and its test figures: what fits a terminal."""
    return _table(comparison.comparison(runs).columns(*COMPACT))


def phase_changes(run: Run) -> list[str]:
    """A sentence per phase change: validation top-1 in the epoch before, after one epoch, and after five."""
    sentences = []
    for it in comparison.phase_changes(run):
        sentence = (
            f"{_text(it.run)}: {_text(it.before)} -> {_text(it.after)}: "
            f"validation top-1 {it.top1:.1%} -> {it.one:.1%} in one epoch ({comparison.points(it.one - it.top1)})"
        )
        if it.several is not None:
            sentence += f", {it.several:.1%} after {it.span} ({comparison.points(it.several - it.top1)})"
        if it.within_noise(it.one) or (it.several is not None and it.within_noise(it.several)):
            sentence += f": {it.words}"
        sentences.append(sentence)
    return sentences


def terminal(runs: list[Run]) -> str:
    """The epochs of each run, the phase changes, and the runs side by side."""
    parts = [
        f"### {_text(run.name)}\n\n{epochs_table(run) if run.history else 'no epoch finished yet'}\n" for run in runs
    ]
    parts += [sentence for run in runs for sentence in phase_changes(run)]
    parts.append(f"\n### Side by side\n\n{comparison_table(runs)}")
    if repeated := comparison.over_seeds(runs):
        parts.append(f"\n### {OVER_SEEDS}\n\n{_table(repeated)}")
    return "\n".join(parts)


def markdown(runs: list[Run], with_commands: bool = True) -> str:
    """Markdown for a README: the whole comparison, the phase changes, and how the runs were made.

    Args:
        with_commands: end with the commands that retrain the runs; they hold this machine's paths.
    """
    parts = [_table(comparison.comparison(runs)), *comparison.legend(runs)]
    if repeated := comparison.over_seeds(runs):
        parts += [f"{OVER_SEEDS}:", _table(repeated)]
    if changes := [f"- {sentence}" for run in runs for sentence in phase_changes(run)]:
        parts.append("\n".join(changes))
    differences = comparison.differences(runs)
    if differences and differences.rows:
        parts += ["Where the configurations differ:", _table(differences)]
    if with_commands:
        commands = "\n".join(comparison.command(run) for run in runs)
        parts.append(f"```\n{commands}\n```")
    return "\n\n".join(parts)


def _text(value) -> str:
    """Escape a foreign name for Markdown: no tags, no extra cells, and no links that hide where they lead.

    A bare URL stays as it is: GitHub makes it a link that shows its target.
    """
    text = html.escape(plain(str(value)), quote=False)
    return re.sub(r"([\\|\[])", r"\\\1", text)


def _table(table: comparison.Table) -> str:
    """A Markdown table whose columns line up as plain text too."""
    cells = [[_text(cell) for cell in row] for row in [table.head, *table.rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


# ---- to files -------------------------------------------------------------------------------------------------------


def write_page(runs: list[Run], path: Path) -> None:
    """Write the page as one file, in a new folder if need be."""
    import page

    with _whole(path, "--output") as file:
        file.write(page.render(runs).encode())


def write_plots(runs: list[Run], folder: Path) -> int:
    """Write each figure as FOLDER/NAME.png and NAME.svg; return their number."""
    import plots

    taken = set()
    for picture in _pictures(runs, plots):
        name, count = picture.stem, 1
        while name.lower() in taken:  # two runs may share a name, and some file systems ignore case
            count += 1
            name = f"{picture.stem}-{count}"
        taken.add(name.lower())
        for form in ("png", "svg"):
            with _whole(folder / f"{name}.{form}", "--plots") as file:
                file.write(picture.encode(form))
    return len(taken)


def _pictures(runs: list[Run], plots) -> Iterator:
    yield from plots.curves(runs, with_legend=True)
    for run in runs:
        for found in run.predictions:
            yield from plots.of_predictions(run, found)


@contextlib.contextmanager
def _whole(path: Path, option: str) -> Iterator:
    """A file to write bytes to, which gets its name only when complete.

    Raises:
        UserError: it can't be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.is_dir():
            raise UserError(f"{option}: {path} is a folder: name a file in it", USAGE)
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            yield file
        replace(unfinished, path)
    except OSError as error:
        raise UserError(f"{option}: {path} can't be written: {error.strerror or error}", USAGE) from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def parse() -> argparse.Namespace:
    parser = Parser(
        prog="report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        type=expanded,
        nargs="+",
        metavar="RUN",
        help="run folders, in the order to show them",
    )
    parser.add_argument("--output", type=expanded, metavar="FILE.html", help="write the page there")
    parser.add_argument("--markdown", action="store_true", help="print the comparison for a README, and nothing else")
    parser.add_argument("--plots", type=expanded, metavar="DIR", help="write each figure there, as PNG and as SVG")
    args = parser.parse_args(sys.argv[1:])
    args.runs = [found for path in args.runs for found in _found(path)]
    if args.output and args.output.suffix.lower() not in (".html", ".htm"):  # never overwrite another file
        raise UserError(f"--output: {args.output} should end in .html", USAGE)
    return args


def _found(path: Path) -> list[Path]:
    """What a pattern such as runs/* stands for, which Windows's shells leave to the command; else the path itself."""
    if not glob.has_magic(path.name) or os.path.lexists(path) or not path.parent.is_dir():
        return [path]
    names = fnmatch.filter(os.listdir(path.parent), path.name)
    return sorted(path.parent / name for name in names if name[0] != ".") or [path]


def main() -> None:
    args = parse()
    # A page written into runs/ is among them when the shell expands runs/*.
    skipped = [path for path in args.runs if os.path.isfile(path)]
    if len(skipped) == len(args.runs):
        raise UserError(f"{skipped[0]} is a file: name run folders, as in report.py runs/NAME", USAGE)
    for path in skipped:
        print(plain(f"{path}: a file, not a run folder: left out"), file=sys.stderr)
    runs = read_runs([path for path in args.runs if path not in skipped])
    for run in runs:
        for note in run.notes:
            print(plain(f"{run.path}: {note}"), file=sys.stderr)
    if args.markdown:
        print(markdown(runs))
    elif not (args.output or args.plots):
        print(terminal(runs))
    written = sys.stderr if args.markdown else sys.stdout  # Markdown may be piped to a file
    if args.plots:
        print(plain(f"plots: {write_plots(runs, args.plots)} figures in {args.plots}"), file=written)
    if args.output:
        write_page(runs, args.output)
        print(plain(f"page: {args.output}"), file=written)


if __name__ == "__main__":
    with reported():
        main()
