"""Evaluate a trained model, with all visual tokens and with a fraction of them."""

from typing import TYPE_CHECKING

from saccade.late import late_names

if TYPE_CHECKING:
    from saccade.evaluation.digits import INFERENCES, Inference, evaluate_inferences, plan_inferences, prepare_prompts

__all__ = ["INFERENCES", "Inference", "evaluate_inferences", "plan_inferences", "prepare_prompts"]
__getattr__ = late_names(__name__, {"saccade.evaluation.digits": __all__})
