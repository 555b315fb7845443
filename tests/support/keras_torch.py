"""Keras on torch, for tests of what only that backend has: memory, views and plans.

Who imports from here is skipped where Keras is on another backend.
"""

import pytest

from support.frameworks import load_torch
from support.keras_pairs import BACKEND

torch = load_torch()
if BACKEND != "torch":
    pytest.skip("needs keras on torch: KERAS_BACKEND=torch", allow_module_level=True)
