"""The tuner without a GPU: what it would search, how it keeps its progress, and that its tables are read as written."""

import dataclasses
import json
import math

import pytest
import torch

from benchmarks import tune, tuners
from benchmarks.suite import H200, META
from lowrank_ops.ops import _native, _tuning, covariance, linear
from lowrank_ops.ops._backend import choose
from lowrank_ops.ops.covariance import _cuda as covariance_cuda
from lowrank_ops.ops.covariance import _triton as covariance_triton
from lowrank_ops.ops.covariance import _triton_conv as conv_triton
from lowrank_ops.ops.linear import _cuda as linear_cuda
from lowrank_ops.ops.linear import _triton_config as linear_config

CPU = torch.device("cpu")
FACTS = {"device": "a GPU", "triton": "3", "commit": "abc", "date": "today"}


def problem_of(tuner, shape):
    case = tuner.case(shape)
    return case.pose(case.make(META, 0))[1]._replace(device=H200)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder in which ``_tuning`` looks for tables instead of its own."""
    cached = (
        _tuning.load,
        covariance_triton.config_for,
        conv_triton.config_for,
        linear_config.decode_config,
        linear_config.prefill_config,
        covariance_cuda.choice_for,
        covariance_cuda.conv_choice_for,
        linear_cuda.choice_for,
    )
    monkeypatch.setattr(_tuning, "files", lambda package: tmp_path)
    for function in cached:
        function.cache_clear()
    yield tmp_path / "tuned"
    for function in cached:
        function.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens without a GPU")
def test_refuses_to_tune_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tune, "TABLES", tmp_path)
    monkeypatch.setattr(tune, "PROGRESS", tmp_path)
    assert tune.main([]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("op", tune.TUNERS)
def test_what_would_run_now_comes_first_and_is_legal(op):
    tuner = tune.TUNERS[op]
    for shape in tuner.shapes()[:: 3 if op == "lowrank_linear" else 1]:
        problem = problem_of(tuner, shape)
        starts = tuner.starts(problem)
        assert len(starts) == len(set(starts)) and tuner.refuse(starts[0], problem) is None, shape
        table, _ = tuner.case(shape).pose(tuner.case(shape).make(META, 0))
        assert starts[0].impl == choose(table, problem, "auto").name


@pytest.mark.parametrize("op", tune.TUNERS)
def test_neighbours_differ_in_one_field_and_some_are_illegal(op):
    tuner = tune.TUNERS[op]
    problem = problem_of(tuner, tuner.shapes()[0])
    start = tuner.starts(problem)[0]
    neighbours = tuner.neighbours(start)
    for neighbour in neighbours:
        pairs = zip(dataclasses.astuple(start.config), dataclasses.astuple(neighbour.config), strict=True)
        assert sum(a != b for a, b in pairs) == 1
    greedy = tune.Candidate(start.impl, dataclasses.replace(start.config, **{
        field: max(values) for field, values in tuner.options[start.impl].items()
    }))  # fmt: skip
    assert "shared memory" in tuner.refuse(greedy, problem)


def test_a_table_goes_the_way_back(tables):
    tuner = tune.TUNERS["covariance_update"]
    shape = {"tokens": 8192, "features": 768, "dtype": "bf16"}
    problem = problem_of(tuner, shape)
    config = dataclasses.replace(covariance_triton.config_for(problem), num_stages=3, split=6)
    entry = {"shape": shape, **tune.Candidate("triton", config).to_dict(), "us": 1.5}
    path = tune.write_table(tuner.op, tuner.arch(H200), FACTS, [entry], tables)
    covariance_triton.config_for.cache_clear()
    _tuning.load.cache_clear()
    assert path.name == "covariance_update.sm90.json" and json.loads(path.read_text())["device"] == "a GPU"
    assert covariance_triton.config_for(problem) == config
    assert covariance_triton.config_for(problem._replace(tokens=9000)) == config
    assert covariance_triton.config_for(problem._replace(dtype=torch.float16)) != config


def test_a_table_of_convolutions_goes_the_way_back(tables):
    tuner = tune.TUNERS["conv_covariance_update"]
    shape = tuner.shapes()[0]
    assert shape == {"tokens": 64 * 56 * 56, "features": 64 * 9, "groups": 1, "loads": "vector", "dtype": "bf16"}
    problem = problem_of(tuner, shape)
    own = conv_triton.config_for(problem)
    config = dataclasses.replace(own, num_stages=4, split=6)
    entry = {"shape": shape, **tune.Candidate("triton", config).to_dict(), "us": 1.5}
    assert tune.write_table(tuner.op, "sm90", FACTS, [entry], tables).name == "conv_covariance_update.sm90.json"
    conv_triton.config_for.cache_clear()
    _tuning.load.cache_clear()
    assert conv_triton.config_for(problem) == config and conv_triton.supports(problem) is None
    assert conv_triton.config_for(problem._replace(shape=(32, 64, 56, 56))) == config
    _, channels, height, width = problem.shape
    first = problem._replace(strides=(channels * height * width, height * width, width, 1))
    for other in (first, problem._replace(dtype=torch.float16)):  # loaded one by one, or of another dtype
        assert conv_triton.config_for(other).split == 0


@pytest.mark.parametrize("impl", ["triton.decode", "triton.prefill", "two_products"])
def test_a_linear_table_chooses_the_implementation(tables, impl):
    tuner = tune.TUNERS["lowrank_linear"]
    shape = next(shape for shape in tuner.shapes() if shape["tokens"] == 64 and shape["rank"] == 136)
    problem = problem_of(tuner, shape)
    start = next(candidate for candidate in tuner.starts(problem) if candidate.impl == impl)
    field = {"triton.decode": {"up_stages": 4}, "triton.prefill": {"stages_k": 4}}.get(impl)
    config = dataclasses.replace(start.config, **field) if field else None
    tune.write_table(
        tuner.op,
        tuner.arch(H200),
        FACTS,
        [{"shape": shape, **tune.Candidate(impl, config).to_dict(), "us": 1.0}],
        tables,
    )
    for function in (_tuning.load, linear_config.decode_config, linear_config.prefill_config, choose):
        function.cache_clear()
    try:
        assert choose(linear.TABLE, problem, "auto").name == impl
        if impl == "triton.decode":
            assert linear_config.decode_config(problem) == config
        if impl == "triton.prefill":
            assert linear_config.prefill_config(problem) == config
    finally:
        choose.cache_clear()


@pytest.mark.parametrize(
    "op, table, impl",
    [
        ("covariance_update", covariance.TABLE, "cuda"),
        ("conv_covariance_update", covariance.CONV_TABLE, "cuda"),
        ("lowrank_linear", linear.TABLE, "cuda.decode"),
        ("lowrank_linear", linear.TABLE, "cuda.prefill"),
    ],
)
def test_cuda_kernels_run_where_a_table_found_them_fastest(tables, op, table, impl):
    tuner = tune.TUNERS[op]
    shape = tuner.shapes()[0]
    problem = problem_of(tuner, shape)
    assert impl in [candidate.impl for candidate in tuner.starts(problem)]
    table = tuple(row._replace(supports=lambda problem: None) for row in table)  # as if the library were there
    assert choose(table, problem, "auto").name != impl
    entry = {"shape": shape, **tune.Candidate(impl, None).to_dict(), "us": 1.0}
    tune.write_table(op, tuner.arch(H200), FACTS, [entry], tables)
    for function in (_tuning.load, choose):
        function.cache_clear()
    try:
        assert choose(table, problem, "auto").name == impl
        covariance_triton.config_for.cache_clear()
        conv_triton.config_for.cache_clear()
        if impl == "cuda":  # what is not tuned keeps its own choice
            (conv_triton if op.startswith("conv") else covariance_triton).config_for(problem)
    finally:
        choose.cache_clear()


@pytest.mark.parametrize(
    "op, impl, config",
    [
        ("covariance_update", "cuda", {"kernel": "covariance_sm80", "splits": 2}),
        ("conv_covariance_update", "cuda", {"kernel": "", "splits": 2}),
        ("lowrank_linear", "cuda.decode", {"kernel": "decode_sm80", "splits": 4}),
    ],
)
def test_the_cuda_plan_that_ships_is_what_a_search_starts_from(tables, monkeypatch, op, impl, config):
    """As far as the planner takes it, which may not be here; or a new table would lose what the last one had found."""
    monkeypatch.setattr(covariance_cuda, "_planned", lambda problem, choice=_native.DEFAULT_CHOICE: ("", "a plan"))
    monkeypatch.setattr(covariance_cuda, "_planned_conv", lambda problem, choice=_native.DEFAULT_CHOICE: ("", "a plan"))
    monkeypatch.setattr(linear_cuda, "_planned", lambda problem, kind, choice=_native.DEFAULT_CHOICE: ("", "a plan"))
    tuner = tune.TUNERS[op]
    shape = tuner.shapes()[0]
    entry = {"shape": shape, "impl": impl, "config": config, "us": 1.0}
    tune.write_table(op, tuner.arch(H200), FACTS, [entry], tables)
    for function in (_tuning.load, choose):
        function.cache_clear()
    try:
        starts = tuner.starts(problem_of(tuner, shape))
    finally:
        choose.cache_clear()
    mine = [candidate.config for candidate in starts if candidate.impl == impl]
    assert mine[:2] == [_native.Choice(**config), _native.Choice()]
    assert starts[0] == tune.Candidate(impl, mine[0]) and len(starts) == len(set(starts))


def test_every_cuda_kernel_is_asked_without_a_search(tables):
    """Nothing of it has to be compiled, and the planner's own choice is one that nobody has measured."""
    covariances, linears = tune.TUNERS["covariance_update"], tune.TUNERS["lowrank_linear"]
    starts = covariances.starts(problem_of(covariances, covariances.shapes()[0]))
    kernels = {start.config.kernel for start in starts if start.impl == "cuda"}
    assert kernels == {"", *covariances.options["cuda"]["kernel"]} and "covariance_sm90_wide" in kernels
    starts = linears.starts(problem_of(linears, linears.shapes()[0]))
    assert {("decode_sm90", 8), ("decode_sm80", 16)} <= {
        (start.config.kernel, start.config.splits) for start in starts if start.impl == "cuda.decode"
    }
    assert {(2, 192), (8, 128)} <= {
        (start.config.splits, start.config.token_tile) for start in starts if start.impl == "cuda.prefill"
    }


