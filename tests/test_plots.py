import io
import math
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.colors import to_hex
from PIL import Image
from run_folders import CORRUPTIONS, corrupted, history, split, write_predictions, write_run

import plots
from runfolder import read_run

TWO = {"head": 2, "finetune": 3}
HOSTILE = ["<script>", "$\\frac{", "_under", "שלום", "\u202eabc", "a & b", "日本", "a\uffff", "x" * 500]


@pytest.fixture
def make(tmp_path):
    def make(name="run", phases=TWO, *args, found=(), **values):
        folder = write_run(tmp_path / name, phases, *args, **values)
        write_predictions(folder, *found)
        return read_run(folder)

    return make


def lines(picture) -> dict:
    return {line.get_gid(): line for line in picture.figure.axes[0].lines if line.get_gid()}


def test_curves_have_the_runs_figures(make):
    runs = [make("a"), make("b", {"train": 4}, history({"train": 4}, start=0.5))]
    accuracy, loss, training, training_loss, rate = plots.curves(runs, with_legend=False)
    assert lines(accuracy)["run-1"].get_xydata().tolist() == pytest.approx(
        np.array([(1, 30), (2, 31), (3, 41), (4, 42), (5, 43)])
    )
    assert lines(training)["run-2"].get_ydata() == pytest.approx([55, 56, 57, 58])
    assert lines(training_loss)["run-2"].get_ydata() == pytest.approx([2.0, 1.96, 1.92, 1.88])
    assert len(lines(loss)) == len(lines(rate)) == 2
    assert rate.figure.axes[0].get_yscale() == "log"
    for picture in (accuracy, loss, training, training_loss, rate):
        (axes,) = picture.figure.axes
        assert axes.get_xlabel() == "epoch" and axes.get_ylabel()
        assert "a from " in picture.alt and "b from " in picture.alt
    (best, *_) = (line for line in accuracy.figure.axes[0].lines if line.get_marker() == "o")
    assert best.get_xydata().tolist() == [[5, pytest.approx(43)]]


def test_every_other_phase_is_shaded_and_named(make):
    (axes,) = next(plots.curves([make()], with_legend=False)).figure.axes
    (shade,) = axes.patches
    assert (shade.get_x(), shade.get_width()) == (2.5, 3.0) and shade.get_alpha() > 0
    assert [(text.get_text(), text.get_position()[0]) for text in axes.texts] == [("head", 0), ("finetune", 2 / 5)]


def test_without_validation_there_are_no_curves_of_it(make):
    rows = [row | {"val_loss": None, "val_top1": None, "val_top5": None} for row in history(TWO)]
    run = make("all", TWO, rows, data={"folds": None})
    assert [picture.title for picture in plots.curves([run], with_legend=False)] == [
        "Training accuracy", "Training loss", "Learning rate"]  # fmt: skip
    accuracy = next(plots.curves([run, make("some", TWO)], with_legend=False))
    assert accuracy.title == "Validation accuracy" and "all from" not in accuracy.alt


def test_phases_that_not_all_runs_have_are_not_named(make):
    (axes,) = next(plots.curves([make("two"), make("one", {"train": 5})], with_legend=False)).figure.axes
    assert not axes.texts and axes.patches[0].get_alpha() < 0.09


def test_no_multiplier_lies_on_a_phases_name(make):
    rows = history(TWO)
    rows[1]["val_loss"] = 1e6
    loss = list(plots.curves([make("run", TWO, rows)], with_legend=False))[1]
    assert loss.title == "Validation loss" and loss.encode("png")
    assert loss.figure.axes[0].yaxis.get_offset_text().get_text() == ""


def test_a_phase_too_short_for_its_name_has_none(make):
    phases = {"head": 3, "finetune": 30, "last": 17}
    (axes,) = next(plots.curves([make("run", phases)], with_legend=False)).figure.axes
    assert [text.get_text() for text in axes.texts] == ["finetune", "last"]


def test_phases_of_any_name_can_be_drawn(make):
    """matplotlib writes them into comments of an SVG, too, and XML may not hold everything."""
    run = make("run", dict.fromkeys(HOSTILE, 1))
    assert len(run.phases) == len(HOSTILE)
    assert ElementTree.fromstring(next(plots.curves([run], with_legend=False)).encode("svg"))


