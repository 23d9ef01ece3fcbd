"""Qwen3.5 and Qwen3.5-MoE: Qwen3-VL's tower without deeper features, and a language model of linear attention."""

from saccade.families.qwen_vl import Qwen2VLFamily


class Qwen35Family(Qwen2VLFamily):
    """`Qwen3_5ForConditionalGeneration` and `Qwen3_5MoeForConditionalGeneration`.

    Three of four layers are gated delta nets: a state that each token decays and writes to, behind a convolution over
    four tokens. They know no positions, so a dropped token leaves no gap in them: see `Family.recurrent`.
    """

    name = "qwen3_5"
    model_types = ("qwen3_5", "qwen3_5_moe")
