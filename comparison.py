"""Comparisons: runs in a table, one run's epochs, phase changes, configurations. Text, not yet escaped."""

import json
import math
import os
import shlex
import statistics
from dataclasses import dataclass
from itertools import pairwise

from recipe import script_of
from runfolder import Predictions, Run, number
from text import NAME_LENGTH, plain, shown

AFTER = 5  # epochs that the second jump of a phase change spans
UNTOLD = ("output_dir", "run_name")  # where a run is stored is no difference


@dataclass(frozen=True)
class Table:
    """Cells as text. They hold foreign names unescaped: whoever prints them must escape them."""

    head: list[str]
    rows: list[list[str]]

    def columns(self, *names: str) -> "Table":
        """The table with only these columns."""
        kept = [self.head.index(name) for name in names]
        return Table(list(names), [[row[column] for column in kept] for row in self.rows])


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f} points"


# ---- the runs -------------------------------------------------------------------------------------------------------


def throughput(run: Run) -> float | None:
    """Training images per second: the harmonic mean over epochs, which are equally large, without resumed ones."""
    rates = [row["images_per_second"] for row in run.history]
    rates = [rate for rate in rates if rate is not None and rate > 0]
    return statistics.harmonic_mean(rates) if rates else None


def robustness(run: Run) -> Predictions | None:
    """The predictions whose mean15 represents a run.

    Only those on its own test split: other images would not be comparable. Its best weights come before earlier ones,
    then all rows before some, one view before several, own corruptions before CIFAR-100-C.
    """
    found = [it for it in run.predictions if it.kind != "split" and it.mean15 is not None and it.own]
    return min(found, key=lambda it: (run.is_outdated(it), it.rank[1:3], -it.version, it.rank), default=None)


def conditions(run: Run, found: Predictions) -> str:
    """How the conditions differ from all rows, one view and the best weights; "" if they don't."""
    marks = [f"only {found.limit:,} rows"] if found.limit is not None else []
    marks += [f"with {found.tta}"] if found.tta else []
    return ", ".join(marks + ["earlier weights"] * run.is_outdated(found))


def comparison(runs: list[Run]) -> Table:
    """A row per run. Training and validation figures are of its best epoch, test figures of its best weights."""
    rows = []
    for run in runs:
        best, found, planned = run.best_epoch, robustness(run), run.planned()
        minutes = [row["seconds"] for row in run.history if row["seconds"] is not None]
        epochs = str(len(run.history))
        if not run.summary and planned is not None:
            epochs += f" of {planned}"
        mean15 = "-"
        if found:
            mean15 = f"{found.mean15:.1%} ({', '.join(filter(None, (found.origin, conditions(run, found))))})"
        rows.append(
            {
                "run": run.name,
                "model": shown(run.setting("model", "name")),
                "parameters": figure(run.summary.get("parameters"), ",.0f"),
                "phases": " + ".join(f"{name} {count}" for name, count in run.phases.items()) or "-",
                "epochs run": epochs,
                "best epoch": str(best.get("epoch", "-")),
                "train loss": figure(best.get("train_loss"), ".3f"),
                "train top-1": percent(best.get("train_top1")),
                "val loss": figure(best.get("val_loss"), ".3f"),
                "val top-1": percent(best.get("val_top1")),
                "test loss": figure(run.summary.get("test_loss"), ".3f"),
                "test top-1": percent(run.summary.get("test_top1")),
                "test top-5": percent(run.summary.get("test_top5")),
                "robustness mean": mean15,
                "minutes": figure(sum(minutes) / 60 if minutes else None, ".1f"),
                "images/s": figure(throughput(run), ",.0f"),
            }
        )
    return Table(list(rows[0]), [list(row.values()) for row in rows])


