"""What a run says of itself: panel, curves, card, summary, and the dashboard's own file."""

import json
import re
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from common.dashboard import Dashboard
from common.plots import published_curve
from common.report import run_metadata
from small_runs import ROOT, SMALL, configure, run_command, small
from watched_run import WATCHED

# Panel, curves and card ------------------------------------------------------------------------


def test_the_panel_is_a_picture_with_something_on_it(watched):
    picture = imread(watched[0] / "panel.png")[..., :3]
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    assert (picture.reshape(-1, 3).std(1) > 0.05).sum() > 2000  # colored lines


def test_diagnostics_are_measured_at_every_evaluation(watched):
    run, _, rows = watched
    curves = [json.loads(line) for line in (run / "curves.jsonl").read_text().splitlines()]
    assert [row["environment_steps"] for row in curves] == [80, 160, 240]
    assert len(curves[-1]["observation_error"]) == len(curves[-1]["reward_error"]) == 16
    assert len(curves[-1]["return"]) == 2
    evaluated = [row for row in rows if "eval/return" in row]
    wanted = {
        "world_model/open_loop_observation_error",
        "world_model/open_loop_reward_error",
        "world_model/open_loop_copied_observation",
        "world_model/open_loop_copied_reward",
        "behavior/return_gap",
        "behavior/value_bias",
        "behavior/action_saturation",
        "world_model/kl_at_floor",
    }
    assert len(evaluated) == 3 and all(wanted <= set(row) for row in evaluated)
    for row, curve in zip(evaluated, curves, strict=True):
        for name in ("observation_error", "reward_error"):
            mean = row[f"world_model/open_loop_{name}"]
            assert mean == pytest.approx(np.mean(curve[name]), rel=1e-3)


def test_the_published_curve_at_the_same_steps():
    cfg = configure("env.name=ball_in_cup", "env.task=catch")
    curve = published_curve(cfg.env)
    assert curve[0, 0] == 5000 and (curve[:, 2] <= curve[:, 1]).all()
    assert (curve[:, 1] <= curve[:, 3]).all()
    assert published_curve(configure("env.name=dog", "env.task=run").env) is None


def test_the_card_has_the_run_in_numbers(watched):
    run, _, rows = watched
    card = json.loads((run / "run.json").read_text())
    assert (card["state"], card["environment_steps"], card["updates"]) == ("finished", 240, 6)
    assert card["eval_return"] == rows[-1]["eval/return"] and card["eval_steps"] == 240
    returns = [row["eval/return"] for row in rows if "eval/return" in row]
    assert card["last_returns_mean"] == pytest.approx(np.mean(returns))
    assert card["last_returns_std"] == pytest.approx(np.std(returns))
    assert re.fullmatch(r"[0-9a-f]{12}", card["config_hash"])
    assert card["versions"]["torch"] and card["device"].startswith("cpu")
    assert card["wall_seconds"] > 0 and card["updates_per_second"] > 0
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{40}", card["git_revision"])


def test_the_hash_of_a_configuration_knows_what_matters():
    def hashed(*overrides):
        cfg = configure(*SMALL, *overrides)
        return run_metadata(cfg, torch.device("cpu"), torch.float32)["config_hash"]

    assert hashed() == hashed("logger.every=7") != hashed("optimization.gamma=0.9")


def test_the_summary_names_the_way_on(watched, capsys):
    small(watched[0], *WATCHED)
    said = capsys.readouterr().out
    assert "finished at 240 environment steps and 6 updates" in said
    assert f"eval.checkpoint={watched[0]} eval.episodes=10" in said
    assert f"benchmarks/plot.py {watched[0]}" in said


# Dashboard -------------------------------------------------------------------------------------


