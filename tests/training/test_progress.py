"""What the screen says while a run goes on."""

import re
from types import SimpleNamespace

import pytest

import common.progress
from common.logger import Logger
from common.progress import Progress, duration
from small_runs import SMALL, configure, small


def test_the_bar_says_what_the_run_is_doing(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(common.progress, "REFRESH_SECONDS", 0)
    small(tmp_path, "logger.progress=true", "optimization.pretrain=5")
    said = capfd.readouterr().err
    phases = re.findall(r"\r([^\r:]+): +\d+%", said)
    assert list(dict.fromkeys(phases)) == [
        "seed episodes",
        "first 5 updates",
        "training",
        "evaluation",
    ]
    counts = [int(count) for count in re.findall(r"(\d+) updates, return", said)]
    assert set(counts) >= set(range(1, 10)), "every update moves the bar"
    assert " to go" in said


def progress(**seconds):
    """Of a run that went on at step 1,000,000 and has done 1,000 more."""
    run = Progress(configure("eval.every=10000", "logger.progress=false"), 1_000_000, 99_600)
    run.seconds = seconds
    run.step, run.updates = 1_001_000, 99_700
    return run


def test_the_time_to_go_is_that_of_this_process():
    run = progress(collect=10.0, update=200.0)
    assert run.seconds_to_go() == pytest.approx(3_999_000 * (10 / 1000 + 200 / 1000))
    run.end("evaluate", 20.0)
    assert run.seconds_to_go() == pytest.approx(3_999_000 * (0.21 + 20 / 10_000))
    fresh = Progress(configure("logger.progress=false"), 1_000_000, 99_600)
    assert fresh.seconds_to_go() is None


def test_the_time_to_go_counts_the_updates_that_are_under_way(monkeypatch):
    now = 50.0
    monkeypatch.setattr(common.progress.time, "monotonic", lambda: now)
    run = Progress(configure("eval.every=0", "logger.progress=false"), 0, 0)
    run.seconds, run.step, run.updates = {"collect": 20.0}, 5_000, 40
    run.begin("update")
    now += 80  # 2 s for each of these 40; 60 first ones are left, and 0.1 for every step
    assert run.seconds_to_go() == pytest.approx(4_995_000 * (0.004 + 0.1 * 2) + 60 * 2)


def test_durations_are_said_as_a_person_would():
    assert [duration(seconds) for seconds in (4, 89, 150, 5399, 5400, 100_000)] == [
        "a minute",
        "a minute",
        "2 minutes",
        "90 minutes",
        "1.5 hours",
        "27.8 hours",
    ]


@pytest.mark.parametrize(
    ("words", "hint"), [([], True), (["replay_buffer.batch_size=400"], False)]
)
def test_only_a_run_of_the_papers_size_hears_of_a_smaller_one(words, hint):
    cfg = configure(*words)
    said = []
    run = SimpleNamespace(
        cfg=cfg, progress=SimpleNamespace(seconds_to_go=lambda: 9000.0), say=said.append
    )
    Logger.say_estimate(run)
    assert said[0].startswith("about 2.5 hours to go on this CPU")
    assert ("a smaller run" in said[0]) == hint


def test_a_run_without_an_evaluation_does_not_offer_to_plot_it(tmp_path, capfd):
    small(tmp_path / "without", "eval.every=0")
    assert "plot:" not in capfd.readouterr().out
    small(tmp_path / "with", *SMALL)
    assert "plot:" in capfd.readouterr().out
