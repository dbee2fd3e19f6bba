"""What a file is, by its first bytes and its table of contents; files of other programs are answered by name.

Nothing is executed, unpacked or imported, and little is read: what a file claims is compared with its size first.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError
from . import dry_pickle

_ALLOWED = "allowed: a checkpoint of tdmpc2-fast (.safetensors), or what torch.save(model.state_dict(), path) writes"
_HEAD = 4096
_LONGEST_HEADER = 100_000_000  # of a safetensors file, which refuses longer ones itself
_NEWEST_PROTOCOL = 3  # of a pickle, that torch.load(weights_only=True) reads
_MOST_ENTRIES = 65_535
_MOST_DIRECTORY = 16 << 20  # bytes of an archive's table of contents, which become objects at once
_LONGEST_END = 22 + 65_535  # of a zip archive: its last record and a comment
_DAMAGED = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError)
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf": "7z",
}
_BEGINNINGS = {
    b"\x89HDF\r\n\x1a\n": "an HDF5 file, as of Keras",
    b"GGUF": "a GGUF file, as of llama.cpp",
    b"version https://git-lfs": "a Git LFS pointer, not the file it points to: run git lfs pull",
    b"\x93NUMPY": "a NumPy array",
}
_FOLDERS = {
    "_METADATA": "an Orbax checkpoint of JAX",
    "_CHECKPOINT_METADATA": "an Orbax checkpoint of JAX",
    "manifest.ocdbt": "an Orbax checkpoint of JAX",
    "saved_model.pb": "a TensorFlow SavedModel",
    ".metadata": "a distributed checkpoint of torch",
    "adapter_config.json": "an adapter of PEFT",
    "model_index.json": "a pipeline of Diffusers",
}
# Names of tensors that tell whose they are, in the order in which they are tried.
_NAMES = {
    "Stable-Baselines3": r"mlp_extractor\.|features_extractor\.|(action|value|q)_net\.\d|critic\.qf\d",
    "Diffusers": r"(down|up|mid)_blocks?\.|(unet|vae|text_encoder)\.|add_embedding\.|time_embed",
    "Transformers": r"(encoder|decoder|h|layers|blocks)\.\d+\.|transformer\.|lm_head|embed_tokens|bert\.|roberta\.",
}
_MESSAGE_PACK = {*range(0x81, 0x90), 0xDE, 0xDF}  # maps, which Flax writes; their first key is a text
_MESSAGE_PACK_TEXT = {*range(0xA0, 0xC0), 0xD9, 0xDA}
_ONNX_FIELDS = {0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42}


def check(path: Path) -> bool:
    """Return whether a file is safetensors; otherwise torch may open it, with `weights_only=True`.

    Raises:
        CheckpointError: it is of another kind, which is named, or claims more than it holds.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(_HEAD)
    length = int.from_bytes(head[:8], "little")
    safetensors = head[8:9] == b"{" and length <= min(size - 8, _LONGEST_HEADER)
    what = _safetensors(path, length) if safetensors else _kind(path, head, size)
    if what is not None:
        raise CheckpointError(f"checkpoint {str(path)!r}: {what}, {_ALLOWED}")
    return safetensors


def folder(path: Path) -> str | None:
    """Name the folder of another library; None where it is none that is known."""
    return next((what for name, what in _FOLDERS.items() if (path / name).exists()), None)


def whose(names: Iterable[str]) -> str:
    """Return `" (its names are those of LIBRARY: NAME, NAME)"`, or an empty string where they tell no library."""
    names = list(names)
    for library, pattern in _NAMES.items():
        if found := [n for n in names if re.match(rf"(.*\.)?({pattern})", n)]:
            return f" (its names are those of {library}: {', '.join(found[:2])})"
    return ""


