"""What MuJoCo needs of the process it runs in: a renderer that works headless, and no log file left behind."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import functools
import logging
import os
import sys

from .base import RenderError

_log = logging.getLogger(__name__)


def cannot_render(what: str, e: Exception) -> RenderError:
    """Return the error for a picture that OpenGL, as `MUJOCO_GL` chooses it, does not give."""
    return RenderError(
        f"{what}: no pictures with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}: {e or type(e).__name__}; start Python "
        "with MUJOCO_GL=egl (a GPU's driver, or the package libegl1) or MUJOCO_GL=osmesa (the package libosmesa6); "
        "MUJOCO_GL=disable does without pictures"
    )


def prepare_rendering() -> None:
    """Choose a renderer; call this before dm_control is imported or a viewer opened, which load an OpenGL driver."""
    _load_triton_first()
    _choose_renderer()


def keep_log_out_of_the_way() -> None:
    """Log MuJoCo's warnings, each once, which it would write to MUJOCO_LOG.TXT in the working directory.

    Call this before a model is loaded, since loading warns, too, and after dm_control was imported,
    which sets itself up to log them as often as they come.
    """
    try:
        import mujoco
    except ImportError:
        return
    except RuntimeError as e:  # MUJOCO_GL names nothing it knows
        raise cannot_render("mujoco", e) from e
    mujoco.set_mju_user_warning(_say_once)


@functools.lru_cache(maxsize=256)
def _say_once(message: str) -> None:
    """Log a message once, though every environment made repeats what its model's file is warned about."""
    # What a simulator's own model files should be written like one day is nothing its user can act on.
    _log.log(logging.INFO if "deprecated" in message else logging.WARNING, "MuJoCo: %s", message)


def _load_triton_first() -> None:
    """Import triton, if installed, before anything brings in an OpenGL driver.

    Mesa's driver and triton each carry an LLVM. Whichever loads second finds the other's
    symbols; triton second crashes the process, Mesa second does not. torch imports triton
    by itself at the first optimiser step.
    """
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401


def _choose_renderer() -> None:
    """Choose headless rendering where the machine has it; leave the choice to dm_control where there is a screen.

    dm_control decides once, when it is imported, and refuses to be imported with a renderer
    that is named and missing. Without a name it takes GLFW even where there is no screen.
    """
    if sys.platform != "linux" or "MUJOCO_GL" in os.environ:
        return
    if _egl_devices():
        os.environ["MUJOCO_GL"] = "egl"
    elif ctypes.util.find_library("OSMesa"):
        os.environ["MUJOCO_GL"] = "osmesa"
    elif not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        os.environ["MUJOCO_GL"] = "disable"


def _egl_devices() -> int:
    """Count the devices EGL can draw on: none where its library is there without a driver."""
    name = ctypes.util.find_library("EGL")
    if name is None:
        return 0
    find = ctypes.CDLL(name).eglGetProcAddress
    find.restype = ctypes.c_void_p
    address = find(b"eglQueryDevicesEXT")
    if address is None:
        return 0
    count = ctypes.c_int(0)
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(address)
    query(0, None, ctypes.byref(count))
    return count.value
