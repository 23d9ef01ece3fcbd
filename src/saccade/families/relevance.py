"""How relevant each visual token is to the user's words, from a CLIP text tower or the model's own embeddings.

The user's words are the text of the prompt. In training they are what stands before an answer: tokens with a label are
answers, and a choice of tokens that saw them would leak them; so are the trailing tokens behind the last answer left
out. Each stretch between two answers is one turn. In inference, without labels, all text of the prompt is one turn.
Special tokens that the configs know (begin, end, padding, image markers) are no words. If labels cover the whole text,
or there is no text at all, no words are left and every token is equally relevant.

Shapes: B samples of L tokens; R feature rows of N visual tokens; T turns of the whole batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from saccade.errors import SaccadeError
from saccade.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from saccade.families.base import Encoded, Family

INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
"""What LLaVA's prompts add about the form of the answer, which says nothing about the image."""


def user_words(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None, no_words: Tensor
) -> tuple[Tensor, Tensor]:
    """Which tokens are the user's words, and which turn of its sample each token stands in.

    Args:
        input_ids: long `(B, L)`.
        attention_mask: `(B, L)`, zero on padding.
        labels: long `(B, L)`, -100 outside the answers; None in inference.
        no_words: bool `(B, L)`, true on placeholders and special tokens.

    Returns:
        bool `(B, L)` and long `(B, L)`.
    """
    words = attention_mask.bool() & ~no_words
    if labels is None:
        return words, torch.zeros_like(input_ids)
    answer = labels != IGNORE_INDEX
    begins = answer & ~torch.nn.functional.pad(answer[:, :-1], (1, 0))
    turn = begins.cumsum(dim=1)
    last = turn[:, -1:]
    # Behind the last answer nothing is asked. A sample without any answer, cut off before it, is all prompt.
    return words & ~answer & ((turn < last) | (last == 0)), turn


def special_ids(config: Any) -> list[int]:
    """The ids of special tokens that a config and the configs inside it name, in ascending order."""
    found: set[int] = set()
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for name, value in vars(part).items() if part is not None else ():
            if name.endswith(("_token_id", "_token_index", "_token_ids")) and value is not None:
                found.update(value if isinstance(value, (list, tuple)) else [value])
    return sorted(number for number in found if isinstance(number, int))


def row_samples(encoded: "Encoded", placeholder: Tensor) -> Tensor:
    """The sample that each feature row belongs to: long `(R,)`; rows stand in the order of their placeholders."""
    sample = torch.arange(placeholder.shape[0], device=placeholder.device).unsqueeze(1).expand_as(placeholder)
    owners = sample[placeholder]
    counts = encoded.context.valid.sum(dim=1)
    # A batch whose placeholders and tokens differ in number is refused when it is spliced, with a better message.
    first = (counts.cumsum(dim=0) - counts).clamp(max=max(owners.numel() - 1, 0))
    return owners[first] if owners.numel() else torch.zeros_like(counts)


def relevance(
    family: "Family",
    encoded: "Encoded",
    inputs: Mapping[str, Any],
    labels: Tensor | None,
    text_tower: "TextTower | None",
) -> Tensor:
    """Relevance float32 `(R, N)`, larger for what is more relevant, the mean over the turns of a row's sample.

    Without a text tower it is **plus** the cosine of a visual token with the input embedding of a word, averaged over
    the words of a turn. With one it is **minus** the cosine of patch and text in CLIP's joint space, whose sign is
    inverted for patches (CDPruner; for CLIP only), averaged over the segments of a turn.

    Raises:
        SaccadeError: if the text tower does not fit the model's vision tower.
    """
    ids = inputs["input_ids"]
    placeholder = family.placeholder(ids)
    special = torch.tensor(special_ids(family.model.config), device=ids.device)
    words, turn = user_words(ids, inputs["attention_mask"], labels, placeholder | torch.isin(ids, special))
    if text_tower is None:
        visual = encoded.context.features
        texts = _embedded_turns(family.model.get_input_embeddings(), ids, words, turn)
    else:
        visual = text_tower.patches(encoded.context.encoder_features)
        texts = -text_tower.texts(ids, words, turn, visual)
    wanted = texts.to(visual.device)[row_samples(encoded, placeholder)]  # (R, D)
    unit = torch.nn.functional.normalize(visual.float(), dim=2)
    score = (unit @ wanted.unsqueeze(2)).squeeze(2)
    return score.masked_fill(~encoded.context.valid, 0)


