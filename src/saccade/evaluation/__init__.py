"""Evaluate a trained model, with all visual tokens and with a fraction of them."""

from typing import TYPE_CHECKING

from saccade.late import late_names

if TYPE_CHECKING:
    from saccade.evaluation.digits import INFERENCES as INFERENCES
    from saccade.evaluation.digits import Inference as Inference
    from saccade.evaluation.digits import evaluate_digits as evaluate_digits
    from saccade.evaluation.digits import evaluate_inferences as evaluate_inferences
    from saccade.evaluation.digits import plan_inferences as plan_inferences
    from saccade.evaluation.digits import prepare_prompts as prepare_prompts

_HOMES = {
    "INFERENCES": "saccade.evaluation.digits",
    "Inference": "saccade.evaluation.digits",
    "evaluate_digits": "saccade.evaluation.digits",
    "evaluate_inferences": "saccade.evaluation.digits",
    "plan_inferences": "saccade.evaluation.digits",
    "prepare_prompts": "saccade.evaluation.digits",
}
__all__ = list(_HOMES)
__getattr__ = late_names(__name__, _HOMES)
