"""The configuration: nothing is ignored, and every mistake is one sentence."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize
from omegaconf import OmegaConf

import dreamer
import dreamer_utils as utils
from common.config import Config, Section
from common.keys import flatten
from small_runs import ROOT, SMALL, configure, small, start

# What a flip of each key that takes part in learning may look like.
FLIPS = [
    "seed=1",
    "env.task=swingup",
    "env.action_repeat=4",
    "env.time_limit=80",
    "collector.random_steps=120",
    "collector.train_every=80",
    "collector.total_steps=280",
    "collector.exploration_noise=0.5",
    "replay_buffer.batch_size=32",
    "replay_buffer.batch_length=6",
    "networks.state_dim=5",
    "networks.belief_dim=17",
    "networks.hidden_dim=17",
    "networks.min_std=0.2",
    "networks.action_std=4.0",
    "networks.action_mean_scale=3.0",
    "optimization.train_ratio=0.05",
    "optimization.pretrain=3",
    "optimization.horizon=5",
    "optimization.gamma=0.9",
    "optimization.lambda_=0.5",
    "optimization.kl_scale=2.0 optimization.free_nats=0",
    "optimization.free_nats=0",
    "optimization.predict_discount=true",
    "optimization.predict_discount=true optimization.discount_scale=1.0",
    "optimization.world_model_lr=1e-3",
    "optimization.actor_lr=1e-3",
    "optimization.value_lr=1e-3",
    "optimization.adam_eps=1e-3",
    "optimization.grad_clip=0.01",
    "optimization.autocast=bfloat16",
    "replay_buffer.capacity=80",
]


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
    flips = "eval.every=40 eval.episodes=2 logger.every=80 logger.mode=offline".split()
    flips += "name=other logger.project=other logger.progress=true".split()
    assert small(tmp_path / "a", *flips)[0] == reference[0]
    assert small(tmp_path / "b", "eval.every=0")[0] == reference[0]


def sections():
    """{name: class} of the parts of a configuration; the whole has the name ""."""
    fields = Config.model_fields.items()
    kinds = {name: field.annotation for name, field in fields}
    return {"": Config} | {name: kind for name, kind in kinds.items() if issubclass(kind, Section)}


def read_keys(monkeypatch):
    """A set that gets every key (section, name) that production code reads from now on.

    Checking a value, or copying all of them, is not reading.
    """
    read, aside = set(), {ROOT / "common" / "config.py", ROOT / "common" / "keys.py"}
    for section, kind in sections().items():

        def spy(self, name, section=section):
            path = Path(sys._getframe(1).f_code.co_filename)
            if path.parent in (ROOT, ROOT / "common") and path not in aside:
                read.add((section, name))
            return object.__getattribute__(self, name)

        monkeypatch.setattr(kind, "__getattribute__", spy)
    return read


def test_every_key_is_read(tmp_path, monkeypatch):
    """By a training, by an evaluation of its checkpoint, and by a start that is refused."""
    run_dir = tmp_path / "run"
    train = "env.from_pixels=true optimization.predict_discount=true".split()
    train += "logger.video=true logger.mode=offline".split()
    evaluate = f"eval.checkpoint={run_dir} eval.video=true eval.dream_episode=1".split()

    def main(*overrides):
        with initialize(config_path=None, version_base="1.3"):
            dreamer.main(compose("config", [*SMALL, f"run_dir={run_dir}", *overrides]))

    utils.register_configs()
    read = read_keys(monkeypatch)
    main(*train)
    main("env.from_pixels=true", *evaluate)
    with pytest.raises(SystemExit, match="holds a run"):
        main(*train, "checkpoint.resume=false")
    declared = {
        (section, name) for section, kind in sections().items() for name in kind.model_fields
    }
    assert len(declared) > 60
    assert declared - read == set()


def test_config_yaml_and_the_declarations_have_the_same_keys_in_the_same_order():
    written = OmegaConf.to_container(OmegaConf.load(ROOT / "config.yaml"))
    del written["defaults"], written["hydra"]
    declared = {name: None for name in Config.model_fields}
    for section, kind in sections().items():
        if section:
            declared[section] = {name: None for name in kind.model_fields}
    assert list(flatten(declared)) == list(flatten(written))


def test_every_line_of_the_configuration_has_a_comment():
    lines = (ROOT / "config.yaml").read_text().split("hydra:\n")[0].splitlines()
    keys = [line for line in lines if ": " in line and not line.startswith(("#", "defaults"))]
    assert len(keys) > 40
    assert [line for line in keys if "#" not in line] == []


@pytest.mark.parametrize(
    "overrides, words",
    [
        ("+foo=1", "foo: there is no such key, config.yaml lists all"),
        ("+env.foo=1", "env.foo: there is no such key, config.yaml lists all"),
        ("seed=null", "seed=null: it should be a valid integer"),
        ("seed=abc", "seed=abc: it should be a valid integer"),
        ("seed=1.5", "seed=1.5: it should be a valid integer"),
        ("seed=true", "seed=True: it should be a number"),
        ("optimization.gamma=true", "optimization.gamma=True: it should be a number"),
        ("name=null", "name=null: it should be a valid string"),
        ("env.from_pixels=maybe", "env.from_pixels=maybe: it should be a valid boolean"),
        ("optimization.gamma=high", "optimization.gamma=high: it should be a valid number"),
        ("run_dir=${nothing}", "config: Interpolation key 'nothing' not found"),
        ("seed=-1", "seed=-1: it should be greater than or equal to 0"),
        ("optimization.gamma=1.5", "optimization.gamma=1.5: it should be less than or equal to 1"),
        (
            "optimization.world_model_lr=-1e-3",
            "optimization.world_model_lr=-0.001: it should be greater than 0",
        ),
        ("optimization.actor_lr=0", "optimization.actor_lr=0: it should be greater than 0"),
        (
            "optimization.value_lr=nan",
            "optimization.value_lr=nan: it should be a finite number",
        ),
        (
            "optimization.value_lr=inf",
            "optimization.value_lr=inf: it should be a finite number",
        ),
        (
            "optimization.autocast=int8",
            "optimization.autocast=int8: it should be"
            " 'auto', 'false', 'true', 'bfloat16' or 'float16'",
        ),
        (
            "optimization.compile=fast",
            "optimization.compile=fast: it should be 'auto', 'false', 'true' or 'reduce-overhead'",
        ),
        ("env.backend=atari", "env.backend=atari: it should be 'dm_control' or 'gymnasium'"),
        (
            "logger.mode=loud",
            "logger.mode=loud: it should be 'offline', 'online', 'disabled' or 'dryrun'",
        ),
        (
            "replay_buffer.batch_size=1001",
            "replay_buffer.batch_size=1001 (frames per update) must be a multiple of"
            " replay_buffer.batch_length=50",
        ),
        (
            "replay_buffer.batch_length=1 replay_buffer.batch_size=10",
            "replay_buffer.batch_length=1: it should be greater than or equal to 2",
        ),
        (
            "replay_buffer.batch_length=500 env.time_limit=100",
            "replay_buffer.batch_length is longer than an episode, which has 51 rows",
        ),
        (
            "replay_buffer.batch_size=0",
            "replay_buffer.batch_size=0: it should be greater than 0",
        ),
        ("env.action_repeat=3", "env.time_limit=1000 is no multiple of env.action_repeat=3"),
        ("eval.time_limit=501", "eval.time_limit=501 is no multiple of env.action_repeat=2"),
        ("collector.random_steps=10", "collector.random_steps does not fill an episode"),
        ("collector.random_steps=10", "raise it to 1000"),
        ("collector.random_steps=1000 env.n_parallel_envs=2", "raise it to 2000"),
        (
            "collector.total_steps=100",
            "collector.total_steps ends before training starts: raise it above"
            " collector.random_steps=5000",
        ),
        (
            "replay_buffer.capacity=100",
            "replay_buffer.capacity cannot hold the 5000 steps of collector.random_steps",
        ),
        (
            "optimization.horizon=1",
            "optimization.horizon=1: it should be greater than or equal to 2",
        ),
        (
            "env.from_pixels=false logger.video=true",
            "films need env.from_pixels=true, a state vector makes none",
        ),
        ("eval.video=true", "eval.video and eval.dream_episode need eval.checkpoint=..."),
        ("eval.dream_episode=1", "eval.video and eval.dream_episode need eval.checkpoint=..."),
    ],
)
def test_an_impossible_value_is_one_sentence(overrides, words):
    with pytest.raises(utils.UserError) as caught:
        configure(*overrides.split())
    sentence = str(caught.value)
    assert words in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    "override, words",
    [
        ("sed=1", "Could not override 'sed'"),
        ("+foo=1", "error: foo: there is no such key, config.yaml lists all"),
        ("seed=abc", "error: seed=abc: it should be a valid integer"),
        ("optimization.gamma=high", "error: optimization.gamma=high: it should be a valid number"),
        ("seed=null", "error: seed=null: it should be a valid integer"),
        ("replay_buffer.batch_size=1001", "error: replay_buffer.batch_size=1001 (frames"),
        ("env.name=carpole", "error: env.name=carpole: choose one of acrobot"),
        ("env.task=fly", "error: env.task=fly: choose one of run"),
        ("env.task=''", "error: env.task=: choose one of run"),
        ("device=tpu", "error: device=tpu: "),
        ("run_dir=/dev/null/run", "error: Not a directory (/dev/null/run"),
    ],
)
def test_the_command_line_answers_without_a_traceback(tmp_path, override, words):
    run_dir = f"run_dir={tmp_path / 'run'}"
    command = [
        sys.executable,
        str(ROOT / "dreamer.py"),
        run_dir,
        override,
        "env.from_pixels=false",
    ]
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
    flags = f"run_dir={tmp_path / 'run'}", "collector.total_steps=10000", "logger.mode=offline"
    with start("dreamer.py", *SMALL, *flags) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "the same command goes on" in error and "Traceback" not in error
