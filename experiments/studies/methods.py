"""The methods that the studies compare in addition to those of the demo, and their names in tables."""

from typing import Any

from saccade.sweeps import LABELS, METHODS
from saccade.sweeps.table import FIGURES as COMMON

OTHERS: dict[str, dict[str, Any]] = {
    "skip_256_320": {**METHODS["all_tokens"], "skip_vision": "256/320"},
    "skip_100_156": {**METHODS["all_tokens"], "skip_vision": "100/156"},
    "skip_64_156": {**METHODS["all_tokens"], "skip_vision": "64/156"},
    "dualspeed_skip": {"skip_vision": {"summary": True}},
    "three_speeds": {
        "modes": [
            {"name": "fast", "probability": 0.6},
            {"name": "middle", "probability": 0.3, "prune_ratio": 0.67, "teacher": "fast"},
            {"name": "slow", "probability": 0.1, "action": "keep", "teacher": "fast"},
        ]
    },
    "four_speeds": {
        "modes": [
            {"name": "fast", "probability": 0.6},
            {"name": "middle", "probability": 0.2, "prune_ratio": 0.67, "teacher": "fast"},
            {"name": "skipping", "probability": 0.1, "action": "skip", "teacher": "fast"},
            {"name": "slow", "probability": 0.1, "action": "keep", "teacher": "fast"},
        ]
    },
}
"""The same for Skip-Vision at three published budgets, for DualSpeed whose fast steps skip what they do not keep, and
for more speeds than two."""

ALL_METHODS = METHODS | OTHERS

WORDS = {
    **LABELS,
    "skip_256_320": "Skip-Vision 256/320",
    "skip_100_156": "Skip-Vision 100/156",
    "skip_64_156": "Skip-Vision 64/156",
    "dualspeed_skip": "DualSpeed that skips",
    "three_speeds": "three speeds",
    "four_speeds": "four speeds, one skips",
    "none": "in no stage",
    "pretrain": "in pretraining",
    "sft": "in fine-tuning",
    "both": "in both",
}
"""Names of label values in tables and pictures."""

FIGURES = {
    **{name: COMMON[name] for name in COMMON if not name.startswith("speedup")},
    "train_cpu_seconds": ("CPU time of training", "{:.0f} s"),
    "flops_full": ("GFLOPs of a prompt, all tokens", "{:.3f}"),
    "flops_pruned": ("pruned", "{:.3f}"),
    "flops_skip": ("skipping", "{:.3f}"),
    "speedup_steps": COMMON["speedup_steps"],
    "speedup_tokens": COMMON["speedup_tokens"],
}
"""The columns of the tables of studies: costs that other load on the machine hardly affects, not whole times."""
