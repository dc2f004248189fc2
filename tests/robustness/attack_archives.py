"""Checkpoints that a stranger prepared: none may run code, all get one sentence."""

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile

import torch
from attack_children import one_sentence, run, snapshot
from attack_damage import RING, make_runs

from common.checkpoint import checkpoint_paths
from small_runs import SMALL


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


def read(path):
    """{name: bytes} of an archive."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, members, packed=False):
    """An archive of {name: bytes}."""
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def saved(value):
    """The bytes of torch.save."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def old_format(value):
    """The bytes of torch.save before it wrote archives."""
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tarball(value):
    """A tar archive with a pickle, as the oldest PyTorch wrote."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(value)
            record = tarfile.TarInfo(name)
            record.size = len(content)
            archive.addfile(record, io.BytesIO(content))
    return file.getvalue()


def archives(members, marker):
    """(what, members, packed) of every prepared archive."""
    manifest_name = next(name for name in members if name.endswith("manifest.json"))
    manifest = json.loads(members[manifest_name])
    components, bomb = manifest["components"], Bomb(marker)
    state = {part: f"{record['path']}/state.pt" for part, record in components.items()}
    with zipfile.ZipFile(io.BytesIO(members[state["agent"]])) as inner:
        inner_members = {name: inner.read(name) for name in inner.namelist()}
    cases = []

    def add(what, change=None, packed=False, **metadata):
        new = dict(members)
        if metadata:
            changed = json.loads(json.dumps(manifest))
            changed["metadata"] |= metadata
            new[manifest_name] = json.dumps(changed).encode()
        for name, content in (change or {}).items():
            new.pop(name, None)
            if content is not None:
                new[name] = content
        cases.append((what, new, packed))

    def with_manifest(what, change):
        changed = json.loads(json.dumps(manifest))
        changed = change(changed) or changed
        add(what, {manifest_name: json.dumps(changed).encode()})

    for part, name in state.items():
        add(f"{part}: a pickle", {name: pickle.dumps(bomb)})
        add(f"{part}: torch.save of code", {name: saved({"x": bomb})})
        add(f"{part}: the old format", {name: old_format({"x": bomb})})
        add(f"{part}: a tar archive", {name: tarball(bomb)})
        add(f"{part}: no state", {name: None})
        folder = name.removesuffix("/state.pt")
        for aside in ("memmap", "td"):
            more = {f"{folder}/{aside}/meta.json": b'{"_type": "TensorDict", "shape": []}'}
            more[f"{folder}/{aside}/other.pickle"] = pickle.dumps(bomb)
            add(f"{part}: {aside} in place of state", {name: None} | more)
        more = {f"{folder}/meta.json": b'{"_type": "<class \'TensorDict\'>", "shape": []}'}
        add(
            f"{part}: tensordict.load",
            {name: None, f"{folder}/other.pickle": pickle.dumps(bomb)} | more,
        )
        for odd in ([], {}, 3, {"agent": torch.zeros(3)}, {"adam": 3}, None):
            add(f"{part}: holds {odd}", {name: saved(odd)})
        with_manifest(
            f"{part}: not there", lambda m, part=part: m["components"].pop(part) and None
        )
        for path in ("../../x", "/etc", "", None, 3, []):
            with_manifest(
                f"{part}: path {path}",
                lambda m, part=part, path=path: m["components"][part].update(path=path),
            )
    for value in ([], {}, None, 3, "x"):
        with_manifest(f"the manifest is {value}", lambda m, value=value: [value][0] or value)
        add(f"the manifest is really {value}", {manifest_name: json.dumps(value).encode()})
        with_manifest(f"components {value}", lambda m, value=value: m.update(components=value))
        with_manifest(f"metadata {value}", lambda m, value=value: m.update(metadata=value))
    add("no manifest", {manifest_name: None})
    add("manifest: no JSON", {manifest_name: b"\xff\xfe{"})
    add("manifest: deeply nested", {manifest_name: b"[" * 100_000})
    for step in (-1, 2**80, 1.5, "x", None, [], True):
        add(f"step {step}", step=step)
    config = manifest["metadata"]["config"]
    for value in ([], {}, None, 3):
        add(f"config {value}", config=value)
    for key, value in {
        "env.name": 5,
        "env.task": [1],
        "networks.hidden_dim": -3,
        "networks.belief_dim": 10**12,
        "env.from_pixels": "maybe",
        "seed": 2**70,
        "optimization.gamma": float("nan"),
        "env.action_repeat": 0,
        "env.backend": "atari",
        "networks.state_dim": 5,
        "replay_buffer.batch_length": 10**9,
        "env.camera": 77,
        "networks.channels": None,
        "optimization.autocast": {"a": 1},
        "env.time_limit": "x",
        "collector.random_steps": -1,
        "networks.min_std": "inf",
        "optimization.compile": "x",
        "env.n_parallel_envs": 10**6,
    }.items():
        add(f"config {key}={value}", config=config | {key: value})
    add("everything packed", packed=True)
    big = dict(inner_members)
    big[next(name for name in big if "/data/" in name)] = bytes(200_000_000)
    file = io.BytesIO()
    write(file, big, packed=True)
    add("a bomb inside", {state["agent"]: file.getvalue()})
    add("a bomb beside", {"bomb": bytes(50_000_000)}, packed=True)
    add("names that leave the folder", {"../../escaped": b"x", "/tmp/escaped": b"x"})
    return cases


def attack_archives(counts, folder, every):
    """Evaluates each of them, and goes on with a run that has nothing else."""
    half, _, wanted = make_runs(folder)
    newest = checkpoint_paths(half / "checkpoints")[0]
    marker = folder / "marker"
    cases = archives(read(newest), marker)
    archive = folder / newest.name
    resumed = folder / "resumed"
    for index, (what, members, packed) in enumerate(cases[::every]):
        write(archive, members, packed)
        for verb in (
            ("evaluated", "resumed") if index % 3 == 0 or "path" in what else ("evaluated",)
        ):
            counts.cases["archives"] += 1
            case = f"{what}: {verb}"
            if verb == "evaluated":
                words = ["device=cpu", f"eval.checkpoint={archive}"]
            else:
                shutil.copytree(half, resumed)
                for path in checkpoint_paths(resumed / "checkpoints"):
                    shutil.copy(archive, path)
                words = [*SMALL, *RING, f"run_dir={resumed}"]
            before = snapshot(resumed / "checkpoints") if verb == "resumed" else None
            code, said = run(words, folder / "said")
            if marker.exists():
                counts.problem("code run", case, said)
                marker.unlink()
            fine = counts.check_words(case, said)
            if fine and code and not one_sentence(code, said):
                counts.problem("wrong sentences", f"{case}: exit code {code}", said)
            if before and code and snapshot(resumed / "checkpoints") != before:
                counts.problem("runs destroyed", case, said)
            shutil.rmtree(resumed, ignore_errors=True)
            for left in folder.glob("evaluation_*"):
                shutil.rmtree(left)
