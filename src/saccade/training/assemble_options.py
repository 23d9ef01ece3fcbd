"""The options of `saccade assemble`, without torch, so that the command line can declare a flag for each."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AssembleOptions:
    """How to assemble the parts.

    Args:
        gguf_file: name of a GGUF file in the language model's folder or hub repository to read it from.
        crops: "none" for one picture per image (LLaVA-1.5); "anyres" for a thumbnail, and crops at about the image's
            own aspect ratio (LLaVA-NeXT); "hd" for a thumbnail, and two by two crops; "hd_pad" for the same of the
            image padded to a square (LLaVA-HD, see docs/recipes.md).
        projector: "mlp" for LLaVA's two layers on each patch; "resampler" for Chain-of-Sight's, whose queries look at
            windows of two sizes (see docs/assemble.md).
        chat_template: "own" adapts the language model's, or uses LLaVA's v1 if it has none; "v1"; or a file.
        system_prompt: for conversations without one; by default that of the template.
        image_size: edge in pixels of what the tower takes at once, a picture or a crop; by default its own, which it
            cannot exceed. A smaller one has the position embeddings of the middle, so that neighbours are as far apart
            as the tower has learned.
        feature_layer: index of the tower's hidden state that the projector reads.
        dtype: of the weights: "auto" (the language model's), "float32", "bfloat16" or "float16".
        seed: seed of the projector's weights.
        max_shard_size: size above which the weights are split into several files.
    """

    gguf_file: str | None = None
    crops: str = "none"
    projector: str = "mlp"
    chat_template: str = "own"
    system_prompt: str | None = None
    image_size: int | None = None
    feature_layer: int = -2
    dtype: str = "auto"
    seed: int = 0
    max_shard_size: str = "5GB"
