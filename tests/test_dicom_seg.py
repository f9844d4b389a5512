"""DICOM segmentations: every mask on the slice it was drawn in, the patient's identity there alone."""

import io
import json
import logging
import subprocess
import sys
import traceback
import warnings

import numpy as np
import pytest
from pydicom import dcmread, uid
from test_dicom import made
from test_series import AXIAL, VALUES, item, write
from typer.testing import CliRunner

from medplib import MedPLIB
from medplib.apps.cli import app
from medplib.errors import InputError, MedPLIBError
from medplib.io.dicom import read_dicom
from medplib.io.dicom_seg import code_of
from medplib.io.volume import Volume, load_volume
from medplib.results import NOTICE, Answer, Finding, is_ours, versions
from medplib.volumetric import VolumeAnswer, VolumeFinding

highdicom = pytest.importorskip(
    "highdicom", reason="highdicom is not installed: pip install 'medplib[dicom-seg]'"
)

CANARY = "Canary^Zephyrine"
IDENTITY = {
    "PatientName": CANARY, "PatientID": "Canary-7", "PatientBirthDate": "19010203", "PatientSex": "F",
    "StudyInstanceUID": "1.2.9", "FrameOfReferenceUID": "1.2.8", "StudyDate": "20200102", "SliceThickness": 2,
    "InstitutionName": "Canary Hospital", "StudyDescription": "Canary study",
}  # fmt: skip
HIGH = 600  # what counts as drawn: stored values above it, in some of the slices alone


def answer_of(volume, labels=("right lung", "high"), slices=(1, 2, 4)):
    """An answer whose second mask is where values are high in these slices, by value; others are empty."""
    masks = [np.zeros(volume.values.shape, bool) for _ in labels]
    kept = np.isin(volume.values, VALUES[list(slices)] - 24.0)
    masks[-1] = (volume.values > HIGH - 24) & kept
    findings = [VolumeFinding(label, mask) for label, mask in zip(labels, masks, strict=True)]
    return VolumeAnswer(volume, findings, "axial", [0, 1, 2, 3, 4], {"weights_sha256": "ab" * 32})


@pytest.fixture
def values(monkeypatch):
    """VALUES in which no value is in two slices."""
    rng = np.random.default_rng(3)
    different = rng.permutation(np.arange(-1000, 1000, dtype=np.int16))[: VALUES.size].reshape(VALUES.shape)
    monkeypatch.setattr(sys.modules[__name__], "VALUES", different)
    return different


def read(path):
    """(the file, {(segment, SOP instance, frame or None): mask (H, W)}), by what each frame refers to."""
    seg = dcmread(path)
    frames = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    found = {}
    for frame, groups in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        shared = seg.SharedFunctionalGroupsSequence[0]
        own = groups if "SegmentIdentificationSequence" in groups else shared
        segment = own.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        found[segment, source.ReferencedSOPInstanceUID, source.get("ReferencedFrameNumber")] = frame > 0
    return seg, found


STACKS = {
    "head first": (AXIAL, lambda i: [-10, -20, 30 - 3 * i]),
    "feet first": (AXIAL, lambda i: [-10, -20, 30 + 3 * i]),
    "mirrored": ([-1, 0, 0, 0, -1, 0], lambda i: [10, 20, 3 * i]),
    "coronal": ([1, 0, 0, 0, 0, -1], lambda i: [0, 3 * i, 0]),
    "sagittal": ([0, 1, 0, 0, 0, -1], lambda i: [-3 * i, 0, 0]),
    "oblique": ([1, 0, 0, 0, 0.8, 0.6], lambda i: [0, -1.8 * i, 2.4 * i]),
    "tilted gantry": (AXIAL, lambda i: [0, 1.0 * i, 3 * i]),
}


