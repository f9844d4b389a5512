"""Figures of the paper, as others quote them, to stand beside what is measured here. In percent.

arXiv 2412.09278 (MedPLIB, AAAI 2025): mDice of grounding on MeCoVQA, by modality. Two independent reruns of
the released weights on the zero-shot images agree with each other, but get 8.47 on X-ray and about 5 on
fundus photographs.
"""

from __future__ import annotations

# {split of MeCoVQA: {modality, or "all" over all images: mDice}}
GROUNDING_DICE = {
    "test": {"dermoscopy": 79.90, "CT": 59.83, "PET": 64.59, "all": 68.11},
    "zeroshot": {
        "X-ray": 28.25, "endoscopy": 44.19, "MR": 27.52, "ultrasound": 35.64, "fundus": 25.76, "all": 32.27,
    },
}  # fmt: skip
