"""Figures of runs and predictions, drawn by matplotlib without pyplot: no global state, no figures left open.

Colours are those of Okabe & Ito, "Color Universal Design" (2008), which colour-blind readers can tell apart; lines
also differ in their dashes, and colour maps are cividis (Nuñez et al., 2018). Names are foreign: they are drawn as
plain text, never as mathematics.
"""

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise

import matplotlib
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter
from PIL import Image

from comparison import conditions, percent
from runfolder import ClassFigures, Predictions, Run
from text import distinct, shown

# Small figures with text of normal size: still readable on a phone, which shows them at three quarters of their size.
WIDTH, HEIGHT = 4.8, 3.3  # inches
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("", "6 2", "2 1.5", "7 2 2 2")  # on and off lengths, in points
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.parse_math": False,
    "svg.hashsalt": "phases",  # the same data give the same file
}
LABELLED = 25  # classes whose names fit beside a confusion matrix
COUNTED = 12  # classes whose counts fit into its cells
LONGEST = 24  # characters of a name in a figure
MOST_BARS = 100


@dataclass(frozen=True)
class Picture:
    """A figure with its texts. `stem` is a safe file name; `title` and `alt` hold foreign names."""

    stem: str
    title: str
    alt: str
    figure: Figure

    def encode(self, form: str) -> bytes:
        """As "png" or "svg"."""
        written = io.BytesIO()
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # missing glyphs are drawn as boxes; the page has the text
            self.figure.savefig(written, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
        return written.getvalue()

    def small_png(self) -> bytes:
        """As PNG with a palette: a third of the size, and these figures have few colours."""
        written = io.BytesIO()
        with Image.open(io.BytesIO(self.encode("png"))) as image:
            image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
        return written.getvalue()


def style(index: int) -> tuple[str, str]:
    """The colour and dashes (in SVG's notation) of run number `index`; they repeat after 28 runs."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def stem(*words: str) -> str:
    """A file name safe for shells and file systems. If too long it is cut at the front: the last words say most."""
    return re.sub(r"[^\w.-]+", "-", "-".join(words), flags=re.ASCII)[-100:].strip(".-") or "figure"


def _linestyle(dashes: str):
    """Dashes in matplotlib's form."""
    return (0, [float(length) for length in dashes.split()]) if dashes else "-"


def _axes(width: float = WIDTH, height: float = HEIGHT):
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


# ---- over epochs ----------------------------------------------------------------------------------------------------

CURVES = {
    "val_top1": ("Validation accuracy", "top-1 (%)"),
    "val_loss": ("Validation loss", "cross-entropy (nats)"),
    "train_top1": ("Training accuracy", "top-1 (%)"),
    "train_loss": ("Training loss", "cross-entropy (nats)"),
}


def curves(runs: list[Run], with_legend: bool) -> Iterator[Picture]:
    """Accuracies, losses and the learning rate over epochs, a line per run.

    Args:
        with_legend: name the lines in each figure; the page does so once, in text.
    """
    for key, (title, unit) in CURVES.items():
        if key.startswith("val") and runs and not any(run.validates for run in runs):
            continue
        yield _curve(runs, key, title, unit, with_legend)
    yield _learning_rate(runs, with_legend)


def _curve(runs: list[Run], key: str, title: str, unit: str, with_legend: bool) -> Picture:
    scale = 100 if key.endswith("top1") else 1
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        told = []
        for index, run in enumerate(runs):
            values = _line(axes, index, run, key, scale)
            best = run.best_epoch
            if key.startswith("val") and best and best[key] is not None:
                axes.plot(
                    best["epoch"],
                    scale * best[key],
                    "o",
                    color=style(index)[0],
                    markersize=7,
                    fillstyle="none",
                    clip_on=False,
                )
            if values:
                told.append(f"{run.name} from {values[0]:.4g} to {values[-1]:.4g}")
        axes.set_ylabel(unit)
        _finish(figure, axes, runs, title, with_legend)
    circles = "; a circle marks the best epoch" if key.startswith("val") else ""
    return Picture(stem(title.lower()), title, f"{title}, {unit}, over epochs: {_listed(told)}{circles}", figure)


def _learning_rate(runs: list[Run], with_legend: bool) -> Picture:
    title, told = "Learning rate", []
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes()
        axes.set_yscale("log")
        for index, run in enumerate(runs):
            values = _line(axes, index, run, "lr", 1)
            reduced = reductions(run)
            axes.plot(
                [row["epoch"] for row in reduced], [row["lr"] for row in reduced], "v", color=style(index)[0],
                markersize=8,
            )  # fmt: skip
            if values:
                at = ", ".join(str(row["epoch"]) for row in reduced)
                told.append(f"{run.name} from {values[0]:.3g} to {values[-1]:.3g}{f', reduced at {at}' if at else ''}")
        if rates := [row["lr"] for run in runs for row in run.history if (row["lr"] or 0) > 0]:
            # Whole decades, so that the axis has at least two labels however little the rate changes.
            low, high = math.floor(math.log10(min(rates)) + 1e-9), math.ceil(math.log10(max(rates)) - 1e-9)
            axes.set_ylim(0.6 * 10.0**low, 1.6 * 10.0 ** max(high, low + 1))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.0e}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("learning rate (log scale)")
        _finish(figure, axes, runs, title, with_legend)
    return Picture("learning-rate", title, f"Learning rate on a log axis over epochs: {_listed(told)}", figure)


