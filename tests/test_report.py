import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from run_folders import corrupted, history, split, write_predictions, write_run

import report
from errors import UserError, reported
from runfolder import read_run

TWO = {"head": 2, "finetune": 3}


@pytest.fixture
def make_run(tmp_path):
    def make(name="run", phases=TWO, *args, **values):
        return write_run(tmp_path / name, phases, *args, **values)

    return make


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_the_tables_have_the_runs_figures(make_run):
    run = report.read_run(make_run())
    table = report.epochs_table(run).splitlines()
    assert len(table) == 2 + 5
    assert [cell.strip() for cell in table[4].split("|")[1:4]] == ["finetune", "3", "1.0e-04"]
    assert cells(report.comparison_table([run]))[1] == [
        "run", "resnet50", "head 2 + finetune 3", "5", "43.0%", "43.2%", "70.0%", "5.0"]  # fmt: skip
    assert report.phase_changes(run) == [
        "run: head -> finetune: validation top-1 31.0% -> 41.0% in one epoch (+10.0 points), "
        "43.0% after 3 (+12.0 points)"
    ]


def test_a_running_run_and_one_without_an_epoch(make_run, command):
    result = command("report.py", str(make_run("a", finished=False)), str(make_run("b", TWO, [])))
    assert result.returncode == 0, result.stderr
    assert "no epoch finished yet" in result.stdout
    assert "| - " in result.stdout


def test_a_jump_within_noise_is_said_so(tmp_path):
    run = write_run(tmp_path / "run", TWO, history(TWO, jump=0.001))
    (sentence,) = report.phase_changes(report.read_run(run))
    assert "31.0% -> 31.1% in one epoch (+0.1 points), 33.1% after 3 (+2.1 points): within noise over one" in sentence


def test_markdown_has_the_comparison_the_changes_and_how_runs_were_made(tmp_path, command):
    a = write_run(tmp_path / "a", TWO)
    b = write_run(tmp_path / "b", {"train": 3}, history({"train": 3}), seed=7)
    write_predictions(a, corrupted("robustness"))
    result = command("report.py", str(a), str(b), "--markdown")
    assert result.returncode == 0 and not result.stderr
    rows = cells(result.stdout)
    assert rows[0][:3] == ["run", "model", "parameters"]
    assert dict(zip(rows[0], rows[1], strict=True))["robustness mean"] == "25.1% (own corruptions)"
    assert ["seed", "0", "7"] in rows
    assert "- a: head -> finetune: validation top-1 31.0% -> 41.0%" in result.stdout
    assert f" --mixed_precision bf16 --cpu train.py --config {a}/config.yaml\n" in result.stdout


# ---- names ----------------------------------------------------------------------------------------------------------


def test_seeds_are_averaged(tmp_path):
    runs = [read_run(write_run(tmp_path / f"run{seed}", {"head": 1}, seed=seed)) for seed in range(2)]
    for text in (report.terminal(runs), report.markdown(runs)):
        assert "over runs that differ in seed or in fold alone" in text
        assert re.search(r"\| seeds 0, 1 +\| run0, run1 +\|", text)
    assert "differ in seed" not in report.terminal(runs[:1]) + report.markdown(runs[:1])


def test_a_name_can_not_break_the_table(make_run):
    """In GitHub's Markdown a backslash in front of the one that is put before a bar would take its effect away."""
    runs = [report.read_run(make_run(name)) for name in ("a|b", "c\\|d", "e\\")]
    table = report.comparison_table(runs)
    assert "| a\\|b " in table and "| c\\\\\\|d " in table and "| e\\\\ " in table


def test_a_bare_address_stays_one(make_run):
    run = report.read_run(make_run())
    run.config["model"]["name"] = "https://example.org/?a_b"
    assert "| https://example.org/?a_b |" in report.comparison_table([run])


def test_names_are_shown_and_never_obeyed(make_run):
    phases = {"<b>|\n": 1, "[a](b)\x1b[31m\u202e": 1}
    run = report.read_run(make_run("<script>x", phases))
    run.config["model"]["name"] = "<img src=x>"
    shown = "\n".join([report.comparison_table([run]), report.epochs_table(run), *report.phase_changes(run)])
    assert not set("<>\x1b\u202e") & set(shown.replace(" -> ", ""))
    assert "&lt;script&gt;x" in shown and "&lt;b&gt;\\|" in shown
    assert "\\[a](b) " in shown
    assert len(report.epochs_table(run).splitlines()) == 4


