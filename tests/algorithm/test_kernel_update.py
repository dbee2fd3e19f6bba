"""The update on the Triton backend: equal to the reference and the recorded updates, and its contracts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import golden_runner
import pytest
import torch
from conftest import GOLDEN, filled_buffer, random_episode, tiny_config, tiny_multitask
from golden_cases import Case
from oracle import KERNELS, QUIET
from torch.utils._python_dispatch import TorchDispatchMode
from update_oracle import check_gradients, random_batch

from tdmpc2_fast import TDMPC2, Config, ReplayBuffer
from tdmpc2_fast.compat.state_dict import tensors_only
from tdmpc2_fast.errors import BackendError, InputError, NonFiniteError
from tdmpc2_fast.kernels.device import launch
from tdmpc2_fast.kernels.device.launch import KERNEL_ERRORS, log_launches, why_not
from tdmpc2_fast.kernels.layers import tiles
from tdmpc2_fast.kernels.update import optim
from tdmpc2_fast.learn.kernel_update import KernelUpdate
from tdmpc2_fast.reference import ReferenceAgent
from tdmpc2_fast.rng import UpdateNoise, generator
from tdmpc2_fast.runtime.backend import Backend

WHY_NOT = why_not(torch.device("cpu"))
pytestmark = [pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)), QUIET]

Liven = Callable[[TDMPC2], TDMPC2]


def fused(**changes: Any) -> Config:
    """A config whose updates have few launches and small heads: each takes the interpreter its time."""
    return tiny_config(**{"backend": KERNELS, "horizon": 2, "num_bins": 21, **changes})


CONFIGS = dict(
    plain=fused(dropout=0.2),
    episodic=fused(episodic=True),
    multitask=tiny_multitask(dropout=0.2, backend=KERNELS),
    horizon_1=fused(horizon=1),
    long=fused(horizon=5, dropout=0.0),
    two_critics=fused(num_q=2),
    clipped=fused(grad_clip_norm=0.01),
    deep_encoder=fused(num_enc_layers=4),
    odd=fused(latent_dim=20, mlp_dim=27, enc_dim=19, simnorm_dim=4, obs_dim=7, action_dim=3, batch_size=5),
)


# The wide cases take the interpreter longest; `make golden` replays them, too.
SLOW = ("action_dim_38", "single_5m")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in golden_runner.cases(GOLDEN)]
)
def test_recorded_updates_are_reproduced_draw_by_draw(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Adam takes its parameters one by one, whatever their blocks; in small ones it would be most of the time.
    monkeypatch.setattr(optim, "_BLOCK", 2**15)
    checker = golden_runner.Checker(Case(GOLDEN, case), KERNELS)
    checker.updates()
    bad = [f"{d.section}: {d.name} off by {d.worst:.2e}, limit {d.limit:.1e}" for d in checker.found if not d.ok]
    assert not bad, "\n".join(bad)
    assert len(checker.found) > 20


@pytest.mark.parametrize("name", CONFIGS)
def test_updates_equal_the_reference(name: str, livened: Liven) -> None:
    check_updates(CONFIGS[name], livened)


@pytest.mark.usefixtures("other_way")
@pytest.mark.parametrize("name", ["plain", "episodic", "multitask", "horizon_1", "odd"])
def test_updates_the_other_way_equal_the_reference(name: str, livened: Liven) -> None:
    check_updates(CONFIGS[name], livened)


@pytest.mark.usefixtures("other_way")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_the_other_way_are_as_exact_as_torch(precision: str, livened: Liven) -> None:
    check_gradients(CONFIGS["episodic"], precision, livened)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_gradients_of_very_wide_layers(precision: str, livened: Liven, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "WIDE", 1)
    with log_launches() as log:
        check_gradients(CONFIGS["episodic"], precision, livened)
    assert sum(x.name == "activation_gradient_kernel" for x in log) > 1 or launch.native()


def check_updates(cfg: Config, livened: Liven) -> None:
    """Two updates give the numbers of the reference."""
    agent = livened(TDMPC2(cfg))
    reference = ReferenceAgent(cfg, tensors_only(agent.model.state_dict()))
    buffer, g = filled_buffer(cfg), generator(5, "test", torch.device("cpu"))
    for _ in range(2):
        batch, noise = buffer.sample(), UpdateNoise.draw(cfg, g)
        got, want = agent.updater.step(batch, noise), reference.update(batch, noise)
        assert got.keys() == want.keys()
        for key in want:
            torch.testing.assert_close(got[key], want[key], atol=1e-4, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}")
    for key, value in tensors_only(agent.model.state_dict()).items():
        # Adam can turn rounding of a vanishing gradient into a step of lr
        close = torch.isclose(value, reference.p[key], atol=2e-6, rtol=1e-4)
        assert close.float().mean() > 0.99, key
        torch.testing.assert_close(value, reference.p[key], atol=2.5 * 2 * cfg.lr, rtol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "episodic", "multitask"])
def test_gradients_are_as_exact_as_torch_at_the_same_precision(name: str, precision: str, livened: Liven) -> None:
    check_gradients(CONFIGS[name], precision, livened)


@pytest.mark.parametrize(("precision", "limit"), [("tf32", 5e-3), ("bfloat16", 5e-2)])
def test_lower_precisions_stay_close(precision: str, limit: float, livened: Liven) -> None:
    cfg = fused(precision=precision)
    agent = livened(TDMPC2(cfg))
    reference = ReferenceAgent(cfg, tensors_only(agent.model.state_dict()))
    batch, noise = filled_buffer(cfg).sample(), UpdateNoise.draw(cfg, generator(5, "test", torch.device("cpu")))
    got, want = agent.updater.step(batch, noise), reference.update(batch, noise)
    for key in ("consistency_loss", "reward_loss", "value_loss", "pi_loss", "grad_norm", "pi_grad_norm"):
        assert float((got[key] - want[key]).abs()) <= limit * max(1.0, float(want[key].abs())), key
    again = livened(TDMPC2(cfg)).updater
    repeated = again.step(batch, noise)
    assert all(torch.equal(got[k], repeated[k]) for k in got)


@pytest.mark.parametrize(
    "cfg",
    [tiny_multitask(task_grad_leak=False), tiny_config(num_bins=1), tiny_config(num_bins=0)],
    ids=["no_leak", "one_bin", "no_bins"],
)
def test_what_the_reference_has_not_is_as_the_torch_backend(cfg: Config, livened: Liven) -> None:
    ours, plain = livened(TDMPC2(cfg.replace(backend=KERNELS))), livened(TDMPC2(cfg))
    buffer, g = filled_buffer(cfg), generator(5, "test", torch.device("cpu"))
    for _ in range(2):
        batch, noise = buffer.sample(), UpdateNoise.draw(cfg, g)
        got, want = ours.updater.step(batch, noise), plain.updater.step(batch, noise)
        for key in want:
            torch.testing.assert_close(got[key], want[key], atol=1e-4, rtol=1e-3)
        assert not cfg.multitask or ours.model._task_emb.weight.grad is None
    for (name, p), q in zip(ours.model.named_parameters(), plain.model.parameters(), strict=True):
        assert torch.isclose(p, q, atol=2e-6, rtol=1e-4).float().mean() > 0.99, name
        torch.testing.assert_close(p, q, atol=2.5 * 2 * cfg.lr, rtol=0)


def test_parameters_keep_names_shapes_and_objects(livened: Liven) -> None:
    agent = livened(TDMPC2(fused()))
    before = {n: (p, p.shape, p.detach().clone()) for n, p in agent.model.named_parameters()}
    state = {k: v.clone() for k, v in tensors_only(agent.model.state_dict()).items()}
    updater = KernelUpdate(agent.model)
    for name, p in agent.model.named_parameters():
        old, shape, value = before[name]
        assert p is old
        assert p.shape == shape
        assert torch.equal(p, value)
    after = tensors_only(agent.model.state_dict())
    assert list(after) == list(state)
    assert all(torch.equal(after[k], state[k]) for k in state)
    flat = [updater.chain.world.param, updater.chain.policy.param, updater.chain.target.param]
    inside = [
        any(f.data_ptr() <= p.data_ptr() < f.data_ptr() + f.nbytes for f in flat) for p in agent.model.parameters()
    ]
    assert all(inside)


def test_a_run_repeats_and_draws_anew_each_time() -> None:
    found = []
    for _ in range(2):
        agent, buffer = TDMPC2(fused()), filled_buffer(fused())
        losses = [float(agent.update(buffer)["consistency_loss"]) for _ in range(2)]
        assert len(set(losses)) == 2
        found.append(tensors_only(agent.model.state_dict()))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_batches_drawn_in_the_graph_are_slices_of_what_was_added_so_far() -> None:
    cfg = fused(buffer_size=60, steps=60)
    agent, buffer = TDMPC2(cfg), ReplayBuffer(cfg)
    for i in range(6):
        # The observation names its step; older episodes fall out of the ring.
        episode = random_episode(cfg, 20, seed=i)
        episode["obs"][:] = (100 * i + torch.arange(20.0)).unsqueeze(1).numpy()
        episode["reward"][1:] = episode["obs"][1:, 0]
        buffer.add(episode)
        if i not in (0, 3, 5):  # one episode is there; the first has fallen out; and two more
            continue
        agent.update(buffer)
        update = agent.updater._update
        assert isinstance(update, KernelUpdate)
        obs = update.chain.inputs.obs[0, ..., 0]
        assert torch.equal(obs[1:] - obs[:-1], torch.ones(cfg.horizon, cfg.batch_size))
        assert torch.equal(update.chain.inputs.target[0], obs[1:])
        assert set((obs // 100).flatten().int().tolist()) <= set(range(max(0, i - 2), i + 1))
    assert agent.updater.steps == 3


def test_changes_from_outside_are_honoured(livened: Liven) -> None:
    cfg = fused(precision="tf32")
    agent, other = livened(TDMPC2(cfg)), livened(TDMPC2(cfg), 1)  # type: ignore[call-arg]
    batch, noise = filled_buffer(cfg).sample(), UpdateNoise.draw(cfg, generator(5, "test", torch.device("cpu")))
    agent.updater.step(batch, noise)
    state = {k: v.clone() if torch.is_tensor(v) else v for k, v in other.model.state_dict().items()}
    want = other.updater.step(batch, noise)["total_loss"]
    agent.model.load_state_dict(state)
    assert torch.equal(agent.updater.step(batch, noise)["total_loss"], want)
    agent.model.load_state_dict(state, assign=True)
    assert torch.equal(agent.updater.step(batch, noise)["total_loss"], want)
    moved = agent.model._pi[0].weight.clone()
    agent.updater.step(batch, noise)
    assert not torch.equal(moved, agent.model._pi[0].weight)


def test_planner_sees_every_update(livened: Liven) -> None:
    cfg = fused(iterations=1, num_samples=16, num_elites=4)
    agent = livened(TDMPC2(cfg))
    obs = torch.randn(1, 5)
    agent.plan(obs, True)
    agent.update(filled_buffer(cfg))
    planner: Any = agent.planner._plan
    packed = planner._packed
    assert packed.refresh()
    assert torch.equal(packed.weights.third.weight[0], agent.model._dynamics[2].weight)


@pytest.mark.parametrize("module", ["_encoder", "_pi", "_target_Qs_params", "_dynamics"])
def test_a_nan_anywhere_is_named_and_masks_the_update(module: str) -> None:
    agent, buffer = TDMPC2(fused()), filled_buffer(fused())
    agent.update(buffer)
    with torch.no_grad():
        next(iter(getattr(agent.model, module).parameters())).fill_(torch.nan)
    before = {n: p.detach().clone() for n, p in agent.model.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"update 1: .* not finite"):
        agent.update(buffer)
    assert agent.updater.scale.value.isfinite()
    # What a finite step before the failure has moved may have moved; nothing became NaN by it.
    for name, p in agent.model.named_parameters():
        assert torch.equal(p.isnan(), before[name].isnan()), name
    if module != "_pi":
        assert all(torch.equal(p.nan_to_num(7), before[n].nan_to_num(7)) for n, p in agent.model.named_parameters())


@pytest.mark.parametrize(
    ("part", "named"),
    [("reward", "reward_loss, value_loss, total_loss"), ("terminated", "value_loss, termination_loss, total_loss")],
)
def test_losses_that_were_not_finite_are_named_and_no_others(part: str, named: str, livened: Liven) -> None:
    agent = livened(TDMPC2(fused(episodic=True)))
    batch = random_batch(agent.cfg, torch.device("cpu"))
    agent.updater.step(batch)
    with pytest.raises(NonFiniteError, match=f"update 1: {named} is not finite"):
        agent.updater.step(batch._replace(**{part: getattr(batch, part) * torch.nan}))


def test_a_nan_in_the_policy_loss_leaves_the_policy(livened: Liven) -> None:
    agent, buffer = livened(TDMPC2(fused())), filled_buffer(fused())
    agent.update(buffer)
    agent.updater.scale.value.fill_(torch.nan)
    before = {n: p.detach().clone() for n, p in agent.model._pi.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"update 1: pi_loss is not finite; the step of _pi"):
        agent.update(buffer)
    assert all(torch.equal(p, before[n]) for n, p in agent.model._pi.named_parameters())
    agent.updater.scale.value.fill_(1.0)
    agent.update(buffer)
    assert not all(torch.equal(p, before[n]) for n, p in agent.model._pi.named_parameters())


def test_pixels_learn() -> None:
    cfg = Config.from_dict(
        dict(obs="rgb", mlp_dim=16, num_channels=2, latent_dim=32, batch_size=2, buffer_size=100, device="cpu",
             backend=KERNELS)
    ).with_env({"rgb": (3, 64, 64)}, 2, 500)  # fmt: skip
    agent, buffer = TDMPC2(cfg), ReplayBuffer(cfg)
    obs = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8)
    buffer.add(dict(obs=obs, action=torch.rand(12, 2), reward=torch.rand(12)))
    before = {n: p.detach().clone() for n, p in agent.model._encoder.named_parameters()}
    assert all(v.isfinite() for v in agent.update(buffer).values())
    assert all(not torch.equal(p, before[n]) for n, p in agent.model._encoder.named_parameters())


@pytest.mark.triton
@pytest.mark.parametrize("from_replay", [False, True])
def test_auto_learns_with_torch_where_a_kernel_does_not_fit(from_replay: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    (error,) = KERNEL_ERRORS

    def too_large(*args: Any) -> None:
        raise error("out of resource: shared memory")

    monkeypatch.setattr(KernelUpdate, "step_from" if from_replay else "step", too_large)
    agent, plain = TDMPC2(tiny_config()), TDMPC2(tiny_config(backend="torch"))
    agent.updater._chosen.backend = Backend("triton", "there is a GPU")
    buffer, sampled = (filled_buffer(agent.cfg) for _ in range(2))
    with pytest.warns(RuntimeWarning, match="Updater: .*out of resource: shared memory; learning with torch"):
        metrics = agent.updater.step_on(buffer if from_replay else Sampled(buffer))
    assert agent.updater.backend.name == "torch"
    assert agent.updater.steps == 1
    want = plain.updater.step_on(sampled)
    assert all(torch.equal(metrics[k], want[k]) for k in want)
    other = filled_buffer(fused())
    with pytest.raises(BackendError, match="out of resource"):
        TDMPC2(fused()).updater.step_on(other if from_replay else Sampled(other))


@pytest.mark.triton
def test_what_kernels_have_learned_goes_on_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    (error,) = KERNEL_ERRORS
    agent, plain = TDMPC2(tiny_config()), TDMPC2(tiny_config(backend="torch"))
    agent.updater._chosen.backend = Backend("triton", "there is a GPU")
    noises = [UpdateNoise.draw(agent.cfg, generator(i, "test", torch.device("cpu"))) for i in range(2)]
    batch = filled_buffer(agent.cfg).sample()
    agent.updater.step(batch, noises[0])

    def too_large(*args: Any) -> None:
        raise error("out of resource: shared memory")

    monkeypatch.setattr(KernelUpdate, "step", too_large)
    with pytest.warns(RuntimeWarning, match="learning with torch"):
        agent.updater.step(batch, noises[1])
    for noise in noises:
        plain.updater.step(batch, noise)
    assert agent.updater.steps == 2
    got, want = agent.updater.state(), plain.updater.state()
    for name in want:
        if not name.startswith("rng"):
            torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-5)


class Sampled:
    """A buffer that is not known to lie on the device."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.sample = buffer.sample


def test_noise_of_a_wrong_shape_is_named() -> None:
    agent = TDMPC2(fused())
    noise = UpdateNoise.draw(fused(batch_size=4), generator(0, "test", torch.device("cpu")))
    with pytest.raises(InputError, match=r"noise, for td_eps: got \(2, 4, 2\), allowed: \(2, 8, 2\)"):
        agent.updater.step(filled_buffer(fused()).sample(), noise)


class Reads(TorchDispatchMode):
    """Counts the operations that make a host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal.default", "item")
        if any(w in str(func) for w in waits):
            self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["plain", "episodic", "multitask"])
def warm(request: pytest.FixtureRequest) -> KernelUpdate:
    cfg = CONFIGS[request.param]
    agent = TDMPC2(cfg)
    agent.update(filled_buffer(cfg))
    update = agent.updater._update
    assert isinstance(update, KernelUpdate)
    return update


def test_no_operation_inside_an_update_waits_for_the_device(warm: KernelUpdate) -> None:
    # Launches are left out: the interpreter reads what it interprets.
    from tdmpc2_fast.kernels.device.launch import log_launches

    with log_launches(dry=True) as log, Reads() as reads:
        warm._run_from_replay()
    assert len(log) > 60
    assert not reads.found
