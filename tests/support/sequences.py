"""What property tests share: how many examples, few and always the same in the suite; and data.

`pytest tests/test_properties*.py --hypothesis-profile=ship` tries other ones each time, and prints
how to repeat one that fails.
"""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

settings.register_profile("ship", print_blob=True)


def sequences(in_suite, to_ship):
    """Return the settings of a test that tries so many examples."""
    is_shipped = settings.get_current_profile_name() == "ship"
    return settings(
        max_examples=to_ship if is_shipped else in_suite,
        stateful_step_count=20,
        derandomize=not is_shipped,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


seeds = st.integers(0, 9999)  # of data: values follow from it, so that examples stay small
rates = st.sampled_from([0.0371, 0.0, 1e-4, 1.7])
# Of one gradient: mostly there, and mostly usual numbers.
FLAVOURS = ["usual"] * 5 + ["none"] * 3 + ["zeros", "huge", "tiny", "nan", "inf"]


def flavoured(rng, usual, flavour):
    """Return float64 numbers made of usual ones."""
    values = np.array(usual, np.float64)
    factor = {"zeros": 0.0, "huge": 2.0**125, "tiny": 2.0**-120}.get(flavour, 1.0)
    values *= factor
    if flavour in ("nan", "inf") and values.size:
        values.flat[rng.integers(values.size)] = float(flavour)
    return values
