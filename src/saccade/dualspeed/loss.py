"""Cross-entropy and distillation on label rows only, in chunks, without `(B, L, V)` logits.

Notation: M label rows, width D, vocabulary V.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.tokens import IGNORE_INDEX

Head = Callable[[Tensor], Tensor]
"""`(M, D)` to `(M, V)`. Called as a module, never through its weight, so that the hooks of FSDP and ZeRO fire."""

CHUNK_ROWS = 1024


def learnable_labels(labels: Tensor, placeholder: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The labels without those that a step does not learn: of visual tokens, of padding, and of the first token of a
    row, which nothing predicts.

    With padding on the left, there is a row before the first token in the full sequence, and none in a shortened one.

    Args:
        labels: long `(B, L)`.
        placeholder: bool `(B, L)`, true on visual tokens.
        attention_mask: `(B, L)`; without one there is no padding.
    """
    real = torch.ones_like(placeholder) if attention_mask is None else attention_mask.bool()
    predicted = real & F.pad(real[:, :-1], (1, 0))
    return labels.masked_fill(placeholder | ~predicted, IGNORE_INDEX)


def label_rows(hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that predict a label, and those labels.

    Args:
        hidden_states: `(B, L, D)`.
        labels: long `(B, L)`, -100 where there is no label.

    Returns:
        `(M, D)` and long `(M,)`: row (b, t) predicts label (b, t + 1).
    """
    wanted = F.pad(labels[:, 1:] != IGNORE_INDEX, (0, 1))
    # Computed once: boolean indexing would synchronise with the device twice here, and again in the backward pass.
    rows = wanted.flatten().nonzero().squeeze(1)
    return hidden_states.flatten(0, 1).index_select(0, rows), labels.flatten().index_select(0, rows + 1)


def cross_entropy_sum(hidden_rows: Tensor, targets: Tensor, head: Head, chunk_rows: int = CHUNK_ROWS) -> Tensor:
    """Sum over label rows of -log softmax(head(h))[target], in float32: a scalar.

    Args:
        hidden_rows: `(M, D)`.
        targets: long `(M,)`.
    """

    def chunk_loss(rows: Tensor, chunk_targets: Tensor) -> Tensor:
        return F.cross_entropy(head(rows).float(), chunk_targets, reduction="sum")

    return _sum_chunks(chunk_loss, (hidden_rows, targets), chunk_rows)


def cross_entropy_and_kl_sum(
    student_rows: Tensor,
    teacher_rows: Tensor,
    targets: Tensor,
    head: Head,
    temperature: float = 1.0,
    chunk_rows: int = CHUNK_ROWS,
) -> tuple[Tensor, Tensor]:
    """Sums over label rows of the student's cross-entropy and of KL(teacher || student): two scalars.

    Both distributions of the KL are at `temperature` (DualSpeed, Eq. of the slow mode); there is no factor
    temperature^2. The teacher gets no gradient. The student's logits are computed once for both terms.

    Args:
        student_rows: `(M, D)` from the full sequence.
        teacher_rows: `(M, D)` from the shortened sequence, with the same label in each row.
    """

    def chunk_losses(student: Tensor, teacher: Tensor, chunk_targets: Tensor) -> Tensor:
        logits = head(student).float()
        with torch.no_grad():
            teacher_log_probs = F.log_softmax(head(teacher).float() / temperature, dim=-1)
        ce = F.cross_entropy(logits, chunk_targets, reduction="sum")
        kl = F.kl_div(F.log_softmax(logits / temperature, dim=-1), teacher_log_probs, reduction="sum", log_target=True)
        return torch.stack((ce, kl))

    ce, kl = _sum_chunks(chunk_losses, (student_rows, teacher_rows.detach(), targets), chunk_rows).unbind()
    return ce, kl


def _sum_chunks(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], chunk_rows: int) -> Tensor:
    """Sum `function` over chunks of rows; logits of all but a single chunk are recomputed in the backward pass."""
    if tensors[0].shape[0] <= chunk_rows:
        return function(*tensors)
    total = None
    for pieces in zip(*(tensor.split(chunk_rows) for tensor in tensors), strict=True):
        part = checkpoint(function, *pieces, use_reentrant=False)
        total = part if total is None else total + part
    return total
