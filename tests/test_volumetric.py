"""Volumes: slices lie as they should, masks come back on the file's own voxels, nothing else is copied."""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medplib import MedPLIB
from medplib.apps.cli import app
from medplib.data import load_mini
from medplib.errors import InputError, MedPLIBError
from medplib.evaluation.metrics import dice
from medplib.io.images import rescale, stretch
from medplib.io.volume import AXES, Volume, load_volume, upright
from medplib.volumetric import VolumeAnswer, segment_volume

nibabel = pytest.importorskip("nibabel")
from nibabel import orientations  # noqa: E402

SLICES = (33, 34, 35, 36, 37, 38, 39, 40)


@pytest.fixture(scope="module")
def tiny():
    return MedPLIB.from_pretrained("medplib-tiny")


@pytest.fixture(scope="module")
def chest():
    """Pictures uint8 (8, 256, 256) of neighbouring slices of the test CT, and the masks of both lungs."""
    rows = {int(s.image.stem[-4:]): s for s in load_mini(split="test") if s.dataset == "ChestCT"}
    pictures = np.stack([rows[i].load_image()[..., 0] for i in SLICES])
    lungs = {n: np.stack([rows[i].load_mask(n) for i in SLICES]) for n in ("right lung", "left lung")}
    return pictures, lungs


def lying(stack):
    """(slices, H, W) as they are looked at -> (x, y, z) in RAS."""
    return stack.transpose(2, 1, 0)[::-1, ::-1]