@pytest.mark.parametrize("stack", STACKS)
def test_masks_come_back_on_their_slices_however_the_series_is_stored(tmp_path, values, stack):
    axes, place = STACKS[stack]  # the names of the files are in another order than the slices
    folder = write(
        tmp_path / "s", values, ImageOrientationPatient=axes, ImagePositionPatient=place, **IDENTITY
    )
    answer = answer_of(load_volume(folder))
    seg, found = read(answer.save_dicom_seg(tmp_path / "seg.dcm"))
    assert found.keys() == {(1, f"1.2.3.{i + 1}", None) for i in (1, 2, 4)}
    for i in (1, 2, 4):
        np.testing.assert_array_equal(found[1, f"1.2.3.{i + 1}", None], values[i] > HIGH)
    shared = seg.SharedFunctionalGroupsSequence[0]
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == axes
    assert shared.PixelMeasuresSequence[0].PixelSpacing == [0.7, 0.5]
    assert shared.PixelMeasuresSequence[0].SliceThickness == 2
    for groups in seg.PerFrameFunctionalGroupsSequence:
        source = groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        expected = place(int(source.rpartition(".")[2]) - 1)
        assert groups.PlanePositionSequence[0].ImagePositionPatient == pytest.approx(expected)
    again = highdicom.seg.segread(tmp_path / "seg.dcm").get_pixels_by_source_instance(
        [f"1.2.3.{i + 1}" for i in range(5)], assert_missing_frames_are_empty=True
    )
    drawn = np.isin(np.arange(5), (1, 2, 4))[:, None, None]
    np.testing.assert_array_equal(again[..., 0] > 0, (values > HIGH) & drawn)


def enhanced(values, **changes):
    """The bytes of an enhanced CT of these slices, stored from head to feet."""
    plane = item(
        PixelMeasuresSequence=[item(PixelSpacing=[0.7, 0.5], SliceThickness=3)],
        PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=-24, RescaleType="HU")],
    )
    places = [
        item(
            PlanePositionSequence=[item(ImagePositionPatient=[-10, -20, 30 - 3 * i])],
            PlaneOrientationSequence=[item(ImageOrientationPatient=AXIAL)],  # equal in all, but not shared
        )
        for i in range(len(values))
    ]
    return made(
        values, SOPClassUID=uid.EnhancedCTImageStorage, SharedFunctionalGroupsSequence=[plane],
        PerFrameFunctionalGroupsSequence=places, SeriesInstanceUID="1.2.3", **{**IDENTITY, **changes},
    )  # fmt: skip


def test_the_frames_of_one_file_are_referred_to_by_number(tmp_path, values):
    (tmp_path / "e.dcm").write_bytes(enhanced(values))
    answer = answer_of(load_volume(tmp_path / "e.dcm"))
    _, found = read(answer.save_dicom_seg(tmp_path / "seg.dcm"))
    assert found.keys() == {(1, "1.2.3.4", i + 1) for i in (1, 2, 4)}
    for i in (1, 2, 4):
        np.testing.assert_array_equal(found[1, "1.2.3.4", i + 1], values[i] > HIGH)


def test_the_file_says_what_it_is_and_what_it_was_drawn_in(tmp_path, values):
    folder = write(tmp_path / "s", values, **IDENTITY)
    labels = ["the absent", "right lung", "Brain", "gro\u00dfer\\Knoten " + "x" * 80]
    answer = answer_of(load_volume(folder), labels)
    for finding in answer.findings[1:3]:
        finding.mask[:4, 5, 2:] = True
    seg, found = read(answer.save_dicom_seg(tmp_path / "seg.dcm"))
    assert seg.SOPClassUID == uid.SegmentationStorage
    assert (seg.Modality, seg.SegmentationType, seg.BitsAllocated) == ("SEG", "BINARY", 1)
    assert seg.NumberOfFrames == 3 + 3 + 3
    assert {segment for segment, *_ in found} == {1, 2, 3}
    assert seg.ContentLabel == "RESEARCH_ONLY"
    assert seg.ContentDescription == NOTICE
    assert NOTICE in seg.SeriesDescription
    assert [s.SegmentLabel for s in seg.SegmentSequence] == [
        "right lung", "Brain", "gro\u00dfer Knoten " + "x" * 49,
    ]  # fmt: skip
    codes = []
    for segment in seg.SegmentSequence:
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        assert segment.SegmentAlgorithmName == f"medplib {versions()['medplib']}"
        kind = segment.SegmentedPropertyTypeCodeSequence[0]
        side = kind.get("SegmentedPropertyTypeModifierCodeSequence")
        category = segment.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning
        codes.append((category, kind.CodingSchemeDesignator, kind.CodeMeaning, side and side[0].CodeMeaning))
    assert codes == [
        ("Anatomical Structure", "SCT", "Lung", "Right"),
        ("Anatomical Structure", "SCT", "Brain", None),
        ("Tissue", "SCT", "Tissue", None),
    ]
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == "1.2.3"
    referred = {one.ReferencedSOPInstanceUID for one in series.ReferencedInstanceSequence}
    assert referred == {one.ReferencedSOPInstanceUID for one in seg.SourceImageSequence}
    assert referred == {f"1.2.3.{i + 1}" for i in range(5)}
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == ("1.2.9", "1.2.8")
    assert seg.SeriesInstanceUID != "1.2.3"
    assert seg.DeviceSerialNumber == "ab" * 32
    assert (seg.PatientName, seg.PatientID, seg.PatientSex) == (CANARY, "Canary-7", "F")


