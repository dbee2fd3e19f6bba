"""An experiment: a rehearsal of a CUDA device on the CPU. What it lets pass, `pytest -m gpu` may still refuse.

Code that is taken on a GPU alone (captured graphs, streams and events, copies between host and
device, launches with the options of a chip) would else be tried there first. Here tensors live on
the host and say where they would be; torch refuses to mix them, as it would; kernels are interpreted,
and refuse tensors of the host; a graph keeps the calls made while it is captured and makes them
again; waiting for the device inside a capture, or where `set_sync_debug_mode` forbids it, fails.
All is done at once, but what a stream does not wait for is known (streams.py). What a device computes
differently and speed are not rehearsed.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import streams
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

HOST, GPU = torch.device("cpu"), streams.GPU

# Functions that take tensors of both places.
_MIX = {"copy_", "__setitem__", "__getitem__", "to", "type", "type_as", "set_", "index_put_", "index", "data_ptr"}
_MIX |= {"is_same_size", "expand_as", "view_as", "reshape_as", "is_set_to", "set_data", "__set__", "register_hook"}
# Functions that wait for the device where one of their tensors is there.
_WAIT = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "equal", "allclose"}
_WAIT |= {"nonzero", "masked_select", "unique", "cpu", "__repr__", "__format__", "__contains__", "argwhere"}


class _State:
    """The state of the device that is rehearsed."""

    recording: list[Callable[[], None]] | None = None
    sync_debug = "default"
    kernels = True


def _storage(x: Tensor) -> Any:
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.untyped_storage()


def on_gpu(x: Tensor) -> bool:
    """Tell whether a tensor says it is on the device."""
    return getattr(_storage(x), "rehearsed", False)


def _put(x: Tensor) -> None:
    _storage(x).rehearsed = True


def _refuse(what: str, asked: bool) -> None:
    """Refuse to wait for the device where that is forbidden; `asked`: the code says that it waits."""
    if _State.recording is not None:
        raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
    if _State.sync_debug == "error" and not asked:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


def _wait(what: str) -> None:
    streams.host_waits(what, streams.current())


@contextmanager
def without_kernels() -> Iterator[None]:
    """Launch kernels within as always, but compute nothing: for tests of what is launched where, and when."""
    _State.kernels = False
    try:
        yield
    finally:
        _State.kernels = True


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _fresh(given: list[Tensor], found: list[Tensor]) -> list[Tensor]:
    """Return the results of a function that are no views of what it was given."""
    before = {_storage(x).data_ptr() for x in given}
    return [x for x in found if _storage(x).data_ptr() not in before or not _storage(x).data_ptr()]


def _is_gpu(device: Any) -> bool:
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return device is not None and torch.device(device).type == "cuda"


class Rehearsal(TorchFunctionMode):
    """A mode in which tensors asked for on `cuda` are host tensors that say they are there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            return self._get(func, args)
        given = _tensors((args, kwargs))
        marked = [on_gpu(x) for x in given]
        if name in ("cuda", "to", "cpu") and given and args and args[0] is given[0]:
            return self._move(func, name, args, kwargs)
        if name == "is_pinned":
            return getattr(_storage(args[0]), "pinned", False)
        if name in ("untyped_storage", "data_ptr", "storage_offset", "stride", "size", "dim", "numel", "is_contiguous"):
            return func(*args, **kwargs)
        if name == "pin_memory":
            out = args[0].clone()
            _storage(out).pinned = True
            return out
        if name == "get_device":
            return 0 if marked[0] else -1
        device = kwargs.get("device")
        asked = "device" in kwargs and device is not None
        if asked:
            kwargs = dict(kwargs, device=None if name.endswith("_like") or name.startswith("new_") else HOST)
        pinned = kwargs.pop("pin_memory", False)
        place = _is_gpu(device) if asked else any(marked)
        if pinned and place:
            raise RuntimeError("Only dense CPU tensors can be pinned")
        generator = kwargs.get("generator")
        if generator is not None and getattr(generator, "rehearsed", False) != place and not given:
            raise RuntimeError("Expected a generator of the device of the tensor")
        if name not in _MIX and not name.startswith("_") and any(marked):
            host = [x for x, m in zip(given, marked, strict=True) if not m and x.dim() > 0]
            if host and not asked:
                raise RuntimeError(
                    f"{name}: expected all tensors to be on the same device, but found at least two devices, "
                    f"cuda:0 and cpu ({[tuple(x.shape) for x in host]})"
                )
        self._check_waits(name, args, kwargs, given, marked, place and asked)
        if name == "copy_" and any(marked) and _State.recording is None:
            streams.sent(name)
        out = func(*args, **kwargs)
        for x in _fresh(given, _tensors(out)):
            if place and not (name in _MIX and not marked[0]):
                _put(x)
            if pinned:
                _storage(x).pinned = True
        return out

    def _get(self, func: Any, args: Any) -> Any:
        x = args[0]
        attribute = getattr(func.__self__, "__name__", "")
        if attribute == "device":
            return GPU if on_gpu(x) else HOST
        if attribute == "is_cuda":
            return on_gpu(x)
        if attribute == "is_cpu":
            return not on_gpu(x)
        found = func(*args)
        if attribute == "grad" and isinstance(found, Tensor) and on_gpu(x):
            _put(found)  # autograd made it, unseen
        return found

    def _move(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        x, rest, kwargs = args[0], list(args[1:]), dict(kwargs)
        target: Any = None
        if name == "cuda":
            target, rest = GPU, []
            kwargs.pop("device", None)
        elif name == "cpu":
            target = HOST
        elif "device" in kwargs:
            target = kwargs.pop("device")
        elif rest and (isinstance(rest[0], (str, torch.device)) or type(rest[0]) is int):
            target = rest.pop(0)
        elif rest and isinstance(rest[0], Tensor):
            target, rest[0] = (GPU if on_gpu(rest[0]) else HOST), rest[0].dtype
        dtype = kwargs.pop("dtype", None)
        if rest and (rest[0] is None or isinstance(rest[0], torch.dtype)):
            dtype = rest.pop(0)
        non_blocking = bool(rest.pop(0)) if rest else kwargs.pop("non_blocking", False)
        copy = bool(rest.pop(0)) if rest else kwargs.pop("copy", False)
        dtype = dtype or x.dtype
        to_gpu = on_gpu(x) if target is None else _is_gpu(target)
        moved = to_gpu != on_gpu(x)
        if moved:
            pinned = getattr(_storage(x), "pinned", False)
            if not to_gpu:
                _wait(f"{name} of a tensor of the device")
            elif not (non_blocking and pinned) and (_State.recording is not None or not non_blocking):
                _wait(f"{name}({GPU}) of pageable memory" if not pinned else f"{name}({GPU}), blocking")
        copy |= moved
        out = x.to(dtype, copy=copy, **kwargs)
        if to_gpu and out is not x:
            _put(out)
        return out

    def _check_waits(self, name: str, args: Any, kwargs: Any, given: Any, marked: list[bool], factory: bool) -> None:
        if name in _WAIT and any(marked):
            _wait(name)
        if name in ("__getitem__", "__setitem__") and marked and marked[0]:
            index = _tensors(args[1])
            if any(i.dtype in (torch.bool, torch.uint8) for i in index) and name == "__getitem__":
                _wait("an index by a mask")
            if any(i.dim() > 0 and not on_gpu(i) for i in index) or _lists(args[1]):
                _wait("an index from the host")
            value = args[2] if name == "__setitem__" else None
            if isinstance(value, Tensor) and not on_gpu(value) and value.dim() > 0:
                _wait("__setitem__ from the host")
        if name == "copy_" and len(marked) > 1 and marked[0] != marked[1]:
            non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            host = given[1] if marked[0] else given[0]
            pinned = getattr(_storage(host), "pinned", False)
            if not (pinned and non_blocking) and (_State.recording is not None or not (non_blocking and marked[0])):
                _wait(f"copy_ with {'pinned' if pinned else 'pageable'} memory, non_blocking={non_blocking}")
        if factory and name in ("tensor", "as_tensor"):
            _wait(f"torch.{name} of values of the host")
        if name == "repeat_interleave" and any(marked) and "output_size" not in kwargs:
            _wait(name)


def _plainly() -> Any:
    """Run torch's functions without the rehearsal, where it is on."""
    return _pop_mode_temporarily() if torch._C._len_torch_function_stack() else nullcontext()


class _Marker(TorchDispatchMode):
    """A mode in which what torch makes, below its functions, of tensors of the device is there, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with _plainly():
            out = func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs))
        if any(map(on_gpu, given)):
            for x in _fresh(given, _tensors(out)):
                _put(x)
        return out


class _Recorder(TorchDispatchMode):
    """A mode that keeps what torch executes, below autograd, to execute it again."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)

        def again() -> None:
            for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        assert _State.recording is not None
        _State.recording.append(again)
        return out


def _lists(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(i, list) for i in index))


