"""The results tables, made from the kept files of finished runs.

Tables in README.md and docs/results.md, docs/comparison.md with its curves, and the "Measured on" line of recipes.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from results_plan import MADE, MEASURED, RESULTS, ROOT, VIEWS, Part, Row, launcher, read_made, recipe_of, state

import comparison
import corruptions
import report
from errors import UserError
from files import write_whole
from runfolder import Run, read_run

Figures = dict[str, Any]  # numbers, or None where there is no such figure; the run itself, and how it was made


def figures(folder: Path) -> Figures:
    """A kept run's figures for the tables: fractions, nats, minutes, MiB. None if there is no such figure."""
    run: Run = read_run(folder)
    if run.notes or not run.summary or not run.history:
        raise UserError(f"{folder} is damaged: {'; '.join(run.notes) or 'it has no summary or no history'}")
    best, found, changes = run.best_epoch, comparison.robustness(run), comparison.phase_changes(run)
    made = read_made(folder / MADE)
    pairs = zip(run.history, run.history[1:], strict=False)
    fell = [a["epoch"] for a, b in pairs if a["phase"] == b["phase"] and b["lr"] < 0.2 * a["lr"]]  # not a cosine's
    names = ("train_loss", "train_top1", "val_loss", "val_top1")
    jump = changes[0] if changes else None
    # On a GPU its own memory counts; the history has it.
    memory = [row["peak_memory_mb"] for row in run.history if row["peak_memory_mb"] is not None]
    memory = memory or [it.get("peak_memory_mib", 0) for it in made["sessions"] if it["does"] == "train"]
    return {
        "run": run,
        "epochs": len(run.history),
        **{name: best[name] for name in names},
        **{name: run.summary[name] for name in ("test_loss", "test_top1", "minutes")},
        "views_top1": views_top1(folder / VIEWS),
        "mean15": found.mean15 if found else None,
        "version": found.version if found else None,
        "jump": jump.one - jump.top1 if jump else None,
        "later": jump.several - jump.top1 if jump and jump.several is not None else None,
        "span": jump.span if jump else None,
        "fell": ", ".join(map(str, fell)) or "-",
        "memory": max(memory, default=0) or None,
        "made": made,
    }