def _embedded_turns(embed: nn.Module, ids: Tensor, words: Tensor, turn: Tensor) -> Tensor:
    """For each sample the mean over turns of the mean unit embedding of a turn's words: float32 `(B, D)`."""
    vectors = torch.nn.functional.normalize(embed(ids).float(), dim=2) * words.unsqueeze(2)
    turns = ids.shape[1] + 1
    each = torch.zeros(ids.shape[0], turns, device=ids.device).scatter_add_(1, turn, words.float())
    share = words / each.clamp(min=1).gather(1, turn)
    return (vectors * share.unsqueeze(2)).sum(dim=1) / (each > 0).sum(dim=1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class TextTower:
    """A frozen CLIP model, for its text tower and the two projections into the joint space.

    Args:
        model: a `CLIPModel` in evaluation mode.
        tokenizer: its own tokenizer.
        reader: the language model's tokenizer, which turns ids back into text.
    """

    model: nn.Module
    tokenizer: Any
    reader: Any

    def patches(self, encoder_features: Tensor | None) -> Tensor:
        """Patches `(R, N, Dv)` of the vision tower in the joint space: float32 `(R, N, P)`.

        Raises:
            SaccadeError: if the tower's features are missing or have another width than the CLIP model's.
        """
        width = self.model.visual_projection.in_features
        if encoder_features is None or encoder_features.shape[-1] != width:
            given = "no features" if encoder_features is None else f"features of width {encoder_features.shape[-1]}"
            raise SaccadeError(
                f"text_tower: its vision side has width {width}, but the model's vision tower gives {given}; "
                "give the CLIPModel that the tower was taken from, or leave text_tower out"
            )
        self.model.to(encoder_features.device)
        normed = self.model.vision_model.post_layernorm(encoder_features.float())
        return self.model.visual_projection(normed)

    def texts(self, ids: Tensor, words: Tensor, turn: Tensor, like: Tensor) -> Tensor:
        """For each sample the mean over turns of the mean unit embedding of a turn's segments: float32 `(B, P)`."""
        result = torch.zeros(ids.shape[0], like.shape[-1], device=like.device)
        for number in range(ids.shape[0]):
            asked = [turn[number] == one for one in turn[number][words[number]].unique().tolist()]
            texts = [self._text(ids[number][words[number] & one]) for one in asked]
            embedded = [self._embed(text, like.device) for text in texts if text]
            if embedded:
                result[number] = torch.stack(embedded).mean(dim=0)
        return result

    def _text(self, ids: Tensor) -> str:
        text = self.reader.decode(ids.tolist(), skip_special_tokens=True)
        for instruction in INSTRUCTIONS:
            text = text.replace(instruction, "")
        return text.strip()

    def _embed(self, text: str, device: torch.device) -> Tensor:
        """The mean unit embedding `(P,)` of a text, in segments as long as the text tower takes."""
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        room = self.model.config.text_config.max_position_embeddings - 2
        segments = [[begin, *tokens[at : at + room], end] for at in range(0, max(len(tokens), 1), room)]
        outputs = [
            self.model.get_text_features(torch.tensor([segment], device=device), return_dict=True).pooler_output
            for segment in segments
        ]
        return torch.nn.functional.normalize(torch.cat(outputs).float(), dim=1).mean(dim=0)


@lru_cache(maxsize=2)
def load_text_tower(folder: str, tokenizer: str) -> TextTower:
    """The CLIP model in `folder`, with its tokenizer, and the language model's tokenizer.

    Raises:
        SaccadeError: if one of the folders does not hold what it should.
    """
    from transformers import AutoTokenizer, CLIPModel

    def load(field: str, place: str, read: Any, what: str) -> Any:
        try:
            return read(place)
        except (OSError, ValueError) as error:
            raise SaccadeError(f"{field}={place!r}: no {what} could be read there: {error}") from error

    model = load("text_tower", folder, CLIPModel.from_pretrained, "CLIPModel").float().eval().requires_grad_(False)
    own = load("text_tower", folder, AutoTokenizer.from_pretrained, "tokenizer")
    return TextTower(model, own, load("tokenizer", tokenizer, AutoTokenizer.from_pretrained, "tokenizer"))
