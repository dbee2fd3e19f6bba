"""The official code as it is imported from a checkout: what the compiler needs of its modules."""

from __future__ import annotations

from pathlib import Path

import torch

from tdmpc2_fast.benchmarks.baselines.official import load_official

FAKE = {
    "tdmpc2.py": "from common import helper\n\ndef value(x):\n    return helper.twice(x) + 1\n",
    "common/__init__.py": "",
    "common/helper.py": "SCALE = FACTOR\n\ndef twice(x):\n    return SCALE[0] * x\n",
}


def test_modules_loaded_more_than_once_are_compiled_each_with_its_own_globals(tmp_path: Path) -> None:
    modules = []
    for factor in (2.0, 3.0):
        for name, text in FAKE.items():
            path = tmp_path / "tdmpc2" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("FACTOR", f"[{factor}]"))
        modules.append(load_official(str(tmp_path), torch.device("cpu")))
    for module, wanted in zip(modules, (3.0, 4.0), strict=True):
        compiled = torch.compile(module.value, backend="eager", fullgraph=True)
        assert compiled(torch.ones(2)).tolist() == [wanted, wanted]
