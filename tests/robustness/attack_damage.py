"""Damage to the files of a run that was stopped in the middle, with a full replay."""

import os
import random
import shutil

from attack_children import difference, one_sentence, run, snapshot

from common.episodes import ResumableCollector
from fingerprint import fingerprint
from small_runs import SMALL

# Phases cut episodes, the replay overwrites its oldest rows; at step 210, saved at 90 and 180.
RING = """
name=one collector.train_every=30 checkpoint.every=90 replay_buffer.capacity=150
""".split()
LOGS = "metrics.jsonl", "curves.jsonl"
WITHOUT = "throughput.jsonl", "run.json"  # only drawn and shown


def end_after(phases):
    """A fault: the process ends like a power cut ends it, when the next phase would begin."""
    original, count = ResumableCollector.collect, 0

    def collect(self):
        nonlocal count
        count += 1
        if count > phases:
            os._exit(9)
        return original(self)

    ResumableCollector.collect = collect


def make_runs(folder):
    """The directory of a stopped run, that of another seed, and the bits of a whole one."""
    places = {name: folder / name for name in ("half", "other", "whole")}
    for name, words, phases in (("half", [], 7), ("other", ["seed=1"], 7), ("whole", [], 10**6)):
        words = [*SMALL, *RING, *words, f"run_dir={places[name]}"]
        code, said = run(words, folder / "said", fault=lambda phases=phases: end_after(phases))
        assert code == (0 if name == "whole" else 9), said
    return places["half"], places["other"], fingerprint(places["whole"])


def flip(path, place, bit):
    """Changes one bit of a file."""
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << bit]))


def swap(one, other):
    """Each file gets the content of the other."""
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def damages(half, other, generator):
    """(what, [files that it touches], function of the directory) of every damage."""
    files = sorted(str(path.relative_to(half)) for path in half.rglob("*") if path.is_file())
    cases = []
    for name in files:
        size = (half / name).stat().st_size
        places = {0, size - 1, *(generator.randrange(size) for _ in range(9))} if size else ()
        for place in sorted(places):
            bit = generator.randrange(8)
            act = lambda run, name=name, at=(place, bit): flip(run / name, *at)  # noqa: E731
            cases.append((f"{name}: bit {bit} of byte {place} flipped", [name], act))
        for left in sorted({0, 1, size // 3, size - 1} if size else ()):
            act = lambda run, name=name, left=left: os.truncate(run / name, left)  # noqa: E731
            cases.append((f"{name}: cut to {left} of {size} bytes", [name], act))
        act = lambda run, name=name: (run / name).unlink()  # noqa: E731
        cases.append((f"{name}: deleted", [name], act))
        act = lambda run, name=name: shutil.copy(other / name, run / name)  # noqa: E731
        cases.append((f"{name}: that of another run", [name], act))
    for _ in range(24):
        pair = generator.sample(files, 2)
        act = lambda run, pair=pair: swap(*(run / name for name in pair))  # noqa: E731
        cases.append((f"{' and '.join(pair)}: swapped", pair, act))
    for _ in range(24):
        pair = generator.sample(files, 2)
        act = lambda run, pair=pair: [(run / name).unlink() for name in pair]  # noqa: E731
        cases.append((f"{' and '.join(pair)}: deleted", pair, act))
    for name in ("checkpoints", "replay", "replay/undo"):
        act = lambda run, name=name: shutil.rmtree(run / name)  # noqa: E731
        inside = [path for path in files if path.startswith(f"{name}/")]
        cases.append((f"{name}: deleted", inside, act))
    rows = [name for name in files if name.endswith(".jsonl")]
    for gone in (["config.yaml", *rows], ["config.yaml", *rows, "run.json"]):
        act = lambda run, gone=gone: [(run / name).unlink() for name in gone]  # noqa: E731
        cases.append((f"{', '.join(gone)}: deleted", gone, act))
    return cases


def attack_damage(counts, folder, every):
    """Each start ends with the same bits, or says one sentence and leaves everything alone."""
    half, other, wanted = make_runs(folder)
    cases = damages(half, other, random.Random(0))
    for what, names, damage in cases[::every]:
        counts.cases["damages"] += 1
        place = folder / "damaged"
        shutil.copytree(half, place)
        damage(place)
        before = snapshot(place)
        words = [*SMALL, *RING, f"run_dir={place}"]
        code, said = run(words, folder / "said")
        if not counts.check_words(what, said):
            pass
        elif code == 0:
            check_finished(counts, what, names, place, wanted, said)
        elif not one_sentence(code, said):
            counts.problem("wrong sentences", f"{what}: exit code {code}", said)
        else:
            after = snapshot(place)
            kept = [name for name in before if not name.startswith("replay/")]
            lost = [name for name in kept if before[name] != after.get(name)]
            if lost:
                counts.problem("runs destroyed", f"{what}: {', '.join(lost)} changed", said)
            for name in names:
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(half / name, place / name)
            counts.check_end(f"{what}, put back", words, folder / "said", wanted, place)
        shutil.rmtree(place)


def check_finished(counts, what, names, place, wanted, said):
    """A run that went on has the same bits, but for rows of metrics that were damaged before."""
    found = fingerprint(place)
    wrong = [key for key in wanted | found if wanted.get(key) != found.get(key)]
    logs = set(LOGS) & set(names)
    lengths = {key for key in wrong if logs and "logger" in key}  # of the files of rows
    if set(wrong) - logs - lengths:
        counts.problem("mismatches", f"{what}: {difference(place, wanted)}", said)
    for name in wrong:
        if name in LOGS and b'"environment_steps": 240' not in (place / name).read_bytes():
            counts.problem("mismatches", f"{what}: {name} lacks the last row", said)
