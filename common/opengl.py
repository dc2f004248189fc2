"""OpenGL: which backend renders here, and whether a picture shows anything."""

import contextlib
import importlib
import os
import subprocess
import sys

from common.errors import UserError

INSTALL = "apt-get install -y --no-install-recommends libegl1 libgl1"
PROBE = (
    "import mujoco; c = mujoco.GLContext(8, 8); c.make_current();"
    "mujoco.MjrContext(mujoco.MjModel.from_xml_string('<mujoco/>'), 100); c.free()"
)


@contextlib.contextmanager
def no_opengl():
    """Imports inside see MUJOCO_GL=disabled, so that none of them loads OpenGL."""
    before = os.environ.get("MUJOCO_GL")
    os.environ["MUJOCO_GL"] = "disabled"
    try:
        yield
    finally:
        del os.environ["MUJOCO_GL"]
        if before is not None:
            os.environ["MUJOCO_GL"] = before


def why_rendering_fails(backend):
    """None if `backend` renders here, else the last line of what it said.

    The probe is a process of its own (about a second): one failed import of an OpenGL library
    spoils a process.
    """
    env = os.environ | {"MUJOCO_GL": backend}
    probe = [sys.executable, "-c", PROBE]
    done = subprocess.run(probe, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]


def select_gl():
    """Sets MUJOCO_GL to the first backend that really renders; call before importing dm_control.

    The user's own MUJOCO_GL is checked, never replaced. Raises `UserError`.
    """
    wanted, failures = os.environ.get("MUJOCO_GL"), {}
    os.environ.pop("PYOPENGL_PLATFORM", None)  # follows from MUJOCO_GL
    if not wanted and sys.platform != "linux":
        return
    for backend in (wanted,) if wanted else ("egl", "osmesa"):
        reason = why_rendering_fails(backend)
        if reason is None:
            os.environ["MUJOCO_GL"] = backend
            return
        failures[backend] = reason
    which = f"MUJOCO_GL={wanted} does not render: unset it," if wanted else "no OpenGL renders:"
    raise UserError(f"{which} `{INSTALL}`, or use env.from_pixels=false (tried {failures})")


def prepare_gl(from_pixels):
    """Chooses OpenGL for pixels, and imports dm_control; states need none, so none is imported."""
    if not from_pixels:
        with no_opengl():
            importlib.import_module("dm_control.suite")
        return
    select_gl()
    render = sys.modules.get("dm_control._render")
    if render is not None and render.BACKEND == "off":
        # An earlier job of this process ran from states, and dm_control chooses only once.
        importlib.reload(render)


def check_picture(image):
    """`UserError` if an image [64, 64, 3] has one color only: OpenGL that draws nothing."""
    spread = int(image.max()) - int(image.min())
    if spread < 8:
        raise UserError(
            "rendered images have one color only: OpenGL does not draw; try another"
            " MUJOCO_GL (egl, osmesa), or use env.from_pixels=false"
        )
    return f"MUJOCO_GL={os.environ.get('MUJOCO_GL')}, 64 x 64 image, {spread + 1} levels of gray"
