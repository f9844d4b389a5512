"""Training: recipes, stages one after another, snapshots that survive; and how medplib-tiny was trained.

from medplib.training import load_recipe, train
train(load_recipe("tiny", {"out": "runs/mine"}))
"""

from importlib import import_module

_WHERE = {
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "make_recipe": "recipe",
    "shipped_recipes": "recipe",
    "train": "chain",
    "rehearse": "dry_run",
}

__all__ = list(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
