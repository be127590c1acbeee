"""The trial cache: interrupted searches resume, and trials of other models are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.files import digest
from lowrank_ops.search.trial_cache import TrialCache
from tests.search.conftest import ParameterAccuracy


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))


@pytest.fixture(scope="module")
def covariances() -> lro.Covariances:
    torch.manual_seed(1)
    return lro.calibrate(make(), [torch.randn(300, 64)], sensitivity="output")


def search(
    accuracy: ParameterAccuracy, path: Path | None, covariances: lro.Covariances, model: nn.Module | None = None,
    max_drop: float = 30, **options: Any,
) -> lro.Ranks:  # fmt: skip
    return lro.search_ranks(make() if model is None else model, covariances, accuracy, max_drop, cache=path, **options)


def counter(fails_at: int | None = None) -> ParameterAccuracy:
    return ParameterAccuracy(make(), slope=100, fails_at=fails_at)


@pytest.mark.parametrize("by", ["budget", "layers"])
def test_an_interrupted_search_resumes(tmp_path: Path, covariances: lro.Covariances, by: str) -> None:
    path = tmp_path / "trials"
    plain, first, second, third = counter(), counter(fails_at=4), counter(), counter()
    expected = search(plain, tmp_path / "uninterrupted", covariances, by=by)
    with pytest.raises(RuntimeError, match="power cut"):
        search(first, path, covariances, by=by)
    assert search(second, path, covariances, by=by) == expected
    assert second.calls == plain.calls - 3
    assert search(third, path, covariances, by=by) == expected and third.calls == 0
    assert search(counter(), None, covariances, by=by) == expected


def test_another_tolerance_uses_the_same_trials(tmp_path: Path, covariances: lro.Covariances) -> None:
    path = tmp_path / "trials"
    search(counter(), path, covariances)
    other = counter()
    search(other, path, covariances, max_drop=25)
    assert other.calls < 10  # the dense model, at least, is known


def test_a_torn_line_is_dropped(tmp_path: Path, covariances: lro.Covariances) -> None:
    path = tmp_path / "trials"
    expected = search(counter(), path, covariances)
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:20])
    accuracy = counter()
    assert search(accuracy, path, covariances) == expected and accuracy.calls == 1
    assert path.read_text().splitlines() == whole


def test_trials_of_another_model_are_refused(tmp_path: Path, covariances: lro.Covariances) -> None:
    path = tmp_path / "trials"
    search(counter(), path, covariances)
    before, accuracy = path.read_text(), counter()
    other = make()
    other[0].weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"holds trials with another model; name another file, or delete this one"):
        search(accuracy, path, covariances, other)
    with pytest.raises(ValueError, match="holds trials with another covariances;"):
        search(accuracy, path, lro.calibrate(make(), [torch.randn(200, 64)], sensitivity="output"))
    with pytest.raises(ValueError, match="another projection, another centered;"):
        config = lro.CompressionConfig(projection="output", centered=False)
        search(accuracy, path, covariances, config=config)
    assert path.read_text() == before and accuracy.calls == 0


@pytest.mark.parametrize(
    "text",
    [
        "{}\n",
        "not JSON\n",
        "[1]\n",
        '{"format": "lowrank_ops.trials/9", "key": {}}\n',
        '{"format": "lowrank_ops.trials/1"}\n',
        '{"format": "lowrank_ops.trials/2", "key": {}}\n',
    ],
)
def test_other_files_are_not_changed(tmp_path: Path, covariances: lro.Covariances, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ValueError, match="is damaged or is not a trial cache; name another file"):
        search(counter(), path, covariances)
    assert path.read_text() == text


def test_an_empty_file_is_a_new_cache(tmp_path: Path, covariances: lro.Covariances) -> None:
    path = tmp_path / "trials"
    path.touch()
    expected, accuracy = search(counter(), path, covariances), counter()
    assert search(accuracy, path, covariances) == expected and accuracy.calls == 0


def test_a_bad_path_is_refused_before_the_first_trial(tmp_path: Path, covariances: lro.Covariances) -> None:
    accuracy = counter()
    with pytest.raises(ValueError, match="is in a folder that does not exist; create it first"):
        search(accuracy, tmp_path / "nowhere" / "trials", covariances)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        search(accuracy, tmp_path, covariances)
    assert accuracy.calls == 0


def test_lines_are_plain_json(tmp_path: Path) -> None:
    cache = TrialCache(tmp_path / "trials", {"model": "a"})
    measure = cache.cached(lambda ranks: 0.5)
    assert measure({"a": 8, "b": None}) == measure({"b": None, "a": 8}) == 0.5 and len(cache) == 1
    lines = [json.loads(line) for line in (tmp_path / "trials").read_text().splitlines()]
    assert lines[1].pop("sha256") and lines[1] == {"ranks": {"a": 8, "b": None}, "accuracy": 0.5}


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "trials"
    measure = TrialCache(path, {"model": "a"}).cached(lambda ranks: 0.8125)
    measure({"a": 4}), measure({"a": None, "b": 12})
    content = path.read_bytes()
    for position in range(content.rindex(b"}")):  # a torn last line is measured again
        changed = bytearray(content)
        changed[position] ^= 1 << position % 7
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="is damaged or is not a trial cache"):
            TrialCache(path, {"model": "a"})


def test_trials_of_version_1_are_read(tmp_path: Path) -> None:
    path = tmp_path / "trials"
    path.write_text('{"format": "lowrank_ops.trials/1", "key": {"model": "a"}}\n{"ranks": {"a": 8}, "accuracy": 0.5}\n')
    cache = TrialCache(path, {"model": "a"})
    assert len(cache) == 1
    cache.cached(lambda ranks: 0.25)({"a": 4})
    assert len(TrialCache(path, {"model": "a"})) == 2


def test_digests_depend_on_every_byte() -> None:
    plain = digest({"a": torch.zeros(2, 3)})
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3).bfloat16()},
        {"a": torch.eye(3)},
    ]
    assert plain == digest({"a": torch.zeros(3, 2).T}) and len({plain, *map(digest, others)}) == 5


@pytest.mark.parametrize(
    "trial",
    [
        '{"ranks": {"a": 8}, "accuracy": NaN}',
        '{"ranks": {"a": 8}, "accuracy": "0.5"}',
        '{"ranks": {"a": -8}, "accuracy": 0.5}',
        '{"ranks": {"a": true}, "accuracy": 0.5}',
        '{"ranks": [8], "accuracy": 0.5}',
        "[" * 100000 + "]" * 100000,
    ],
)
def test_trials_of_wrong_values_are_refused(tmp_path: Path, trial: str) -> None:
    path = tmp_path / "trials"
    path.write_text('{"format": "lowrank_ops.trials/1", "key": {}}\n' + trial + "\n")  # has no checksums
    with pytest.raises(ValueError, match="is not a trial cache"):
        TrialCache(path, {})


def test_a_cache_that_a_kill_cut_anywhere_resumes(tmp_path: Path) -> None:
    path = tmp_path / "trials"
    measure = TrialCache(path, {"model": "a"}).cached(lambda ranks: 0.5)
    measure({"a": 4}), measure({"a": 8})
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        cache = TrialCache(path, {"model": "a"})
        assert len(cache) == max(content[:end].count(b"\n") - 1, 0)
        cache.cached(lambda ranks: 0.5)({"a": 8})
        assert len(TrialCache(path, {"model": "a"})) == len(cache)