@pytest.mark.parametrize(
    ("name", "kind", "side"),
    [
        ("left lung", "Lung", "Left"),
        ("caudate nucleus", "Caudate Nucleus", None),
        ("Heart", "Heart", None),
        ("right hemisphere", "Tissue", None),
        ("lung 2", "Tissue", None),
        ("left", "Tissue", None),
        ("", "Tissue", None),
    ],
)
def test_names_have_codes_where_the_standard_has_them(name, kind, side):
    category, found, modifier = code_of(name)
    assert found.meaning == kind
    assert category.meaning == ("Tissue" if kind == "Tissue" else "Anatomical Structure")
    assert (modifier and modifier.meaning) == side


def test_a_number_of_frames_that_cannot_be_is_refused_at_once(tmp_path, values):
    (tmp_path / "e.dcm").write_bytes(enhanced(values, NumberOfFrames=2**31 - 1))
    answer = Answer("", [Finding("x", np.ones((12, 20), bool), 0.5)], [np.zeros((12, 20, 3), np.uint8)])
    with pytest.raises(InputError, match="frames without a place in the patient"):
        answer.save_dicom_seg(tmp_path / "seg.dcm", tmp_path / "e.dcm")


def test_texts_of_any_character_set_arrive(tmp_path, values):
    name = "M\u00fcller^J\u00f6rg"
    folder = write(
        tmp_path / "s", values, **{**IDENTITY, "PatientName": name, "SpecificCharacterSet": "ISO_IR 100"}
    )
    seg, _ = read(answer_of(load_volume(folder)).save_dicom_seg(tmp_path / "seg.dcm"))
    assert seg.SpecificCharacterSet == "ISO_IR 192"
    assert str(seg.PatientName) == name


def test_what_the_header_lacks_or_writes_wrongly_is_left_empty(tmp_path, values):
    odd = {"PatientSex": "X", "PatientBirthDate": "yesterday", "StudyDate": "2020", "StudyTime": "noon"}
    lean = {"StudyInstanceUID": "1.2.9", "FrameOfReferenceUID": "1.2.8"}
    for number, changes in enumerate((lean, {**lean, **odd}, {**lean, "SliceThickness": ""})):
        folder = write(tmp_path / str(number), values, **changes)
        seg, _ = read(answer_of(load_volume(folder)).save_dicom_seg(tmp_path / "seg.dcm"))
        assert [seg.PatientSex, seg.PatientBirthDate, seg.StudyDate, seg.StudyTime] == [""] * 4


