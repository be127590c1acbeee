"""The script of a GPU session: its parts in order, what is done only once, and that it ends in time. No GPU is used."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import rows, suite, tuners

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"
PARTS = ["tests", "tune", "covariance", "lowrank_linear", "model", "grade"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a bash script for GPU machines, which run Linux")


def session(folder, *arguments, python=sys.executable):
    environment = {**os.environ, "PYTHON": str(python), "PYTHONPATH": str(ROOT)}
    return subprocess.run([SCRIPT, folder, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture
def python(tmp_path):
    """Stands for a python3 with a GPU: it writes down what it is asked to run, and does and ends as files say."""
    fake = tmp_path / "python"
    fake.write_text(
        f"""#!/usr/bin/env bash
[ "$1" = - ] && exit 0
[ "$1" = -c ] && {{ cat {tmp_path}/gpu 2>/dev/null || echo a GPU; exit 0; }}
echo "$*" >> {tmp_path}/asked
[ ! -e {tmp_path}/does-$2 ] || . {tmp_path}/does-$2
cat {tmp_path}/seconds-$2 2>/dev/null | xargs -r sleep
exit "$(cat {tmp_path}/code-$2 2>/dev/null || echo 0)"
"""
    )
    fake.chmod(0o755)
    return fake


def asked(tmp_path):
    """The modules asked for since the last time."""
    path = tmp_path / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [line.split()[1].removeprefix("benchmarks.") for line in lines]


def test_parts_go_on_until_all_are_done(tmp_path, python):
    folder = tmp_path / "session"
    (tmp_path / "code-benchmarks.bench_lowrank_linear").write_text("3")
    (tmp_path / "code-benchmarks.bench_model").write_text("1")
    parts = PARTS[1:]
    first = session(folder, *parts, "--commit", "abc", python=python)
    assert first.returncode == 3 and "there is more to do" in first.stdout
    lines = (tmp_path / "asked").read_text().splitlines()
    assert f"--tables {folder}/tuned" in lines[0] and "--steps 0" in lines[0]
    assert f"--out {folder}/results.json --resume --budget" in lines[1] and "--commit abc" in lines[1]
    modules = ["tune", "bench_covariance", "bench_lowrank_linear", "bench_model", "grade"]
    assert asked(tmp_path) == modules
    codes = {path.stem: path.read_text().split() for path in folder.glob("*.code")}
    assert codes == {"2-tune": ["0"], "3-covariance": ["0"], "5-model": ["1"], "6-grade": ["0"]}
    (folder / "1-tests.code").write_text("0")  # so that no wheel is needed
    (tmp_path / "code-benchmarks.bench_lowrank_linear").write_text("0")
    again = session(folder, python=python)  # what failed gets a second chance, and no third
    assert again.returncode == 1 and "failed: model" in again.stdout
    assert asked(tmp_path) == ["bench_lowrank_linear", "bench_model", "grade"]
    third = session(folder, python=python)
    assert third.returncode == 1 and "model: done before, with exit code 1" in third.stdout
    assert asked(tmp_path) == ["grade"]
    session(folder, "covariance", python=python)
    assert asked(tmp_path) == ["bench_covariance"]


def test_a_part_that_passes_at_the_second_try_has_passed(tmp_path, python):
    folder = tmp_path / "session"
    (tmp_path / "code-benchmarks.bench_model").write_text("139")
    assert session(folder, "model", python=python).returncode == 3
    (tmp_path / "code-benchmarks.bench_model").write_text("0")
    assert session(folder, "model", python=python).returncode == 0
    assert (folder / "5-model.code").read_text() == "0\n"


def test_a_part_that_had_passed_gets_its_second_try_as_well(tmp_path, python):
    folder = tmp_path / "session"
    assert session(folder, "model", python=python).returncode == 0
    (tmp_path / "code-benchmarks.bench_model").write_text("1")
    assert session(folder, "model", python=python).returncode == 3
    assert (folder / "5-model.code").read_text() == "1\n"
    assert session(folder, "model", python=python).returncode == 1


@pytest.mark.parametrize(
    "end, code",
    [("kill -SEGV $$", 139), ("kill -KILL $$", 137), ("kill -ABRT $$", 134), ("exit 124", 124), ("exit 3", 3)],
)
def test_a_part_that_never_gets_further_is_given_up(tmp_path, python, end, code):
    folder = tmp_path / "session"
    does = tmp_path / "does-benchmarks.bench_lowrank_linear"
    does.write_text(end)
    for call in range(1, 4):
        ended = session(folder, "lowrank_linear", "model", python=python)
        assert ended.returncode == (3 if call < 3 else 1), ended.stdout
        assert f"lowrank_linear ended with exit code {code}" in ended.stdout
        assert asked(tmp_path) == ["bench_lowrank_linear", "bench_model"]  # the others go on
    told = f"lowrank_linear: given up, after these ends without a result: {code} {code} {code};"
    assert told in ended.stdout and "failed: lowrank_linear" in ended.stdout
    (folder / "1-tests.code").write_text("0")  # so that no wheel is needed
    again = session(folder, python=python)
    assert again.returncode == 1 and "lowrank_linear: given up before" in again.stdout
    assert asked(tmp_path) == ["tune", "bench_covariance", "grade"]
    assert session(folder, "lowrank_linear", python=python).returncode == 3  # named, it has three more
    does.unlink()
    assert session(folder, python=python).returncode == 0
    assert (folder / "4-lowrank_linear.code").read_text() == "0\n" and not list(folder.glob("*.cut"))


def test_a_part_that_is_cut_but_gets_further_goes_on(tmp_path, python):
    """As the files say that the suites and the tuner write: a row, a time, or a shape more is further, a try is not."""
    folder = tmp_path / "session"
    failed, timed, other = (rows.Row("op", {"tokens": 1}, arm) for arm in ("lowrank_ops auto", "lowrank_ops auto", "b"))
    failed.failure, timed.median_us, other.failure = "OutOfMemoryError: 7 GiB are left", 8.0, "no"
    tries = 0

    def results(*measured):
        nonlocal tries
        tries += 1
        found = {"environment": {"resumed": ["then"] * tries}, "left": ["a", "b", "c"][tries % 4 :]}
        found["rows"] = [row.to_dict() for row in measured]
        path = tmp_path / f"results{tries}.json"
        suite.save(path, "covariance", found)
        return f"cp {path} {folder}/results.json; kill -KILL $$"

    def cuts(part, *does):
        lengths = []
        for text in does:
            (tmp_path / f"does-benchmarks.{part}").write_text(text)
            session(folder, part.removeprefix("bench_"), python=python)
            lengths += [len(path.read_text().split()) for path in folder.glob("*.cut")] or [0]
        return lengths

    kill = "kill -KILL $$"
    assert cuts("bench_covariance", kill, results(failed), kill, results(failed)) == [1, 0, 1, 2]
    assert cuts("bench_covariance", results(timed), results(timed), results(timed, other), kill) == [0, 1, 0, 1]
    for path in folder.glob("*.cut"):
        path.unlink()
    tuning = folder / "tuning"
    state = {"conditions": {}, "entries": [{"shape": {"tokens": 1}, "impl": "triton", "config": {}}], "hopeless": []}
    texts = [json.dumps(state, indent=1), json.dumps({**state, "hopeless": [{"tokens": 2}]}, indent=1)]
    first, second = (f"mkdir -p {tuning}; echo '{text}' > {tuning}/op.sm90.json; {kill}" for text in texts)
    assert cuts("tune", kill, first, first, second, kill) == [1, 0, 1, 0, 1]


def test_tables_that_were_chosen_are_what_the_suites_measure(tmp_path, python, changed):
    """Also those that an earlier call chose, on a machine that has nothing of it but the folder."""
    changed()
    folder, shipped = tmp_path / "session", tmp_path / "lowrank_ops" / "ops" / "tuned"
    (tmp_path / "does-benchmarks.tune").write_text(f"mkdir -p {folder}/tuned; echo 1 > {folder}/tuned/op.sm90.json")
    (tmp_path / "does-benchmarks.bench_covariance").write_text(f"cat {shipped}/*.json > {tmp_path}/seen")
    assert session(folder, "tune", python=python).returncode == 0
    assert not shipped.exists()
    assert session(folder, "covariance", python=python).returncode == 0
    assert (tmp_path / "seen").read_text() == "1\n"


def test_what_is_graded_is_asked_first_and_all_the_rest_later(tmp_path, python):
    """In what was asked of the graded shapes nothing else is done; the tests are the same."""
    folder = tmp_path / "session"
    (tmp_path / "does-benchmarks.warm").write_text("sleep 1; echo compiled all; date +%s%N > $0.warmed")
    (tmp_path / "does-benchmarks.tune").write_text("date +%s%N > $0.tuned")
    first = session(folder, "--graded", *PARTS[1:], python=python)
    assert first.returncode == 0 and first.stdout.count("exit code 0: compiled all") == 1
    assert int(Path(f"{python}.warmed").read_text()) < int(Path(f"{python}.tuned").read_text())
    lines = {line.split()[1]: line for line in (tmp_path / "asked").read_text().splitlines()}
    modules = ["warm", "tune", "bench_covariance", "bench_lowrank_linear", "bench_model", "grade"]
    assert asked(tmp_path) == modules
    for module in modules[1:5]:
        assert "--graded --seconds 0." in lines[f"benchmarks.{module}"]
    left = int(lines["benchmarks.tune"].split("--budget ")[1].split()[0])
    assert 250 < left + 30 <= 342  # the rest is for the suites
    (folder / "1-tests.code").write_text("0")  # so that no wheel is needed
    assert session(folder, "--graded", python=python).returncode == 0 and asked(tmp_path) == ["grade"]
    assert session(folder, python=python).returncode == 0
    assert asked(tmp_path) == modules[1:]


def test_where_a_process_ends_before_its_time_another_goes_on(tmp_path, python):
    """As one does to which the device gives nothing more: while something comes of it, and the tuner once more."""
    tuning = tmp_path / "session" / "tuning"
    does = tmp_path / "does-benchmarks.tune"
    does.write_text("exit 3")
    session(tmp_path / "session", "--graded", "tune", python=python)
    assert asked(tmp_path) == ["warm", "tune", "tune"]
    further = f'[ "$(wc -l < {tuning}/op.json)" -lt 3 ] || exit 0; echo \'"tokens":\' >> {tuning}/op.json; exit 3'
    does.write_text(f"mkdir -p {tuning}; touch {tuning}/op.json; {further}")
    ended = session(tmp_path / "session", "tune", python=python)
    assert ended.returncode == 0 and asked(tmp_path) == ["tune"] * 4
    limits = [int(found) for found in re.findall("tune, at most ([0-9]+) s", ended.stdout)]
    assert len(limits) == 4 and limits == sorted(limits, reverse=True)


def test_warming_does_not_outlive_the_session(tmp_path, python):
    (tmp_path / "does-benchmarks.warm").write_text("echo $$ > $0.warming; exec sleep 60")
    (tmp_path / "does-pytest").write_text("sleep 1")
    session(tmp_path / "session", "--graded", "tests", "--wheel", tmp_path / "none.whl", python=python)
    process = int(Path(f"{python}.warming").read_text())
    end = time.monotonic() + 10
    while time.monotonic() < end and Path(f"/proc/{process}").exists():
        time.sleep(0.1)
    assert not Path(f"/proc/{process}").exists()


def test_tests_that_failed_wait_for_what_has_not_been_tried(tmp_path, python):
    folder = tmp_path / "session"
    folder.mkdir()
    (folder / "1-tests.code").write_text("1\n")
    ended = session(folder, "--graded", "--wheel", tmp_path / "none.whl", python=python)
    begun = [line.split()[1].strip(",") for line in ended.stdout.splitlines() if ", at most" in line]
    assert begun == ["tune", "covariance", "lowrank_linear", "model", "tests", "grade"]


def test_missed_targets_are_no_failure_of_the_session(tmp_path, python):
    (tmp_path / "code-benchmarks.grade").write_text("4")
    assert session(tmp_path / "session", "grade", python=python).returncode == 0
    (tmp_path / "code-benchmarks.grade").write_text("1")
    assert session(tmp_path / "session", "grade", python=python).returncode != 0


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """Puts a script in which something is another in the place of the session's."""

    def change(old="", new=""):
        text = SCRIPT.read_text()
        assert old in text
        other = tmp_path / "benchmarks" / "gpu_session.sh"
        other.parent.mkdir()
        other.write_text(text.replace(old, new))
        other.chmod(0o755)
        monkeypatch.setattr(sys.modules[__name__], "SCRIPT", other)

    return change