class _Graph:
    """Keeps what was called while it was captured."""

    calls: list[Callable[[], None]]

    def replay(self) -> None:
        streams.sent("replay")
        with _pop_mode_temporarily(), torch.no_grad():
            for call in self.calls:
                call()

    def reset(self) -> None:
        self.calls = []

    def pool(self) -> tuple[int, int]:
        return (0, 0)


@contextmanager
def _graph(graph: _Graph, pool: Any = None, stream: Any = None, capture_error_mode: str = "global") -> Iterator[None]:
    if _State.recording is not None:
        raise RuntimeError("a capture inside a capture")
    _State.recording = []
    try:
        with _Recorder():
            yield
        graph.calls = _State.recording
    finally:
        _State.recording = None


class _Launcher:
    """Stands for kernel[grid]: runs under the interpreter, and is given what a chip would be told."""

    OPTIONS = ("num_warps", "num_stages", "launch_pdl", "launch_cooperative_grid", "enable_fp_fusion")

    def __init__(self, launch: Any, name: str) -> None:
        self.launch, self.name = launch, name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        for i, x in enumerate((*args, *kwargs.values())):
            if isinstance(x, Tensor) and not on_gpu(x) and not getattr(_storage(x), "pinned", False):
                raise ValueError(f"{self.name}: pointer argument (at {i}) cannot be accessed from Triton (cpu tensor?)")
        kwargs = {k: v for k, v in kwargs.items() if k not in self.OPTIONS}
        if "PDL" in kwargs:
            kwargs["PDL"] = False

        def run() -> None:
            with _plainly(), _disable_current_modes():
                if _State.kernels:
                    self.launch(*args, **kwargs)

        run()
        if _State.recording is None:
            streams.sent(self.name)
        else:
            _State.recording.append(run)


