"""The page as its readers see it: in Chromium, from the disk, on a desktop and on a phone."""

import base64
import re
import time
from html.parser import HTMLParser

import pytest
import yaml
from browser import chromium, open_at
from run_folders import corrupted, history, split, write_predictions, write_run
from selenium.webdriver.common.by import By

import comparison
import page
import plots
from report import read_runs, write_page
from text import plain

WIDTHS = (1280, 390)
TWO = {"head": 2, "finetune": 6}
HOSTILE = [
    "<script>document.title='caught'</script>",
    "\"'><img src=x onerror=alert(1)>",
    "שלום עולם",
    "\u202eabc",
    "under_scored_<wbr>",
    "&amp;",
]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run with predictions, a hostile one, one that crashed, one of one epoch, one that has just begun."""
    folder = tmp_path_factory.mktemp("runs")
    whole = write_run(folder / "whole", TWO)
    names = [f"class {i}" for i in range(100)]
    found = [split("test", names), split("validation", names, mistakes=3)]
    write_predictions(whole, *found, corrupted("robustness"), corrupted("cifar100c", limit=200, rows=200))
    phases = {HOSTILE[0][:20]: 2, HOSTILE[1]: 3}
    hostile = write_run(folder / HOSTILE[1], phases, model={"name": HOSTILE[0]})
    write_predictions(hostile, split("test", HOSTILE, mistakes=6, source=HOSTILE[1]))
    rows = history(TWO)[:3]
    rows[1]["val_loss"] = float("nan")
    crashed = write_run(folder / "crashed", TWO, rows, finished=False)
    write_predictions(crashed, {"kind": "split", "name": "test", "rows": 3, "note": HOSTILE[0]})
    (crashed / "predictions" / "validation.json").write_text('{"kind": ')
    once = write_run(folder / "a-rather-long-name-of-one-epoch-on-another-data-set", {"train": 1}, data={"source": "x"})
    begun = write_run(folder / "begun", TWO, [], finished=False)
    return read_runs([whole, hostile, crashed, once, begun])


@pytest.fixture(scope="module")
def path(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(runs, path)
    return path


def troubles(browser) -> list[str]:
    """What is wrong with the page that is open: console errors, pictures that do not show or say nothing, overflow."""
    # The log comes by a way of its own, later than the page where the machine is busy: up to a word that is said last.
    browser.execute_script("console.log('all is said')")
    found, deadline = [], time.monotonic() + 20
    while not any("all is said" in message for message in found):
        assert time.monotonic() < deadline, found
        found += [entry["message"] for entry in browser.get_log("browser")]
    found = [message for message in found if "all is said" not in message]
    for picture in browser.find_elements(By.TAG_NAME, "img"):
        complete = "return arguments[0].complete && arguments[0].naturalWidth > 0"
        if not browser.execute_script(complete, picture):
            found.append("a picture is not loaded")
        if not picture.get_attribute("alt"):
            found.append("a picture has no alternative text")
    wide = "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
    if browser.execute_script(wide):
        found.append("the page is wider than the window")
    return found


def table(browser, label: str) -> list[list[str]]:
    """The cells of a table, as they are in the page."""
    script = """return [...document.querySelector(`[aria-label="${arguments[0]}"] table`).rows].map(
        row => [...row.cells].map(cell => cell.textContent))"""
    return browser.execute_script(script, label)


def test_the_troubles_of_a_broken_page_are_seen(browser, tmp_path):
    """Otherwise the tests below prove nothing."""
    broken = tmp_path / "broken.html"
    broken.write_text(
        "<!doctype html><body style='width: 3000px'><img src='data:image/png;base64,AAAA'><script>nothing()</script>"
    )
    open_at(browser, broken, 390)
    found = "; ".join(troubles(browser))
    for trouble in ("nothing is not defined", "not loaded", "no alternative text", "wider than"):
        assert trouble in found


@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_shows_and_nothing_is_wrong(browser, path, width):
    open_at(browser, path, width)
    assert troubles(browser) == []
    titles = browser.execute_script("return [...document.querySelectorAll('figcaption')].map(it => it.textContent)")
    assert titles[:5] == [
        "Validation accuracy",
        "Validation loss",
        "Training accuracy",
        "Training loss",
        "Learning rate",
    ]
    each = ["Confusion matrix", "Accuracy per superclass", "Reliability diagram"]
    assert titles[5:] == [*each, *each, "Robustness", "Robustness only 200 rows", *each]
    assert len(browser.find_elements(By.CSS_SELECTOR, ".gallery img")) == 24 + 3 + 6
    items = "return [...document.querySelectorAll('.gallery li')].map(it => it.textContent)"
    first, second = browser.execute_script(items)[:2]
    assert (first, second) == (
        "true: class 0predicted: class 199.0% sure", "true: class 1predicted: class 298.0% sure")  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_the_tables_are_right(browser, path, runs, width):
    open_at(browser, path, width)
    expected = comparison.comparison(runs)
    assert table(browser, "Comparison of the runs") == [expected.head, *expected.rows]
    assert table(browser, "Comparison of the runs")[3][4] == "3 of 8"
    expected = comparison.differences(runs)
    assert table(browser, "Differences of the configurations") == [expected.head, *expected.rows]
    changes = table(browser, "Phase changes")
    assert changes[1][:4] == ["whole", "head → finetune", "31.0%", "41.0% (+10.0 points)"]
    assert changes[1][4] == "45.0% (+14.0 points)" and changes[1][5].startswith("a gain over one epoch and over 5")
    assert [row[0] for row in changes[1:]] == ["whole", HOSTILE[1], "crashed"]
    assert [row[4] for row in changes[2:]] == ["43.0% (+12.0 points), after 3", "-"]
    confused = table(browser, "Most often confused")
    first = runs[0].predictions[0].confused[0]
    assert confused[1] == [first.true, first.predicted, str(first.rows), f"{first.share:.1%}"]
    assert table(browser, "Predictions")[1][2:6] == ["2,000", "1.900", f"{runs[0].predictions[0].top1:.1%}", "90.0%"]
    assert table(browser, "Robustness")[2] == ["cifar100c", "CIFAR-100-C", "200 (only 200 rows)", "25.1%", "26.0%"]


@pytest.mark.parametrize("width", WIDTHS)
def test_wide_tables_scroll_in_their_own_box_and_text_can_be_read(browser, path, width):
    open_at(browser, path, width)
    box = browser.find_element(By.CSS_SELECTOR, '[aria-label="Comparison of the runs"]')
    wider = browser.execute_script("return arguments[0].scrollWidth - arguments[0].clientWidth", box)
    if width == 390:
        assert wider > 100
        browser.execute_script("arguments[0].scrollLeft = 300", box)
        first = browser.find_element(By.CSS_SELECTOR, "#comparison tbody th")
        assert abs(first.rect["x"] - box.rect["x"]) < 3  # a run's name stays in sight
    sizes = """return [...document.querySelectorAll('p, td, th, li, figcaption')].map(
        it => parseFloat(getComputedStyle(it).fontSize))"""
    assert min(browser.execute_script(sizes)) >= 12
    shown = browser.find_element(By.CSS_SELECTOR, "#curves img")
    assert shown.rect["width"] >= 340  # its letters are then three quarters of the text's size, or larger


def test_how_each_run_was_made_is_its_own(browser, path, runs):
    open_at(browser, path, 1280)
    told = "return [...document.querySelectorAll(arguments[0])].map(it => it.textContent)"
    assert browser.execute_script(told, "pre.command") == [comparison.command(run) for run in runs]
    configs = browser.execute_script(told, "#making details pre")
    assert [yaml.safe_load(text) for text in configs] == [run.config for run in runs]


def named_and_drawn(page: str) -> tuple[list[tuple], list[tuple]]:
    """The legend's colours and dashes, and those of the lines of its first curve."""
    legend = re.findall(r'<line [^>]*stroke="(#\w+)"[^>]*stroke-dasharray="([^"]*)"', page)
    svg = base64.b64decode(re.search(r"data:image/svg\+xml;base64,([^\"]+)", page)[1]).decode()
    drawn = []
    for style in re.findall(r'<g id="run-\d+">\s*<path [^>]*style="([^"]*)"', svg):
        style = dict(part.split(": ") for part in style.split("; "))
        lengths = style["stroke-dasharray"].split(",") if "stroke-dasharray" in style else []
        drawn.append((style["stroke"], [round(float(it) / float(style["stroke-width"]), 3) for it in lengths]))
    return [(colour.lower(), [float(it) for it in dashes.split()]) for colour, dashes in legend], drawn


