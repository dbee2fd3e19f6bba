"""A graph as an ONNX file, by torch's exporter."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import BackendError, ConfigError
from . import DEFAULT_OPSET, OPSETS
from .graphs import Graph
from .writing import moved_into, quiet

PACKAGES = ("onnx", "onnxscript")
_ONE_FILE = 1_900_000_000  # bytes of weights; a file of this format ends at 2 GiB


def check_onnx(opset: int = DEFAULT_OPSET) -> None:
    """Raise where a file of this opset cannot be written, before any work is done.

    Raises:
        ConfigError: an opset out of range.
        BackendError: a package is missing.
    """
    low, high = OPSETS
    if isinstance(opset, bool) or not isinstance(opset, int) or not low <= opset <= high:
        raise ConfigError(f"opset: got {opset!r}, allowed: an integer of at least {low} and at most {high}")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise BackendError(f"ONNX files need {' and '.join(missing)}; pip install 'tdmpc2-fast[export]'")


def write_onnx(graph: Graph, path: Path, opset: int = DEFAULT_OPSET) -> list[Path]:
    """Write `graph` to `path`, with what `graph.metadata` says in the file; return the files written.

    Weights beyond what one file can hold lie beside it, in `NAME.onnx.data`.

    Raises:
        ConfigError: an opset out of range.
        BackendError: a package is missing.
    """
    check_onnx(opset)
    from onnxscript import optimizer

    inputs = graph.example()
    with quiet():
        program = torch.onnx.export(
            graph.program,
            kwargs=inputs,
            input_names=list(inputs),
            output_names=[p.name for p in graph.outputs],
            opset_version=opset,
            dynamo=True,
            optimize=False,  # its rewriter takes minutes for an unrolled plan, and runtimes do the same
            verbose=False,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
        )
        assert program is not None
        optimizer.fold_constants(program.model)
        optimizer.remove_unused_nodes(program.model)
    for node in program.model.graph:  # of the exporter, about itself; as large as a small model
        node.metadata_props.clear()
    program.model.metadata_props.update(graph.metadata())
    program.model.producer_name = "tdmpc2-fast"
    weights = sum(p.nbytes for p in graph.parameters())
    with moved_into(path.parent) as folder:
        program.save(folder / path.name, external_data=weights > _ONE_FILE)
    return [p for p in (path, path.with_name(f"{path.name}.data")) if p.exists()]


def _stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Translate torch's stable sort, which the exporter does not know: of equals, `TopK` puts the lower index first."""
    from onnxscript import opset18

    op: Any = opset18
    return op.TopK(x, op.Constant(value_ints=[x.shape[dim]]), axis=dim, largest=int(descending), sorted=1)
