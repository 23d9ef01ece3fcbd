"""From a recipe to a trained model."""

from typing import TYPE_CHECKING

from saccade.late import late_names

if TYPE_CHECKING:
    from saccade.recipes import find_recipe as find_recipe
    from saccade.training.models import load_model as load_model
    from saccade.training.options import ModelOptions as ModelOptions
    from saccade.training.recipe import Recipe as Recipe
    from saccade.training.recipe import load_recipe as load_recipe
    from saccade.training.recipe import make_recipe as make_recipe
    from saccade.training.run import LOG_FILE as LOG_FILE
    from saccade.training.run import train_recipe as train_recipe
    from saccade.training.sources import load_rows as load_rows

_HOMES = {
    "LOG_FILE": "saccade.training.run",
    "ModelOptions": "saccade.training.options",
    "Recipe": "saccade.training.recipe",
    "find_recipe": "saccade.recipes",
    "load_model": "saccade.training.models",
    "load_recipe": "saccade.training.recipe",
    "load_rows": "saccade.training.sources",
    "make_recipe": "saccade.training.recipe",
    "train_recipe": "saccade.training.run",
}
__all__ = list(_HOMES)
__getattr__ = late_names(__name__, _HOMES)
