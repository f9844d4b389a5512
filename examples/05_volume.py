"""Both lungs in a NIfTI volume: drawn slice by slice, saved on the volume's own voxels.

Eight neighbouring slices of the mini set's test CT stand for a scan of your own. Needs `medplib[medical]`.
"""

import nibabel
import numpy as np

from medplib import MedPLIB
from medplib.data import load_mini

slices = [s for s in load_mini(split="test") if s.dataset == "ChestCT" and "z_00" in s.image.name][23:31]
pictures = np.stack([s.load_image()[..., 0] for s in slices])  # (8, 256, 256), as a radiologist looks at them
scan = nibabel.Nifti1Image(pictures.transpose(2, 1, 0)[::-1, ::-1], np.diag([1.5, 1.5, 5.0, 1.0]))
nibabel.save(scan, "chest_ct.nii.gz")

model = MedPLIB.from_pretrained("medplib-tiny")
answer = model.segment_volume("chest_ct.nii.gz", ["the right lung", "the left lung"], window=(0, 255))
for number, finding in enumerate(answer.findings):
    print(f"{finding.label}: {answer.millilitres(number):.0f} ml in {len(finding.scores)} slices")
print(answer.masks.shape)  # (2, 256, 256, 8): voxel by voxel as in the file
for path in answer.save("chest_ct_lungs"):
    print(path)