def legend(runs: list[Run]) -> list[str]:
    """Notes on the comparison's columns that need explaining."""
    lines = [
        "Best epoch: the highest validation top-1. Training and validation figures are of that epoch, test figures of "
        "its weights. Training figures are of images as they were trained on: augmented, and mixed where augment.mix "
        "says so. Loss in nats; images/s: training, over epochs without a break."
    ]
    if not all(run.validates for run in runs):
        lines.append(
            "A run without validation figures trained on all rows (data.folds null): its best epoch is its last."
        )
    if any(not run.summary for run in runs):
        lines.append(
            "Epochs 'N of M': the run has no summary.json that can be read: it goes on, was stopped or crashed; such "
            "a run has no test figures and no count of parameters."
        )
    judged = {tuple(run.setting("data", name) for name in ("source", "subset", "test_split", "label")) for run in runs}
    if len(judged) > 1:
        lines.append(
            "The runs' data differ (source, subset, test split or label column): figures of different data can't be "
            "compared, robustness included."
        )
    origins = {found.origin for found in map(robustness, runs) if found}
    if origins:
        lines.append("Robustness mean: top-1 over 15 corruptions and 5 severities.")
    if len(origins) > 1:
        lines.append(f"Different images, so do not compare their robustness: {', '.join(sorted(origins))}.")
    return lines


def epochs(run: Run) -> Table:
    """A row per epoch; only a phase's first epoch names it, so that changes stand out."""
    head = ["phase", "epoch", "lr", "train loss", "train top-1", "val loss", "val top-1", "val top-5", "images/s"]
    rows, phase = [], None
    for row in run.history:
        rows.append(
            [
                row["phase"] if row["phase"] != phase else "",
                str(row["epoch"]),
                figure(row["lr"], ".1e"),
                figure(row["train_loss"], ".3f"),
                percent(row["train_top1"]),
                figure(row["val_loss"], ".3f"),
                percent(row["val_top1"]),
                percent(row["val_top5"]),
                figure(row["images_per_second"], ".0f"),
            ]
        )
        phase = row["phase"]
    return Table(head, rows)


# ---- over seeds and folds -------------------------------------------------------------------------------------------


def over_seeds(runs: list[Run]) -> Table | None:
    """Means and standard deviations over finished runs that differ in seed alone, or in fold alone; None if none do.

    The deviations are a sample's (n - 1): of the runs, not of their mean. Of runs that differ in nothing, the first
    counts. Precision is the only part of the environment that tells runs apart.
    """
    rows = []
    for field, path in (("seed", ("seed",)), ("fold", ("data", "fold"))):
        groups = {}
        for run in (run for run in runs if run.summary):
            flat = {name: exact for name, (exact, _) in _flat(run.config).items() if name not in UNTOLD}
            varied = flat.pop(".".join(path), "null")
            same = {it for it in flat.items() if not it[0].startswith("environment.") or it[0].endswith("precision")}
            groups.setdefault(frozenset(same), {}).setdefault(varied, run)
        for group in (group for group in groups.values() if len(group) > 1):
            values = sorted(group, key=lambda value: (len(value), value))
            rows.append([f"{field}s {', '.join(map(shown, values))}", *_means([group[value] for value in values])])
    head = ["over", "runs", "val loss", "val top-1", "test loss", "test top-1", "robustness mean"]
    return Table(head, rows) if rows else None


def _means(runs: list[Run]) -> list[str]:
    """The cells of `over_seeds` for a group of runs; robustness only if it was measured on the same images."""
    found = [(run, robustness(run)) for run in runs]
    comparable = all(it for _, it in found) and len({(it.origin, conditions(run, it)) for run, it in found}) == 1
    return [
        shown(", ".join(run.name for run in runs)),
        spread([run.best_epoch.get("val_loss") for run in runs], ".3f"),
        spread([run.best_epoch.get("val_top1") for run in runs], ".1%"),
        spread([run.summary.get("test_loss") for run in runs], ".3f"),
        spread([run.summary.get("test_top1") for run in runs], ".1%"),
        spread([it.mean15 for _, it in found], ".1%") if comparable else "-",
    ]


