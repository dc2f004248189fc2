"""The configuration: nothing is ignored, and every mistake is one sentence."""

import signal
import subprocess
import sys
import time

import pytest
from omegaconf import OmegaConf
from small_runs import ROOT, SMALL, configure, small

import dreamer_utils as utils

# What a flip of each key that takes part in learning may look like.
FLIPS = [
    "seed=1", "env.task=swingup", "env.action_repeat=4", "env.time_limit=80",
    "collector.random_steps=120", "collector.train_every=80", "collector.total_steps=280",
    "collector.exploration_noise=0.5", "replay_buffer.batch_size=32",
    "replay_buffer.batch_length=6", "networks.state_dim=5", "networks.belief_dim=17",
    "networks.hidden_dim=17", "networks.min_std=0.2", "networks.action_std=4.0",
    "networks.action_mean_scale=3.0", "optimization.train_ratio=0.05", "optimization.pretrain=3",
    "optimization.horizon=5", "optimization.gamma=0.9", "optimization.lambda_=0.5",
    "optimization.kl_scale=2.0 optimization.free_nats=0", "optimization.free_nats=0",
    "optimization.predict_discount=true",
    "optimization.predict_discount=true optimization.discount_scale=1.0",
    "optimization.world_model_lr=1e-3", "optimization.actor_lr=1e-3",
    "optimization.value_lr=1e-3", "optimization.adam_eps=1e-3", "optimization.grad_clip=0.01",
    "optimization.autocast=bfloat16", "replay_buffer.capacity=80",
]  # fmt: skip


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return small(tmp_path_factory.mktemp("reference") / "run")


def test_the_same_seed_gives_the_same_weights_and_metrics(tmp_path, reference):
    weights, rows = small(tmp_path / "again")
    assert weights == reference[0]
    for row, other in zip(rows, reference[1], strict=True):
        same = {key for key in row if not key.startswith("throughput/")}
        assert {key: row[key] for key in same} == {key: other[key] for key in same}


@pytest.mark.parametrize("flip", FLIPS)
def test_flipping_a_learning_key_changes_what_is_learned(tmp_path, reference, flip):
    assert small(tmp_path / "flipped", *flip.split())[0] != reference[0]


def test_logging_and_evaluation_do_not_change_what_is_learned(tmp_path, reference):
    flips = ["eval.every=40", "eval.episodes=2", "logger.every=80", "name=other",
             "logger.mode=offline", "logger.project=other", "logger.progress=true"]  # fmt: skip
    assert small(tmp_path / "a", *flips)[0] == reference[0]
    assert small(tmp_path / "b", "eval.every=0")[0] == reference[0]


def test_every_key_is_read(tmp_path, monkeypatch):
    read = set()
    config = configure(*SMALL, f"run_dir={tmp_path / 'run'}", "env.from_pixels=true",
                       "logger.video=true", "logger.mode=offline",
                       "optimization.predict_discount=true")  # fmt: skip
    declared = {("", name) for name in vars(config)}
    for group, part in [("", config), *vars(config).items()]:
        if isinstance(part, str | int):
            continue
        declared |= {(group, name) for name in vars(part)}

        def spy(self, name, group=group):
            frame = sys._getframe(1)
            checks = frame.f_code.co_name in ("load_config", "check_combinations")
            if frame.f_code.co_filename.startswith(str(ROOT / "dreamer")) and not checks:
                read.add((group, name))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(type(part), "__getattribute__", spy)
    import dreamer

    dreamer.train(config)
    elsewhere = {("", "doctor"), ("checkpoint", "resume"), ("checkpoint", "overwrite"),
                 ("eval", "checkpoint"), ("eval", "video"), ("eval", "dream_from")}  # fmt: skip
    assert declared - read - elsewhere == set()  # these have tests of their own


