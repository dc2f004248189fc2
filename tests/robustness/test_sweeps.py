"""Sweeps: every job has a directory of its own, none ends another, all go on by one word."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from hydra import compose, initialize
from wandb.sdk.launch.sweeps import utils as wandb_sweeps

import dreamer_utils as utils
from common import command_line
from fingerprint import fingerprint
from small_runs import ROOT, SMALL, configure, small

SHORT = ["collector.total_steps=160", "checkpoint.every=40", "eval.every=0"]
WITHOUT_TASK = [word for word in SMALL if not word.startswith(("env.name", "env.task"))]


def python(*words):
    """`python dreamer.py WORDS...`."""
    command = [sys.executable, "dreamer.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment())


def environment():
    """That of a user who has chosen nothing."""
    return os.environ | {"MUJOCO_GL": "", "WANDB_MODE": "disabled"}


def sweep(folder, *words):
    """A sweep of small runs, each in the directory `folder/NAME`."""
    places = [f"run_dir={folder}/${{name}}", f"hydra.sweep.dir={folder}"]
    return python("-m", *WITHOUT_TASK, *SHORT, *places, *words)


def cards(folder):
    """The run cards under a folder, by the name of the run."""
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/run.json")}


def test_a_job_that_fails_does_not_end_the_others(tmp_path):
    done = sweep(tmp_path, "task=cartpole-balance,cartpole-fly,pendulum-swingup")
    assert done.returncode == 1
    assert "error: env.task=fly: choose one of balance" in done.stderr
    assert "Traceback" not in done.stderr
    assert {card["task"] for card in cards(tmp_path).values()} == {
        "cartpole balance",
        "pendulum swingup",
    }
    assert {card["state"] for card in cards(tmp_path).values()} == {"finished"}


def test_runs_at_once_on_one_machine_learn_what_each_learns_alone(tmp_path):
    words = ["seed=0,1", "optimization.horizon=3,4", "task=cartpole-balance"]
    done = sweep(tmp_path / "sweep", *words, "hydra/launcher=box")
    assert done.returncode == 0, done.stderr
    runs = cards(tmp_path / "sweep")
    assert len(runs) == 4 and len({card["config_hash"] for card in runs.values()}) == 4
    for name, card in runs.items():
        saved = yaml.safe_load((tmp_path / "sweep" / name / "config.yaml").read_text())
        alone = tmp_path / name
        small(
            alone,
            *SHORT,
            f"seed={card['seed']}",
            f"optimization.horizon={saved['optimization']['horizon']}",
        )
        assert fingerprint(alone) == fingerprint(tmp_path / "sweep" / name)


def named(monkeypatch, *words, name="config"):
    """The name of the run that a command line starts."""
    typed = dict(word.split("=", 1) for word in words)
    monkeypatch.setattr(command_line, "typed_overrides", lambda: typed)
    return configure(*words, name=name).name


def test_names_hold_what_is_learned_and_nothing_else(monkeypatch):
    name = named(monkeypatch, "task=walker-walk", "seed=2", "optimization.horizon=3")
    assert name == "walker-walk-seed2-horizon3"
    words = "optimization.kl_scale=0.5", "networks.channels=16", "logger.every=500", "device=cpu"
    assert named(monkeypatch, *words) == "cheetah-run-seed0-channels16-kl_scale0.5"
    assert named(monkeypatch, "seed=1", name="config_laptop") == "laptop-cartpole-balance-seed1"
    gymnasium = "env.backend=gymnasium", "env.name=my_module:MyEnv-v0", "env.task="
    assert named(monkeypatch, *gymnasium) == "my_module_MyEnv-v0-seed0-backendgymnasium"


def test_no_two_jobs_of_a_sweep_share_a_name(monkeypatch):
    """Also where the changes are too many to be spelled out."""
    keys = [
        "optimization.horizon=",
        "optimization.kl_scale=",
        "networks.hidden_dim=",
        "networks.belief_dim=",
        "replay_buffer.batch_length=",
        "seed=",
    ]
    names = set()
    for values in itertools.product((10, 20), repeat=len(keys)):
        words = (f"{key}{value}" for key, value in zip(keys, values))
        names.add(named(monkeypatch, *words, "replay_buffer.batch_size=100"))
    assert len(names) == 2 ** len(keys)
    assert max(map(len, names)) < 100


@pytest.mark.parametrize(
    ("words", "name", "task"),
    [
        (["task=walker-walk"], "walker", "walk"),
        (["task=ball_in_cup-catch"], "ball_in_cup", "catch"),
        (["env.name=walker", "env.task=walk"], "walker", "walk"),
        (["env.backend=gymnasium", "task=HalfCheetah-v5"], "HalfCheetah-v5", ""),
    ],
)
def test_the_task_may_be_given_in_one_word_or_in_two(words, name, task):
    cfg = configure(*words)
    assert (cfg.env.name, cfg.env.task) == (name, task)
    assert cfg.task == f"{name}-{task}".strip("-")


def test_a_task_in_one_word_beside_one_in_two_is_refused(monkeypatch):
    with pytest.raises(utils.UserError, match="task=walker-walk and env.name=cheetah: give one"):
        named(monkeypatch, "task=walker-walk", "env.name=cheetah")


# resume=


def test_resume_goes_on_with_the_runs_own_configuration(tmp_path):
    """The hint that a run prints is typed as it stands, for a directory with an awkward name."""
    whole, run = tmp_path / "whole", tmp_path / "it's a run, half=done"
    small(whole, *SHORT)
    small(whole, *SHORT, "collector.total_steps=320")
    done = python(*SMALL, *SHORT, f"run_dir={tmp_path / 'half'}")
    (tmp_path / "half").rename(run)
    done = python(f"resume='{str(run).replace(chr(39), chr(92) + chr(39))}'")
    assert done.returncode == 0, done.stderr
    [hint] = [line for line in done.stdout.splitlines() if line.startswith("go on:")]
    command = hint.removeprefix("go on:").strip().replace("python", sys.executable, 1)
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert fingerprint(run) == fingerprint(whole)


def test_resume_says_what_cannot_be(tmp_path):
    run = tmp_path / "run"
    small(run, *SHORT)
    before = fingerprint(run)
    refused = {
        (f"resume={run}", "optimization.horizon=9"): "holds a run with optimization.horizon=4",
        (f"resume={run}", "task=walker-walk"): "holds a run with env.name=cartpole (now walker)",
        (f"resume={run}", f"run_dir={tmp_path}"): "already says run_dir",
        (f"resume={run}", f"eval.checkpoint={run}"): "give one of them",
        (f"resume={tmp_path}",): "holds no run",
    }
    for words, reason in refused.items():
        done = python(*words)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
        assert reason in done.stderr
    assert fingerprint(run) == before


# Clusters and wandb


def test_a_slurm_job_asks_for_what_it_needs_and_may_queue_again():
    utils.register_configs()
    with initialize(config_path=None, version_base="1.3"):
        words = ["hydra/launcher=slurm"]
        cfg = compose("config", overrides=words, return_hydra_config=True)
    launcher = cfg.hydra.launcher
    assert launcher._target_.endswith("SlurmLauncher")
    assert launcher.gpus_per_node == 1 and launcher.cpus_per_task > 1 and launcher.mem_gb > 4
    assert launcher.max_num_timeout > 10 and launcher.signal_delay_s >= 60


def test_the_command_of_the_wandb_sweep_is_one(monkeypatch):
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    assert shutil.which("env") and (ROOT / sweep["program"]).exists()
    given = {key: {"value": values["values"][-1]} for key, values in sweep["parameters"].items()}
    arguments = wandb_sweeps.create_sweep_command_args({"args": given})["args_no_hyphens"]
    assert sweep["command"][:3] == ["${env}", "python", "${program}"]
    assert sweep["command"][-1] == "${args_no_hyphens}"
    cfg = configure(*sweep["command"][3:-1], *arguments)
    assert (cfg.env.name, cfg.env.task, cfg.seed) == ("walker", "walk", 2)
    assert cfg.logger.mode == "online"