def spread(values: list[float | None], form: str, scale: float = 1.0) -> str:
    """Mean and, if there are several, the standard deviation of a sample; "-" if a figure is missing."""
    if None in values:
        return "-"
    values = [scale * value for value in values]
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


# ---- phase changes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PhaseChange:
    """Validation top-1 around a phase change; fractions.

    Args:
        one, several: after the new phase's first epoch, and after its fifth or, if it has fewer, its last.
        span: the epochs up to `several`; if that is only one, `several` is None.
        noise, noise_from: what a jump must exceed to be more than noise, and why; see `noise_at`.
    """

    run: str
    before: str
    after: str
    top1: float
    one: float
    several: float | None
    span: int
    noise: float | None
    noise_from: str

    def within_noise(self, reached: float) -> bool | None:
        """Whether a jump to `reached` is within noise; None if that is unknown."""
        return None if self.noise is None else abs(reached - self.top1) <= self.noise

    @property
    def words(self) -> str:
        """The verdict on the jumps."""
        if self.noise is None:
            return "whether this is noise can't be told: too few epochs, and the number of validation rows is unknown"
        verdicts = {}
        for span, reached in (("one epoch", self.one), (f"{self.span} epochs", self.several)):
            if reached is not None:
                beyond = "a gain over" if reached > self.top1 else "a loss over"
                verdicts.setdefault("within noise over" if self.within_noise(reached) else beyond, []).append(span)
        said = [f"{verdict} {' and over '.join(spans)}" for verdict, spans in verdicts.items()]
        return f"{'; '.join(said)} (noise: up to {100 * self.noise:.1f} points, {self.noise_from})"


def phase_changes(run: Run) -> list[PhaseChange]:
    """The phase changes of a run that have a validation top-1 on both sides."""
    changes = []
    for index in range(1, len(run.history)):
        before, after = run.history[index - 1], run.history[index]
        if before["phase"] == after["phase"] or None in (before["val_top1"], after["val_top1"]):
            continue
        following = run.history[index : index + AFTER]
        following = [row["val_top1"] for row in following if row["phase"] == after["phase"]]
        span = max((i for i, top1 in enumerate(following, start=1) if top1 is not None), default=1)
        several = following[span - 1] if span > 1 else None
        noise, noise_from = noise_at(run, index)
        phases, reached = (before["phase"], after["phase"]), (before["val_top1"], after["val_top1"], several)
        changes.append(PhaseChange(run.name, *phases, *reached, span, noise, noise_from))
    return changes


def noise_at(run: Run, index: int) -> tuple[float | None, str]:
    """The largest jump in validation top-1 at row `index` of the history that chance may explain, and why.

    Twice the standard error of the difference of two accuracies over n rows, sqrt(2 p (1 - p) / n) with their mean p:
    independent samples exceed it one time in twenty. Both accuracies are measured on the same rows and so differ by
    less: the bound is conservative. It covers the choice of rows, not what another seed would have given.

    n is the rows of predictions/validation.json, if all of them were judged. Otherwise it is estimated: validation is
    one of `data.folds` parts of equal size (up to chance) and the others are trained on, so n is the images of an
    epoch, steps times `data.batch_size`, over folds - 1.

    Without steps in the history, or those fields in the configuration, there is no n. The bound is then the largest
    change from one epoch to the next among the 5 epochs on either side.
    """
    before, after = run.history[index - 1], run.history[index]
    judged = [it.rows for it in run.predictions if it.name == "validation" and it.limit is None and it.rows]
    rows, source = (judged[0], f"{judged[0]:,} validation rows") if judged else (_validation_rows(run), "")
    if rows:
        mean = (before["val_top1"] + after["val_top1"]) / 2
        error = math.sqrt(2 * max(0.0, mean * (1 - mean)) / rows)
        return 2 * error, f"twice the standard error with {source or f'about {rows:,} validation rows'}"
    near = run.history[max(0, index - AFTER) : index + AFTER]
    changes = [
        abs(second["val_top1"] - first["val_top1"])
        for first, second in pairwise(near)
        if first["phase"] == second["phase"] and None not in (first["val_top1"], second["val_top1"])
    ]
    return (max(changes), "the largest change between epochs near it") if changes else (None, "")


