"""The committed first rows can be compared with fresh ones, and a difference is said."""

import sys

import pytest

import first_rows
from common.files import read_jsonl

OURS = read_jsonl(first_rows.DEFAULT / "metrics.jsonl")


def test_the_committed_rows_are_those_of_the_committed_configuration():
    words = first_rows.overrides(first_rows.DEFAULT)
    assert {"env.name=cartpole", "env.task=swingup", "seed=0", "eval.episodes=1"} <= set(words)
    assert not [word for word in words if word.startswith(("run_dir", "collector.total_steps"))]
    assert [row["environment_steps"] for row in OURS] == [*range(1000, 7000, 1000)]
    assert OURS[-1]["updates"] == 200


@pytest.mark.parametrize("change", [0.0, 1e-12])
def test_one_changed_bit_is_found_and_named(monkeypatch, capsys, change):
    fresh = [dict(row) for row in OURS]
    fresh[-1]["world_model/loss"] += change
    monkeypatch.setattr(first_rows, "train", lambda *_: fresh)
    monkeypatch.setattr(sys, "argv", ["first_rows.py"])
    with pytest.raises(SystemExit) as end:
        first_rows.main()
    said = capsys.readouterr().out
    total = sum(map(len, OURS))
    assert end.value.code == bool(change)
    assert f"{total - bool(change)} of {total} numbers are the same to the last bit" in said
    assert ("the first difference: world_model/loss at step 6,000" in said) == bool(change)
