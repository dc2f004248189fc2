"""A checkpoint from a stranger never runs code, and an odd one is one sentence."""

import io
import json
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import dreamer
import dreamer_utils as utils
from common.errors import UserError
from small_runs import configure, small


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with one checkpoint."""
    directory = tmp_path_factory.mktemp("stranger") / "run"
    small(directory, "checkpoint.keep=1", "eval.every=0", "collector.total_steps=80")
    return directory


def members(run):
    """{name: content} of the run's checkpoint."""
    (path,) = (run / "checkpoints").glob("checkpoint-*")
    with zipfile.ZipFile(path) as archive:
        return path.name, {name: archive.read(name) for name in archive.namelist()}


def with_manifest(content, change):
    """The members with a manifest that `change` has changed."""
    manifest = json.loads(content["manifest.json"])
    changed = change(manifest)
    text = json.dumps(manifest if changed is None else changed)
    return content | {"manifest.json": text.encode()}


def agent_file(content):
    """The name of the member that holds the weights."""
    return next(name for name in content if name.endswith("-agent/state.pt"))


def saved(state):
    """What torch.save makes of `state`."""
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def set_metadata(**values):
    return lambda manifest: manifest["metadata"].update(values)


def set_config(**values):
    return lambda manifest: manifest["metadata"]["config"].update(values)


HOSTILE = {
    "pickle in place of tensors": lambda c, m: c | {agent_file(c): saved(Marker(m))},
    "bare pickle": lambda c, m: c | {agent_file(c): pickle.dumps(Marker(m))},
    "no state.pt but a pickled directory": lambda c, m: (
        {name: data for name, data in c.items() if name != agent_file(c)}
        | {agent_file(c).replace("state.pt", "state/meta.json"): b"{}"}
        | {agent_file(c).replace("state.pt", "state/other.pickle"): pickle.dumps(Marker(m))}
        | {agent_file(c).replace("state.pt", "state.json"): b"{}"}
    ),
    "missing weights": lambda c, m: {n: d for n, d in c.items() if n != agent_file(c)},
    "weights of another network": lambda c, m: c | {agent_file(c): saved({"a": torch.ones(3)})},
    "weights that are a list": lambda c, m: c | {agent_file(c): saved([1, 2])},
    "cut weights": lambda c, m: c | {agent_file(c): c[agent_file(c)][:-100]},
    "no manifest": lambda c, m: {n: d for n, d in c.items() if n != "manifest.json"},
    "manifest that is a list": lambda c, m: with_manifest(c, lambda manifest: []),
    "no metadata": lambda c, m: with_manifest(c, lambda x: x.pop("metadata") and None),
    "no components": lambda c, m: with_manifest(c, lambda x: x["components"].clear()),
    "negative step": lambda c, m: with_manifest(c, set_metadata(step=-1)),
    "huge step": lambda c, m: with_manifest(c, set_metadata(step=10**30)),
    "step that is text": lambda c, m: with_manifest(c, set_metadata(step="many")),
    "config that is a list": lambda c, m: with_manifest(c, set_metadata(config=[1])),
    "odd choice": lambda c, m: with_manifest(c, set_config(**{"env.backend": "atari"})),
    "odd number": lambda c, m: with_manifest(c, set_config(**{"networks.belief_dim": -3})),
    "odd type": lambda c, m: with_manifest(c, set_config(**{"env.action_repeat": [2]})),
    "odd task": lambda c, m: with_manifest(c, set_config(**{"env.name": "cartpoel"})),
    "huge network": lambda c, m: with_manifest(c, set_config(**{"networks.hidden_dim": 10**7})),
    "missing key": lambda c, m: with_manifest(
        c, lambda x: x["metadata"]["config"].pop("seed") and None
    ),
    "path out of the archive": lambda c, m: with_manifest(
        c, lambda x: x["components"]["agent"].update(path="../../..")
    ),
}


