"""Reading pictures: every source and depth ends as uint8 RGB, and nothing unreadable gets through."""

import contextlib
import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from medplib.errors import InputError
from medplib.io import load_image
from medplib.io.images import MAX_PIXELS

RNG = np.random.default_rng(3)
GREY = RNG.integers(0, 256, (12, 17), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)


def as_bytes(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width, height, depth=8, colour=0, rows=b""):
    """A PNG file written by hand, for headers and depths that Pillow does not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def slow_window(values):
    """Percentiles 0.5 and 99.5 to 0 and 255, one value at a time."""
    low, high = np.percentile(values.astype(float), (0.5, 99.5))
    flat = [min(1.0, max(0.0, (float(v) - low) / (high - low))) for v in values.reshape(-1)]
    return np.array([int(v * 255 + 0.5) for v in flat], np.uint8).reshape(values.shape)


def grey_rgb(array):
    return np.repeat(array[..., None], 3, axis=2)


# ------------------------------------------------------------------------------------------ sources


def test_path_bytes_pillow_array_and_tensor_give_the_same_picture(tmp_path):
    torch = pytest.importorskip("torch")
    picture = Image.fromarray(COLOUR)
    picture.save(tmp_path / "a.png")
    tensor = torch.from_numpy(COLOUR)
    sources = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        as_bytes(picture),
        bytearray(as_bytes(picture)),
        picture,
        COLOUR,
        tensor,
        tensor.permute(2, 0, 1),
        tensor.permute(2, 0, 1).float() / 255,
        torch.nn.Parameter(tensor.float() / 255),
    ]
    for source in sources:
        out = load_image(source)
        assert out.dtype == np.uint8
        assert np.array_equal(out, COLOUR)


def test_grey_sources_give_three_equal_channels():
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(GREY)
    for source in (GREY, GREY[..., None], Image.fromarray(GREY), tensor, tensor[None]):
        assert np.array_equal(load_image(source), grey_rgb(GREY))


def test_the_result_is_a_new_array():
    for source in (COLOUR, np.dstack([COLOUR, GREY]), np.asfortranarray(COLOUR), GREY):
        before = source.copy()
        out = load_image(source)
        assert out.flags.c_contiguous
        out[:] = 7
        assert np.array_equal(source, before)


def test_a_pillow_image_is_left_as_it_was():
    picture = Image.open(io.BytesIO(as_bytes(Image.fromarray(GREY))))
    load_image(picture)
    assert picture.mode == "L"
    assert np.array_equal(load_image(picture), grey_rgb(GREY))  # still open


def test_arrays_are_read_without_importing_torch():
    code = (
        "import sys, numpy as np; from medplib.io import load_image; "
        "load_image(np.zeros((9, 9), np.uint8)); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------ depth


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.int64, np.int8])
def test_wide_integers_are_windowed(dtype):
    bounds = np.iinfo(dtype)
    values = RNG.integers(max(bounds.min, -3000), min(bounds.max, 9000), (20, 30)).astype(dtype)
    assert np.array_equal(load_image(values), grey_rgb(slow_window(values)))


def test_a_16_bit_ramp_keeps_its_greys_and_is_not_clipped():
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for source in (ramp, as_bytes(Image.fromarray(ramp)), as_bytes(Image.fromarray(ramp), "TIFF")):
        out = load_image(source)
        assert len(np.unique(out)) == 256
        assert (out == 255).mean() < 0.02
        assert np.array_equal(out[..., 0], slow_window(ramp))


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_every_bit_depth_fills_the_range(bits):
    values = RNG.integers(0, 2**bits, (40, 40)).astype(np.uint16)
    out = load_image(as_bytes(Image.fromarray(values)))
    assert out.min() == 0
    assert out.max() == 255
    assert np.array_equal(out[..., 0], slow_window(values))


def test_16_bit_colour_shares_one_window(tmp_path):
    values = RNG.integers(0, 4096, (9, 11, 3)).astype(np.uint16)
    assert np.array_equal(load_image(values), slow_window(values))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    out = load_image(png(11, 9, depth=16, colour=2, rows=rows))
    assert np.abs(out.astype(int) - slow_window(values)).max() <= 17  # the upper 8 bits, windowed
    assert out.max() == 255


def test_a_16_bit_tiff_with_white_as_zero_is_inverted():
    values = RNG.integers(0, 5000, (10, 12)).astype(np.uint16)
    data = as_bytes(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    with Image.open(io.BytesIO(data)) as stored:
        if stored.tag_v2[262] != 0:
            pytest.skip("this Pillow does not write the tag")
        raw = np.asarray(stored)
    assert np.array_equal(load_image(data)[..., 0], 255 - slow_window(raw))


def test_floats_within_0_and_1_are_scaled_and_others_windowed():
    unit = RNG.random((10, 12)).astype(np.float32)
    assert np.array_equal(load_image(unit)[..., 0], (unit.astype(float) * 255 + 0.5).astype(np.uint8))
    for values in (unit * 700 - 300, (unit * 700 - 300).astype(np.float64)):
        assert np.array_equal(load_image(values)[..., 0], slow_window(values))
    data = as_bytes(Image.fromarray(unit * 50), "TIFF")
    assert np.array_equal(load_image(data)[..., 0], slow_window(unit * 50))


def test_half_precision_tensors_are_read():
    torch = pytest.importorskip("torch")
    for dtype in (torch.float16, torch.bfloat16):
        assert load_image(torch.ones(3, 9, 10, dtype=dtype)).min() == 255


def test_a_few_bright_pixels_on_black_stay_visible():
    values = np.zeros((100, 100), np.uint16)
    values[0, 0] = 4000
    assert load_image(values).max() == 255


def test_a_constant_wide_image_is_black_not_an_error():
    assert not load_image(np.full((9, 9), 700, np.uint16)).any()


def test_large_wide_images_are_windowed_in_bands():
    values = np.tile(np.arange(3000, dtype=np.uint16), (1000, 1))
    out = load_image(values)
    assert np.array_equal(out[0], out[-1])
    assert np.array_equal(out[0, :, 0], slow_window(values[:1])[0])


# ------------------------------------------------------------------------------------------ modes


def test_bool_and_1_bit_are_black_and_white():
    mask = GREY > 99
    for source in (mask, as_bytes(Image.fromarray(mask))):
        assert np.array_equal(load_image(source), grey_rgb(mask * np.uint8(255)))


def test_palettes_are_resolved():
    picture = Image.fromarray(COLOUR).quantize(16)
    assert np.array_equal(load_image(as_bytes(picture)), np.asarray(picture.convert("RGB")))


def test_transparency_is_laid_on_black():
    alpha = RNG.integers(0, 256, (12, 17), dtype=np.uint8)
    rgba = np.dstack([COLOUR, alpha])
    wanted = (COLOUR * (alpha[..., None].astype(np.float32) / 255) + 0.5).astype(np.uint8)
    for source in (
        rgba,
        as_bytes(Image.fromarray(rgba)),
        np.dstack([COLOUR, alpha]).astype(np.float32) / 255,
    ):
        assert np.abs(load_image(source).astype(int) - wanted).max() <= 1
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(alpha)])
    out = load_image(as_bytes(grey))
    assert np.abs(out[..., 1] - GREY * (alpha / 255)).max() <= 1
    hole = as_bytes(Image.fromarray(np.full((9, 9), 80, np.uint8)), transparency=80)
    assert not load_image(hole).any()


def test_cmyk_is_read_as_rgb():
    picture = Image.fromarray(COLOUR).convert("CMYK")
    assert load_image(as_bytes(picture, "TIFF")).shape == COLOUR.shape


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM"])
def test_common_formats_are_read(kind):
    flat = np.full((16, 16), 90, np.uint8)
    assert np.abs(load_image(as_bytes(Image.fromarray(flat), kind)).astype(int) - 90).max() <= 2


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_applied(orientation, turns):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "TIFF"):
        data = as_bytes(Image.fromarray(COLOUR), kind, exif=exif)
        assert np.array_equal(load_image(data), np.rot90(COLOUR, turns))


@pytest.mark.parametrize(("kind", "options"), [("TIFF", {}), ("GIF", {}), ("WEBP", {"lossless": True})])
def test_the_first_page_of_several_is_read_with_a_warning(kind, options):
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    data = as_bytes(pages[0], kind, save_all=True, append_images=pages[1:], **options)
    with pytest.warns(UserWarning, match="several pages"):
        assert np.array_equal(load_image(data), grey_rgb(GREY))


def test_a_page_chosen_in_pillow_is_the_one_that_is_read():
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    picture = Image.open(io.BytesIO(as_bytes(pages[0], "TIFF", save_all=True, append_images=pages[1:])))
    picture.seek(1)
    assert np.array_equal(load_image(picture), grey_rgb(255 - GREY))


# ------------------------------------------------------------------------------------------ refusals


def test_missing_empty_and_foreign_files_are_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "scan.dcm").write_bytes(b"\0" * 200)
    (tmp_path / "brain.nii.gz").write_bytes(b"\0" * 200)
    (tmp_path / "unnamed").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 90)
    for name, message in {
        "absent.png": "does not exist",
        "empty.png": "is empty",
        "text.png": "not a readable picture",
        "scan.dcm": "DICOM",
        "brain.nii.gz": "NIfTI",
        "unnamed": "DICOM",
        ".": "is a folder.*load_volume",
        "a\0b": "cannot be opened",
        "x" * 5000: "cannot be opened",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            load_image(f"{tmp_path}/{name}")
        assert name in str(error.value) or "\0" in name
    with pytest.raises(InputError, match="nothing is fetched"):
        load_image("https://example.org/a.png")
    with pytest.raises(InputError, match="empty"):
        load_image(b"")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "BMP", "GIF", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
def test_files_cut_short_are_refused(kind):
    data = as_bytes(Image.fromarray(COLOUR), kind)
    for end in range(1, len(data) // 2, max(1, len(data) // 25)):
        with pytest.raises(InputError, match=r"damaged or cut short|not a readable picture"):
            load_image(data[:end])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
def test_damaged_bytes_give_a_picture_or_an_input_error():
    rng = np.random.default_rng(0)
    for kind in ("PNG", "TIFF", "JPEG", "GIF"):
        good = np.frombuffer(as_bytes(Image.fromarray(COLOUR), kind), np.uint8)
        for _ in range(60):
            bad = good.copy()
            bad[rng.integers(0, bad.size, 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(InputError):
                assert load_image(bad.tobytes()).dtype == np.uint8


@pytest.mark.filterwarnings("ignore:Image size")
def test_decompression_bombs_are_refused_before_decoding():
    for width, height in ((9_000, 9_000), (11_000, 9_000), (60_000, 60_000)):
        with pytest.raises(InputError, match="at most 64 million"):
            load_image(png(width, height))
    with pytest.raises(InputError, match="at most 64 million"):
        load_image(np.broadcast_to(np.uint8(0), (8_001, MAX_PIXELS // 8_000)))


@pytest.mark.parametrize("shape", [(1, 1), (7, 100), (0, 20), (100, 7, 3)])
def test_tiny_images_are_refused(shape):
    with pytest.raises(InputError, match="at least 8"):
        load_image(np.zeros(shape, np.uint8))


def test_a_one_pixel_file_is_refused():
    with pytest.raises(InputError, match="1 x 1 pixels"):
        load_image(as_bytes(Image.new("L", (1, 1))))


def test_ribbons_are_refused():
    with pytest.raises(InputError, match="50 times"):
        load_image(np.zeros((8, 401), np.uint8))
    load_image(np.zeros((8, 400), np.uint8))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(value):
    array = np.zeros((9, 9), np.float32)
    array[2, 3] = value
    with pytest.raises(InputError, match="1 values that are NaN or infinite"):
        load_image(array)
    with pytest.raises(InputError, match="NaN or infinite"):
        load_image(as_bytes(Image.fromarray(array), "TIFF"))


@pytest.mark.parametrize("dtype", [object, complex, "U3", "datetime64[s]"])
def test_dtypes_without_numbers_are_refused(dtype):
    with pytest.raises(InputError, match="no numbers"):
        load_image(np.zeros((9, 9), dtype))


@pytest.mark.parametrize("shape", [(9,), (), (2, 9, 9, 3), (3, 9, 12), (9, 12, 2), (40, 50, 60)])
def test_other_shapes_are_refused_with_a_remedy(shape):
    with pytest.raises(InputError, match="give "):
        load_image(np.zeros(shape, np.uint8))


def test_a_fourth_channel_that_is_no_opacity_is_refused():
    with pytest.raises(InputError, match="fourth channel"):
        load_image(np.full((9, 9, 4), 300, np.int32))


@pytest.mark.parametrize("value", [None, 3, [[1, 2], [3, 4]], {"a": 1}])
def test_other_objects_are_refused(value):
    with pytest.raises(InputError, match="must be a path"):
        load_image(value)
