"""Counts of a plan's work, by hand for a small one, and how they scale."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tdmpc2_fast.kernels.device.launch import How, Precision, log_launches
from tdmpc2_fast.kernels.inspect.plan_work import dry_plan, not_interpreted, plan_work
from tdmpc2_fast.kernels.inspect.published import plan_sizes, update_sizes
from tdmpc2_fast.kernels.inspect.update_work import dry_update
from tdmpc2_fast.kernels.inspect.work import launch_work
from tdmpc2_fast.kernels.layers.grouped_layer import grouped_layer
from tdmpc2_fast.kernels.layers.rows import Layer, Rows
from tdmpc2_fast.kernels.layers.scalar_head import ScalarEnd
from tdmpc2_fast.kernels.layers.tiles import Tile
from tdmpc2_fast.kernels.layers.two_hot import Code

BFLOAT16, FLOAT32 = Precision("bfloat16"), Precision("float32")

# One iteration of one step; obs 3, action 2, latent 8, width 16, four samples, none of the prior.
SMALL = replace(
    plan_sizes(1, 1, 2),
    obs_dim=3,
    latent_dim=8,
    mlp_dim=16,
    enc_dim=8,
    num_enc_layers=2,
    num_q=2,
    num_bins=5,
    horizon=1,
    iterations=1,
    num_samples=4,
    num_pi_trajs=0,
    num_elites=2,
)


def test_launches_of_a_small_plan() -> None:
    kernels = plan_work(SMALL, FLOAT32).kernels
    # encoder 2, share of z0, first, second, third of the step, policy 2, critics 2
    assert kernels == dict(
        draw_kernel=1,
        grouped_layer_kernel=10,
        policy_layer_kernel=1,
        begin_kernel=1,
        scalar_head_kernel=1,
        refine_kernel=1,
    )


def test_flops_of_a_small_plan() -> None:
    n = 4
    encoder = 3 * 8 + 8 * 8
    share = 3 * 16 * 8
    step = n * (2 * 16 * 2 + 2 * 16 * 16 + 8 * 16)
    policy = n * (16 * 8 + 16 * 16 + 2 * 2 * 16)
    critics = n * 2 * (16 * (8 + 2) + 16 * 16)
    scalars = n * 3 * 5 * 16
    assert plan_work(SMALL, FLOAT32).flops == 2 * (encoder + share + step + policy + critics + scalars)


def test_bytes_of_a_small_plan() -> None:
    encoder = 8 * 3 + 8 * 8 + 2 * 3 * 8
    first = 5 * (16 * 8 + 3 * 16) + 4 * 16 * 2  # the policy takes no action
    second = 5 * (16 * 16 + 3 * 16)
    last = 8 * 16 + 3 * 8 + 3 * (5 * 16 + 5) + 2 * 2 * 16 + 2 * 2
    inputs = 3 + 1 + 1 * 2  # obs, discount, previous mean
    draws = 4 * 2 + 4 * 2 + 2 + 2  # samples, terminal actions, elites, exploration
    outputs = 2 + 1 * 2  # action, mean
    flags, integers = 2, 8 * (2 + 3 + 1)  # t0 and eval_mode; seed and counter, slabs, counter
    floats = encoder + first + second + last + inputs + draws + outputs
    assert plan_work(SMALL, FLOAT32).bytes == 4 * floats + flags + integers


@pytest.mark.parametrize(("act", "side"), [(False, False), (True, False), (True, True)])
def test_work_of_one_layer(act: bool, side: bool) -> None:
    """(2, 70, 40) rows times (2, 100, 40) in tiles of 32 rows, 64 columns, 16 deep: 3 x 2 tiles."""
    groups, rows, d, k, a = 2, 70, 100, 40, 6
    cpu = torch.device("cpu")

    def layer(d: int, k: int, side: int) -> Layer:
        vectors = [torch.empty(groups, d) for _ in range(3)]
        return Layer(torch.empty(groups, d, k), *vectors, torch.empty(groups, d, side) if side else None)

    x = Rows.empty(groups, 1, rows, k, torch.float32, cpu)
    x = Rows(x.x, x.stats, layer(k, 8, 0), tile=32) if act else Rows(x.x)
    with log_launches(dry=True) as log:
        grouped_layer(
            x,
            torch.empty(1, rows, a) if side else None,
            layer(d, k, a),
            Rows.empty(groups, 1, rows, d, torch.float32, cpu),
            how=How(FLOAT32),
            tile=Tile(32, 64, 16),
        )
    (launch,) = log
    work = launch_work(launch)
    depth, padded_depth = k + a * side, 48 + 16 * side
    assert work.flops == 2 * groups * rows * d * depth
    assert work.padded_flops == 2 * groups * (3 * 32) * (2 * 64) * padded_depth
    read = 2 * rows * depth + 3 * d * depth + 3 * d  # x and a a column tile; W and bias a row tile
    if act:
        read += 2 * rows * 2 * 2 + 6 * 2 * k  # statistics of two tiles of x; gamma and beta a program
    written = rows * d + rows * 2 * 2
    assert work.bytes == 4 * groups * (read + written)


def test_work_of_a_layer_that_ends_a_head() -> None:
    """(2, 70, 40) rows times (2, 256, 40) in tiles of 32 rows and 64 columns, then (2, 7, 256): 3 x 4 tiles."""
    groups, rows, d, k, bins, cpu = 2, 70, 256, 40, 7, torch.device("cpu")
    layer = Layer(torch.empty(groups, d, k), *(torch.empty(groups, d) for _ in range(3)))
    last = Layer(torch.empty(groups, bins, d), torch.empty(groups, bins))
    scalars = torch.empty(groups, 1, rows)
    end = ScalarEnd(last, torch.empty(groups * 8 * rows * bins), scalars, Code(bins, -1, 1))
    out = Rows.empty(groups, 1, rows, d, torch.float32, cpu)
    x, tile, how = Rows(torch.empty(groups, 1, rows, k)), Tile(32, 64, 16), How.of_chip(90, Precision("tf32"))
    with not_interpreted(), log_launches(dry=True) as log:
        grouped_layer(x, None, layer, out, how=how, finish=True, end=end, tile=tile)
    (launch,) = log
    work = launch_work(launch)
    assert launch.cluster == 4
    assert work.flops == 2 * groups * rows * d * (k + bins)
    assert work.padded_flops == 2 * groups * (3 * 32) * d * (48 + 16)
    layers = 4 * rows * k + 3 * d * (k + 1 + 2) + rows * 4 * 2 * (1 + 4)  # x, weights, statistics
    ends = 3 * bins * (d + 4) + 2 * rows * 4 * bins + rows  # weights, parts, results
    assert work.bytes == 4 * groups * (layers + ends)


def test_launches_of_a_plan_stay_few() -> None:
    launches = plan_work(plan_sizes(5, 1, 6), BFLOAT16).launches
    assert launches <= 130, f"a plan of the 5M model for one environment is {launches} launches, allowed: 130"


@pytest.mark.parametrize(
    ("size", "actions", "gflop"),
    [(1, 6, 12.2), (5, 6, 31.7), (5, 38, 43.4), (19, 6, 108), (48, 6, 263), (317, 6, 1260)],
)
def test_nothing_but_rewards_of_the_prior_is_computed_twice(size: int, actions: int, gflop: float) -> None:
    s = plan_sizes(size, 1, actions)
    work = plan_work(s, BFLOAT16)
    again = 2 * (s.iterations - 1) * s.horizon * s.num_pi_trajs * s.mlp_dim**2  # by their second layer
    assert work.flops / 1e9 == pytest.approx(gflop + again / 1e9, rel=0.01)
    assert work.flops < work.padded_flops < 1.1 * work.flops


def test_work_scales_with_environments() -> None:
    one, two, eight, many = (plan_work(plan_sizes(5, e, 6), BFLOAT16) for e in (1, 2, 8, 64))
    assert [w.flops for w in (two, eight, many)] == [e * one.flops for e in (2, 8, 64)]
    assert one.kernels == two.kernels == eight.kernels
    # Of many rows, heads have launches of their own, one more an iteration for scalars and for actions.
    assert many.launches == one.launches + 2 * 6 + 2
    # Weights and slabs are read once for all environments.
    per_env = two.bytes - one.bytes
    assert (eight.bytes, many.bytes) == (one.bytes + 7 * per_env, one.bytes + 63 * per_env)
    assert per_env < one.bytes / 10
    assert one.l2_bytes < eight.l2_bytes < 8 * one.l2_bytes
    # A row of 4096 columns has more programs than a cluster.
    wide = plan_work(plan_sizes(317, 1, 6), BFLOAT16)
    assert set(wide.kernels) - set(one.kernels) == {"activate_kernel", "scalar_head_kernel"}


@pytest.mark.parametrize("changes", [dict(task_dim=96), dict(episodic=True), dict(obs_dim=0)])
def test_other_plans_are_counted(changes: dict[str, int]) -> None:
    plain, other = (plan_work(s, BFLOAT16) for s in (SMALL, replace(SMALL, **changes)))  # type: ignore[arg-type]
    assert (other.flops > plain.flops) == (other.bytes > plain.bytes) == ("obs_dim" not in changes)


@pytest.mark.parametrize(
    ("bins", "actions", "size", "precision", "apart"),
    [
        (101, 6, 5, "tf32", (0, 1)),
        (200, 6, 5, "tf32", (6, 1)),  # wider than a program has room for
        (101, 70, 5, "bfloat16", (0, 11)),
        (200, 70, 5, "bfloat16", (8, 11)),
        (101, 6, 48, "bfloat16", (0, 1)),
        (101, 6, 48, "tf32", (6, 1)),  # the columns of a program times the last layer's
        (101, 6, 5, "float32", (6, 9)),
    ],
)
def test_each_head_ends_a_layer_if_it_fits(
    bins: int, actions: int, size: int, precision: str, apart: tuple[int, int]
) -> None:
    sizes = replace(plan_sizes(size, 1, actions), num_bins=bins)
    names = [launch.name for launch in dry_plan(sizes, Precision(precision))[1]]
    assert (names.count("scalar_head_kernel"), names.count("policy_layer_kernel")) == apart


def plain_after_tuple(value: object) -> bool:
    """Tell whether a tuple, or one in it, has a plain entry behind a tuple."""
    if not isinstance(value, tuple):
        return False
    kinds = [isinstance(x, tuple) for x in value]
    return kinds != sorted(kinds) or any(map(plain_after_tuple, value))


def test_plain_entries_of_what_kernels_take_come_first() -> None:
    """Triton 3.6 forgets constants of a tuple in loops where a plain entry is behind it."""
    assert plain_after_tuple((1, (2,), (3, (4,), 5)))
    assert not plain_after_tuple((1, 2, (3,), (4, (5,))))
    logs = [dry_plan(replace(SMALL, task_dim=96, episodic=True, num_bins=101), p)[1] for p in (FLOAT32, BFLOAT16)]
    for changes in (dict(task_dim=96, num_tasks=3), dict(episodic=True)):
        sizes = replace(update_sizes(1, 6), **changes)  # type: ignore[arg-type]
        logs += [dry_update(sizes, BFLOAT16, once=once)[0] for once in (False, True)]
    for launch in (x for log in logs for x in log):
        if launch.name != "draw_kernel":  # whose places are all in all tuples
            assert not any(map(plain_after_tuple, launch.args)), launch.name


def test_precision_halves_the_weights() -> None:
    half, full = (plan_work(plan_sizes(19, 1, 6), p) for p in (BFLOAT16, FLOAT32))
    assert half.flops == full.flops
    assert half.bytes == pytest.approx(full.bytes / 2, rel=0.02)


def test_interpreter_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for value in ("0", "1"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        counts.append(plan_work(plan_sizes(1, 1, 6), FLOAT32))
        assert os.environ["TRITON_INTERPRET"] == value
    assert counts[0] == counts[1]


def test_needs_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from tdmpc2_fast.kernels.device.launch import How, Precision, triton\n"
        "from tdmpc2_fast.kernels.inspect.published import plan_sizes\n"
        "from tdmpc2_fast.kernels.inspect.plan_work import plan_work\n"
        "assert triton is None\n"
        "print(plan_work(plan_sizes(1, 1, 6), Precision('float32')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(plan_work(plan_sizes(1, 1, 6), FLOAT32)), done.stderr
