"""What the tests of training share: records in memory, a small recipe, and the same as a program.

python tests/training_run.py '{"model": ..., "out": ..., ...}'
"""

import json
import sys

import numpy as np

from medplib.data.files import Held
from medplib.data.record import Record
from medplib.prompts.types import Box
from medplib.training.recipe import make_recipe

LORA = {"language_model": {"rank": 2, "alpha": 4, "targets": ["q_proj", "up_proj"], "dropout": 0.1}}


def records(count: int = 12, kinds: str = "vrg", seed: int = 0) -> list[Record]:
    """Questions of the kinds v(qa), r(egion) and g(rounding) in turn, each about its own random picture."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        image = Held(rng.integers(0, 256, (48 + i, 64, 3), dtype=np.uint8))
        mask = np.zeros((48 + i, 64), bool)
        mask[8 : 20 + i, 10:40] = True
        kind = kinds[i % len(kinds)]
        if kind == "v":
            made.append(Record((("What is this?", f"This is number {i}."),), (image,), row=i))
        elif kind == "r":
            box = (Box(5.0, 6.0, 30.0, 40.0),)
            made.append(Record((("What is in <region>?", "This is the liver."),), (image,), box, row=i))
        else:
            turn = ("Segment the liver.", "Here is the <ref>liver</ref> <SEG>.")
            made.append(Record((turn,), (image,), masks=(Held(mask),), row=i))
    return made


def recipe(model, out, *, stage=None, **changes):
    """One mixture stage of a few steps on the CPU."""
    mixture = {
        "data": ["some"], "train": ["gates", "embeddings", "mask_decoder", "seg_projector", "region_adapter"],
        "lora": LORA, "steps": 4, "batch_size": 4, "precision": "fp32", "learning_rate": 1e-2,
        "max_length": 512, "loss_weights": {"ce": 1.0, "dice": 0.5, "bce": 2.0},
    } | (stage or {})  # fmt: skip
    content = {
        "model": str(model), "out": str(out), "micro_batch": 2, "device": "cpu", "log_steps": 1,
        "save_steps": 2,
        "data": {"some": {"reader": "memory"}}, "stages": {"mixture": mixture},
    } | changes  # fmt: skip
    return make_recipe(content)


def main(arguments: dict) -> None:
    from medplib.training.chain import train

    count = arguments.pop("records", 12)
    train(recipe(**arguments), sources={"some": records(count)}, progress=print)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
