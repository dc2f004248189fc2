"""The wandb dashboard: whether it can work here, and how it starts."""

import os

from common.errors import UserError
from common.opengl import no_opengl

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
    try:
        has_key = cfg.logger.mode != "online" or bool(wandb.api.api_key)
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
            offline=cfg.logger.mode != "online",
            save_dir=str(directory),
            id=run_id,
            project=cfg.logger.project,
            log_env_packages=False,
            config=cfg.model_dump(),
            # TorchRL sets the mode where only the first run of a process sees it.
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


def to_wandb(path):
    """A film or a picture as wandb shows it."""
    import wandb

    return (wandb.Video if path.suffix == ".mp4" else wandb.Image)(str(path))