def write(path, content, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def evaluate(path):
    """The sentence that evaluation of a checkpoint ends with, and that nothing comes before."""
    with pytest.raises(UserError) as caught, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cfg = configure(f"eval.checkpoint={path}", "device=cpu")
        utils.evaluate_checkpoint(cfg, dreamer.make_agent, dreamer.make_evaluation)
    sentence = str(caught.value)
    assert "\n" not in sentence and "weights_only" not in sentence
    return sentence


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_odd_archive_is_one_sentence_and_runs_no_code(run, tmp_path, kind):
    name, content = members(run)
    marker = tmp_path / "marker"
    write(tmp_path / name, HOSTILE[kind](content, marker))
    assert evaluate(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pickle in place of tensors", "bare pickle", "cut weights"])
def test_resuming_from_an_odd_archive_runs_no_code_either(run, tmp_path, kind):
    name, content = members(run)
    path, marker = run / "checkpoints" / name, tmp_path / "marker"
    before = path.read_bytes()
    write(path, HOSTILE[kind](content, marker))
    try:
        with pytest.raises(UserError, match="can be loaded"):
            small(run, "checkpoint.keep=1", "eval.every=0", "collector.total_steps=80")
    finally:
        path.write_bytes(before)
    assert not marker.exists()


def change_state(part, change):
    """A function of the members that changes the state of one part."""

    def changed(content):
        name = next(name for name in content if name.endswith(f"-{part}/state.pt"))
        state = torch.load(io.BytesIO(content[name]), weights_only=True)
        new = change(state)
        return content | {name: saved(state if new is None else new)}

    return changed


def without(part):
    return lambda c: with_manifest(c, lambda x: x["components"].pop(part) and None)


PARTS = ["agent", "world_model", "policy", "replay", "collector", "logger", "progress", "random"]
ODD = {f"no {part}": without(part) for part in PARTS} | {
    "other weights": change_state("agent", lambda state: {"a": torch.ones(3)}),
    "weights that are a list": change_state("agent", lambda state: [1]),
    "optimizer that is a number": change_state("actor", lambda state: {"adam": 3}),
    "collector without actions": change_state("collector", lambda state: {"episodes": 3}),
    "logger of an older version": change_state("logger", lambda s: s.pop("seconds") and None),
    "logger without the dashboard": change_state("logger", lambda s: s.pop("wandb_id") and None),
    "logger that is a list": change_state("logger", lambda state: [state]),
    "replay of an older version": change_state("replay", lambda s: {"layout": s["layout"]}),
    "odd table": change_state("replay", lambda state: state.update(table=[(1,)])),
    "negative rows": change_state("replay", lambda state: state.update(rows=-4)),
    "huge rows": change_state("replay", lambda state: state.update(rows=10**15)),
    "negative step": change_state("progress", lambda state: state.update(step=-40)),
    "step that is text": change_state("progress", lambda state: state.update(step="x")),
    "odd generators": change_state("random", lambda state: {"python": 3}),
}


@pytest.mark.parametrize("kind", ODD)
def test_resuming_from_odd_states_is_one_sentence(run, tmp_path, kind):
    name, content = members(run)
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / name
    write(path, ODD[kind](content))
    before = path.read_bytes()
    with pytest.raises(UserError, match="another name=|another run_dir") as caught:
        small(tmp_path / "run", "checkpoint.keep=1", "eval.every=0", "collector.total_steps=120")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_the_layout_of_a_replay_names_no_file_elsewhere(run, tmp_path):
    name, content = members(run)
    shutil.copytree(run, tmp_path / "run")
    outside = {str(tmp_path / "outside"): ((), torch.float32)}
    change = change_state("replay", lambda state: state["layout"].update(outside))
    write(tmp_path / "run" / "checkpoints" / name, change(content))
    with pytest.raises(UserError, match="can be loaded"):
        small(tmp_path / "run", "checkpoint.keep=1", "eval.every=0", "collector.total_steps=120")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("where", ["archive", "tensors"])
def test_a_bomb_is_refused_before_it_is_unpacked(run, tmp_path, where):
    """A file of a few hundred kB that would take 300 MB of memory."""
    name, content = members(run)
    if where == "archive":
        content[agent_file(content)] = bytes(300_000_000)
        write(tmp_path / name, content, zipfile.ZIP_DEFLATED)
    else:
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data/0", bytes(300_000_000))
        write(tmp_path / name, content | {agent_file(content): inner.getvalue()})
    assert (tmp_path / name).stat().st_size < 3_000_000
    evaluate(tmp_path / name)
