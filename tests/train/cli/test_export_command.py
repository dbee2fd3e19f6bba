"""The command `export`: what it writes, what it says, what it refuses; and the loop that runs the file."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import (
    Capture,
    in_an_empty_folder,  # noqa: F401
    save_untrained,
)
from conftest import ROOT, tiny_config, tiny_multitask

import tdmpc2_fast
from tdmpc2_fast import TDMPC2
from tdmpc2_fast.errors import CheckpointError
from tdmpc2_fast.model import checkpoint

pytest.importorskip("dm_control")
pytest.importorskip("click")
pytest.importorskip("rich")

from tdmpc2_fast.train import cli
from tdmpc2_fast.train.run.checkpoints import trained

LOOP = ROOT / "examples" / "robot_loop.py"


@pytest.fixture
def onnx() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")


@pytest.mark.usefixtures("onnx")
def test_onnx_files_are_written_and_never_replaced(empty_folder: Path, capsys: Capture) -> None:
    save_untrained("run/checkpoints/best")
    assert cli.main(["export", "run"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "run/checkpoints/best.safetensors: step and return unknown"
    assert out[1] == "run/checkpoints/best-plan.onnx"
    assert out[2].split() == ["name", "shape", "dtype", "drawn"]
    assert out[3].split() == ["in", "obs", "(1,", "3)", "float32"]
    assert ["in", "members", "(1,", "2)", "int64", "pairs:3"] in [line.split() for line in out]
    assert "run/checkpoints/best-prior.onnx" in out
    first = Path("run/checkpoints/best-plan.onnx").read_bytes()
    Path("run/checkpoints/best-prior-2.onnx").touch()  # the two of a pair have one number
    assert cli.main(["export", "run", "opset=18"]) == 0
    assert "run/checkpoints/best-prior-3.onnx" in capsys.readouterr().out
    assert Path("run/checkpoints/best-plan.onnx").read_bytes() == first
    assert sorted(p.name for p in Path("run/checkpoints").glob("best-*")) == [
        "best-plan-3.onnx",
        "best-plan.onnx",
        "best-prior-2.onnx",
        "best-prior-3.onnx",
        "best-prior.onnx",
    ]


def test_a_torch_package_goes_where_out_says(empty_folder: Path, capsys: Capture) -> None:
    save_untrained("a")
    assert cli.main(["export", "a", "format=torch", "--out", "deep/er"]) == 0
    assert sorted(p.name for p in Path("deep/er").iterdir()) == ["a-plan.pt2", "a-prior.pt2"]
    program = torch.export.load("deep/er/a-prior.pt2")
    action, mean = program.module()(obs=torch.zeros(1, 3), eps=torch.zeros(1, 1))
    assert torch.equal(action, mean)
    assert cli.main(["export", "a", "format=torch", "out=p.pt2"]) == 0
    assert capsys.readouterr().err == ""
    assert {p.name for p in empty_folder.iterdir()} == {"a.safetensors", "a.json", "deep", "p.pt2", "p-prior.pt2"}


def test_official_weights_load_again(empty_folder: Path, capsys: Capture) -> None:
    save_untrained("a")
    assert cli.main(["export", "a", "format=official"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "a.pt"
    assert cli.main(["export", "a", "format=official", "out=mine.pt"]) == 0
    mine, kept = (torch.load(p, weights_only=True)["model"] for p in ("mine.pt", "a.pt"))
    agent = TDMPC2(tiny_config(3, 1, episode_length=40))
    agent.load("mine.pt")
    assert all(torch.equal(mine[k], kept[k]) for k, x in mine.items() if isinstance(x, torch.Tensor))
    assert cli.main(["export", "a", "format=official", "out=mine.pt"]) == 2
    assert "config key 'out': got 'mine.pt', which exists, allowed: a folder, or a new file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "got 0 arguments (), allowed: tdmpc2-fast export RUN [format=] [out=] [opset=] [compiled=]"),
        (["a", "b"], "got 2 arguments (a b)"),
        (["a", "opsett=18"], "Did you mean 'opset'"),
        (["a", "opset=17"], "config key 'opset': got 17, allowed: an integer of at least 18 and at most 23"),
        (["a", "opset=24"], "config key 'opset': got 24, allowed: an integer of at least 18 and at most 23"),
        (["a", "opset=new"], "config key 'opset': got 'new', allowed: an integer of at least 18"),
        (["a", "opset=20", "format=torch"], "config key 'opset': got 20, allowed: none with format=torch"),
        (["a", "compiled=true"], "config key 'compiled': got True, allowed: false with format=onnx"),
        (["a", "format=tflite"], "config key 'format': got 'tflite', allowed: one of onnx, torch, official"),
        (["a", "out=x.pt2"], "config key 'out': got 'x.pt2', which ends in .pt2, allowed: a folder, or a new file"),
        (["a", "out=b.pt"], "config key 'out': got 'b.pt', which exists"),
        (["nowhere"], "no such file"),
        (["b.pt"], "official files carry no config; agent = TDMPC2(cfg), agent.load('b.pt') and agent.save('b') make"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("onnx")
def test_wrong_words(args: list[str], message: str, empty_folder: Path, capsys: Capture) -> None:
    save_untrained("a")
    TDMPC2(tiny_config()).save("b.pt")
    before = {p: p.stat().st_mtime_ns for p in empty_folder.iterdir()}
    assert cli.main(["export", *args]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert {p: p.stat().st_mtime_ns for p in empty_folder.iterdir()} == before


def test_a_missing_package_is_named_before_any_work(
    empty_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdmpc2_fast.export.onnx_file.PACKAGES", ("no_such_package",))
    assert cli.main(["export", "nowhere"]) == 2
    assert capsys.readouterr().err == ("error: ONNX files need no_such_package; pip install 'tdmpc2-fast[export]'\n")


def export(path: str) -> None:
    pytest.importorskip("onnxruntime")
    assert cli.main(["export", path, "out=plan.onnx"]) == 0


@pytest.mark.usefixtures("onnx")
def test_the_robot_loop_runs_the_file(empty_folder: Path, capsys: Capture) -> None:
    """With numpy and onnxruntime alone; it counts the deadlines that nothing could keep."""
    save_untrained("a")
    export("a")
    capsys.readouterr()
    absent = ["torch", "tdmpc2_fast", "onnx"]
    code = f"import sys, runpy; sys.modules.update(dict.fromkeys({absent})); sys.argv = sys.argv[1:]\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    words = [sys.executable, "-P", "-c", code, str(LOOP), "plan.onnx", "20", "5"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == ""
    assert done.stdout.startswith("5 decisions at 20 a second: p50 ")
    assert timed(20.0, 5) >= 0.2
    assert capsys.readouterr().out.startswith("5 decisions at 20 a second")
    timed(1e6, 5)
    assert "5 deadlines missed" in capsys.readouterr().out


def timed(rate: float, decisions: int) -> float:
    import time

    loop = runpy.run_path(str(LOOP))
    start = time.perf_counter()
    loop["main"]("plan.onnx", rate, decisions)
    return time.perf_counter() - start


@pytest.mark.usefixtures("onnx")
def test_the_robot_loop_knows_tasks_and_every_law(empty_folder: Path, capsys: Capture) -> None:
    TDMPC2(tiny_multitask(iterations=1, horizon=2)).save("m")
    export("m")
    loop = runpy.run_path(str(LOOP))
    loop["main"]("plan.onnx", 1000.0, 3, task=2, evaluate=False)
    assert "3 decisions" in capsys.readouterr().out
    draw = loop["draw"]
    pairs = draw("pairs:3", (1000, 2), "int64")
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert {*pairs.flatten().tolist()} == {0, 1, 2}
    assert abs(draw("exponential", (10000,), "float32").mean() - 1) < 0.1
    assert {*draw("integers:0:6", (1000,), "int64").tolist()} == {*range(7)}
    assert abs(draw("normal", (10000,), "float32").std() - 1) < 0.1


def test_small_weights_act_as_the_whole_ones_and_learn_on(empty_folder: Path, capsys: Capture) -> None:
    cfg = tiny_config(3, 1, episode_length=40, num_threads=1, precision="float32")
    agent = TDMPC2(cfg)
    agent.save("run/checkpoints/best")
    beside = Path("run/checkpoints/best.json")
    told = dict(step=40, decisions=20, updates=7)
    beside.write_text(json.dumps(json.loads(beside.read_text()) | dict(trained=told)))
    assert cli.main(["export", "run", "format=small"]) == 0
    small = Path("run/checkpoints/best-small.safetensors")
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{small}: ")
    assert trained(small) == "step 40 (20 decisions, 7 updates), not evaluated"
    state, saved = checkpoint.read(small)
    assert saved == cfg.replace(device="auto", num_threads=None, precision="auto")
    whole = agent.model.state_dict()
    for name, x in state.items():
        source = name.replace("_target_Qs_params.", "_Qs.params.")
        assert torch.equal(x, whole[source].half().float()), name
    other = tdmpc2_fast.load(small)
    assert torch.equal(other.model.state_dict()["_pi.0.weight"], state["_pi.0.weight"])
    assert cli.main(["info", str(small)]) == 0
    assert "small: in float16, without target critics" in " ".join(capsys.readouterr().out.split())
    # And of bits that were turned it knows.
    data = bytearray(small.read_bytes())
    data[-5] ^= 4
    small.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum differs"):
        tdmpc2_fast.load(small)


def test_weights_that_float16_cannot_hold_are_not_made_small(empty_folder: Path, capsys: Capture) -> None:
    agent = TDMPC2(tiny_config(3, 1, episode_length=40))
    with torch.no_grad():
        next(agent.model.parameters()).view(-1)[3] = -1e5
    agent.save("a")
    assert cli.main(["export", "a", "format=small"]) == 2
    assert "got weights up to 100000, allowed: 65504" in capsys.readouterr().err
    assert {p.name for p in empty_folder.iterdir()} == {"a.safetensors", "a.json"}
