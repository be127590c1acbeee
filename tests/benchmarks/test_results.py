"""Rows of studies: stored, and found again."""

from pathlib import Path

import pytest

from benchmarks.accuracy import budgets, calibration_size, text, vision
from benchmarks.accuracy.results import Results, uses_token_weights

STORED = Path(budgets.__file__).parents[1] / "results"


def test_rows_are_found_in_a_later_run(tmp_path: Path) -> None:
    Results(tmp_path / "rows.json").add({"budget": 50.0, "token_weights": True}, {"accuracy": 80.0})
    results = Results(tmp_path / "rows.json")
    assert results.find({"budget": 50.0}) == {"budget": 50.0, "token_weights": True, "accuracy": 80.0}
    assert results.find({"budget": 25.0}) is None


def test_stored_vision_rows_fill_the_default_table(capsys: pytest.CaptureFixture[str]) -> None:
    vision.main(["--tables", "--budgets", "25"])
    assert "not measured" not in capsys.readouterr().out


def test_stored_calibration_sizes_fill_the_default_table(capsys: pytest.CaptureFixture[str]) -> None:
    calibration_size.main(["--tables", "--sizes", "60", "600"])
    assert "not measured" not in capsys.readouterr().out


def test_stored_budgets_were_met() -> None:
    rows = Results(STORED / "budgets.json").rows
    assert all(map(budgets._met, rows)) and {row["budget"] for row in rows} == {"parameters", "MACs", "latency"}


def test_stored_text_rows_are_of_known_variants() -> None:
    assert {row["variant"] for row in Results(STORED / "text.json").rows} <= set(text.VARIANTS)


def test_only_loss_aware_rows_use_token_weights() -> None:
    assert uses_token_weights("loss", "uniform", True) and uses_token_weights("output", "loss", True)
    assert not uses_token_weights("output", "uniform", True) and not uses_token_weights("loss", "loss", False)
