"""The contact sheet: every record has its tile, with masks and regions in their place."""

import numpy as np
import pytest
from PIL import Image

from medplib.data import File, ImageFile, MaskFile, Record
from medplib.data.sheet import contact_sheet
from medplib.errors import InputError
from medplib.io.overlay import COLOURS
from medplib.prompts.types import Box, Point


@pytest.fixture
def picture(tmp_path):
    Image.fromarray(np.full((40, 80), 100, np.uint8)).save(tmp_path / "image.png")
    mask = np.zeros((40, 80), np.uint8)
    mask[:, 40:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return ImageFile(File(str(tmp_path / "image.png"))), MaskFile(File(str(tmp_path / "mask.png")))


def test_masks_and_regions_are_drawn_where_they_lie(picture):
    image, mask = picture
    record = Record(turns=(("Segment it.", "Here <SEG>"),), images=(image,), masks=(mask,))
    asked = Record(
        turns=(("What are <region>, <region> and <region>?", "Air"),),
        images=(image,),
        regions=(mask, Box(0, 0, 20, 20), Point(79, 39)),
    )
    sheet = np.asarray(contact_sheet([record, asked], columns=2, tile=80))
    drawn = sheet[4 + 20 : 4 + 60, 4:84]  # the 40 x 80 picture, centred in its tile
    assert (drawn[:, :40] == 100).all()
    assert (drawn[2:-2, 43:-2] == np.round(0.65 * 100 + 0.35 * np.array(COLOURS[0]))).all()
    outlined = sheet[4 + 20 : 4 + 60, 88:168]
    assert (outlined[0, :20] == 255).all()  # the box
    assert (outlined[:, 40] == 255).all()  # the left side of the mask
    assert (outlined[30, 5:35] == 100).all()


def test_one_tile_per_record_and_the_file_is_the_picture(picture, tmp_path):
    record = Record(turns=(("What? " * 100, "That."),), images=(picture[0],))
    text = Record(turns=(("Hello?", "Yes."),))
    sheet = contact_sheet([record, text, record], tmp_path / "sheet.png", columns=2, tile=64)
    assert sheet.size == (2 * 68 + 4, 2 * (68 + 4 * 14) + 4)
    with Image.open(tmp_path / "sheet.png") as written:
        assert (np.asarray(written) == np.asarray(sheet)).all()


def test_a_record_that_cannot_be_read_is_shown_as_its_error(tmp_path):
    record = Record(turns=(("What?", "That."),), images=(ImageFile(File(str(tmp_path / "gone.png"))),))
    sheet = np.asarray(contact_sheet([record], tile=100)).astype(int)
    assert (sheet[104:, :, 0] - sheet[104:, :, 2] > 60).any()  # red words
    assert (sheet[4:104, 4:104] == 24).all()


def test_nothing_to_show_and_nowhere_to_write_are_refused(picture, tmp_path):
    with pytest.raises(InputError, match="at least one record"):
        contact_sheet([])
    record = Record(turns=(("What?", "That."),), images=(picture[0],))
    with pytest.raises(InputError, match="tile >= 32, got 4 and 8"):
        contact_sheet([record], tile=8)
    with pytest.raises(InputError, match="nowhere"):
        contact_sheet([record], tmp_path / "nowhere" / "sheet.png")
