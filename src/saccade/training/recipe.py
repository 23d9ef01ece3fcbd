"""A recipe: one flat YAML of model, data, LoRA and trainer options, with overrides from the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from saccade.dualspeed import DualSpeedConfig
from saccade.errors import SaccadeError
from saccade.recipes import check_fields, find_recipe, parse_overrides, put_over, read_recipe
from saccade.training.models import ModelOptions
from saccade.values import coerce

INSTEAD = {
    "resume_from_checkpoint": "use resume, a checkpoint or 'auto'",
    "model_init_kwargs": "use model, dtype, attn_implementation, load_in_4bit and trust_remote_code",
    "local_rank": "the launcher gives each process its own",
    # TRL prepares no rows with images, and the collator pads.
    "dataset_num_proc": "rows are prepared as batches are made; use dataloader_num_workers",
    "dataset_kwargs": "rows are prepared as batches are made; remove it",
    "shuffle_dataset": "each epoch draws an order of its own; remove it",
    "packing_strategy": "images are encoded before rows are packed; use padding_free",
    "eval_packing": "images are encoded before rows are packed; use padding_free",
    "pad_token": "rows are padded with the tokenizer's own; remove it",
    "length_column_name": "rows have no column of lengths; use group_by",
    # What a function for metrics gets, and a recipe has none.
    "label_names": "its evaluations compute the loss; remove it",
    "include_for_metrics": "its evaluations compute the loss; remove it",
    "batch_eval_metrics": "its evaluations compute the loss; remove it",
}
"""Fields of TRL's config without effect in a recipe, and what to do instead."""
ALWAYS = {"do_train": True, "do_predict": False}
"""Flags of TRL's config that scripts read, and the only value that a recipe agrees with."""


@dataclass
class Recipe:
    """A parsed recipe.

    Args:
        options: model, data and LoRA.
        trainer: everything that [`DualSpeedConfig`] takes.
        given: the fields as written, for the record.
    """

    options: ModelOptions
    trainer: DualSpeedConfig
    given: dict[str, Any] = field(default_factory=dict)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply `--field value` overrides.

    Args:
        path: a YAML file, or the name of a shipped recipe such as "tiny-digits/sft".

    Raises:
        SaccadeError: on a missing or malformed file, an unknown field, or a value of the wrong type.
    """
    values = read_recipe(path)
    if "pretrain" in values:
        raise SaccadeError(
            f"recipe {path} names pretrain={values['pretrain']!r}: `saccade sweep` trains both stages; here, remove "
            "this field and train one stage after the other"
        )
    return make_recipe(put_over(values, parse_overrides(overrides)), source=str(find_recipe(path)))


def check_no_secrets(values: Mapping[str, Any]) -> None:
    """Refuse an account's token. Recipes and command lines are recorded beside the model, and in its published card.

    Raises:
        SaccadeError: naming the field, and not its value.
    """
    inner = values.get("model_init_kwargs")
    given = ["hub_token"] if values.get("hub_token") else []
    given += ["model_init_kwargs.token"] if isinstance(inner, Mapping) and isinstance(inner.get("token"), str) else []
    if given:
        raise SaccadeError(
            f"{given[0]}: what a recipe and a command line say is recorded and published with the model; log in with "
            "`hf auth login`, or set HF_TOKEN, and leave it out"
        )


def check_have_effect(values: Mapping[str, Any]) -> None:
    """Refuse fields of TRL's config without effect in `train_recipe`, which loads the model and calls `train` itself.

    Raises:
        SaccadeError: naming the field to give in its place.
    """
    unset = {entry.name: entry.default for entry in fields(DualSpeedConfig)}
    for name, instead in INSTEAD.items():
        if values.get(name) and values[name] != unset[name]:
            raise SaccadeError(f"{name}={values[name]!r} has no effect in a recipe: {instead}")
    for name, only in ALWAYS.items():
        if values.get(name, only) is not only:
            raise SaccadeError(f"{name}={values[name]!r} has no effect in a recipe, which trains: remove it")
    if values.get("do_eval") and values.get("eval_strategy", "no") == "no":
        raise SaccadeError("do_eval=True has no effect in a recipe: set eval_strategy, or use `saccade eval`")


def make_recipe(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Build a recipe from a mapping of fields to values.

    Raises:
        SaccadeError: on an unknown field, or a value of the wrong type or range.
    """
    classes = (ModelOptions, DualSpeedConfig)
    # Not by the fields' own types: a parser of command lines overwrites those.
    types = {name: annotation for cls in classes for name, annotation in get_type_hints(cls).items()}
    known = {entry.name: types[entry.name] for cls in classes for entry in fields(cls) if entry.init}
    check_fields(values, known, source)
    check_no_secrets(values)
    typed = {name: coerce(name, value, known[name]) for name, value in values.items()}
    check_have_effect(typed)
    own = {entry.name for entry in fields(ModelOptions)}
    options = ModelOptions(**{name: value for name, value in typed.items() if name in own})
    settings = {name: value for name, value in typed.items() if name not in own}
    settings.setdefault("output_dir", "out/train")
    try:
        trainer = DualSpeedConfig(**settings)
    except SaccadeError:
        raise
    except (ValueError, TypeError) as error:
        raise SaccadeError(f"{source}: {' '.join(str(error).split())}") from error
    return Recipe(options, trainer, dict(values))
