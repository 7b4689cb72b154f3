"""The benchmarks run and say what they promise. What they measure is never asserted."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import shares as benchmark_shares
import throughput
import time_to_accuracy
import turns

SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())


AT_ONCE = ("throughput.py", "results.py")  # each takes the seconds of its imports


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=() if name in AT_ONCE else pytest.mark.slow) for name in SCRIPTS]
)
def test_help_teaches(forked_command, script):
    result = forked_command(f"benchmarks/{script}", "--help")
    assert result.returncode == 0, result.stderr[-1000:]
    assert f"python benchmarks/{script}" in result.stdout


@pytest.mark.parametrize(
    "line, said",
    [
        ("throughput.py --data nowhere", "--data: should be embedded, or a folder of parquet, not nowhere"),
        ("scaling.py --output /nowhere/x", "--output: there is no folder /nowhere"),
        ("augment.py --batches 0", "--batches: should be a whole number of at least 1, not 0"),
        ("levers.py --rounds 0", "--rounds: should be a whole number of at least 1, not 0"),
        ("throughput.py --seconds nan", "--seconds: should be a number of seconds above 0, not nan"),
        ("scaling.py --rows 1k", "--rows: should be a whole number of at least 1, not 1k"),
        ("time_to_accuracy.py --weights nowhere.safetensors", "--weights: there is no file nowhere.safetensors"),
    ],
)
def test_mistakes_are_told_in_a_line_before_anything_is_measured(forked_command, line, said):
    script, *options = line.split()
    result = forked_command(f"benchmarks/{script}", *options)
    assert result.returncode == 2
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_both_are_timed_until_they_first_have_the_usual_loops_last_top1():
    def rows(variant, seconds, figures):
        return [
            {"variant": variant, "epoch": n, "seconds": seconds * n, "val_top1": t} for n, t in enumerate(figures, 1)
        ]

    plain, ours = rows("plain", 100, (0.3, 0.6, 0.5)), rows("ours", 10, (0.4, 0.5, 0.9))
    judged = time_to_accuracy.judge(plain + ours)
    assert (judged["target_val_top1"], judged["plain_seconds"], judged["ours_seconds"]) == (0.5, 200, 20)
    assert judged["ratio"] == 10.0
    assert time_to_accuracy.judge(plain + ours[:1])["ratio"] is None


def test_a_ratio_is_the_median_of_the_rounds_own(monkeypatch):
    """Both were slow in the second round: that says nothing about either."""
    one, two = turns.Process.__new__(turns.Process), turns.Process.__new__(turns.Process)
    one.values, two.values = [20, 2, 22], [10, 1, 11]
    assert turns.ratio(one, two) == (2, [2, 2])
    two.values = [10, 2, 11]
    assert turns.ratio(one, two) == (2, [1, 2])


def test_the_limit_compiles_the_best_of_each_precision_unless_it_is_hopeless():
    rates = {("contiguous", "bf16"): 10, ("channels_last", "bf16"): 12, ("contiguous", "no"): 7, ("x", "no"): 6}
    assert set(throughput.best_of_each(rates)) == {("channels_last", "bf16"), ("contiguous", "no")}
    assert throughput.best_of_each(rates | {("contiguous", "no"): 5, ("x", "no"): 4}) == [("channels_last", "bf16")]


def test_rows_say_their_conditions_and_no_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/throughput.py", "--data", "/home/me/cifar100", "--rounds", "3"])
    said = turns.conditions()
    assert said["command"] == "python benchmarks/throughput.py --data cifar100 --rounds 3"
    assert {"commit", "date", "device", "machine", "threads", "torch", "precision"} <= set(said)
    turns.save(tmp_path / "out", said, [{"rate": 1}, {"rate": 2}])
    assert json.loads((tmp_path / "out.json").read_text()) == [{"rate": n, "conditions": said} for n in (1, 2)]


@pytest.mark.parametrize(
    ("path", "text", "changed"),
    [
        ("recipes/a.yaml", "# Measured on B.\nseed: 1\n", False),
        ("recipes/a.yaml", "# Measured on B.\nseed: 2\n", True),
        ("docs/results.md", "figures", False),
        ("new.py", "", True),
    ],
)
def test_the_commit_is_marked_where_what_figures_are_made_by_has_changed(tmp_path, monkeypatch, path, text, changed):
    """No such change is what benchmarks/results.py writes into recipes: later rows are not trained by it."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for folder in ("recipes", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "recipes" / "a.yaml").write_text("# Measured on A.\nseed: 1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(turns, "ROOT", tmp_path)
    before = turns.commit()
    assert len(before) == 7
    (tmp_path / path).write_text(text)
    assert turns.commit() == before + " and changes" * changed