def test_it_ends_in_time(tmp_path, python, changed):
    changed("$((total - SECONDS))", "$((3 - SECONDS))")
    ended = session(tmp_path / "session", "covariance", "model", python=python)
    assert ended.returncode == 3 and ended.stdout.count("too few to begin") == 2 and asked(tmp_path) == []


def test_a_call_in_which_no_part_could_begin_is_refused(tmp_path, python):
    """It would ask to be called again, and so would every one after it."""
    for seconds in ("179", "soon"):
        refused = session(tmp_path / "session", "--seconds", seconds, "model", python=python)
        assert refused.returncode == 2 and "at least 180 seconds" in refused.stderr and asked(tmp_path) == []
    assert session(tmp_path / "session", "--seconds", "180", "model", python=python).returncode == 0


def test_a_folder_is_for_one_kind_of_gpu(tmp_path, python):
    """On machines that alternate, suites that start anew in every call would come to no end, and lose what they had."""
    folder = tmp_path / "session"
    for gpu, code in (("one", 0), ("one", 0), ("another", 2), ("one", 0)):
        (tmp_path / "gpu").write_text(gpu)
        ended = session(folder, "model", python=python)
        assert ended.returncode == code and asked(tmp_path) == ["bench_model"] * (code == 0)
        assert ("has results of one, which those of another would replace" in ended.stderr) == (code == 2)


