"""Frames that explain themselves: what each picture is, its step, its reward and their sum.

All frames are uint8 [T, height, width, 3]. The border has the color of what the picture is.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

CONTEXT = 5  # rows that the model has seen before it is left alone
BORDER = 2  # pixels of an image, before it is enlarged
COLORS = {
    "real": (235, 235, 235),
    "seen": (0, 170, 0),  # the model's picture of what it has just been shown
    "open loop": (255, 128, 0),  # the model alone, with the real actions
    "dream": (255, 128, 0),  # the model alone, with the policy's own actions
    "error": (150, 110, 190),  # the absolute difference of open loop and real
}


@dataclass
class Track:
    """A sequence of images, and what to write below each.

    Attributes:
        frames: [T, h, w, 3].
        kinds: T keys of `COLORS`.
        notes: T short texts, or nothing.
    """

    frames: torch.Tensor
    kinds: list
    notes: list | None = None


def to_frames(images):
    """Decoder output [..., 3, h, w] in +-0.5 -> uint8 [..., h, w, 3]."""
    return ((images + 0.5) * 255).round().clamp(0, 255).byte().movedim(-3, -1).cpu()


def seen_then(kind, context, length):
    """The kinds of `length` pictures, of which the model has seen the first `context`."""
    return ["seen"] * context + [kind] * (length - context)


def error_track(model, truth):
    """How far the pictures of one track are from those of another."""
    error = (model.frames.int() - truth.frames.int()).abs().byte()
    return Track(error, ["error"] * len(error))


def reward_notes(rewards):
    """`reward 0.93  sum 12.1` for each of the rewards [T]; the first row of an episode has 0."""
    total = np.cumsum(rewards)
    return [f"reward {reward:.2f}  sum {all_:.1f}" for reward, all_ in zip(rewards, total)]


def add_border(frames, kinds):
    """[T, h, w, 3] -> [T, h + 4, w + 4, 3], in the color of what each picture is."""
    length, height, width, _ = frames.shape
    colors = torch.tensor([COLORS[kind] for kind in kinds], dtype=torch.uint8)
    size = length, height + 2 * BORDER, width + 2 * BORDER, 3
    framed = colors[:, None, None].expand(size).clone()
    framed[:, BORDER:-BORDER, BORDER:-BORDER] = frames
    return framed


def enlarge(frames, times):
    """Every pixel as a square of `times` x `times`."""
    return frames.repeat_interleave(times, -3).repeat_interleave(times, -2)


def write_text(size, lines, color):
    """Lines of text on black, [height, width, 3]; `size` is (height, width)."""
    height, width = size
    image = Image.new("RGB", (width, height))
    draw, line_height = ImageDraw.Draw(image), height // len(lines)
    font = ImageFont.load_default(size=0.8 * line_height)
    for number, line in enumerate(lines):
        draw.text((4, number * line_height), line, fill=color, font=font)
    return torch.from_numpy(np.asarray(image).copy())


def draw_track(track, times, line_height):
    """The pictures, enlarged and framed, above what is to be said of each."""
    pictures = enlarge(add_border(track.frames, track.kinds), times)
    notes = track.notes or [""] * len(pictures)
    has_notes = track.notes is not None
    captions = []
    for kind, note in zip(track.kinds, notes, strict=True):
        lines = [kind, note] if has_notes else [kind]
        size = line_height * len(lines), pictures.shape[2]
        captions.append(write_text(size, lines, COLORS[kind]))
    return torch.cat([pictures, torch.stack(captions)], 1)


def side_by_side(parts):
    """Films [T, h, w, 3] in one row; those that are lower end in black."""
    height = max(part.shape[1] for part in parts)
    padded = [
        torch.cat([part, part.new_zeros(len(part), height - part.shape[1], *part.shape[2:])], 1)
        for part in parts
    ]
    return torch.cat(padded, 2)


def with_heading(frames, texts, line_height):
    """The frames below a line of text for each."""
    size = line_height, frames.shape[2]
    lines = [write_text(size, [text], COLORS["real"]) for text in texts]
    return torch.cat([torch.stack(lines), frames], 1)


def rewards_on_arrival(episode):
    """The rewards [T + 1] that came with the observations of an episode; 0 with the first."""
    rewards = episode["reward"].cpu().numpy()
    return np.concatenate([np.zeros(1, rewards.dtype), rewards])


def evaluation_frames(episode, repeat):
    """The episode as it was; `repeat` environment steps lie between two frames."""
    frames = episode["observation"].cpu()
    track = Track(frames, ["real"] * len(frames), reward_notes(rewards_on_arrival(episode)))
    steps = [f"step {row * repeat}" for row in range(len(frames))]
    return with_heading(draw_track(track, 4, 18), steps, 22)


def dream_frames(episode, context, videos, repeat):
    """The real episode, and beside it the one that the model dreams with the policy's actions.

    Args:
        videos: of `Diagnostics.predict_videos`.
    """
    truth = episode["observation"].cpu()
    images, rewards = videos["dream"]
    model = to_frames(torch.cat([videos["filtered"][0][:context], images]))
    real = rewards_on_arrival(episode)
    dreamed = np.concatenate([real[:context], rewards.cpu().numpy()])
    tracks = [
        Track(truth, ["real"] * len(truth), reward_notes(real)),
        Track(model, seen_then("dream", context, len(model)), reward_notes(dreamed)),
    ]
    films = side_by_side([draw_track(track, 4, 18) for track in tracks])
    return with_heading(films, [f"step {row * repeat}" for row in range(len(truth))], 22)


def open_loop_frames(episode, predicted, first, repeat):
    """Several sequences side by side: truth, the model with the real actions, error.

    Args:
        predicted: decoder output [n, L, 3, h, w]; the first rows have seen their frames.
        first: [n], where the sequences start in the episode.
    """
    length, model = predicted.shape[1], to_frames(predicted)
    truth, context = episode["observation"].cpu(), min(CONTEXT, length - 1)
    columns = []
    for row, frames in zip(first.tolist(), model, strict=True):
        steps = [f"step {(row + t) * repeat}" for t in range(length)]
        real = Track(truth[row : row + length], ["real"] * length, steps)
        alone = Track(frames, seen_then("open loop", context, length))
        parts = [draw_track(track, 2, 14) for track in (real, alone, error_track(alone, real))]
        columns.append(torch.cat(parts, 1))
    return torch.cat(columns, 2)


def dream_tracks(episode, first, row, videos):
    """Real, seen, dream, open loop and its error, from row `first` on; alone after `row`.

    `seen` ends with the last action: the last observation is never filtered.
    """
    context = row + 1 - first
    length = context + len(videos["open_loop"][0])
    truth = episode["observation"].cpu()[first : first + length]
    filtered = to_frames(videos["filtered"][0])[first : first + length]
    missing = truth.new_zeros(length - len(filtered), *truth.shape[1:])
    rewards = rewards_on_arrival(episode)[first : first + length]
    alone = {}
    for kind in ("dream", "open loop"):
        images, dreamed = videos[kind.replace(" ", "_")]
        alone[kind] = Track(
            torch.cat([filtered[:context], to_frames(images)]),
            seen_then(kind, context, length),
            reward_notes(np.concatenate([rewards[:context], dreamed.cpu().numpy()])),
        )
    real = Track(truth, ["real"] * length, reward_notes(rewards))
    seen = Track(torch.cat([filtered, missing]), ["seen"] * length)
    return [real, seen, *alone.values(), error_track(alone["open loop"], real)]


def dream_from_frames(tracks, first, repeat):
    """The tracks of `dream_tracks` side by side."""
    films = side_by_side([draw_track(track, 4, 18) for track in tracks])
    steps = [f"step {(first + t) * repeat}" for t in range(len(films))]
    return with_heading(films, steps, 22)