class Fake(tuners.CovarianceTuner):
    """Three shapes, told apart by their tokens."""

    def shapes(self):
        return [{"tokens": tokens, "features": 8, "dtype": "bf16"} for tokens in (1, 2, 3)]


@pytest.fixture
def searched(monkeypatch):
    """Shapes in the order in which they were searched, at no cost."""
    seen = []

    def search(tuner, shape, device, seconds, steps):
        seen.append(shape["tokens"])
        entry = {"shape": shape, "impl": "triton", "config": {}, "us": 1.0}
        return tune.Tuned(entry, f"changed {shape['tokens']}", {"a candidate": "wrong: error 1"})

    monkeypatch.setattr(tune, "tune_shape", search)
    return seen


def test_progress_is_kept_and_the_table_waits_for_all(tmp_path, searched, monkeypatch, capsys):
    progress, folder = tmp_path / "progress", tmp_path / "tables"
    clock = iter(range(100))
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(clock))
    assert tune.tune(Fake(), CPU, 2, 0.1, progress, folder) == tune.UNFINISHED
    assert searched == [1, 2] and not folder.exists()
    assert "2 of 3 shapes are done" in (captured := capsys.readouterr()).out and "wrong: error 1" in captured.err
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder) == 0
    assert searched == [1, 2, 3]
    (written,) = folder.iterdir()
    assert [entry["shape"]["tokens"] for entry in json.loads(written.read_text())["entries"]] == [1, 2, 3]
    assert "changed 3" in capsys.readouterr().out


