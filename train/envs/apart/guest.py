"""What another interpreter runs: `python guest.py PIPE ALIVE {"package": "folder", ...}`.

It has packages of its own and not ours, which is imported from where the trainer has it. The
first object in the pipe makes what is served.
"""

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from types import ModuleType


class Finder:
    """Finds packages in the folders that they were found in by the trainer."""

    def __init__(self, folders: dict[str, str]) -> None:
        self.folders = folders

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where a package lies, as `importlib` asks for it."""
        folder = self.folders.get(name)
        if folder is None:
            return None
        init = os.path.join(folder, "__init__.py")
        return importlib.util.spec_from_file_location(name, init, submodule_search_locations=[folder])


def main() -> None:
    """Serve the trainer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, while this imports
    pipe, alive, folders = Connection(int(sys.argv[1])), int(sys.argv[2]), json.loads(sys.argv[3])
    sys.meta_path.insert(0, Finder(folders))
    from tdmpc2_fast.train.envs.apart.serve import serve

    made: list[Callable[[], object]] = []

    def make() -> object:
        return made[0]()

    made.append(pipe.recv())
    serve(pipe, make, lambda: _wait(alive))


def _wait(alive: int) -> None:
    """Return when the trainer, which alone has the other end, is gone."""
    while os.read(alive, 1):
        pass


if __name__ == "__main__":
    main()
