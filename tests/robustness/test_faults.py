"""Every fault is one sentence that names what to do, and nothing that was saved is lost."""

import fcntl
import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch

import common.envs
import common.report
import common.rows
import dreamer
import dreamer_utils as utils
from common.checkpoint import checkpoint_paths, newest_whole_checkpoint
from common.dashboard import check_wandb
from common.opengl import check_picture
from fingerprint import fingerprint
from small_runs import SMALL, before_phase, configure, small

SHORT = ["collector.total_steps=160", "checkpoint.every=40"]


def refused(run_dir, *overrides):
    """The one sentence that a run ends with."""
    with pytest.raises(utils.UserError) as caught:
        small(run_dir, *overrides)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The fingerprint of the short run, undisturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    small(run, *SHORT, "name=one")
    return fingerprint(run)


def interrupt(collector):
    """Ends the run where it is."""
    raise KeyboardInterrupt


@pytest.fixture
def half(tmp_path):
    """The directory of the same run, ended after 120 of 160 steps."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_phase(patch, 4, interrupt)  # of 40 steps each
        small(tmp_path / "run", *SHORT, "name=one")
    assert last_step(tmp_path / "run") == 120
    return tmp_path / "run"


def last_step(run):
    """The environment step of the last row of metrics."""
    last_row = (run / "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(last_row)["environment_steps"]


def two_checkpoints(run):
    """The older and the newer checkpoint."""
    newer, older = checkpoint_paths(run / "checkpoints")
    return older, newer


# Damage


@pytest.mark.parametrize("left", ["0", "1", "half", "all but one"])
def test_a_truncated_checkpoint_falls_back_to_the_one_before(half, whole, capsys, left):
    newer = two_checkpoints(half)[1]
    size = newer.stat().st_size
    os.truncate(newer, {"0": 0, "1": 1, "half": size // 2, "all but one": size - 1}[left])
    small(half, *SHORT, "name=one")
    said = capsys.readouterr().out
    assert f"checkpoint {newer} cannot be used (" in said and "trying the one before" in said
    assert fingerprint(half) == whole


def payload(path):
    """All that is loaded from a checkpoint; a date in its directory, say, is not."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_flipped_byte_is_seen_wherever_it_matters(half):
    older, newer = two_checkpoints(half)
    content, unseen, wanted = newer.read_bytes(), [], payload(newer)
    for number in range(40):
        place = (len(content) - 1) * number // 39
        flipped = bytearray(content)
        flipped[place] ^= 1 << number % 8
        newer.write_bytes(flipped)
        used, _, _ = newest_whole_checkpoint([newer, older])
        if used != older and payload(newer) != wanted:
            unseen.append(place)
    assert unseen == []


def test_if_all_checkpoints_are_damaged_no_run_starts_anew(half):
    rows = (half / "metrics.jsonl").read_bytes()
    older, newer = two_checkpoints(half)
    for path in (older, newer):
        os.truncate(path, 100)
    sentence = refused(half, *SHORT, "name=one")
    assert f"none of {newer}, {older} can be loaded: restore one from a backup" in sentence
    assert (half / "metrics.jsonl").read_bytes() == rows


@pytest.mark.parametrize("fault", ["missing", "flipped", "short"])
def test_damaged_replay_rows_are_an_error(half, fault, capsys):
    path = half / "replay" / "observation.memmap"
    if fault == "missing":
        path.unlink()
    elif fault == "short":
        os.truncate(path, 100)
    else:
        content = bytearray(path.read_bytes())
        content[30] ^= 1
        path.write_bytes(content)
    sentence = refused(half, *SHORT, "name=one")
    older, newer = two_checkpoints(half)
    assert f"none of {newer}, {older} can be loaded" in sentence
    said = capsys.readouterr().out
    assert "episode 0 in " in said and "is damaged or missing" in said
    assert "checkpoint.drop_damaged=true goes on without it" in said


def test_another_configuration_is_refused_by_name(half):
    changed = "networks.belief_dim=20", "optimization.gamma=0.9"
    sentence = refused(half, *SHORT, "name=one", *changed)
    assert "networks.belief_dim=16 (now 20), optimization.gamma=0.99 (now 0.9)" in sentence


