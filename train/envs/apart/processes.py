"""Processes of another interpreter, and memory that they share with this one."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import pickle
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..answers import EnvError

_PACKAGES = ("tdmpc2_fast", "tdmpc2_fast.kernels", "tdmpc2_fast.train")
_TOLD = 400  # characters of what a process printed, that an error repeats


class SharedFile:
    """Memory in a file without a name, for processes that this one starts with its descriptor.

    In such a process it has the same descriptor.
    """

    def __init__(self, size: int, fd: int | None = None) -> None:
        if fd is None:
            with tempfile.TemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as file:
                file.truncate(size)
                fd = os.dup(file.fileno())
        self.fd, self.size = fd, size
        self.buffer = mmap.mmap(fd, size)
        weakref.finalize(self, os.close, fd)

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedFile, (self.size, self.fd)


class GuestProcess:
    """A process of another interpreter, with the methods of multiprocessing's that workers use.

    Args:
        python: the interpreter.
        made: makes what it serves; pickled, so its module must need nothing that the interpreter lacks.
        memory: descriptors that it is to have.

    Raises:
        EnvError: the interpreter cannot be run.
    """

    def __init__(self, python: Path, made: Callable[[], Any], *memory: SharedFile) -> None:
        self._python = python
        ours, theirs = Pipe()
        alive, self._alive = os.pipe()  # the process ends when our end is closed, as it is if we are killed
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  # what it prints; closed with it
        self.pipe: Connection = ours
        folders = {name: str(Path(find_spec(name).origin).parent) for name in _PACKAGES}  # type: ignore[union-attr, arg-type]
        script = Path(__file__).with_name("guest.py")
        call = [str(python), "-P", str(script), str(theirs.fileno()), str(alive), json.dumps(folders)]
        descriptors = (theirs.fileno(), alive, *(each.fd for each in memory))
        own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        try:
            self._popen = subprocess.Popen(
                call, pass_fds=descriptors, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said, env=own
            )
        except OSError as e:
            ours.close()
            self._let_go()
            raise EnvError(f"{python} cannot be run: {e.strerror}") from e
        finally:
            theirs.close()  # the process has the only one: when it dies, our end is told
            os.close(alive)
        with contextlib.suppress(OSError):  # a process that is gone is noticed when it should answer
            ours.send_bytes(pickle.dumps(made))

    @property
    def pid(self) -> int:
        """Its number."""
        return self._popen.pid

    @property
    def exitcode(self) -> int | None:
        """How it ended, negative by a signal; None while it runs."""
        return self._popen.poll()

    def is_alive(self) -> bool:
        """Tell whether it runs."""
        return self._popen.poll() is None

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)
            self._let_go()

    def kill(self) -> None:
        """End it at once."""
        self._popen.kill()

    def _let_go(self) -> None:
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def ended(self) -> str:
        """Say how it ended, and the end of what it printed, in a line."""
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - 4 * _TOLD))
        text = " ".join(self._said.read().decode(errors="replace").split())
        text = text if len(text) <= _TOLD else "..." + text[-_TOLD:]
        return f"a process of {self._python} ended (exit code {self.exitcode})" + (f": {text}" if text else "")
