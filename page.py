"""The report as one self-contained HTML page: the pictures are in it, and there are no scripts.

Names come from others: the template escapes everything (Jinja2's autoescape), the page's Content-Security-Policy
forbids scripts and external resources, and `bdi` keeps a name's text direction from affecting what follows.
"""

import time
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

import comparison
import plots
from comparison import Table, conditions, figure, percent
from errors import UserError
from runfolder import Predictions, Run, thumbnail
from text import plain

LIMIT = 5_000_000  # bytes of a page: more is no fun on a phone or in a mail
PICTURES = 4_300_000  # bytes of it for pictures
CONFIG_LENGTH = 20_000  # characters shown of a configuration
OPEN_RUNS = 3  # with more runs, predictions are folded at first


class Room:
    """The bytes that are left for pictures."""

    def __init__(self, size: int):
        self.left = size

    def address(self, content: bytes, kind: str) -> str | None:
        """The picture as a data: URL, or None if there is no room for it."""
        text = f"data:image/{kind};base64,{b64encode(content).decode()}"
        if len(text) > self.left:
            return None
        self.left -= len(text)
        return text


@dataclass
class Shown:
    """A file of predictions as the page shows it."""

    found: Predictions
    pictures: list[tuple[plots.Picture, str]] = field(default_factory=list)
    left_out: int = 0  # pictures that did not fit
    gallery: list[tuple] = field(default_factory=list)  # mistakes, with their picture's URL or None


def render(runs: list[Run]) -> str:
    """Render the page of some runs, in their order.

    Raises:
        UserError: it is larger than `LIMIT`, although pictures take no more than `PICTURES`.
    """
    room = Room(PICTURES)
    curves = [(picture, _curve(picture, room)) for picture in plots.curves(runs, False)]
    judged = [[Shown(found) for found in run.predictions] for run in runs]
    _draw(runs, judged, room)
    _hang(runs, judged, room)

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "points": comparison.points}
    page = environment.get_template("report.html.jinja").render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side",
        made=time.strftime("%Y-%m-%d %H:%M"),
        runs=list(zip(runs, judged, strict=True)),
        table=comparison.comparison(runs),
        legend=comparison.legend(runs),
        repeated=comparison.over_seeds(runs),
        styles=[plots.style(index) for index in range(len(runs))],
        repeats=len(runs) > len(plots.COLOURS) * len(plots.DASHES),
        curves=[(picture, address) for picture, address in curves if address],
        curves_left_out=sum(not address for _, address in curves),
        changes=[change for run in runs for change in comparison.phase_changes(run)],
        differences=comparison.differences(runs),
        commands=[(run.name, comparison.command(run), _yaml(run)) for run in runs],
        unfolded=len(runs) <= OPEN_RUNS,
        conditions=conditions,
        splits=_splits,
        robustness=_robustness,
    )
    if len(page.encode()) > LIMIT:
        raise UserError(f"the page would be larger than {LIMIT // 10**6} MB: name fewer runs")
    return page


def _curve(picture: plots.Picture, room: Room) -> str | None:
    """As SVG, sharp at any size, if it fits; else as PNG, smaller for many long runs."""
    return room.address(picture.encode("svg"), "svg+xml") or room.address(picture.small_png(), "png")


def _draw(runs: list[Run], judged: list[list[Shown]], room: Room) -> None:
    """Draw predictions until a figure does not fit: each run's first file before any second."""
    full = False
    for turn in range(max(map(len, judged))):
        for run, files in zip(runs, judged, strict=True):
            for shown in files[turn : turn + 1]:
                for draw in plots.drawings(shown.found):
                    picture = None if full else draw(run, shown.found)
                    address = room.address(picture.small_png(), "png") if picture else None
                    if address:
                        shown.pictures.append((picture, address))
                    else:
                        full, shown.left_out = True, shown.left_out + 1


def _hang(runs: list[Run], judged: list[list[Shown]], room: Room) -> None:
    """Add thumbnails while they fit: every file's first mistake before any second."""
    files = [(run, shown) for run, files in zip(runs, judged, strict=True) for shown in files]
    for turn in range(max((len(shown.found.mistakes) for _, shown in files), default=0)):
        for run, shown in files:
            for mistake in shown.found.mistakes[turn : turn + 1]:
                content = thumbnail(run, mistake.thumbnail)
                address = room.address(content, "png") if content else None
                if address or not content:
                    shown.gallery.append((mistake, address))


def _splits(run: Run) -> Table | None:
    head = ["predictions", "source", "images", "loss", "top-1", "top-5", "superclass top-1", "ECE"]
    rows = [
        [
            it.name,
            it.source,
            f"{it.rows:,}" + (f" ({conditions(run, it)})" if conditions(run, it) else ""),
            figure(it.loss, ".3f"),
            percent(it.top1),
            percent(it.top5),
            percent(it.superclasses.top1 if it.superclasses else None),
            percent(it.ece),
        ]
        for it in run.predictions
        if it.kind == "split"
    ]
    return Table(head, rows) if rows else None


def _robustness(run: Run) -> Table | None:
    head = ["robustness", "images", "rows per cell", "mean of 15", "mean of 19"]
    rows = [
        [
            it.name,
            it.origin,
            f"{it.rows:,}" + (f" ({conditions(run, it)})" if conditions(run, it) else ""),
            percent(it.mean15),
            percent(it.mean19),
        ]
        for it in run.predictions
        if it.kind != "split"
    ]
    return Table(head, rows) if rows else None


def _yaml(run: Run) -> str:
    try:
        text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    except ValueError:  # Python prints no numbers of thousands of digits
        return "not shown, as it holds a number of thousands of digits"
    text = "\n".join(map(plain, text[:CONFIG_LENGTH].splitlines()))
    return text + ("\n…" if len(text) >= CONFIG_LENGTH else "")
