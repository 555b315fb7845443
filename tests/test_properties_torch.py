"""Any sequence of calls of torch's optimizer leaves the bits of the program; wrong ones nothing."""

import pytest
from support.sequences import sequences
from support.torch_training_machine import TorchTrainingMachine

pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")

TestTraining = TorchTrainingMachine.TestCase
TestTraining.settings = sequences(in_suite=200, to_ship=2000)
