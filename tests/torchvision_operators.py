"""Makes torchvision importable with the CPU build of torch: vLLM's LLaVA and transformers' video processors import it,
but use none of its operators.

PyPI's torchvision is built for CUDA. Its compiled part does not load with the CPU build of torch, which torchvision
ignores silently; it then refers to two operators that the compiled part would have declared. Here they are declared.
`make test-serve` and `make test-video` put this file into separate environments, where a `.pth` file imports it
first.
"""

import torch

OPERATORS = torch.library.Library("torchvision", "DEF")
OPERATORS.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
OPERATORS.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