def write(path, ras, axes="RAS", spacing=(0.8, 0.8, 2.5), header=None):
    """A NIfTI file of these values (x, y, z), stored with its axes in another order or direction."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = (-90, -100, 30)
    image = nibabel.Nifti1Image(np.ascontiguousarray(ras), affine)
    turn = orientations.ornt_transform(orientations.axcodes2ornt("RAS"), orientations.axcodes2ornt(axes))
    image = image.as_reoriented(turn)
    for key, value in (header or {}).items():
        image.header[key] = value
    nibabel.save(image, path)
    return str(path)


@pytest.mark.parametrize("axes", ["RAS", "LPS", "LAS", "PIR", "SAL"])
def test_slices_are_the_pictures_however_the_file_is_stored(tmp_path, chest, axes):
    pictures, _ = chest
    volume = load_volume(write(tmp_path / "ct.nii.gz", lying(pictures), axes), window=(0, 255))
    assert volume.spacing == pytest.approx((0.8, 0.8, 2.5))
    for index, picture in enumerate(pictures):
        np.testing.assert_array_equal(volume.picture("axial", index)[..., 0], picture)
    assert volume.picture("coronal", 9).shape == (25, 256, 3)  # 8 slices of 2.5 mm, in pixels of 0.8 mm
    assert volume.picture("sagittal", 9).shape == (25, 256, 3)


def test_pictures_of_other_planes_are_upright():
    values = np.zeros((4, 5, 6), np.uint8)
    values[3], values[:, 4], values[:, :, 5] = 1, 2, 3  # right, front, head
    assert (upright(values, AXES["axial"], 0)[1:, 0] == 1).all()  # the patient's right is on the left
    assert (upright(values, AXES["axial"], 0)[0] == 2).all()  # front is on top
    assert (upright(values, AXES["coronal"], 0)[0] == 3).all()  # head is on top
    assert (upright(values, AXES["sagittal"], 0)[0] == 3).all()
    assert (upright(values, AXES["sagittal"], 0)[1:, 0] == 2).all()  # front is on the left


@pytest.mark.parametrize("axis", list(AXES))
def test_a_mask_on_a_picture_goes_back_to_its_voxels(axis):
    rng = np.random.default_rng(0)
    mask = rng.random((9, 10, 11)) > 0.5
    volume = Volume(np.zeros(mask.shape, np.uint8), (1.0, 2.0, 3.0), "made")
    for index in range(mask.shape[AXES[axis]]):
        shown = volume.show(mask, axis, index)
        assert shown.shape == volume.picture(axis, index).shape[:2]
        np.testing.assert_array_equal(volume.lay(shown, axis), np.moveaxis(mask, AXES[axis], 0)[index])


def test_one_window_serves_all_slices(tmp_path):
    values = np.zeros((16, 16, 3), np.int16)
    values[:8, :, 1], values[:8, :, 2] = 100, 1000
    path = write(tmp_path / "v.nii", values - 500)
    by_default = load_volume(path)
    assert by_default.picture("axial", 1).max() == round(255 / 10)
    assert by_default.picture("axial", 2).max() == 255
    assert load_volume(path, (-500, -300)).picture("axial", 1).max() == round(255 / 2)
    values = values.astype(np.float32)
    values[0, 0, 0] = np.nan
    assert load_volume(write(tmp_path / "f.nii", values), (0, 1000)).picture("axial", 2).max() == 255


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32])
def test_one_slice_is_shown_as_all_of_them_would_be(kind):
    values = np.random.default_rng(0).normal(100, 30, (30, 20, 10)).astype(kind)
    if kind is np.float32:
        values[3, 4, 5], values[0, 0, 0], values[9, 9, 9] = np.nan, np.inf, -np.inf
    for turned in (values, values[::-1, ::-1], values.transpose(2, 0, 1)):
        for window in (None, (50, 200)):
            volume = Volume(turned, (1, 1, 1), "made", window)
            clean = np.nan_to_num(turned)
            whole = stretch(clean) if window is None else rescale(clean, *window)
            for axis in AXES:
                np.testing.assert_array_equal(volume.picture(axis, 4)[..., 0], upright(whole, AXES[axis], 4))


def test_one_slice_of_a_large_volume_takes_little_memory():
    volume = Volume(np.zeros((400, 400, 100), np.float32)[::-1], (1, 1, 1), "made", (0, 9))  # 64 MB
    volume.values[:20] = 9
    tracemalloc.start()
    assert volume.picture("axial", 50).max() == 255
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()


@pytest.fixture(scope="module")
def answered(tiny, tmp_path_factory, chest):
    pictures, _ = chest
    path = write(tmp_path_factory.mktemp("volume") / "ct.nii.gz", lying(pictures), "LPS")
    done = []
    answer = tiny.segment_volume(
        path, ["the right lung", "left lung", "an optic disc"], window=(0, 255), batch_size=3,
        progress=lambda *step: done.append(step),
    )  # fmt: skip
    assert done == [(3, 8), (6, 8), (8, 8)]
    return path, answer


def test_lungs_are_drawn_in_a_volume_as_in_its_slices(answered, tiny, chest):
    pictures, lungs = chest
    path, answer = answered
    assert [f.label for f in answer.findings] == ["right lung", "left lung", "optic disc"]
    right, left, disc = (f.mask for f in answer.findings)
    assert dice(right, lying(lungs["right lung"])) > 0.9
    assert dice(left, lying(lungs["left lung"])) > 0.9
    assert not disc.any()
    assert answer.findings[2].scores == {}
    alone = tiny.segment(np.repeat(pictures[4][..., None], 3, 2), "the right lung")
    np.testing.assert_array_equal(right[:, :, 4], lying(alone.masks)[..., 0])
    assert answer.findings[0].scores[4] == pytest.approx(alone.findings[0].score, abs=1e-4)
    assert answer.millilitres(0) == pytest.approx(right.sum() * 0.8 * 0.8 * 2.5 / 1000)
    stored = nibabel.load(path)
    assert answer.masks.shape == (3, *stored.shape)
    inside = np.asanyarray(stored.dataobj)[answer.masks[0]]
    assert inside.mean() < np.asanyarray(stored.dataobj).mean()  # air


def test_saved_masks_lie_on_the_file_voxel_by_voxel(answered, tmp_path):
    path, answer = answered
    written = answer.save(tmp_path / "out")
    assert [p.name for p in written] == [
        "mask_0_right_lung.nii.gz", "mask_1_left_lung.nii.gz", "mask_2_optic_disc.nii.gz",
        "overlay.png", "answer.json",
    ]  # fmt: skip
    stored = nibabel.load(path)
    for file, mask in zip(written, answer.masks, strict=False):
        saved = nibabel.load(file)
        np.testing.assert_allclose(saved.affine, stored.affine)
        np.testing.assert_array_equal(np.asanyarray(saved.dataobj), mask)
        assert saved.get_data_dtype() == np.uint8
    record = json.loads(written[-1].read_text())
    assert record["findings"][0]["voxels"] == int(answer.masks[0].sum())
    assert record["findings"][0]["slices"] == list(range(8))
    assert record["findings"][2] | {"file": ""} == {
        "label": "optic disc", "voxels": 0, "millilitres": 0.0, "slices": [], "score": None, "file": "",
    }  # fmt: skip
    assert Image.open(written[3]).size[0] > 224
    first = written[0].read_bytes()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    again = VolumeAnswer(answer.volume, answer.findings[:1], "axial", answer.slices, answer.model)
    again.save(tmp_path / "out")
    assert written[0].read_bytes() == first
    assert not written[1].exists()  # of an earlier answer
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [b"someone's", gzip.compress(b"\0" * 400), gzip.compress(b"a")[:-3]])
def test_masks_of_others_are_not_overwritten(answered, tmp_path, content):
    (tmp_path / "mask_0_right_lung.nii.gz").write_bytes(content)
    with pytest.raises(InputError, match=r"already holds a mask_0_right_lung\.nii\.gz"):
        answered[1].save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mask_0_right_lung.nii.gz"]


def test_nothing_of_the_header_is_copied(tiny, tmp_path, chest):
    canary = b"DOE^CANARY"
    path = write(
        tmp_path / "ct.nii", lying(chest[0]), header=dict.fromkeys(("descrip", "aux_file", "db_name"), canary)
    )
    for file in tiny.segment_volume(path, "right lung", slices=[4]).save(tmp_path / "out"):
        content = file.read_bytes()
        assert canary not in (gzip.decompress(content) if file.suffix == ".gz" else content)


def test_an_array_is_a_volume(tiny, tmp_path, chest):
    volume = Volume(lying(chest[0]), (0.8, 0.8, 2.5), "made")
    written = tiny.segment_volume(volume, "right lung", slices=[4], window=(0, 255)).save(tmp_path / "out")
    saved = nibabel.load(written[0])
    assert saved.shape == volume.values.shape
    np.testing.assert_allclose(saved.affine, np.diag([0.8, 0.8, 2.5, 1]))
    for values, spacing, message in (
        (volume.values[0], (1, 1, 1), r"got uint8 \(256, 8\)"),
        (volume.values, (1, 1), "three lengths above 0"),
        (volume.values, (1, 1, 0), "three lengths above 0"),
    ):
        with pytest.raises(InputError, match=message):
            Volume(values, spacing, "made")


def test_other_planes_and_single_slices(tiny, tmp_path, chest):
    path = write(tmp_path / "ct.nii.gz", lying(chest[0]))
    answer = tiny.segment_volume(path, "body", axis="coronal", slices=range(100, 104), window=(0, 255))
    assert answer.slices == [100, 101, 102, 103]
    assert answer._repr_png_().startswith(b"\x89PNG")  # what a notebook shows
    outside = np.ones(256, bool)
    outside[100:104] = False
    assert not answer.findings[0].mask[:, outside].any()
    assert set(answer.findings[0].scores) <= set(answer.slices)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axis": "transverse"}, "axis must be one of sagittal, coronal, axial, got 'transverse'"),
        ({"slices": [3, 8]}, r"numbered from 0 to 7 \(axial\); got 8"),
        ({"slices": []}, r"numbered from 0 to 7 \(axial\); got none"),
        ({"slices": [1.5]}, "got 1.5"),
        ({"slices": 3}, r"slices are numbers, such as \[40\] or range\(10, 41\), got 3"),
        ({"slices": "3:5"}, "slices are numbers.*got '3:5'"),
        ({"slices": [0, "a"]}, r"numbered from 0 to \d+ \(axial\); got a"),
        ({"window": "lung"}, r"such as \(-1000, 400\), got 'lung'"),
        ({"window": (0, 1, 2)}, r"got \(0, 1, 2\)"),
        ({"window": 400}, "got 400"),
        ({"window": ("0", "400")}, r"got \('0', '400'\)"),
        ({"window": (0, float("inf"))}, r"got \(0, inf\)"),
        ({"window": (5, 5)}, r"from a lower to a higher value, such as \(-1000, 400\), got \(5, 5\)"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"target": ""}, "Name what to segment"),
    ],
)
def test_what_cannot_be_asked_is_named_before_the_model_is_asked(tmp_path, chest, settings, message):
    path = write(tmp_path / "ct.nii.gz", lying(chest[0]))
    with pytest.raises(InputError, match=message):
        segment_volume(None, path, **{"target": "body"} | settings)


def test_files_that_are_no_volume_are_named(tmp_path):
    four = write(tmp_path / "four.nii", np.zeros((8, 8, 8), np.int16))
    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8, 2), np.int16), np.eye(4)), four)
    with pytest.raises(InputError, match=r"shape \(8, 8, 8, 2\)"):
        load_volume(four)
    colours = np.zeros((8, 8, 8), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nibabel.save(nibabel.Nifti1Image(colours, np.eye(4)), tmp_path / "rgb.nii")
    with pytest.raises(InputError, match="plain numbers are needed"):
        load_volume(tmp_path / "rgb.nii")
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes((tmp_path / "rgb.nii").read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be read as NIfTI"):
        load_volume(cut)
    with pytest.raises(InputError, match="Check that it is there"):
        load_volume(tmp_path / "none.nii")
    bomb = bytearray((tmp_path / "four.nii").read_bytes())
    bomb[40:48] = np.array([3, 30000, 30000, 30000], "<i2").tobytes()
    (tmp_path / "bomb.nii").write_bytes(bomb)
    with pytest.raises(InputError, match="more than 1073741824 in all"):
        load_volume(tmp_path / "bomb.nii")
    for given in (nibabel.load(tmp_path / "four.nii"), np.zeros((8, 8, 8))):
        with pytest.raises(InputError, match=f"got {type(given).__name__}. Give its path; .*volume_of"):
            load_volume(given)


def test_a_header_without_an_orientation_is_warned_of(tmp_path, recwarn):
    values = np.zeros((8, 9, 10), np.int16)
    nibabel.save(nibabel.Nifti1Image(values, None), tmp_path / "lost.nii.gz")
    with pytest.warns(UserWarning, match=r"lost\.nii\.gz.*which side is left is a guess"):
        load_volume(tmp_path / "lost.nii.gz")
    for code in ("sform_code", "qform_code"):
        load_volume(write(tmp_path / f"{code}.nii.gz", values, header={"sform_code": 0, code: 1}))
    assert not recwarn.list


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_draws_in_a_volume_and_in_a_picture(tmp_path, chest):
    path = write(tmp_path / "ct.nii.gz", lying(chest[0]))
    window = ("--window", 0, 255)
    result = run(
        "segment", path, "right lung", "optic disc", "--slices", "2:4", *window, "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert "3 (2 to 4)" in result.output
    assert "none" in result.output
    assert "mask_1_optic_disc.nii.gz" in result.output
    mask = np.asanyarray(nibabel.load(tmp_path / "out" / "mask_0_right_lung.nii.gz").dataobj)
    assert mask.any(axis=(0, 1)).tolist() == [False, False, True, True, True, False, False, False]
    record = json.loads(run("segment", path, "right lung", "--slices", "3", *window, "--json").output)
    assert record["findings"][0]["voxels"] == int(mask[..., 3].sum())
    picture = run("segment", "examples/images/brain_mr.png", "left hemisphere", "right hemisphere", "--json")
    assert [f["label"] for f in json.loads(picture.output)["findings"]] == [
        "left hemisphere", "right hemisphere",
    ]  # fmt: skip


def test_the_command_asks_about_a_slice(tmp_path, chest):
    path = write(tmp_path / "ct.nii.gz", lying(chest[0]))
    result = run("ask", path, "Segment the right lung.", "--slice", 4, "--window", 0, 255, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["findings"][0]["label"] == "right lung"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("ask", "{}", "What?"), r"name a slice with --slice N .*, from 0 to 7 \(axial\)"),
        (("ask", "{}", "What?", "--slice", "9"), r"numbered from 0 to 7 \(axial\); got 9"),
        (("ask", "examples/images/chest_ct.png", "What?", "--slice", "9"), "--slice and --window .* are for"),
        (("segment", "{}", "body", "--slices", "4:"), "--slices needs FIRST:LAST"),
        (("segment", "{}", "body", "--axis", "up"), "axis must be one of"),
        (("segment", "examples/images/chest_ct.png", "body", "--slices", "4"), "--slices is for volumes"),
        (("segment", "examples/images/chest_ct.png", "body", "--window", "0", "9"), "and DICOM, not for"),
        (("segment", "nowhere.nii.gz", "body"), "Check that it is there"),
    ],
)  # fmt: skip
def test_the_command_says_in_one_line_what_is_wrong(tmp_path, chest, words, message):
    path = write(tmp_path / "ct.nii.gz", lying(chest[0]))
    result = run(*(word.format(path) for word in words))
    assert result.exit_code == 2
    line = result.stderr.strip()
    assert "\n" not in line
    with pytest.raises(MedPLIBError, match=message):
        raise MedPLIBError(line)
