"""The files of a run: what they hold, what a resumed run does to them, what a full disk does."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_config
from loop_oracle import csvs as files

from tdmpc2_fast import Config
from tdmpc2_fast.errors import ConfigError
from tdmpc2_fast.train.log import display, sinks, status
from tdmpc2_fast.train.log.run_log import WALL_CLOCK, RunLog

REPEAT = 2


def config(**changes: Any) -> Config:
    return tiny_config(task="walker-walk", display="lines", seed=7, **{"tensorboard": False, **changes})


def row(n: int) -> dict[str, Any]:
    return dict(episode=n, episode_reward=n + 0.25, episode_success=0.0, reward_loss=None if n < 2 else n / 8)


def stretch(log: RunLog, first: int, last: int) -> None:
    """Episodes `first` to `last`, ten decisions each, an evaluation after every second one."""
    for n in range(first, last + 1):
        log.step(10 * n, 0.1)
        log.episode(10 * n, row(n))
        if n % 2 == 0:
            log.evaluation(10 * n, 100 / n, 1.0, 3)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All there is in TensorBoard but the time."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    tags = [tag for tag in found.Tags()["scalars"] if tag.removeprefix("train/") not in WALL_CLOCK]
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags}


def test_files_of_a_run(tmp_path: Path) -> None:
    cfg = config()
    log = RunLog(cfg, tmp_path, REPEAT, {})
    stretch(log, 1, 2)
    log.close()
    assert Config.from_dict(json.loads((tmp_path / "config.json").read_text())) == cfg
    assert files(tmp_path) == {
        "eval.csv": "step,reward,seed\n40,50.0,7\n",
        "train.csv": "step,decisions,episode,episode_reward,episode_success,reward_loss\n"
        "20,10,1,1.25,0.0,\n40,20,2,2.25,0.0,0.25\n",
    }
    assert not (tmp_path / "tensorboard").exists()


def test_a_resumed_run_leaves_the_files_of_one_that_never_stopped(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    cfg = config(tensorboard=True)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    log = RunLog(cfg, tmp_path / "whole", REPEAT, {})
    stretch(log, 1, 9)
    log.close()

    folder, state = tmp_path / "stopped", None
    for first, saved, lost in ((1, 3, 6), (4, 7, 8), (8, 9, 9)):
        log = RunLog(cfg, folder, REPEAT, {}, state)
        stretch(log, first, saved)
        state = json.loads(json.dumps(log.state()))
        stretch(log, saved + 1, lost)  # and then the machine goes away: no close
    assert files(folder) == files(tmp_path / "whole")
    assert scalars(folder) == scalars(tmp_path / "whole")
    assert len(scalars(folder)["train/reward_loss"]) == 8
    assert scalars(folder)["eval/return"][0] == (40, 50.0)


def test_going_back_to_an_older_checkpoint_drops_the_sessions_after_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    cfg = config(tensorboard=True)
    log = RunLog(cfg, tmp_path, REPEAT, {})
    stretch(log, 1, 2)
    old = log.state()
    stretch(RunLog(cfg, tmp_path, REPEAT, {}, log.state()), 3, 5)
    log = RunLog(cfg, tmp_path, REPEAT, {}, old)
    stretch(log, 3, 3)
    assert [step for step, _ in scalars(tmp_path)["train/episode"]] == [20, 40, 60]
    assert files(tmp_path)["train.csv"].count("\n") == 4


def test_what_is_known_of_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(config(), tmp_path, REPEAT, {})
    stretch(log, 1, 4)
    with log.clock.part("plan"):
        pass
    state = log.state()
    later = RunLog(config(), tmp_path, REPEAT, {}, state)
    assert later.state()["status"]["best_eval"] == 50.0
    assert later.state()["status"]["last_eval"] == 25.0
    assert later.state()["status"]["elapsed"] > state["status"]["elapsed"]
    assert later.clock.seconds == log.clock.seconds


def test_config_is_replaced_only_where_it_differs(tmp_path: Path) -> None:
    log = RunLog(config(), tmp_path, REPEAT, {})
    path, state = tmp_path / "config.json", log.state()
    before = path.stat().st_ino, path.stat().st_mtime_ns
    RunLog(config(), tmp_path, REPEAT, {}, state)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    RunLog(config(steps=77), tmp_path, REPEAT, {}, state)
    assert json.loads(path.read_text())["steps"] == 77
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_crash_while_rows_are_taken_back_leaves_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(config(), tmp_path, REPEAT, {})
    stretch(log, 1, 2)
    state = log.state()
    stretch(log, 3, 4)
    before = files(tmp_path)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            RunLog(config(), tmp_path, REPEAT, {}, state)
    assert files(tmp_path) == before


def test_a_file_shorter_than_recorded_is_kept_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(config(), tmp_path, REPEAT, {})
    stretch(log, 1, 2)
    state = log.state()
    head, first, *_ = (tmp_path / "train.csv").read_text().splitlines(keepends=True)
    (tmp_path / "train.csv").write_text(head + first)
    log = RunLog(config(), tmp_path, REPEAT, {}, state)
    assert "train.csv has" in capsys.readouterr().err
    log.episode(30, row(3))
    assert (tmp_path / "train.csv").read_text().startswith(head + first + "60,30,3,")
    assert files(tmp_path)["train.csv"].endswith("20,10,1,1.25,0.0,\n60,30,3,3.25,0.0,0.375\n")


def test_the_time_is_in_the_last_columns_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    now, state = 100.0, None
    for module in (display, status):
        monkeypatch.setattr(module, "perf_counter", lambda: now)
    for first in (1, 4):
        log = RunLog(config(tensorboard=True, seed_steps=1), tmp_path, REPEAT, {}, state)
        for n in range(first, first + 3):
            for decision in range(10 * n - 9, 10 * n + 1):
                now += 0.5
                log.step(decision, 0.1)
            log.episode(10 * n, row(n))
            log.busy("evaluating", 1, 1)
            now += 3.0
            log.evaluation(10 * n, 1.0, 1.0, 3)
        state = log.state()
        log.close()
        now += 1000  # between two sessions
    with (tmp_path / "train.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0])[:2] == ["step", "decisions"]
    assert tuple(rows[0])[-2:] == WALL_CLOCK
    assert [float(r["elapsed_time"]) for r in rows] == [5.0, 13.0, 21.0, 29.0, 37.0, 45.0]
    assert [float(r["decisions_per_second"]) for r in rows] == [2.0] * 6
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert [e.value for e in found.Scalars("train/elapsed_time")] == [5.0, 13.0, 21.0, 29.0, 37.0, 45.0]
    assert (tmp_path / "eval.csv").read_text().startswith("step,reward,seed\n")


def test_a_file_that_was_begun_without_the_time_goes_on_without(tmp_path: Path) -> None:
    log = RunLog(config(), tmp_path, REPEAT, {})
    stretch(log, 1, 2)
    state = log.state()
    (tmp_path / "train.csv").write_text(old := files(tmp_path)["train.csv"])
    state["csv"]["train"]["bytes"] = len(old)
    stretch(RunLog(config(), tmp_path, REPEAT, {}, state), 3, 3)
    assert (tmp_path / "train.csv").read_text() == old + "60,30,3,3.25,0.0,0.375\n"


def test_no_csv_where_none_is_wanted(tmp_path: Path) -> None:
    log = RunLog(config(save_csv=False), tmp_path, REPEAT, {})
    stretch(log, 1, 2)
    log.close()
    assert not files(tmp_path)


class FullDisk:
    """Stands in for `open` in `sinks`; while full, a write gets half its bytes out and fails."""

    def __init__(self) -> None:
        self.full = False

    def __call__(self, path: Path, mode: str = "r", **kwargs: Any) -> Any:
        if mode != "ab":
            return open(path, mode, **kwargs)
        disk = self

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if disk.full and len(data) == 1:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data[: len(data) // 2] if disk.full else data)

        return File(path, mode)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> FullDisk:
    found = FullDisk()
    monkeypatch.setattr(sinks, "open", found, raising=False)
    return found


def test_a_full_disk_delays_rows_and_loses_none(
    tmp_path: Path, disk: FullDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    for name in ("whole", "full"):
        (tmp_path / name).mkdir()
        log = RunLog(config(tensorboard=True), tmp_path / name, REPEAT, {})
        stretch(log, 1, 4)
        before = files(tmp_path / name)
        disk.full = name == "full"
        stretch(log, 5, 8)
        if disk.full:
            assert files(tmp_path / name) == before  # no half row
            captured = capsys.readouterr()
            assert captured.err.count("No space left on device") == captured.err.count("warning") == 1
        disk.full = False
        stretch(log, 9, 10)
        log.close()
    assert "written again" in capsys.readouterr().out
    assert files(tmp_path / "full") == files(tmp_path / "whole")
    assert scalars(tmp_path / "full") == scalars(tmp_path / "whole")


def test_a_half_row_that_could_not_be_taken_back_is_so_later(
    tmp_path: Path, disk: FullDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    log = RunLog(config(), tmp_path, REPEAT, {})
    stretch(log, 1, 1)
    before, held = files(tmp_path)["train.csv"], (tmp_path / "train.csv").stat().st_size
    disk.full = True
    with monkeypatch.context() as m:
        m.setattr(os, "truncate", fails)
        log.episode(20, row(2))
        size = (tmp_path / "train.csv").stat().st_size
        assert log.state()["csv"]["train"]["bytes"] == held < size
    disk.full = False
    log.episode(30, row(3))
    assert files(tmp_path)["train.csv"] == before + "40,20,2,2.25,0.0,0.25\n60,30,3,3.25,0.0,0.375\n"


def test_rows_never_written_are_counted(tmp_path: Path, disk: FullDisk, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(config(), tmp_path, REPEAT, {})
    disk.full = True
    stretch(log, 1, 3)
    log.close()
    assert "never written: 3 rows of train.csv, 1 row of eval.csv" in capsys.readouterr().err


def test_rows_waiting_at_a_checkpoint_are_written_by_the_resumed_run(tmp_path: Path, disk: FullDisk) -> None:
    log = RunLog(config(), tmp_path, REPEAT, {})
    stretch(log, 1, 2)
    disk.full = True
    stretch(log, 3, 4)
    state = json.loads(json.dumps(log.state()))
    disk.full = False
    log = RunLog(config(), tmp_path, REPEAT, {}, state)
    stretch(log, 5, 6)
    steps = {name: [int(line.split(",")[0]) for line in text.split()[1:]] for name, text in files(tmp_path).items()}
    assert steps == {"train.csv": [20, 40, 60, 80, 100, 120], "eval.csv": [40, 80, 120]}


def test_without_tensorboard_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    log = RunLog(config(tensorboard=True), tmp_path, REPEAT, {})
    stretch(log, 1, 2)
    assert "pip install 'tdmpc2-fast[train]'" in capsys.readouterr().out
    assert len(files(tmp_path)) == 2


def test_without_wandb_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'tdmpc2-fast\[wandb\]'"):
        RunLog(config(enable_wandb=True), tmp_path, REPEAT, {})


class TestWandB:
    """Real runs of the package, offline: there is no account here."""

    @pytest.fixture(autouse=True)
    def no_account(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        wandb = pytest.importorskip("wandb")
        for name in [k for k in os.environ if k.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("NETRC", raising=False)
        yield
        wandb.teardown()

    def test_offline_with_the_official_layout(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        log = RunLog(config(enable_wandb=True, exp_name="a b"), tmp_path, REPEAT, {})
        stretch(log, 1, 2)
        log.close()
        sys.modules["wandb"].teardown()  # its service writes until then
        (data,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        held = data.read_bytes()
        for name in ("walker-walk-a-b", "seed:7", "train/episode_reward", "eval/episode_reward", "tdmpc2-fast"):
            assert name.encode() in held, name
        captured = capfd.readouterr()
        assert f"wandb sync {data.parent}" in captured.out
        assert "WANDB_API_KEY" in captured.out
        assert not captured.err

    def test_a_server_out_of_reach_is_a_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import wandb

        init = wandb.init

        def no_network(**kwargs: Any) -> Any:
            if kwargs["mode"] != "offline":
                assert kwargs["settings"].init_timeout <= 30
                raise wandb.errors.CommError("no such host")
            return init(**kwargs)

        monkeypatch.setattr(wandb, "init", no_network)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        log = RunLog(config(enable_wandb=True), tmp_path, REPEAT, {})
        stretch(log, 1, 2)
        log.close()
        captured = capsys.readouterr()
        assert "no such host" in captured.err
        assert "wandb sync" in captured.out

    def test_a_resumed_run_keeps_its_id(self, tmp_path: Path) -> None:
        log = RunLog(config(enable_wandb=True), tmp_path, REPEAT, {})
        state = log.state()
        log.close()
        later = RunLog(config(enable_wandb=True), tmp_path, REPEAT, {}, state)
        assert later.state()["wandb"] == state["wandb"]
        later.close()


@pytest.mark.parametrize(("text", "found"), [("machine api.wandb.ai login user password x", True), ("", False)])
def test_an_account_in_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: bool) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(text)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sinks._has_account("https://api.wandb.ai") is found


def test_closing_twice_says_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(config(), tmp_path, REPEAT, {})
    log.close(["files in there"])
    log.close(["files in there"])
    assert capsys.readouterr().out.count("files in there") == 1


def test_successes_have_a_file_from_the_first_one_on_with_all_before_it(tmp_path: Path) -> None:
    cfg = config()
    shares = [0.0, 0.0, 0.5, 0.0, 1 / 3]
    state: Any = None
    for n, share in enumerate(shares, 1):
        log = RunLog(cfg, tmp_path, REPEAT, {}, state)
        log.evaluation(10 * n, 1.0, 0.0, 3, share)
        state = json.loads(json.dumps(log.state()))
        log.evaluation(10 * n + 5, 1.0, 0.0, 3, 1.0)  # of a stretch that is run again
    rows = ["20,0,7", "40,0,7", "60,0.5,7", "80,0.0,7", "100,0.3333,7", "110,1.0,7"]
    assert files(tmp_path)["success.csv"].splitlines() == ["step,reward,seed", *rows]


def test_without_success_there_is_no_such_file(tmp_path: Path) -> None:
    log = RunLog(config(), tmp_path, REPEAT, {})
    stretch(log, 1, 4)
    log.close()
    assert not (tmp_path / "success.csv").exists()


def test_several_tasks_have_columns_and_tags_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    log = RunLog(config(tensorboard=True), tmp_path, REPEAT, {})
    for n, task in ((1, "walker-walk"), (2, "cup-catch")):
        log.step(10 * n, 0.1)
        log.episode(10 * n, dict(episode=n, task=task) | {k: v for k, v in row(n).items() if k != "episode"})
    of_each = {"return+walker-walk": 100.04, "success+walker-walk": 0.0, "return+cup-catch": 0.0}
    log.evaluation(20, 50.02, 1.0, 3, 0.0, {"normalized_score": 5.00204, **of_each})
    log.evaluation(30, 50.02, 1.0, 3, 0.0, {"normalized_score": None, **of_each})
    log.close()
    assert files(tmp_path) == {
        "eval.csv": "step,reward,seed,normalized_score,return+walker-walk,success+walker-walk,return+cup-catch\n"
        "40,50.0,7,5.002,100.04,0.0,0.0\n60,50.0,7,,100.04,0.0,0.0\n",
        "train.csv": "step,decisions,episode,task,episode_reward,episode_success,reward_loss\n"
        "20,10,1,walker-walk,1.25,0.0,\n40,20,2,cup-catch,2.25,0.0,0.25\n",
    }
    found = scalars(tmp_path)
    assert found["train/episode_reward+walker-walk"] == [(20, 1.25)]
    assert found["train/episode_reward+cup-catch"] == [(40, 2.25)]
    assert found["train/reward_loss"] == [(40, 0.25)]
    assert found["eval/return+cup-catch"] == [(40, 0.0), (60, 0.0)]
    assert [step for step, _ in found["eval/normalized_score"]] == [40]
    assert not {"train/task", "train/episode_reward"} & {*found}
    out = capsys.readouterr().out
    assert "score 5.0" in out
    assert "tasks  walker-walk 100.0, cup-catch 0.0" in out
