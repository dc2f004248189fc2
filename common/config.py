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
    field_validator,
)
from pydantic_core import PydanticCustomError

from common.combinations import check_combinations
from common.command_line import register_resolvers, split_task, values_of_run
from common.errors import UserError

ROOT = Path(__file__).parents[1]

Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # numpy takes no larger one
NotEmpty = Annotated[str, Field(min_length=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]
LowerCase = BeforeValidator(lambda value: str(value).lower())  # YAML reads `false` as a bool
Precision = Annotated[Literal["auto", "false", "true", "bfloat16", "float16"], LowerCase]
Compilation = Annotated[Literal["auto", "false", "true", "reduce-overhead"], LowerCase]


PLAIN_WORDS = {  # where pydantic's own are not plain
    "string_pattern_mismatch": r"it should not be empty, and have none of / \ # ? % :",
    "string_too_short": "it should not be empty",
}


class Section(BaseModel):
    """Keys that belong together; unknown keys, infinities and NaN are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    @field_validator("*", mode="before")
    @classmethod
    def refuse_booleans_as_numbers(cls, value, info):
        """Python takes true for 1."""
        number = cls.model_fields[info.field_name].annotation in (int, float)
        if number and isinstance(value, bool):
            raise PydanticCustomError("number", "it should be a number")
        return value


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
    directory: str = ""
    keep: bool = True


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
    time_limit: NonNegativeInt = 0  # runs of earlier versions do not say it
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
    lock: bool
    drop_damaged: bool


class LoggerConfig(Section):
    """`logger`: rows of metrics, films, the dashboard."""

    mode: Literal["offline", "online", "disabled", "dryrun"]
    project: Annotated[str, Field(pattern=r"^[^/\\#?%:]+$")]  # what wandb takes
    every: PositiveInt
    video: bool
    video_every: PositiveInt
    progress: bool
    artifact: bool = False


class Config(Section):
    """A whole run."""

    task: NotEmpty = "unknown"  # runs of earlier versions do not say it
    name: NotEmpty
    run_dir: NotEmpty
    resume: str = ""
    export: str = ""
    export_dir: str = ""
    seed: Seed
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

    def as_evaluated(self):
        """The same with `env.time_limit` of the episodes of evaluation."""
        limit = self.eval.time_limit or self.env.time_limit
        return self.model_copy(update={"env": self.env.model_copy(update={"time_limit": limit})})


def register_configs():
    """Gives Hydra the YAML files by name.

    Told to look in this directory instead, `--help` would walk through all of .venv (minutes).
    """
    store = ConfigStore.instance()
    for path in ROOT.glob("config*.yaml"):
        store.store(path.stem, OmegaConf.load(path))
    for path in ROOT.glob("launcher_*.yaml"):
        name = path.stem.removeprefix("launcher_")
        store.store(name, OmegaConf.load(path), group="hydra/launcher")


def load_config(cfg):
    """Hydra's configuration as a checked `Config`; `UserError` names the first thing wrong."""
    register_resolvers()
    try:
        split_task(cfg)
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None
    if values.get("resume") and isinstance(values["resume"], str | int):
        values = values_of_run(values)
    return check_values(values)


def check_values(values, where=""):
    """Nested values as a checked `Config`; `UserError` names the first thing wrong.

    Args:
        where: begins the sentence, if the values are not those of the command line.
    """
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(where + explain(error.errors()[0])) from None
    check_combinations(config)
    return config


def explain(error):
    """One sentence about pydantic's first error."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: there is no such key, config.yaml lists all"
    if error["type"] == "missing":
        return f"{key} has no value: give one, or leave config.yaml whole"
    given = "null" if error["input"] is None else error["input"]
    reason = PLAIN_WORDS.get(error["type"], error["msg"].replace("Input should", "it should"))
    return f"{key}={given}: {reason}"