def unnamed(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_answer_is_saved_with_it_when_asked_alone(tmp_path, values):
    answer = answer_of(load_volume(write(tmp_path / "s", values, **IDENTITY)))
    out = tmp_path / "out"
    answer.save(out)
    assert not any(path.suffix == ".dcm" for path in out.iterdir())
    written = answer.save(out, dicom_seg=True)
    assert "segmentation.dcm" in [path.name for path in written]
    assert unnamed(out) == sorted(path.name for path in written)
    assert is_ours(out / "segmentation.dcm")
    answer.save(out, dicom_seg=True)  # in place of our own
    answer.save(out)
    assert not (out / "segmentation.dcm").exists()  # of the answer before
    (out / "segmentation.dcm").write_bytes(made(values[0]))
    with pytest.raises(InputError, match=r"already holds a segmentation\.dcm that medplib did not write"):
        answer.save(out, dicom_seg=True)
    with pytest.raises(InputError, match="medplib did not write"):
        answer.save_dicom_seg(out / "segmentation.dcm")
    assert (out / "segmentation.dcm").read_bytes() == made(values[0])


def test_nothing_drawn_gives_no_file(tmp_path, values):
    answer = answer_of(load_volume(write(tmp_path / "s", values, **IDENTITY)), slices=())
    with pytest.raises(InputError, match="Nothing was drawn"):
        answer.save_dicom_seg(tmp_path / "seg.dcm")
    assert not (tmp_path / "seg.dcm").exists()
    assert "segmentation.dcm" not in [p.name for p in answer.save(tmp_path / "out", dicom_seg=True)]


def test_what_has_no_segmentation_is_named_and_no_file_is_left(tmp_path, values):
    array = Volume(np.arange(27.0).reshape(3, 3, 3), (1, 1, 1), "made up")
    cases = [(array, "'made up' was not read from DICOM")]
    for number, (changes, message) in enumerate(
        [
            ({"StudyInstanceUID": ""}, "lacks StudyInstanceUID, which"),
            ({"FrameOfReferenceUID": ""}, "lacks FrameOfReferenceUID, which"),
            ({"SOPClassUID": "1.2.3.4"}, r"no DICOM segmentation can be made \(KeyError\)"),
        ]
    ):
        folder = write(tmp_path / str(number), values, **{**IDENTITY, **changes})
        cases.append((load_volume(folder), message))
    moved = load_volume(write(tmp_path / "moved", values, **IDENTITY))
    (tmp_path / "moved" / "3.dcm").write_bytes(b"another file")
    gone = load_volume(write(tmp_path / "gone", values, **IDENTITY))
    (tmp_path / "gone" / "3.dcm").unlink()
    cases += [(moved, "has changed since it was read"), (gone, "has changed since it was read")]
    several = tmp_path / "several"
    several.mkdir()
    for i in range(2):
        plane = {"ImagePositionPatient": [0, 0, 3 * i], "ImageOrientationPatient": AXIAL}
        content = made(
            values[i : i + 1],
            **IDENTITY,
            SOPInstanceUID=f"1.2.3.{i}",
            SharedFunctionalGroupsSequence=[item(PixelMeasuresSequence=[item(PixelSpacing=[1, 1])])],
            **plane,
        )
        (several / f"{i}.dcm").write_bytes(content)
    cases.append((load_volume(several), "one of several files with frames"))
    for volume, message in cases:
        mask = np.ones(volume.values.shape, bool)
        answer = VolumeAnswer(volume, [VolumeFinding("x", mask)], "axial", [0], {})
        with pytest.raises(InputError, match=message) as caught:
            answer.save_dicom_seg(tmp_path / "out" / "seg.dcm")
        assert "Canary" not in str(caught.value)
        with pytest.raises(InputError, match=message):
            answer.save(tmp_path / "out", dicom_seg=True)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("axes", [[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], [1, 0, 0, 0, -1, 0]])
def test_the_mask_of_a_picture_lies_on_the_pixels_of_its_file(tmp_path, values, axes):
    path = tmp_path / "scan.dcm"
    places = {"ImageOrientationPatient": axes, "ImagePositionPatient": [0, 0, 5], "PixelSpacing": [0.7, 0.5]}
    path.write_bytes(
        made(values[0], **IDENTITY, **places, SOPClassUID=uid.CTImageStorage, Modality="CT",
             SeriesInstanceUID="1.2.3")
    )  # fmt: skip
    picture = read_dicom(path, window=(HIGH + 0.5, 0.5))
    mask = picture[..., 0] > 127
    empty = Finding("nothing", np.zeros(mask.shape, bool), 0.5)
    answer = Answer("", [empty, Finding("left lung", mask, 0.5)], [picture])
    _, found = read(answer.save_dicom_seg(tmp_path / "seg.dcm", path))
    assert found.keys() == {(1, "1.2.3.4", None)}
    np.testing.assert_array_equal(found[1, "1.2.3.4", None], values[0] > HIGH)
    assert "segmentation.dcm" in [p.name for p in answer.save(tmp_path / "out", dicom_seg=path)]
    other = Answer("", [Finding("x", mask[:9], 0.5)], [picture[:9]])
    with pytest.raises(InputError, match=r"The mask is \(9, 20\), but .*scan\.dcm' is \(12, 20\)"):
        other.save_dicom_seg(tmp_path / "no.dcm", path)
    with pytest.raises(InputError, match="was not read from DICOM"):
        answer.save_dicom_seg(tmp_path / "no.dcm", "examples/images/chest_ct.png")
    with pytest.raises(InputError, match=r"has no frame 1; its frames are 0 to 0"):
        answer.save_dicom_seg(tmp_path / "no.dcm", path, frame=1)
    assert not (tmp_path / "no.dcm").exists()


def test_a_film_needs_no_place_and_a_frame_is_chosen_by_number(tmp_path, values):
    film = made(
        values[0].astype(np.uint16), **{**IDENTITY, "FrameOfReferenceUID": ""}, SeriesInstanceUID="1.2.3",
        SOPClassUID=uid.ComputedRadiographyImageStorage, Modality="CR",
    )  # fmt: skip
    (tmp_path / "film.dcm").write_bytes(film)
    (tmp_path / "e.dcm").write_bytes(enhanced(values))
    mask = np.zeros(values[0].shape, bool)
    mask[2:5, 3:9] = True
    answer = Answer("", [Finding("x", mask, 0.5)], [np.zeros((*mask.shape, 3), np.uint8)])
    _, found = read(answer.save_dicom_seg(tmp_path / "a.dcm", tmp_path / "film.dcm"))
    np.testing.assert_array_equal(found[1, "1.2.3.4", None], mask)
    _, found = read(answer.save_dicom_seg(tmp_path / "b.dcm", tmp_path / "e.dcm", frame=3))
    assert list(found) == [(1, "1.2.3.4", 4)]
    np.testing.assert_array_equal(found[1, "1.2.3.4", 4], mask)


def test_the_patient_is_in_the_segmentation_and_nowhere_else(tmp_path, values, capfd, caplog):
    for name in ("pydicom", "highdicom", "medplib"):
        caplog.set_level(logging.DEBUG, name)
    odd = {
        "PatientName": "Canary Zephyrine",
        "PatientSex": "Canary",
        "StudyDate": "Canary",
        "PatientAge": "Canary",
    }
    for number, changes in enumerate(({}, odd, {"SOPClassUID": "1.2.3.4"})):
        folder = write(tmp_path / str(number), values, **{**IDENTITY, **changes})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            answer = answer_of(load_volume(folder))
            if number < 2:
                written = answer.save(tmp_path / f"out{number}", dicom_seg=True)
            else:
                with pytest.raises(InputError, match="no DICOM segmentation can be made") as error:
                    answer.save(tmp_path / "no", dicom_seg=True)
                assert "Canary" not in "".join(traceback.format_exception(error.value))
        for path in written:
            assert (b"Canary" in path.read_bytes()) == (path.suffix == ".dcm")
        assert not any("Canary" in str(warning.message) for warning in caught)
    assert "Canary" not in "".join(capfd.readouterr()) + caplog.text
    assert not [record for record in caplog.records if record.name.startswith("highdicom")]
    assert "Canary" not in repr(answer) + repr(answer.volume) + json.dumps(answer.to_dict())


def test_a_full_disk_leaves_nothing(tmp_path, values, monkeypatch):
    import os

    answer = answer_of(load_volume(write(tmp_path / "s", values, **IDENTITY)))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(MedPLIBError, match="No space left"):
        answer.save_dicom_seg(tmp_path / "seg.dcm")
    with pytest.raises(MedPLIBError, match="No space left"):
        answer.save(tmp_path / "out", dicom_seg=True)
    assert unnamed(tmp_path) == ["s"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_writes_it_when_asked(tmp_path, values):
    folder = write(tmp_path / "s", values, **IDENTITY)
    result = run("segment", folder, "body", "--out", tmp_path / "out", "--dicom-seg")
    assert result.exit_code == 0, result.output
    there = (tmp_path / "out" / "segmentation.dcm").exists()
    assert there != ("No DICOM segmentation was written: nothing was drawn." in result.output)
    assert ("segmentation.dcm" in result.output) == there
    assert "Canary" not in result.output
    for path in (tmp_path / "out").iterdir():
        assert (b"Canary" in path.read_bytes()) == (path.suffix == ".dcm")
    assert "patient's identity" in " ".join(run("segment", "--help").output.replace("\u2502", " ").split())


def test_the_command_draws_in_a_scan(tmp_path):
    """A picture of the test CT as a DICOM file: the lungs are found, and lie in the file as in the answer."""
    from PIL import Image

    picture = np.asarray(Image.open("examples/images/chest_ct.png").convert("L"))
    places = {"ImageOrientationPatient": [-1, 0, 0, 0, -1, 0], "ImagePositionPatient": [0, 0, 5]}
    content = made(
        picture[::-1, ::-1], **IDENTITY, **places, PixelSpacing=[1, 1], SOPClassUID=uid.CTImageStorage,
        Modality="CT", SeriesInstanceUID="1.2.3",
    )  # fmt: skip
    (tmp_path / "scan.dcm").write_bytes(content)
    words = (
        "segment",
        tmp_path / "scan.dcm",
        "right lung",
        "--out",
        tmp_path / "out",
        "--dicom-seg",
        "--json",
    )
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["findings"][0]["area"] > 1000
    mask = np.asarray(Image.open(tmp_path / "out" / "mask_0_right_lung.png")) > 0
    _, found = read(tmp_path / "out" / "segmentation.dcm")
    np.testing.assert_array_equal(found[1, "1.2.3.4", None], mask[::-1, ::-1])
    result = run("segment", tmp_path / "scan.dcm", "optic disc", *words[3:])
    assert result.exit_code == 0, result.output
    assert "nothing was drawn" in result.stderr
    assert not (tmp_path / "out" / "segmentation.dcm").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("examples/images/chest_ct.png", "--out", "{}/out"), r"chest_ct\.png' was not read from DICOM"),
        (("{}/s", "--out", "{}/out"), r"lacks StudyInstanceUID"),
        (("{}/s",), "--dicom-seg writes into the folder of --out"),
    ],
)
def test_the_command_refuses_before_the_model_is_loaded(tmp_path, words, message, monkeypatch):
    monkeypatch.setattr("medplib.apps.cli.load_model", lambda *_, **__: pytest.fail("loaded for nothing"))
    write(tmp_path / "s")
    file, *rest = (word.format(tmp_path) for word in words)
    result = run("segment", file, "body", *rest, "--dicom-seg")
    assert result.exit_code == 2
    (line,) = result.stderr.strip().splitlines()
    with pytest.raises(MedPLIBError, match=message):
        raise MedPLIBError(line)
    assert not (tmp_path / "out").exists()