def test_a_lost_config_is_no_reason_to_start_anew(half):
    (half / "config.yaml").unlink()
    rows = (half / "metrics.jsonl").read_bytes()
    assert "metrics but no config.yaml" in refused(half, *SHORT, "name=one")
    assert (half / "metrics.jsonl").read_bytes() == rows and two_checkpoints(half)


def test_keys_that_do_not_change_what_is_learned_may_change(half, whole):
    small(half, *SHORT, "name=one", "logger.project=other", "checkpoint.keep=3")
    assert fingerprint(half) == whole


def test_two_processes_in_one_directory(half):
    with half.with_name(f".{half.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another process" in refused(half, *SHORT, "name=one")


# Disk


def test_a_full_disk_in_the_middle_of_a_checkpoint(half, whole):
    """RLIMIT_FSIZE ends a write like a full disk does."""
    before = [path.read_bytes() for path in two_checkpoints(half)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[0]) // 2, limits[1]))
    try:
        sentence = refused(half, *SHORT, "name=one")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in sentence and "free some space" in sentence
    assert [path.read_bytes() for path in two_checkpoints(half)] == before
    small(half, *SHORT, "name=one")
    assert fingerprint(half) == whole


def test_the_replay_reserves_its_space_before_training(tmp_path):
    small(tmp_path / "run", *SHORT)
    for path in (tmp_path / "run" / "replay").glob("*.memmap"):
        assert path.stat().st_blocks * 512 >= path.stat().st_size


# Numbers


def poisoned(patch, where, at=3):
    """Puts a NaN into the training of update `at`."""
    original, count = utils.Optimizer.backward, 0

    def backward(self, loss, retain_graph=False):
        nonlocal count
        original(self, loss, retain_graph)
        count += 1
        if count == 3 * at:
            tensor = self.parameters[0]
            (tensor.grad if where == "gradient" else tensor.data)[0] = float("nan")

    patch.setattr(utils.Optimizer, "backward", backward)


@pytest.mark.parametrize("where", ["gradient", "weight"])
def test_a_number_that_is_not_finite_stops_within_one_update(tmp_path, monkeypatch, where):
    poisoned(monkeypatch, where)
    sentence = refused(tmp_path / "run", *SHORT)
    if where == "gradient":
        assert "grad_norm is not finite in update 3: its batch is in" in sentence
        kept = torch.load(tmp_path / "run" / "not_finite_3.pt")
        assert kept["batch"]["observation"].shape[1] == 8
    else:
        assert ".weight is not finite after update 3" in sentence
    for path in two_checkpoints(tmp_path / "run"):
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if "agent" in name)
            weights = torch.load(archive.open(name))
        assert all(value.isfinite().all() for value in weights.values())


def test_a_reward_that_is_not_finite(tmp_path, monkeypatch):
    original = common.envs.SuiteEpisodes.step

    def step(self, action):
        result = original(self, action)
        return result._replace(reward=float("nan"))

    monkeypatch.setattr(common.envs.SuiteEpisodes, "step", step)
    assert "a reward that is not finite" in refused(tmp_path / "run")


# Environments


def test_an_environment_that_raises(tmp_path, whole):
    original, count = common.envs.SuiteEpisodes.step, 0

    def step(self, action):
        nonlocal count
        count += 1
        if count == 70:
            raise ValueError("the simulation blew up")
        return original(self, action)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.envs.SuiteEpisodes, "step", step)
        sentence = refused(tmp_path / "run", *SHORT, "name=one")
    reason = "acting in the environment failed (ValueError: the simulation blew up); "
    assert sentence == reason + "the same command goes on from the last checkpoint"
    assert last_step(tmp_path / "run") == 80
    small(tmp_path / "run", *SHORT, "name=one")
    assert fingerprint(tmp_path / "run") == whole


