"""DICOM series: slices in their place whatever their names, geometry as in the headers, nothing quoted."""

import json

import nibabel
import numpy as np
import pytest
from pydicom import Dataset, dcmread, uid
from pydicom.encaps import encapsulate
from pydicom.pixels import get_encoder
from test_dicom import made, written
from typer.testing import CliRunner

from medplib import MedPLIB
from medplib.apps.cli import app
from medplib.errors import InputError
from medplib.io.volume import load_volume

VALUES = np.random.default_rng(0).integers(-1000, 1000, (5, 12, 20)).astype(np.int16)  # slices, rows, columns
AXIAL = [1, 0, 0, 0, 1, 0]
GREY = {"samples_per_pixel": 1, "bits_allocated": 8, "bits_stored": 8, "pixel_representation": 0,
        "photometric_interpretation": "MONOCHROME2", "number_of_frames": 1}  # fmt: skip


def headers(number, **changes):
    """Of slice `number`: rows 0.7 mm apart, columns 0.5, slices 3."""
    return {
        "Modality": "CT",
        "SOPClassUID": uid.CTImageStorage,
        "SOPInstanceUID": f"1.2.3.{number + 1}",
        "SeriesInstanceUID": "1.2.3",
        "ImageOrientationPatient": AXIAL,
        "ImagePositionPatient": [-10, -20, 30 + 3 * number],
        "PixelSpacing": [0.7, 0.5],
        "RescaleSlope": 1,
        "RescaleIntercept": -24,
        **changes,
    }


def write(folder, values=VALUES, names=lambda i: f"{(i * 3) % 5}.dcm", **changes):
    """A folder with a file for each slice; changes: values, or functions of the slice's number."""
    folder.mkdir()
    for number, stored in enumerate(values):
        own = {k: v(number) if callable(v) else v for k, v in changes.items()}
        (folder / names(number)).write_bytes(made(stored, **headers(number, **own)))
    return folder


def test_slices_are_ordered_by_place_and_in_units(tmp_path):
    folder = write(tmp_path / "series")
    (folder / "notes.txt").write_text("no DICOM")
    (folder / "DICOMDIR").write_bytes(made(VALUES[0]))
    volume = load_volume(folder)
    assert volume.values.shape == (20, 12, 5)
    assert volume.spacing == pytest.approx((0.5, 0.7, 3.0))
    # columns run to the patient's left and rows to the back, RAS to the right and front
    np.testing.assert_array_equal(volume.values, (VALUES - 24.0).transpose(2, 1, 0)[::-1, ::-1])
    np.testing.assert_array_equal(volume.to_file(volume.values), (VALUES - 24.0).transpose(2, 1, 0))


def test_a_mask_lies_in_the_patient_where_its_pixel_does(tmp_path):
    volume = load_volume(write(tmp_path / "series"))
    mask = np.zeros(volume.values.shape, bool)
    mask[tuple(np.argwhere(volume.values == volume.values.max())[0])] = True
    (tmp_path / "mask.nii.gz").write_bytes(volume.encode(mask, "made up"))
    saved = nibabel.load(tmp_path / "mask.nii.gz")
    column, row, number = np.argwhere(np.asanyarray(saved.dataobj))[0]
    assert VALUES[number, row, column] == VALUES.max()
    # Part 3, C.7.6.2.1.1: position + column * spacing along the row + row * spacing along the column; LPS
    expected = [10 - 0.5 * column, 20 - 0.7 * row, 30 + 3 * number]
    np.testing.assert_allclose(saved.affine @ [column, row, number, 1], [*expected, 1])


