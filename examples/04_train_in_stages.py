"""The four stages on the mini set, about two minutes on two cores: a forgetful model learns to see again.

python examples/04_train_in_stages.py [folder]          # MEDPLIB_STEPS=30 per stage
"""

import os
import sys
import tempfile
from pathlib import Path

import torch

from medplib import MedPLIB
from medplib.data import load_mini
from medplib.evaluation.metrics import dice
from medplib.training import load_recipe, train

steps = int(os.environ.get("MEDPLIB_STEPS", "30"))
out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="medplib-stages-"))
chest = next(s for s in load_mini(split="test") if "right lung" in s.names and "left lung" in s.names)


def show(when, model):
    image, truth = chest.load_image(), chest.load_mask("right lung")
    answer = model.segment(image, "the right lung")
    score = max([dice(finding.mask, truth) for finding in answer.findings], default=0.0)
    print(f"{when}: {answer.text!r}, Dice {score:.3f}; {model.ask(image, 'Which modality is this?').text!r}")


# A start that knows words and shapes, but no longer how its parts speak to each other
model = MedPLIB.from_pretrained("medplib-tiny")
torch.manual_seed(0)
for part in (model.projector, model.region_adapter, model.seg_projector):
    for module in part.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
model.save_pretrained(out / "start")
show("before", MedPLIB.from_pretrained(out / "start"))

recipe = load_recipe("tiny", {"model": str(out / "start"), "out": str(out), "sample_steps": 0})
for changes in recipe.stages.values():
    changes.steps, changes.learning_rate = steps, 1.5e-3
results = train(recipe, progress=print)

print("closed parts, by the hash of all their tensors (equal: bit-identical):")
parts = sorted({part for result in results for part in result.frozen})
print(f"{'':16}" + "".join(f"{result.name:>14}" for result in results))
for part in parts:
    print(f"{part:16}" + "".join(f"{result.frozen.get(part, 'trained'):>14}" for result in results))
show("after", MedPLIB.from_pretrained(results[-1].folder))