def test_some_shapes_make_a_table_and_the_others_are_added_to_it(tmp_path, searched):
    progress, folder = tmp_path / "progress", tmp_path / "tables"
    some = Fake().shapes()[1:]
    for shapes, seen in ((some, [2, 3]), (some, [2, 3]), (None, [2, 3, 1])):
        assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder, shapes=shapes) == 0 and searched == seen
        (written,) = folder.iterdir()
        assert [entry["shape"]["tokens"] for entry in json.loads(written.read_text())["entries"]] == seen


def test_a_hopeless_shape_that_is_not_asked_for_keeps_no_table_from_being_written(tmp_path, searched, monkeypatch):
    progress, folder = tmp_path / "progress", tmp_path / "tables"
    search = tune.tune_shape
    wrong = tune.Tuned(None, "no candidate", {"a candidate": "wrong: error 1"})
    monkeypatch.setattr(tune, "tune_shape", lambda tuner, shape, *rest: (
        wrong if shape["tokens"] == 2 else search(tuner, shape, *rest)
    ))  # fmt: skip
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder) == 1 and not folder.exists()
    some = [shape for shape in Fake().shapes() if shape["tokens"] != 2]
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder, shapes=some) == 0 and folder.exists()


def test_progress_from_before_hopeless_shapes_were_kept_goes_on(tmp_path, searched):
    progress, folder = tmp_path / "progress", tmp_path / "tables"
    tune.tune(Fake(), CPU, 50, 0.1, progress, folder)
    (kept,) = progress.iterdir()
    document = json.loads(kept.read_text())
    del document["hopeless"], document["entries"][2]
    kept.write_text(json.dumps(document))
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder) == 0 and searched == [1, 2, 3, 3]


