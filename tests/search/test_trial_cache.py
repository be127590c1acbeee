"""Searches that go on where they were, and refuse trials that are not theirs."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.search.trial_cache import Journal, digest


class Judge:
    """Accuracy that falls with the parameters taken away; fails at a given call."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("power cut")
        return sum(p.numel() for p in model.parameters()) / 1e4


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64))


@pytest.fixture(scope="module")
def covariances() -> lro.Covariances:
    torch.manual_seed(1)
    return lro.calibrate(make(), [torch.randn(300, 64)], sensitivity="output")


def search(judge: Judge, path: Path | None, covariances: lro.Covariances, model: nn.Module | None = None, **options):
    model = make() if model is None else model
    policy = lro.AccuracyGuided(judge, 0.5, journal=path, **options)
    return lro.compress_(model, covariances, lro.CompressionConfig(policy, projection="loss")).config


@pytest.mark.parametrize("kind", ["budget", "layers"])
def test_an_interrupted_search_goes_on(tmp_path: Path, covariances, kind: str) -> None:
    path = tmp_path / "trials"
    plain, first, second, third = Judge(), Judge(fails_at=4), Judge(), Judge()
    expected = search(plain, tmp_path / "uninterrupted", covariances, search=kind)
    with pytest.raises(RuntimeError, match="power cut"):
        search(first, path, covariances, search=kind)
    assert search(second, path, covariances, search=kind) == expected
    assert second.calls == plain.calls - 3
    assert search(third, path, covariances, search=kind) == expected and third.calls == 0
    assert search(Judge(), None, covariances, search=kind) == expected


def test_a_search_with_another_tolerance_uses_the_trials(tmp_path: Path, covariances) -> None:
    path = tmp_path / "trials"
    search(Judge(), path, covariances)
    other = Judge()
    lro.compress_(
        make(), covariances, lro.CompressionConfig(lro.AccuracyGuided(other, 0.4, journal=path), projection="loss")
    )
    assert other.calls < 10  # the dense model, at least, is known


def test_a_torn_line_is_dropped(tmp_path: Path, covariances) -> None:
    path = tmp_path / "trials"
    expected = search(Judge(), path, covariances)
    whole = path.read_text().splitlines()
    path.write_text("\n".join(whole[:-1]) + "\n" + whole[-1][:20])
    judge = Judge()
    assert search(judge, path, covariances) == expected and judge.calls == 1
    assert path.read_text().splitlines() == whole


def test_trials_of_something_else_are_refused(tmp_path: Path, covariances) -> None:
    path = tmp_path / "trials"
    search(Judge(), path, covariances)
    before, judge = path.read_text(), Judge()
    other = make()
    other[0].weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"holds trials with another model; name another file, or delete this one"):
        search(judge, path, covariances, other)
    with pytest.raises(ValueError, match="holds trials with another covariances;"):
        search(judge, path, lro.calibrate(make(), [torch.randn(200, 64)], sensitivity="output"))
    with pytest.raises(ValueError, match="another projection, another centered;"):
        config = lro.CompressionConfig(lro.AccuracyGuided(judge, 1, journal=path), "output", centered=False)
        lro.compress_(make(), covariances, config)
    assert path.read_text() == before and judge.calls == 0


@pytest.mark.parametrize(
    "text",
    [
        "{}\n",
        "not JSON\n",
        "[1]\n",
        '{"format": "lowrank_ops.trials/9", "key": {}}\n',
        '{"format": "lowrank_ops.trials/1"}\n',
    ],
)
def test_other_files_are_left_alone(tmp_path: Path, covariances, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ValueError, match="is no file of trials; name another one"):
        search(Judge(), path, covariances)
    assert path.read_text() == text


def test_an_empty_file_is_a_new_journal(tmp_path: Path, covariances) -> None:
    path = tmp_path / "trials"
    path.touch()
    expected, judge = search(Judge(), path, covariances), Judge()
    assert search(judge, path, covariances) == expected and judge.calls == 0


def test_a_path_that_cannot_be_written_is_refused_before_the_first_trial(tmp_path: Path, covariances) -> None:
    judge = Judge()
    with pytest.raises(ValueError, match="is in a folder that does not exist; make it first"):
        search(judge, tmp_path / "nowhere" / "trials", covariances)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        search(judge, tmp_path, covariances)
    assert judge.calls == 0


def test_lines_are_plain_json(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "trials", {"model": "a"})
    measure = journal.remembering(lambda ranks: 0.5)
    assert measure({"a": 8, "b": None}) == measure({"b": None, "a": 8}) == 0.5 and len(journal) == 1
    lines = [json.loads(line) for line in (tmp_path / "trials").read_text().splitlines()]
    assert lines[1] == {"ranks": {"a": 8, "b": None}, "accuracy": 0.5}


def test_digests_see_every_byte() -> None:
    plain = digest({"a": torch.zeros(2, 3)})
    others = [
        {"b": torch.zeros(2, 3)},
        {"a": torch.zeros(3, 2)},
        {"a": torch.zeros(2, 3).bfloat16()},
        {"a": torch.eye(3)},
    ]
    assert plain == digest({"a": torch.zeros(3, 2).T}) and len({plain, *map(digest, others)}) == 5


def test_a_journal_is_a_path() -> None:
    with pytest.raises(TypeError, match="journal must be the path of a file, or None; got 3"):
        lro.AccuracyGuided(len, 1, journal=3)
