"""DICOM as pictures: pydicom's own files and made ones against values worked out by hand, limits, privacy."""

import contextlib
import io
import json
import logging
import pickle
import struct
import subprocess
import sys
import traceback
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image
from pydicom import Dataset, dcmread, dcmwrite, uid
from pydicom.config import disable_value_validation
from pydicom.data import get_testdata_file
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels import get_decoder

from medplib.apps.batch import Job, to_sample
from medplib.data.files import File, ImageFile
from medplib.data.record import Record
from medplib.errors import InputError
from medplib.io import load_image
from medplib.io.dicom import DicomFrame, read_dicom

RAMP = np.arange(12 * 20).reshape(12, 20)  # 0 ... 239


def wheel(name):
    """The path of one of the files inside pydicom's wheel."""
    path = get_testdata_file(name, download=False)
    assert path, f"{name} is not in the wheel"
    return path


def made(array, syntax=uid.ExplicitVRLittleEndian, pixels=None, **attributes):
    """The bytes of a DICOM file with these stored values (H, W), (frames, H, W) or (H, W, 3)."""
    array = np.asarray(array)
    samples = 3 if array.ndim == 3 and array.shape[2] == 3 else 1
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = uid.SecondaryCaptureImageStorage, "1.2.3.4"
    data.Modality = "OT"
    data.SamplesPerPixel, data.PhotometricInterpretation = samples, "RGB" if samples == 3 else "MONOCHROME2"
    if samples == 3:
        data.PlanarConfiguration = 0
    elif array.ndim == 3:
        data.NumberOfFrames = len(array)
    data.Rows, data.Columns = array.shape[:2] if samples == 3 else array.shape[-2:]
    data.BitsAllocated = data.BitsStored = array.dtype.itemsize * 8
    data.PixelRepresentation = int(array.dtype.kind == "i")
    with disable_value_validation():
        for key, value in attributes.items():
            if value is None:
                delattr(data, key)
            else:
                setattr(data, key, value)
    data.HighBit = data.BitsStored - 1
    if pixels is None:
        pixels = array.astype(array.dtype.newbyteorder("<>"[syntax == uid.ExplicitVRBigEndian])).tobytes()
    data.PixelData = pixels + b"\0" * (len(pixels) % 2)
    data["PixelData"].VR = "OB" if syntax.is_compressed or data.BitsAllocated <= 8 else "OW"
    data["PixelData"].is_undefined_length = syntax.is_compressed
    return written(data, syntax)


def written(data, syntax=uid.ExplicitVRLittleEndian):
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    with disable_value_validation():
        dcmwrite(buffer, data, enforce_file_format=True)
    return buffer.getvalue()


def grey(source, **options):
    """The one channel of a picture whose three are equal."""
    out = read_dicom(source, **options)
    assert out.dtype == np.uint8
    assert out.shape[2] == 3
    assert (out == out[..., :1]).all()
    return out[..., 0]


def in_8_bits(share):
    """Shares of white -> the nearest of 256 greys."""
    return np.floor(np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)


def linear(values, centre, width):
    """The standard's C.11.2.1.2.1, one value at a time."""
    out = []
    for x in np.asarray(values, float).reshape(-1):
        if x <= centre - 0.5 - (width - 1) / 2:
            out.append(0.0)
        elif x > centre - 0.5 + (width - 1) / 2:
            out.append(1.0)
        else:
            out.append((x - (centre - 0.5)) / (width - 1) + 0.5)
    return in_8_bits(np.reshape(out, np.shape(values)))


def exact(values, centre, width):
    """The standard's C.11.2.1.3.2."""
    return in_8_bits((np.asarray(values, float) - centre) / width + 0.5)


def stretched(values, counted=None):
    low, high = np.percentile(values if counted is None else counted, (0.5, 99.5))
    return in_8_bits((values - low) / (high - low))


def raw(name, dtype, shape):
    """The stored values of an uncompressed file, from its bytes alone."""
    return np.frombuffer(dcmread(wheel(name)).PixelData, dtype)[: np.prod(shape)].reshape(shape)


# ------------------------------------------------------------------------------------------ files of pydicom


MR = (
    "small",
    "small_implicit",
    "small_expb",
    "small_bigendian",
    "small_padded",
    "small_RLE",
    "small_jp2klossless",
)


