"""Evaluate a trained model, with all visual tokens and with a fraction of them."""

from saccade.evaluation.digits import (
    INFERENCES,
    Inference,
    evaluate_digits,
    evaluate_inferences,
    plan_inferences,
    prepare_prompts,
)

__all__ = ["INFERENCES", "Inference", "evaluate_digits", "evaluate_inferences", "plan_inferences", "prepare_prompts"]