def test_a_model_draws_in_a_series_and_saves_it(tmp_path, values):
    model = MedPLIB.from_pretrained("medplib-tiny")
    answer = model.segment_volume(write(tmp_path / "s", values, **IDENTITY), "body")
    assert len(answer.volume.frames) == 5
    if answer.masks.any():
        read(answer.save_dicom_seg(tmp_path / "seg.dcm"))


def test_the_absence_of_highdicom_is_explained(tmp_path):
    write(tmp_path / "s", **IDENTITY)
    code = f"""
import sys
import medplib.io.dicom_seg
assert "pydicom" not in sys.modules and "highdicom" not in sys.modules
sys.modules["highdicom"] = None
from medplib.apps.cli import app
out = {str(tmp_path / "out")!r}
sys.argv = ["medplib", "segment", {str(tmp_path / "s")!r}, "body", "--out", out, "--dicom-seg"]
app()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    expected = "error: A DICOM segmentation needs highdicom: pip install 'medplib[dicom-seg]'."
    assert done.stderr.strip().splitlines()[-1] == expected
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_written_is_a_file_as_the_standard_has_it(tmp_path, values):
    answer = answer_of(load_volume(write(tmp_path / "s", values, **IDENTITY)))
    content = answer.save_dicom_seg(tmp_path / "seg.dcm").read_bytes()
    assert content[:132] == b"\0" * 128 + b"DICM"
    meta = dcmread(io.BytesIO(content)).file_meta
    assert meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian
    assert meta.ImplementationVersionName == f"medplib {versions()['medplib']}"[:16]