def test_a_dead_worker(tmp_path):
    """One of two worker processes is killed in the middle of an episode."""
    flags = ["env.n_parallel_envs=2", "collector.random_steps=160", "collector.total_steps=320"]
    flags.append("checkpoint.every=40")
    before = set(multiprocessing.active_children())

    def kill_a_worker(collector):
        parallel = collector.collector.env.base_env
        os.kill(parallel._workers[0].pid, signal.SIGKILL)
        time.sleep(0.2)

    with pytest.MonkeyPatch.context() as patch:
        before_phase(patch, 6, kill_a_worker)  # each has taken 100 steps, an episode has 40
        sentence = refused(tmp_path / "run", *flags, "name=one")
    assert sentence.startswith("acting in the environment failed (copy 0 ended with exit code -9)")
    end = time.monotonic() + 20
    while set(multiprocessing.active_children()) - before:  # the other worker ends too
        assert time.monotonic() < end
        time.sleep(0.1)
    assert last_step(tmp_path / "run") == 200
    small(tmp_path / "run", *flags, "name=one")
    small(tmp_path / "whole", *flags, "name=one")
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


# Dashboards


def test_wandb_without_a_key(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    sentence = refused(tmp_path / "run", "logger.mode=online")
    assert "needs an API key: run `wandb login`, or use logger.mode=offline" in sentence
    assert "deprecated" not in capfd.readouterr().err


def test_wandb_with_a_key_that_cannot_be_one(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "short")
    sentence = refused(tmp_path / "run", "logger.mode=online")
    assert "WANDB_API_KEY invalid" in sentence and "logger.mode=offline" in sentence


def test_an_online_dashboard_may_log_in_whatever_the_variable_says(monkeypatch):
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_wandb(configure(*SMALL, "logger.mode=online"))
    wandb.teardown()


def test_wandb_with_an_address_that_is_none(tmp_path, monkeypatch):
    def settings(**_):
        return wandb_settings(base_url="bogus")

    import wandb

    wandb_settings = wandb.Settings
    monkeypatch.setattr(wandb, "Settings", settings)
    sentence = refused(tmp_path / "run", "logger.mode=offline")
    assert "base_url Input should be a valid URL" in sentence and "WANDB_" in sentence


def test_an_offline_dashboard_needs_no_key_whatever_was_asked_before(tmp_path, monkeypatch):
    """wandb settles its mode the first time that it is asked for anything."""
    import wandb

    wandb.teardown()
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb.api.api_key is None
    small(tmp_path / "run", "logger.mode=offline")
    wandb.teardown()


def test_an_offline_dashboard_leaves_the_next_run_of_the_process_its_login(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    small(tmp_path / "offline", "logger.mode=offline")
    assert "WANDB_API_KEY invalid" in refused(tmp_path / "online", "logger.mode=online")


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused(tmp_path / "run", "logger.mode=offline")


# Doctor


def doctor(capsys, *overrides):
    """Whether all is well, and what is said about each check."""
    cfg = configure(*SMALL, *overrides)
    fine = utils.Doctor(cfg, utils.make_env, dreamer.train).examine()
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    return fine, {name: (word, text) for word, name, text in lines}


def test_the_doctor_finds_a_sound_machine_sound(tmp_path, capsys):
    run = tmp_path / "run"
    fine, said = doctor(capsys, f"run_dir={run}", "env.from_pixels=true")
    assert fine, said
    checks = "versions device memory precision OpenGL task run_dir disk wandb speed"
    assert list(said) == checks.split()
    assert "levels of gray" in said["task"][1] and "updates/s" in said["speed"][1]
    assert not run.exists()


def test_the_doctor_names_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common.report.metadata, "version", lambda name: "0.0")
    monkeypatch.setattr(common.rows.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    fine, said = doctor(capsys, f"run_dir={tmp_path / 'run'}")
    assert not fine
    assert said["versions"][0] == "problem" and "torch 0.0 (tested with" in said["versions"][1]
    assert said["disk"][0] == "problem" and "lower replay_buffer.capacity" in said["disk"][1]
    assert said["device"][0] == "ok"


def test_a_picture_of_one_color_is_refused():
    with pytest.raises(utils.UserError, match="one color only"):
        check_picture(torch.full((64, 64, 3), 7, dtype=torch.uint8))


def test_no_thread_is_left_behind(tmp_path):
    small(tmp_path / "run")
    before = threading.active_count()
    small(tmp_path / "other")
    assert threading.active_count() <= before
