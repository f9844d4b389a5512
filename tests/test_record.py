"""Records: what is checked when one is made, and how its pixels are read."""

import zipfile

import numpy as np
import pytest
from PIL import Image

from medplib.data import File, ImageFile, ImageSample, MaskFile, Record, Structure
from medplib.data.record import fit_mask
from medplib.errors import InputError
from medplib.prompts.types import Box, Mask


@pytest.fixture
def picture(tmp_path):
    """A grey image of 20 x 30 and a mask with two labels, as files."""
    pixels = np.arange(600, dtype=np.uint8).reshape(20, 30)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    labels = np.zeros((20, 30), np.uint8)
    labels[2:8, 3:9], labels[10:15, 12:20] = 1, 2
    Image.fromarray(labels).save(tmp_path / "mask.png")
    return tmp_path


def image(folder):
    return ImageFile(File(str(folder / "image.png")))


def mask(folder, value=None):
    return MaskFile(File(str(folder / "mask.png")), value)


def test_becomes_a_sample_with_its_pixels(picture):
    record = Record(
        turns=(("What is <region>? Segment <x>.", "Here <SEG> and <SEG>."),),
        images=(image(picture),),
        regions=(mask(picture, 2),),
        masks=(mask(picture, 1), mask(picture)),
        modality="CT",
    )
    sample = record.to_sample()
    assert record.task == "grounding"
    assert sample.images[0].shape == (20, 30, 3)
    assert [m.sum() for m in sample.masks] == [36, 76]
    assert isinstance(sample.prompts[0], Mask)
    assert sample.prompts[0].to_mask((20, 30)).sum() == 40


def palette_and_alpha(mask):
    """A mask as 0 and 255, in a palette of two colours with white first, and in the opacity alone."""
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    white_first = Image.fromarray((~mask).astype(np.uint8))
    white_first.putpalette([255, 255, 255, 0, 0, 0])
    opaque = Image.new("RGBA", grey.size, (255, 255, 255, 0))
    opaque.putalpha(grey)
    return grey, white_first, opaque


def test_a_mask_is_what_is_seen_of_palettes_and_transparency(tmp_path):
    mask = np.zeros((20, 30), bool)
    mask[2:8, 3:9] = True
    for number, picture in enumerate(palette_and_alpha(mask)):
        path = tmp_path / f"{number}.png"
        picture.save(path)
        sample = ImageSample(path, "CT", "D", "c", "train", "real", (Structure("liver", path, "expert"),))
        for loaded in (MaskFile(File(str(path))).load(), sample.load_mask(0), Mask(path).to_mask((20, 30))):
            np.testing.assert_array_equal(loaded, mask)
    labels = Image.fromarray(mask.astype(np.uint8) * 2)  # a label map: its numbers count, not its colours
    labels.putpalette([255, 255, 255, 0, 0, 0, 0, 0, 0])
    labels.save(tmp_path / "labels.png")
    np.testing.assert_array_equal(MaskFile(File(str(tmp_path / "labels.png")), 2).load(), mask)


def test_reads_the_same_from_a_zip_archive(picture):
    with zipfile.ZipFile(picture / "all.zip", "w") as archive:
        archive.write(picture / "image.png", "images/image.png")
    inside = File(str(picture / "all.zip"), "images/image.png")
    assert inside.exists()
    assert inside.name == "image.png"
    assert not File(str(picture / "all.zip"), "images/other.png").exists()
    assert (ImageFile(inside).load() == image(picture).load()).all()
    with pytest.raises(InputError, match=r"all\.zip!images/other\.png"):
        File(str(picture / "all.zip"), "images/other.png").read()


def test_mask_of_another_size_is_fitted_by_nearest_neighbour():
    small = np.array([[True, False], [False, True]])
    assert (fit_mask(small, (4, 6)) == np.kron(small, np.ones((2, 3), bool))).all()
    assert fit_mask(small, (2, 2)) is small


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(turns=()), "no question"),
        (dict(turns=(("a", ""),)), "empty answer"),
        (dict(turns=(("a", "b <SEG>"),)), "1 <SEG> but has 0 masks"),
        (dict(turns=(("a <region>", "b"),)), "1 <region> but has 0 regions"),
        (dict(turns=(("a <region>", "b"),), regions=(Box(0, 0, 1, 1),)), "no image"),
        (dict(turns=(("a", "b"),), modality="Xray"), "modality must be one of .*'Xray'"),
        (dict(turns=(("a", "b"),), answer_type="free"), "answer_type must be one of"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(fields, message):
    with pytest.raises(InputError, match=message) as error:
        Record(source="toy", row=7, **fields)
    assert "Row 7 of toy" in str(error.value)
