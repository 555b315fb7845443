"""The example for bfloat16 weights: to nearest they stall, otherwise they learn as float32 does."""

import importlib.util
import re
from pathlib import Path

import pytest
from support.frameworks import load_torch

for name in ("sklearn", "matplotlib"):
    pytest.importorskip(name, reason=f"the examples need {name}: adamax_ext[demo]")

EXAMPLE = Path(__file__).parent.parent / "examples/torch_bf16.py"


@pytest.mark.usefixtures("one_torch_thread")
def test_nearest_stalls_and_the_others_do_not(tmp_path, monkeypatch, capsys):
    load_torch()
    monkeypatch.chdir(tmp_path)  # where it leaves its picture
    spec = importlib.util.spec_from_file_location("torch_bf16", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--steps", "150"]) == 0
    found = re.findall(r"held-out loss ([\d.]+), +([\d.]+) bytes", capsys.readouterr().out)
    (exact, nearest, stochastic, remainder), sizes = zip(
        *[map(float, x) for x in found], strict=True
    )
    assert nearest > exact + 0.03
    assert abs(stochastic - exact) < 0.01
    assert abs(remainder - exact) < 0.01
    assert sizes[2] < 4.2 < sizes[3] < 6.2 < sizes[1] < sizes[0] == 12
    picture = tmp_path / "torch_bf16.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    assert picture.stat().st_size > 20_000  # an empty canvas compresses to less
