"""Files on the Hugging Face Hub by address: `hf://OWNER/NAME/FILE`, of a revision `hf://OWNER/NAME@REV/FILE`.

Without FILE it is the repository's `model.safetensors`, which `push` writes, or else `best`, `agent` or `latest`
(`.safetensors`, also in `checkpoints/`), or else its only file of weights. Downloads are kept in the Hub's own cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

from ..errors import CheckpointError
from ..version import __version__

_ADDRESS = re.compile(r"hf:/{1,2}([^/@]+/[^/@]+)(?:@([^/@]+))?(?:/(.+?))?(?:@([^/@]+))?/?")
_FORM = "hf://OWNER/NAME[@REVISION][/FILE]"
_GUESSES = ("model", "best", "checkpoints/best", "agent", "latest", "checkpoints/latest")
_ENDINGS = (".safetensors", ".pt", ".pth")
_UNAUTHORISED, _FORBIDDEN = 401, 403


class Address(NamedTuple):
    """Where a file is on the Hub; `file` is empty for the one that stands for its repository."""

    repo: str
    revision: str | None
    file: str

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{quote(self.revision, safe='')}"
        return f"hf://{self.repo}{revision}{'/' if self.file else ''}{self.file}"


def is_address(path: object) -> bool:
    """Tell whether a path is one of the Hub."""
    return isinstance(path, (str, os.PathLike)) and re.match("hf:/", str(os.fspath(path))) is not None


def address(path: object) -> Address:
    """Return the parts of an address.

    Raises:
        CheckpointError: it is none.
    """
    found = _ADDRESS.fullmatch(str(path))
    if found is None or (found[2] and found[4]):
        raise CheckpointError(f"checkpoint {str(path)!r}: no address on the Hub, allowed: {_FORM}")
    revision = found[2] or found[4]
    return Address(found[1], unquote(revision) if revision else None, found[3] or "")


def fetch(path: object, token: str | bool | None = None, local_only: bool = False) -> Path:
    """Return the file at an address, downloaded unless it is in the cache.

    token: the Hub's, where it is not the one that is logged in.
    local_only: whether to look in the cache only.

    Raises:
        CheckpointError: no package, repository, file, permission or network; the message says what to do.
    """
    repo, revision, file = path if isinstance(path, Address) else address(path)
    hub = package(f"checkpoint {str(path)!r}")
    try:
        if not file:
            names = hub.HfApi(token=token, library_name="tdmpc2-fast").list_repo_files(repo, revision=revision)
            file = _guess(names, path)
        found = hub.hf_hub_download(
            repo,
            file,
            revision=revision,
            token=token,
            library_name="tdmpc2-fast",
            library_version=__version__,
            local_files_only=local_only,
        )
    except CheckpointError:
        raise
    except Exception as e:  # of several packages, by version: that of the Hub, its HTTP client, the system
        raise CheckpointError(f"checkpoint {str(path)!r}: {explained(e, repo)}") from e
    return Path(found)


def package(what: str) -> Any:
    """Import huggingface_hub, when it is first needed."""
    try:
        import huggingface_hub
    except ImportError as e:
        raise CheckpointError(f"{what}: needs huggingface_hub; pip install 'tdmpc2-fast[hub]'") from e
    return huggingface_hub


def explained(error: Exception, repo: str) -> str:
    """Say what an error of the Hub means and what to do, in one line."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"the repository {repo} is gated: ask for access on its page, then log in by `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the repository {repo} has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no repository {repo}, or a private one: check the name, or log in by `hf auth login`"
    if isinstance(error, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)) or _of_transport(error):
        return "the Hub cannot be reached, and the file is not in the cache: check the network, or give a local file"
    if isinstance(error, errors.EntryNotFoundError):
        return f"no such file in {repo}; hf://{repo} alone takes the one that stands for it"
    if status in (_UNAUTHORISED, _FORBIDDEN):
        return f"the Hub refuses access to {repo} ({status}): log in by `hf auth login`, with a token that may"
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else 'no reason given'}"


def _of_transport(error: Exception) -> bool:
    """Tell whether an error of the HTTP client, which has had several names, is one of reaching a server."""
    return "TransportError" in {c.__name__ for c in type(error).__mro__}


def _guess(names: Sequence[str], path: object) -> str:
    """Return the file of a repository that stands for it."""
    for guess in _GUESSES:
        if f"{guess}.safetensors" in names:
            return f"{guess}.safetensors"
    for ending in _ENDINGS:
        if len(found := [n for n in names if n.endswith(ending)]) == 1:
            return found[0]
    weights = [n for n in names if n.endswith(_ENDINGS)]
    more = f", ... ({len(weights)})" if len(weights) > 5 else ""
    what = f"one of its files: {', '.join(weights[:5])}{more}" if weights else "a repository with weights in it"
    raise CheckpointError(f"checkpoint {str(path)!r}: no file stands for it, allowed: {what}")
