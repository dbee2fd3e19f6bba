"""Files of other programs, and files that claim what they do not hold: answered by name; nothing of them runs."""

from __future__ import annotations

import collections
import io
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import save_file
from torch import nn

from tdmpc2_fast import TDMPC2, Planner, load
from tdmpc2_fast.compat.dry_pickle import MAGIC
from tdmpc2_fast.errors import CheckpointError
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.train import cli

GIGABYTE = 1 << 30


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as z:
            for name, blob in entries.items():
                z.writestr(name, blob)

    return write


def of(blob: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(blob)

    return write


def of_state(state: Any, **how: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(state, path, **how)


class Marked(nn.Module):
    """A module whose class leaves a mark when it is unpickled."""

    ran = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).ran = True


def tensors(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(2) for name in names}


ONNX = bytes([0x08, 0x09, 0x12, 0x07]) + b"pytorch"
FLAX = bytes([0x81, 0xA6]) + b"params" + bytes([0x80])
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
KERAS = {"metadata.json": b"{}", "config.json": b"{}", "model.weights.h5": b"\x89HDF"}
SB3 = {"data": b"{}", "policy.pth": b"PK", "_stable_baselines3_version": b"2.3.0"}
EXPORT = {"x/archive_format": b"pt2", "x/models/model.json": b"{}"}
SCRIPT = {"x/constants.pkl": b"", "x/code/__torch__.py": b"", "x/data.pkl": b"\x80\x02}."}
OTHERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "TorchScript": (zipped(SCRIPT), "a TorchScript archive, which holds code and is not opened"),
    "torch.export": (zipped(EXPORT), r"a program of torch.export \(.pt2\), which holds code"),
    "torch.package": (zipped({"x/.data/extern_modules": b"", "x/m.py": b""}), "torch.package, which holds code"),
    "module": (of_state(Marked()), r"a pickled module \(torch.save\(model\)\), refused: .*test_foreign_files.Marked"),
    "Lightning": (
        of_state({"pytorch-lightning_version": "2", "state_dict": {}, "hyper_parameters": {"at": Path("x")}}),
        r"a Lightning checkpoint, refused: .*pathlib.*Path",
    ),
    "Lightning's plain": (
        of_state({"pytorch-lightning_version": "2", "state_dict": tensors("encoder.layers.0.weight")}),
        "no TD-MPC2 model .*those of Transformers",
    ),
    "Stable-Baselines3": (zipped(SB3), "an agent of Stable-Baselines3"),
    "its policy": (of_state(tensors("mlp_extractor.policy_net.0.weight")), "those of Stable-Baselines3: mlp_extr"),
    "Keras": (zipped(KERAS), "a Keras model"),
    "HDF5": (of(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file, as of Keras"),
    "ONNX": (of(ONNX), "an ONNX model"),
    "GGUF": (of(b"GGUF" + bytes(20)), "a GGUF file"),
    "npz": (lambda path: np.savez(path.open("wb"), a=np.ones(2)), r"arrays of NumPy \(.npz\)"),
    "npy": (lambda path: np.save(path.open("wb"), np.ones(2)), "a NumPy array"),
    "Flax": (of(FLAX), "a MessagePack file, as of Flax"),
    "empty": (of(b""), "an empty file"),
    "web page": (of(b"\n<!DOCTYPE html>\n<html>404</html>"), "a web page, as a download that failed leaves"),
    "text": (of("Entry not found · ü".encode()), "a text file"),
    "JSON": (of(b'{"error": "no"}'), "a JSON file"),
    "Git LFS": (of(LFS), "a Git LFS pointer.*git lfs pull"),
    "gzip": (of(b"\x1f\x8b\x08" + bytes(20)), r"a compressed file \(gzip\)"),
    "tar": (of(bytes(257) + b"ustar" + bytes(300)), "a tar archive"),
    "zip of files": (zipped({"run/best.pt": b"x", "run/notes.txt": b""}), "a zip archive with 'best.pt', 'notes.txt'"),
    "random": (of(bytes(range(200, 256)) * 9), r"no checkpoint of a known kind \(truncated or damaged"),
    "arrays": (of_state({"a": np.ones(2)}), "refused, it holds more than weights .*_reconstruct"),
    "plain pickle": (of(pickle.dumps({"a": 1})), "a pickle that torch.save has not written"),
    "protocol 4": (of_state({"a": 1}, pickle_protocol=4), "a pickle of protocol 4, .*torch.save takes 2"),
    "sparse": (of_state({"a": torch.ones(2).to_sparse()}), "refused, .*_rebuild_sparse_tensor"),
    "without numbers": (of_state({"a": torch.empty(10**12, device="meta")}), "refused, .*_rebuild_meta_tensor"),
    "complex": (of_state({"_pi.0.bias": torch.ones(2, dtype=torch.complex64)}), "_pi.0.bias: got a tensor .*complex64"),
    "old pickle": (of(pickle.dumps([1], protocol=0)), "a text file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_others_are_answered_by_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write, words = OTHERS[name]
    path = tmp_path / "x.pt"
    write(path)
    for use in (TDMPC2(tiny_config()).load, load, Planner.from_checkpoint):
        with pytest.raises(CheckpointError, match=words) as caught:
            use(path)  # type: ignore[operator]
        assert str(caught.value).startswith(f"checkpoint '{path}': ")
        assert "allowed: " in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not Marked.ran
    assert cli.main(["info", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: checkpoint '{path}': ")


@pytest.mark.parametrize(
    ("names", "library"),
    [
        (["down_blocks.0.resnets.0.conv1.weight", "mid_block.x"], "Diffusers"),
        (["model.layers.0.self_attn.q_proj.weight", "lm_head.weight"], "Transformers"),
        (["policy.mlp_extractor.policy_net.0.weight"], "Stable-Baselines3"),
        (["x"], ""),
    ],
)
def test_safetensors_of_others_are_known_by_their_names(tmp_path: Path, names: list[str], library: str) -> None:
    save_file(tensors(*names), tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no manifest of tdmpc2-fast") as caught:
        load(tmp_path / "a")
    assert (f"those of {library}: " if library else "header and no TD-MPC2 model, ") in str(caught.value)


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    agent = TDMPC2(tiny_config())
    agent.save(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").rename(tmp_path / "b.bin")
    load(tmp_path / "b.bin")


FOLDERS = {
    "_CHECKPOINT_METADATA": "an Orbax checkpoint",
    "saved_model.pb": "a TensorFlow SavedModel",
    ".metadata": "a distributed checkpoint of torch",
    "model_index.json": "a pipeline of Diffusers",
}


@pytest.mark.parametrize("inside", FOLDERS)
def test_folders_of_others(inside: str, tmp_path: Path) -> None:
    (tmp_path / inside).touch()
    with pytest.raises(CheckpointError, match=f"{FOLDERS[inside]}.*allowed: a run folder"):
        load(tmp_path)


def with_pickle(data: bytes, storages: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """The entries of what `torch.save` writes, with this pickle in it."""
    held = {f"a/data/{k}": v for k, v in (storages or {}).items()}
    return {"a/data.pkl": data, "a/byteorder": b"little", **held, "a/version": b"3\n"}


def tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...], key: str = "0") -> bytes:
    """A pickle of `{"_pi.0.bias": tensor}` whose storage claims to have `numel` floats."""
    out = io.BytesIO()

    class P(pickle._Pickler):
        dispatch = {**pickle._Pickler.dispatch}  # noqa: RUF012

        def persistent_id(self, x: Any) -> Any:
            return ("storage", torch.FloatStorage, key, "cpu", numel) if x is P else None

    class T:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (P, 0, size, stride, False, collections.OrderedDict())

    P(out, 2).dump({"_pi.0.bias": T()})
    return out.getvalue()


def nested(depth: int) -> bytes:
    """A dict in a dict in a dict, written without recursion."""
    opened = pickle.EMPTY_DICT + pickle.BINUNICODE + struct.pack("<I", 1) + b"a"
    return pickle.PROTO + b"\x02" + opened * depth + pickle.NONE + pickle.SETITEM * depth + pickle.STOP


def laughs(depth: int) -> bytes:
    """A dict that holds another one twice, which holds another one twice, ...: 2^depth by paths, `depth` in memory."""
    x: dict[str, Any] = {}
    for _ in range(depth):
        x = {"a": x, "b": x}
    return pickle.dumps(x, protocol=2)


def large_in_a_memo() -> bytes:
    return pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.LONG_BINPUT + struct.pack("<I", 2**32 - 1) + pickle.STOP


def bytes_of_an_int() -> bytes:
    return pickle.PROTO + b"\x02" + b"cbuiltins\nbytearray\n" + pickle.BININT + struct.pack("<i", 2**31 - 1) + b"\x85R."


def legacy(object_: bytes, claimed: list[str]) -> bytes:
    head = [pickle.dumps(x, protocol=2) for x in (MAGIC, 1001, dict(little_endian=True))]
    return b"".join([*head, object_, pickle.dumps(claimed, protocol=2)])


def claiming(path: Path) -> None:
    """An archive of which an entry's line in the table claims more than the entry has."""
    zipped(with_pickle(tensor(4, (4,), (1,)), {"0": bytes(16)}))(path)
    blob = bytearray(path.read_bytes())
    at = blob.rfind(b"PK\x01\x02", 0, blob.rfind(b"a/data/0"))  # its line in the table of contents
    blob[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
    path.write_bytes(blob)


def a_chain_of_archives() -> bytes:
    blob = bytes(GIGABYTE // 64)
    for _ in range(3):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("x.zip", blob)
        blob = out.getvalue()
    return blob


TWICE = b"K\x01" + b"2\x86" * 60
"""A pair of the same pair of the same pair ...: small, and as long as the universe is old to hash or to print."""
LONG = b"\x8b" + struct.pack("<I", 10**6) + b"\x7f" * 10**6
STORAGE = b"X\x07\x00\x00\x00storage", b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
KEYS_OF_PAIRS = dict(
    setitem=b"\x80\x02}" + TWICE + b"K\x01s.",
    setitems=b"\x80\x02}(" + TWICE + b"K\x01u.",
    dict=b"\x80\x02(" + TWICE + b"K\x01d.",
    additems=b"\x80\x04\x8f(" + TWICE + b"\x90.",
    frozenset=b"\x80\x04(" + TWICE + b"\x91.",
    ordered=b"\x80\x02ccollections\nOrderedDict\n(](" + TWICE + b"K\x01\x86etR.",
)

BOMBS: dict[str, tuple[Callable[[Path], None], str]] = {
    "compressed": (
        zipped(with_pickle(bytes(GIGABYTE // 64)), zipfile.ZIP_DEFLATED),
        r"entries are compressed \('a/data.pkl'\)",
    ),
    "nested archives": (of(a_chain_of_archives()), "a zip archive with 'x.zip' in it"),
    "claimed sizes": (claiming, r"entries claim 2,147,48\d,\d+ bytes in a file of"),
    "many entries": (zipped({f"a/{i}": b"" for i in range(65_540)} | with_pickle(b"}.")), "65,543 entries"),
    "large pickle": (zipped(with_pickle(b"\x80\x02" + b"]" * (9 << 20))), "a pickle of 9,437,186 bytes"),
    "storage": (
        zipped(with_pickle(tensor(10**12, (4,), (1,)), {"0": bytes(16)})),
        "claims what is not there: storage 0 of 4,000,000,000,000 bytes, of which 16 are there",
    ),
    "no storage": (zipped(with_pickle(tensor(4, (4,), (1,), key="7"), {"0": bytes(16)})), "storage 7 of 16 bytes"),
    "expanded": (
        zipped(with_pickle(tensor(1, (10**6, 10**6), (0, 0)), {"0": bytes(4)})),
        "a tensor of 1,000,000,000,000 numbers in a storage of 1",
    ),
    "beyond its storage": (
        zipped(with_pickle(tensor(4, (2,), (4,)), {"0": bytes(16)})),
        "a tensor of 2 numbers in a storage of 4",
    ),
    "negative": (zipped(with_pickle(tensor(4, (-1,), (1,)), {"0": bytes(16)})), "refused|damaged"),
    "deep": (zipped(with_pickle(nested(100_000))), "dicts and lists more than 64 deep"),
    "laughs": (zipped(with_pickle(laughs(50))), "more than 1,000,000 names"),
    "memo": (zipped(with_pickle(large_in_a_memo())), "no TD-MPC2 model"),
    "bytearray": (zipped(with_pickle(bytes_of_an_int())), r"holds more than weights \(builtins.bytearray\)"),
    "protocol 5": (zipped(with_pickle(b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b".")), "damaged"),
    "before 1.6": (
        of(legacy(tensor(10**12, (4,), (1,)), ["0"])),
        "storages of 4,000,000,000,000 bytes in a file of",
    ),
    **{f"key by {k}": (of(x), "a dict with a key of the type tuple") for k, x in KEYS_OF_PAIRS.items()},
    **{f"zipped key by {k}": (zipped(with_pickle(x)), "a key of the type tuple") for k, x in KEYS_OF_PAIRS.items()},
    "kind of a storage": (of(b"\x80\x02(" + TWICE + STORAGE[1] + b"."), "a storage of another kind"),
    "sizes": (
        of(
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
            + b"".join(STORAGE)
            + b"K\x00("
            + LONG
            + b"2" * 1999
            + b"t("
            + b"K\x01" * 2000
            + b"t\x89NtR."
        ),
        "a tensor of sizes that none can have",
    ),
    "empty pickle": (zipped(with_pickle(b"")), "truncated or damaged"),
    "pickle of one byte": (zipped(with_pickle(b".")), "truncated or damaged"),
    "pickle without a protocol": (zipped(with_pickle(b"}.")), "no TD-MPC2 model"),
    "cut pickle": (zipped(with_pickle(tensor(4, (4,), (1,))[:-9], {"0": bytes(16)})), "truncated or damaged"),
    "header of safetensors": (of(struct.pack("<Q", 10**15) + b"{"), "truncated|known kind"),
}


def at_most(more: int) -> str:
    """A program that reads a file, with no more memory than it has at the start and `more`."""
    return f"""
import resource, sys
from tdmpc2_fast.model import checkpoint
from tdmpc2_fast.compat.state_dict import unwrapped
from tdmpc2_fast.errors import CheckpointError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {more},) * 2)
for path in sys.argv[1:]:
    try:
        unwrapped(checkpoint.read(path)[0], repr(path))
    except CheckpointError as e:
        print(e)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are those of Linux")
def test_files_that_claim_more_than_they_hold_take_little_memory(tmp_path: Path) -> None:
    """All in one process, which has 600 MB more than at its start."""
    paths = []
    for name, (write, _) in BOMBS.items():
        paths.append(tmp_path / f"{name}.pt")
        write(paths[-1])
    command = [sys.executable, "-c", at_most(600 << 20), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.splitlines()
    assert len(answers) == len(BOMBS)
    for (name, (_, words)), path, answer in zip(BOMBS.items(), paths, answers, strict=True):
        assert answer.startswith(f"checkpoint '{path}': "), name
        with pytest.raises(CheckpointError, match=words):
            raise CheckpointError(answer)


def test_what_torch_writes_is_let_through(tmp_path: Path) -> None:
    """Each form of it: older than 1.6, parameters, buffers of other types, views, optimisers beside the model."""
    agent = TDMPC2(tiny_config())
    state = {**agent.model.state_dict(), "_pi.0.bias": torch.zeros(48)[::2]}
    optimiser = torch.optim.Adam(agent.model.parameters())
    optimiser.zero_grad()
    for p in agent.model.parameters():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    everything = {"model": state, "optim": optimiser.state_dict(), "step": 3, "names": ["a", ("b",)], "rng": b"x"}
    parameters = {**state, **dict(agent.model.named_parameters())}
    halves = {k: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    for i, content in enumerate((everything, parameters, halves, {"model": agent.model.state_dict()})):
        for legacy_ in (False, True):
            torch.save(content, tmp_path / f"{i}.pt", _use_new_zipfile_serialization=not legacy_)
            agent.load(tmp_path / f"{i}.pt")


def test_dicts_in_themselves_are_answered() -> None:
    state: dict[str, Any] = {}
    state["again"] = state
    with pytest.raises(CheckpointError, match="dicts more than 64 deep"):
        TDMPC2(tiny_config()).load(state)


def test_a_file_one_may_not_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TDMPC2(tiny_config()).save(tmp_path / "a.pt")

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(CheckpointError, match=r"a\.pt': cannot be read: Permission denied"):
        checkpoint.read(tmp_path / "a.pt")
