"""Two files of results compared by their speed-ups."""

import copy
import json

import pytest

from benchmarks import compare
from benchmarks.suite import RESULTS, load


def document(**speedups):
    shape = {"tokens": 1, "dtype": "fp32"}
    rows = [
        {"op": "layer", "shape": shape, "arm": "lowrank_ops auto", "correct": True, "speedup": speedups},
        {"op": "layer", "shape": shape, "arm": "dense", "correct": True, "speedup": {"two": 9.0}},
    ]
    return {"suites": {"cpu": {"rows": rows}}}


def test_what_fell_comes_first_and_opponents_do_not_count():
    found = compare.changes(document(dense=2.0, two=1.0, gone=1.0), document(dense=1.0, two=1.5, new=3.0))
    assert [(change.label, change.ratio) for change in found] == [
        ("layer tokens=1 dtype=fp32 lowrank_ops auto over dense", 0.5),
        ("layer tokens=1 dtype=fp32 lowrank_ops auto over two", 1.5),
    ]


def test_a_result_that_became_wrong_is_a_loss():
    wrong = document()
    wrong["suites"]["cpu"]["rows"][0]["correct"] = False
    (change,) = compare.changes(document(dense=2.0), wrong)
    assert change.new == 0


@pytest.mark.parametrize("factor, code", [(1.0, 0), (0.95, 0), (0.8, 1), (1.3, 0)])
def test_exit_code(tmp_path, capsys, factor, code):
    old = load(RESULTS / "cpu.json")
    new = copy.deepcopy(old)
    ours = (row for row in new["suites"]["cpu"]["rows"] if row["arm"] == "lowrank_ops auto")
    next(row for row in ours if "two_linears" in row["speedup"])["speedup"]["two_linears"] *= factor
    path = tmp_path / "new.json"
    path.write_text(json.dumps(new))
    assert compare.main([str(RESULTS / "cpu.json"), str(path)]) == code
    shown = capsys.readouterr().out
    assert ("slower: " in shown) == (factor < 0.9) and ("faster: " in shown) == (factor > 1.1)
    assert "speed-ups compared" in shown


def test_nothing_in_common_is_no_success(tmp_path, capsys):
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, other in zip(paths, ("dense", "two"), strict=True):
        path.write_text(json.dumps(document(**{other: 2.0})))
    assert compare.main(list(map(str, paths))) == 2
    assert "nothing was compared" in capsys.readouterr().err