def test_lines_are_named_as_they_are_drawn(path, runs):
    named, drawn = named_and_drawn(path.read_text(encoding="utf-8"))
    assert len(named) == len(runs) and named[:-1] == drawn  # the last run has no line yet


def test_hostile_names_are_text(browser, path, runs):
    open_at(browser, path, 1280)
    assert browser.title == "5 runs side by side"
    assert not browser.find_elements(By.CSS_SELECTOR, "script, iframe, img[src=x], [onerror]")
    text = browser.execute_script("return document.body.textContent")
    names = {plain(name) for name in HOSTILE}  # marks that turn text around are left out
    assert all(name in text for name in names) and HOSTILE[3] not in text
    labels = "return [...document.querySelectorAll('.gallery bdi')].map(it => it.textContent)"
    assert names <= set(browser.execute_script(labels))
    # A name that runs from right to left, or is told to, leaves the words around it in their order.
    places = """return [...document.querySelectorAll('.gallery li')]
        .filter(it => it.textContent.includes(arguments[0]))
        .map(it => [...it.querySelectorAll('span')].map(part => part.getBoundingClientRect().left))"""
    for item in browser.execute_script(places, HOSTILE[2]):
        assert max(item) - min(item) < 1


class Addresses(HTMLParser):
    """Collects what a page could load or run."""

    def __init__(self, text: str):
        super().__init__()
        self.found = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form", "video", "audio"):
            self.found.add(tag)
        for name, value in attributes:
            if name.startswith("on") or name in ("srcset", "action", "style"):
                self.found.add(name)
            if (name == "src" and not value.startswith("data:image/")) or (name == "href" and value[0] != "#"):
                self.found.add(value)


