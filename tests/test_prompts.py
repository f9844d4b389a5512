"""Points, boxes and masks: what is refused, what they cover, and how the encoders turn them into tokens."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from medplib.errors import CheckpointError, InputError
from medplib.prompts import Box, BoxEncoder, Mask, MaskEncoder, Point, PointEncoder, PromptEncoder
from medplib.prompts.combined import SAM_NAMES
from medplib.prompts.position import FourierPosition

DIM, GRID, IMAGE = 8, (3, 5), (48, 80)


# What a user gives


def test_a_point_covers_a_square_cut_at_the_edges():
    mask = Point(50, 60).to_mask((100, 120))
    assert mask.dtype == bool
    assert mask.shape == (100, 120)
    assert mask[40:81, 30:71].all()
    assert mask.sum() == 41 * 41
    assert Point(0, 0).to_mask((100, 120)).sum() == 21 * 21
    assert np.argwhere(Point(119.9, 99.9).to_mask((100, 120), point_size=1)).tolist() == [[99, 119]]


def test_a_box_covers_its_pixels_as_a_slice_does():
    mask = Box(2, 3, 5, 7).to_mask((10, 12))
    expected = np.zeros((10, 12), dtype=bool)
    expected[3:7, 2:5] = True
    np.testing.assert_array_equal(mask, expected)
    assert Box(0, 0, 12, 10).to_mask((10, 12)).all()
    assert np.argwhere(Box(4.2, 4.2, 4.4, 4.4).to_mask((10, 12))).tolist() == [[4, 4]]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Point(12, 3), "outside"),
        (Point(3, 10), "outside"),
        (Point(-0.5, 3), "outside"),
        (Point(math.nan, 3), "finite"),
        (Point(3, math.inf), "finite"),
        (Point("3", 4), "number"),
        (Point(3, 4, label=2), "label"),
        (Box(5, 3, 2, 7), "no area"),
        (Box(2, 3, 2, 7), "no area"),
        (Box(-1, 3, 2, 7), "outside"),
        (Box(2, 3, 13, 7), "outside"),
        (Box(2, 3, math.nan, 7), "finite"),
        (Mask(np.zeros((10, 12), bool)), "empty"),
        (Mask(np.ones((12, 10), bool)), r"\(12, 10\)"),
        (Mask(np.ones((10, 12, 3), bool)), "shape"),
        (Mask(np.full((10, 12), 0.5)), "threshold"),
        (Mask(np.full((10, 12), np.nan)), "threshold"),
        (Mask(np.full((10, 12), -1)), "-1"),
        (Mask(np.arange(120).reshape(10, 12)), "labels =="),
        (Mask(np.full((10, 12), "a")), "dtype"),
        (Mask("no/such/file.png"), "no/such/file.png"),
        (Mask(Image.new("RGB", (12, 10), (255, 0, 0))), "colour"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_with_a_reason(prompt, message):
    with pytest.raises(InputError, match=message):
        prompt.check((10, 12))
    with pytest.raises(InputError, match=message):
        prompt.to_mask((10, 12))


def test_the_box_around_a_mask_is_the_slice_that_holds_it():
    mask = np.zeros((6, 8), bool)
    mask[2, 3] = mask[4, 6] = True
    assert Box.around(mask) == Box(3, 2, 7, 5)
    with pytest.raises(InputError, match="without foreground"):
        Box.around(np.zeros((3, 3), bool))


def test_a_file_that_is_no_image_is_refused(tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"mask\.png"):
        Mask(path).check((10, 12))


def test_one_mask_in_many_forms_is_the_same_mask(tmp_path):
    mask = np.zeros((10, 12), dtype=bool)
    mask[2:5, 3:9] = True
    bytes_ = mask.astype(np.uint8) * 255
    picture = Image.fromarray(bytes_)
    picture.save(tmp_path / "grey.png")
    Image.fromarray(mask).save(tmp_path / "one_bit.png")
    forms = [mask, bytes_, mask.astype(np.int64), mask.astype(np.float32), mask.tolist(), picture]
    forms += [torch.from_numpy(mask), picture.convert("RGB"), picture.convert("LA"), picture.convert("RGBA")]
    forms += [tmp_path / "grey.png", str(tmp_path / "one_bit.png")]
    for form in forms:
        prompt = Mask(form)
        prompt.check((10, 12))
        np.testing.assert_array_equal(prompt.to_mask((10, 12)), mask)


BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)
GREYS = [(i, i, i) for i in range(256)]


def _palette_file(path, numbers, colours, **options):
    image = Image.fromarray(numbers.astype(np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    image.save(path, **options)
    return path


@pytest.mark.parametrize(
    ("number", "colours", "options"),
    [
        (1, [BLACK, RED], {"bits": 1}),
        (1, [BLACK, RED, *GREYS[100:114]], {"bits": 4}),
        (255, GREYS, {}),
        (7, [BLACK] * 7 + [RED] * 249, {}),
        (0, [WHITE, BLACK], {"bits": 1}),
        (1, [WHITE, RED], {"transparency": 0}),
        (1, [WHITE, RED, BLACK], {"transparency": bytes([0, 128])}),
    ],
)
def test_a_palette_mask_is_read_by_its_colours(tmp_path, number, colours, options):
    mask = np.zeros((9, 13), bool)
    mask[2:5, 3:9] = True
    path = _palette_file(tmp_path / "mask.png", np.where(mask, number, number == 0), colours, **options)
    with Image.open(path) as image:
        assert image.mode == "P"
    np.testing.assert_array_equal(Mask(path).to_mask((9, 13)), mask)


@pytest.mark.parametrize(("colours", "shown"), [([WHITE, RED], "0, 1"), ([BLACK, RED, WHITE], "1, 2")])
def test_a_palette_mask_without_one_colour_on_black_is_refused(tmp_path, colours, shown):
    numbers = np.arange(12).reshape(3, 4) % len(colours)
    path = _palette_file(tmp_path / "mask.png", numbers, colours)
    last = len(colours) - 1
    message = rf"2 palette numbers that are not black \({shown}\); .*np.asarray\(image\) == {last}"
    with pytest.raises(InputError, match=message):
        Mask(path).to_mask((3, 4))


def test_a_prompt_mask_is_a_copy():
    mask = np.ones((4, 4), dtype=bool)
    Mask(mask).to_mask((4, 4))[:] = False
    assert mask.all()


def test_naming_a_prompt_does_not_import_torch():
    code = "import sys; from medplib.prompts import Box, Mask, Point; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# How they become tokens


def seeded(module_class, *args, **kwargs):
    torch.manual_seed(0)
    return module_class(*args, **kwargs)


def slow_position(position, x, y):
    """One place in 0..1 as sines and cosines, one number at a time."""
    angles = [
        2 * math.pi * ((2 * x - 1) * a + (2 * y - 1) * b)
        for a, b in zip(*position.directions.tolist(), strict=True)
    ]
    return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])


def test_positions_equal_the_slow_formula():
    position = seeded(FourierPosition, DIM)
    for x, y in [(0.0, 0.0), (0.3, 0.9), (1.0, 1.0)]:
        torch.testing.assert_close(
            position(torch.tensor([x, y])), slow_position(position, x, y), atol=1e-5, rtol=1e-5
        )
    grid = position.grid((2, 3))
    assert grid.shape == (1, DIM, 2, 3)
    torch.testing.assert_close(
        grid[0, :, 1, 2], slow_position(position, 2.5 / 3, 1.5 / 2), atol=1e-5, rtol=1e-5
    )


def test_positions_are_saved_with_the_weights_and_keep_precision_under_autocast():
    position = seeded(FourierPosition, DIM)
    assert list(position.state_dict()) == ["directions"]
    places = torch.rand(4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        in_autocast = position(places)
    torch.testing.assert_close(in_autocast, position(places))
    with pytest.raises(InputError, match="even"):
        FourierPosition(7)


def test_point_tokens_add_place_and_kind_and_padding_ignores_the_place():
    encoder = seeded(PointEncoder, DIM, IMAGE)
    tokens = encoder(torch.tensor([[[10.0, 20.0], [30.0, 5.0], [9.0, 9.0]]]), torch.tensor([[1, 0, -1]]))
    kinds = {0: encoder.foreground, 1: encoder.background}
    for row, (x, y) in enumerate([(10, 20), (30, 5)]):
        place = slow_position(encoder.position, (x + 0.5) / IMAGE[1], (y + 0.5) / IMAGE[0])
        torch.testing.assert_close(tokens[0, row], place + kinds[row].weight[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens[0, 2], encoder.padding.weight[0])


def test_box_tokens_are_its_two_corners():
    encoder = seeded(BoxEncoder, DIM, IMAGE)
    tokens = encoder(torch.tensor([[10.0, 20.0, 30.0, 40.0]]))
    for row, (x, y, corner) in enumerate([(10, 20, encoder.top_left), (30, 40, encoder.bottom_right)]):
        place = slow_position(encoder.position, (x + 0.5) / IMAGE[1], (y + 0.5) / IMAGE[0])
        torch.testing.assert_close(tokens[0, row], place + corner.weight[0], atol=1e-4, rtol=1e-4)


def test_several_boxes_per_sample_follow_each_other_and_padding_boxes_are_replaced():
    encoder = seeded(BoxEncoder, DIM, IMAGE)
    boxes = torch.rand(2, 3, 4) * 40
    tokens = encoder(boxes, valid=torch.tensor([[True, True, True], [True, False, True]]))
    assert tokens.shape == (2, 6, DIM)
    for k in range(3):
        torch.testing.assert_close(tokens[0, 2 * k : 2 * k + 2], encoder(boxes[:, k])[0])
    torch.testing.assert_close(tokens[1, 2:4], encoder.padding.weight.expand(2, -1))


def test_mask_prompts_are_read_cell_by_cell():
    encoder = seeded(MaskEncoder, DIM, GRID, mask_channels=8)
    masks = torch.randn(2, 1, 12, 20)
    dense = encoder(masks)
    assert dense.shape == (2, DIM, *GRID)
    changed = masks.clone()
    changed[0, 0, 4:8, 8:12] += 1  # cell (1, 2)
    moved = (encoder(changed) - dense).abs().amax(1) > 1e-6
    assert moved.nonzero().tolist() == [[0, 1, 2]]
    absent = encoder(masks, valid=torch.tensor([False, True]))
    torch.testing.assert_close(absent[0], encoder(None)[0])
    torch.testing.assert_close(absent[1], dense[1])
    with pytest.raises(InputError, match="at least 8"):
        MaskEncoder(DIM, GRID, mask_channels=4)


def make_encoder():
    return seeded(PromptEncoder, DIM, GRID, IMAGE, mask_channels=8)


def test_sparse_tokens_come_as_points_padding_boxes_text():
    encoder = make_encoder()
    points = (torch.rand(2, 3, 2) * 40, torch.tensor([[1, 0, 1], [1, -1, -1]]))
    boxes, text = torch.rand(2, 4) * 40, torch.randn(2, 2, DIM)
    shared = {"position": encoder.position, "padding": encoder.padding}
    point_tokens, box_tokens = encoder.points(*points, **shared), encoder.boxes(boxes, **shared)
    padding = encoder.padding.weight.expand(2, 1, -1)
    torch.testing.assert_close(encoder(points)[0], torch.cat([point_tokens, padding], 1))
    torch.testing.assert_close(encoder(points, boxes)[0], torch.cat([point_tokens, box_tokens], 1))
    torch.testing.assert_close(encoder(points, text=text)[0], torch.cat([point_tokens, padding, text], 1))
    torch.testing.assert_close(encoder(text=text)[0], text)


def test_no_prompt_gives_no_tokens_and_one_vector_everywhere():
    encoder = make_encoder()
    for given, batch in ((None, 1), (3, 3)):
        sparse, dense = encoder(batch_size=given)
        assert sparse.shape == (batch, 0, DIM)
        torch.testing.assert_close(
            dense, encoder.masks.no_mask.weight.view(1, -1, 1, 1).expand(batch, -1, *GRID)
        )
    assert encoder.dense_position().shape == (1, DIM, *GRID)


def test_padding_leaves_the_other_prompts_of_a_batch_as_they_are():
    encoder = make_encoder()
    xy, boxes, text = torch.rand(2, 2, 2) * 40, torch.rand(2, 4) * 40, torch.randn(2, 2, DIM)
    labels = torch.tensor([[1, 0], [1, -1]])
    sparse, _ = encoder(
        (xy, labels),
        boxes,
        text=text,
        boxes_valid=torch.tensor([True, False]),
        text_valid=torch.tensor([[True, True], [True, False]]),
    )
    first, _ = encoder((xy[:1], labels[:1]), boxes[:1], text=text[:1])
    torch.testing.assert_close(sparse[:1], first)
    padded = [(sparse[1, i] == encoder.padding.weight[0]).all().item() for i in range(6)]
    assert padded == [False, True, True, True, False, True]


def test_prompts_of_the_wrong_shape_are_refused():
    encoder = make_encoder()
    good = torch.zeros(2, 3, 2), torch.ones(2, 3, dtype=torch.long)
    wrong = [
        {"points": (good[0], good[1][:, :2])},
        {"points": (good[0], good[1] + 1)},
        {"boxes": torch.zeros(2, 5)},
        {"boxes": torch.zeros(2, 4), "boxes_valid": torch.ones(3)},
        {"masks": torch.zeros(2, 1, 3, 5)},
        {"text": torch.zeros(2, DIM)},
        {"text": torch.zeros(2, 1, DIM), "text_valid": torch.ones(2)},
        {"points": good, "text": torch.zeros(3, 1, DIM)},
        {"points": good, "batch_size": 1},
    ]
    for prompts in wrong:
        with pytest.raises(InputError):
            encoder(**prompts)


def test_the_shared_embeddings_are_stored_once():
    encoder = make_encoder()
    assert set(encoder.state_dict()) == set(SAM_NAMES)
    with pytest.raises(InputError, match="shared=True"):
        encoder.boxes(torch.zeros(1, 4))


def test_sam_weights_load_by_name_and_nothing_changes_when_they_do_not_fit():
    source, target = make_encoder(), PromptEncoder(DIM, GRID, IMAGE, mask_channels=8)
    state = {f"prompt_encoder.{SAM_NAMES[name]}": value for name, value in source.state_dict().items()}
    state["image_encoder.pos_embed"] = torch.zeros(1)  # belongs to another part
    before = {name: value.clone() for name, value in target.state_dict().items()}
    missing = {name: value for name, value in state.items() if "no_mask_embed" not in name}
    unexpected = state | {"prompt_encoder.extra.weight": torch.zeros(1)}
    reshaped = state | {"prompt_encoder.no_mask_embed.weight": torch.zeros(1, DIM + 1)}
    for broken, message in [
        (missing, "missing no_mask_embed"),
        (unexpected, "unexpected extra"),
        (reshaped, "other shape no_mask_embed"),
        ({}, "missing"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            target.load_sam_state_dict(broken)
        assert all(torch.equal(before[name], value) for name, value in target.state_dict().items())
    assert target.load_sam_state_dict(state) is target
    assert all(torch.equal(source.state_dict()[name], value) for name, value in target.state_dict().items())


def test_every_parameter_learns_from_some_prompt():
    encoder = make_encoder()
    points = (torch.rand(2, 3, 2) * 40, torch.tensor([[1, 0, 1], [1, -1, 0]]))
    sparse, dense = encoder(
        points,
        torch.rand(2, 4) * 40,
        torch.randn(2, 1, 12, 20),
        masks_valid=torch.tensor([True, False]),
    )
    (sparse.sum() + dense.square().sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in encoder.parameters())


def test_prompts_that_are_no_tensors_are_named():
    encoder, box = make_encoder(), [[1.0, 2.0, 3.0, 4.0]]
    with pytest.raises(InputError, match="boxes must be a tensor, got a list"):
        encoder(boxes=box)
    with pytest.raises(InputError, match="points must be a tensor, got a list"):
        encoder(points=([[[1.0, 2.0]]], [[1]]))
    with pytest.raises(InputError, match=r"points must be a pair of tensors: xy \(B, N, 2\) and labels"):
        encoder(points=torch.zeros(2, 1, 2))


def test_prompt_encoders_run_in_half_precision():
    encoder = make_encoder().to(torch.bfloat16)
    points = (torch.rand(1, 3, 2) * 40, torch.tensor([[1, 0, -1]]))
    sparse, dense = encoder(points, torch.rand(1, 4), torch.randn(1, 1, 12, 20), torch.randn(1, 1, DIM))
    assert sparse.dtype == dense.dtype == encoder.dense_position().dtype == torch.bfloat16


def test_no_samples_give_no_tokens():
    encoder = PromptEncoder(8, (4, 4), (16, 16), mask_channels=8)
    for boxes, tokens in ((torch.zeros(0, 4), 2), (torch.zeros(0, 3, 4), 6)):
        sparse, dense = encoder(boxes=boxes)
        assert sparse.shape == (0, tokens, 8)
        assert dense.shape == (0, 8, 4, 4)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"points": (torch.zeros(1, 1, 2), torch.tensor([[0.5]]))}, r"point labels must be .* got \[0.5\]"),
        ({"points": (torch.zeros(1, 1, 2), torch.tensor([[math.nan]]))}, r"point labels .* got \[nan\]"),
        ({"points": (torch.zeros(1, 1, 2), [[1]])}, "labels must be a tensor, got a list"),
        ({"boxes": torch.zeros(1, 4), "boxes_valid": [True]}, "valid must be a tensor, got a list"),
        ({"text": torch.zeros(1, 1, 8), "text_valid": [[True]]}, "text_valid must be a tensor, got a list"),
        ({"masks": torch.zeros(1, 1, 16, 16), "masks_valid": [1]}, "valid must be a tensor, got a list"),
        ({"boxes": torch.tensor(3.0)}, "boxes must be"),
        ({"batch_size": "a"}, "batch_size must be a whole number of at least 0, got 'a'"),
        ({"batch_size": -1}, "batch_size must be a whole number of at least 0, got -1"),
    ],
)
def test_prompts_of_the_wrong_kind_are_named(prompts, message):
    encoder = PromptEncoder(8, (4, 4), (16, 16), mask_channels=8)
    with pytest.raises(InputError, match=message):
        encoder(**prompts)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("a", (4, 4), (16, 16)), "dim must be a whole number of at least 1, got 'a'"),
        ((8, 4, (16, 16)), r"grid_size must be \(height, width\), got 4"),
        ((8, (4, 4), 16), r"image_size must be \(height, width\), got 16"),
        ((8, (0, 4), (16, 16)), r"grid_size\[0\] must be a whole number of at least 1, got 0"),
        ((8, (4, 4), (16, 16), "x"), "mask_channels must be a whole number"),
    ],
)
def test_sizes_that_no_prompt_encoder_has_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        PromptEncoder(*settings)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: Point(1, 1).to_mask(None), r"size must be \(height, width\), got None"),
        (lambda: Box(0, 0, 1, 1).to_mask(5), r"size must be \(height, width\), got 5"),
        (lambda: Mask(np.ones((3, 3))).to_mask((3,)), r"size must be \(height, width\), got \(3,\)"),
        (
            lambda: Point(1, 1).to_mask((5, 5), "a"),
            "point_size must be a whole number of at least 1, got 'a'",
        ),
        (lambda: Point(1, 1, np.array([1, 1])).check((5, 5)), "label must be 1 .* got array"),
        (lambda: Box.around(None), "A mask must be an array"),
        (lambda: Box.around(np.ones(3)), "A mask must be an array"),
    ],
)
def test_a_size_or_a_mask_of_another_kind_is_named(use, message):
    with pytest.raises(InputError, match=message):
        use()