def begin() -> None:
    """Rehearse from here on, in this process. Before the kernels are imported."""
    cuda: Any = torch.cuda
    properties = types.SimpleNamespace(
        multi_processor_count=132, name="rehearsed", total_memory=141 * 10**9, major=9, minor=0
    )
    streams.refuse.append(_refuse)

    def sync(*_: Any) -> None:
        streams.host_waits("synchronize", asked=True)

    def debug(mode: Any) -> None:
        _State.sync_debug = mode

    generator = torch.Generator

    class Generator(generator):  # type: ignore[misc, valid-type]
        """A generator of either place; draws of the device are the host's."""

        rehearsed = False

        def __new__(cls, device: Any = "cpu") -> Any:
            made = super().__new__(cls, "cpu")
            made.rehearsed = _is_gpu(device)
            return made

        @property
        def device(self) -> torch.device:
            return GPU if self.rehearsed else HOST

    replaced: dict[str, Any] = dict(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_device_capability=lambda d=None: (9, 0),
        get_device_name=lambda d=None: "NVIDIA rehearsal",
        get_device_properties=lambda d=None: properties,
        synchronize=sync,
        set_sync_debug_mode=debug,
        Stream=streams.Stream,
        Event=streams.Event,
        current_stream=streams.current,
        default_stream=streams.default,
        stream=streams.on,
        device=lambda d: nullcontext(),
        device_of=lambda x: nullcontext(),
        CUDAGraph=_Graph,
        graph=_graph,
        memory_stats=lambda d=None: {"num_device_alloc": 0},
        memory_allocated=lambda d=None: 0,
        max_memory_allocated=lambda d=None: 0,
        reset_peak_memory_stats=lambda d=None: None,
        empty_cache=lambda: None,
        mem_get_info=lambda d=None: (140 * 10**9, 141 * 10**9),
        is_current_stream_capturing=lambda: _State.recording is not None,
    )
    for name, value in replaced.items():
        setattr(cuda, name, value)
    torch.Generator = Generator  # type: ignore[misc]

    custom_op: Any = torch.library.custom_op

    def rehearsed_op(name: str, **options: Any) -> Any:
        # An op is called with the mode taken off, too.
        def decorate(body: Any) -> Any:
            @functools.wraps(body)
            def rehearsed(*args: Any) -> Any:
                with nullcontext() if torch._C._len_torch_function_stack() else Rehearsal():
                    return body(*args)

            return custom_op(name, **options)(rehearsed)

        return decorate

    torch.library.custom_op = rehearsed_op  # type: ignore[assignment]
    from tdmpc2_fast.kernels.device import launch

    why_not = launch.why_not
    for module in list(sys.modules.values()):
        for attribute, value in list(vars(module).items()):
            if value is why_not:
                setattr(module, attribute, lambda device: None)
    from triton.runtime.interpreter import InterpretedFunction

    interpreted = InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        def launch_it(*args: Any, **kwargs: Any) -> None:
            interpreted(self, *args, grid=grid, warmup=warmup, **kwargs)

        _Launcher(launch_it, self.__name__)(*args, **kwargs)

    InterpretedFunction.run = run
    from tdmpc2_fast.runtime import cuda_graph

    cuda_graph._WARM_UP_RUNS = 1
    engine: Any = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

    def run_backward(roots: Any, gradients: Any, *args: Any, **kwargs: Any) -> Any:
        for x, d in zip(roots, gradients, strict=True):
            if isinstance(d, Tensor) and on_gpu(x):
                _put(d)
        # It is called with the mode taken off, and calls the backward functions of ops.
        with Rehearsal(), _Marker():
            return engine(roots, gradients, *args, **kwargs)

    torch.autograd._engine_run_backward = run_backward  # type: ignore[attr-defined]
    Rehearsal().__enter__()
