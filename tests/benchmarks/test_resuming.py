"""Suites that end early and go on: budgets, failures, killed processes, broken devices."""

import dataclasses
import json
import types

import pytest
import torch

from benchmarks import bench_lowrank_linear, rows, shapes, suite
from benchmarks.measure import Timing
from tests.benchmarks.running import arguments


def test_a_suite_goes_on_where_its_budget_ended(tmp_path, quick, monkeypatch, capsys):
    path = tmp_path / "results.json"
    layers = [bench_lowrank_linear.case(shapes.Layer(24, 40, 8), rows, "fp32") for rows in (1, 2, 3)]
    seen = []
    measure = suite.measure_case
    monkeypatch.setattr(
        suite, "measure_case", lambda case, *rest: seen.append(case.shape["tokens"]) or measure(case, *rest)
    )

    def go(budget=float("inf"), **changes):
        made = suite.run("some", layers, arguments(out=path, resume=True, budget=budget, **changes))
        return made, suite.finish(made, "some", path)

    made, code = go(budget=0)
    assert seen == [] and code == suite.UNFINISHED and len(made["left"]) == 3 and not made["complete"]
    assert suite.run("some", layers, arguments(out=path, only="tokens=2"))["rows"]  # as if killed in the middle
    assert seen == [2]
    made, code = go()
    assert seen == [2, 1, 3] and code == 0 and made["complete"] and made["left"] == []
    assert {row["shape"]["tokens"] for row in made["rows"]} == {1, 2, 3} and len(made["environment"]["resumed"]) == 1
    assert json.loads(path.read_text())["suites"]["some"] == made
    go()
    assert seen == [2, 1, 3]
    capsys.readouterr()
    go(commit="another")
    assert seen == [2, 1, 3, 1, 2, 3] and "commit changed" in capsys.readouterr().out
    suite.run("some", layers, arguments(out=path))
    assert len(seen) == 9  # without --resume from the beginning


def rows_by_arm(made, tokens):
    return {row["arm"]: row for row in made["rows"] if row["shape"]["tokens"] == tokens}


def test_resuming_asks_again_what_failed_and_keeps_what_is_complete(tmp_path, quick, monkeypatch, capsys):
    path, seen, memory = tmp_path / "results.json", [], []
    whole, starved, wrong = (bench_lowrank_linear.case(shapes.Layer(24, 40, 8), tokens, "fp32") for tokens in (1, 2, 3))
    opponent, honest = starved.arms[1].run, wrong.arms[3].run

    def hungry(*tensors):
        if not memory:
            raise torch.OutOfMemoryError("too much")
        return opponent(*tensors)

    starved = dataclasses.replace(starved, arms=(starved.arms[1]._replace(run=hungry), *starved.arms[2:]))
    lying = wrong.arms[3]._replace(run=lambda *tensors: honest(*tensors) + 1)
    failing = wrong.arms[1]._replace(run=lambda *tensors: 1 / 0)
    wrong = dataclasses.replace(wrong, arms=(failing, lying))
    measure = suite.measure_case
    monkeypatch.setattr(
        suite, "measure_case", lambda case, *rest: seen.append(case.shape["tokens"]) or measure(case, *rest)
    )

    def go():
        made = suite.run("some", [whole, starved, wrong], arguments(out=path, resume=True))
        assert suite.finish(made, "some", path) == 1 and made["complete"]  # one result of ours is wrong
        assert json.loads(path.read_text())["suites"]["some"]["rows"] == made["rows"]
        return made

    first = go()
    assert rows_by_arm(first, 2)["two_linears"]["failure"] == "OutOfMemoryError: too much"
    assert "two_linears" not in rows_by_arm(first, 2)["lowrank_ops auto"]["speedup"] and seen == [1, 2, 3]
    capsys.readouterr()
    for run in range(1, 4):
        memory += [True] * (run == 2)
        made = go()
        shown = capsys.readouterr().out
        assert seen == [1, 2, 3, 2, 2][: 3 + run] and ("tokens=2" in shown) == ("once more" in shown) == (run < 3)
        assert len(made["rows"]) == len(first["rows"])
        for tokens in (1, 3):  # a wrong result stays, whatever failed beside it
            assert rows_by_arm(made, tokens) == rows_by_arm(first, tokens)
        for row in rows_by_arm(made, 2).values():
            assert row["correct"] == (run > 1 or row["arm"] != "two_linears")
        assert ("two_linears" in rows_by_arm(made, 2)["lowrank_ops auto"]["speedup"]) == (run > 1)


