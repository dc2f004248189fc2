"""One run: resumed, counted, checked, saved, and stopped by signals."""

import sys
from pathlib import Path

import torch

from common.checkpoint import (
    DAMAGE,
    checkpoint_paths,
    load_random_state,
    newest_whole_checkpoint,
    save_checkpoint,
)
from common.device import say_if_crowded
from common.directory import RunDirectory
from common.episodes import resumed_episodes
from common.errors import DamageError, UserError, first_line
from common.finite import FiniteCheck
from common.keys import flatten
from common.opengl import no_opengl
from common.report import run_summary, write_run_card
from common.rows import delete_rows, restore_rows
from common.signals import StopSignals

with no_opengl():
    from torchrl.checkpoint import GlobalRNGState


NEEDED = {"progress", "collector", "replay", "logger", "random"}  # before the first part is built


class Run:
    """The run in `cfg.run_dir`: its progress, its checkpoints, and whether it was asked to stop.

    Entering finds the last whole checkpoint, if the directory holds a run: `saved` then has the
    states of all parts, and `start` hands them out. Nothing is written before
    `directory.claim()`, and if anything fails before `start`, nothing is left of a new run.

    Attributes:
        step: environment steps, action repeat counted.
        previous_step: those before the last interaction, as far as it is not reported yet.
        updates: update steps.
    """

    def __init__(self, cfg):
        self.cfg, self.path, self.config = cfg, Path(cfg.run_dir), flatten(cfg)
        self.step, self.previous_step, self.updates = 0, 0, 0
        self.saved, self.parts, self.metadata = {}, {}, {}
        self.started = False
        self.save_due, self.finite = False, FiniteCheck(self.path)
        self.directory, self.signals = RunDirectory(cfg), StopSignals()

    def __enter__(self):
        try:
            if self.directory.find_run():
                paths = checkpoint_paths(self.path / "checkpoints")
                _, _, self.saved = newest_whole_checkpoint(paths, self.check_states)
        except BaseException:
            self.directory.unlock()
            raise
        return self

    def check_states(self, states):
        """Takes over progress and rows of the replay of a checkpoint, if all is sound."""
        if missing := NEEDED - states.keys():
            raise self.other_version(f"there is no {min(missing)}")
        try:
            self.load_state_dict(states["progress"])
            resumed_episodes(0, self.cfg.env.n_parallel_envs, states["collector"])
            if not isinstance(states["logger"]["wandb_id"], str | None):
                raise DamageError("the dashboard's run has no name")
            drop = self.cfg.checkpoint.drop_damaged
            restore_rows(self.path / "replay", states["replay"], drop)
        except DamageError:
            raise
        except DAMAGE as error:
            raise DamageError(f"its states cannot be read: {first_line(error)}") from None

    def other_version(self, reason):
        """The `UserError` for states that are whole, but not those of this code."""
        return UserError(
            f"the run in {self.path} was made by an earlier version of this code, which keeps"
            f" its state in another way ({reason}): go on with that version (git_revision in"
            f" {self.path / 'run.json'}), or choose another name=..."
        )

    # From the first part to the last

    def start(self, metadata, **parts):
        """Gives all parts the states that were saved, or saves a new run for the first time.

        Args:
            metadata: what a result depends on, for the run card.
            parts: {name: an object with `state_dict` and `load_state_dict`}.
        """
        self.metadata, self.parts = metadata, parts | {"progress": self}
        for name, part in self.parts.items() if self.saved else ():
            self.restore(name, part.load_state_dict)
        if not self.saved:
            self.save()
        self.directory.write_config()  # also of a run that is prolonged
        self.started = True
        print(
            f"{'going on at' if self.step else 'training from'} step {self.step:,} on"
            f" {metadata['device']} in {metadata['precision']}, run in {self.path}"
        )
        if metadata["device"].startswith("cpu") and (crowded := say_if_crowded()):
            print(crowded)
        self.write_card("running")
        if self.saved:  # last, so that nothing above has drawn from them
            self.restore("random", load_random_state)
        self.saved = {}
        self.signals.listen()

    def restore(self, name, load):
        """Calls `load` with the saved state of a part."""
        try:
            load(self.saved[name])
        except DAMAGE as error:
            raise self.other_version(f"{name}: {first_line(error)}") from error

    def __exit__(self, kind, error, trace):
        """Prints the summary; after a signal, the process ends here."""
        self.signals.restore()
        if not self.started:
            self.directory.remove_traces()
        elif kind is None:
            state = "stopped" if self.stop_signal else "finished"
            print(run_summary(self.cfg, self.write_card(state)))
            if state == "finished" and not self.cfg.replay_buffer.keep:
                delete_rows(self.path / "replay")
        self.directory.unlock()
        if self.stop_signal and kind is None:
            print(f"saved at step {self.step:,}: the same command goes on", file=sys.stderr)
            self.signals.end_process()

    # Progress

    def state_dict(self):
        """The three counters."""
        names = ("step", "previous_step", "updates")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state):
        """Takes over what `state_dict` gave."""
        for name in self.state_dict():
            if not isinstance(state[name], int) or state[name] < 0:
                raise DamageError(f"it says {name}={state[name]}")
            setattr(self, name, state[name])

    def crossed(self, every):
        """Whether the last interaction passed a multiple of `every` environment steps."""
        return self.previous_step // every != self.step // every

    @property
    def at_end(self):
        """Whether all environment steps are done."""
        return self.step >= self.cfg.collector.total_steps

    @property
    def stop_signal(self):
        """The number of the first signal that asked for an end, or None."""
        return self.signals.received

    @property
    def finished(self):
        """Whether there is nothing left to do, or a signal asked for an end."""
        return self.at_end or self.stop_signal is not None

    @property
    def report_due(self):
        """Whether steps were taken since the last report; after a signal, it comes later."""
        return self.previous_step != self.step and self.stop_signal is None

    @property
    def evaluation_due(self):
        """Every `eval.every` environment steps, and at the end."""
        every = self.cfg.eval.every
        return every > 0 and self.updates > 0 and (self.crossed(every) or self.at_end)

    @property
    def row_due(self):
        """Every `logger.every` environment steps, and whenever there was an evaluation."""
        return self.crossed(self.cfg.logger.every) or self.at_end or self.evaluation_due

    def reported(self):
        """Ends a report: what was due for the last steps is done, or will be saved."""
        self.save_due = self.crossed(self.cfg.checkpoint.every) or self.at_end
        self.previous_step = self.step

    def count_steps(self, transitions):
        """Counts the environment steps of new transitions, action repeat included."""
        self.previous_step = self.step
        self.step += transitions.numel() * self.cfg.env.action_repeat

    def count_update(self, batch, metrics):
        """Counts an update; `UserError` if the numbers of one are not finite."""
        self.updates += 1
        float16 = self.metadata["precision"] == str(torch.float16)
        self.finite.add_update(self.updates, batch, metrics, float16)

    # Saving

    def check_weights(self, agent):
        """`UserError` if a weight is not finite, or a number of the last update."""
        self.finite.check_weights(agent, self.updates)

    def save_if_due(self):
        """Saves every `checkpoint.every` environment steps, at the end, and after a signal."""
        if self.save_due or self.stop_signal:
            self.save()
            self.write_card("running")
        self.save_due = False

    def save(self):
        """Saves everything that the next step depends on."""
        replay = self.parts["replay"]
        metadata = {"step": self.step, "episodes": replay.episodes, "config": self.config}
        kept = save_checkpoint(
            self.path / "checkpoints",
            self.cfg.checkpoint.keep,
            self.step,
            metadata,
            self.parts | {"random": GlobalRNGState()},
        )
        replay.forget(min(metadata["episodes"] for metadata in kept))

    def write_card(self, state):
        """Writes run.json, the run in numbers, and returns it."""
        progress = {"state": state, "environment_steps": self.step, "updates": self.updates}
        return write_run_card(self.path, progress | self.metadata)
