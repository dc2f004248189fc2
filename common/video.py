"""Films as mp4 and as GIF, complete or not at all."""

from PIL import Image

from common.errors import UserError
from common.files import atomic_path


def frames_per_second(cfg):
    """Of a film in which 40 environment steps take a second; `cfg` is the section `env`."""
    return 40 / cfg.action_repeat


def even_size(frames):
    """[T, h, w, 3] with a black line or column more where a side is odd: mp4 takes even ones."""
    height, width = frames.shape[1:3]
    padded = frames.new_zeros(len(frames), height + height % 2, width + width % 2, 3)
    padded[:, :height, :width] = frames
    return padded


def write_film(path, make_frames, fps):
    """Writes the frames uint8 [T, h, w, 3] that `make_frames()` gives as an mp4."""
    from imageio_ffmpeg import count_frames_and_secs
    from moviepy import VideoClip

    frames = even_size(make_frames())
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


def write_gif(path, frames, fps):
    """Writes frames uint8 [T, h, w, 3] as a GIF that plays again and again, in 128 colors."""
    images = [Image.fromarray(frame.numpy()) for frame in frames]
    palette = images[len(images) // 2].quantize(128)
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    milliseconds = round(1000 / fps / 10) * 10  # GIF counts in hundredths of a second
    with atomic_path(path) as aside:
        images[0].save(
            aside,
            format="gif",
            save_all=True,
            append_images=images[1:],
            duration=max(milliseconds, 20),
            loop=0,
        )
