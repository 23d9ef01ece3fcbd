"""Overlap of the tokens kept by the released DualSpeed code and by `divprune`: bfloat16 and float32 cosines.

    python -m benchmarks.selection_overlap [--images 20] [--ratio 0.9] [--json FILE]

The released code computes cosines in the dtype of the features. bfloat16 has eight bits of precision: just below 1,
cosines are multiples of 1/256, so many unequal distances tie. Both implementations choose among the same bfloat16
features and keep the same number of tokens, rounded down as in the released code. The features are either random, at
LLaVA-1.5's shape, with and without a direction shared by all tokens of an image, or come from the embedded task's
trained tower, followed by a random projector.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.released import divprune_image
from saccade.data import digit_scenes
from saccade.families import get_family
from saccade.files import write_json_atomically
from saccade.reducers import get_reducer
from saccade.tiny import load_tiny
from saccade.tokens import VisualContext

TOKENS, WIDTH = 576, 4096
SHARED = (0.0, 1.0, 3.0)
"""Lengths of the shared direction relative to a token's own part: pairs have cosines around 0, 0.5 and 0.9."""


def drawn(images: int, shared: float) -> Iterator[Tensor]:
    """Random features `(N, D)`: independent tokens plus a shared direction."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(images):
        own = torch.randn(TOKENS, WIDTH, generator=generator)
        yield own + shared * torch.randn(1, WIDTH, generator=generator)


@torch.no_grad()
def trained(images: int) -> Iterator[Tensor]:
    """Features of digit scenes from the tiny LLaVA, with a trained tower and a random projector."""
    model, processor = load_tiny()
    family = get_family(model.eval())
    for row in digit_scenes("sft", "test", images, kinds=["read"]):
        inputs = processor(images=row["images"], text="<image>", return_tensors="pt")
        yield family.encode(inputs).context.features[0]


def overlaps(features: Iterator[Tensor], ratio: float) -> list[float]:
    """Share of the released code's selection that is also in ours, per image."""
    found = []
    for image in features:
        image = image.bfloat16()
        keep = int((1 - ratio) * len(image))
        released = set(divprune_image(image, keep).tolist())
        ours = set(get_reducer("divprune")(VisualContext(image.unsqueeze(0)), keep).index[0].tolist())
        found.append(len(released & ours) / len(released))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20, help="images per kind of features (default: %(default)s)")
    parser.add_argument("--ratio", type=float, default=0.9, help="share of tokens dropped (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write every image's share to")
    arguments = parser.parse_args()
    kinds = {f"drawn, shared direction {shared:g}": drawn(arguments.images, shared) for shared in SHARED}
    kinds["trained tower, digit scenes"] = trained(arguments.images)
    results = {kind: overlaps(features, arguments.ratio) for kind, features in kinds.items()}
    for kind, shares in results.items():
        mean = sum(shares) / len(shares)
        print(f"{kind}: {mean:.0%} in common ({min(shares):.0%} to {max(shares):.0%} per image)")
    if arguments.json:
        write_json_atomically(arguments.json, {"ratio": arguments.ratio, "overlap": results})


if __name__ == "__main__":
    main()