def test_phases_are_shaded_for_each_layout_and_a_running_run_has_that_of_a_finished_one(make):
    runs = [make("a"), make("running", TWO, history(TWO)[:1], finished=False)]
    assert len(next(plots.curves(runs, with_legend=False)).figure.axes[0].patches) == 1
    runs += [make("long", {"train": 9}), make("other", {"head": 1, "finetune": 4})]
    (axes,) = next(plots.curves(runs, with_legend=False)).figure.axes
    assert sorted((patch.get_x(), patch.get_width()) for patch in axes.patches) == [(1.5, 4.0), (2.5, 3.0)]
    assert not axes.texts


def test_reductions_are_within_a_phase_and_not_those_of_a_cosine(make):
    phases = {"head": 9, "finetune": 9}
    assert [row["epoch"] for row in plots.reductions(make("a", phases))] == [8, 17]
    run = make("b", phases)
    run.config["phases"]["head"]["schedule"] = "cosine"
    assert [row["epoch"] for row in plots.reductions(run)] == [17]
    *_, rate = plots.curves([run], with_legend=False)
    marked = [line for line in rate.figure.axes[0].lines if line.get_marker() == "v"]
    assert marked[0].get_xydata().tolist() == [[17, 1e-5]]


def test_gaps_where_figures_are_missing(make):
    rows = history(TWO)
    rows[2]["val_top1"], rows[2]["lr"] = float("nan"), 0.0  # the end of a cosine has no place on a log axis
    accuracy, *_, rate = plots.curves([make(rows=rows)], with_legend=False)
    for picture in (accuracy, rate):
        assert [math.isnan(y) for y in lines(picture)["run-1"].get_ydata()] == [False, False, True, False, False]
        assert picture.encode("png")


def test_a_figure_between_gaps_is_seen(make):
    rows = history({"train": 40})
    for row in [*rows[4:7], *rows[8:12]]:
        row["val_top1"] = None
    line = lines(next(plots.curves([make("run", {"train": 40}, rows)], with_legend=False)))["run-1"]
    assert (line.get_marker(), line.get_markevery()) == (".", [7])


@pytest.mark.parametrize("lr", [1e30, 1.5e308])
def test_learning_rates_beyond_measure(make, lr):
    rows = history(TWO)
    rows[1]["lr"] = lr
    *_, rate = plots.curves([make("run", TWO, rows)], with_legend=False)
    assert rate.encode("png")


@pytest.mark.parametrize("count", [0, 1])
def test_no_epoch_and_one_epoch(make, count):
    run = make("run", {"train": 1}, history({"train": count}), finished=False)
    for picture in plots.curves([run], with_legend=True):
        assert b"<svg" in picture.encode("svg") and picture.encode("png")
        assert ("no epoch finished yet" in picture.alt) == (count == 0)
        if count:
            assert lines(picture)["run-1"].get_marker() == "."  # a line of one point can't be seen


def test_lines_differ_in_colour_or_dashes():
    styles = [plots.style(index) for index in range(28)]
    assert len(set(styles)) == 28
    assert plots.style(28) == styles[0]


