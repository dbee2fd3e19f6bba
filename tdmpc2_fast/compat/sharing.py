"""One set of numbers for two agents: an official one, and ours beside it.

Parameters, moments of the optimisers, running scale and previous mean lie once in memory. Parameters are the
official objects themselves. Kernels move what they train into buffers of their own; whatever else the official
agent has for the same numbers (the detached and the target critics, the states of its optimisers) is pointed there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdmpc2_fast.kernels.update.optim import POLICY_EPS, WORLD_EPS

from ..config import Config
from ..errors import InputError, kind_of
from ..learn.backend import TASK_GRADIENT
from ..learn.torch_update import MOMENTS
from ..model.world_model import WorldModel
from .state_dict import ALIAS, CRITICS, TARGETS

_GROUPS = ("_Qs", "_detach_Qs_params", "_target_Qs_params")  # which `init` of the official model makes anew
_ADAM = dict(betas=(0.9, 0.999), weight_decay=0, amsgrad=False, maximize=False)
_EPS = dict(optim=WORLD_EPS, pi_optim=POLICY_EPS)
_STEP = dict(optim="world.step", pi_optim="policy.step")


def own_memory(x: Tensor) -> Tensor:
    """Return a copy in memory of its own, without gaps."""
    return x.detach().clone(memory_format=torch.contiguous_format)


class SharedModel:
    """Our world model of the tensors of an official one.

    fast: ours.
    beyond: names of official parameters that ours has no use for, and that stay as they are.

    Raises:
        InputError: a tensor is missing or of another shape.
    """

    def __init__(self, official: nn.Module, cfg: Config) -> None:
        self.official = official
        self._detached: list[tuple[Tensor, Tensor]] = []  # ours, and another of theirs for the same numbers
        self._targets: list[tuple[Tensor, Tensor]] = []
        self._groups: dict[str, Any] = {}
        self._parameters: list[tuple[Any, str, Any]] = []
        self._seen: list[int] = []
        self.beyond: list[str] = []
        if isinstance(official, WorldModel):  # it is ours, and whole
            self.fast = official
            return
        with torch.device("meta"):  # which draws and holds nothing
            self.fast = WorldModel(cfg).eval()
        self.take()

    @torch.no_grad()
    def take(self) -> None:
        """Have ours hold what is the official model's now."""
        if self.fast is self.official:
            return
        model, fast = self.official, self.fast
        theirs: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
        theirs |= dict(model.named_buffers(remove_duplicate=False))
        places = [(name, held, key) for name, held, key in fast.places() if held[key] is not None]
        wanted = {name: held[key] for name, held, key in places} | dict(fast.named_buffers(recurse=False))
        for name, mine in wanted.items():
            got = theirs.get(name)
            if mine is not None and (got is None or got.shape != mine.shape):
                what = "none" if got is None else f"shape {tuple(got.shape)}"
                raise InputError(f"agent.model: {name}: got {what}, allowed: {tuple(mine.shape)}")
        self._detached, self._targets = [], []
        for name, held, key in places:
            x = theirs[name]
            if not name.startswith(TARGETS):
                held[key] = x
            elif x is not held[key]:
                held[key] = ours = nn.Parameter(x.detach(), requires_grad=False)  # of one version counter
                self._targets.append((ours, x))
            if name.startswith(CRITICS):
                self._detached.append((x, theirs[name.replace(CRITICS, ALIAS, 1)]))
        for name in dict(fast.named_buffers(recurse=False)):
            fast._buffers[name] = theirs[name]
        self.beyond = [n for n in theirs if n not in wanted and not n.startswith((ALIAS, "_detach_Qs.", "_target_Qs."))]
        self._seen = [x._version for _, x in self._detached]
        self._groups = {name: getattr(model, name) for name in _GROUPS}
        self._parameters = [(m._parameters, k, p) for m in model.modules() for k, p in m._parameters.items()]
        self.align()

    def holds(self) -> bool:
        """Tell whether the official model's tensors are those that were taken."""
        same = all(getattr(self.official, name) is x for name, x in self._groups.items())
        return same and all(held.get(key) is p for held, key, p in self._parameters)

    @torch.no_grad()
    def align(self) -> None:
        """Point the other official tensors to where ours lie now, and have ours tell of what was written to those."""
        for ours, other in (*self._detached, *self._targets):
            if other.data_ptr() != ours.data_ptr() or other.stride() != ours.stride():
                other.data = ours.data
        versions = [other._version for _, other in self._detached]
        if versions != self._seen:
            torch.autograd.graph.increment_version([ours for ours, _ in self._detached])
            self._seen = versions

    @torch.no_grad()
    def part(self) -> None:
        """Give every official tensor memory of its own, as it was before."""
        for name, p in self.official.named_parameters():
            p.data = own_memory(p)
            if p.grad is not None and name.startswith(("_encoder.", "_task_emb.")):  # lent by an update
                p.grad = own_memory(p.grad) if name.startswith("_task_emb.") else None
        for ours, other in self._detached:
            other.data = ours.data
        for ours, other in self._targets:
            other.data = own_memory(ours)