def _kind(path: Path, head: bytes, size: int) -> str | None:
    """Say what a file is that is not opened; None for one that is."""
    if not size:
        return "an empty file (truncated?)"
    for begin, what in _BEGINNINGS.items():
        if head.startswith(begin):
            return what
    for begin, program in _COMPRESSED.items():
        if head.startswith(begin):
            return f"a compressed file ({program}), which has to be unpacked first"
    if head[257:262] == b"ustar":
        return "a tar archive, which has to be unpacked first"
    if head.startswith(b"PK"):
        return _archive(path, size)
    if head[:1] == b"\x80":
        return _pickle(path, size)
    if path.suffix == ".safetensors" and head[8:9] == b"{":
        return "a safetensors file that is truncated"
    first = head[{0xDE: 3, 0xDF: 5}.get(head[0], 1) :][:1]
    if head[0] in _MESSAGE_PACK and first and first[0] in _MESSAGE_PACK_TEXT:
        return "a MessagePack file, as of Flax"
    if head[0] == 0x08 and len(head) > 2 and head[1] < 0x20 and head[2] in _ONNX_FIELDS:
        return "an ONNX model, which is a program and not weights of this one"
    return _text(head) or "no checkpoint of a known kind (truncated or damaged?)"


def _text(head: bytes) -> str | None:
    """Say what kind of text a file begins with; None where it is no text."""
    try:
        text = head[: head.rfind(b"\n") + 1 or None].decode().lstrip("\ufeff \t\r\n")
    except UnicodeDecodeError:
        return None
    if any(ord(c) < 32 and c not in "\t\r\n\f" for c in text):
        return None
    if re.match(r"<!doctype html|<html|<head|<\?xml|<!--", text, re.IGNORECASE):
        return "a web page, as a download that failed leaves"
    return "a JSON file" if text[:1] in ("{", "[") else "a text file"


def _safetensors(path: Path, length: int) -> str | None:
    """Say what is in a safetensors file that has no model of ours; damage is for its own reader to tell."""
    with path.open("rb") as f:
        f.seek(8)
        try:
            header = json.loads(f.read(length))
        except (ValueError, RecursionError):
            return "a safetensors file that is damaged"
    if not isinstance(header, dict):
        return "a safetensors file that is damaged"
    metadata = header.pop("__metadata__", None)
    if (isinstance(metadata, dict) and "manifest" in metadata) or any("_dynamics." in name for name in header):
        return None
    return f"safetensors with no manifest of tdmpc2-fast in its header and no TD-MPC2 model{whose(header)}"


def _archive(path: Path, size: int) -> str | None:
    """Say what is in a zip archive that is not what `torch.save` writes."""
    inner = entries(path)
    if isinstance(inner, str):
        return inner
    try:
        with zipfile.ZipFile(path) as z:
            data, held = z.read(inner["data.pkl"]), {k[5:]: e.file_size for k, e in inner.items() if k[:5] == "data/"}
    except _DAMAGED as e:
        return f"a zip archive that is truncated or damaged ({e})"
    what = tried(data, lambda: dry_pickle.zipped(data, held))
    if what is None and data[:1] == pickle.PROTO and data[1] > _NEWEST_PROTOCOL:
        what = f"a pickle of protocol {data[1]}, which torch opens no weights of: torch.save takes 2 by itself"
    return what


