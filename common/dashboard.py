"""The wandb dashboard: whether it can work here, and how it starts."""

import os

from hydra.core.hydra_config import HydraConfig

from common.errors import UserError
from common.opengl import no_opengl
from common.plots import NEAR

with no_opengl():
    from torchrl.record.loggers.wandb import WandbLogger

WITHOUT_WANDB = "or use logger.mode=offline (wandb sync sends it later), or logger.mode=disabled"


def check_wandb(cfg):
    """`UserError` if the dashboard of this configuration cannot work here."""
    os.environ.setdefault("WANDB_SILENT", "true")
    if cfg.logger.mode == "disabled":
        return
    try:
        import wandb
    except ImportError:
        raise UserError(
            "wandb is not installed: pip install wandb, or use logger.mode=disabled"
        ) from None
    online = cfg.logger.mode == "online"
    try:
        if online:  # whatever WANDB_MODE says: logger.mode goes before it
            wandb.setup(settings=wandb.Settings(mode="online"))
        has_key = not online or wandb.login(prompt=False, verify=False)
    except wandb.errors.Error as error:  # a key that is too short, say
        raise UserError(f"{str(error).splitlines()[0]} Mend it, {WITHOUT_WANDB}") from None
    except ValueError as error:
        raise odd_settings(error) from None
    if not has_key:
        raise UserError(f"logger.mode=online needs an API key: run `wandb login`, {WITHOUT_WANDB}")


def odd_settings(error):
    """The `UserError` for what wandb's variables say, an address that is none for example."""
    reason = " ".join(str(error).split("[")[0].split()[1:])  # without the number of errors
    return UserError(
        f"wandb cannot use its settings ({reason}): mend the WANDB_... variables, or use"
        " logger.mode=disabled"
    )


def start_wandb(cfg, directory, run_id):
    """The wandb run, a continued one if `run_id` is given; `UserError` if wandb cannot start."""
    import wandb

    try:
        logger = WandbLogger(
            cfg.name,
            save_dir=str(directory),
            id=run_id,
            project=cfg.logger.project,
            group=os.environ.get("WANDB_RUN_GROUP", group_name(cfg)),
            tags=tags(cfg) if "WANDB_TAGS" not in os.environ else None,
            log_env_packages=False,
            config=cfg.model_dump(),
            # TorchRL's `offline` sets a variable of the process, which only its first run sees,
            # and with which no later one could log in.
            settings=wandb.Settings(
                init_timeout=30, mode="online" if cfg.logger.mode == "online" else "offline"
            ),
        )
    except (wandb.errors.Error, TimeoutError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"wandb does not answer ({reason}): check the network, {WITHOUT_WANDB}"
        ) from None
    except ValueError as error:
        raise odd_settings(error) from None
    return logger.experiment


def group_name(cfg):
    """The name of a run without its seed: what the seeds of one experiment have in common."""
    return cfg.name.replace(f"-seed{cfg.seed}", "")


def tags(cfg):
    """The task, and the preset."""
    preset = HydraConfig.get().job.config_name if HydraConfig.initialized() else "config"
    return [cfg.task, preset.removeprefix("config_") if preset != "config" else "paper"]


def to_wandb(path):
    """A film or a picture as wandb shows it."""
    import wandb

    return (wandb.Video if path.suffix == ".mp4" else wandb.Image)(str(path))


class Dashboard:
    """One run at wandb: rows, films and pictures, each at its own environment step.

    Args:
        cfg: the whole configuration.
        directory: of the run.
        run_id: of the run at wandb that goes on, or None.
        metadata: what a result depends on.
        published: rows of `published_curve` if they can be compared with this run, or None.
    """

    def __init__(self, cfg, directory, run_id, metadata, published):
        self.run = start_wandb(cfg, directory, run_id)
        self.id, self.name, self.step, self.published = self.run.id, cfg.name, 0, published
        self.run.define_metric("*", step_metric="environment_steps")
        self.run.define_metric("eval/return", step_metric="environment_steps", summary="max,last")
        self.run.config.update({"run": metadata}, allow_val_change=True)

    def log_row(self, row, step):
        """Numbers that belong to `step`."""
        self.step = step
        self.run.log(row, step=step)

    def log_drawn(self, drawn):
        """Films and pictures [(name, path, environment step)], each shown at its own step."""
        for name, path, step in drawn:
            # wandb's own counter may only grow; a record of its own is next to the last row.
            self.step += 1
            self.run.log({"environment_steps": step, name: to_wandb(path)}, step=self.step)

    def log_returns(self, history):
        """One chart of our returns and the published ones, where there are any."""
        rows = [row for row in history if "eval/return" in row]
        if self.published is None or not rows:
            return
        import wandb

        last = rows[-1]["environment_steps"]
        points = self.published[self.published[:, 0] <= last + NEAR]
        steps, *columns = points.T.tolist()
        ours = [row["environment_steps"] for row in rows], [row["eval/return"] for row in rows]
        chart = wandb.plot.line_series(
            xs=[ours[0], steps, steps, steps],
            ys=[ours[1], *columns],
            keys=["ours", "published mean", "published lowest", "published highest"],
            title="evaluation return",
            xname="environment steps",
        )
        self.step += 1
        self.run.log({"environment_steps": last, "eval/return_and_published": chart}, self.step)

    def log_checkpoint(self, path):
        """Keeps a checkpoint as an artifact of the run."""
        self.run.log_artifact(str(path), name=f"{self.name}-checkpoint", type="model")

    def finish(self):
        """Sends what is left."""
        self.run.finish()
