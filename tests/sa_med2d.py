"""A small folder in SA-Med2D-20M's layout, for tests of what reads it."""

import json

import numpy as np
from PIL import Image

SIZE = (60, 80)
CLASSES = {
    "Abdomen": {
        "liver": 1,
        "left_kidney": 2,
        "right_kidney": 3,
        "kidney_tumor": 4,
        "union_kidney_tumor": 5,
        "spleen": 6,
        "gallbladder": 7,
    },
    "Polyps": {"polyp": 1},
}
BOXES = {  # x0, y0, x1, y1
    "liver": (5, 8, 30, 30),
    "left_kidney": (55, 35, 70, 50),
    "right_kidney": (10, 35, 25, 50),
    "kidney_tumor": (58, 38, 66, 46),
    "union_kidney_tumor": (58, 38, 66, 46),
    "spleen": (56, 8, 72, 28),
}


def rectangle(x0, y0, x1, y1, size=SIZE):
    mask = np.zeros(size, np.uint8)
    mask[y0:y1, x0:x1] = 1
    return mask


def write(folder, cases=10, slices=2, value=255):
    """Images of two data sets. Even cases of the abdomen have a tumor, drawn twice (also as its union); the
    gallbladder is a class that nobody drew; each endoscopy shows three polyps, a mask for each."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    listed = {}

    def add(stem, masks):
        image = np.full((*SIZE, 3), 40, np.uint8)
        for mask in masks.values():
            image[mask > 0] += 30
        Image.fromarray(image).save(folder / "images" / f"{stem}.png")
        for ending, mask in masks.items():
            Image.fromarray(mask * np.uint8(value)).save(folder / "masks" / f"{stem}--{ending}.png")
        listed[f"images/{stem}.png"] = [f"masks/{stem}--{ending}.png" for ending in masks]

    for case in range(cases):
        names = [n for n in BOXES if "tumor" not in n or case % 2 == 0]
        names = [n for n in names if n != "spleen" or case % 3]
        for at in range(slices):
            ids = {n: f"{CLASSES['Abdomen'][n]:04d}_000" for n in names}
            masks = {ids[n]: rectangle(*BOXES[n]) for n in names}
            add(f"ct_00--Abdomen--p-1.{case}--z_{at:04d}", masks)
    for case in range(cases // 2):
        polyps = [rectangle(x, 20, x + 8, 30) for x in (60, 10, 35)]
        add(f"endoscopy_00--Polyps--{case}--2d_none", {f"0001_{i:03d}": p for i, p in enumerate(polyps)})
    (folder / "SAMed2D_v1.json").write_text(json.dumps(listed))
    (folder / "SAMed2D_v1_class_mapping_id.json").write_text(json.dumps(CLASSES))
    return folder