@pytest.mark.parametrize("name", [*MR, "small_jpeg_ls_lossless"])
def test_one_image_is_the_same_in_every_transfer_syntax(name):
    path = wheel(f"MR_{name}.dcm")
    syntax = dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID
    if not get_decoder(syntax).is_available:
        with pytest.raises(InputError, match=r"JPEG-LS.*pip install pylibjpeg pylibjpeg-libjpeg"):
            load_image(path)
        pytest.skip("no JPEG-LS decoder")
    stored = raw("MR_small.dcm", "<i2", (64, 64))
    assert np.array_equal(load_image(path)[..., 0], linear(stored, 600, 1600))


def test_a_ct_is_shown_in_hounsfield_units_or_stretched():
    units = raw("CT_small.dcm", "<i2", (128, 128)) - 1024.0
    assert np.array_equal(grey(wheel("CT_small.dcm")), stretched(units))  # it has no window
    assert np.array_equal(grey(wheel("CT_small.dcm"), window=(40, 400)), exact(units, 40, 400))


def test_of_several_windows_the_first_is_used():
    path = wheel("examples_overlay.dcm")
    stored = raw("examples_overlay.dcm", "<u2", (300, 484)) & 0xFFF
    assert np.array_equal(grey(path), linear(stored, 450, 790))
    assert np.array_equal(grey(path, window=(200, 400)), exact(stored, 200, 400))


@pytest.mark.parametrize(
    ("name", "away"), [("rle", 0), ("rle_16bit", 0), ("rle_32bit", 0), ("dcmtk_+eb+cr", 2), ("jpeg_dcmtk", 6)]
)
def test_one_colour_image_is_the_same_in_every_depth_and_syntax(name, away):
    bars = load_image(wheel(f"SC_rgb_{name}.dcm")).astype(int)
    places = {5: (255, 0, 0), 15: (255, 128, 128), 25: (0, 255, 0), 45: (0, 0, 255), 95: (255, 255, 255)}
    for row, colour in places.items():
        assert np.abs(bars[row] - colour).max() <= away


@pytest.mark.parametrize("name", ["+n1", "+n2", "+np", "+s2", "+s4"])
def test_jpeg_in_ybr_becomes_rgb(name):
    bars = load_image(wheel(f"SC_rgb_dcmtk_+eb+cy{name}.dcm")).astype(int)
    expected = load_image(wheel("SC_rgb_rle.dcm"))
    assert np.abs(bars - expected).max(axis=(1, 2))[5] <= 4
    assert np.abs(bars - expected).mean() < 4


def test_subsampled_ybr_without_compression_becomes_rgb():
    stored = np.frombuffer(dcmread(wheel("SC_ybr_full_422_uncompressed.dcm")).PixelData, np.uint8)
    y0, y1, b, r = stored[:20000].reshape(-1, 4).T.astype(float)
    y, b, r = np.stack([y0, y1], 1).ravel(), np.repeat(b, 2) - 128, np.repeat(r, 2) - 128
    rgb = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], 1)
    difference = load_image(wheel("SC_ybr_full_422_uncompressed.dcm")).reshape(-1, 3) - rgb.clip(0, 255)
    assert np.abs(difference).max() <= 1


def test_palettes_are_looked_up():
    data = dcmread(wheel("examples_palette.dcm"))
    stored = np.frombuffer(data.PixelData, np.uint8)[: 350 * 800].reshape(350, 800)
    tables = [
        np.frombuffer(data[f"{c}PaletteColorLookupTableData"].value, "<u2") for c in ("Red", "Green", "Blue")
    ]
    expected = np.stack([in_8_bits(table[stored] / 65535) for table in tables], 2)
    assert np.array_equal(load_image(wheel("examples_palette.dcm")), expected)