def test_a_part_that_had_passed_and_is_cut_has_not_passed(tmp_path, python):
    folder, does = tmp_path / "session", tmp_path / "does-benchmarks.bench_model"
    (tmp_path / "session").mkdir()
    for number, part in enumerate(PARTS, 1):
        (folder / f"{number}-{part}.code").write_text("0\n")
    does.write_text("exit 3")
    assert session(folder, "model", python=python).returncode == 3
    does.unlink()
    asked(tmp_path)
    assert session(folder, python=python).returncode == 0  # what the call before asked for
    assert asked(tmp_path) == ["bench_model", "grade"]


def test_a_part_that_hangs_is_stopped(tmp_path, python, changed):
    changed("limit=$(left)", "limit=1")
    (tmp_path / "seconds-benchmarks.bench_covariance").write_text("60")
    ended = session(tmp_path / "session", "covariance", "model", python=python)
    assert ended.returncode == 3 and "covariance ended with exit code 124" in ended.stdout
    assert asked(tmp_path) == ["bench_covariance", "bench_model"]
    assert [path.stem for path in (tmp_path / "session").glob("*.code")] == ["5-model"]


def test_a_dry_run_needs_no_gpu(tmp_path):
    shown = session(tmp_path / "session", "--dry-run", "tests", "grade")
    assert shown.returncode == 0
    assert "would run" in shown.stdout and "not measured" in shown.stdout
    assert not list((tmp_path / "session").glob("*.code"))


