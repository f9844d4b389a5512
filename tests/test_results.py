"""Answer and Finding: numbers, drawing, and saving that is all or nothing."""

import errno
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from medplib.errors import InputError, MedPLIBError
from medplib.io import folder as folder_module
from medplib.io import rle
from medplib.io.overlay import contour
from medplib.prompts.types import Box, Mask, Point
from medplib.results import NOTICE, Answer, Finding, file_label

SIZE = (40, 60)


def blob(top=5, left=10, bottom=20, right=30, size=SIZE):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def make_answer(**changes):
    values = {
        "text": "Here is the right lung <SEG> & more.",
        "findings": [Finding("right lung", blob(), 0.91), Finding("Lésion / 2?", blob(22, 5, 35, 50), 0.5)],
        "images": [np.full((*SIZE, 3), 60, np.uint8)],
        "question": "Where is it, in <region>?",
        "prompts": (Box(2, 3, 20, 30), Point(5, 6, 0), Mask(blob())),
        "model": {"name": "medplib-tiny", "weights_sha256": "ab" * 32},
        "seed": 3,
    }
    return Answer(**{**values, **changes})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------ numbers


def test_box_and_area_agree_with_a_slow_version():
    rng = np.random.default_rng(0)
    for _ in range(30):
        mask = rng.random((13, 9)) < 0.03
        finding = Finding("x", mask, 0.5)
        places = [(x, y) for y in range(13) for x in range(9) if mask[y, x]]
        assert finding.area == len(places)
        if not places:
            assert finding.box is None
            continue
        xs, ys = zip(*places, strict=True)
        assert finding.box == (min(xs), min(ys), max(xs) + 1, max(ys) + 1)


def test_a_finding_becomes_plain_json():
    record = json.loads(json.dumps(Finding("lung", blob(), np.float32(0.5)).to_dict()))
    assert record["label"] == "lung"
    assert record["score"] == 0.5
    assert record["box"] == [10, 5, 30, 20]
    assert record["area"] == 300
    assert record["image"] == 0
    assert np.array_equal(rle.decode(record["rle"]), blob())


def test_an_empty_mask_has_no_box_and_a_missing_score_is_null():
    record = Finding("lung", np.zeros(SIZE, bool), float("nan")).to_dict()
    assert record["box"] is None
    assert record["score"] is None


def test_masks_are_one_array_or_a_list_for_different_sizes():
    answer = make_answer()
    assert answer.masks.shape == (2, *SIZE)
    assert answer.masks.dtype == np.bool_
    assert make_answer(findings=[]).masks.shape == (0, *SIZE)
    other = np.zeros((9, 8), bool)
    images = [*answer.images, np.zeros((9, 8, 3), np.uint8)]
    mixed = make_answer(findings=[Finding("a", blob(), 1), Finding("b", other, 1, image=1)], images=images)
    assert [mask.shape for mask in mixed.masks] == [SIZE, (9, 8)]


@pytest.mark.parametrize(
    "mask", [np.zeros(SIZE, np.uint8), np.zeros((1, *SIZE), bool), np.zeros((0, 3), bool)]
)
def test_masks_that_are_not_flat_and_bool_are_refused(mask):
    with pytest.raises(InputError, match="must be bool"):
        Finding("lung", mask, 1.0)


def test_findings_must_fit_their_image():
    with pytest.raises(InputError, match="bring it back"):
        make_answer(findings=[Finding("a", np.zeros((3, 3), bool), 1)])
    with pytest.raises(InputError, match="no image 1"):
        make_answer(findings=[Finding("a", blob(), 1, image=1)])
    with pytest.raises(InputError, match="use load_image"):
        make_answer(images=[np.zeros(SIZE, np.uint8)])


# ------------------------------------------------------------------------------------------ pictures


def test_contour_is_the_rim_of_the_mask():
    rng = np.random.default_rng(4)
    mask = rng.random((15, 17)) < 0.8
    for y in range(15):
        for x in range(17):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            outside = any(not (0 <= j < 15 and 0 <= i < 17 and mask[j, i]) for j, i in around)
            assert contour(mask)[y, x] == (mask[y, x] and outside)


def test_overlay_colours_findings_and_leaves_the_rest():
    answer = make_answer(prompts=())
    picture = np.asarray(answer.overlay())
    assert picture.shape[0] > SIZE[0]  # the legend below
    area = picture[: SIZE[0], : SIZE[1]]
    changed = (area != 60).any(axis=-1)
    assert np.array_equal(changed, answer.masks.any(axis=0))
    rim, inside = area[5, 10], area[12, 20]
    assert (rim != inside).any()
    assert (area[12, 20] != area[28, 20]).any()  # the second finding has its own colour
    assert (answer.images[0] == 60).all()


def test_a_small_finding_inside_a_large_one_keeps_its_own_colour():
    small, large = Finding("small", blob(10, 20, 20, 40), 1), Finding("large", blob(2, 2, 38, 58), 1)
    alone = np.asarray(make_answer(findings=[small], prompts=()).overlay())
    both = np.asarray(make_answer(findings=[small, large], prompts=()).overlay())
    assert np.array_equal(both[10:20, 20:40], alone[10:20, 20:40])


