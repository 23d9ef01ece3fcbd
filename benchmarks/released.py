"""The procedure of the released DualSpeed code, reimplemented from its description as a benchmark baseline.

It prunes image by image in the model's dtype, re-encodes the images in each pass, computes full-vocabulary logits for
every row, keeps all hidden states, finds label positions token by token, and transfers the losses to the host at each
step. Nothing in Saccade uses it.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.families import Family, get_family
from saccade.tokens import IGNORE_INDEX


def divprune_image(features: Tensor, keep: int) -> Tensor:
    """Greedy max-min selection for one image `(N, D)` in its dtype: sorted token indices, long `(keep,)`."""
    unit = features / features.norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    chosen: list[Tensor] = []
    for step in range(keep):
        if step == 0:
            # The token whose nearest neighbour is farthest away.
            nearest = distance.clone().fill_diagonal_(float("inf")).min(dim=1).values
        else:
            nearest = distance[:, torch.stack(chosen)].min(dim=1).values
        chosen.append(nearest.argmax())
    return torch.stack(chosen).sort().values


class ReleasedProcedure(nn.Module):
    """Fast and slow steps as in the released code.

    Args:
        model: a stock model with one-dimensional positions, PEFT-wrapped or not.
        prune_ratio: share of visual tokens dropped; the number kept is rounded down, as in the released code.
        isolator_length: mode-isolator rows before each image.
    """

    def __init__(self, model: nn.Module, prune_ratio: float = 0.9, isolator_length: int = 4) -> None:
        super().__init__()
        self.family: Family = get_family(model)
        width = self.family.model.config.get_text_config().hidden_size
        self.isolator = nn.Linear(width, isolator_length, bias=False, device=self.family.model.device)
        self.prune_ratio = prune_ratio
        self.held: tuple[Tensor, ...] | None = None

    def select(self, features: Tensor, keep: int) -> Tensor:
        """The kept tokens of one image."""
        return divprune_image(features, keep)

    def fast(self, inputs: Mapping[str, Any]) -> Tensor:
        """The loss of a fast micro-batch."""
        logits, labels = self._pass(inputs, prune=True)
        loss = shifted_cross_entropy(logits, labels)
        loss.item()
        return loss

    def slow(self, inputs: Mapping[str, Any]) -> Tensor:
        """The loss of a slow micro-batch: cross-entropy plus KL divergence from the fast sequence with the same
        weights."""
        with torch.no_grad():
            teacher, teacher_labels = self._pass(inputs, prune=True, hidden=True)
        student, labels = self._pass(inputs, prune=False, hidden=True)
        cross_entropy = shifted_cross_entropy(student, labels)
        pairs = [rows_of_labels(*given) for given in ((student, labels), (teacher, teacher_labels))]
        count = min(len(rows) for rows in pairs)
        student_rows, teacher_rows = (rows[:count].float() for rows in pairs)
        kl = F.kl_div(F.log_softmax(student_rows, dim=-1), F.softmax(teacher_rows, dim=-1), reduction="batchmean")
        for value in (cross_entropy, kl):
            value.item()
        return cross_entropy + kl

    def _pass(self, inputs: Mapping[str, Any], prune: bool, hidden: bool = False) -> tuple[Tensor, Tensor]:
        """Encode, splice sample by sample, and run the language model: logits of every row, and their labels."""
        family = self.family
        # `encode` would stop the tower at the last layer that is used; the released code runs all of them.
        context = family._encode(inputs).context
        # Images of LLaVA-NeXT differ in their number of rows, and are padded.
        features = [image[valid] for image, valid in zip(context.features, context.valid, strict=True)]
        if prune:
            isolator = self.isolator.weight.to(features[0].dtype)
            counts = [max(1, int((1 - self.prune_ratio) * len(image))) for image in features]
            kept = [image[self.select(image.detach(), keep)] for image, keep in zip(features, counts, strict=True)]
            features = [torch.cat((isolator, image)) for image in kept]
        rows, labels = self._splice(inputs, features)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in labels], batch_first=True)
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        padded = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX)
        output = family.language_model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, output_hidden_states=hidden
        )
        # The released code keeps them alive through the step too, although nothing reads them.
        self.held = output.hidden_states
        return family.model.get_output_embeddings()(output.last_hidden_state).float(), padded

    def _splice(self, inputs: Mapping[str, Any], features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Embeddings and labels of each sample, with placeholder tokens replaced by image features."""
        embedding = self.family.model.get_input_embeddings()
        images = iter(features)
        per_image = len(features) // max(1, len(inputs["input_ids"]))
        rows, targets = [], []
        for ids, mask, labels in zip(
            inputs["input_ids"], inputs["attention_mask"].bool(), inputs["labels"], strict=True
        ):
            ids, labels = ids[mask], labels[mask]
            place = self.family.placeholder(ids)
            first = int(place.nonzero()[0])
            after = first + int(place.sum())
            visual = torch.cat([next(images) for _ in range(per_image)])
            rows.append(torch.cat((embedding(ids[:first]), visual, embedding(ids[after:]))))
            ignored = labels.new_full((len(visual),), IGNORE_INDEX)
            targets.append(torch.cat((labels[:first], ignored, labels[after:])))
        return rows, targets


def shifted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The stock causal language-modelling loss: the mean over label tokens."""
    flat = logits[:, :-1].contiguous().view(-1, logits.shape[-1])
    return F.cross_entropy(flat, labels[:, 1:].reshape(-1), ignore_index=IGNORE_INDEX)


def rows_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits `(M, V)` that predict a label, whose positions are found by a loop over tokens."""
    rows = []
    for row, targets in zip(logits, labels, strict=True):
        places = [place - 1 for place, target in enumerate(targets) if place and target != IGNORE_INDEX]
        rows.append(row[places])
    return torch.cat(rows)