def test_runs_of_one_name_are_called_by_their_paths(make_run, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    runs = report.read_runs([make_run("a/run"), make_run("b/run"), make_run("other")])
    assert [run.name[-5:] for run in runs] == ["a/run", "b/run", "other"]
    with pytest.raises(UserError, match="named twice"):
        report.read_runs([tmp_path / "other", tmp_path / "a" / ".." / "other"])


def test_a_run_in_the_current_folder_has_its_name(make_run, monkeypatch):
    monkeypatch.chdir(make_run("here"))
    assert report.read_run(report.Path(".")).name == "here"


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "a: [", "3", "model: x", "\x00"])
def test_a_damaged_config_is_told(make_run, text):
    folder = make_run()
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="is not a run folder: it has no readable"):
        report.read_run(folder)


def test_what_is_no_run_folder_is_told(tmp_path, make_run, command):
    with pytest.raises(UserError, match="is not a run folder"):
        report.read_run(tmp_path / "nothing")
    damaged = make_run()
    (damaged / "history.jsonl").write_text('{"epoch": 1\n')
    result = command("report.py", str(damaged))
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert "damaged" in result.stderr


def test_it_never_imports_training_code(command, tmp_path):
    """With a page to draw, that is with everything it can import."""
    run, page = write_run(tmp_path / "run", TWO), tmp_path / "page.html"
    write_predictions(run, split("test", ["a", "b"]))
    result = command("-X", "importtime", "report.py", str(run), "--output", str(page))
    assert result.returncode == 0 and page.exists()
    modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time")}
    assert {"jinja2", "matplotlib", "plots"} <= modules
    assert not modules & {"torch", "accelerate", "timm", "datasets", "train", "engine", "checkpoint", "data", "models"}


def test_a_terminal_without_the_letters_of_a_name(make_run, command):
    result = command("report.py", str(make_run("ünïcode")), env={"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, result.stderr) == (0, "") and "### \\xfcn\\xefcode\n" in result.stdout


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_it_quietly(make_run, unbuffered):
    """As in `report.py RUN | head -1`; here it has gone before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, "report.py", make_run()]
    with open(writing, "wb") as gone:
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        result = subprocess.run(arguments, cwd=ROOT, env=environment, stdout=gone, stderr=subprocess.PIPE, timeout=120)
    assert (result.returncode, result.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_no_quiet_end():
    with pytest.raises(BrokenPipeError), reported():
        raise BrokenPipeError


# ---- what it writes -------------------------------------------------------------------------------------------------


def test_a_page_is_written_whole_into_a_new_folder_and_replaces_the_last_one(tmp_path, command):
    run, page = write_run(tmp_path / "run", TWO), tmp_path / "new" / "folder" / "page.html"
    result = command("report.py", str(run), "--output", str(page))
    assert (result.returncode, result.stdout) == (0, f"page: {page}\n"), result.stderr
    first = page.read_text(encoding="utf-8")
    page.write_text("the last one")
    report.write_page(report.read_runs([run]), page)
    for text in (first, page.read_text(encoding="utf-8")):
        assert text.startswith("<!doctype html>") and text.endswith("</html>")
    assert os.listdir(page.parent) == ["page.html"]
    assert os.stat(page).st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_page_that_fails_leaves_the_last_one_as_it_was(tmp_path, monkeypatch):
    import page

    path = tmp_path / "page.html"
    path.write_text("the last one")
    monkeypatch.setattr(page, "LIMIT", 100)
    with pytest.raises(UserError, match="name fewer runs"):
        report.write_page([report.read_run(write_run(tmp_path / "run", TWO))], path)
    assert path.read_text() == "the last one"
    assert sorted(os.listdir(tmp_path)) == ["page.html", "run"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--output", "{}/run/history.jsonl"], "should end in .html"),
        (["--output", "{}/folder.html"], "is a folder"),
        (["--output", "{}/file/page.html"], "can't be written"),
        (["--output", "/proc/page.html"], "can't be written"),
        (["--output", "{}/" + 300 * "x" + ".html"], "can't be written"),
        (["--plots", "{}/file"], "can't be written"),
        (["--plots", "{}/file/plots"], "can't be written"),
        (["--plots", "{}/" + 300 * "x"], "can't be written"),
    ],
)
def test_where_nothing_can_be_written_is_told(tmp_path, monkeypatch, capsys, options, says):
    run = write_run(tmp_path / "run", TWO)
    before = (run / "history.jsonl").read_text()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("mine")
    options = [option.replace("{}", str(tmp_path)) for option in options]
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), *options])
    with pytest.raises(SystemExit, match="2"), reported():
        report.main()
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: --") and says in stderr and stderr.count("\n") == 1
    assert (run / "history.jsonl").read_text() == before and (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.html", "run"]


def test_plots_are_written_as_png_and_svg(tmp_path, command):
    (tmp_path / "other").mkdir()
    runs = [write_run(tmp_path / "a b", TWO), write_run(tmp_path / "other" / "a-b", TWO)]
    for run in runs:
        write_predictions(run, split("test", ["a", "b"]), corrupted("robustness"))
    result = command("report.py", *map(str, runs), "--plots", str(tmp_path / "plots"))
    assert result.returncode == 0, result.stderr
    curves = {"validation-accuracy", "validation-loss", "training-accuracy", "training-loss", "learning-rate"}
    each = {"test-confusion", "test-superclasses", "test-reliability", "robustness-heat-map"}
    names = curves | {f"a-b-{name}" for name in each} | {f"a-b-{name}-2" for name in each}
    assert set(os.listdir(tmp_path / "plots")) == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    assert result.stdout == f"plots: 13 figures in {tmp_path / 'plots'}\n"
    assert (tmp_path / "plots" / "learning-rate.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_shell_leaves_alone_is_expanded(tmp_path, monkeypatch):
    """As Windows's do with * and ~."""
    for name in ("b", "a"):
        write_run(tmp_path / "runs" / name, {"head": 1})
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / ".unfinished").mkdir()
    monkeypatch.chdir(tmp_path)
    for given in ("runs/*", "~/runs/*", "runs/[a-c]", "runs/?"):
        monkeypatch.setattr(sys, "argv", ["report.py", given])
        assert [path.name for path in report.parse().runs] == ["a", "b"], given
    for given in ("runs/x**", "nowhere/*"):
        monkeypatch.setattr(sys, "argv", ["report.py", given])
        assert list(map(str, report.parse().runs)) == [given], "for one clear error later"


def test_the_home_of_nobody_is_told(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "run", "--output", "~no-such-user/page.html"])
    with pytest.raises(UserError, match=r"~no-such-user/page\.html: nobody here has such a home") as caught:
        report.parse()
    assert caught.value.exit_code == 2


