"""Lets torchvision be imported beside the CPU build of torch: vLLM's LLaVA imports it, and uses none of its operators.

PyPI's torchvision is built for CUDA. Its compiled part does not load beside the CPU build of torch, which it passes
over in silence, and then describes two operators that the compiled part would have declared. Here they are declared.
`make test-serve` puts this file into its own environment, where a `.pth` file imports it first.
"""

import torch

OPERATORS = torch.library.Library("torchvision", "DEF")
OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