def views_top1(path: Path) -> float | None:
    """Test top-1 with six views of each image averaged; None if the run was not judged at that."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))["top1"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); restore or delete it") from None


def mean_of(name: str, form: str, scale: float = 1.0) -> Callable[[list[Figures]], str]:
    return lambda found: comparison.spread([it[name] for it in found], form, scale)


def jumps(found: list[Figures]) -> str:
    one, later = mean_of("jump", "+.1f", 100)(found), mean_of("later", "+.1f", 100)(found)
    spans = {it["span"] for it in found}  # epochs: fewer where a seed stopped early
    return one if later == "-" or len(spans) > 1 else f"{one} in one epoch, {later} in {found[0]['span']}"


def robustness(found: list[Figures]) -> str:
    """Marked if training images saw any of the 15 corruptions (the report's jitter has two of them), or if these were
    of an earlier version. Versions can't be compared, so that only seeds under the newest one are averaged."""
    newest = max(it["version"] for it in found)
    same, config = [it for it in found if it["version"] == newest], found[0]["run"].config
    text = mean_of("mean15", ".1f", 100)(same)
    if text == "-":
        return text
    jittered = config["augment"]["policy"] == "report" and "unaugmented" not in config["recipe"]
    of = f" ({len(same)} of {len(found)} seeds)" if len(same) < len(found) else ""
    return text + of + " †" * jittered + " ‡" * (newest < corruptions.VERSION)


def devices(found: list[Figures]) -> str:
    return ", ".join(
        sorted({it["machine"]["device"] for one in found for it in one["made"]["sessions"] if it["does"] == "train"})
    )


COLUMNS: dict[str, Callable[[list[Figures]], str]] = {
    "epochs": mean_of("epochs", ".0f"),
    "train loss": mean_of("train_loss", ".3f"),
    "train top-1 %": mean_of("train_top1", ".1f", 100),
    "val loss": mean_of("val_loss", ".3f"),
    "val top-1 %": mean_of("val_top1", ".1f", 100),
    "test loss": mean_of("test_loss", ".3f"),
    "test top-1 %": mean_of("test_top1", ".1f", 100),
    "with six views %": mean_of("views_top1", ".1f", 100),
    "robustness %": robustness,
    "phase change, points": jumps,
    "lr fell after epoch": lambda found: "; ".join(it["fell"] for it in found),
    "minutes": mean_of("minutes", ".0f"),
    "peak MiB": mean_of("memory", ",.0f"),
    "on": devices,
}
HEADING = """# The runs of the results, side by side

Written by `python benchmarks/results.py --tables` from the files in [results/](results/). The commands, data, weights
and machines behind them: [results.md](results.md)."""
SHORT = ("epochs", "val top-1 %", "test top-1 %", "with six views %", "robustness %", "minutes", "on")
Finished = list[tuple[Row, list[Figures]]]


def table(rows: Finished, columns) -> str:
    """Markdown: a line for each row that has a finished run."""
    lines = [[row.what, str(len(found)), *(COLUMNS[column](found) for column in columns)] for row, found in rows]
    return markdown(["", "seeds", *columns], lines)


def ablation(rows: Finished, finished: Finished) -> str:
    """Markdown: each row against the baseline it differs from by one change, seed by seed; baselines come first.

    Changes are judged on the validation rows: the test split is not for choosing.
    """
    columns, lines = ("val top-1 %", "val loss", "train top-1 %", "minutes"), []
    trained = {row.name: trained_with(row, found) for row, found in finished}
    reached = {row.name: {it["run"].config["seed"]: it["val_top1"] for it in found} for row, found in finished}
    compared_with = {row.against for row, _ in rows}
    for row, found in [it for it in finished if it[0].name in compared_with and it not in rows] + rows:
        base = reached.get(row.against, {}) if row.name != row.against else {}
        for mine, theirs in zip(trained[row.name], trained[row.against], strict=True) if base else ():
            if mine and theirs and mine != theirs:
                raise UserError(
                    f"{row.name} can't be compared with {row.against}: {mine} against {theirs} (precision, or weights)"
                )
        gains = [top1 - base[seed] for seed, top1 in reached[row.name].items() if seed in base and top1 is not None]
        gained = comparison.spread(gains, "+.1f", 100) if gains else "-"
        lines.append([row.what, str(len(found)), gained, *(COLUMNS[column](found) for column in columns)])
    return markdown(["", "seeds", "change, points of val top-1", *columns], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join(
        f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in [head, ["---"] * len(head), *lines]
    )


def trained_with(row: Row, found: list[dict]) -> tuple[str, str | None]:
    """The precision in which all of a row's seeds were trained, and the digest of their weights, if it is known."""
    precisions = sorted({it["made"]["precision"] for it in found})
    if len(precisions) > 1:
        raise UserError(f"{row.name}: its seeds were trained in {' and '.join(precisions)}; train them in one")
    sessions = [session for it in found for session in it["made"]["sessions"]]
    weights = {it["weights_tensors_sha256"] for it in sessions if "weights_tensors_sha256" in it}
    if len(weights) > 1:
        raise UserError(f"{row.name}: its seeds started from several weights; train them from the same")
    return precisions[0], next(iter(weights), None)


def how(rows: Finished) -> str:
    """The commands behind a table, with their commits, dates and machines."""
    lines = []
    for row, found in rows:
        precision, weights = trained_with(row, found)
        made = [it["made"] for it in found]
        sessions = [session for it in made for session in it["sessions"]]
        revisions = {it["run"].config["data"].get("revision") for it in found} - {None}
        if len(revisions) > 1:
            raise UserError(f"{row.name}: its seeds read several commits of the data; train them on the same")
        facts = [
            sorted(
                {", ".join(it["machine"][key] for key in ("device", "machine", "cpu_capability")) for it in sessions}
            ),
            ["commit " + ", ".join(sorted({it["commit"] for it in sessions}))],
            [", ".join(sorted({it["date"] for it in sessions}))],
            [f"weights {weights[:12]}..."] if weights else [],
        ]
        seeds = f", and seeds {', '.join(str(it['run'].config['seed']) for it in found[1:])}" if found[1:] else ""
        lines.append(
            f"- {row.what}: `{shlex.join([*launcher(precision), *shlex.split(made[0]['command'])])}`{seeds} "
            f"({'; '.join(fact for group in facts for fact in group)})"
        )
    return "\n".join(lines)


def put(path: Path, pattern: str, text: str) -> None:
    """Replace what a pattern matches, exactly once, by text between its groups 1 and 2."""
    old = path.read_text(encoding="utf-8")
    new, count = re.subn(pattern, lambda found: f"{found[1]}{text}{found[2]}", old, flags=re.DOTALL | re.MULTILINE)
    if count != 1:
        raise UserError(f"{path}: {pattern} should match once, and does {count} times")
    if new != old:
        write_whole(path, new)
        print(f"written: {path.relative_to(ROOT)}")


def put_table(path: Path, name: str, text: str) -> None:
    """Write a table between its markers."""
    put(path, rf"(^<!-- results: {name} -->\n)(?:(?!<!--).)*?(^<!-- end -->)", f"{text}\n")


def measured(row: Row, found: list[Figures]) -> str:
    """A recipe's "Measured on" line."""
    seeds = f"{len(found)} seeds" if found[1:] else "one seed"
    weights = " from Tiny ImageNet weights (not ImageNet)," if row.options else ""
    made = found[0]["made"]
    precision, device = made["precision"].replace("no", "fp32"), made["sessions"][0]["machine"]["device"]
    return (
        f"Measured on CIFAR-100,{weights} {precision}, {device}, {seeds}: "
        f"test top-1 {COLUMNS['test top-1 %'](found)} %. Conditions: docs/results.md."
    )


def write_tables(plan: list[Row], runs: Path) -> None:
    """Rebuild all tables, and the "Measured on" lines of recipes run as they are."""
    finished: Finished = []
    for row in plan:
        done = [run for run in row.runs() if state(row, run, runs) == "done"]
        if done:
            finished.append((row, [figures(RESULTS / run) for run in done]))
    for part in get_args(Part):
        own = [(row, found) for row, found in finished if row.part == part]
        made = ablation(own, finished) if any(row.against for row, _ in own) else table(own, COLUMNS)
        put_table(ROOT / "docs" / "results.md", part, f"{made}\n\n{how(own)}" if own else "Nothing yet.")
    main = [(row, found) for row, found in finished if row.against is None]
    put_table(ROOT / "README.md", "summary", table(main, SHORT) if main else "Nothing yet.")
    write_comparison([it["run"] for _, found in main for it in found])
    for row, found in main:
        if row.speaks_for_its_recipe:
            put(recipe_of(row), MEASURED, measured(row, found))


def write_comparison(runs: list[Run]) -> None:
    """The comparison as a page of Markdown, with the runs' curves."""
    import plots  # here, as it takes seconds that a list of runs need not wait for

    folder = ROOT / "docs" / "curves"
    parts = [HEADING, report.markdown(runs, with_commands=False) if runs else "Nothing yet."]
    folder.mkdir(exist_ok=True)
    for picture in plots.curves(runs, with_legend=True) if runs else ():
        write_whole(folder / f"{picture.stem}.svg", picture.encode("svg").decode())
        parts.append(f"![{picture.alt}](curves/{picture.stem}.svg)")
    write_whole(ROOT / "docs" / "comparison.md", "\n\n".join(parts) + "\n")