def test_a_stop_is_no_time(tmp_path):
    """Stopped for longer than anything takes here, and then asked what its clock says."""
    script = tmp_path / "waits.py"
    script.write_text(
        f"import os, signal, sys, time; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); import turns\n"
        "signal.signal(signal.SIGTSTP, turns.clock.stop); began = turns.clock(); print('ready', flush=True)\n"
        "input(); print(turns.clock() - began)\n"
    )
    process = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    began = time.perf_counter()
    process.send_signal(signal.SIGTSTP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGCONT)
    said = float(process.communicate("\n")[0])
    assert said <= time.perf_counter() - began - 1


def test_an_operations_share_is_its_own_time(tmp_path, command):
    def event(name, start, length, thread=1):
        kind = "user_annotation" if name.startswith("Profiler") else "cpu_op"
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": length, "tid": thread}

    events = [
        event("ProfilerStep#3", 0, 100),
        event("aten::conv2d", 10, 40),
        event("aten::convolution", 10, 40),
        event("aten::copy_", 20, 10),
        event("aten::convolution_backward", 0, 60, thread=2),
        {"ph": "M", "name": "process_name"},
    ]
    with gzip.open(tmp_path / "head.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    milliseconds, steps, by = benchmark_shares.shares(tmp_path / "head.json.gz")
    assert (milliseconds, steps) == (0.1, 1)
    expected = {"between operations": 60, "convolutions, forward": 30, "copies": 10, "convolutions, backward": 60}
    assert by == {name: length / 160 for name, length in expected.items()}
    (tmp_path / "broken.json.gz").write_bytes(b"no trace")
    result = command("benchmarks/shares.py", str(tmp_path / "broken.json.gz"))
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path}/broken.json.gz is not a trace that --profile wrote")


@pytest.mark.slow
def test_throughput_writes_a_row_for_each_variant(command, tmp_path):
    result = command(
        "benchmarks/throughput.py", "--cases", "simple_cnn", "--batch_sizes", "16", "--rounds", "1",
        "--seconds", "0.1", "--output", str(tmp_path / "out"), timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["variant"] for row in rows] == ["limit", "ours", "streamed", "decoding", "plain", "hf"]
    wanted = {"model", "phase", "batch_size", "device", "variant", "images_per_second", "spread"}
    for row in rows:
        assert wanted <= set(row)
        assert row["spread"][0] <= row["images_per_second"] <= row["spread"][1]
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize("part", ["size", "batch", "rows", "start"])
def test_scaling_writes_rows(command, tmp_path, part):
    result = command(
        "benchmarks/scaling.py", "--parts", part, "--sizes", "32", "--batches", "16", "--rows", "1000", "--rounds", "1",
        "--output", str(tmp_path / "out"), timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["part"] == part
    assert part == "start" or (row["relative_rate"] > 0 and row["images_per_second"] > 0 and row["peak_mib"] > 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("reading.py", ("--rows", "400", "--workers", "0", "--size", "40"), 4),
        ("allreduce.py", ("--processes", "2", "--batch_size", "4", "--blocks", "1"), 2),
    ],
)
def test_what_scaling_out_rests_on_writes_rows(command, tmp_path, script, options, rows):
    more = ("--rounds", "1") if script == "reading.py" else ()
    result = command(f"benchmarks/{script}", *options, *more, "--output", str(tmp_path / "out"), timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    written = json.loads((tmp_path / "out.json").read_text())
    assert len(written) == rows
    for row in written:
        if script == "reading.py":
            assert row["images_per_second"] > 0
        else:
            assert row["needed_bytes"] == 2 * row["trained_bytes"] + row["buffer_bytes"]
            assert row["sent_bytes"] is None or row["needed_bytes"] <= row["sent_bytes"]


@pytest.mark.slow
def test_levers_writes_rows(command, tmp_path):
    result = command(
        "benchmarks/levers.py", "--cases", "deep_cnn", "--levers", "decoded_once", "--batch_size", "16",
        "--rounds", "1", "--seconds", "0.1", "--output", str(tmp_path / "out"), timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["ratio"] > 0


@pytest.mark.slow
def test_an_epochs_parts_are_the_whole(command, tmp_path):
    result = command(
        "benchmarks/epoch.py", "--cases", "simple_cnn", "--epochs", "1", "--output", str(tmp_path / "out"), timeout=300
    )
    assert result.returncode == 0, result.stderr[-2000:]
    (row,) = json.loads((tmp_path / "out.json").read_text())
    parts = ("training", "validation", "metrics", "best weights", "checkpoint", "rest")
    assert sum(row[name] for name in parts) == pytest.approx(row["whole"], abs=0.01)
    assert all(row[name] > 0 for name in parts if name != "metrics")  # which may be below a millisecond
