"""Trained agents: found in a run or a file, with the configuration they bring, and exported.

An exported agent is one small file to give away: its weights in half precision and its
configuration; no optimizers, no replay, no paths of this machine.
"""

from pathlib import Path

import torch

from common.checkpoint import (
    check_written,
    checkpoint_paths,
    full_disks,
    make_archive,
    newest_whole_checkpoint,
)
from common.command_line import quoted_override, typed_overrides
from common.config import check_values
from common.errors import UserError
from common.keys import changes_learning, decisive, flatten, set_key

AGENT_FILE = "agent.torchrl"  # of an exported agent, in a folder of its own
LARGEST = torch.finfo(torch.float16).max


def find_checkpoint(name, key="eval.checkpoint"):
    """The path, the metadata and the states of a checkpoint, or of a run's newest whole one.

    Args:
        name: a run, an exported agent, or the file of a checkpoint.
        key: of the configuration that says it.
    """
    path = Path(name)
    if not path.exists():
        raise UserError(
            f"{key}={path} does not exist: `ls runs/*/checkpoints` shows what there is"
        )
    if not path.is_dir():
        paths = [path]
    elif (path / "checkpoints").is_dir():
        paths = checkpoint_paths(path / "checkpoints")
    elif (path / AGENT_FILE).exists():
        paths = [path / AGENT_FILE]
    else:
        raise UserError(
            f"{key}={path} holds no checkpoints: name a run directory, an exported agent, or a"
            " file in checkpoints/"
        )
    return newest_whole_checkpoint(paths)


def refuse_learning_keys(source):
    """`UserError` if the command line says what the checkpoint named by `source` says already."""
    typed = typed_overrides()
    wrong = [f"{key}={typed[key]}" for key in typed if key == "task" or changes_learning(key)]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: {source} brings its own configuration: leave this out"
        )


def take_over_config(cfg, saved, source="eval.checkpoint"):
    """The configuration that a checkpoint was trained with, and the rest from `cfg`.

    `UserError` if the command line says something else, or the checkpoint something impossible.

    Args:
        source: the key that names the checkpoint.
    """
    refuse_learning_keys(source)
    for key in flatten(cfg):
        if changes_learning(key):
            if key not in saved:
                raise UserError(f"the checkpoint knows no {key}: it comes from another version")
            set_key(cfg, key, saved[key])
    cfg.eval.time_limit = cfg.eval.time_limit or saved.get("eval.time_limit", 0)
    # The saved values are still unchecked, and the check has the better words for what is wrong.
    return check_values(cfg.model_dump(warnings=False), "the checkpoint says ")


def load_weights(agent, state, path):
    """Gives `agent` the weights that were read from `path`; `UserError` if they do not fit."""
    try:
        agent.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the weights in {path} are not those of its configuration ({reason}): take another"
            " checkpoint"
        ) from None


class HalfPrecision:
    """Weights as they are exported: float16, which rounds a weight by at most one part in 2,000.

    bfloat16, of the same size, rounds eight times as coarsely; its range is not needed here.
    """

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        """{name: tensor}, floating point numbers in float16."""
        return {
            name: value.half() if value.is_floating_point() else value
            for name, value in self.state.items()
        }


def check_range(path, state):
    """`UserError` if a weight is too large for float16, or not finite."""
    for name, value in state.items():
        if value.is_floating_point() and not (value.abs() <= LARGEST).all():
            raise UserError(
                f"{name} in {path} has weights that half precision cannot hold: name an earlier"
                " checkpoint of the run, or copy the checkpoint as it is"
            )


def export_agent(cfg):
    """Writes the agent of `cfg.export` to a folder that `eval.checkpoint` can play."""
    path, metadata, states = find_checkpoint(cfg.export, "export")
    name = Path(str(metadata["config"].get("name"))).name or "agent"  # no path of a stranger's
    cfg = take_over_config(cfg, metadata["config"], "export")
    state = states.get("agent")
    if not isinstance(state, dict) or not all(map(torch.is_tensor, state.values())):
        raise UserError(f"{path} holds no agent: take another checkpoint")
    check_range(path, state)
    folder = Path(cfg.export_dir or Path("agents", name))
    target = folder / AGENT_FILE
    if target.exists():
        raise UserError(f"{target} exists: delete it, or choose another export_dir=...")
    played = {"eval.time_limit": cfg.eval.time_limit}
    about = {"step": metadata["step"], "config": decisive(cfg) | played}
    remedy = "free some space, or choose another export_dir=..."
    with full_disks(f"{target} could not be written", remedy):
        check_written(make_archive({"agent": HalfPrecision(state)}).save(target, metadata=about))
    size, before = target.stat().st_size / 1e6, path.stat().st_size / 1e6
    print(
        f"wrote {target}: {size:.1f} MB, the agent of step {metadata['step']:,} of {path}"
        f" ({before:.1f} MB)"
    )
    print(f"play: python dreamer.py {quoted_override('eval.checkpoint', folder)}")