def reductions(run: Run) -> list[dict]:
    """The epochs with a lower learning rate than the one before, within a phase.

    None for a cosine schedule, which lowers it in each epoch.
    """
    return [
        row
        for before, row in pairwise(run.history)
        if before["phase"] == row["phase"]
        and None not in (before["lr"], row["lr"])
        and row["lr"] < before["lr"]
        and run.setting("phases", row["phase"], "schedule") != "cosine"
    ]


def _line(axes, index: int, run: Run, key: str, scale: float) -> list[float]:
    """Draw a run's line, with gaps where figures are missing; return the others."""
    colour, dashes = style(index)
    values = [None if row[key] is None else scale * row[key] for row in run.history]
    if key == "lr":  # a log axis has no zero
        values = [value if value is None or value > 0 else None for value in values]
    there = [value for value in values if value is not None]
    triples = zip([None, *values], values, [*values[1:], None], strict=False)
    alone = [place for place, (before, it, after) in enumerate(triples) if it is not None and before is after is None]
    axes.plot(
        [row["epoch"] for row in run.history],
        [float("nan") if value is None else value for value in values],
        color=colour,
        linestyle=_linestyle(dashes),
        linewidth=1.6,
        marker=".",
        markevery=None if len(there) < 30 else alone,  # between two gaps there is no line to see
        gid=f"run-{index + 1}",
    )
    return there


