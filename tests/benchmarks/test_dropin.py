"""The drop-in on a checkout of the official code, which OFFICIAL names; and how its sources are prepared."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tdmpc2_fast.benchmarks import dropin

FAKE = {
    "tdmpc2.py": "DEVICE = 'cuda:0'\n",
    "train.py": "from common.buffer import Buffer\nfrom tdmpc2 import TDMPC2\nassert torch.cuda.is_available()\n",
    "trainer/base.py": "from common.buffer import Buffer\n",
    "common/buffer.py": "from common.buffer import Buffer\n",
    "config.yaml": "defaults:\n    - override hydra/launcher: submitit_local\n\ntask: dog-run\n",
    "envs/dmcontrol.py": "class DMControlWrapper:\n\tpass\n",
    "envs/wrappers/tensor.py": "class TensorWrapper(gym.Wrapper):\n\tdef x(self):\n\t\tpass\n",
}


def test_a_copy_of_the_sources_is_changed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    checkout = tmp_path / "checkout"
    for name, text in FAKE.items():
        path = checkout / "tdmpc2" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    theirs = dropin.prepared(checkout, tmp_path / "theirs", ours=False)
    assert (theirs / "tdmpc2.py").read_text() == "DEVICE = 'cpu'\n"
    assert "from tdmpc2 import TDMPC2" in (theirs / "train.py").read_text()
    assert "assert" not in (theirs / "train.py").read_text()
    assert (theirs / "config.yaml").read_text().strip() == "task: dog-run"
    assert (theirs / "envs/dmcontrol.py").read_text().startswith("class DMControlWrapper(gym.Env):")
    assert "def __getattr__" in (theirs / "envs/wrappers/tensor.py").read_text()
    ours = dropin.prepared(checkout, tmp_path / "ours", ours=True)
    for name in ("train.py", "trainer/base.py"):
        assert "from tdmpc2_fast.compat.common.buffer import Buffer" in (ours / name).read_text()
    assert "from tdmpc2_fast.compat.tdmpc2 import TDMPC2" in (ours / "train.py").read_text()
    assert (ours / "common/buffer.py").read_text() == FAKE["common/buffer.py"]
    assert {str(p.relative_to(checkout / "tdmpc2")): p.read_text() for p in checkout.rglob("*.*")} == FAKE
    with pytest.raises(SystemExit, match=r"got no tdmpc2/tdmpc2.py in it"):
        dropin.prepared(tmp_path, tmp_path / "x", ours=False)


@pytest.mark.skipif("OFFICIAL" not in os.environ, reason="OFFICIAL names no checkout of the official code")
def test_all_of_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert dropin.main([os.environ["OFFICIAL"]]) == 0, capsys.readouterr().out
