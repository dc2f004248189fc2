"""Episodes of the evaluation policy, beside training or of a checkpoint.

Nothing here changes what is learned.
"""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from common.device import fork_rng, one_thread
from common.dream import draw_dream
from common.errors import UserError, first_line
from common.files import atomic_write
from common.frames import CONTEXT, dream_frames, evaluation_frames, open_loop_frames
from common.video import frames_per_second, write_film

DREAM_ROWS = 45  # of a dream that is drawn from a chosen step


@dataclass
class EvaluationResult:
    """What an evaluation found."""

    metrics: dict[str, float]
    curves: dict[str, list]  # by step of the episode, or of the prediction
    episodes: list[dict]
    films: dict[str, Callable] = field(default_factory=dict)  # name -> () -> frames


class Evaluation:
    """Plays episodes with the evaluation policy, in an environment and with noise of its own.

    The first one is compared with what model and critic say of it.

    Args:
        cfg: the whole configuration.
        agent: see dreamer_utils.Agent.
        policy: a TorchRL policy.
        env: an environment for it.
        seeds: `EpisodeSeeds` of that environment.
        diagnostics: `Diagnostics`.
    """

    def __init__(self, cfg, agent, policy, env, seeds, diagnostics):
        self.cfg, self.agent, self.policy = cfg, agent, policy
        self.env, self.seeds, self.diagnostics = env, seeds, diagnostics

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # the same bits, whether training is compiled or not
    def __call__(self, step, films=False):
        """An `EvaluationResult` at `step` environment steps.

        A step has its episodes and its noise, however many are asked for and whatever is drawn.
        """
        with one_thread(), fork_rng(self.agent.world_model.device):
            self.seeds.episode = step
            torch.manual_seed(next(self.seeds))
            episodes = [self.play() for _ in range(self.cfg.eval.episodes)]
            returns = [episode["reward"].double().sum().item() for episode in episodes]
            lengths = [len(episode["reward"]) for episode in episodes]
            metrics = {
                "eval/return": sum(returns) / len(returns),
                "eval/length": sum(lengths) / len(lengths) * self.cfg.env.action_repeat,
                "eval/return_std": float(np.std(returns)),
            }
            torch.manual_seed(step)
            result = EvaluationResult(metrics, {}, episodes)
            if lengths[0] > 2:
                self.compare_with_dreams(result, films)
        if films:
            repeat = self.cfg.env.action_repeat
            for number, episode in enumerate(episodes, 1):
                make_frames = functools.partial(evaluation_frames, episode, repeat)
                result.films[f"evaluation_{number}"] = make_frames
        result.curves["return"] = returns
        return result

    def play(self):
        """One episode, see `Diagnostics`, where the agent is."""
        limit = self.cfg.env.time_limit // self.cfg.env.action_repeat
        try:
            steps = self.env.rollout(limit, self.policy)
        except Exception as error:
            raise UserError(
                f"an episode of the evaluation failed ({type(error).__name__}:"
                f" {first_line(error)}): mend the task; what was saved stays"
            ) from error
        after = steps["next"]
        if not after["reward"].isfinite().all():
            raise UserError(
                "the environment gave a reward that is not finite in an evaluation: mend the"
                " task; what was saved stays"
            )
        episode = {
            "observation": torch.cat([steps["observation"][:1], after["observation"]]),
            "action": steps["action"],
            "reward": after["reward"].flatten(),
            "terminated": after["terminated"][-1].any(),
            "state": after["state"],  # filtered with the observation before the step
            "belief": after["belief"],
        }
        device = self.agent.world_model.device
        return {name: value.to(device) for name, value in episode.items()}

    def compare_with_dreams(self, result, films):
        """Adds metrics, curves and films of the model and the critic on the first episode."""
        episode = result.episodes[0]
        metrics, curves, predicted, first = self.diagnostics.diagnose(
            self.agent, episode, self.cfg.optimization, CONTEXT
        )
        result.metrics |= metrics
        result.curves |= curves
        if films:
            length, repeat = len(episode["reward"]), self.cfg.env.action_repeat
            context = min(CONTEXT, length - 1)
            videos = self.diagnostics.predict_videos(
                self.agent, episode, context - 1, length - context + 1
            )
            result.films = {
                "open_loop": functools.partial(
                    open_loop_frames, episode, predicted, first, repeat
                ),
                "dream": functools.partial(dream_frames, episode, context, videos, repeat),
            }

    @torch.no_grad()
    def dream_from(self, step, episodes, number, environment_step):
        """What is dreamed from a step of an episode on: at most 45 rows.

        Args:
            step: of training, which gives the noise.
            number: of the episode, from 1 on.
            environment_step: of the episode.
        Returns:
            the episode, the row, and the videos of `Diagnostics.predict_videos`.
        """
        if number > len(episodes):
            raise UserError(
                f"eval.dream_episode={number}: there are episodes 1 to {len(episodes)}: choose one"
                " of these, or raise eval.episodes"
            )
        episode, repeat = episodes[number - 1], self.cfg.env.action_repeat
        length = len(episode["reward"])
        row, last = environment_step // repeat, length - 2
        if row > last:
            raise UserError(
                f"eval.dream_step={environment_step}: episode {number} can be left at the steps 0"
                f" to {last * repeat}: choose one of these"
            )
        with fork_rng(self.agent.world_model.device):
            torch.manual_seed(step)
            rows = min(DREAM_ROWS, length - row)
            videos = self.diagnostics.predict_videos(self.agent, episode, row, rows)
        return episode, row, videos

    def close(self):
        """Ends the environment."""
        if not self.env.is_closed:
            self.env.close()


def write_evaluation(cfg, evaluation, path, step):
    """Plays, prints the returns, and leaves numbers, films and dreams beside the checkpoint.

    The same episodes give what training saw, to the bit (on a CPU).

    Args:
        evaluation: `Evaluation` of the agent in the checkpoint `path`.
        step: environment steps of that checkpoint.
    """
    result = evaluation(step, films=cfg.eval.video)
    returns = result.curves["return"]
    dream = None
    if cfg.eval.dream_episode:
        chosen = cfg.eval.dream_episode, cfg.eval.dream_step
        dream = evaluation.dream_from(step, result.episodes, *chosen)
    for number, value in enumerate(returns, 1):
        print(f"episode {number}: return {value:.2f}")
    mean, std = result.metrics["eval/return"], result.metrics["eval/return_std"]
    if len(returns) > 1:
        print(f"mean {mean:.2f}, standard deviation {std:.2f} over {len(returns)} episodes")
    print(f"by the agent of step {step:,} in {path}")
    run = path.parents[1] if path.parent.name == "checkpoints" else path.parent
    folder = run / f"evaluation_{step:09d}"
    numbers = json.dumps(result.metrics | {"returns": returns}, indent=1)
    atomic_write(folder / f"{len(returns)}_episodes.json", numbers + "\n")
    for name, make_frames in result.films.items():
        write_film(folder / f"{name}.mp4", make_frames, frames_per_second(cfg.env))
    if dream:
        name = f"dream_from_{cfg.eval.dream_episode}_{cfg.eval.dream_step}.png"
        draw_dream(folder / name, *dream, cfg.env)
    print(f"in {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
