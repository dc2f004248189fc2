"""An exported agent: small, whole, played and dreamed with like the run it came from."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import dreamer
import dreamer_utils as utils
from common.agents import find_checkpoint
from common.command_line import quoted_override
from common.errors import UserError
from common.keys import changes_learning, flatten
from small_runs import ROOT, configure, run_command

README = (ROOT / "README.md").read_text()


def export(source, folder, *overrides):
    """The file that `export=SOURCE` writes to a folder."""
    utils.export_agent(configure(f"export={source}", f"export_dir={folder}", *overrides))
    return Path(folder) / "agent.torchrl"


@pytest.fixture(scope="module")
def exported(watched, tmp_path_factory):
    """The folder of the watched run's agent."""
    return export(watched[0], tmp_path_factory.mktemp("exported") / "agent").parent


def test_an_exported_agent_has_every_weight_in_half_precision(watched, exported):
    _, metadata, states = find_checkpoint(watched[0])
    _, small_metadata, small_states = find_checkpoint(exported)
    assert small_states.keys() == {"agent"} and small_metadata["step"] == metadata["step"]
    weights, halves = states["agent"], small_states["agent"]
    assert halves.keys() == weights.keys()
    assert {half.dtype for half in halves.values()} == {torch.float16}
    for name, weight in weights.items():
        torch.testing.assert_close(halves[name].float(), weight, rtol=2**-11, atol=2**-25)


def test_an_exported_agent_is_small_and_says_nothing_of_the_machine(watched, exported):
    path = exported / "agent.torchrl"
    weights = find_checkpoint(watched[0])[2]["agent"].values()
    half = sum(2 * weight.numel() for weight in weights)
    assert path.stat().st_size < half + 1000 * len(weights) + 10_000
    with zipfile.ZipFile(path) as archive:
        manifest = archive.read("manifest.json").decode()
    assert str(watched[0]) not in manifest and str(Path.home()) not in manifest
    keys = set(json.loads(manifest)["metadata"]["config"])
    learned = {key for key in flatten(configure()) if changes_learning(key)}
    assert keys == learned | {"eval.time_limit"}


def test_an_exported_agent_plays_and_dreams_by_one_command(exported):
    dream = "eval.dream_episode=1", "eval.dream_step=20"
    done = run_command(quoted_override("eval.checkpoint", exported), *dream, "device=cpu")
    assert done.returncode == 0, done.stderr
    assert "episode 1: return" in done.stdout
    names = {path.name for path in (exported / "evaluation_000000240").iterdir()}
    assert names >= {"1_episodes.json", "dream_from_1_20.png", "dream_from_1_20.gif"}


def test_an_agent_that_half_precision_holds_plays_the_same_to_the_bit(watched, tmp_path):
    """Exported again, it loses nothing more."""
    once = export(watched[0], tmp_path / "once")
    twice = export(once, tmp_path / "twice")
    folders = [once.parent, twice.parent]
    for folder in folders:
        cfg = configure(f"eval.checkpoint={folder}", "device=cpu")
        utils.evaluate_checkpoint(cfg, dreamer.make_agent, dreamer.make_evaluation)
    first, second = (
        (folder / "evaluation_000000240" / "1_episodes.json").read_text() for folder in folders
    )
    assert first == second


def test_an_export_replaces_nothing(watched, exported):
    before = (exported / "agent.torchrl").read_bytes()
    with pytest.raises(UserError, match="agent.torchrl exists: delete it, or choose another"):
        export(watched[0], exported)
    assert (exported / "agent.torchrl").read_bytes() == before


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_a_weight_that_half_precision_cannot_hold_is_refused(
    watched, tmp_path, monkeypatch, value
):
    path, metadata, states = find_checkpoint(watched[0])
    weight = next(iter(states["agent"].values()))
    weight[(0,) * weight.dim()] = value
    found = path, metadata, states
    monkeypatch.setattr("common.agents.find_checkpoint", lambda name, key: found)
    with pytest.raises(UserError, match="half precision cannot hold: name an earlier"):
        export(watched[0], tmp_path / "agent")
    assert not (tmp_path / "agent").exists()


def test_a_name_from_a_stranger_leads_nowhere_else(watched, tmp_path, monkeypatch):
    path, metadata, states = find_checkpoint(watched[0])
    metadata["config"]["name"] = "../../elsewhere"
    found = path, metadata, states
    monkeypatch.setattr("common.agents.find_checkpoint", lambda name, key: found)
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    utils.export_agent(configure(f"export={watched[0]}"))
    assert (tmp_path / "a" / "b" / "agents" / "elsewhere" / "agent.torchrl").exists()


def test_an_exported_agent_that_was_damaged_is_one_sentence(exported, tmp_path):
    whole = (exported / "agent.torchrl").read_bytes()
    for number, content in enumerate([whole[:-7], b"", whole[:5000] + b"x" + whole[5001:]]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "agent.torchrl").write_bytes(content)
        done = run_command(quoted_override("eval.checkpoint", folder))
        said = done.stderr.strip()
        assert done.returncode == 1 and "can be loaded" in said and "\n" not in said, said


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["export=runs/nowhere"], "export=runs/nowhere does not exist"),
        (["export=tests"], "holds no checkpoints: name a run directory"),
        (["export={run}", "optimization.horizon=3"], "export brings its own configuration"),
        (["export={run}", "resume={run}"], "export=... only writes a file"),
        (["export_dir=somewhere"], "export_dir=... needs export=RUN"),
        (["export={run}", "export_dir={run}/config.yaml"], "config.yaml"),
    ],
)
def test_a_mistake_is_one_sentence(watched, words, sentence):
    done = run_command(*(word.format(run=watched[0]) for word in words))
    said = done.stderr.strip()
    assert done.returncode == 1 and sentence in said, said
    assert said.startswith("error: ") and "\n" not in said, said


def test_the_agent_that_comes_with_the_clone_keeps_the_pole_up(tmp_path):
    words = re.search(r"^python dreamer\.py (eval\.checkpoint=.*)$", README, re.MULTILINE)[1]
    committed = words.split()[0].removeprefix("eval.checkpoint=")
    shutil.copytree(ROOT / committed, tmp_path / "agent", ignore=shutil.ignore_patterns("eval*"))
    words = words.replace(committed, str(tmp_path / "agent")).split()
    done = run_command(*words, "eval.time_limit=400", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"episode 1: return ([\d.]+)", done.stdout)[1]) > 340
    assert len(list(tmp_path.glob("agent/evaluation_*/dream_from_*.gif"))) == 1