def entries(path: Path) -> dict[str, zipfile.ZipInfo] | str:
    """Return the entries of an archive that `torch.save` wrote, by their names in it; of another file, what it is.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(_HEAD)
        if not head.startswith(b"PK"):
            return _kind(path, head, size) or "a file of torch before 1.6"
        if (held := _directory_bytes(f, size)) > _MOST_DIRECTORY:
            return f"a zip archive whose table of contents claims {held:,} bytes, allowed: {_MOST_DIRECTORY:,}"
    try:
        with zipfile.ZipFile(path) as z:
            found = z.infolist()
            top = found[0].filename.partition("/")[0] + "/" if found else ""  # torch puts all into one folder
            top = top if all(e.filename.startswith(top) for e in found) else ""
            inner = {e.filename.removeprefix(top): e for e in found}
            return _other_archive(inner) or _wrong_sizes(found, size) or inner
    except _DAMAGED as e:
        return f"a zip archive that is truncated or damaged ({e})"


def _directory_bytes(f: BinaryIO, size: int) -> int:
    """Return the bytes that the table of contents of an archive claims; 0 where there is none."""
    f.seek(max(size - _LONGEST_END, 0))
    tail = f.read(_LONGEST_END)
    at = tail.rfind(b"PK\5\6")
    if at < 0 or len(tail) < at + 22:
        return 0
    held = int.from_bytes(tail[at + 12 : at + 16], "little")
    if tail[max(at - 20, 0) : at].startswith(b"PK\6\7"):  # the larger one stands elsewhere
        f.seek(min(int.from_bytes(tail[at - 12 : at - 4], "little"), size))
        record = f.read(56)
        held = int.from_bytes(record[40:48], "little") if record.startswith(b"PK\6\6") else held
    return held


def _other_archive(inner: dict[str, zipfile.ZipInfo]) -> str | None:
    names = {*inner}
    bases = {n.rpartition("/")[2] for n in names}
    if "constants.pkl" in bases and any(n.startswith("code/") or "/code/" in n for n in names):
        return "a TorchScript archive, which holds code and is not opened"
    if bases & {"archive_format", "serialized_exported_program.json"} or any(n.startswith("models/") for n in names):
        return "a program of torch.export (.pt2), which holds code and is not opened"
    if "extern_modules" in bases:
        return "an archive of torch.package, which holds code and is not opened"
    if "policy.pth" in bases:
        return "an agent of Stable-Baselines3"
    if "model.weights.h5" in bases:
        return "a Keras model"
    if "data.pkl" in names:
        return None
    if names and all(n.endswith(".npy") for n in names):
        return "arrays of NumPy (.npz)"
    held = sorted(bases, key=lambda n: not n.endswith((".pt", ".pth", ".safetensors", ".zip")))
    return f"a zip archive with {', '.join(map(repr, held[:2])) or 'nothing'} in it, which has to be unpacked first"


def _wrong_sizes(entries: list[zipfile.ZipInfo], size: int) -> str | None:
    """Say where an archive's table claims more than there is, as one does that grows when it is unpacked."""
    if len(entries) > _MOST_ENTRIES:
        return f"a zip archive of {len(entries):,} entries, more than a checkpoint has"
    if packed := [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]:
        return f"a zip archive whose entries are compressed ({packed[0]!r}), which torch.save leaves as they are"
    if (claimed := sum(e.file_size for e in entries)) > size or any(e.file_size != e.compress_size for e in entries):
        return f"a zip archive whose entries claim {claimed:,} bytes in a file of {size:,}"
    if len({e.filename for e in entries}) < len(entries):
        return "a zip archive with two entries of one name"
    if pickles := [e for e in entries if e.filename.endswith("data.pkl") and e.file_size > dry_pickle.MOST_BYTES]:
        return f"a zip archive with a pickle of {pickles[0].file_size:,} bytes, more than a state dict takes"
    return None


def _pickle(path: Path, size: int) -> str | None:
    with path.open("rb") as f:
        head = f.read(dry_pickle.MOST_BYTES)

    def other() -> str | None:
        return None if dry_pickle.plain(head, size) else "a pickle that torch.save has not written, and refused"

    return tried(head, other)


def tried(data: bytes, check: Callable[[], str | None]) -> str | None:
    """Return what a check says, or what its errors say of the pickle `data`."""
    try:
        return check()
    except dry_pickle.RefusedError as e:
        if b"pytorch-lightning_version" in data:
            return f"a Lightning checkpoint, refused: beside its state_dict it holds more than weights ({e})"
        if b"_parameters" in data and b"_modules" in data:
            return f"a pickled module (torch.save(model)), refused: it names code that would be run ({e})"
        return f"refused, it holds more than weights ({e})"
    except dry_pickle.ClaimError as e:
        return f"refused, its pickle claims what is not there: {e}"
    except Exception as e:  # of bytes that are no pickle
        return f"a pickle that is truncated or damaged ({type(e).__name__}: {e})"
