"""An older torch than adamax_ext.torch can work with is refused at its import."""

import importlib
import re

import pytest
from support.frameworks import load_torch

torch = load_torch()

import adamax_ext.torch  # noqa: E402


@pytest.mark.parametrize("version", ["2.5.1+cpu", "1.13.0"])
def test_old_versions_are_refused(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    with pytest.raises(
        ImportError, match=rf"needs torch 2\.6 or newer; received torch {re.escape(version)}"
    ):
        importlib.reload(adamax_ext.torch)


@pytest.mark.parametrize("version", ["2.6.0", "2.10.0+cu130", "3.0.0"])
def test_new_versions_are_taken(version, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    assert importlib.reload(adamax_ext.torch).Adamax is adamax_ext.torch.optimizer.Adamax