def test_overlay_for_a_figure_takes_colours_fill_and_no_legend():
    answer = make_answer(prompts=())
    masks = answer.masks
    only = answer.findings[0].mask & ~answer.findings[1].mask
    picture = np.asarray(answer.overlay(colors=[(255, 0, 0)], fill=0.5, legend=False))
    assert picture.shape == answer.images[0].shape
    inside = masks[0] & only & ~contour(masks[0])
    assert (picture[inside] == (158, 30, 30)).all()  # halfway between 60 and the colour
    from_array = answer.overlay(colors=np.array([[255, 0, 0]]), fill=0.5, legend=False)
    assert np.array_equal(np.asarray(from_array), picture)
    outlines = np.asarray(answer.overlay(fill=0, legend=False))
    rims = contour(masks[0]) | contour(masks[1])
    assert np.array_equal((outlines != 60).any(axis=-1), rims)
    for options, message in (
        ({"fill": 1.5}, "fill must be a number from 0 to 1, got 1.5"),
        ({"colors": []}, "0 to 255, got"),
        ({"colors": [(1.0, 0, 0)]}, r"0 to 255, got \[\(1.0, 0, 0\)\]"),
        ({"colors": ["red"]}, r"\(red, green, blue\) each"),
        ({"colors": (255, 0, 0)}, r"got \(255, 0, 0\)"),
        ({"colors": [(0, 0, 256)]}, r"got \[\(0, 0, 256\)\]"),
        ({"colors": None}, "0 to 255, got None"),
    ):
        with pytest.raises(InputError, match=message):
            answer.overlay(**options)


def test_overlay_without_findings_is_the_image():
    answer = make_answer(findings=[], prompts=())
    assert np.array_equal(np.asarray(answer.overlay()), answer.images[0])


def test_overlay_shows_every_kind_of_prompt():
    for prompt in (Box(2, 3, 20, 30), Point(25, 20), Point(25, 20, 0), Mask(blob())):
        picture = np.asarray(make_answer(findings=[], prompts=(prompt,)).overlay())
        assert (picture != 60).any()
        assert picture.shape[:2] == SIZE


def test_prompts_are_drawn_on_the_first_image_only():
    second = np.full((50, 30, 3), 60, np.uint8)
    answer = make_answer(images=[np.full((*SIZE, 3), 60, np.uint8), second])
    assert np.array_equal(np.asarray(answer.overlay(1)), second)
    with pytest.raises(InputError, match="no image 2"):
        answer.overlay(2)


def test_labels_of_any_kind_are_drawn():
    for label in ("", "two\nlines", "x" * 500, "肺 \x07 🫁", "]["):
        assert make_answer(findings=[Finding(label, blob(), 1)]).overlay().width >= SIZE[1]


def test_notebooks_get_a_picture_and_escaped_text():
    answer = make_answer(text="<script>alert(1)</script>")
    page = answer._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "data:image/png;base64," in page
    assert NOTICE in page
    assert answer._repr_png_().startswith(b"\x89PNG")


def test_repr_is_short():
    assert repr(make_answer()).startswith(
        "Answer('Here is the right lung <SEG> & more.'; right lung 0.91 (300 px)"
    )
    assert len(repr(make_answer(text="word " * 1000, findings=[Finding("a", blob(), 1)] * 50))) < 300
    assert "no findings" in repr(make_answer(findings=[]))


# ------------------------------------------------------------------------------------------ saving


def test_save_writes_overlay_masks_and_record(tmp_path):
    answer = make_answer()
    written = answer.save(tmp_path / "deep" / "out")
    names = {"overlay.png", "mask_0_right_lung.png", "mask_1_lesion_2.png", "answer.json"}
    assert {path.name for path in written} == names
    assert {path.name for path in (tmp_path / "deep" / "out").iterdir()} == names
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    with Image.open(tmp_path / "deep" / "out" / "mask_0_right_lung.png") as mask:
        assert np.array_equal(np.asarray(mask), blob() * np.uint8(255))
    with Image.open(tmp_path / "deep" / "out" / "overlay.png") as overlay:
        assert np.array_equal(np.asarray(overlay), np.asarray(answer.overlay()))
        assert overlay.info["Comment"] == NOTICE

    record = json.loads((tmp_path / "deep" / "out" / "answer.json").read_text("utf-8"))
    assert record["text"] == answer.text
    assert record["question"] == answer.question
    assert record["notice"] == "Research use only. Not a medical device."
    assert record["model"] == answer.model
    assert record["seed"] == 3
    assert set(record["versions"]) == {"medplib", "torch", "transformers", "timm", "python"}
    assert record["prompts"][0] == {"type": "box", "x0": 2, "y0": 3, "x1": 20, "y1": 30}
    assert record["prompts"][1] == {"type": "point", "x": 5, "y": 6, "label": 0}
    assert np.array_equal(rle.decode(record["prompts"][2]["rle"]), blob())
    for finding, entry in zip(answer.findings, record["findings"], strict=True):
        assert {"label", "score", "box", "area", "rle", "image"} <= set(entry)
        assert np.array_equal(rle.decode(entry["rle"]), finding.mask)
        assert entry["file"] in names