def _validation_rows(run: Run) -> int | None:
    """The number of validation rows, estimated from an epoch's steps; see `noise_at`."""
    last = run.history[-1]
    batch, folds = number(run.setting("data", "batch_size")), number(run.setting("data", "folds"))
    if last["step"] is None or batch is None or folds is None or folds <= 1:
        return None
    rows = float(last["step"]) / last["epoch"] * batch / (folds - 1)
    return round(rows) if 1 <= rows < 2**53 else None


# ---- how runs were made ---------------------------------------------------------------------------------------------


MISSING = ("-", "-")


def differences(runs: list[Run]) -> Table | None:
    """The configuration fields that differ, a row each, a column per run; None for a single run.

    A field that is null tells no more than one that a run does not have, as those of earlier code.
    """
    if len(runs) < 2:
        return None
    flat = [_flat(run.config) for run in runs]
    fields = sorted(set().union(*flat) - set(UNTOLD), key=lambda field: (field.startswith("environment."), field))
    rows = []
    for field in fields:
        values = [found.get(field, MISSING) for found in flat]
        if len(set(values)) > 1 and set(values) != {MISSING, ("null", "null")}:
            rows.append([shown(field), *_cells(values)])
    return Table(["field", *(run.name for run in runs)], rows)


def _flat(tree: dict, prefix: str = "") -> dict[str, tuple[str, str]]:
    """{"data": {"fold": 0}} as {"data.fold": ("0", "0")}: each value as JSON and in readable form."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
            continue
        try:
            exact = readable = json.dumps(value, ensure_ascii=False, default=str)
        except ValueError:  # Python prints no numbers of thousands of digits
            exact = readable = shown(value)
        if isinstance(value, str):
            readable = value
        elif isinstance(value, list) and all(isinstance(part, str) for part in value):
            readable = ", ".join(value)
        flat[f"{prefix}{name}"] = exact, readable
    return flat


def _cells(values: list[tuple[str, str]]) -> list[str]:
    """Shortened values of `_flat`; if that makes different ones look alike, the ends of their JSON."""
    cells = [shown(readable) for _, readable in values]
    if len(set(cells)) < len(set(values)):
        cells = [exact if len(exact) <= NAME_LENGTH else f"…{exact[1 - NAME_LENGTH :]}" for exact, _ in values]
    return [plain(cell) for cell in cells]


def command(run: Run) -> str:
    """The command that retrains a run, with the precision, processes and device that its config.yaml records.

    To be run in the project's folder, whose accelerate_config.yaml replaces the user's own default.
    """
    found = run.setting("environment")
    found = found if isinstance(found, dict) else {}
    precision = shown(found.get("mixed_precision", "no"))
    several = [shown(found["processes"])] if type(found.get("processes")) is int and found["processes"] > 1 else []
    if several and found.get("device_type") == "cpu":
        words = ["env", "ACCELERATE_USE_CPU=true", f"ACCELERATE_MIXED_PRECISION={precision}", "torchrun"]
        words += ["--nproc_per_node", *several]
    else:
        words = ["accelerate", "launch", "--config_file", "accelerate_config.yaml", "--mixed_precision", precision]
        words += ["--multi_gpu", "--num_processes", *several] if several else []
        words += ["--cpu"] if found.get("device_type") == "cpu" else []
    recipe = run.setting("recipe")
    words += script_of(recipe if isinstance(recipe, str) else "")  # in a foreign config it may be anything
    return plain(shlex.join([*words, "--config", os.path.abspath(run.path / "config.yaml").replace(os.sep, "/")]))
