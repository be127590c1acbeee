"""Tables and pictures come from the JSON of results, and from nothing else."""

import copy

import pytest

from benchmarks import plot, tables
from benchmarks.suite import RESULTS, load

CPU_RESULTS = load(RESULTS / "cpu.json")


def test_stored_results_are_whole_and_right():
    suite = CPU_RESULTS["suites"]["cpu"]
    assert suite["complete"] and all(row["correct"] for row in suite["rows"])
    assert {row["op"] for row in suite["rows"]} == {"covariance_update_", "lowrank_linear", "overhead"}
    assert suite["environment"]["commit"] != "unknown"


def test_tables_show_speedups_and_where_they_are_from(capsys):
    tables.main([str(RESULTS / "cpu.json")])
    shown = capsys.readouterr().out
    assert "`cpu`: AMD EPYC, 1 thread(s), load 0.28, torch 2.13.0+cpu" in shown and "2026-11-25 12:02 UTC" in shown
    assert "| lowrank_ops auto | 1024 | 512 | fp32 | 4846.7 | 62% | 1.25 |" in shown
    tables.main([])
    assert shown in capsys.readouterr().out


def test_wrong_and_failed_rows_show_no_figure():
    changed = copy.deepcopy(CPU_RESULTS)
    rows = [row for row in changed["suites"]["cpu"]["rows"] if row["variant"] == "lowrank_ops auto"]
    rows[0] |= {"correct": False}
    rows[1] |= {"correct": False, "failure": "no memory"}
    changed["suites"]["cpu"]["complete"] = False
    head, covariance, *_ = tables.tables(changed)
    lines = covariance.splitlines()
    assert "`cpu`, not all cases" in head
    assert lines[2].endswith("| wrong |  |  |") and lines[3].endswith("| failed: no memory |  |  |")


def test_pictures_of_right_rows(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    plot.main([str(RESULTS / "cpu.json"), "--out", str(tmp_path)])
    names = {path.stem for path in tmp_path.glob("*.png") if path.stat().st_size > 5000}
    assert names == {name for name, *_ in plot.PICTURES}
    rows = copy.deepcopy(CPU_RESULTS["suites"]["cpu"]["rows"])
    picture = {"op": "covariance_update_", "x": "features", "baseline": "torch_mm", "name": lambda row: "one"}
    assert [x for x, _ in plot.curves(rows, **picture)["one"]] == [512, 1024, 2048, 3072]
    next(row for row in rows if row["variant"] == plot.OURS and row["shape"]["features"] == 512)["correct"] = False
    assert [x for x, _ in plot.curves(rows, **picture)["one"]] == [1024, 2048, 3072]
