"""Three small variables, and an optimizer that was built on them."""

import numpy as np
from adamax_ext import Adamax

from support.memory import DLPackOnly, torch_alias, values

# Other objects for the memory of a variable.
ALIASES = {
    "itself": lambda a: a,
    "view": lambda a: a[:],
    "flat": np.ravel,
    "torch": torch_alias,
    "DLPack": DLPackOnly,
    "memoryview": memoryview,
}


def three(first_seed=0):
    return [values(first_seed + i) for i in range(3)]


def built(**settings):
    """An optimizer after one call with variables a, b and c; their arrays; gradients for more."""
    optimizer, parameters = Adamax(**settings), three()
    optimizer.build(dict(zip("abc", parameters, strict=True)))
    optimizer.apply(three(3))
    return optimizer, parameters, three(6)