@pytest.mark.parametrize(("bits", "stored"), [(8, "<u1"), (8, "<u2"), (16, "<u2")])
def test_palettes_have_entries_of_8_or_16_bits(bits, stored):
    entries = np.arange(256) * (1 if bits == 8 else 257)
    attributes = {"PhotometricInterpretation": "PALETTE COLOR"}
    for colour, values in zip(("Red", "Green", "Blue"), (entries, entries[::-1], entries // 2), strict=True):
        attributes[f"{colour}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
        attributes[f"{colour}PaletteColorLookupTableData"] = values.astype(stored).tobytes()
    picture = load_image(made(RAMP.astype(np.uint8), **attributes)).astype(int)
    assert np.abs(picture - np.stack([RAMP, 255 - RAMP, RAMP / 2], 2)).max() <= 0.5


def test_a_deflated_file_is_read():
    data = dcmread(wheel("image_dfl.dcm"))
    assert np.array_equal(grey(wheel("image_dfl.dcm")).ravel(), np.frombuffer(data.PixelData, np.uint8))


@pytest.mark.parametrize("name", ["rtdose", "rtdose_rle", "rtdose_expb"])
def test_each_of_15_frames_of_32_bits_can_be_chosen(name):
    stored = np.frombuffer(dcmread(wheel("rtdose.dcm")).PixelData, "<u4").reshape(15, 10, 10).astype(float)
    for frame in (0, 7, 14):
        assert np.array_equal(grey(wheel(f"{name}.dcm"), frame=frame), stretched(stored[frame]))
    for frame in (-1, 15):
        with pytest.raises(InputError, match=f"no frame {frame}; its frames are 0 to 14"):
            read_dicom(wheel(f"{name}.dcm"), frame=frame)


def test_the_first_of_several_frames_is_read_with_a_warning_that_counts_them():
    path = wheel("examples_ybr_color.dcm")
    with pytest.warns(UserWarning, match="30 frames; the first is read") as caught:
        picture = load_image(path)
    assert len(caught) == 1
    encoded = get_frame(dcmread(path).PixelData, 0, number_of_frames=30)
    assert np.abs(picture.astype(int) - np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))).max() <= 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(read_dicom(path, frame=0), picture)
        assert not np.array_equal(read_dicom(path, frame=29), picture)


NO_IMAGE = {
    "rtstruct.dcm": "RT Structure Set",
    "rtplan.dcm": "RT Plan",
    "test-SR.dcm": "Comprehensive SR",
    "waveform_ecg.dcm": "12-lead ECG Waveform",
    "liver_1frame.dcm": "segmentation, not an image",
    "liver_expb_1frame.dcm": "segmentation, not an image",
    "DICOMDIR": "DICOMDIR, a list of files",
    "MR_truncated.dcm": "is cut short",
    "badVR.dcm": "damaged",
    "no_meta.dcm": "no DICOM header",
    "SC_rgb_small_odd.dcm": "at least 8",
}


@pytest.mark.parametrize("name", NO_IMAGE)
def test_what_is_no_image_says_what_it_is(name):
    with pytest.raises(InputError, match=NO_IMAGE[name]) as error:
        load_image(wheel(name))
    assert name in str(error.value)


@pytest.mark.parametrize(
    "name", ["JPGExtended", "SC_rgb_jpeg_gdcm", "JPEGLSNearLossless_08", "JPEGLSNearLossless_16"]
)
def test_a_missing_decoder_is_named(name):
    decoder = get_decoder(dcmread(wheel(f"{name}.dcm"), stop_before_pixels=True).file_meta.TransferSyntaxUID)
    lacking = any(line.startswith("pylibjpeg ") for line in decoder.missing_dependencies)
    if lacking and not (name.startswith("JPEGLS") and decoder.is_available):  # by pyjpegls, which is enough
        with pytest.raises(InputError, match=r"from JPEG.* pip install pylibjpeg pylibjpeg-libjpeg\."):
            load_image(wheel(f"{name}.dcm"))
        pytest.skip("its decoder is not installed")
    assert load_image(wheel(f"{name}.dcm")).std() > 10


# ------------------------------------------------------------------------------------------ made files


@pytest.mark.parametrize(
    "syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian]
)
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4"])
def test_every_depth_is_read_and_never_clipped(dtype, syntax):
    values = (
        RAMP * (1 if dtype == "u1" else 257 if dtype[1] != "1" else 1) - (120 if dtype[0] == "i" else 0)
    ).astype(dtype)
    expected = values if dtype == "u1" else stretched(values.astype(float))
    assert np.array_equal(grey(made(values, syntax)), expected)


def test_fewer_bits_than_are_allocated_fill_the_range():
    values = (RAMP * 17).astype(np.uint16)
    assert np.array_equal(grey(made(values, BitsStored=12)), stretched(values.astype(float)))
    six = (RAMP % 64).astype(np.uint8)
    assert np.array_equal(grey(made(six, BitsStored=6)), in_8_bits(six / 63))
    bits = RAMP % 3 == 0
    packed = np.packbits(bits.ravel(), bitorder="little").tobytes()
    one = made(bits.astype(np.uint8), pixels=packed, BitsAllocated=1, BitsStored=1)
    assert np.array_equal(grey(one), bits * np.uint8(255))


def test_floating_point_pixels_are_stretched_and_must_be_finite():
    values = RAMP.astype("<f4") / 7

    def file(array):
        data = dcmread(io.BytesIO(made(RAMP.astype(np.uint16))))
        del data.PixelData, data.PixelRepresentation, data.BitsStored, data.HighBit
        data.BitsAllocated, data.FloatPixelData = 32, array.tobytes()
        return written(data)

    assert np.array_equal(grey(file(values)), stretched(values.astype(float)))
    assert np.array_equal(grey(file(values), window=(10, 4)), exact(values, 10, 4))
    values[3, 4] = np.nan
    with pytest.raises(InputError, match="1 values that are NaN"):
        read_dicom(file(values))


def test_planes_of_colour_are_put_together():
    colour = np.stack([RAMP, 255 - RAMP, RAMP // 2], 2).astype(np.uint8)
    planes = np.ascontiguousarray(colour.transpose(2, 0, 1)).tobytes()
    assert np.array_equal(load_image(made(colour)), colour)
    assert np.array_equal(load_image(made(colour, pixels=planes, PlanarConfiguration=1)), colour)


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID", None])
def test_windows_follow_the_standard_after_rescaling(function):
    stored = (RAMP * 10).astype(np.int16)
    units = stored * 2.0 - 1024
    file = made(
        stored,
        RescaleSlope="2",
        RescaleIntercept="-1024",
        WindowCenter=["40", "7"],
        WindowWidth=["400", "9"],
        **({"VOILUTFunction": function} if function else {}),
    )
    expected = {
        "LINEAR": linear(units, 40, 400),
        "LINEAR_EXACT": exact(units, 40, 400),
        "SIGMOID": in_8_bits(1 / (1 + np.exp(-4 * (units - 40) / 400))),
    }[function or "LINEAR"]
    assert np.array_equal(grey(file), expected)
    assert np.array_equal(grey(file, window=(-200, 300.5)), exact(units, -200, 300.5))


def test_a_window_around_0_is_one():
    values = (RAMP * 5 - 600).astype(np.int16)
    assert np.array_equal(grey(made(values, WindowCenter="0", WindowWidth="700")), linear(values, 0, 700))


def test_a_window_that_cannot_be_used_is_left_with_a_warning():
    stored = (RAMP * 10).astype(np.int16)
    for attributes in (
        {"WindowWidth": "0"},
        {"WindowWidth": "-5"},
        {"WindowWidth": "nan"},
        {"WindowCenter": "inf"},
        {"VOILUTFunction": "CUBIC"},
    ):
        file = made(stored, **({"WindowCenter": "40", "WindowWidth": "400"} | attributes))
        with pytest.warns(UserWarning, match="window that cannot be used"):
            assert np.array_equal(grey(file), stretched(stored.astype(float)))
    assert np.array_equal(
        grey(made(stored, WindowCenter="", WindowWidth="")), stretched(stored.astype(float))
    )


@pytest.mark.parametrize("window", [(40,), (40, 0), (40, -1), (40, float("nan")), 40, "wide", (1, 2, 3)])
def test_a_window_given_must_be_centre_and_width(window):
    with pytest.raises(InputError, match=r"window must be \(centre, width\)"):
        read_dicom(made(RAMP.astype(np.uint16)), window=window)


@pytest.mark.parametrize("frame", [1.0, True, "0"])
def test_a_frame_must_be_a_whole_number(frame):
    with pytest.raises(InputError, match="frame must be a whole number"):
        read_dicom(made(RAMP.astype(np.uint16)), frame=frame)


def test_monochrome1_is_white_at_0():
    values = (RAMP * 5).astype(np.uint16)
    options = {"WindowCenter": "600", "WindowWidth": "900"}
    for more in ({}, options):
        as_2 = grey(made(values, **more))
        assert np.array_equal(grey(made(values, PhotometricInterpretation="MONOCHROME1", **more)), 255 - as_2)
    assert np.array_equal(
        grey(made(RAMP.astype(np.uint8), PhotometricInterpretation="MONOCHROME1")), 255 - RAMP
    )


def test_a_negative_slope_turns_grey_over():
    values = (RAMP * 5).astype(np.uint16)
    out = grey(made(values, RescaleSlope="-2", RescaleIntercept="7"))
    assert np.array_equal(out, 255 - stretched(values.astype(float)))


@pytest.mark.parametrize("slope", ["0", "nan", "inf"])
def test_a_slope_that_makes_no_sense_is_refused(slope):
    with pytest.raises(InputError, match="damaged"):
        read_dicom(made(RAMP.astype(np.uint16), RescaleSlope=slope, RescaleIntercept="0"))


def test_a_range_of_padding_is_left_out():
    values = (RAMP * 5 + 100).astype(np.uint16)
    values[:, :4] = 60000
    values[:2, :4] = 60003
    out = grey(made(values, PixelPaddingValue=60000, PixelPaddingRangeLimit=60003))
    assert np.array_equal(out, stretched(values.astype(float), values[:, 4:]))
    assert (grey(made(np.full((9, 9), 7, np.uint16), PixelPaddingValue=7)) == 0).all()  # nothing else is left


def table(entries, first, bits):
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(entries), first, bits], [int(entry) for entry in entries]
    item["LUTData"].VR = item["LUTDescriptor"].VR = "US"
    return [item]


@pytest.mark.parametrize(("bits", "top"), [(8, 255), (12, 4095), (16, 65535)])
def test_look_up_tables_of_any_depth_are_applied(bits, top):
    entries = (np.linspace(0, 1, 1000) ** 2 * top).astype(int)
    stored = (RAMP * 5).astype(np.uint16)
    index = np.clip(stored.astype(int) - 100, 0, 999)
    voi = made(stored, VOILUTSequence=table(entries, 100, bits), WindowCenter="3", WindowWidth="9")
    assert np.array_equal(grey(voi), in_8_bits(entries[index] / top))
    assert np.array_equal(grey(voi, window=(600, 1000)), exact(stored, 600, 1000))
    modality = made(stored, ModalityLUTSequence=table(entries, 100, bits))
    assert np.array_equal(grey(modality), stretched(entries[index].astype(float)))
    centre, width = top / 2, top / 4
    assert np.array_equal(grey(modality, window=(centre, width)), exact(entries[index], centre, width))


def test_functional_groups_say_how_each_frame_is_shown():
    frames = np.stack([RAMP, RAMP]).astype(np.int16)
    shared, groups = Dataset(), [Dataset(), Dataset()]
    shared.PixelValueTransformationSequence = [Dataset()]
    shared.PixelValueTransformationSequence[0].RescaleSlope = "3"
    shared.PixelValueTransformationSequence[0].RescaleIntercept = "-50"
    for group, centre in zip(groups, ("100", "300"), strict=True):
        group.FrameVOILUTSequence = [Dataset()]
        group.FrameVOILUTSequence[0].WindowCenter = centre
        group.FrameVOILUTSequence[0].WindowWidth = "200"
    file = made(frames, SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=groups)
    assert np.array_equal(grey(file, frame=0), linear(RAMP * 3 - 50, 100, 200))
    assert np.array_equal(grey(file, frame=1), linear(RAMP * 3 - 50, 300, 200))


@pytest.mark.parametrize(
    ("cosines", "turn"),
    [
        ([1, 0, 0, 0, 1, 0], lambda a: a),
        ([-1, 0, 0, 0, 1, 0], lambda a: a[:, ::-1]),
        ([1, 0, 0, 0, -1, 0], lambda a: a[::-1]),
        ([-0.98, 0.1, 0.17, 0.1, -0.99, 0], lambda a: a[::-1, ::-1]),
        ([0, -1, 0, 0, 0, -1], lambda a: a),  # sagittal
        ([-1, 0, 0, 0, 0, -1], lambda a: a),  # coronal
        ([0, 1, 0, -1, 0, 0], lambda a: a),  # axial, but lying
    ],
)
def test_an_axial_slice_has_the_patients_right_on_its_left(cosines, turn):
    values = RAMP.astype(np.uint8)
    for modality in ("CT", "MR"):
        out = grey(made(values, Modality=modality, ImageOrientationPatient=cosines))
        assert np.array_equal(out, turn(values))
    assert np.array_equal(grey(made(values, Modality="US", ImageOrientationPatient=cosines)), values)


# ------------------------------------------------------------------------------------------ ways in


def test_path_bytes_file_record_and_job_give_the_same_picture(tmp_path):
    file = made(np.stack([RAMP, 239 - RAMP]).astype(np.uint8))
    path = tmp_path / "scan"  # recognised by its content
    path.write_bytes(file)
    job = Job("1", {"image": "scan", "question": "What?"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are two frames
        pictures = [load_image(path), load_image(str(path)), load_image(file), load_image(bytearray(file))]
        pictures += [read_dicom(path), ImageFile(File(str(path))).load(), *to_sample(job, tmp_path).images]
    assert all(np.array_equal(picture[..., 0], RAMP) for picture in pictures)
    frame = pickle.loads(pickle.dumps(DicomFrame(str(path), 1, window=(100, 50))))  # noqa: S301
    assert str(frame) == f"{path}[1]"
    record = Record((("What?", "A ramp."),), (frame, DicomFrame(str(path), 1)))
    windowed, second = record.load_images()
    assert np.array_equal(second[..., 0], 239 - RAMP)
    assert np.array_equal(windowed[..., 0], exact(239 - RAMP, 100, 50))


def test_a_suffix_is_enough_where_the_rest_is_an_image(tmp_path):
    bare = made(RAMP.astype(np.uint8))[132:]  # neither preamble nor prefix
    (tmp_path / "scan.DCM").write_bytes(bare)
    assert np.array_equal(load_image(tmp_path / "scan.DCM")[..., 0], RAMP)
    assert np.array_equal(grey(bare), RAMP)
    without_meta = io.BytesIO()
    dcmwrite(without_meta, dcmread(io.BytesIO(made(RAMP.astype(np.uint8), uid.ImplicitVRLittleEndian))))
    start = without_meta.getvalue().index(b"\x08\0\x16\0")  # SOP class: the first of the data set
    (tmp_path / "bare.dcm").write_bytes(without_meta.getvalue()[start:])
    assert np.array_equal(load_image(tmp_path / "bare.dcm")[..., 0], RAMP)
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "picture.dcm")
    (tmp_path / "text.dcm").write_text("no picture at all, but some words about one" * 9)
    (tmp_path / "zeros.dcm").write_bytes(b"\0" * 500)
    for name in ("picture.dcm", "text.dcm", "zeros.dcm"):
        with pytest.raises(InputError, match="no DICOM header") as error:
            load_image(tmp_path / name)
        assert name in str(error.value)


@pytest.mark.parametrize("source", [None, 3, RAMP])
def test_other_objects_are_refused(source):
    with pytest.raises(InputError, match="must be a path or bytes"):
        read_dicom(source)


def test_pydicom_is_imported_for_dicom_alone_and_its_absence_is_explained(tmp_path):
    (tmp_path / "scan.dcm").write_bytes(made(RAMP.astype(np.uint8)))
    code = f"""
import sys
import medplib.io.dicom, numpy
medplib.io.load_image(numpy.zeros((9, 9), numpy.uint8))
assert "pydicom" not in sys.modules
sys.modules["pydicom"] = None
try:
    medplib.io.load_image({str(tmp_path / "scan.dcm")!r})
except ImportError as error:
    assert "pip install 'medplib[medical]'" in str(error), error
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"Rows": 60000, "Columns": 60000}, "at most 64 million"),
        ({"Rows": 0}, "usable"),
        ({"Rows": None}, "usable"),
        ({"Columns": 7}, "at least 8"),
        ({"Columns": 20000}, "50 times"),
        ({"BitsAllocated": 24}, "form that is not read"),
        ({"SamplesPerPixel": 4}, "form that is not read"),
        ({"PhotometricInterpretation": "CMYK"}, "form that is not read"),
        ({"PhotometricInterpretation": None}, "form that is not read"),
        ({"NumberOfFrames": 2**31 - 1}, "is cut short"),
        ({"NumberOfFrames": -2}, "usable"),
        ({"BitsStored": 17}, "damaged|cannot be decoded"),
        ({"PixelRepresentation": 5}, "damaged|cannot be decoded"),
        ({"Rows": 13}, "is cut short"),
    ],
)
def test_absurd_attributes_are_refused_before_decoding(attributes, message):
    file = made(RAMP.astype(np.uint16), **attributes)
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        read_dicom(file)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def encoded(array, kind, syntax, height=None, width=None, **attributes):
    """A file whose header may say another size than the picture it encodes."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    size = {"Rows": height or array.shape[0], "Columns": width or array.shape[1]}
    return made(array, syntax, pixels=encapsulate([buffer.getvalue()]), **(size | attributes))


@pytest.mark.parametrize(
    ("kind", "syntax"), [("JPEG", uid.JPEGBaseline8Bit), ("JPEG2000", uid.JPEG2000Lossless)]
)
def test_an_encoded_picture_of_another_size_is_refused_before_decoding(kind, syntax):
    small = RAMP.astype(np.uint8)
    assert np.abs(grey(encoded(small, kind, syntax)).astype(int) - small).max() < 12
    large = np.zeros((4000, 4000), np.uint8)
    file = encoded(large, kind, syntax, 12, 20)
    tracemalloc.start()
    for bad in (file, encoded(small, kind, syntax, 20, 12), encoded(small, kind, syntax, 24, 10)):
        with pytest.raises(InputError, match="another size than its header says"):
            read_dicom(bad)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


def test_a_run_length_bomb_is_refused_before_decoding():
    runs = struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * 500_000  # 64 MB of zeros
    with pytest.raises(InputError, match="another size"):
        read_dicom(made(RAMP.astype(np.uint8), uid.RLELossless, pixels=encapsulate([runs])))


def test_a_deflated_bomb_is_refused():
    file = made(RAMP.astype(np.uint8), uid.DeflatedExplicitVRLittleEndian)
    assert np.array_equal(grey(file), RAMP)
    length = struct.unpack("<I", file[140:144])[0]  # of the file meta information
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = b"".join(squeezed.compress(bytes(1 << 24)) for _ in range(20)) + squeezed.flush()
    with pytest.raises(InputError, match="inflates to 256 MB or more"):
        read_dicom(file[: 144 + length] + bomb)


@pytest.mark.parametrize(
    "name", ["MR_small", "MR_small_RLE", "MR_small_jp2klossless", "SC_rgb_jpeg_dcmtk", "image_dfl"]
)
def test_files_cut_short_are_refused(name):
    with open(wheel(f"{name}.dcm"), "rb") as file:
        whole = file.read()
    data = dcmread(io.BytesIO(whole))
    end = whole.rfind(data.PixelData[-16:]) + 4 if name != "image_dfl" else len(whole) - 20
    for size in [*range(140, end, max(1, end // 40)), end]:
        with pytest.raises(InputError):
            read_dicom(whole[:size])


# ------------------------------------------------------------------------------------------ damage, privacy


CANARY = "Canary^Zephyrine"
NAMES = ("MR_small", "CT_small", "MR_small_RLE", "MR_small_jp2klossless", "SC_rgb_jpeg_dcmtk",
         "rtdose_1frame", "rtstruct", "test-SR")  # fmt: skip


def marked(name):
    """The bytes of one of pydicom's files with a canary in every text attribute that may name a patient."""
    data = dcmread(wheel(f"{name}.dcm"), force=True)
    for key in ("PatientName", "PatientID", "OtherPatientIDs", "PatientAddress", "ReferringPhysicianName"):
        setattr(data, key, CANARY)
    for key in ("InstitutionName", "StudyDescription", "AccessionNumber", "PatientComments", "ImageComments"):
        setattr(data, key, CANARY)
    syntax = data.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
    return written(data, syntax)


def mutated(whole, rng):
    """The file with bytes changed, cut, repeated or moved, mostly where the header is."""
    data = np.frombuffer(whole, np.uint8).copy()
    match rng.integers(5):
        case 0:
            places = rng.integers(128, len(data), rng.integers(1, 20))
            data[places] = rng.integers(0, 256, len(places))
        case 1:
            places = rng.integers(128, min(len(data), 1800), rng.integers(1, 6))
            data[places] = rng.choice([0, 1, 127, 128, 255, 65, 32], len(places))
        case 2:
            data = data[: rng.integers(0, len(data))]
        case 3:
            start, size = rng.integers(132, len(data)), rng.integers(1, 64)
            data = np.concatenate([data[:start], data[start + size :]])
        case 4:
            start, size = rng.integers(132, len(data)), rng.integers(1, 200)
            data = np.concatenate([data[: start + size], data[start:]])
    return data.tobytes()


def with_attributes_changed(name, rng):
    """The file with a few attributes of its image replaced by ones that make no sense."""
    data = dcmread(io.BytesIO(marked(name)))
    numbers = [0, 1, 2, 3, 7, 8, 12, 16, 32, 64, 255, 1000, 65535]
    for _ in range(rng.integers(1, 4)):
        match rng.integers(6):
            case 0:
                key = rng.choice(["Rows", "Columns", "BitsAllocated", "BitsStored", "SamplesPerPixel"])
                setattr(data, key, int(rng.choice(numbers)))
            case 1:
                key = rng.choice(["WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"])
                setattr(data, key, str(rng.choice(["", "0", "-1", "nan", "1e300", "3\\4"])))
            case 2:
                kinds = ["MONOCHROME1", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", CANARY]
                data.PhotometricInterpretation = str(rng.choice(kinds))
            case 3:
                data.NumberOfFrames = int(rng.choice([0, 1, 2, 100, 2**31 - 1, -1]))
            case 4:
                data.PixelRepresentation = int(rng.choice([0, 1, 2]))
                data.PlanarConfiguration = int(rng.choice([0, 1, 2]))
            case 5:
                data.VOILUTSequence = table(
                    [1, 2, 3], int(rng.integers(0, 9)), int(rng.choice([0, 8, 12, 99]))
                )
    return written(data, data.file_meta.TransferSyntaxUID)


def damaged(number):
    """The damaged file of this number: always the same."""
    rng = np.random.default_rng([7, number])
    name = NAMES[number % len(NAMES)]
    if number % 3 == 0:
        with contextlib.suppress(Exception), disable_value_validation():  # not everything can be written
            return with_attributes_changed(name, rng)
    return mutated(marked(name), rng)


def test_damaged_files_give_a_picture_or_an_input_error():
    read = 0
    for number in range(400):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.suppress(InputError):
                out = read_dicom(damaged(number))
                assert out.dtype == np.uint8
                assert out.shape[2:] == (3,)
                read += 1
    assert 40 < read < 360


def test_nothing_of_the_patient_gets_out(tmp_path, capfd, caplog):
    said, errors = [], []
    sources = [marked(name) for name in NAMES] + [damaged(number) for number in range(60)]
    text_for_number = marked("MR_small").replace(b"\x28\0\x10\0US\x02\0", b"\x28\0\x10\0LO\x02\0")
    sources += [text_for_number, marked("CT_small").replace(b"IS\x02\0", b"LO\x02\0")]
    caplog.set_level(logging.DEBUG, "pydicom")
    caplog.clear()
    for whole in sources:
        (tmp_path / "scan.dcm").write_bytes(whole)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                load_image(tmp_path / "scan.dcm")
            except InputError as error:
                said.append("".join(traceback.format_exception(error)))
                errors.append(error)
        said += [str(warning.message) for warning in caught]
    assert len(errors) > 20
    assert not any(error.__context__ for error in errors)
    out, err = capfd.readouterr()
    everything = "\n".join([*said, out, err, caplog.text])
    assert "Canary" not in everything
    assert "Zephyrine" not in everything
    assert [path.name for path in tmp_path.iterdir()] == ["scan.dcm"]


def test_pydicoms_settings_are_as_before():
    from pydicom import config

    log, modes = logging.getLogger("pydicom"), (config.settings.reading_validation_mode, warnings.filters[:])
    level = log.level
    for file in (made(RAMP.astype(np.uint8)), b"\0" * 128 + b"DICM" + b"\1" * 99):
        with contextlib.suppress(InputError):
            read_dicom(file)
    assert log.level == level
    assert modes == (config.settings.reading_validation_mode, warnings.filters[:])


def test_an_answer_about_a_file_holds_nothing_of_its_header(tmp_path):
    from medplib.results import Answer, Finding

    picture = load_image(marked("MR_small"))
    mask = np.zeros(picture.shape[:2], bool)
    mask[5:9, 5:9] = True
    Answer("A brain.", [Finding("brain", mask, 0.5)], [picture], "What?", [], {"name": "fake"}, 0).save(
        tmp_path
    )
    assert json.loads((tmp_path / "answer.json").read_text())["text"] == "A brain."
    assert not any(b"Canary" in path.read_bytes() for path in tmp_path.iterdir())
