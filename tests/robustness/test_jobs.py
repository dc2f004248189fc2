"""Jobs around a run: evaluation, sweeps, the doctor, and a user who tidies up in between."""

import os
import subprocess
import sys

import pytest

import dreamer
import dreamer_utils as utils
from common.directory import RunDirectory
from fingerprint import fingerprint
from small_runs import ROOT, SMALL, configure, small

SHORT = ["collector.total_steps=160", "checkpoint.every=40", "eval.every=0", "name=one"]


def run_python(*words):
    """A Python process in which nothing has chosen an OpenGL yet."""
    env = os.environ | {"MUJOCO_GL": "", "PYTHONPATH": ".:tests", "WANDB_MODE": "disabled"}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True
    )


def test_evaluating_states_never_imports_opengl(tmp_path):
    small(tmp_path / "run", *SHORT)
    code = (
        "import sys, dreamer, dreamer_utils as utils; from small_runs import configure;"
        f"cfg = configure('eval.checkpoint={tmp_path / 'run'}', 'device=cpu');"
        "utils.evaluate_checkpoint(cfg, dreamer.make_agent, dreamer.make_evaluation);"
        "assert 'dm_control' in sys.modules;"
        "print([name for name in sys.modules if name.startswith(('OpenGL', 'glfw'))])"
    )
    done = run_python("-c", code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("order", ["false,true", "true,false"])
def test_one_process_runs_jobs_from_states_and_from_pixels(tmp_path, order):
    done = run_python(
        "dreamer.py",
        "-m",
        *SMALL,
        *SHORT,
        f"run_dir={tmp_path}/${{env.from_pixels}}",
        f"env.from_pixels={order}",
        f"hydra.sweep.dir={tmp_path}/sweep",
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    for name in ("False", "True"):
        assert '"state": "finished"' in (tmp_path / name / "run.json").read_text()


# The doctor


def doctor(capsys, *overrides):
    """Whether all is well, and what is said about each check."""
    cfg = configure(*SMALL, *overrides)
    fine = utils.Doctor(cfg, utils.make_env, dreamer.train).examine()
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    return fine, {name: (word, text) for word, name, text in lines}


def test_the_doctor_finds_everything_that_a_start_would_find(tmp_path, capsys, monkeypatch):
    """And never stops at the first."""
    monkeypatch.setitem(sys.modules, "pygame", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    file = tmp_path / "file"
    file.write_text("mine")
    flags = "env.backend=gymnasium", "env.name=Pendulum-v1", "env.task=''", "env.from_pixels=true"
    fine, said = doctor(
        capsys, *flags, f"run_dir={file}", "networks.hidden_dim=10000000", "logger.mode=offline"
    )
    found = {name for name, (word, _) in said.items() if word == "problem"}
    assert not fine and found >= {"memory", "task", "run_dir", "wandb"}
    assert "pygame" in said["task"][1] and "lower networks.*" in said["memory"][1]
    assert "pip install wandb" in said["wandb"][1]
    assert said["device"][0] == said["disk"][0] == "ok"
    assert list(tmp_path.iterdir()) == [file] and file.read_text() == "mine"


def test_the_doctor_knows_a_run_and_leaves_it_as_it_is(tmp_path, capsys):
    run = tmp_path / "run"
    small(run, *SHORT)
    before = fingerprint(run)
    fine, said = doctor(capsys, *SHORT, f"run_dir={run}")
    assert fine and "goes on" in said["run_dir"][1], said
    fine, said = doctor(capsys, *SHORT, f"run_dir={run}", "networks.belief_dim=20")
    assert not fine and "networks.belief_dim=16 (now 20)" in said["run_dir"][1]
    busy = RunDirectory(configure(*SMALL, *SHORT, f"run_dir={run}"))
    assert busy.find_run()
    fine, said = doctor(capsys, *SHORT, f"run_dir={run}")
    assert not fine and "in use by another process" in said["run_dir"][1]
    busy.unlock()
    assert fingerprint(run) == before and list(tmp_path.iterdir()) == [run]


def test_a_seed_out_of_range_is_one_sentence_for_the_doctor_too():
    with pytest.raises(utils.UserError, match="seed=4294967296: it should be less than"):
        configure("seed=4294967296", "doctor=true")


# What a user keeps beside the checkpoints


def test_links_and_hidden_files_of_the_user_stay(tmp_path):
    run, mine = tmp_path / "run", tmp_path / "mine"
    small(run, *SHORT)
    checkpoints = run / "checkpoints"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    newest = max(checkpoints.glob("checkpoint-*"))
    kept = {
        ".notes": lambda path: path.write_text("mine"),
        ".git": lambda path: (path.mkdir(), (path / "HEAD").write_text("mine")),
        ".checkpoint-notes": lambda path: path.write_text("mine"),
        ".checkpoint-drafts": lambda path: (path.mkdir(), (path / "a").write_text("mine")),
        "best": lambda path: path.symlink_to(newest.name),
        ".link": lambda path: path.symlink_to(mine),
        "broken": lambda path: path.symlink_to("nowhere"),
        "checkpoint-best.torchrl": lambda path: path.write_bytes(b"a copy of another run"),
    }
    for name, make in kept.items():
        make(checkpoints / name)
    left = [f".{newest.name}.{kind}-{'0a' * 16}" for kind in ("stage", "archive", "delete")]
    (checkpoints / left[0]).mkdir()
    (checkpoints / left[0] / "part").write_text("half")
    (checkpoints / left[1]).write_text("half")
    (checkpoints / left[2]).symlink_to(mine)
    small(run, *SHORT, "collector.total_steps=240")
    there = {path.name for path in checkpoints.iterdir()}
    assert there >= set(kept) and not there & set(left)
    assert (checkpoints / ".git" / "HEAD").read_text() == "mine"
    assert (checkpoints / ".checkpoint-drafts" / "a").read_text() == "mine"
    assert (mine / "notes").read_text() == "mine"
    assert (checkpoints / "best").is_symlink()


def test_a_copy_of_an_older_checkpoint_is_not_taken_for_the_newest(tmp_path):
    small(tmp_path / "whole", *SHORT)
    small(tmp_path / "whole", *SHORT, "collector.total_steps=240")
    run = tmp_path / "run"
    small(run, *SHORT)
    oldest = min((run / "checkpoints").glob("checkpoint-*"))
    (run / "checkpoints" / "checkpoint-best.torchrl").write_bytes(oldest.read_bytes())
    rows = (run / "metrics.jsonl").read_bytes()
    small(run, *SHORT, "collector.total_steps=240")
    assert (run / "metrics.jsonl").read_bytes().startswith(rows)
    (run / "checkpoints" / "checkpoint-best.torchrl").unlink()
    assert fingerprint(run) == fingerprint(tmp_path / "whole")


def test_checkpoints_may_lie_on_another_disk(tmp_path):
    small(tmp_path / "whole", *SHORT)
    small(tmp_path / "whole", *SHORT, "collector.total_steps=240")
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    small(run, *SHORT)
    (run / "checkpoints").rename(elsewhere)
    (run / "checkpoints").symlink_to(elsewhere)
    small(run, *SHORT, "collector.total_steps=240")
    assert (run / "checkpoints").is_symlink() and elsewhere.is_dir()
    assert fingerprint(run) == fingerprint(tmp_path / "whole")


def test_a_key_of_an_older_version_that_may_change_does_not_matter(tmp_path):
    run = tmp_path / "run"
    small(run, *SHORT)
    config = run / "config.yaml"
    text = config.read_text().replace("logger:\n", "logger:\n  colors: true\n")
    config.write_text(text.replace("  drop_damaged: false\n", "") + "networks_extra: 3\n")
    with pytest.raises(utils.UserError) as caught:
        small(run, *SHORT)
    assert "networks_extra=3" in str(caught.value)
    assert "colors" not in str(caught.value) and "drop_damaged" not in str(caught.value)


def test_in_a_file_the_error_stands_after_what_was_said_before(tmp_path):
    code = "from common.command_line import end_of_job; print('first'); raise end_of_job('last')"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "said").open("w") as said:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, stdout=said, stderr=said)
    assert (tmp_path / "said").read_text() == "first\nlast\n"