class SharedOptimisers:
    """The two Adam optimisers of an official agent, whose states are the tensors that our updater works on.

    model: ours, of the same parameters.
    names: those of the parameters in each group of each optimiser, which a copied agent has to be given.
        Parameters that ours has not are among them; they get no gradients from us, and stay.

    Raises:
        InputError: they are no such optimisers, or not of the model's parameters.
    """

    def __init__(self, agent: Any, model: WorldModel, names: Mapping[str, list[list[str]]] | None = None) -> None:
        self.model = model
        self._all = {n: p for n, p in agent.model.named_parameters() if p.requires_grad}
        self._optims: dict[str, Any] = {}
        for name in _EPS:
            optim = getattr(agent, name, None)
            if type(optim) is not torch.optim.Adam:
                raise InputError(f"agent.{name}: got {kind_of(optim)}, allowed: torch.optim.Adam")
            self._optims[name] = optim
        if names is not None:
            self._link(names)
        self.names = {name: self._names(name) for name in _EPS}
        self._held: list[tuple[Any, Tensor, dict[str, Tensor]]] = []
        self.rates()

    def _names(self, name: str) -> list[list[str]]:
        """Return the names of an optimiser's parameters; refuse one that has others, or not all of its part."""
        known = {id(p): n for n, p in self._all.items()}
        groups = [[known.get(id(p), "") for p in g["params"]] for g in self._optims[name].param_groups]
        policy = name == "pi_optim"
        given = [n for g in groups for n in g]
        missing = [n for n, p in self._own.items() if p.requires_grad and n.startswith("_pi.") == policy]
        missing = [n for n in missing if n not in given]
        if missing or "" in given or len({*given}) != len(given):
            what = f"not {missing[0]}" if missing else "tensors that are none of agent.model's parameters"
            raise InputError(
                f"agent.{name}: it trains {what}, allowed: the parameters of agent.model"
                " (copy.deepcopy of an official agent leaves its optimiser with critics of its own)"
            )
        return groups

    @property
    def _own(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    def _link(self, names: Mapping[str, list[list[str]]]) -> None:
        """Have the optimisers hold the model's parameters, by name; those of a copied agent hold other copies."""
        for name, optim in self._optims.items():
            optim.state.clear()
            for group, of_group in zip(optim.param_groups, names[name], strict=True):
                group["params"] = [self._all[n] for n in of_group]

    def rates(self) -> dict[str, float]:
        """Return `lr` and `enc_lr_scale` as the optimisers have them now.

        Raises:
            InputError: other settings differ from the official ones.
        """
        encoder = {id(p) for n, p in self._all.items() if n.startswith("_encoder.")}
        found: dict[bool, set[float]] = {True: set(), False: set()}  # by whether they are the encoder's
        for name, optim in self._optims.items():
            for group in (g for g in optim.param_groups if g["params"]):
                for key, value in {**_ADAM, "eps": _EPS[name]}.items():
                    got = tuple(group[key]) if key == "betas" else group[key]
                    if got != value:
                        raise InputError(f"agent.{name}: got {key}={got}, allowed: {key}={value}")
                for p in group["params"]:
                    found[id(p) in encoder].add(float(group["lr"]))
        if {len(x) for x in found.values()} != {1}:
            rates = sorted(found[True] | found[False])
            raise InputError(f"agent.optim: got learning rates {rates}, allowed: one of the encoder, one of all others")
        (enc,), (lr,) = found[True], found[False]
        return dict(lr=lr, enc_lr_scale=enc / lr)

    def _each(self) -> Iterator[tuple[str, Any, str, nn.Parameter]]:
        """Yield every parameter: the name of its optimiser, this, its own name, and itself."""
        own = self._own
        for name, optim in self._optims.items():
            for n in (n for g in self.names[name] for n in g if n in own):
                yield name, optim, n, own[n]

    def state(self) -> dict[str, Tensor]:
        """Return the states as `Updater.load_state` takes them; zeros where no step was taken."""
        found: dict[str, Tensor] = {step: torch.zeros(()) for step in _STEP.values()}
        for name, optim, n, p in self._each():
            kept = optim.state.get(p, {})
            found |= {f"{k}.{n}": own_memory(kept[k]) if k in kept else torch.zeros_like(p) for k in MOMENTS}
            if "step" in kept:  # of which ours has one; steps of somebody's own may have been of some
                taken = torch.as_tensor(kept["step"]).detach().float().cpu().reshape(())
                found[_STEP[name]] = torch.maximum(found[_STEP[name]], taken)
        found["steps"] = found[_STEP["optim"]].long()
        if self.model.cfg.multitask and self.model._task_emb.weight.grad is not None:
            found[TASK_GRADIENT] = own_memory(self.model._task_emb.weight.grad)
        return found

    def share(self, state: Mapping[str, Tensor]) -> None:
        """Have the optimisers' states be the tensors that an updater works on, which its `state` returned."""
        each = list(self._each())
        device = next((x["step"].device for _, o, _, _ in each for x in o.state.values()), self._step_device())
        self._steps = torch.zeros(len(each), device=device)  # each has one: of a common one torch would count all
        self._of_world = sum(name == "optim" for name, *_ in each)
        self._taken = state["world.step"].reshape(()), state["policy.step"].reshape(())
        self._held = []
        for i, (_, optim, n, p) in enumerate(each):
            optim.state[p] = kept = dict(step=self._steps[i], **{k: state[f"{k}.{n}"] for k in MOMENTS})
            self._held.append((optim, p, kept))
        self.count()

    def _step_device(self) -> torch.device | str:
        group = self._optims["optim"].param_groups[0]
        return self.model.device if group.get("capturable") or group.get("fused") else "cpu"

    def count(self) -> None:
        """Have the optimisers' states tell the steps that were taken."""
        world, policy = self._taken
        self._steps[: self._of_world] = world
        self._steps[self._of_world :] = policy
        self._counted = self._steps._version

    def holds(self) -> bool:
        """Tell whether the optimisers' states are those that were shared, with the steps that were counted."""
        return self._steps._version == self._counted and all(
            optim.state.get(p) is kept for optim, p, kept in self._held
        )

    def part(self) -> None:
        """Give the states memory of their own."""
        for optim, p, kept in self._held:
            if kept["step"] == 0:  # as before a first step
                del optim.state[p]
            else:
                optim.state[p] = {k: own_memory(x) for k, x in kept.items()}
        self._held = []
