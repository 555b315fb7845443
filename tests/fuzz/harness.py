"""What the fuzzers in Python share: the instrumented package, and how one runs."""

import sys
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["adamax_ext"]):
    import adamax_ext  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support


class Bytes(atheris.FuzzedDataProvider):
    """What an input decides."""

    def below(self, count):
        return self.ConsumeIntInRange(0, count - 1)

    def one_in(self, count):
        return self.below(count) == count - 1

    def pick(self, values):
        return values[self.below(len(values))]


def run(target):
    """Call `target` with the `Bytes` of one input after another."""
    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, lambda data: target(Bytes(data)))
    atheris.Fuzz()
