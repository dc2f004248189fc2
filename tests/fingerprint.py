"""What a finished run is, as digests: weights, optimizers, generators, replay, metrics, curves."""

import hashlib
import zipfile
from pathlib import Path

import torch

TIMES = {"seconds", "times", "wandb_id"}  # wall times, and what names a dashboard run


def feed(digest, value):
    """Adds a nested state to a digest."""
    if isinstance(value, dict):
        for key in value:
            if key not in TIMES:
                digest.update(str(key).encode())
                feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            feed(digest, part)
    elif isinstance(value, torch.Tensor):
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        digest.update(repr(value).encode())


def fingerprint(run_dir):
    """{part: digest} of the newest checkpoint, the replay's rows, the metrics and the curves."""
    run_dir, parts = Path(run_dir), {}
    newest = max((run_dir / "checkpoints").glob("checkpoint-*"))
    with zipfile.ZipFile(newest) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".pt"):
                parts[name] = hashlib.sha256()
                with archive.open(name) as file:
                    feed(parts[name], torch.load(file, map_location="cpu", weights_only=True))
    rows = [run_dir / "metrics.jsonl", run_dir / "curves.jsonl"]
    for path in [*sorted((run_dir / "replay").glob("*.memmap")), *rows]:
        parts[path.name] = hashlib.sha256(path.read_bytes())
    return {newest.name: None} | {name: digest.hexdigest() for name, digest in parts.items()}