def test_every_line_of_the_configuration_has_a_comment():
    lines = (ROOT / "config.yaml").read_text().split("hydra:\n")[0].splitlines()
    keys = [line for line in lines if ": " in line and not line.startswith(("#", "defaults"))]
    assert len(keys) > 40
    assert [line for line in keys if "#" not in line] == []


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("seed=-1", "seed=-1: give a number of at least 0"),
        ("optimization.gamma=1.5", "optimization.gamma=1.5"),
        ("optimization.world_model_lr=-1e-3", "above 0"),
        ("optimization.actor_lr=0", "above 0"),
        ("optimization.value_lr=nan", "optimization.value_lr=nan"),
        ("optimization.autocast=int8", "choose one of auto, false, true, bfloat16, float16"),
        ("env.backend=atari", "choose one of dm_control, gymnasium"),
        ("logger.mode=loud", "choose one of"),
        ("replay_buffer.batch_size=1001", "no multiple|must be a multiple"),
        ("replay_buffer.batch_length=1 replay_buffer.batch_size=10", "of at least 2"),
        ("replay_buffer.batch_length=500 env.time_limit=100", "longer than an episode"),
        ("replay_buffer.batch_size=0", "above 0"),
        ("env.action_repeat=3", "no multiple of action_repeat=3"),
        ("collector.random_steps=10", "raise it to 1000"),
        ("collector.random_steps=1000 env.n_parallel_envs=2", "raise it to 2000"),
        ("collector.total_steps=100", "ends before training starts"),
        ("replay_buffer.capacity=100", "cannot hold"),
        ("optimization.horizon=1", "of at least 2"),
        ("env.from_pixels=false logger.video=true", "a state vector makes none"),
    ],
)
def test_an_impossible_value_is_one_sentence(overrides, words):
    with pytest.raises(utils.UserError, match=words) as caught:
        configure(*overrides.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override, words",
    [
        ("sed=1", "Could not override 'sed'"),
        ("seed=abc", "could not be converted to Integer"),
        ("optimization.gamma=high", "could not be converted to Float"),
        ("seed=null", "seed"),
        ("replay_buffer.batch_size=1001", "error: replay_buffer.batch_size=1001"),
        ("env.name=carpole", "error: env.name=carpole: choose one of acrobot"),
        ("env.task=fly", "error: env.task=fly: choose one of run"),
        ("env.task=''", "error: env.task=: choose one of run"),
        ("device=tpu", "error: device=tpu"),
        ("run_dir=/dev/null/run", "error: Not a directory (/dev/null/run"),
    ],
)
def test_the_command_line_answers_without_a_traceback(tmp_path, override, words):
    command = [sys.executable, str(ROOT / "dreamer.py"), f"run_dir={tmp_path / 'run'}", override,
               "env.from_pixels=false"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(tmp_path, reference):
    small(tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(utils.UserError, match="holds a run: checkpoint.resume=true goes on"):
        small(tmp_path / "run", "checkpoint.resume=false")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    anew = "checkpoint.resume=false", "checkpoint.overwrite=true"
    assert small(tmp_path / "run", "seed=1", *anew)[0] != reference[0]
    assert small(tmp_path / "run", "seed=2", *anew)[0] != reference[0]
    assert (tmp_path / "run.old1" / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "run.old2" / "metrics.jsonl").exists()


def test_the_presets_change_only_what_they_list():
    base = OmegaConf.load(ROOT / "config.yaml")
    for preset in ROOT.glob("config_*.yaml"):
        for group, values in OmegaConf.to_container(OmegaConf.load(preset)).items():
            if isinstance(values, dict):
                assert [k for k, v in values.items() if base[group][k] == v] == [], preset
        assert configure(name=preset.stem) != configure()


def test_help_answers_at_once_and_lists_the_keys(tmp_path):
    command = [sys.executable, str(ROOT / "dreamer.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "train_ratio" in done.stdout
    assert ".venv" not in done.stdout and "site-packages" not in done.stdout


def test_ctrl_c_is_one_sentence(tmp_path):
    command = [sys.executable, str(ROOT / "dreamer.py"), f"run_dir={tmp_path / 'run'}", *SMALL,
               "collector.total_steps=10000", "logger.mode=offline"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "the same command goes on" in error and "Traceback" not in error
