"""``benchmarks/features.py``: what a feature costs is its time over the plain picture's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade_rt import RequestError
from scripts import load_script


def test_a_cost_is_a_ratio_within_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    features = load_script("features", "benchmarks")
    monkeypatch.setattr(features, "SETTLE", 0)
    calls: list[str] = []

    def sleeper(name: str, seconds: float) -> Callable[[], None]:
        def made() -> None:
            calls.append(name)
            time.sleep(seconds)

        return made

    def fails() -> None:
        raise RequestError("no such filter")

    made = {features.PLAIN: sleeper("plain", 0.01), "twice": sleeper("twice", 0.03), "absent": fails}
    plain, twice, absent = features.measure(made, 3, quiet=True)
    assert [row["what"] for row in (plain, twice, absent)] == list(made)
    assert plain["median_ratio"] == 1
    assert 1.5 < twice["median_ratio"] < 3.5
    assert twice["p10_ratio"] <= twice["median_ratio"] <= twice["p90_ratio"]
    assert (plain["repeats"], twice["repeats"], absent["repeats"]) == (3, 3, 0)
    assert absent["skipped"] == "no such filter"
    assert absent["median_s"] is None, "what was not measured is null"
    assert len(calls) == 10, "two turns are not counted"
    assert calls[:2] != calls[2:4] or calls[2:4] != calls[4:6], "the order moves on"


@pytest.mark.slow
def test_every_feature_of_the_shipped_cascade_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    features, tables = load_script("features", "benchmarks"), load_script("tables", "benchmarks")
    pytest.importorskip("cv2")
    assert (
        features.main(
            ["--repeat", "1", "--quiet", "--threads", "1", "--steps", "2", "1", "--json", str(tmp_path / "r.json")]
        )
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "r.json").read_text())
    made = tables.feature_table(result)
    for row in result["rows"]:
        assert f"| {row['what']} | " in made
        assert row["median_s"] > 0
