"""Agents to and from the Hugging Face Hub: `push` and `pull`, by the Hub's own `ModelHubMixin`.

A repository holds `model.safetensors`, `model.json` (its manifest, for people), `config.json` (the config, likewise)
and a model card. What is pulled is read as any other file: nothing in it is executed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..agent import TDMPC2, load
from ..config import Config
from ..errors import BackendError, CheckpointError, ConfigError, InputError
from ..model import checkpoint
from .hub_files import Address, explained, fetch, package

_NAME = "model.safetensors"
_PRIVATE = ("work_dir", "checkpoint", "data_dir", "resume", "wandb_project", "wandb_entity")  # of a machine, an account
_SHOWN = ("task", "obs", "episodic", "model_size", "latent_dim", "mlp_dim", "num_q", "horizon", "action_dim")


def push(
    agent: TDMPC2,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Push by tdmpc2-fast",
    token: str | None = None,
) -> str:
    """Write an agent's weights, config and a model card to a repository, which is made if need be; return its commit.

    The config is without its paths and accounts.

    Args:
        agent: what to push.
        repo: `OWNER/NAME`.
        private: whether a repository that is made now is private; default the owner's own.
        revision: the branch; default `main`.
        message: of the commit.
        token: the Hub's, where it is not the one that is logged in.

    Raises:
        CheckpointError: no package, permission or network; the message says what to do.
    """
    mixin = _mixin(f"push to {repo!r}")
    config = _public(agent.cfg).to_dict()
    try:
        return str(
            mixin(agent).push_to_hub(
                repo, config=config, commit_message=message, private=private, token=token, branch=revision
            )
        )
    except Exception as e:  # of several packages, by version
        raise CheckpointError(f"push to {repo!r}: {explained(e, repo)}") from e


def pull(repo: str, *, revision: str | None = None, token: str | None = None, **changes: Any) -> TDMPC2:
    """Return the agent in a repository, as `load("hf://OWNER/NAME")`, which finds repositories of others, too.

    Args:
        repo: `OWNER/NAME`, or a folder with its files.
        revision: a branch, tag or commit; default `main`.
        token: the Hub's, where it is not the one that is logged in.
        changes: config keys to change, as for `load`.

    Raises:
        CheckpointError: no package, repository, permission or network, or files that cannot be loaded.
    """
    mixin = _mixin(f"pull from {repo!r}")
    try:
        agent: TDMPC2 = mixin.from_pretrained(repo, revision=revision, token=token, **changes).agent
    except (BackendError, CheckpointError, ConfigError, InputError):
        raise
    except Exception as e:  # of several packages, by version
        raise CheckpointError(f"pull from {repo!r}: {explained(e, repo)}") from e
    return agent


def card(cfg: Config) -> str:
    """Return a model card for an agent of this config."""
    rows = [f"| `{k}` | `{getattr(cfg, k)}` |" for k in _SHOWN]
    if cfg.multitask:
        rows.append(f"| `tasks` | {', '.join(f'`{t}`' for t in cfg.tasks)} |")
    return "\n".join(
        [
            "---",
            "library_name: tdmpc2-fast",
            "pipeline_tag: reinforcement-learning",
            "tags: [reinforcement-learning, model-based-rl, td-mpc2]",
            "---",
            "",
            f"# TD-MPC2 on {cfg.task}",
            "",
            "A [TD-MPC2](https://arxiv.org/abs/2310.16828) agent, saved by tdmpc2-fast.",
            "",
            "```python",
            "import tdmpc2_fast",
            "",
            'agent = tdmpc2_fast.load("hf://OWNER/NAME")  # this repository',
            "action = agent.act(obs, t0=True, eval_mode=True)",
            "```",
            "",
            "| key | value |",
            "| --- | --- |",
            *rows,
            "",
        ]
    )


def _public(cfg: Config) -> Config:
    """Return a config without what it says of a machine's folders and a person's accounts."""
    return cfg.replace(**dict.fromkeys(_PRIVATE))


def _mixin(what: str) -> Any:
    """Return the class that the Hub's methods work on: its package is imported when it is needed."""
    hub = package(what)

    class HubAgent(hub.ModelHubMixin):  # type: ignore[misc, name-defined]
        def __init__(self, agent: TDMPC2) -> None:
            self.agent = agent

        def _save_pretrained(self, save_directory: Path) -> None:
            checkpoint.save(self.agent.model, save_directory / _NAME, _public(self.agent.cfg))

        def generate_model_card(self, *_: Any, **__: Any) -> Any:
            return hub.ModelCard(card(self.agent.cfg))

        @classmethod
        def _from_pretrained(
            cls, *, model_id: str, revision: str | None, token: Any, local_files_only: bool, **changes: Any
        ) -> HubAgent:
            changes = {k: v for k, v in changes.items() if k not in ("cache_dir", "force_download", "config")}
            if Path(model_id).is_dir():
                return cls(load(model_id, **changes))
            path = fetch(Address(model_id, revision, ""), token, local_files_only)
            return cls(load(path, **changes))

    return HubAgent
