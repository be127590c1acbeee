"""README's tables and the pictures come from the JSON of results, and from nothing else."""

import copy
import json

import pytest

from benchmarks import plot, tables
from benchmarks.suite import RESULTS, load

CPU_RESULTS = load(RESULTS / "cpu.json")


def test_readme_agrees_with_the_results():
    text = tables.README.read_text()
    for which, section in tables.sections().items():
        assert tables.replaced(text, which, section) == text, "run python -m benchmarks.tables --write"


def test_readme_says_what_is_not_measured():
    timed = [path.stem for path in RESULTS.glob("*.json") if "suites" in json.loads(path.read_text())]
    section = tables.README.read_text().partition("## Benchmarks")[2].partition("\n## ")[0]
    assert ("Figures of a GPU are not measured yet" in section) == (timed == ["cpu"])


def test_shipped_results_are_whole_and_right():
    suite = CPU_RESULTS["suites"]["cpu"]
    assert suite["complete"] and all(row["correct"] for row in suite["rows"])
    assert {row["op"] for row in suite["rows"]} == {"covariance_update_", "lowrank_linear", "overhead"}
    facts = suite["environment"]
    assert facts["commit"] != "unknown" and facts["date"] and "load_at_start" in facts and "load_at_end" in facts


def test_a_changed_number_shows():
    changed = copy.deepcopy(CPU_RESULTS)
    row = next(
        row for row in changed["suites"]["cpu"]["rows"] if row["arm"] == tables.OURS and "dense" in row["speedup"]
    )
    row["speedup"]["dense"] += 0.5
    text = tables.README.read_text()
    assert tables.replaced(text, "cpu", tables.cpu_section(changed)) != text


def test_wrong_and_missing_rows_show_no_number():
    changed = copy.deepcopy(CPU_RESULTS)
    ours = [
        row for row in changed["suites"]["cpu"]["rows"] if row["op"] == "lowrank_linear" and row["arm"] == tables.OURS
    ]
    ours[0].update(correct=False)
    ours[1].update(speedup={})
    lines = tables.cpu_section(changed).splitlines()
    assert any(line.endswith("| wrong | wrong |") for line in lines)
    assert any(line.endswith("| not measured | not measured |") for line in lines)


@pytest.mark.parametrize("which", tables.MARKS)
def test_marks_must_be_there(which):
    start, end = tables.MARKS[which]
    for text in ("", end + start, 2 * (start + end)):
        with pytest.raises(ValueError, match="once and in this order"):
            tables.replaced(text, which, "table")


def gpu_row(op, arm, shape, speedup, **changes):
    """A row with made-up figures."""
    return {
        "op": op, "arm": arm, "shape": shape, "correct": True, "median_us": 12.34, "fraction_of_floor": 0.5,
        "speedup": speedup,
    } | changes  # fmt: skip


def gpu_document(rows, complete=True):
    facts = {"device": "A GPU", "torch": "2", "triton": "3", "commit": "abc", "date": "today"}
    limits = {"copy_gb_per_s": 4300.0, "matmul_tflop_per_s": {"bfloat16": 790.0}}
    return {"suites": {"all": {"environment": facts, "ceilings": limits, "complete": complete, "rows": rows}}}


def test_tables_of_a_gpu():
    layer = {"in_features": 8, "rank": 4, "out_features": 16, "dtype": "bf16"}
    moments = {"tokens": 100, "features": 64, "dtype": "bf16"}
    model = {"model": "ViT", "parameters": "50%", "mode": "compiled", "dtype": "bf16"}
    rows = [
        gpu_row("covariance_update_", tables.OURS, moments, {"torch_mm": 1.5}),
        gpu_row("covariance_update_", tables.OURS, moments | {"dtype": "fp32"}, {"torch_mm": 9.87}),
        gpu_row("lowrank_linear", tables.OURS, {"tokens": 16} | layer, {"dense": 2.0}, correct=False),
        gpu_row("lowrank_linear", tables.OURS, {"tokens": 1} | layer, {"dense": 2.0, "two_linears": 1.25}),
        gpu_row("lowrank_linear", tables.OURS, {"tokens": 1} | layer | {"rank": 2}, {"dense": 3.0}),
        gpu_row("lowrank_linear", "dense", {"tokens": 1} | layer, {}),
        gpu_row("model", "lowrank_ops", {"batch": 64} | model, {"dense": 1.5, "two_linears": 1.1}),
        gpu_row("calibration", "lowrank_ops", {"model": "ViT"}, {"forward": 0.8}),
    ]
    text = tables.gpu_section([gpu_document(rows)])
    assert (
        "`all`: A GPU, torch 2, Triton 3, commit abc, today; copies 4.30 TB/s, bfloat16 products 790 TFLOP/s." in text
    )
    lines = text.splitlines()
    assert "| 64 | 100 | 12.3 | 50% | not measured | 1.50 |" in lines and "9.87" not in text
    assert "|  | 1 | 16 |" in lines
    assert "| 8 → 16, rank 4 | 2.00 / 1.25 | wrong |" in lines
    assert "| 8 → 16, rank 2 | 3.00 / not measured | not measured |" in lines
    assert "| ViT, 50% of the parameters, compiled | 1.50 / 1.10 |" in lines
    assert "Calibration of ViT, in times of its forward passes: 1.25." in lines
    assert "not all of its cases" in tables.gpu_section([gpu_document(rows, complete=False)])
    assert "not measured yet" in tables.gpu_section([])


def test_the_command_writes_both_sections(tmp_path, monkeypatch, capsys):
    copy_of_readme = tmp_path / "README.md"
    text = tables.README.read_text()
    emptied = tables.replaced(tables.replaced(text, "cpu", "old"), "gpu", "old")
    copy_of_readme.write_text(emptied)
    monkeypatch.setattr(tables, "README", copy_of_readme)
    monkeypatch.setattr("sys.argv", ["tables"])
    assert tables.main() == 0 and copy_of_readme.read_text() == emptied
    assert "not measured yet" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["tables", "--write"])
    assert tables.main() == 0 and copy_of_readme.read_text() == text


def test_curves_hold_right_rows_in_order():
    def row(tokens, speedup, **changes):
        shape = {"tokens": tokens, "in_features": 8, "out_features": 8, "rank": 4, "dtype": "bf16"}
        return {
            "op": "lowrank_linear", "arm": plot.OURS, "shape": shape, "correct": True,
            "speedup": {"dense": speedup}, "fraction_of_floor": 0.5,
        } | changes  # fmt: skip

    rows = [row(64, 2.0), row(1, 1.5), row(16, 9.0, correct=False), row(4, 9.0, arm="dense"), row(8, None)]
    found = plot.curves(rows, "lowrank_linear", "tokens", lambda row: row["speedup"].get("dense"), lambda row: "layer")
    assert found == {"layer": [(1, 1.5), (64, 2.0)]}


def test_pictures_from_the_json_alone(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    source = tmp_path / "results.json"
    source.write_text(json.dumps(CPU_RESULTS))
    monkeypatch.setattr("sys.argv", ["plot", str(source), "--out", str(tmp_path / "pictures")])
    assert plot.main() == 0
    names = {path.stem for path in (tmp_path / "pictures").glob("*.png")}
    assert names == {
        "linear_over_dense", "linear_over_two", "linear_rank", "linear_roofline", "covariance_over_mm",
        "covariance_roofline",
    }  # fmt: skip
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "pictures").glob("*.png"))