def test_a_file_between_the_runs_is_left_out(tmp_path, monkeypatch, capsys):
    """runs/* has the page that was written there the last time."""
    run = write_run(tmp_path / "run", {"head": 1})
    (tmp_path / "report.html").write_text("<!doctype html>")
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), str(tmp_path / "report.html")])
    report.main()
    said = capsys.readouterr()
    assert "run" in said.out and said.err == f"{tmp_path}/report.html: a file, not a run folder: left out\n"


@pytest.mark.parametrize("files", [["a.html"], ["a.html", "b.html"]])
def test_files_alone_are_no_runs(tmp_path, monkeypatch, capsys, files):
    for name in files:
        (tmp_path / name).write_text("<!doctype html>")
    monkeypatch.setattr(sys, "argv", ["report.py", *(str(tmp_path / name) for name in files)])
    with pytest.raises(UserError, match=r"a\.html is a file: name run folders, as in report\.py runs/NAME") as caught:
        report.main()
    assert caught.value.exit_code == 2 and capsys.readouterr().err == ""


def test_a_name_that_is_too_long_is_no_run(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", {"head": 1})
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "x" * 300])
    with pytest.raises(UserError, match=r"xxx is not a run folder: .*File name too long"):
        report.main()


@pytest.mark.parametrize("field", ["seed", "recipe"])
def test_a_number_that_python_does_not_write_out(tmp_path, field):
    """In the page and in the command that trains the run again."""
    run = write_run(tmp_path / "run", {"head": 1})
    config = [line for line in (run / "config.yaml").read_text().splitlines() if not line.startswith(f"{field}:")]
    (run / "config.yaml").write_text("\n".join([*config, f"{field}: 0x{'f' * 9999}"]))
    report.write_page(report.read_runs([run]), tmp_path / "page.html")
    assert "a number of thousands of digits" in (tmp_path / "page.html").read_text()
    assert " train.py --config " in report.markdown(report.read_runs([run]))


def test_misspelt_options_are_answered(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report.py", "run", "--ouput", "x.html"])
    with pytest.raises(UserError, match=r"there is no option --ouput; did you mean --output"):
        report.main()