@pytest.mark.parametrize(
    ("axes", "place"),
    [
        ([1, 0, 0, 0, 0, -1], lambda i: [0, 3 * i, 0]),  # coronal
        ([0, 1, 0, 0, 0, -1], lambda i: [-3 * i, 0, 0]),  # sagittal, from the right on
        ([1, 0, 0, 0, 0.8, 0.6], lambda i: [0, -1.8 * i, 2.4 * i]),  # oblique
        (AXIAL, lambda i: [0, 1.0 * i, 3 * i]),  # a tilted gantry: slices are shifted
    ],
)
def test_other_directions(tmp_path, axes, place):
    folder = write(tmp_path / "series", ImageOrientationPatient=axes, ImagePositionPatient=place)
    volume = load_volume(folder)
    affine, _ = volume._file
    stored = volume.to_file(volume.values)
    for number in (0, 4):
        for row, column in ((0, 0), (11, 19), (4, 7)):
            lps = np.array(place(number)) + np.array(axes[:3]) * 0.5 * column + np.array(axes[3:]) * 0.7 * row
            i, j, k = np.linalg.solve(affine, [-lps[0], -lps[1], lps[2], 1]).round(6)[:3]
            assert stored[int(i), int(j), int(k)] == VALUES[number, row, column] - 24


def item(**attributes):
    made = Dataset()
    for key, value in attributes.items():
        setattr(made, key, value)
    return made


def test_the_frames_of_one_file_are_a_series(tmp_path):
    plane = item(
        PixelMeasuresSequence=[item(PixelSpacing=[0.7, 0.5])],
        PlaneOrientationSequence=[item(ImageOrientationPatient=AXIAL)],
        PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-24, RescaleType="HU")],
    )
    places = [
        item(PlanePositionSequence=[item(ImagePositionPatient=[-10, -20, 30 - 3 * i])])
        for i in range(len(VALUES))
    ]
    content = made(
        VALUES, SOPClassUID=uid.EnhancedCTImageStorage, SharedFunctionalGroupsSequence=[plane],
        PerFrameFunctionalGroupsSequence=places,
    )  # fmt: skip
    (tmp_path / "enhanced.dcm").write_bytes(content)
    volume = load_volume(tmp_path / "enhanced.dcm")  # stored from head to feet
    np.testing.assert_array_equal(volume.values, (VALUES[::-1] - 24.0).transpose(2, 1, 0)[::-1, ::-1])


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless])
def test_a_header_is_parsed_once_for_all_frames(tmp_path, monkeypatch, syntax):
    values = np.random.default_rng(1).integers(0, 200, (40, 12, 20)).astype(np.uint8)
    groups = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[0, 0, 3 * i])],
            PixelValueTransformationSequence=[item(RescaleSlope=1 + i, RescaleIntercept=i)],
        )
        for i in range(len(values))
    ]
    del groups[7].PixelValueTransformationSequence  # whose values are as stored, not as in the frame before
    plane = item(
        PixelMeasuresSequence=[item(PixelSpacing=[0.7, 0.5])],
        PlaneOrientationSequence=[item(ImageOrientationPatient=AXIAL)],
    )
    pixels = None
    if syntax.is_compressed:
        pixels = encapsulate([get_encoder(syntax).encode(v, rows=12, columns=20, **GREY) for v in values])
    content = made(
        values, syntax, pixels, SOPClassUID=uid.EnhancedMRImageStorage, Modality="MR",
        SharedFunctionalGroupsSequence=[plane], PerFrameFunctionalGroupsSequence=groups,
    )  # fmt: skip
    (tmp_path / "e.dcm").write_bytes(content)
    parsed = []
    monkeypatch.setattr("pydicom.dcmread", lambda *a, **k: parsed.append(a) or dcmread(*a, **k))
    volume = load_volume(tmp_path / "e.dcm")
    assert len(parsed) == 2  # to see which series it is, and to read it
    expected = np.stack([v * (1.0 + i) + i for i, v in enumerate(values)])
    expected[7] = values[7]
    np.testing.assert_array_equal(volume.to_file(volume.values), expected.transpose(2, 1, 0))


