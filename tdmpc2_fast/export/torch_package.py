"""A graph as a `.pt2` file: the program of `torch.export`, or one compiled for this machine."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import BackendError
from ..runtime.torch_cache import in_one_line
from .graphs import Graph
from .writing import moved_into, quiet


def check_compiler() -> None:
    """Raise `BackendError` where AOTInductor finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as e:  # whatever a missing compiler raises
        raise BackendError(
            f"compiled: needs a C++ compiler (CXX names one), and {in_one_line(e)}; compiled=false needs none"
        ) from e


def write_package(graph: Graph, path: Path, compiled: bool = False) -> list[Path]:
    """Write `graph` to `path`, which ends in .pt2, and return the files written.

    A compiled one is loaded with `torch._inductor.aoti_load_package` on such a machine, the other with
    `torch.export.load`. What `graph.metadata` says is in it: by the loader's `get_metadata`, and as extra files.

    Raises:
        BackendError: to be compiled, and there is no compiler.
    """
    if compiled:
        check_compiler()
    with quiet(), moved_into(path.parent) as folder:
        program, target = graph.program, folder / path.name
        if compiled:
            configs = {"aot_inductor.metadata": graph.metadata()}
            torch._inductor.aoti_compile_and_package(program, package_path=str(target), inductor_configs=configs)
        else:
            torch.export.save(program, target, extra_files=graph.metadata())
    return [path]