def test_nothing_comes_from_elsewhere(path):
    text = path.read_text(encoding="utf-8")
    assert Addresses(text).found == set()
    assert Addresses('<script src="x"></script><a href="https://x" onclick="y">').found == {
        "script", "x", "https://x", "onclick"}  # fmt: skip
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(|https?://", text)


def test_what_could_not_be_read_is_told_on_the_page(path):
    text = path.read_text(encoding="utf-8")
    assert "<bdi>crashed</bdi>: history.jsonl: 1 figures are missing or not finite" in text
    assert "predictions/validation.json is left out" in text


def test_seeds_are_averaged(browser, tmp_path):
    runs = read_runs([write_run(tmp_path / f"run{seed}", {"head": 1}, seed=seed) for seed in range(2)])
    write_page(runs, tmp_path / "report.html")
    open_at(browser, tmp_path / "report.html", 1280)
    expected = comparison.over_seeds(runs)
    label = "Mean ± standard deviation over runs that differ in seed or in fold alone"
    assert table(browser, label) == [expected.head, *expected.rows]


def test_one_run_alone(browser, tmp_path):
    run = write_run(tmp_path / "<i>alone", {"train": 1})
    write_page(read_runs([run]), tmp_path / "page.html")
    for width in WIDTHS:
        open_at(browser, tmp_path / "page.html", width)
        assert troubles(browser) == []
        assert browser.title == "<i>alone"
    text = browser.find_element(By.TAG_NAME, "body").text
    assert "No run has changed its phase, with" in text and "No run has predictions" in text
    assert "there is no other configuration" in text


@pytest.mark.slow
def test_twenty_runs_stay_below_five_megabytes_and_show_all_figures_and_as_many_mistakes_as_fit(
    browser, tmp_path, monkeypatch
):
    """Of fifty epochs, each with two files of predictions on 100 classes and large thumbnails."""
    small_png, drawn = plots.Picture.small_png, {}

    def drawn_once(picture):  # figures of a kind differ little; compressing them takes most of the time
        return drawn.get(picture.title) or drawn.setdefault(picture.title, small_png(picture))

    monkeypatch.setattr(plots.Picture, "small_png", drawn_once)
    folder, phases = tmp_path, {"head": 10, "finetune": 40}
    names = [f"class {i}" for i in range(100)]
    for index in range(20):
        rows = history(phases, jump=index / 100, seed=index)
        run = write_run(folder / f"run-with-a-name-{index:02d}", phases, rows, seed=index)
        write_predictions(run, split("test", names, seed=index), corrupted("robustness"), side=96)
    path = folder / "page.html"
    write_page(read_runs(sorted(folder.glob("run-*"))), path)
    text = path.read_text(encoding="utf-8")
    assert 1_000_000 < path.stat().st_size < page.LIMIT == 5_000_000
    for width in WIDTHS:
        open_at(browser, path, width)
        assert troubles(browser) == []
    figures = browser.find_elements(By.CSS_SELECTOR, ".predictions figure img")
    assert len(figures) == 20 * 4  # figures come before thumbnails
    shown = "return [...document.querySelectorAll('.gallery')].map(it => it.children.length)"
    shown = browser.execute_script(shown)
    assert len(shown) == 20 and min(shown) >= 1 and max(shown) - min(shown) <= 1 and max(shown) < 24
    assert f"{min(shown)} of 24 mistakes, so that the page stays below 5 MB" in text
    named, drawn = named_and_drawn(text)
    assert named == drawn and len(set(map(str, named))) == 20


def test_figures_without_room_are_counted(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", TWO)
    write_predictions(run, split("test", ["a", "b"]), split("validation", ["a", "b"]))
    runs, room = read_runs([run]), page.Room(page.PICTURES)
    first = next(plots.of_predictions(runs[0], runs[0].predictions[0]))
    assert all(page._curve(picture, room) for picture in plots.curves(runs, False))
    assert room.address(first.small_png(), "png")
    drawn = []
    monkeypatch.setattr(plots, "_reliability", lambda *args: drawn.append(args))
    monkeypatch.setattr(page, "PICTURES", page.PICTURES - room.left)
    text = page.render(runs)
    assert re.findall(r"Figures left out, so that the page stays below 5 MB: (\d);", text) == ["2", "3"]
    assert not drawn  # what comes after the first that has no room
    assert "Curves left out" not in text


def test_curves_without_room_are_pixels_or_counted(tmp_path, monkeypatch):
    runs = read_runs([write_run(tmp_path / "run", TWO)])
    picture = next(plots.curves(runs * 20, False))
    room = page.Room(page.PICTURES)
    assert page._curve(picture, room).startswith("data:image/svg+xml;")
    assert page._curve(picture, page.Room(page.PICTURES - room.left - 1)).startswith("data:image/png;")
    monkeypatch.setattr(page, "PICTURES", 0)
    assert "Curves left out, so that the page stays below 5 MB: 5;" in page.render(runs)
