"""The harness: what is wrong gets no speedup, what fails leaves the rest, and what timing and rooflines mean."""

import contextlib
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import harness, shapes, suite
from benchmarks.bench_lowrank_linear import case, cases
from benchmarks.harness import Case, Peak, Row, Variant, measure_case

CPU = torch.device("cpu")
PEAK = Peak(1e10, {"float32": 5e10})
TINY = shapes.Layer(24, 40, 8)


def tiny(tokens: int = 6, **runs) -> Case:
    """One layer, by the given functions instead of its variants."""
    made = case(TINY, tokens, "fp32")
    return dataclasses.replace(made, variants=tuple(Variant(*pair) for pair in runs.items())) if runs else made


def right(x, down, up, bias, weight):
    return F.linear(F.linear(x, down), up, bias)


def off(*tensors):
    return right(*tensors) + 1e-4


def nan(*tensors):
    return right(*tensors) * float("nan")


def short(*tensors):
    return right(*tensors)[:-1]


def broken(*tensors):
    raise RuntimeError("no memory")


@pytest.mark.parametrize("wrong", [off, nan, short, broken])
def test_a_wrong_variant_gets_no_speedup(wrong):
    rows, _ = measure_case(tiny(right=right, wrong=wrong, too=right), CPU, PEAK, 0.02)
    assert [(row.variant, row.correct) for row in rows] == [("wrong", False), ("right", True), ("too", True)]
    assert rows[0].speedup == {} and rows[1].speedup.keys() == {"too"} and rows[2].speedup.keys() == {"right"}
    shown = str(rows[0])
    assert " us " not in shown and shown.split()[1] == ("FAILED:" if wrong is broken else "WRONG:")
    assert wrong is not broken or shown.endswith("RuntimeError: no memory")


def test_nothing_is_right_where_torch_itself_overflows():
    honest = tiny()
    made = dataclasses.replace(honest, make=lambda *args: tuple(tensor * 1e30 for tensor in honest.make(*args)))
    rows, _ = measure_case(made, CPU, PEAK, 0.02)
    assert len(rows) == 4 and not any(row.correct or row.speedup for row in rows)


def test_a_variant_that_cannot_run_says_why():
    rows, not_run = measure_case(case(TINY, 6, "bf16"), CPU, PEAK, 0.02)
    assert {row.variant for row in rows} == {"dense", "two_linears", "lowrank_ops auto", "lowrank_ops reference"}
    assert not_run.keys() == {"two_linears compiled", "lowrank_ops triton", "lowrank_ops cuda"}
    assert all("CUDA" in reason for reason in not_run.values())
    ours = next(row for row in rows if row.variant == "lowrank_ops auto")
    assert ours.implementation == "two_products" and ours.speedup.keys() == {"dense", "two_linears"}


def test_a_speedup_is_the_ratio_of_medians():
    pair = [Row("op", {}, name, median_us=time, correct=True) for name, time in (("slow", 30.0), ("fast", 10.0))]
    slow, fast = harness.compare(pair, ["slow"])
    assert fast.speedup == {"slow": pytest.approx(3)} and slow.speedup == {}


def test_rooflines():
    made, parameters = tiny(), 8 * (24 + 40)
    assert (made.flops, made.bytes) == (2 * 6 * parameters, 4 * (6 * (24 + 40) + parameters + 40))
    assert harness.roofline(made, PEAK) == (pytest.approx(made.bytes / 1e4), "GB/s")
    assert harness.roofline(made, Peak(1e20, {"float32": 5e10})) == (pytest.approx(made.flops / 5e4), "TFLOP/s")
    # float32 on tensor cores: three bfloat16 products, where that is faster
    three, _ = harness.roofline(made, Peak(1e20, {"float32": 5e10, "bfloat16": 3e11}))
    assert three == pytest.approx(3 * made.flops / 3e5)
    row = next(row for row in measure_case(made, CPU, PEAK, 0.02)[0] if row.variant == "dense")
    assert row.roofline_fraction == pytest.approx(row.roofline_us / row.median_us)
    assert row.achieved == pytest.approx(made.bytes / row.median_us / 1e3)


def test_copies_exceed_the_cache_and_are_taken_in_turn():
    tensors = (torch.empty(1000, 1000, device="meta"),)
    copies = harness.copies_to_rotate(tensors)
    assert copies * tensors[0].nbytes > harness.ROTATED_BYTES >= (copies - 1) * tensors[0].nbytes
    seen = []
    probe = harness.eager_probe(
        lambda x: seen.append(x.item()), [(torch.tensor(one),) for one in range(3)], lambda: 0.0
    )
    for number in range(4):
        probe(number)
    assert seen == [0, 0, 1, 2, 0]  # the first call warms up


def test_variants_are_interleaved():
    order = []
    probes = {name: lambda number, name=name: order.append((name, number)) or 1.0 for name in "abc"}
    harness.sample(probes, 0)
    assert "".join(name for name, _ in order) == "abcbcacababcbca"
    assert [number for _, number in order] == list(range(15))  # no two share a copy of the tensors


def test_median_and_90th_percentile():
    timing = harness.summarize([value * 1e-6 for value in (10, 1, 2, 3, 4, 5, 6, 7, 8, 9)], [3e-6])
    assert timing == (pytest.approx(5.5), pytest.approx(9), pytest.approx(3), 10)


