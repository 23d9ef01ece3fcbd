"""How relevant each visual token is to the user's words, from a CLIP text tower or the model's own embeddings.

The user's words are those of the user's turns in the prompt, see `saccade.families.question`. Without a known
tokenizer they are the whole text of the prompt, except special tokens that the configs name. In training, the prompt
is the text before an answer: tokens with a label are answers, and a selection that saw them would leak them. Tokens
after the last answer are left out too. If labels cover the whole text, or there is no text, no words remain and every
token is equally relevant.

Shapes: B samples of L tokens; R feature rows of N visual tokens; T turns of the whole batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saccade.errors import SaccadeError
from saccade.families.question import Reader, load_reader, models_reader
from saccade.tokens import IGNORE_INDEX, VisualContext


def user_words(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None, no_words: Tensor
) -> tuple[Tensor, Tensor]:
    """Which tokens are the user's words, and which turn of its sample each token belongs to.

    All of `(B, L)`: `labels` are -100 outside the answers, `no_words` is true on placeholders and special tokens.

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
    # Nothing is asked after the last answer. A sample that was truncated before any answer is all prompt.
    return words & ~answer & ((turn < last) | (last == 0)), turn


def special_ids(config: Any) -> list[int]:
    """The ids of special tokens that a config and the configs inside it name, in ascending order."""
    found: set[int] = set()
    for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
        for name, value in vars(part).items() if part is not None else ():
            if name.endswith(("_token_id", "_token_index", "_token_ids")) and value is not None:
                found.update(value if isinstance(value, (list, tuple)) else [value])
    return sorted(number for number in found if isinstance(number, int))


def row_samples(context: VisualContext, placeholder: Tensor) -> Tensor:
    """The sample that each feature row belongs to: long `(R,)`; rows are in the order of their placeholders."""
    sample = torch.arange(placeholder.shape[0], device=placeholder.device).unsqueeze(1).expand_as(placeholder)
    owners = sample[placeholder]
    counts = context.valid.sum(dim=1)
    # A batch whose placeholders and tokens differ in number is refused when it is spliced, with a better message.
    first = (counts.cumsum(dim=0) - counts).clamp(max=max(owners.numel() - 1, 0))
    return owners[first] if owners.numel() else torch.zeros_like(counts)


@dataclass(frozen=True)
class Asked:
    """A batch, for the words of its users.

    Args:
        model: the stock model.
        inputs: processor outputs.
        labels: long `(B, L)` of a training batch, so that no answer is seen.
        placeholder: bool `(B, L)`.
        tokenizer: folder of the tokenizer that finds the user's words; None for the model's own.
    """

    model: PreTrainedModel
    inputs: Mapping[str, Any]
    labels: Tensor | None
    placeholder: Tensor
    tokenizer: str | None = None

    def turns(self) -> list[list[list[int]]]:
        """For each sample the ids of the user's words, by turn."""
        reader = load_reader(str(self.tokenizer)) if self.tokenizer else models_reader(self.model.name_or_path)
        if reader is not None:
            return [[reader.ids(words) for words in sample] for sample in self.questions(reader)]
        ids = self.inputs["input_ids"]
        special = torch.tensor(special_ids(self.model.config), device=ids.device)
        return self._prompts(self.placeholder | torch.isin(ids, special))

    def questions(self, reader: Reader) -> list[list[str]]:
        """For each sample the words of its turns, as a reader finds them."""
        # Of several placeholders in a row, one is enough to mark the place of an image.
        again = self.placeholder & torch.nn.functional.pad(self.placeholder[:, :-1], (1, 0))
        return [[words for prompt in sample for words in reader.questions(prompt)] for sample in self._prompts(again)]

    def _prompts(self, no_words: Tensor) -> list[list[list[int]]]:
        """For each sample, the ids before each of its answers, without those of `no_words`."""
        ids = self.inputs["input_ids"]
        words, turn = user_words(ids, self.inputs["attention_mask"], self.labels, no_words)
        # A single copy to the host, whatever the batch contains.
        rows = torch.stack((ids, words.to(ids.dtype), turn.to(ids.dtype))).tolist()
        prompts: list[list[list[int]]] = []
        for row, mask, turns in zip(*rows, strict=True):
            sample: dict[int, list[int]] = {}
            for token, is_word, number in zip(row, mask, turns, strict=True):
                if is_word:
                    sample.setdefault(number, []).append(token)
            prompts.append([sample[number] for number in sorted(sample)])
        return prompts