def test_padding_and_windows(tmp_path):
    padded = VALUES.copy()
    padded[:, :3] = -2000
    folder = write(
        tmp_path / "padded", padded, PixelPaddingValue=-2000, WindowCenter=[40, 1], WindowWidth=[400, 2]
    )
    volume = load_volume(folder)
    assert volume.values.min() == padded[padded > -2000].min() - 24
    assert volume.window == (-160, 240)
    assert load_volume(folder, (0, 9)).window == (0, 9)
    assert load_volume(write(tmp_path / "bad", WindowCenter=40, WindowWidth=0)).window is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SeriesInstanceUID": lambda i: f"1.2.{i > 3}"}, "holds 2 series"),
        (
            {"ImagePositionPatient": lambda i: [0, 0, 3 * i + 3 * (i > 2)]},
            r"slices 2 and 3 are 6\.000 mm apart, most",
        ),
        ({"ImagePositionPatient": lambda i: [0, 0, 3 * (i // 2)]}, "several slices of one place"),
        ({"PixelSpacing": lambda i: [0.7, 0.5 + i]}, "different sizes"),
        ({"ImageOrientationPatient": lambda i: AXIAL if i else [1, 0, 0, 0, 0, -1]}, "different directions"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "directions or spacings that cannot be"),
        ({"PixelSpacing": [0.7, 0]}, "directions or spacings that cannot be"),
        ({"ImagePositionPatient": []}, "does not say where in the patient"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "no slice of grey values"),
    ],
)
def test_what_is_no_volume_is_named_and_nothing_quoted(tmp_path, changes, message):
    folder = write(tmp_path / "series", PatientName="CANARY", StudyDescription="CANARY", **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_volume(folder)
    assert "CANARY" not in str(caught.value)
    assert "1.2.3" not in str(caught.value)


UIDS = ("1.2.840.7.1111.4321", "1.2.840.7.2222.4321", "1.2.840.7.1111.5")


@pytest.fixture
def mixed(tmp_path):
    """A folder with a CT of 5 slices, a report, an MR of 3 slices, and a file that is none."""
    folder = write(
        tmp_path / "mixed", names=lambda i: f"c{9 - i}", SeriesInstanceUID=UIDS[0], PatientID="CANARY"
    )
    words = {"SeriesDescription": "CANARY", "PatientName": "CANARY"}
    for i, stored in enumerate(VALUES[:3, :, :10]):
        own = headers(i, Modality="MR", SeriesInstanceUID=UIDS[1], **words)
        (folder / f"a{i}").write_bytes(made(stored, **own))
    report = Dataset()
    report.SOPClassUID, report.SOPInstanceUID = uid.BasicTextSRStorage, "1.2.3.77"
    report.SeriesInstanceUID, report.Modality, report.PatientName = UIDS[2], "CANARY", "CANARY"
    (folder / "b").write_bytes(written(report))
    (folder / "notes").write_text("no DICOM")
    return folder


def test_several_series_are_listed_without_a_word_of_their_headers(mixed):
    with pytest.raises(InputError) as caught:
        load_volume(mixed)
    listed = (
        "1 (MR, 3 slices of 10 x 12 pixels, UID ending in 2.4321), "
        "2 (another modality, no images, UID ending in 1111.5), "
        "3 (CT, 5 slices of 20 x 12 pixels, UID ending in 1.4321)"
    )
    assert str(caught.value) == (
        f"{str(mixed)!r} holds 3 series: {listed}. Choose by series=NUMBER (--series NUMBER), by the UID, or "
        "by its last digits."
    )


@pytest.mark.parametrize(
    ("series", "slices"),
    [(1, 3), (3, 5), ("1", 3), ("3", 5), (UIDS[0], 5), (UIDS[1], 3), ("1.4321", 5), ("2222.4321", 3)],
)
def test_one_of_several_series_is_chosen(mixed, series, slices):
    volume = load_volume(mixed, series=series)
    assert volume.values.shape[2] == slices
    expected = (VALUES - 24.0).transpose(2, 1, 0)
    expected = expected if slices == 5 else expected[:10, :, :3]
    np.testing.assert_array_equal(volume.to_file(volume.values), expected)


@pytest.mark.parametrize("series", [0, 4, -1, "4321", "0", "", "03", "x", "CT", True, 1.0, "9" * 5000])
def test_a_choice_that_is_no_series_is_named(mixed, series):
    with pytest.raises(InputError, match=r"has no one series .* holds 3 series: 1 \(MR, 3 slices"):
        load_volume(mixed, series=series)


def test_the_choice_must_be_of_images_and_of_a_folder(mixed, tmp_path):
    with pytest.raises(InputError, match="holds no pixels: it is DICOM of Basic Text SR"):
        load_volume(mixed, series=2)
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 9), np.uint8), np.eye(4)), tmp_path / "v.nii")
    with pytest.raises(InputError, match="series is for folders of DICOM files, not for"):
        load_volume(tmp_path / "v.nii", series=1)
    alone = write(tmp_path / "alone")
    assert load_volume(alone, series=1).values.shape == (20, 12, 5)
    with pytest.raises(InputError, match=r"has no one series 2; it holds 1 series: 1 \(CT"):
        load_volume(alone, series=2)


