"""Any sequence of calls leaves the bits of the NumPy program; wrong ones change nothing."""

from support.sequences import sequences
from support.training_machine import TrainingMachine

TestTraining = TrainingMachine.TestCase
TestTraining.settings = sequences(in_suite=400, to_ship=8000)
