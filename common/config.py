"""Every configuration key with its type and its range; config.yaml has its default and meaning.

Hydra composes the values, pydantic checks them: one line per key, in the order of config.yaml.
"""

from pathlib import Path
from typing import Annotated, Literal

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from common.errors import UserError

ROOT = Path(__file__).parents[1]

Fraction = Annotated[float, Field(ge=0, le=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]
LowerCase = BeforeValidator(lambda value: str(value).lower())  # YAML reads `false` as a bool
Precision = Annotated[Literal["auto", "false", "true", "bfloat16", "float16"], LowerCase]
Compilation = Annotated[Literal["auto", "false", "true", "reduce-overhead"], LowerCase]


class Section(BaseModel):
    """Keys that belong together; unknown keys, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


class Env(Section):
    """`env`: the task and what an observation is."""

    backend: Literal["dm_control", "gymnasium"]
    name: str
    task: str
    from_pixels: bool
    camera: Annotated[int, Field(ge=-1)]
    action_repeat: PositiveInt
    time_limit: PositiveInt
    n_parallel_envs: PositiveInt


class CollectorConfig(Section):
    """`collector`: how much experience, and when."""

    total_steps: PositiveInt
    random_steps: PositiveInt
    train_every: PositiveInt
    exploration_noise: NonNegativeFloat


class ReplayBufferConfig(Section):
    """`replay_buffer`: what is kept, and what a batch is."""

    batch_size: PositiveInt
    batch_length: AtLeastTwo
    capacity: PositiveInt


class Networks(Section):
    """`networks`: sizes, and the Gaussians of states and actions."""

    state_dim: PositiveInt
    belief_dim: PositiveInt
    hidden_dim: PositiveInt
    channels: PositiveInt
    min_std: PositiveFloat
    action_std: PositiveFloat
    action_mean_scale: PositiveFloat


class Optimization(Section):
    """`optimization`: the hyper-parameters of the three losses and their steps."""

    train_ratio: NonNegativeFloat
    pretrain: NonNegativeInt
    horizon: AtLeastTwo
    gamma: Fraction
    lambda_: Fraction
    kl_scale: NonNegativeFloat
    free_nats: NonNegativeFloat
    predict_discount: bool
    discount_scale: NonNegativeFloat
    world_model_lr: PositiveFloat
    actor_lr: PositiveFloat
    value_lr: PositiveFloat
    adam_eps: PositiveFloat
    grad_clip: PositiveFloat
    autocast: Precision
    compile: Compilation


class Eval(Section):
    """`eval`: episodes of the evaluation policy, beside training or of a checkpoint."""

    every: NonNegativeInt
    episodes: PositiveInt
    checkpoint: str
    video: bool
    dream_episode: NonNegativeInt
    dream_step: NonNegativeInt


class CheckpointConfig(Section):
    """`checkpoint`: what is saved, and what a start does with it."""

    every: PositiveInt
    keep: PositiveInt
    resume: bool
    overwrite: bool


class LoggerConfig(Section):
    """`logger`: rows of metrics, films, the dashboard."""

    mode: Literal["offline", "online", "disabled", "dryrun"]
    project: str
    every: PositiveInt
    video: bool
    video_every: PositiveInt
    progress: bool


class Config(Section):
    """A whole run."""

    name: str
    run_dir: str
    seed: NonNegativeInt
    doctor: bool
    device: str
    env: Env
    collector: CollectorConfig
    replay_buffer: ReplayBufferConfig
    networks: Networks
    optimization: Optimization
    eval: Eval
    checkpoint: CheckpointConfig
    logger: LoggerConfig


def register_configs():
    """Gives Hydra the YAML files by name.

    Told to look in this directory instead, `--help` would walk through all of .venv (minutes).
    """
    store = ConfigStore.instance()
    for path in ROOT.glob("config*.yaml"):
        store.store(path.stem, OmegaConf.load(path))


def load_config(cfg):
    """Hydra's configuration as a checked `Config`; `UserError` names the first thing wrong."""
    try:
        config = Config.model_validate(OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UserError(f"{key}: there is no such key, config.yaml lists all") from None
        if first["type"] == "missing":
            raise UserError(f"{key} has no value: give one, or leave config.yaml whole") from None
        given = "null" if first["input"] is None else first["input"]
        reason = first["msg"].replace("Input should", "it should")
        raise UserError(f"{key}={given}: {reason}") from None
    check_combinations(config)
    return config


def check_combinations(config):
    """Raises `UserError` where single values are fine but do not go together."""
    env, collector, replay = config.env, config.collector, config.replay_buffer
    rows = env.time_limit // env.action_repeat + 1  # of an episode: its agent steps and the reset
    first_episodes = env.n_parallel_envs * env.time_limit
    films = config.logger.video or config.eval.video or config.eval.dream_episode
    rules = [
        (
            replay.batch_size % replay.batch_length == 0,
            f"replay_buffer.batch_size={replay.batch_size} (frames per update) must be a multiple"
            f" of replay_buffer.batch_length={replay.batch_length}",
        ),
        (
            env.time_limit % env.action_repeat == 0,
            f"env.time_limit={env.time_limit} is no multiple of"
            f" env.action_repeat={env.action_repeat}",
        ),
        (
            replay.batch_length <= rows,
            "replay_buffer.batch_length is longer than an episode, which"
            f" has {rows} rows: lower it, or raise env.time_limit",
        ),
        (
            collector.random_steps >= first_episodes,
            "collector.random_steps does not fill an episode of"
            f" every environment: raise it to {first_episodes}",
        ),
        (
            collector.total_steps >= collector.random_steps,
            "collector.total_steps ends before training starts: raise it above"
            f" collector.random_steps={collector.random_steps}",
        ),
        (
            replay.capacity >= collector.random_steps,
            f"replay_buffer.capacity cannot hold the {collector.random_steps} steps of"
            " collector.random_steps: raise it",
        ),
        (
            env.from_pixels or not films,
            "films need env.from_pixels=true, a state vector makes none: leave out logger.video,"
            " eval.video and eval.dream_episode",
        ),
        (
            config.eval.checkpoint or not (config.eval.video or config.eval.dream_episode),
            "eval.video and eval.dream_episode need eval.checkpoint=...; films of training come"
            " with logger.video=true",
        ),
        (
            config.eval.dream_episode or not config.eval.dream_step,
            "eval.dream_step needs eval.dream_episode=1 (or a later one)",
        ),
    ]
    for fine, sentence in rules:
        if not fine:
            raise UserError(sentence)
