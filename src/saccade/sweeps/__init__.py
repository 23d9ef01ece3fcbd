"""Many runs and one table: a grid over a recipe, and runs on the digit scenes."""

from saccade.sweeps.digits import LABELS, METHODS, QUICK, DigitSettings, digit_run
from saccade.sweeps.runner import Outcome, run_specs
from saccade.sweeps.spec import Evaluation, RunSpec, standard_inferences

__all__ = [
    "LABELS",
    "METHODS",
    "QUICK",
    "DigitSettings",
    "Evaluation",
    "Outcome",
    "RunSpec",
    "digit_run",
    "run_specs",
    "standard_inferences",
]