@pytest.fixture
def layers(quick, monkeypatch):
    """Three cases of one arm; each takes a minute of a clock of its own, and fails as ``ends`` says of its tokens."""
    minutes, ends = [0], {}
    monkeypatch.setattr(suite, "time", types.SimpleNamespace(perf_counter=lambda: 60 * minutes[0]))

    def measure(case, *rest):
        minutes[0] += 1
        end = ends.get(case.shape["tokens"])
        if isinstance(end, BaseException):
            raise end
        row = rows.Row(case.op, dict(case.shape), "lowrank_ops auto", failure=end, correct=end is None)
        if end is None:
            row.median_us, row.p90_us, row.eager_us, row.samples = Timing(1.0, 1.0, 1.0, 5)
        return [row], {}

    monkeypatch.setattr(suite, "measure_case", measure)
    cases = [bench_lowrank_linear.case(shapes.Layer(24, 40, 8), tokens, "fp32") for tokens in (1, 2, 3)]
    return cases, minutes, ends


def test_what_always_fails_lets_calls_with_a_budget_end(tmp_path, layers, capsys):
    cases, minutes, ends = layers
    ends.update(dict.fromkeys((1, 2, 3), "OutOfMemoryError: too much"))
    path = tmp_path / "results.json"
    codes, asked = [], []
    for _ in range(10):
        made = suite.run("some", cases, arguments(out=path, resume=True, budget=50))  # of one case
        codes.append(suite.finish(made, "some", path))
        asked.append(capsys.readouterr().out.partition("tokens=")[2][0])
        assert made["complete"] == (len(codes) > 2)
    assert "".join(asked) == "123" + "1" + "123" + "123"
    assert codes == [3, 3, 3, 1] + [3, 3, 1] * 2
    made = suite.run("some", cases, arguments(out=path, resume=True))
    assert suite.finish(made, "some", path) == 1 and minutes == [13]  # each once in a call without a budget


def test_what_ends_the_process_does_not_stand_in_the_way(tmp_path, layers, capsys):
    """A kill, for which KeyboardInterrupt stands, leaves the case failed in the file: it comes last from then on."""
    cases, _, ends = layers
    path = tmp_path / "results.json"
    command = arguments(out=path, resume=True)
    ends.update({1: KeyboardInterrupt(), 2: "too much"})
    all_asked = {1: suite.LOST, 2: "too much", 3: None}
    for found, left in (({1: suite.LOST}, [2, 3]), (all_asked, []), (all_asked, [2])):
        with pytest.raises(KeyboardInterrupt):
            suite.run("some", cases, command)
        made = json.loads(path.read_text())["suites"]["some"]
        assert {row["shape"]["tokens"]: row["failure"] for row in made["rows"]} == found
        assert made["left"] == [suite.label(cases[tokens - 1]) for tokens in left] and not made["complete"]
    for failed in (1, 0):  # what was left over; all that failed
        made = suite.run("some", cases, command)
        assert suite.finish(made, "some", path) == failed and made["complete"] and len(made["rows"]) == 3
        assert made["rows"][0]["failure"] == (suite.LOST if failed else None)
        ends.clear()


