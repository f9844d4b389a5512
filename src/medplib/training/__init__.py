"""Training: recipes, stages one after another, snapshots that survive; and how medplib-tiny was trained.

from medplib.training import load_recipe, train
train(load_recipe("tiny", {"out": "runs/mine"}))
"""

from medplib.lazy import lazily

_WHERE = {
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "make_recipe": "recipe",
    "shipped_recipes": "recipe",
    "train": "chain",
    "rehearse": "dry_run",
}

__all__ = list(_WHERE)
__getattr__, __dir__ = lazily(__name__, _WHERE)
