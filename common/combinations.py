"""Values of a configuration that are fine alone but do not go together."""

from common.errors import UserError


def check_combinations(config):
    """Raises `UserError` where single values are fine but do not go together."""
    for fine, sentence in (*size_rules(config), *command_rules(config)):
        if not fine:
            raise UserError(sentence)


def size_rules(config):
    """[(whether it is so, what to say if not)] of episodes, batches and budgets."""
    env, collector, replay = config.env, config.collector, config.replay_buffer
    rows = env.time_limit // env.action_repeat + 1  # of an episode: its agent steps and the reset
    first_episodes = env.n_parallel_envs * env.time_limit
    return [
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
            config.eval.time_limit % env.action_repeat == 0,
            f"eval.time_limit={config.eval.time_limit} is no multiple of"
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
    ]


def command_rules(config):
    """[(whether it is so, what to say if not)] of what a command asks for."""
    films = config.logger.video or config.eval.video or config.eval.dream_episode
    return [
        (
            config.env.from_pixels or not films,
            "films need env.from_pixels=true, a state vector makes none: leave out logger.video,"
            " eval.video and eval.dream_episode",
        ),
        (
            not (config.resume and config.eval.checkpoint),
            "resume=... trains and eval.checkpoint=... evaluates: give one of them",
        ),
        (
            not (config.export and (config.resume or config.eval.checkpoint)),
            "export=... only writes a file: leave out resume=... and eval.checkpoint=...",
        ),
        (
            config.export or not config.export_dir,
            "export_dir=... needs export=RUN, which says whose agent goes there",
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
        (
            config.checkpoint.resume or not config.checkpoint.drop_damaged,
            "checkpoint.drop_damaged=true goes on with a run: leave out checkpoint.resume=false",
        ),
        (
            not (config.checkpoint.resume and config.checkpoint.overwrite),
            "checkpoint.overwrite=true does nothing without checkpoint.resume=false, which starts"
            " anew: give both, or leave it out",
        ),
    ]