def _finish(figure: Figure, axes, runs: list[Run], title: str, with_legend: bool) -> None:
    axes.set_title(title, loc="left", pad=16 if _shade(axes, runs) else 6)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    last = max((row["epoch"] for run in runs for row in run.history), default=1)
    axes.set_xlim(0.5, last + 0.5)
    if axes.get_yscale() == "linear":
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)  # a multiplier would lie on a phase's name
    axes.grid(alpha=0.3, linewidth=0.6)
    if not any(run.history for run in runs):
        axes.text(0.5, 0.5, "no epoch finished yet", transform=axes.transAxes, ha="center", color="#555555")
    if with_legend:
        lines = [
            Line2D([], [], color=colour, linestyle=_linestyle(dashes))
            for colour, dashes in map(style, range(len(runs)))
        ]
        # A no-break space in front: matplotlib drops labels that begin with an underscore.
        names = ["\u00a0" + shown(run.name, 40) for run in runs]
        columns = 2 if len(runs) > 2 and max(map(len, names)) < 24 else 1
        figure.set_figheight(HEIGHT + 0.22 * -(-len(runs) // columns))
        figure.legend(lines, names, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def _shade(axes, runs: list[Run]) -> bool:
    """Shade every other phase, more lightly if runs' layouts differ; return whether phases are named above."""
    lasts = {}  # each layout's last epoch
    for run in runs:
        if run.history:
            layout, last = _layout(run), max(row["epoch"] for row in run.history)
            lasts[layout] = max(last, lasts.get(layout, last))
    # Drop a layout that another one begins with: its run is just not as far yet.
    layouts = [it for it in lasts if not any(it != other and other[: len(it)] == it for other in lasts)]
    changing = sorted(layout for layout in layouts if len(layout) > 1)
    for layout in changing:
        ends = [start for _, start in layout[1:]] + [lasts[layout] + 1]
        for number, ((_, start), end) in enumerate(zip(layout, ends, strict=True)):
            if number % 2:
                axes.axvspan(start - 0.5, end - 0.5, color="black", alpha=max(0.03, 0.09 / len(layouts)), linewidth=0)
    named = changing[0] if changing and len(layouts) == 1 else ()
    width = max(lasts.values(), default=1)  # of the axis, in epochs
    for name, start in named:
        x = 0.0 if start == named[0][1] else (start - 1) / width
        end = min((other for _, other in named if other > start), default=lasts[named] + 1)
        room = int(46 * (end - start) / width)  # letters
        if room >= min(4, len(name)):
            axes.text(x, 1.02, shown(name, room), transform=axes.transAxes, fontsize=8, color="#555555")
    return bool(named)


def _layout(run: Run) -> tuple[tuple[str, int], ...]:
    """The phases' names and first epochs."""
    return tuple((name, next(rows)["epoch"]) for name, rows in groupby(run.history, key=lambda row: row["phase"]))


def _listed(told: list[str]) -> str:
    return "; ".join(told) or "no epoch finished yet"


# ---- predictions ----------------------------------------------------------------------------------------------------


def of_predictions(run: Run, found: Predictions) -> Iterator[Picture]:
    """The figures that a predictions file has data for."""
    return (draw(run, found) for draw in drawings(found))


def drawings(found: Predictions) -> list[Callable[[Run, Predictions], Picture]]:
    """The functions that draw those figures: drawing is slow, counting is not."""
    draws = []
    if any(map(any, found.confusion)):
        draws.append(_confusion)
    if found.superclasses and found.superclasses.per_superclass:
        draws.append(partial(_bars, parts=found.superclasses.per_superclass, what="superclass"))
    elif found.per_class and len(found.per_class) <= LABELLED:
        draws.append(partial(_bars, parts=found.per_class, what="class"))
    if any(part.rows for part in found.reliability):
        draws.append(_reliability)
    if found.corruptions:
        draws.append(_robustness)
    return draws


def _confusion(run: Run, found: Predictions) -> Picture:
    names, counts, count = found.class_names, found.confusion, len(found.class_names)
    totals = [sum(row) for row in counts]
    shares = [[100 * n / total if total else 0.0 for n in row] for row, total in zip(counts, totals, strict=True)]
    labelled = count <= LABELLED
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(height=4.6 if labelled else 4.1)
        # A square-root scale brings out the rare mistakes.
        image = axes.imshow(shares, cmap="cividis", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
        if labelled:
            size, labels = 9 if count <= COUNTED else 7, distinct(names, 16)
            axes.set_xticks(range(count), labels, rotation=90, fontsize=size)
            axes.set_yticks(range(count), labels, fontsize=size)
        if count <= COUNTED:
            for row in range(count):
                for column in range(count):
                    dark = shares[row][column] < 25
                    axes.text(
                        column, row, f"{counts[row][column]:,}", ha="center", va="center", fontsize=7,
                        color="white" if dark else "black",
                    )  # fmt: skip
        order = "" if labelled else " (number, in class order)"
        axes.set_xlabel(f"predicted class{order}")
        axes.set_ylabel(f"true class{order}")
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, ticks=[0, 1, 5, 10, 25, 50, 100], shrink=0.8)
        bar.set_label("share of the true class (%)")
        bar.outline.set_visible(False)
    right = sum(counts[i][i] for i in range(count))
    worst = "; ".join(f"{it.true} taken for {it.predicted} {it.rows} times" for it in found.confused[:3])
    alt = f"Confusion matrix of {count} classes: {right:,} of {sum(totals):,} images on the diagonal"
    return Picture(
        stem(run.name, found.name, "confusion"), "Confusion matrix", f"{alt}; most often {worst}" if worst else alt,
        figure,
    )  # fmt: skip


def _bars(run: Run, found: Predictions, parts: list[ClassFigures], what: str) -> Picture:
    parts, count = sorted(parts, key=lambda part: -1 if part.top1 is None else part.top1), len(parts)
    if count > MOST_BARS:
        parts = [part for part in parts if part.top1 is not None]
        parts = parts[: MOST_BARS // 2] + parts[MOST_BARS // 2 :][-MOST_BARS // 2 :]  # the best one comes on top
    places, names = range(len(parts)), distinct([part.name for part in parts], LONGEST)
    names = [f"{name} ({part.rows:,})" for name, part in zip(names, parts, strict=True)]
    below = [100 * (part.superclass_top1 or 0) for part in parts]
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(height=1.2 + 0.2 * len(parts))
        if any(part.superclass_top1 is not None for part in parts):
            axes.barh(places, below, height=0.8, color="#BBD4E6", label="its superclass right")
        axes.barh(
            places, [100 * (part.top1 or 0) for part in parts], height=0.45, color=COLOURS[0], label="class right"
        )
        axes.set_yticks(places, names)
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.6, len(parts) - 0.4)
        axes.tick_params(axis="y", labelsize=8, length=0)
        axes.set_xlabel("accuracy (%)")
        axes.set_ylabel(f"{what} (images)")
        axes.grid(axis="x", alpha=0.3, linewidth=0.6)
        if what == "superclass":
            figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    judged = [part for part in parts if part.top1 is not None]
    alt = f"Accuracy of {count} {what}es"
    if count > MOST_BARS:
        alt += f", of which the {MOST_BARS // 2} lowest and the {MOST_BARS // 2} highest are shown"
    if judged:
        alt += f": from {judged[0].name} {percent(judged[0].top1)} to {judged[-1].name} {percent(judged[-1].top1)}"
    return Picture(stem(run.name, found.name, f"{what}es"), f"Accuracy per {what}", alt, figure)


def _reliability(run: Run, found: Predictions) -> Picture:
    bins = [part for part in found.reliability if part.rows and part.accuracy is not None]
    everything = sum(part.rows for part in found.reliability)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.1), layout="constrained")
        axes, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        edges, widths = [100 * part.low for part in bins], [100 * (part.high - part.low) for part in bins]
        axes.bar(
            edges, [100 * part.accuracy for part in bins], widths, align="edge", color=COLOURS[0], edgecolor="white"
        )
        axes.plot([0, 100], [0, 100], "--", color="#555555", linewidth=1)
        axes.text(0.03, 0.92, "dashed: calibrated", transform=axes.transAxes, fontsize=8, color="#555555")
        axes.set_ylim(0, 100)
        axes.set_xlim(0, 100)
        axes.set_ylabel("accuracy (%)")
        below.bar(
            edges, [100 * part.rows / everything for part in bins], widths, align="edge", color="#888888",
            edgecolor="white",
        )  # fmt: skip
        below.set_ylabel("images (%)")
        below.set_xlabel("confidence: the highest probability (%)")
        for part in (axes, below):
            part.grid(axis="y", alpha=0.3, linewidth=0.6)
        figure.align_ylabels()
    alt = f"Reliability diagram: accuracy by confidence in {len(found.reliability)} bins"
    if found.ece is not None:
        alt += f", expected calibration error {percent(found.ece)}"
    return Picture(stem(run.name, found.name, "reliability"), "Reliability diagram", alt, figure)


def _robustness(run: Run, found: Predictions) -> Picture:
    rows = sorted(found.corruptions, key=lambda row: not row.in_mean15)
    names = [shown(row.name.replace("_", " "), LONGEST) + ("" if row.in_mean15 else " *") for row in rows]
    values = [[100 * value for value in row.top1] for row in rows]
    with matplotlib.rc_context(STYLE):
        figure, axes = _axes(height=1.1 + 0.22 * len(rows))
        image = axes.imshow(values, cmap="cividis", aspect="auto", vmin=0, vmax=max(map(max, values)) or 1)
        half = image.get_clim()[1] / 2
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                colour = "white" if value < half else "black"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(5), [str(severity) for severity in range(1, 6)])
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("severity" + ("" if all(row.in_mean15 for row in rows) else "     (* not in the mean over 15)"))
        axes.set_ylabel("corruption")
        figure.colorbar(image, ax=axes, format=PercentFormatter(decimals=0)).set_label("top-1")
    worst = min(found.corruptions, key=lambda row: sum(row.top1))
    alt = f"Top-1 under {len(rows)} corruptions and 5 severities"
    alt += f", mean over 15 {percent(found.mean15)}" if found.mean15 is not None else ""
    alt += f"; lowest for {worst.name}, {percent(sum(worst.top1) / 5)} on average"
    title = f"Robustness {conditions(run, found)}".strip()
    return Picture(stem(run.name, found.name, "heat-map"), title, alt, figure)
