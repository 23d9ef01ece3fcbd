"""From a recipe to a trained model."""

from saccade.recipes import find_recipe
from saccade.training.recipe import ModelOptions, Recipe, load_recipe, make_recipe
from saccade.training.run import LOG_FILE, train_recipe
from saccade.training.sources import load_model, load_rows

__all__ = [
    "LOG_FILE",
    "ModelOptions",
    "Recipe",
    "find_recipe",
    "load_model",
    "load_recipe",
    "load_rows",
    "make_recipe",
    "train_recipe",
]
