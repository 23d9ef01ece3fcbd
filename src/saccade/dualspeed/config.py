"""Every option of a DualSpeed run, on top of TRL's `SFTConfig`."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from trl import SFTConfig

from saccade.dualspeed.schedule import ModeSchedule
from saccade.errors import SaccadeError
from saccade.pruning import check_positions
from saccade.reducers import get_reducer
from saccade.tokens.budget import check_prune_ratio

# What a resumed run must share with the run it goes on from: with another value its loss curve would not continue.
RESUME_FIELDS = (
    "reducer",
    "reducer_options",
    "prune_ratio",
    "slow_probability",
    "schedule",
    "isolator_length",
    "distill_weight",
    "distill_temperature",
    "positions",
    "projector_learning_rate",
    "freeze_vision_tower",
    "freeze_projector",
    "freeze_language_model",
    "assistant_only_loss",
    "max_length",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "bf16",
    "fp16",
    "data_seed",
    "seed",
)


@dataclass
class DualSpeedConfig(SFTConfig):
    r"""
    Options of a [`DualSpeedTrainer`]: those of [`~trl.SFTConfig`], and the ones below.

    `slow_probability=0, isolator_length=0` trains on pruned tokens only. `prune_ratio=0, slow_probability=1,
    distill_weight=0` is ordinary supervised fine-tuning.

    Args:
        reducer (`str`, *optional*, defaults to `"divprune"`):
            Method that chooses the visual tokens of fast steps; `saccade reducers` lists them.
        reducer_options (`dict`, *optional*):
            Keyword options of the reducer.
        prune_ratio (`float`, *optional*, defaults to `0.9`):
            Share of visual tokens that fast steps drop, in [0, 1). The paper's p.
        slow_probability (`float`, *optional*, defaults to `0.1`):
            Share of slow steps, on all tokens, in [0, 1]. The paper's r. A stage in which no parameter of the language
            model trains is always fast.
        schedule (`str`, *optional*, defaults to `"bernoulli"`):
            `"bernoulli"` draws the mode of each step, as published. `"stratified"` spreads the slow steps evenly.
        isolator_length (`int`, *optional*, defaults to `4`):
            Rows of the mode isolator before each image in fast steps, the paper's l; 0 switches it off.
        isolator_path (`str`, *optional*):
            Isolator to start from. When left out, the one beside the model's weights if there is one.
        distill_weight (`float`, *optional*, defaults to `1.0`):
            Weight of KL(fast || slow) in slow steps, the paper's lambda; 0 switches it off.
        distill_temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of both distributions in the KL, the paper's tau.
        positions (`str`, *optional*, defaults to `"compact"`):
            `"compact"` renumbers the shortened sequence, as published. `"original"` lets kept tokens keep the position
            they have in the full sequence.
        projector_learning_rate (`float`, *optional*):
            Learning rate of the projector and the isolator; that of the rest when left out.
        freeze_vision_tower (`bool`, *optional*, defaults to `True`):
            Train no parameter of the vision tower.
        freeze_projector (`bool`, *optional*, defaults to `False`):
            Train no parameter of the projector.
        freeze_language_model (`bool`, *optional*, defaults to `False`):
            Train no parameter of the language model and its head: stage one of the paper.
        assistant_only_loss (`bool`, *optional*):
            Learn the assistant's words only. When left out, true for datasets with a `messages` column.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest full sequence. Text beyond it is cut; a limit that would cut image tokens is an error.

    Raises:
        SaccadeError: on a value outside its range, naming the option and the fix.
    """

    reducer: str = field(default="divprune", metadata={"help": "Method that chooses the visual tokens of fast steps."})
    reducer_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keyword options of the reducer, as a dict or as JSON."}
    )
    prune_ratio: float = field(
        default=0.9, metadata={"help": "Share of visual tokens that fast steps drop, in [0, 1)."}
    )
    slow_probability: float = field(default=0.1, metadata={"help": "Share of slow steps, in [0, 1]."})
    schedule: str = field(default="bernoulli", metadata={"help": "'bernoulli' (as published) or 'stratified'."})
    isolator_length: int = field(default=4, metadata={"help": "Rows of the mode isolator; 0 switches it off."})
    isolator_path: str | None = field(
        default=None, metadata={"help": "Isolator to start from; by default the one beside the model's weights."}
    )
    distill_weight: float = field(default=1.0, metadata={"help": "Weight of the KL in slow steps; 0 switches it off."})
    distill_temperature: float = field(default=1.0, metadata={"help": "Temperature of the KL."})
    positions: str = field(default="compact", metadata={"help": "'compact' (as published) or 'original'."})
    projector_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of projector and isolator; by default that of the rest."}
    )
    freeze_vision_tower: bool = field(default=True, metadata={"help": "Train no parameter of the vision tower."})
    freeze_projector: bool = field(default=False, metadata={"help": "Train no parameter of the projector."})
    freeze_language_model: bool = field(
        default=False, metadata={"help": "Train no parameter of the language model: stage one of the paper."}
    )
    assistant_only_loss: bool | None = field(
        default=None, metadata={"help": "Learn the assistant's words only; by default true for `messages` datasets."}
    )
    max_length: int | None = field(
        default=2048, metadata={"help": "Longest full sequence; must not cut image tokens."}
    )

    _VALID_DICT_FIELDS: ClassVar = [*SFTConfig._VALID_DICT_FIELDS, "reducer_options"]

    def __post_init__(self) -> None:
        # transformers renamed the option and warns about the old name, which TRL's default still sets.
        if getattr(self, "activation_checkpointing", False) is None:
            self.activation_checkpointing = self.gradient_checkpointing
        super().__post_init__()
        check_prune_ratio(self.prune_ratio)
        check_positions(self.positions)
        self.mode_schedule()
        get_reducer(self.reducer, **(self.reducer_options or {}))
        if not isinstance(self.isolator_length, int) or self.isolator_length < 0:
            raise SaccadeError(
                f"isolator_length={self.isolator_length!r}: use 0 for none, or a number of rows such as 4"
            )
        if not self.distill_weight >= 0:
            raise SaccadeError(f"distill_weight={self.distill_weight!r} is negative: use 0 to switch it off")
        if not self.distill_temperature > 0:
            raise SaccadeError(f"distill_temperature={self.distill_temperature!r}: it must be above 0")
        if self.projector_learning_rate is not None and not self.projector_learning_rate > 0:
            raise SaccadeError(
                f"projector_learning_rate={self.projector_learning_rate!r}: it must be above 0; "
                "freeze_projector=true trains the projector not at all"
            )
        if self.freeze_vision_tower and self.freeze_projector and self.freeze_language_model:
            raise SaccadeError(
                "freeze_vision_tower, freeze_projector and freeze_language_model are all true: "
                "nothing would train, set one to false"
            )
        if self.loss_type != "nll" or self.label_smoothing_factor:
            raise SaccadeError(
                f"loss_type={self.loss_type!r}, label_smoothing_factor={self.label_smoothing_factor!r}: "
                "DualSpeed trains on plain cross-entropy, leave them at 'nll' and 0"
            )

    def mode_schedule(self) -> ModeSchedule:
        """The schedule that this configuration describes, for a stage that trains the language model."""
        return ModeSchedule(self.seed, self.slow_probability, self.schedule)

    @property
    def is_ordinary(self) -> bool:
        """Whether these options ask for ordinary supervised fine-tuning."""
        return self.prune_ratio == 0 and self.slow_probability == 1 and self.distill_weight == 0

    def resume_state(self) -> dict[str, Any]:
        """The options that a resumed run must share, as plain values."""
        values = {name: getattr(self, name) for name in RESUME_FIELDS}
        return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
