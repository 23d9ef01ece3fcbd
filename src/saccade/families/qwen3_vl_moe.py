"""Qwen3-VL-MoE: Qwen3-VL whose language model has experts."""

from saccade.families.qwen_vl import Qwen3VLFamily


class Qwen3VLMoeFamily(Qwen3VLFamily):
    """`Qwen3VLMoeForConditionalGeneration`.

    The loss has no term that balances the experts' load, as the stock model's has none unless `output_router_logits`
    is set.
    """

    name = "qwen3_vl_moe"
    model_types = ("qwen3_vl_moe",)