def test_every_image_gets_an_overlay(tmp_path):
    images = [np.zeros((*SIZE, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)]
    make_answer(images=images).save(tmp_path)
    assert (tmp_path / "overlay_1.png").exists()


def test_a_later_answer_replaces_ours_and_keeps_foreign_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "mask_7_mine.png").write_bytes(b"drawn by hand")
    make_answer().save(tmp_path)
    make_answer(findings=[]).save(tmp_path)
    assert set(contents(tmp_path)) == {"notes.txt", "mask_7_mine.png", "overlay.png", "answer.json"}
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_foreign_file_with_our_name_is_not_overwritten(tmp_path):
    for name in ("overlay.png", "answer.json"):
        folder = tmp_path / name.replace(".", "_")
        folder.mkdir()
        (folder / name).write_text('{"mine": 1}')
        with pytest.raises(InputError, match=f"already holds a {name}"):
            make_answer().save(folder)
        assert contents(folder) == {name: b'{"mine": 1}'}


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(InputError, match="it is a file"):
        make_answer().save(tmp_path / "out")
    with pytest.raises(MedPLIBError, match="could not be saved"):
        make_answer().save(tmp_path / "out" / "below")


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path, monkeypatch, exists):
    if exists:
        make_answer().save(tmp_path / "out")
        before = contents(tmp_path / "out")
    calls = []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(folder_module.os, "fsync", full)
    with pytest.raises(MedPLIBError, match="No space left on device"):
        make_answer(text="new").save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == ([tmp_path / "out"] if exists else [])
    if exists:
        assert contents(tmp_path / "out") == before


def test_a_failure_while_files_change_places_is_undone(tmp_path, monkeypatch):
    make_answer().save(tmp_path)
    before = contents(tmp_path)
    rename, calls = folder_module.Path.rename, []

    def fails_once(self, target):
        calls.append(self)
        if len(calls) == 6:  # four old files are aside, one new one is in place
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(folder_module.Path, "rename", fails_once)
    with pytest.raises(MedPLIBError, match="Input/output error"):
        make_answer(text="new").save(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_place_is_named(tmp_path, monkeypatch, code):
    def refuse(prefix, dir):
        raise OSError(code, os.strerror(code), dir)

    monkeypatch.setattr(folder_module.tempfile, "mkdtemp", refuse)
    with pytest.raises(MedPLIBError, match=os.strerror(code)) as error:
        make_answer().save(tmp_path / "out")
    assert str(tmp_path / "out") in str(error.value)
    assert not list(tmp_path.iterdir())


def test_text_that_is_no_unicode_is_still_saved(tmp_path):
    make_answer(text="bad \udcff byte, 肺").save(tmp_path)
    assert json.loads((tmp_path / "answer.json").read_bytes())["text"] == "bad \udcff byte, 肺"


def test_file_labels_hold_no_surprises():
    hostile = ["../../etc/passwd", "a/b\\c", "", "肺", "x" * 300, "CON\0.png", "Right  Lung!", "<SEG>"]
    for label in hostile:
        assert re.fullmatch(r"[a-z0-9_]{1,40}", file_label(label))
    assert file_label("Right  Lung!") == "right_lung"
    assert file_label("肺") == "finding"


def test_results_need_no_torch():
    code = "import sys, medplib.results; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Finding(5, blob(), 0.5), "label must be a text, got 5"),
        (lambda: Finding("a", blob(), "high"), "score must be a number, got 'high'"),
        (lambda: Finding("a", blob(), 0.5, None), "image must be a number, got None"),
        (lambda: Answer(None, [], []), "text must be a text, got None"),
        (lambda: Answer("a", None, []), "findings come in a list, got NoneType"),
        (lambda: Answer("a", [], 5), "images come in a list, got int"),
        (lambda: Answer("a", [], [np.zeros((0, 4, 3), np.uint8)]), r"images must be uint8 \(H, W, 3\)"),
        (lambda: Answer("a", [], [], prompts=[Point(1, 1)], prompt_images=[0, 1]), "prompt_images must name"),
        (lambda: Answer("a", [], []).overlay("first"), "There is no image 'first'"),
        (lambda: Answer("a", [], [np.zeros((9, 9, 3), np.uint8)]).overlay(colors=5), "colors must be"),
    ],
)
def test_parts_of_an_answer_of_another_kind_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("folder", [None, 5])
def test_a_folder_must_be_a_path(folder):
    with pytest.raises(InputError, match=f"Give the path of a folder to save in, got {folder}"):
        Answer("a", [], []).save(folder)
