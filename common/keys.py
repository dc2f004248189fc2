"""Dotted keys of a configuration, and which of them change what is learned."""

from pydantic import BaseModel

# What may differ between two starts of the same run: none of it changes what is learned.
MAY_CHANGE = (
    "task",  # says nothing that env.name and env.task do not
    "name",
    "run_dir",
    "resume",
    "export",
    "export_dir",
    "device",
    "doctor",
    "collector.total_steps",
    "replay_buffer.directory",
    "replay_buffer.keep",
    "eval.",
    "logger.",
    "checkpoint.",
)


def flatten(config, prefix=""):
    """{dotted key: value} of a `Config` or of nested dictionaries."""
    values = config.model_dump() if isinstance(config, BaseModel) else config
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes_learning(key):
    """Whether a dotted key changes what is learned."""
    return not key.startswith(MAY_CHANGE)


def decisive(config):
    """{dotted key: value} of everything that changes what is learned."""
    return {key: value for key, value in flatten(config).items() if changes_learning(key)}


def set_key(config, key, value):
    """Sets one dotted key of a `Config`."""
    *sections, name = key.split(".")
    for section in sections:
        config = getattr(config, section)
    setattr(config, name, value)