def test_a_case_that_fails_as_a_whole_is_told_of_and_the_others_go_on(tmp_path, quick, capsys):
    path, memory, seen = tmp_path / "results.json", [], []

    def starved(case, part):
        whole = getattr(case, part)

        def hungry(*tensors):
            seen.append(case.shape["tokens"])
            if not memory:
                raise torch.OutOfMemoryError("too much")
            return whole(*tensors)

        return dataclasses.replace(case, **{part: hungry})

    inputs, truth, whole = (bench_lowrank_linear.case(shapes.Layer(24, 40, 8), tokens, "fp32") for tokens in (1, 2, 3))
    cases = [starved(inputs, "make"), starved(truth, "exact"), starved(whole, "solve")]

    def work():
        timed = [9.0] * (3 if memory else 3 / 0)
        return [rows.Row("job", {"tokens": 4}, "lowrank_ops", None, *timed, correct=True)]

    jobs = [suite.Job("job", {"tokens": 4}, ["lowrank_ops"], work)]

    def go():
        made = suite.run("some", cases, arguments(out=path, resume=True), jobs=jobs)
        return made, suite.finish(made, "some", path)

    for again in (False, True):
        made, code = go()
        assert code == 1 and made["complete"] and json.loads(path.read_text())["suites"]["some"] == made
        for tokens in (1, 2, 3, 4):
            (row,) = rows_by_arm(made, tokens).values()
            failure = "OutOfMemoryError: too much" if tokens < 4 else "ZeroDivisionError: division by zero"
            assert row["arm"] == suite.EVERY_ARM and row["failure"] == failure
            assert not row["correct"] and row["speedup"] == {} and row["median_us"] is None
        shown = capsys.readouterr()
        assert shown.out.count(f"{suite.EVERY_ARM:44} FAILED: ") == 4 == shown.err.count(f"{suite.EVERY_ARM}: FAILED: ")
        assert shown.out.count("once more") == 4 * again
    memory.append(True)
    made, code = go()
    assert code == 0 and suite.EVERY_ARM not in {row["arm"] for row in made["rows"]} and set(seen) == {1, 2, 3}


def test_what_breaks_the_device_ends_the_process_but_not_the_suite(tmp_path, layers, monkeypatch, capsys):
    """Nothing that follows in the process can be measured: further calls go on behind the case, and come to an end."""
    cases, minutes, ends = layers
    ends.update({1: "CUDA error", 2: "CUDA error"})
    broken = []
    measure = suite.measure_case

    def breaks(case, *rest):
        assert not broken
        if case.shape["tokens"] in ends:
            broken.append(True)
        return measure(case, *rest)

    monkeypatch.setattr(suite, "measure_case", breaks)
    monkeypatch.setattr(suite, "usable", lambda device: not broken)
    path = tmp_path / "results.json"
    codes = []
    while not codes or codes[-1] == suite.UNFINISHED:
        broken.clear()
        codes.append(suite.finish(suite.run("some", cases, arguments(out=path, resume=True)), "some", path))
    # 1; 2; 3 and, once more, 1
    assert codes == [3, 3, 1] and minutes == [4]
    made = json.loads(path.read_text())["suites"]["some"]
    assert {row["shape"]["tokens"]: row["correct"] for row in made["rows"]} == {1: False, 2: False, 3: True}


def test_asking_again_does_not_cost_what_was_measured(tmp_path, quick, monkeypatch, capsys):
    """Less than before is not taken, such as where memory became scarcer; a wrong result is."""
    case = bench_lowrank_linear.case(shapes.Layer(24, 40, 8), 1, "fp32")
    answers = iter(
        [{"a": None, "b": "too much"}, {"a": "too much", "b": "too much"}, "too much", {"a": 9.0, "b": "too much"}]
    )

    def measure(case, *rest):
        found, answer = [], next(answers)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        for arm, end in answer.items():
            row = rows.Row(case.op, dict(case.shape), arm, allowed=1.0, correct=end is None)
            row.error, row.failure = (end, None) if isinstance(end, float) else (None, end)
            row.median_us = row.p90_us = row.eager_us = 1.0
            found.append(row)
        return found, {}

    monkeypatch.setattr(suite, "measure_case", measure)
    path = tmp_path / "results.json"
    for a in (None, None, None, 9.0, 9.0):
        made = suite.run("some", [case], arguments(out=path, resume=True))
        suite.finish(made, "some", path)
        assert {row["arm"]: row["failure"] for row in made["rows"]} == {"a": None, "b": "too much"}
        assert next(row["error"] for row in made["rows"] if row["arm"] == "a") == a
    assert next(answers, "asked no more") == "asked no more"
