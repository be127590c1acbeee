"""The tuner without a GPU: what it begins with, how it resumes, and that the package reads its tables as written."""

import argparse
import dataclasses
import json

import pytest
import torch

from benchmarks import suite, tune, tuners
from benchmarks.suite import UNFINISHED
from benchmarks.tuners import H200, TUNERS, Candidate, on_device
from lowrank_ops.ops import _tuning
from lowrank_ops.ops._backend import choose
from lowrank_ops.ops.covariance import _cuda as covariance_cuda
from lowrank_ops.ops.covariance import _triton as covariance_triton
from lowrank_ops.ops.covariance import _triton_conv as conv_triton
from lowrank_ops.ops.grouped import _cuda as grouped_cuda
from lowrank_ops.ops.grouped import _triton as grouped_triton
from lowrank_ops.ops.linear import _cuda as linear_cuda
from lowrank_ops.ops.linear import _triton_config as linear_config

CPU = torch.device("cpu")
FACTS = {"device": "a GPU", "triton": "3", "commit": "abc", "date": "today"}
CACHED = (
    _tuning.load,
    choose,
    covariance_triton.config_for,
    conv_triton.config_for,
    linear_config.decode_config,
    linear_config.prefill_config,
    covariance_cuda.choice_for,
    covariance_cuda.conv_choice_for,
    linear_cuda.choice_for,
    grouped_cuda.choice_for,
)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a table of one entry where ``lowrank_ops.ops`` looks for it."""
    monkeypatch.setattr(_tuning, "files", lambda package: tmp_path)

    def forget():
        for function in CACHED:
            function.cache_clear()

    def write(tuner, shape, candidate):
        entry = {"shape": shape, **candidate.to_dict(), "us": 1.0}
        tune.write_table(tuner.op, tuner.arch(H200), FACTS, [entry], tmp_path / "tuned")
        forget()

    yield write
    forget()


@pytest.mark.parametrize("op", TUNERS)
def test_what_would_run_now_comes_first_and_is_legal(op):
    tuner = TUNERS[op]
    for _, case in tuner.shapes()[::7]:
        problem = on_device(tuner, case, H200)
        starts = tuner.starts(problem)
        assert len(starts) == len(set(starts)) and tuner.refuse(starts[0], problem) is None, str(case)
        assert starts[0].impl == choose(tuner.table, problem, "auto").name


@pytest.mark.parametrize("op", TUNERS)
def test_neighbors_differ_in_one_field_and_may_be_illegal(op):
    tuner = TUNERS[op]
    problem = on_device(tuner, tuner.shapes()[0][1], H200)
    start = tuner.starts(problem)[0]
    for near in tuner.neighbors(start):
        pairs = zip(dataclasses.astuple(start.config), dataclasses.astuple(near.config), strict=True)
        assert sum(a != b for a, b in pairs) == 1
    largest = {field: max(values) for field, values in tuner.options[start.impl].items()}
    greedy = Candidate(start.impl, dataclasses.replace(start.config, **largest))
    assert "shared memory" in tuner.refuse(greedy, problem)


@pytest.mark.parametrize(
    ("op", "field", "config_of"),
    [
        ("covariance_update", "num_stages", covariance_triton.config_for),
        ("conv_covariance_update", "num_stages", conv_triton.config_for),
        ("lowrank_linear", "up_stages", linear_config.decode_config),
        ("lowrank_linear_grouped", "up_stages", grouped_triton.decode_tiles),
    ],
)
def test_the_package_reads_a_table_as_it_was_written(write, op, field, config_of):
    tuner = TUNERS[op]
    decode = op.startswith("lowrank_linear")
    shape, case = tuner.shapes(quick=True)[1 if decode else 0]
    problem = on_device(tuner, case, H200)
    impl = "triton.decode" if decode else "triton"
    start = next(start for start in tuner.starts(problem) if start.impl == impl)
    changed = dataclasses.replace(start.config, **{field: getattr(start.config, field) - 1})
    write(tuner, shape, Candidate(impl, changed))
    assert config_of(problem) == changed and choose(tuner.table, problem, "auto").name == impl


@pytest.mark.parametrize(
    ("op", "impl"),
    [
        ("covariance_update", "cuda"),
        ("conv_covariance_update", "cuda"),
        ("lowrank_linear", "cuda.decode"),
        ("lowrank_linear", "cuda.prefill"),
        ("lowrank_linear", "two_products"),
        ("lowrank_linear_grouped", "cuda"),
        ("lowrank_linear_grouped", "triton.prefill"),
        ("lowrank_linear_grouped", "members"),
    ],
)
def test_a_table_chooses_the_implementation(write, op, impl):
    tuner = TUNERS[op]
    shape, case = tuner.shapes()[0]
    problem = on_device(tuner, case, H200)
    assert impl in [start.impl for start in tuner.starts(problem)]
    table = tuple(row._replace(supports=lambda problem: None) for row in tuner.table)  # as if the library were there
    assert choose(table, problem, "auto").name != impl
    write(tuner, shape, Candidate(impl, None))
    assert choose(table, problem, "auto").name == impl


@pytest.mark.parametrize(("factors", "dtype"), [("int8", "int8"), ("fp8", "float8_e4m3fn")])
def test_eight_bit_factors_have_entries_of_their_own(write, factors: str, dtype: str):
    """The candidates get the scales, and the package finds the entry for factors of this format only."""
    tuner = TUNERS["lowrank_linear"]
    shape, case = next(pair for pair in tuner.shapes() if pair[1].shape.get("factors") == factors)
    assert shape["dtype"] == f"bfloat16 {dtype} {dtype}"
    problem = on_device(tuner, case, H200)
    start = next(start for start in tuner.starts(problem) if start.impl == "triton.decode")
    changed = dataclasses.replace(start.config, up_stages=start.config.up_stages + 1)
    write(tuner, shape, Candidate("triton.decode", changed))
    plain = problem._replace(down_format=None, up_format=None)
    assert linear_config.decode_config(problem) == changed != linear_config.decode_config(plain)

    tensors = case.make(CPU, 0)
    y = tuner.runner(Candidate("two_products", None), problem)(*tensors)
    exact = case.exact(tensors)
    assert (y - exact).norm() < 0.01 * exact.norm()


class Fake(tuners.CovarianceTuner):
    """Three shapes with different numbers of tokens."""

    def shapes(self, quick=False):
        made = TUNERS[self.op].shapes()[0][1]
        return [
            (shape, dataclasses.replace(made, shape=shape))
            for shape in ({"tokens": tokens, "features": 8, "dtype": "bf16"} for tokens in (1, 2, 3))
        ]


@pytest.fixture
def search(tmp_path, monkeypatch):
    """Tunes three shapes at no cost; gives the exit code, the shapes that were searched, and the table."""
    seen = []

    class Search:
        failed = {"a candidate": "wrong: error 1"}  # noqa: RUF012
        wrong = ()

        def __init__(self, tuner, case, *rest):
            self.tokens = case.shape["tokens"]
            seen.append(self.tokens)

        def fastest(self):
            best = Candidate("triton", None)
            return None if self.tokens in self.wrong else (best, 1.0, best, 2.0)

    monkeypatch.setattr(tune, "Search", Search)

    def search(seconds=60.0, wrong=(), **changed):
        seen.clear()
        Search.wrong = wrong
        options = {"commit": "abc", "steps": 0, "seconds": 0.1, "progress": tmp_path / "progress"}
        options |= {"tables": tmp_path / "tables", **changed}
        end = tune.time.perf_counter() + seconds
        code = tune.tune(Fake(), Fake().shapes(), CPU, argparse.Namespace(**options), end)
        written = [json.loads(path.read_text()) for path in (tmp_path / "tables").glob("*.json")]
        return code, list(seen), [entry["shape"]["tokens"] for table in written for entry in table["entries"]]

    return search


def test_progress_is_kept_and_the_table_waits_for_all(search, monkeypatch, capsys):
    assert search(seconds=-1.0) == (UNFINISHED, [], [])
    with monkeypatch.context() as patch:
        patch.setattr(tune, "usable", lambda device: False)  # the process ends after each shape
        assert search() == (UNFINISHED, [1], []) and search() == (UNFINISHED, [2], [])
    assert search() == (0, [3], [1, 2, 3]) and search() == (0, [], [1, 2, 3])
    assert "wrong: error 1" in capsys.readouterr().err
    assert search(steps=1)[1] == [1, 2, 3]  # a longer search does not take a shorter one for done


def test_no_table_is_written_where_no_candidate_is_right(search, tmp_path, capsys):
    assert search(wrong=(2,)) == (1, [1, 2, 3], [])
    assert search() == (1, [], []) and "no table is written" in capsys.readouterr().err
    (path,) = (tmp_path / "progress").iterdir()
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "failed": []}))
    assert search() == (0, [2], [1, 3, 2])


def test_a_shape_that_ends_its_process_is_not_searched_again(search, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tune, "Search", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            search()
    assert search() == (1, [2, 3], [])


def test_what_broke_the_device_is_left_out_by_the_next_process(search, monkeypatch, capsys):
    class Broken:
        def __init__(self, tuner, case, device, attempts, *rest):
            self.attempts = attempts

        def fastest(self):
            with self.attempts("cuda decode_sm90"):
                raise RuntimeError("an illegal memory access")

    with monkeypatch.context() as patch:
        patch.setattr(tune, "Search", Broken)
        patch.setattr(suite, "usable", lambda device: False)
        assert search() == (UNFINISHED, [], [])
    assert search() == (0, [1, 2, 3], [1, 2, 3])  # the shape is not given up
    assert "cuda decode_sm90 ended the process and is left out" in capsys.readouterr().err


def test_dry_run_and_no_gpu(capsys):
    assert tune.main(["--dry-run", "--quick"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{op}, planned for" in shown for op in TUNERS) and "neighbors; first Candidate" in shown
    if not torch.cuda.is_available():
        assert tune.main([]) == 2 and "needs a CUDA device" in capsys.readouterr().err
