"""Structures drawn in a whole volume, slice by slice, and the files of such an answer.

x, y, z: voxels in RAS (medplib.io.volume); i, j, k: voxels as the volume's file stores them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medplib.errors import InputError, check_whole
from medplib.io import dicom_seg as dicom
from medplib.io.folder import write_together
from medplib.io.overlay import COLOURS, with_legend
from medplib.io.volume import AXES, Volume, load_volume
from medplib.results import NOTICE, SOFTWARE, file_label, is_ours, png, versions
from medplib.sample import Sample
from medplib.targets import named, request, without_article

_SHOWN = 12  # slices on the overview


@dataclass(eq=False)
class VolumeFinding:
    """A structure in a volume: mask bool (x, y, z) in RAS; scores: {slice: score} where it was drawn."""

    label: str
    mask: np.ndarray
    scores: dict[int, float] = field(default_factory=dict)

    @property
    def voxels(self) -> int:
        """Number of voxels in the mask."""
        return int(np.count_nonzero(self.mask))

    def __repr__(self) -> str:
        return f"VolumeFinding({self.label!r}, voxels={self.voxels}, slices={len(self.scores)})"


@dataclass(eq=False, repr=False)
class VolumeAnswer:
    """What was drawn in a volume, one finding for each structure asked for, empty where all is absent.

    answer = model.segment_volume("ct.nii.gz", ["the right lung", "the left lung"])
    answer.findings[0].voxels, answer.millilitres(0)
    answer.masks                       # bool (findings, i, j, k), on the file's own voxels
    answer.save("out/")                # mask_0_right_lung.nii.gz, ..., overlay.png, answer.json
    answer.save_dicom_seg("seg.dcm")   # of DICOM alone; repeats who the patient is
    """

    volume: Volume
    findings: list[VolumeFinding]
    axis: str
    slices: list[int]
    model: dict

    @property
    def masks(self) -> np.ndarray:
        """bool (findings, i, j, k), voxel by voxel as nibabel reads the file."""
        return np.stack([self.volume.to_file(finding.mask) for finding in self.findings])

    def millilitres(self, number: int) -> float:
        """The volume of a finding: its voxels times their size."""
        return self.findings[number].voxels * float(np.prod(self.volume.spacing)) / 1000

    def to_dict(self) -> dict[str, Any]:
        """What `answer.json` holds: plain values, nothing of the file but its geometry."""
        findings = [
            {
                "label": found.label,
                "voxels": found.voxels,
                "millilitres": round(self.millilitres(number), 4),
                "slices": sorted(found.scores),
                "score": round(float(np.mean(list(found.scores.values()))), 6) if found.scores else None,
            }
            for number, found in enumerate(self.findings)
        ]
        return {
            "axis": self.axis,
            "slices": self.slices,
            "findings": findings,
            "volume": {"shape": list(self.volume.values.shape), "spacing": list(self.volume.spacing)},
            "model": {"name": None, "weights_sha256": None, **self.model},
            "versions": versions(),
            "notice": NOTICE,
        }

    def overview(self):
        """A PIL picture of up to 12 slices, evenly from those with a finding (else from all), masks drawn."""
        from medplib.data.files import Held
        from medplib.data.record import Record
        from medplib.data.sheet import contact_sheet

        found = sorted({index for finding in self.findings for index in finding.scores}) or self.slices
        chosen = [found[i] for i in np.unique(np.linspace(0, len(found) - 1, _SHOWN).round().astype(int))]
        rows = []
        for index in chosen:
            image = self.volume.picture(self.axis, index)
            masks = [Held(self.volume.show(f.mask, self.axis, index)) for f in self.findings]
            turn = (self.axis, "<SEG>" * len(masks))
            rows.append(Record((turn,), (Held(image),), masks=tuple(masks), source="slice", row=index))
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(self.findings))]  # as the sheet has them
        return with_legend(contact_sheet(rows), [f.label for f in self.findings], colours)

    def save(self, folder: str | os.PathLike, *, dicom_seg: bool = False) -> list[Path]:
        """Write a .nii.gz per finding (0 and 1, on the voxels of the file), overlay.png and answer.json.

        dicom_seg: write segmentation.dcm too, see `save_dicom_seg`, unless nothing was drawn. It, and it
        alone, repeats who the patient is. All files appear together or, after an error, none, as for
        `Answer.save`, and raises as that does.
        """
        record, files = self.to_dict(), {}
        if dicom_seg and any(found.voxels for found in self.findings):
            files[dicom.FILE] = self._dicom_seg()
        for number, found in enumerate(self.findings):
            name = f"mask_{number}_{file_label(found.label)}.nii.gz"
            files[name] = self.volume.encode(found.mask, f"{SOFTWARE}: {NOTICE}")
            record["findings"][number]["file"] = name
        files["overlay.png"] = png(self.overview())
        files["answer.json"] = (json.dumps(record, indent=2) + "\n").encode()
        return write_together(folder, files, is_ours)

    def save_dicom_seg(self, path: str | os.PathLike) -> Path:
        """Write a DICOM Segmentation object: a segment per structure drawn, a frame per slice it is in.

        By design of the standard (PS3.3 A.51) it repeats the patient's identity, the study and the scanner
        from the images it was drawn in, which it refers to. Nothing else that medplib writes does so. Masks
        are binary (H, W), rows and columns as those images have them. Raises InputError if the volume is not
        of DICOM, its files have changed or nothing was drawn, MedPLIBError if the folder cannot be written,
        ImportError without highdicom (`medplib[dicom-seg]`); there is no file then.
        """
        return dicom.write(path, self._dicom_seg())

    def _dicom_seg(self) -> bytes:
        masks = self.masks.transpose(0, 3, 2, 1)  # (findings, slices, H, W)
        labels = [found.label for found in self.findings]
        return dicom.encode(self.volume.frames, masks, labels, self.model, repr(self.volume.name))

    def _repr_png_(self) -> bytes:
        return png(self.overview())

    def __repr__(self) -> str:
        found = ", ".join(f"{f.label} {self.millilitres(i):.1f} ml" for i, f in enumerate(self.findings))
        return f"VolumeAnswer({len(self.slices)} {self.axis} slices; {found})"


def segment_volume(
    model: Any,
    source: str | os.PathLike | Volume,
    target: str | Sequence[str],
    *,
    axis: str = "axial",
    slices: Iterable[int] | None = None,
    window: tuple[float, float] | None = None,
    series: int | str | None = None,
    batch_size: int = 4,
    progress: Callable[[int, int], Any] | None = None,
    **options: Any,
) -> VolumeAnswer:
    """Ask `model` for each structure in each slice of a volume, and put the masks together.

    source: a NIfTI file, the folder of a DICOM series, or a Volume, which `medplib.io.volume.volume_of` makes
    of values and an affine. target: "the right lung", or a list of
    names. axis: "axial", "coronal" or "sagittal": how the volume is cut. slices: their numbers from the
    patient's feet, back or left side on; by default all. window: the stored values shown as black and white,
    the same for all slices (for a CT in Hounsfield units, say, (-1000, 400)); by default what a DICOM header
    says, else the 0.5 and 99.5 percentiles of the volume. series: which one of a folder, see `load_volume`.
    Slices whose voxels are no squares are shown with square pixels. batch_size: slices answered together.
    progress: called with (slices done, of how many). options: as for `MedPLIB.answer`.

    Each slice is looked at by itself: nothing makes neighbours agree. Raises InputError for a volume, axis,
    slice or window that cannot be used, before the model is asked.
    """
    names = named(target)
    check_whole(batch_size=batch_size)
    if isinstance(source, Volume) and series is not None:
        raise InputError(f"series chooses what is read, and a Volume is given; got {series!r}. Leave it out.")
    volume = source if isinstance(source, Volume) else load_volume(source, None, series)
    volume = volume if window is None else replace(volume, window=window)
    chosen = volume.numbers(axis, slices)
    findings = [VolumeFinding(without_article(name), np.zeros(volume.values.shape, bool)) for name in names]
    for start in range(0, len(chosen), batch_size):
        part = chosen[start : start + batch_size]
        pictures = [volume.picture(axis, index) for index in part]
        samples = [Sample([p], [(request([name]), None)]) for name in names for p in pictures]
        asked = [(finding, index) for finding in findings for index in part]
        for (finding, index), answer in zip(asked, model.answer(samples, **options), strict=True):
            drawn = [f for f in answer.findings if f.area]
            if drawn:
                mask = np.logical_or.reduce([f.mask for f in drawn])
                np.moveaxis(finding.mask, AXES[axis], 0)[index] = volume.lay(mask, axis)
                finding.scores[index] = float(np.mean([f.score for f in drawn]))
        if progress is not None:
            progress(start + len(part), len(chosen))
    return VolumeAnswer(volume, findings, axis, chosen, model.identity())
