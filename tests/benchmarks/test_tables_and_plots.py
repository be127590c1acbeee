"""README's tables and the pictures come from the JSON of results, and from nothing else."""

import copy
import json

import pytest

from benchmarks import plot, tables
from benchmarks.suite import RESULTS, load

CPU_RESULTS = load(RESULTS / "cpu.json")


def test_readme_agrees_with_the_results():
    text = tables.README.read_text()
    assert tables.replaced(text, tables.cpu_section(CPU_RESULTS)) == text, "run python -m benchmarks.tables --write"


def test_readme_says_what_is_not_measured():
    timed = [path.stem for path in RESULTS.glob("*.json") if "suites" in json.loads(path.read_text())]
    assert timed == ["cpu"], "with results of a GPU, README needs their tables"
    section = tables.README.read_text().partition("## Benchmarks")[2].partition("\n## ")[0]
    assert "not measured" in section and "GPU" in section


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
    assert tables.replaced(text, tables.cpu_section(changed)) != text


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


@pytest.mark.parametrize("text", ["", tables.END + tables.START, 2 * (tables.START + tables.END)])
def test_marks_must_be_there(text):
    with pytest.raises(ValueError, match="once and in this order"):
        tables.replaced(text, "table")


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
