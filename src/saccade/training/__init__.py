"""From a recipe to a trained model."""

from typing import TYPE_CHECKING

from saccade.late import late_names

if TYPE_CHECKING:
    from saccade.recipes import find_recipe
    from saccade.training.models import ModelOptions, load_model, load_to_run
    from saccade.training.recipe import Recipe, load_recipe, make_recipe
    from saccade.training.run import LOG_FILE, train_recipe
    from saccade.training.sources import load_rows

_HOMES = {
    "saccade.recipes": ("find_recipe",),
    "saccade.training.models": ("ModelOptions", "load_model", "load_to_run"),
    "saccade.training.recipe": ("Recipe", "load_recipe", "make_recipe"),
    "saccade.training.run": ("LOG_FILE", "train_recipe"),
    "saccade.training.sources": ("load_rows",),
}
__all__ = [
    "LOG_FILE",
    "ModelOptions",
    "Recipe",
    "find_recipe",
    "load_model",
    "load_recipe",
    "load_rows",
    "load_to_run",
    "make_recipe",
    "train_recipe",
]
__getattr__ = late_names(__name__, _HOMES)