def test_paths_are_the_callers_and_the_gpu_tests_get_the_time_that_is_left(tmp_path):
    script = Path(os.path.relpath(SCRIPT, tmp_path))
    arguments = ["here", "--wheel", "a.whl", "--seconds", "300", "--dry-run", "tests"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0 and (tmp_path / "here").is_dir()
    command, seconds = shown.stdout.partition("would run ")[2].splitlines()[0].rsplit(" ", 1)
    assert command == f"tests/gpu/from_wheel.sh {tmp_path / 'a.whl'}" and 200 < int(seconds) <= 285
    refused = subprocess.run([script, "--what"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "gpu_session.sh FOLDER" in refused.stderr


def test_what_the_script_asks_for_is_understood(tmp_path, python):
    """The stand-in takes any arguments; the programs themselves refuse those that they do not know."""
    session(tmp_path / "session", "--graded", *PARTS[1:5], python=python)
    for line in (tmp_path / "asked").read_text().splitlines():
        understood = subprocess.run([sys.executable, *line.split(), "--help"], cwd=ROOT, capture_output=True, text=True)
        _, module, *given = line.split()
        known = set(re.findall(r"--[a-z-]+", understood.stdout))
        missing = [name for name in given if name.startswith("--") and name not in known]
        assert understood.returncode == 0 and not missing, (module, missing)


def test_every_tuned_shape_is_counted_by_its_tokens():
    assert all("tokens" in shape for tuner in tuners.TUNERS.values() for shape in tuner.shapes())


def test_what_is_not_understood_is_refused(tmp_path):
    for arguments in (["--what"], ["nonsense"], ["--wheel"], ["model", "--seconds"]):
        refused = session(tmp_path, *arguments)
        assert refused.returncode == 2 and "gpu_session.sh FOLDER" in refused.stderr