def records(path):
    """The records of a .wandb file.

    They lie in blocks of 32 KiB, in pieces that may go on in the next block; 7 bytes before each
    piece say checksum, length and kind.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield Record.FromString(record)
            record = b""


def key_of(item):
    """The dotted key of an entry of the history or the configuration."""
    return item.key or ".".join(item.nested_key)


def test_the_dashboard_has_what_the_file_says(watched):
    """Read from the file that wandb sends: history, configuration, definition of the x axis."""
    run, _, rows = watched
    path = min(run.glob("wandb/offline-run-*/*.wandb"))
    everything = [(record.WhichOneof("record_type"), record) for record in records(path)]

    history = [
        {key_of(item): json.loads(item.value_json) for item in record.history.item}
        for kind, record in everything
        if kind == "history"
    ]
    for row in rows:
        step = row["environment_steps"]
        (shown,) = [h for h in history if h.get("environment_steps") == step and "updates" in h]
        for key, value in row.items():
            assert shown[key] == pytest.approx(value, nan_ok=True), key
    sections = {key.split("/")[0] for row in history for key in row if "/" in key}
    assert sections == {"eval", "train", "world_model", "behavior", "throughput"}

    media = {
        key.removesuffix("._type"): value
        for row in history
        for key, value in row.items()
        if key.endswith("._type")
    }
    assert media == {
        "eval/panel": "image-file",
        "eval/dream": "video-file",
        "eval/open_loop": "video-file",
        "eval/evaluation_1": "video-file",
        "eval/evaluation_2": "video-file",
    }

    shown_at = {
        key.removesuffix("._type"): [h["environment_steps"] for h in history if key in h]
        for key in (f"{name}._type" for name in media)
    }
    assert set(map(tuple, shown_at.values())) == {(80, 160, 240)}
    for row in history:
        if path := row.get("eval/dream.path"):
            film = next((run / "wandb").glob(f"offline-run-*/files/{path}")).read_bytes()
            own = run / "videos" / f"dream_{row['environment_steps']:09d}.mp4"
            assert film == own.read_bytes(), "a film is shown at the step that it shows"

    metrics = [record.metric for kind, record in everything if kind == "metric"]
    assert any(m.glob_name == "*" and m.step_metric == "environment_steps" for m in metrics)
    [returns] = [metric for metric in metrics if metric.name == "eval/return"]
    assert returns.summary.max and returns.summary.last
    [started] = [record.run for kind, record in everything if kind == "run"]
    assert started.run_group == started.display_name.replace("-seed0", "")
    assert list(started.tags) == ["cartpole-balance", "paper"]

    config = {}
    for kind, record in everything:
        updates = {"run": record.run.config.update, "config": record.config.update}.get(kind, ())
        config |= {key_of(update): json.loads(update.value_json) for update in updates}
    assert config["seed"] == 0 and config["env"]["name"] == "cartpole"
    assert config["run"]["versions"]["torch"] and "git_revision" in config["run"]


def test_the_variables_of_wandb_reach_the_dashboard(tmp_path, monkeypatch):
    given = {"ENTITY": "a-team", "RUN_GROUP": "a-group", "TAGS": "one,two", "NOTES": "a note"}
    for name, value in given.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    # In a process of its own: wandb reads some of them once.
    words = f"run_dir={tmp_path / 'run'}", "logger.mode=offline", "eval.every=0"
    assert run_command(*SMALL, *words).returncode == 0
    path = min((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
    [run] = [each.run for each in records(path) if each.WhichOneof("record_type") == "run"]
    assert (run.entity, run.run_group, run.notes) == ("a-team", "a-group", "a note")
    assert list(run.tags) == ["one", "two"]


def test_the_last_checkpoint_is_an_artifact_if_asked(tmp_path):
    run = tmp_path / "run"
    small(run, "logger.mode=offline", "logger.artifact=true", "eval.every=0")
    path = min(run.glob("wandb/offline-run-*/*.wandb"))
    found = [r.request.log_artifact.artifact for r in records(path) if "request" in str(r)[:9]]
    found += [r.artifact for r in records(path) if r.WhichOneof("record_type") == "artifact"]
    names = {entry.path for artifact in found for entry in artifact.manifest.contents}
    assert names == {"checkpoint-000000000240.torchrl"}


def test_one_chart_has_our_returns_and_the_published_points(monkeypatch):
    cfg = configure("task=cartpole-balance")
    logged = []
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)))
    dashboard = Dashboard.__new__(Dashboard)
    dashboard.run, dashboard.step, dashboard.published = run, 110_000, published_curve(cfg.env)
    history = [
        {"environment_steps": 10_000, "eval/return": 136.0},
        {"environment_steps": 11_000},
        {"environment_steps": 110_000, "eval/return": 500.0},
    ]
    dashboard.log_returns(history)
    [(values, step)] = logged
    assert (values["environment_steps"], step) == (110_000, 110_001)
    rows = values["eval/return_and_published"].table.data
    lines = {key: [(x, y) for x, name, y in rows if name == key] for _, key, _ in rows}
    assert lines["ours"] == [(10_000, 136.0), (110_000, 500.0)]
    assert [x for x, _ in lines["published mean"]] == [5000, 105_000]
    dashboard.published = None
    dashboard.log_returns(history)
    assert len(logged) == 1