def test_progress_of_other_conditions_is_not_mixed_in(tmp_path, searched):
    progress, folder = tmp_path / "progress", tmp_path / "tables"
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder) == 0
    (kept,) = progress.iterdir()
    document = json.loads(kept.read_text())
    document["conditions"]["triton"] = "another"
    kept.write_text(json.dumps(document))
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder) == 0 and searched == [1, 2, 3, 1, 2, 3]


def test_progress_of_a_smaller_search_space_is_not_mixed_in(tmp_path, searched, monkeypatch):
    progress, folder = tmp_path / "progress", tmp_path / "tables"
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder) == 0
    monkeypatch.setattr(Fake, "options", {**Fake.options, "another": {"field": (1, 2)}})
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder) == 0 and searched == [1, 2, 3, 1, 2, 3]


def test_progress_of_a_shorter_search_is_not_taken_for_a_longer_one(tmp_path, searched):
    progress, folder = tmp_path / "progress", tmp_path / "tables"
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder, steps=0) == 0
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder, steps=0) == 0 and searched == [1, 2, 3]
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder) == 0 and searched == [1, 2, 3, 1, 2, 3]


@pytest.fixture
def gpu(monkeypatch):
    """Stands for one, up to the search itself."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "device_facts", lambda device: H200)
    monkeypatch.setattr(tune, "usable", lambda device: True)


def test_the_command_hands_everything_on(tmp_path, monkeypatch, gpu):
    """A search of which nothing is wanted but what ships, and one without end."""
    given = []
    monkeypatch.setattr(tune, "tune", lambda tuner, **options: given.append((tuner.op, options)) or 0)
    folders = ["--progress", str(tmp_path / "tuning"), "--tables", str(tmp_path / "tuned")]
    assert tune.main(["--budget", "9", "--steps", "0", "--commit", "abc", *folders]) == 0
    assert [op for op, _ in given] == list(tune.TUNERS)
    assert all(options["steps"] == 0 and options["commit"] == "abc" and options["budget"] <= 9 for _, options in given)
    assert all(options["shapes"] == tune.TUNERS[op].shapes() for op, options in given)
    del given[:]
    assert tune.main(["--graded", *folders]) == 0
    assert {op: len(options["shapes"]) for op, options in given} == {"covariance_update": 15, "lowrank_linear": 56}
    assert tune.main(["--graded", "--op", "conv_covariance_update", *folders]) == 0 and len(given) == 2
    monkeypatch.setattr(tune, "tune", lambda tuner, **options: tune.UNFINISHED * (options["steps"] == math.inf))
    assert tune.main([]) == tune.UNFINISHED


def test_an_op_that_broke_the_device_is_left_and_comes_last_in_the_next_process(tmp_path, monkeypatch, gpu):
    first, *others = tune.TUNERS
    asked = []

    def breaks(tuner, progress, **options):
        asked.append(tuner.op)
        if tuner.op == first:
            progress.mkdir(exist_ok=True)
            state = {"entries": [{"shape": {"tokens": 1}}], "asked": [{"tokens": 1}, {"tokens": 2}]}
            (progress / f"{tuner.op}.{tuner.arch(H200)}.json").write_text(json.dumps(state))
        return tune.UNFINISHED * (tuner.op == first)

    monkeypatch.setattr(tune, "tune", breaks)
    monkeypatch.setattr(tune, "usable", lambda device: asked[-1] != first)
    folders = ["--progress", str(tmp_path / "tuning"), "--tables", str(tmp_path / "tuned")]
    assert tune.main(folders) == tune.UNFINISHED and asked == [first]
    del asked[:]
    assert tune.main(folders) == tune.UNFINISHED and asked == [*others, first]


def test_a_kill_while_progress_is_written_costs_one_shape(tmp_path, searched, monkeypatch):
    progress, folder = tmp_path / "progress", tmp_path / "tables"
    write = type(progress).write_text
    written = []

    def torn(path, text):
        written.append(path)
        if len(written) == 2:
            write(path, text[: len(text) // 2])
            raise KeyboardInterrupt
        return write(path, text)

    monkeypatch.setattr(type(progress), "write_text", torn)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(Fake(), CPU, 50, 0.1, progress, folder)
    assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder) == 0 and searched == [1, 2, 3, 1]


@pytest.fixture
def ends(monkeypatch, searched):
    """What a search raises, by the tokens of its shape; a RuntimeError breaks the device of this process."""
    search, ends, broken = tune.tune_shape, {}, []

    def fail(tuner, shape, *rest):
        found = search(tuner, shape, *rest)
        end = ends.get(shape["tokens"])
        if type(end) is RuntimeError:
            broken.append(True)
        if end:
            raise end
        return found

    monkeypatch.setattr(tune, "tune_shape", fail)
    monkeypatch.setattr(tune, "usable", lambda device: not broken or broken.clear())
    return ends


def test_a_shape_that_ends_the_process_does_not_stand_in_the_way(tmp_path, searched, ends):
    """A kill, for which KeyboardInterrupt stands: the others come first from then on, and then the one killed first."""
    command = Fake(), CPU, 50, 0.1, tmp_path / "progress", tmp_path / "tables"
    ends.update({1: KeyboardInterrupt(), 2: KeyboardInterrupt()})
    for seen in ([1], [1, 2], [1, 2, 3, 1], [1, 2, 3, 1, 2]):
        with pytest.raises(KeyboardInterrupt):
            tune.tune(*command)
        assert searched == seen
    ends.clear()
    assert tune.tune(*command) == 0 and searched[5:] == [1, 2]


def test_a_shape_whose_inputs_do_not_fit_lets_the_others_be_tuned(tmp_path, searched, ends, capsys):
    command = Fake(), CPU, 50, 0.1, tmp_path / "progress", tmp_path / "tables"
    ends[1] = torch.OutOfMemoryError("too much")
    for seen in ([1, 2, 3], [1, 2, 3, 1]):
        assert tune.tune(*command) == 1 and searched == seen
        assert "'all': 'OutOfMemoryError: too much'" in capsys.readouterr().err
    ends.clear()
    assert tune.tune(*command) == 0 and searched[4:] == [1]


def test_shapes_that_break_the_device_end_the_process_but_not_the_search(tmp_path, searched, ends):
    command = Fake(), CPU, 50, 0.1, tmp_path / "progress", tmp_path / "tables"
    ends.update({1: RuntimeError("an illegal memory access"), 2: RuntimeError("an illegal memory access")})
    for code, seen in ((3, [1]), (3, [1, 2]), (1, [1, 2, 3, 1]), (1, [1, 2, 3, 1, 2])):
        assert tune.tune(*command) == code and searched == seen
    ends.clear()
    assert tune.tune(*command) == 0 and searched[5:] == [1, 2]


@pytest.mark.parametrize("reason, again", [("wrong: error 1", 0), ("OutOfMemoryError: too much", 1)])
def test_a_shape_without_a_candidate_keeps_the_table_from_being_written(
    tmp_path, monkeypatch, capsys, searched, reason, again
):
    """What is wrong is searched once, what failed in every run; the others are searched too, and the end is told."""
    search = tune.tune_shape

    def fail(tuner, shape, *rest):
        found = search(tuner, shape, *rest)
        return tune.Tuned(None, "no candidate", {"a candidate": reason}) if shape["tokens"] == 2 else found

    monkeypatch.setattr(tune, "tune_shape", fail)
    progress, folder = tmp_path / "progress", tmp_path / "tables"
    for run in range(3):
        assert tune.tune(Fake(), CPU, 50, 0.1, progress, folder) == 1
        assert searched == [1, 2, 3] + [2] * again * run and not folder.exists()
        assert "no candidate runs and is right for 1 shapes, first {'tokens': 2" in capsys.readouterr().err