def test_neighbouring_colours_differ_for_colour_blind_readers():
    """Seen without red and green cones apart (Viénot et al., 1999), no two colours of the first six come close."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    blind = {
        "protan": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
        "deutan": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
    }
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in plots.COLOURS]) ** 2.2
    for name, matrix in blind.items():
        seen = np.clip(rgb @ (np.linalg.inv(to_lms) @ matrix @ to_lms).T, 0, 1) ** (1 / 2.2)
        apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + np.eye(len(seen))
        assert apart.min() > 0.1, name


def test_a_legend_names_every_run_as_it_is_called(make):
    runs = [make(f"{index}{name[:50]}") for index, name in enumerate(HOSTILE)]
    runs.append(make("_private"))
    picture = next(plots.curves(runs, with_legend=True))
    (legend,) = picture.figure.legends
    shown = [text.get_text().strip() for text in legend.get_texts()]
    assert len(shown) == len(runs) and shown[0] == "0<script>" and shown[-1] == "_private"
    drawn = list(lines(picture).values())
    assert [to_hex(line.get_color()) for line in legend.get_lines()] == [to_hex(line.get_color()) for line in drawn]
    assert [line.get_linestyle() for line in legend.get_lines()] == [line.get_linestyle() for line in drawn]
    assert b"<script>" not in picture.encode("svg")
    assert picture.encode("png")


def test_a_legend_of_twenty_long_names_lies_within_the_figure(make):
    run = make("a" * 60)
    picture = next(plots.curves([run] * 20, with_legend=True))
    picture.encode("png")
    box = picture.figure.legends[0].get_window_extent()
    width, height = picture.figure.get_size_inches() * picture.figure.dpi
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
    assert picture.figure.axes[0].get_window_extent().height > 100


# ---- predictions ----------------------------------------------------------------------------------------------------


def test_figures_of_predictions_with_names_of_all_kinds(make):
    found = split("test", HOSTILE)
    found["superclasses"]["per_superclass"][0]["name"] = "$x$"
    run = make(found=[found])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = list(plots.of_predictions(run, run.predictions[0]))
        assert [picture.stem for picture in pictures] == [
            "run-test-confusion", "run-test-superclasses", "run-test-reliability"]  # fmt: skip
        for picture in pictures:
            assert b"<script" not in picture.encode("svg")
            with Image.open(io.BytesIO(picture.small_png())) as image:
                assert image.mode == "P" and min(image.size) > 300


def test_file_names_keep_what_tells_figures_of_a_run_apart(make):
    run = make("r" * 80, found=[split("n" * 60, ["a", "b"])])
    stems = [picture.stem for picture in plots.of_predictions(run, run.predictions[0])]
    for stem, kind in zip(stems, ("confusion", "superclasses", "reliability"), strict=True):
        assert stem.startswith("r") and stem.endswith(f"r-{'n' * 60}-{kind}") and len(stem) == 100


def test_the_bars_of_superclasses_are_their_accuracies(make):
    found = split("test", ["a", "b"])
    found["superclasses"]["per_superclass"] = [
        {"name": "one", "rows": 20, "superclass_top1": 0.9, "top1": 0.5},
        {"name": "two", "rows": 20, "superclass_top1": 0.8, "top1": 0.25},
    ]
    run = make(found=[found])
    _, bars, _ = plots.of_predictions(run, run.predictions[0])
    assert [patch.get_width() for patch in bars.figure.axes[0].patches] == [80, 90, 25, 50]


def test_the_confusion_matrix_shows_shares_of_the_true_class(make):
    run = make(found=[split("test", ["a", "b", "never"], confusion=[[3, 1, 0], [0, 0, 2], [0, 0, 0]], confused=[])])
    picture = next(plots.of_predictions(run, run.predictions[0]))
    (image,) = picture.figure.axes[0].images
    assert image.get_array().tolist() == [[75, 25, 0], [0, 0, 100], [0, 0, 0]]
    assert [text.get_text() for text in picture.figure.axes[0].texts][:3] == ["3", "1", "0"]
    assert picture.alt == "Confusion matrix of 3 classes: 3 of 6 images on the diagonal"


def test_labels_of_a_confusion_matrix_do_not_overlap(make):
    """25 names still have room; of 100 classes the numbers are shown, some of them."""
    for count in (2, 12, 25, 26, 100):
        found = split("test", [f"quite a long name {i}" for i in range(count)])
        run = make(f"run-{count}", found=[found])
        picture = next(plots.of_predictions(run, run.predictions[0]))
        with rc_context(plots.STYLE):
            picture.figure.draw_without_rendering()
        axes = picture.figure.axes[0]
        labels = [label for label in axes.get_yticklabels() if label.get_text()]
        assert labels and labels[0].get_text().startswith("quite") == (count <= 25)
        rows = abs(labels[1].get_position()[1] - labels[0].get_position()[1]) / count
        points = rows * axes.get_window_extent().height * 72 / picture.figure.dpi
        assert points > labels[0].get_fontsize(), count


def test_bars_are_of_classes_where_there_are_no_superclasses(make):
    found = split("test", ["a", "b"], superclasses=None)
    found["per_class"] = [{"name": "a", "rows": 20, "top1": 0.25}, {"name": "a", "rows": 0, "top1": None}]
    run = make(found=[found])
    _, bars, _ = plots.of_predictions(run, run.predictions[0])
    assert [patch.get_width() for patch in bars.figure.axes[0].patches] == [0, 25]
    assert [label.get_text() for label in bars.figure.axes[0].get_yticklabels()] == ["a (0)", "a (20)"]
    many = make("many", found=[split("test", [str(i) for i in range(26)], superclasses=None)])
    assert len(list(plots.of_predictions(many, many.predictions[0]))) == 2


def test_of_too_many_superclasses_the_lowest_and_the_highest_are_shown(make):
    found = split("test", ["a"])
    parts = [{"name": f"{i}", "rows": 20, "superclass_top1": 1, "top1": i / 200} for i in range(150)]
    nobody = {"name": "no rows", "rows": 0, "superclass_top1": None, "top1": None}
    found["superclasses"]["per_superclass"] = [*parts[::-1], nobody]
    run = make(found=[found])
    _, bars, _ = plots.of_predictions(run, run.predictions[0])
    names = [label.get_text() for label in bars.figure.axes[0].get_yticklabels()]
    assert names == [f"{i} (20)" for i in [*range(50), *range(100, 150)]]
    assert "of 151 superclasses, of which the 50 lowest and the 50 highest are shown: from 0 0.0% to 149" in bars.alt


def test_classes_whose_names_begin_alike_can_be_told_apart(make):
    names = ["Tomato___Tomato_mosaic_virus", "Tomato___Tomato_Yellow_Leaf_Curl_Virus", "Apple___Black_rot_of_the_tree"]
    run = make(found=[split("test", names, superclasses=None)])
    confusion, *_ = plots.of_predictions(run, run.predictions[0])
    labels = [label.get_text() for label in confusion.figure.axes[0].get_yticklabels()]
    assert labels == ["Tomato_…ic_virus", "Tomato_…rl_Virus", "Apple___Black_r…"]


def test_reliability_leaves_empty_bins_out(make):
    run = make(found=[split("test", ["a"])])
    *_, picture = plots.of_predictions(run, run.predictions[0])
    accuracy, rows = picture.figure.axes
    bins = [part for part in run.predictions[0].reliability if part.rows]
    assert [patch.get_height() for patch in accuracy.patches] == [100 * part.accuracy for part in bins]
    assert [line.get_xydata().tolist() for line in accuracy.lines] == [[[0, 0], [100, 100]]]
    assert len(accuracy.patches) == len(rows.patches) == 13  # of 15: one has no rows, and the first none either
    assert sum(patch.get_height() for patch in rows.patches) == pytest.approx(100)
    assert "expected calibration error 4.3%" in picture.alt


def test_the_heat_map_marks_what_is_not_in_the_mean(make):
    run = make(found=[corrupted("cifar100c", limit=200)])
    (picture,) = plots.of_predictions(run, run.predictions[0])
    axes = picture.figure.axes[0]
    assert axes.images[0].get_array().shape == (19, 5)
    assert axes.images[0].get_array()[1].tolist() == pytest.approx([48, 46, 44, 42, 40])
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "gaussian noise" and labels[-1] == "saturate *" and len(labels) == len(CORRUPTIONS)
    assert "only 200 rows" in picture.title and "mean over 15 25.1%" in picture.alt and "saturate" in picture.alt


def test_predictions_with_nothing_to_draw(make):
    bare = {"kind": "split", "name": "test", "rows": 0}
    run = make(found=[bare, split("validation", ["a", "b"], confusion=[[0, 0], [0, 0]], rows=0, reliability=[])])
    assert list(plots.of_predictions(run, run.predictions[0])) == []
    assert [picture.title for picture in plots.of_predictions(run, run.predictions[1])] == ["Accuracy per superclass"]


def test_the_same_data_give_the_same_file(make):
    run = make()
    first, second = (next(plots.curves([run], with_legend=True)).encode("svg") for _ in range(2))
    assert first == second
