"""Sets of tasks that a person names: `task=walker-walk,cup-catch as=two`, or a file that lists them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.task_sets import own_set

_FILES = (".yaml", ".yml")
_FORM = "`name: NAME`, `tasks:` and under it `- TASK` lines"


def is_file(task: str) -> bool:
    """Tell whether `task=` names a file with a set of tasks."""
    return task.endswith(_FILES)


def one_model(task: str, name: str | None) -> dict[str, Any]:
    """Return the config keys of one model for several tasks.

    Args:
        task: tasks with commas between them, or a file that lists them.
        name: what the set is to be called, `as=`; None takes the name that the file has.

    Raises:
        ConfigError: no such file, one in another form, or a name that is taken or cannot be a folder's.
    """
    if is_file(task):
        own, tasks = _read(Path(task).expanduser())
        name = own if name is None else name
    else:
        tasks = [word.strip() for word in task.split(",")]
    if "" in tasks or not tasks:
        raise ConfigError(f"config key 'task': got {task!r}, allowed with as=: a task between any two commas")
    return own_set(tasks, name)


def _read(path: Path) -> tuple[str, list[str]]:
    """Return name and tasks of a file: as much of YAML as a list of names takes, and nothing else."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or e
        raise ConfigError(f"config key 'task': cannot read {str(path)!r}: {why}, allowed: a file of {_FORM}") from e
    name, tasks, listing = path.stem, [], False
    for number, line in enumerate(lines, 1):
        text = re.sub(r"(^|\s)#.*", "", line).strip()
        key, colon, value = text.partition(":")
        if not text or text == "---":
            continue
        if listing and text.startswith("- ") and (found := text[2:].strip().strip("'\"")):
            tasks.append(found)
        elif colon and key == "name" and value.strip():
            name, listing = value.strip().strip("'\""), False
        elif colon and key == "tasks" and not value.strip() and not tasks:
            listing = True
        else:
            raise ConfigError(f"config key 'task': {path}, line {number}: got {line!r}, allowed: {_FORM}")
    if not tasks:
        raise ConfigError(f"config key 'task': {path} lists no task, allowed: {_FORM}")
    return name, tasks