def test_many_series_are_listed_in_part(tmp_path):
    folder = write(tmp_path / "s", np.repeat(VALUES, 5, 0), names="{:03d}.dcm".format,
                   SeriesInstanceUID=lambda i: f"1.2.{i + 1000}")  # fmt: skip
    with pytest.raises(
        InputError, match=r"20 \(CT, 1 slice of 20 x 12 pixels, UID ending in 1019\) and 5 more\."
    ):
        load_volume(folder)


def test_the_command_and_the_model_choose_a_series(mixed):
    model = MedPLIB.from_pretrained("medplib-tiny")
    assert model.segment_volume(mixed, "body", series=1).masks.shape == (1, 10, 12, 3)
    with pytest.raises(InputError, match=r"a Volume is given; got 1\. Leave it out"):
        model.segment_volume(load_volume(mixed, series=1), "body", series=1)

    def run(*words):
        return CliRunner().invoke(app, [str(word) for word in words])

    result = run("segment", mixed, "body", "--series", "1.4321", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["volume"]["shape"] == [20, 12, 5]
    assert run("ask", mixed, "What is this?", "--slice", 2, "--series", 1).exit_code == 0
    for words, message in (
        (("segment", mixed, "body"), "holds 3 series: 1 (MR, 3 slices of 10 x 12 pixels"),
        (("ask", mixed, "What?", "--slice", 2, "--series", 4), "has no one series '4'"),
        (
            ("ask", "examples/images/chest_ct.png", "What?", "--series", 1),
            "is for the folder of a DICOM series",
        ),
        (
            ("segment", "examples/images/chest_ct.png", "body", "--series", 1),
            "is for the folder of a DICOM series",
        ),
    ):
        result = run(*words)
        assert result.exit_code == 2
        assert message in result.stderr
        assert "CANARY" not in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_folders_without_a_series_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no DICOM files"):
        load_volume(tmp_path / "empty")
    with pytest.raises(InputError, match="one slice only"):
        load_volume(write(tmp_path / "one", VALUES[:1]))
    cut = write(tmp_path / "cut")
    (cut / "3.dcm").write_bytes((cut / "3.dcm").read_bytes()[:-9])
    with pytest.raises(InputError, match=r"3\.dcm.*cut short"):
        load_volume(cut)


def test_a_model_draws_in_a_series(tmp_path):
    model = MedPLIB.from_pretrained("medplib-tiny")
    answer = model.segment_volume(write(tmp_path / "series", PatientName="CANARY"), "body")
    assert answer.masks.shape == (1, 20, 12, 5)
    for file in answer.save(tmp_path / "out"):
        assert b"CANARY" not in file.read_bytes()
    words = ["segment", str(tmp_path / "series"), "body", "--slices", "2", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["slices"] == [2]