@pytest.mark.gpu
def test_graphs_on_a_gpu():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    rotation = [(x.clone(),) for _ in range(harness.copies_to_rotate((x,)))]
    results = harness.time_variants({"once": lambda x: x @ x, "twice": lambda x: x @ x @ x}, rotation, 0.5)
    assert 1.7 < results["twice"].median / results["once"].median < 2.3
    assert results["once"].eager >= results["once"].median


# The command line


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a suite of small layers on the CPU; gives its exit code and what the file has of it."""
    monkeypatch.setattr(suite, "measure_peak", lambda device, clock: PEAK)
    path = tmp_path / "results.json"

    def run(*flags, cases=lambda: [tiny(1), tiny(6)]):
        options = ["--device", "cpu", "--seconds", "0.02", "--out", str(path), *flags]
        code = suite.main("some", "", lambda dtype, quick: cases(), "fp32", options)
        return code, json.loads(path.read_text())["suites"]["some"]

    return run


def test_a_suite_is_written_and_whole(run):
    code, made = run()
    assert code == 0 and made["complete"] and len(made["rows"]) == 8
    assert made["environment"]["torch"] == torch.__version__ and made["environment"]["commit"]
    assert made["peak"] == {"copy_gb_per_s": 10.0, "matmul_tflop_per_s": {"float32": 0.05}}
    assert "lowrank_ops triton" in made["not_run"]
    code, made = run("--only", "tokens=6")
    assert code == 0 and not made["complete"] and {row["shape"]["tokens"] for row in made["rows"]} == {6}


def test_a_wrong_result_of_ours_is_exit_code_1(run, capsys):
    lying = tiny()
    wrong = lying.variants[3]._replace(run=lambda *tensors: right(*tensors) + 1)
    code, made = run(cases=lambda: [dataclasses.replace(lying, variants=(*lying.variants[:3], wrong))])
    assert code == 1 and made["rows"][0]["variant"] == "lowrank_ops auto" and made["rows"][0]["speedup"] == {}
    assert "lowrank_ops auto: WRONG: error 1" in capsys.readouterr().err


def test_a_case_that_fails_leaves_the_rest(run):
    def refuse(device, seed):
        raise torch.OutOfMemoryError("too large")

    code, made = run(cases=lambda: [dataclasses.replace(tiny(1), make=refuse), tiny(6)])
    assert code == 1 and len(made["rows"]) == 5 and not made["rows"][0]["correct"]
    assert made["rows"][0]["variant"] == suite.WHOLE_CASE and "too large" in made["rows"][0]["failure"]


def test_resume_measures_only_what_has_no_rows(run, monkeypatch):
    assert run("--budget", "0")[0] == suite.UNFINISHED
    run("--only", "tokens=1")
    seen, measure = [], suite.measure_case
    monkeypatch.setattr(
        suite, "measure_case", lambda case, *rest: seen.append(case.shape["tokens"]) or measure(case, *rest)
    )
    code, made = run("--resume")
    assert code == 0 and seen == [6] and made["complete"] and len(made["rows"]) == 8


def test_a_killed_process_costs_one_case(run, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(suite, "measure_case", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    code, made = run("--resume")
    assert code == 1 and [row["failure"] for row in made["rows"][:2]] == [suite.ENDED, None] and len(made["rows"]) == 5


def test_a_device_that_fails_ends_the_process(run, monkeypatch):
    monkeypatch.setattr(suite, "usable", lambda device: False)
    assert run()[0] == suite.UNFINISHED
    code, made = run("--resume")
    assert code == 0 and len(made["rows"]) == 8


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt], ids=["broken", "killed"])
def test_a_variant_that_ends_the_process_is_left_out(run, monkeypatch, failure):
    def ends(*tensors):
        raise failure("an illegal memory access")

    def cases():
        for made in (tiny(1), tiny(6)):
            yield dataclasses.replace(made, variants=(*made.variants[:3], made.variants[3]._replace(run=ends)))

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(suite, "usable", lambda device: False)
        assert run(cases=cases)[0] == suite.UNFINISHED
    code, made = run("--resume", cases=cases)
    assert code == 1 and made["complete"] and made["not_run"]["lowrank_ops auto"] == suite.ENDED
    assert len(made["rows"]) == 4 and all(row["correct"] for row in made["rows"])


def test_rows_of_other_conditions_are_not_mixed(run, capsys):
    run("--only", "tokens=1", "--commit", "one")
    code, made = run("--resume", "--commit", "another")
    assert code == 0 and len(made["rows"]) == 8 and made["environment"]["commit"] == "another"
    assert "commit changed since some was measured" in capsys.readouterr().out


def test_quick_and_dtypes_choose_the_cases(capsys):
    assert suite.main("some", "", cases, "bf16", ["--dry-run", "--quick", "--dtypes", "fp16,fp32"]) == 0
    shown = capsys.readouterr().out
    number = 2 * 3 * len(shapes.QUICK_LAYERS) * len(shapes.QUICK_TOKENS)  # two dtypes; also int8 and fp8 factors
    assert shown.count("dense: would run") == number and "bf16" not in shown


def test_peak_and_environment_are_measured():
    peak = harness.measure_peak(CPU, suite.time.perf_counter, 0.05)
    assert 1e8 < peak.copy < math.inf and peak.matmul.keys() == {"float32"}
    facts = suite.environment(CPU)
    assert facts["device"] and facts["date"].endswith("UTC")
    assert facts["commit"] == "unknown" or len(facts["commit"].removesuffix("+changes")) == 12
