"""Many runs and one table: grids of recipes, and the paper's studies on the digit scenes."""

from saccade.sweeps.digits import LABELS, METHODS, QUICK, DigitSettings, digit_run, standard_inferences
from saccade.sweeps.runner import Outcome, run_specs
from saccade.sweeps.spec import Evaluation, RunSpec

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
