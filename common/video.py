"""Frames and films of an evaluation: the episode, the dream beside it, the open loop.

All frames are uint8 [T, height, width, 3]. A green border says that the model has seen the frame,
an orange one that it predicts.
"""

import torch

from common.errors import UserError
from common.files import atomic_path

CONTEXT = 5  # rows that the model has seen before it is left alone
SEEN, DREAMED = (0, 160, 0), (255, 128, 0)
BORDER = 2  # pixels


def frames_per_second(cfg):
    """Of a film in which 40 environment steps take a second; `cfg` is the section `env`."""
    return 40 / cfg.action_repeat


def to_frames(images):
    """Decoder output [..., 3, h, w] in +-0.5 -> uint8 [..., h, w, 3]."""
    return ((images + 0.5) * 255).round().clamp(0, 255).byte().movedim(-3, -1).cpu()


def add_border(frames, context):
    """[T, h, w, 3] -> [T, h + 4, w + 4, 3]: a border tells the first `context` frames apart."""
    length, height, width, _ = frames.shape
    size = length, height + 2 * BORDER, width + 2 * BORDER, 3
    framed = torch.tensor(DREAMED, dtype=torch.uint8).expand(size).clone()
    framed[:context] = torch.tensor(SEEN, dtype=torch.uint8)
    framed[:, BORDER:-BORDER, BORDER:-BORDER] = frames
    return framed


def enlarge(frames, times=4):
    """Every pixel as a square of `times` x `times`."""
    return frames.repeat_interleave(times, -3).repeat_interleave(times, -2)


def compare_frames(truth, *models, context):
    """Truth, models and the error of the last, one below the other; all [T, h, w, 3]."""
    error = (models[-1].int() - truth.int()).abs().byte()
    return torch.cat([add_border(part, context) for part in (truth, *models, error)], 1)


def evaluation_frames(episode):
    """The episode as it was."""
    return enlarge(episode["observation"].cpu())


def dream_frames(episode, context, videos):
    """The real episode, and beside it the one that the model dreams with the policy's actions.

    Args:
        videos: of `Diagnostics.predict_videos`.
    """
    model = torch.cat([videos["filtered"][0][:context], videos["dream"][0]])
    both = episode["observation"].cpu(), to_frames(model)
    return enlarge(torch.cat([add_border(part, context) for part in both], 2), 3)


def open_loop_frames(episode, predicted, first):
    """Several sequences side by side: truth, the model with the real actions, error.

    Args:
        predicted: decoder output [n, L, 3, h, w]; the first rows have seen their frames.
        first: [n], where the sequences start in the episode.
    """
    length, model = predicted.shape[1], to_frames(predicted)
    truth, context = episode["observation"].cpu(), min(CONTEXT, length - 1)
    columns = [
        compare_frames(truth[row : row + length], frames, context=context)
        for row, frames in zip(first.tolist(), model, strict=True)
    ]
    return enlarge(torch.cat(columns, 2), 2)


def write_film(path, make_frames, fps):
    """Writes the frames that `make_frames()` gives as an mp4, complete or not at all."""
    from imageio_ffmpeg import count_frames_and_secs
    from moviepy import VideoClip

    frames = make_frames()
    # Half a frame longer: its own sequences of images drop or repeat one where times are rounded.
    seconds = (len(frames) + 0.5) / fps
    film = VideoClip(lambda time: frames[round(time * fps)].numpy(), duration=seconds)
    with atomic_path(path) as aside:
        try:
            film.write_videofile(str(aside), fps=fps, codec="libx264", logger=None)
            written, _ = count_frames_and_secs(str(aside))  # an encoder may fail without a word
            reason = f"{written} of {len(frames)} frames are there"
        except (OSError, RuntimeError) as error:
            written, reason = 0, str(error).splitlines()[0]
        if abs(written - len(frames)) > 1:  # at odd rates the encoder repeats or drops one
            raise UserError(
                f"{path} could not be written ({reason}): see that its disk has space, or leave"
                " films out"
            )