def relevance(asked: Asked, context: VisualContext, text_tower: str | None) -> Tensor:
    """Relevance float32 `(R, N)`, larger for more relevant tokens, averaged over the turns of the row's sample.

    Without a text tower it is **plus** the cosine of a visual token with the input embedding of a word, averaged over
    the words of a turn. With one, it is **minus** the cosine of patch and text in CLIP's joint space, whose sign is
    inverted for patches (CDPruner; for CLIP only), averaged over the segments of a turn.

    Args:
        context: the visual tokens; with a text tower, including `encoder_features`.
        text_tower: folder of the CLIP model, or None.

    Raises:
        SaccadeError: if the text tower does not match the model's vision tower, or something is missing from a folder.
    """
    if text_tower:
        tokenizer = asked.tokenizer or asked.model.name_or_path
        if not tokenizer:
            raise SaccadeError(
                "text_tower: the words are read with the language model's tokenizer, but this model was loaded from "
                "none; give the tokenizer's folder as the reducer's option 'tokenizer'"
            )
        tower = load_text_tower(str(text_tower), str(tokenizer))
        visual = tower.patches(context.encoder_features)
        texts = -tower.texts(asked.questions(tower.reader), visual)
    else:
        visual = context.features
        texts = _embedded_turns(asked.model.get_input_embeddings(), asked.turns(), asked.inputs["input_ids"].device)
    wanted = texts.to(visual.device)[row_samples(context, asked.placeholder)]  # (R, D)
    unit = torch.nn.functional.normalize(visual.float(), dim=2)
    score = (unit @ wanted.unsqueeze(2)).squeeze(2)
    return score.masked_fill(~context.valid, 0)


def word_relevance(asked: Asked, context: VisualContext) -> tuple[Tensor, Tensor]:
    """The cosine of each visual token with the input embedding of each of the user's words, in all turns.

    Returns:
        float32 `(R, N, W)`, zero on padding and after a row's words, and the number of words of each row, long `(R,)`.

    Raises:
        SaccadeError: if something is missing from the tokenizer's folder.
    """
    words = [[word for turn in sample for word in turn] for sample in asked.turns()]
    device = asked.inputs["input_ids"].device
    texts = _embedded(asked.model.get_input_embeddings(), words, device)
    counts = torch.tensor([len(sample) for sample in words], dtype=torch.long, device=device)
    owner = row_samples(context, asked.placeholder)
    visual = context.features
    wanted = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True).to(visual.device)[owner]  # (R, W, D)
    unit = torch.nn.functional.normalize(visual.float(), dim=2)
    return (unit @ wanted.mT).masked_fill(~context.valid.unsqueeze(2), 0), counts[owner]


def _embedded(embed: nn.Module, lists: list[list[int]], device: torch.device) -> tuple[Tensor, ...]:
    """The unit embeddings of each list of words: float32 `(n, D)` each."""
    # One call, whatever the lists contain: if the embedding is sharded, all ranks must call it equally often.
    flat = torch.tensor([word for words in lists for word in words], dtype=torch.long, device=device)
    # In training, `neftune_noise_alpha` adds noise to what the embedding returns, for batches of rows only.
    training, embed.training = embed.training, False
    try:
        vectors = embed(flat).float()
    finally:
        embed.training = training
    return torch.nn.functional.normalize(vectors, dim=1).split([len(words) for words in lists])


def _embedded_turns(embed: nn.Module, turns: list[list[list[int]]], device: torch.device) -> Tensor:
    """For each sample, the mean over turns of the mean unit embedding of a turn's words: float32 `(B, D)`."""
    real = [[turn for turn in sample if turn] for sample in turns]
    vectors = iter(_embedded(embed, [turn for sample in real for turn in sample], device))
    means = [[next(vectors).mean(dim=0) for _ in sample] for sample in real]
    nothing = torch.zeros(embed.weight.shape[-1], device=device)
    return torch.stack([torch.stack(sample).mean(dim=0) if sample else nothing for sample in means])


@dataclass(frozen=True)
class TextTower:
    """A frozen CLIP model, used for its text tower and its two projections into the joint space.

    Args:
        model: a `CLIPModel` in evaluation mode.
        tokenizer: the CLIP model's tokenizer.
        reader: finds the user's words in the language model's input.
    """

    model: nn.Module
    tokenizer: Any
    reader: Reader

    def patches(self, encoder_features: Tensor | None) -> Tensor:
        """Patches `(R, N, Dv)` of the vision tower in the joint space: float32 `(R, N, P)`.

        Raises:
            SaccadeError: if the tower's features are missing or their width differs from the CLIP model's.
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

    def texts(self, asked: list[list[str]], like: Tensor) -> Tensor:
        """For each sample, the mean over turns of the mean unit embedding of a turn's segments: float32 `(B, P)`."""
        result = torch.zeros(len(asked), like.shape[-1], device=like.device)
        for number, texts in enumerate(asked):
            if texts:
                result[number] = torch.stack([self._embed(text, like.device) for text in texts]).mean(dim=0)
        return result

    def _embed(self, text: str, device: torch.device) -> Tensor:
        """The mean unit embedding `(P,)` of a text, split into segments of the text tower's maximum length."""
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
    """The CLIP model and its tokenizer in `folder`, and the reader for the language model's folder `tokenizer`.

    Raises:
        SaccadeError: if something is missing from one of the folders.
    """
    from transformers import AutoTokenizer, CLIPModel

    def load(read: Any, what: str) -> Any:
        try:
            return read(folder)
        except (OSError, ValueError) as error:
            raise SaccadeError(f"text_tower={folder!r}: no {what} could be read there: {error}") from error

    model = load(CLIPModel.from_pretrained, "CLIPModel").float().eval().requires_grad_(False)
    own = load(AutoTokenizer.from_pretrained, "tokenizer")
    return TextTower(model, own, load_reader(tokenizer))
