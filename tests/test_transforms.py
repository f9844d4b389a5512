"""Augmentation: everything in a sample moves together, nothing is lost, and the key alone decides."""

import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode, functional

from medplib.data import Augmentation, load_mini, make_phantom
from medplib.data.augment import Move, draw_move, resample, source_positions
from medplib.data.samples import keyed_rng
from medplib.data.transforms import _Targets
from medplib.errors import InputError
from medplib.processing import Sample
from medplib.prompts.types import Box, Mask, Point
from medplib.training.batches import augmentation
from medplib.training.recipe import make_recipe

SIZE = (90, 120)
TURNS = [("What is in <region>?", "A thing."), ("Segment it.", "Here: <SEG>.")]


def rectangle(x0, y0, x1, y1, size=SIZE):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def picture(mask):
    return np.repeat(np.where(mask, 220, 60).astype(np.uint8)[..., None], 3, axis=2)


def sample_of(mask, prompt, turns=TURNS):
    return Sample([picture(mask)], turns, [prompt], masks=[mask])


def same(a: Sample, b: Sample) -> bool:
    return (
        all(np.array_equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        and all(np.array_equal(x, y) for x, y in zip(a.masks, b.masks, strict=True))
        and [p.mask.tobytes() if isinstance(p, Mask) else p for p in a.prompts]
        == [p.mask.tobytes() if isinstance(p, Mask) else p for p in b.prompts]
    )


@pytest.mark.parametrize("modality", ["CT", "microscopy", "dermoscopy"])
def test_box_mask_and_picture_stay_on_each_other(modality):
    mask = rectangle(40, 30, 75, 60)
    moved = 0
    for index in range(25):
        new = Augmentation(intensity=False)(
            sample_of(mask, Box(40, 30, 75, 60)), seed=1, epoch=0, index=index, modality=modality
        )
        (got,), (box,) = new.masks, new.prompts
        if modality != "microscopy":  # at a mirror the rectangle may show twice
            rows, columns = np.nonzero(got)
            assert (box.x0, box.y0) == (columns.min(), rows.min())
            assert (box.x1, box.y1) == (columns.max() + 1, rows.max() + 1)
        bright = new.images[0][..., 0] > 140
        assert (bright & got).sum() / (bright | got).sum() > 0.93
        box.check(SIZE)
        moved += not np.array_equal(got, mask)
    assert moved > 20


def test_region_masks_move_as_target_masks_do():
    mask = rectangle(20, 10, 55, 60)
    for index in range(10):
        new = Augmentation()(sample_of(mask, Mask(mask)), seed=0, epoch=0, index=index)
        np.testing.assert_array_equal(new.prompts[0].mask, new.masks[0])


def test_a_point_shows_the_same_spot():
    mask = rectangle(50, 40, 61, 51)
    for index in range(40):
        new = Augmentation(intensity=False)(sample_of(mask, Point(55, 45, 0)), seed=3, epoch=1, index=index)
        point = new.prompts[0]
        point.check(SIZE)
        assert point.label == 0
        rows, columns = np.nonzero(new.masks[0])  # whole: the point is its middle
        frame = np.pad(np.zeros((SIZE[0] - 2, SIZE[1] - 2), bool), 1, constant_values=True)
        if not (frame & new.masks[0]).any():
            assert abs(point.y - 0.5 - rows.mean()) < 2
            assert abs(point.x - 0.5 - columns.mean()) < 2


def test_moves_agree_with_torchvision():
    """v2's affine with the same matrix: angle, zoom and shift of a Move without bend, shear and stretch."""
    mask, angle, zoom, shift = rectangle(45, 25, 80, 60), 12.0, 1.15, (6, -4)
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    matrix = np.array([[cos, sin], [-sin, cos]]) / zoom  # output -> source
    move = Move(matrix, -matrix @ shift)
    x, y = source_positions(move, *SIZE)
    targets = _Targets([Point(60, 40), Box(45, 25, 80, 60)], mask[None])
    image, regions = resample(picture(mask), mask[None], move, "black")
    ours = targets.moved(regions, x, y)

    affine = partial(functional.affine, angle=angle, translate=list(shift), scale=zoom, shear=[0.0, 0.0])
    masks = affine(tv_tensors.Mask(mask[None]), interpolation=InterpolationMode.NEAREST)
    boxes = affine(tv_tensors.BoundingBoxes([[45.0, 25, 80, 60]], format="XYXY", canvas_size=SIZE))
    points = affine(tv_tensors.KeyPoints([[60.5, 40.5]], canvas_size=SIZE))
    pixels = affine(
        tv_tensors.Image(picture(mask).transpose(2, 0, 1)), interpolation=InterpolationMode.BILINEAR
    )
    assert (ours.masks[0] != masks[0].numpy()).mean() < 0.005
    assert np.abs(image.astype(int) - pixels.numpy().transpose(1, 2, 0).astype(int)).mean() < 2
    np.testing.assert_allclose((ours.prompts[0].x, ours.prompts[0].y), points[0].numpy(), atol=1)
    box = ours.prompts[1]
    np.testing.assert_allclose((box.x0, box.y0, box.x1, box.y1), boxes[0].numpy(), atol=1.5)


class Samples(Dataset):
    """What a trainer does: an order of indices from one place on, each with its key."""

    def __init__(self, start, epoch=0):
        self.start, self.epoch = start, epoch

    def __len__(self):
        return 12 - self.start

    def __getitem__(self, i):
        mask = rectangle(30, 20, 80, 70)
        return Augmentation()(
            sample_of(mask, Box(30, 20, 80, 70)), seed=5, epoch=self.epoch, index=self.start + i
        )


def load(start=0, workers=0, epoch=0):
    context = "fork" if workers else None
    loader = DataLoader(
        Samples(start, epoch),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
    )
    return list(loader)


def test_workers_and_resume_change_nothing_and_epochs_do():
    whole = load()
    assert all(same(a, b) for a, b in zip(whole, load(workers=2), strict=True))
    assert all(same(a, b) for a, b in zip(whole[7:], load(start=7), strict=True))
    assert not any(same(a, b) for a, b in zip(whole, load(epoch=1), strict=True))
    assert not any(same(a, b) for a, b in zip(whole[1:], whole, strict=False))


def test_global_generators_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state()
    mask = rectangle(30, 20, 80, 70)
    given = sample_of(mask, Point(40, 40))
    Augmentation()(given, seed=0, epoch=0, index=0)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tobytes() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    np.testing.assert_array_equal(given.masks[0], mask)
    np.testing.assert_array_equal(given.images[0], picture(mask))


def test_no_mask_of_the_mini_set_vanishes_and_no_prompt_leaves():
    rows = load_mini(split="train")[::9]
    for index, row in enumerate(rows):
        image, masks = row.load_image(), [m for m in row.load_masks() if m.any()]
        spots = [np.argwhere(m)[0] for m in masks]
        sample = Sample(
            [image],
            [("<region>" * len(masks), "<SEG>" * len(masks))],
            [Point(float(c), float(r)) for r, c in spots],
            masks=masks,
        )
        for epoch in range(3):
            new = Augmentation()(sample, seed=0, epoch=epoch, index=index, modality=row.modality)
            assert all(mask.any() for mask in new.masks)
            assert all(mask.dtype == bool for mask in new.masks)
            for prompt in new.prompts:
                prompt.check(image.shape[:2])


def test_what_cannot_move_without_a_loss_stays():
    edge = rectangle(0, 0, 2, 2)  # with keep=1 any cut is too much
    moved = [
        Augmentation(keep=1.0, tries=2)(sample_of(edge, Box(0, 0, 2, 2)), seed=0, epoch=0, index=i)
        for i in range(30)
    ]
    stayed = [new for new in moved if new.prompts[0] == Box(0, 0, 2, 2)]
    assert len(stayed) > 10
    assert all(np.array_equal(new.masks[0], edge) for new in stayed)
    assert any(not np.array_equal(new.images[0], picture(edge)) for new in stayed)  # still another intensity


def handedness(masks):
    """The sign of the triangle of three centres: a flip changes it, a rotation does not."""
    a, b, c = (np.mean(np.nonzero(mask), axis=1) for mask in masks)
    return np.sign((b - a)[0] * (c - a)[1] - (b - a)[1] * (c - a)[0])


@pytest.mark.parametrize(
    ("question", "modality", "labels", "hands"),
    [
        ("Segment them.", "microscopy", (), {-1, 1}),
        ("Segment the left one.", "microscopy", (), {1}),
        ("Segment them.", "microscopy", ("right cell",), {1}),
        ("Segment them.", "CT", (), {1}),
        ("Segment them.", None, (), {1}),
    ],
)
def test_sides_are_kept_where_they_have_a_name(question, modality, labels, hands):
    size = (100, 100)
    masks = [rectangle(*box, size) for box in ((20, 45, 30, 55), (45, 20, 55, 30), (70, 45, 80, 55))]
    masks = masks if handedness(masks) > 0 else masks[::-1]
    sample = Sample([picture(sum(masks) > 0)], [(question, "<SEG>" * 3)], masks=masks)
    seen = set()
    for index in range(30):
        new = Augmentation(keep=0.9)(sample, seed=0, epoch=0, index=index, modality=modality, labels=labels)
        seen.add(handedness(new.masks))
    assert seen == hands


@pytest.mark.parametrize(
    "answer",
    [
        "In the upper third.",
        "It lies above it.",
        "About 12% of the image.",
        "It is 40 mm² large.",
        "The number of nuclei: 3",
    ],
)
def test_answers_about_place_and_size_keep_the_geometry(answer):
    mask = rectangle(30, 20, 60, 50)
    sample = sample_of(mask, Box(30, 20, 60, 50), [("And <region>?", answer), ("Segment it.", "<SEG>")])
    for index in range(5):
        new = Augmentation()(sample, seed=0, epoch=0, index=index)
        np.testing.assert_array_equal(new.masks[0], mask)
        assert new.prompts == sample.prompts
        assert not np.array_equal(new.images[0], sample.images[0])


def test_an_image_nothing_points_at_is_not_cropped_away():
    image = picture(rectangle(0, 0, 120, 90))
    for index in range(30):
        new = Augmentation(intensity=False)(
            Sample([image], [("Is it sick?", "No.")]), seed=0, epoch=0, index=index, modality="CT"
        )
        assert new.images[0].any(axis=2).mean() > 0.5
    moves = [draw_move(keyed_rng(i), SIZE, False) for i in range(200)]
    none = _Targets([], np.zeros((0, *SIZE), bool))
    shares = [
        abs(np.linalg.det(m.matrix))
        for m in moves
        if none.stay(m.matrix, *source_positions(m, *SIZE), 0.5, 0.75)
    ]
    assert len(shares) > 50
    assert min(shares) > 0.7  # the part of the image that is still to be seen


def test_every_image_moves_for_itself_with_what_lies_on_it():
    a, b = rectangle(30, 20, 70, 60), rectangle(50, 30, 90, 70)
    sample = Sample(
        [picture(a), picture(b)],
        [("<region> <region>", "<SEG> <SEG>")],
        [Mask(b), Mask(a)],
        [1, 0],
        [a, b],
        [0, 1],
    )
    new = Augmentation()(sample, seed=0, epoch=0, index=4)
    np.testing.assert_array_equal(new.prompts[0].mask, new.masks[1])
    np.testing.assert_array_equal(new.prompts[1].mask, new.masks[0])
    assert (new.prompt_images, new.seg_images) == ([1, 0], [0, 1])
    assert not np.array_equal(new.masks[0], a)
    assert not np.array_equal(new.masks[1], b)


def test_chance_and_switches():
    mask = rectangle(30, 20, 80, 70)
    given = sample_of(mask, Box(30, 20, 80, 70))
    changed = [Augmentation(chance=0.5)(given, seed=0, epoch=0, index=i) is not given for i in range(60)]
    assert 15 < sum(changed) < 45
    still = Augmentation(geometry=False, intensity=False)(given, seed=0, epoch=0, index=0)
    assert same(still, given)
    absent = Sample([picture(mask)], [("Segment.", "None <SEG>")], masks=[mask & False])
    assert not Augmentation()(absent, seed=0, epoch=0, index=0).masks[0].any()
    text = Sample([], [("Hello?", "Hello.")])
    assert Augmentation()(text, seed=0, epoch=0, index=0).turns == text.turns


def test_drawn_images_of_every_kind_pass():
    for name in ("endoscopy", "ultrasound"):
        phantom = make_phantom(name, 3)
        masks = [m for m in phantom.load_masks() if m.any()]
        sample = Sample([phantom.load_image()], [("All.", "<SEG>" * len(masks))], masks=masks)
        new = Augmentation()(sample, seed=0, epoch=0, index=1, modality=phantom.modality)
        assert new.images[0].shape == phantom.load_image().shape


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Augmentation(keep=1.5), "keep must be between 0 and 1"),
        (lambda: Augmentation(tries=-1), "tries must be 0 or more"),
        (
            lambda: Augmentation()(Sample([], [("a", "b")]), seed=0, epoch=0, index=0, modality="ct"),
            "modality must be one of",
        ),
        (
            lambda: Augmentation()(
                sample_of(rectangle(0, 0, 5, 5), Box(0, 0, 500, 5)), seed=0, epoch=0, index=0
            ),
            "reaches outside the image",
        ),
        (
            lambda: Augmentation()(
                Sample([np.zeros((9, 9, 3), np.uint8)], [("a", "<SEG>")], masks=[np.zeros((8, 9), bool)]),
                seed=0,
                epoch=0,
                index=0,
            ),
            "make them equal",
        ),
    ],
)
def test_unusable_input_is_named(make, words):
    with pytest.raises(InputError, match=words):
        make()


# -- transforms of torchvision -------------------------------------------------------------------------------

TURNED = v2.RandomAffine((12, 12), translate=(0.1, 0.1), scale=(1.15, 1.15))


def test_a_torchvision_transform_moves_all_as_torchvision_does():
    """Image and mask to the pixel; boxes and points as v2 moves its own, up to a pixel."""
    mask, size = rectangle(45, 25, 80, 60), (90, 120)
    sample = Sample(
        [picture(mask)],
        [("<region> <region> <region>", "<SEG>")],
        [Point(60, 40), Box(45, 25, 80, 60), Mask(mask)],
        masks=[mask],
    )
    still = v2.Compose([v2.RandomAffine((12, 12), scale=(1.15, 1.15)), v2.ToDtype(torch.float32, scale=True)])
    new = Augmentation(transform=still)(sample, seed=0, epoch=0, index=0)
    image, masks, boxes, points = still(
        tv_tensors.Image(picture(mask).transpose(2, 0, 1).copy()),
        tv_tensors.Mask(mask[None]),
        tv_tensors.BoundingBoxes([[45.0, 25, 80, 60]], format="XYXY", canvas_size=size),
        tv_tensors.KeyPoints([[60.5, 40.5]], canvas_size=size),
    )
    np.testing.assert_array_equal(new.masks[0], masks[0].numpy())
    np.testing.assert_array_equal(new.prompts[2].mask, new.masks[0])
    np.testing.assert_array_equal(new.images[0], (image * 255).round().byte().permute(1, 2, 0).numpy())
    point, box = new.prompts[:2]
    np.testing.assert_allclose((point.x, point.y), points[0].numpy(), atol=1)
    np.testing.assert_allclose((box.x0, box.y0, box.x1, box.y1), boxes[0].numpy(), atol=1.5)


def test_a_torchvision_transform_is_decided_by_the_key_alone():
    mask = rectangle(40, 30, 75, 60)
    draw = Augmentation(transform=v2.Compose([TURNED, v2.ElasticTransform(20.0), v2.ColorJitter(0.3)]))
    before = torch.get_rng_state()
    first = draw(sample_of(mask, Box(40, 30, 75, 60)), seed=1, epoch=0, index=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert same(first, draw(sample_of(mask, Box(40, 30, 75, 60)), seed=1, epoch=0, index=3))
    for other in ({"seed": 2}, {"epoch": 1}, {"index": 4}):
        key = {"seed": 1, "epoch": 0, "index": 3} | other
        assert not same(first, draw(sample_of(mask, Box(40, 30, 75, 60)), **key))


@pytest.mark.parametrize(
    ("transform", "hands"),
    [
        (v2.RandomHorizontalFlip(0.5), {-1, 1}),
        (v2.RandomVerticalFlip(0.5), {-1, 1}),
        (v2.RandomRotation(180), {1}),
    ],
)
def test_sides_are_kept_from_a_torchvision_transform(transform, hands):
    """Slides may be mirrored and turned; a CT, or what is called left, comes back as it was."""
    size = (100, 100)
    masks = [rectangle(*box, size) for box in ((20, 45, 30, 55), (45, 20, 55, 30), (70, 45, 80, 55))]
    masks = masks if handedness(masks) > 0 else masks[::-1]
    sample = Sample([picture(sum(masks) > 0)], [("Segment them.", "<SEG>" * 3)], masks=masks)
    draw = Augmentation(transform=transform, tries=3, keep=0.9)

    def seen(**about):
        made = [draw(sample, seed=0, epoch=0, index=i, **about) for i in range(20)]
        turned = [np.argwhere(m.masks[1]).mean(0) - np.argwhere(m.masks[0]).mean(0) for m in made]
        upright = np.argwhere(masks[1]).mean(0) - np.argwhere(masks[0]).mean(0)
        cosines = [t @ upright / np.linalg.norm(t) / np.linalg.norm(upright) for t in turned]
        return {handedness(m.masks) for m in made}, min(cosines)

    found, lowest = seen(modality="microscopy")
    assert found == hands
    assert lowest < 0.1
    for about in ({"modality": "CT"}, {"modality": "microscopy", "labels": ["left cell"]}, {}):
        found, lowest = seen(**about)
        assert found == {1}
        assert lowest > 0.65  # within 45 degrees, and what rounding adds


def test_texts_about_places_leave_only_the_colours_to_a_torchvision_transform():
    mask = rectangle(30, 20, 60, 50)
    sample = sample_of(
        mask, Box(30, 20, 60, 50), [("And <region>?", "In the upper third."), ("It.", "<SEG>")]
    )
    coloured = Augmentation(transform=v2.ColorJitter((1.4, 1.4)))(sample, seed=0, epoch=0, index=0)
    assert coloured.images[0].mean() > picture(mask).mean() * 1.2
    np.testing.assert_array_equal(coloured.masks[0], mask)
    for transform in (TURNED, v2.CenterCrop(80)):
        moved = Augmentation(transform=transform)(sample, seed=0, epoch=0, index=0)
        assert same(moved, sample)
        assert same(
            Augmentation(transform=transform, geometry=False)(sample, seed=0, epoch=0, index=0), sample
        )


def test_a_torchvision_transform_may_change_the_size():
    mask = rectangle(40, 30, 61, 51)
    for transform, size in (
        (v2.Resize((40, 50)), (40, 50)),
        (v2.RandomResizedCrop((200, 260), (0.6, 1)), (200, 260)),
    ):
        sample = Sample(
            [picture(mask)],
            [("<region> <region>", "<SEG>")],
            [Point(50, 40), Box(40, 30, 61, 51)],
            masks=[mask],
        )
        new = Augmentation(transform=transform, keep=0.9)(sample, seed=0, epoch=0, index=1)
        assert new.images[0].shape == (*size, 3)
        point, box = new.prompts
        rows, columns = np.nonzero(new.masks[0])
        assert (box.x0, box.y1) == (columns.min(), rows.max() + 1)
        assert abs(point.x - columns.mean() - 0.5) < 3
        assert abs(point.y - rows.mean() - 0.5) < 3
        bright = (
            new.images[0][..., 0] > 140
        )  # torchvision takes the nearest pixel of a mask from the upper left
        assert (bright & new.masks[0]).sum() / (bright | new.masks[0]).sum() > 0.75


def test_a_torchvision_transform_that_loses_what_is_asked_for_is_drawn_again():
    mask, corner = rectangle(2, 2, 12, 12), Point(5, 5)
    draw = Augmentation(transform=v2.RandomCrop(70), tries=200)
    for index in range(10):
        new = draw(sample_of(mask, corner), seed=0, epoch=0, index=index)
        assert new.masks[0].sum() >= 50
        new.prompts[0].check(new.images[0].shape[:2])
    gone = Augmentation(transform=v2.RandomAffine(0, translate=(0, 0), scale=(9, 9)), tries=2)
    assert same(gone(sample_of(mask, corner), seed=0, epoch=0, index=0), sample_of(mask, corner))


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.1] * 3)]),
            "leave Normalize",
        ),
        (v2.ToDtype(torch.int32), "got torch.int32; end with ToDtype"),
        (v2.RandomCrop(500), "failed on an image of 90x120"),
        (v2.Lambda(lambda image: image[:, :9], tv_tensors.Image), "they must agree"),
        (v2.Lambda(lambda image: image[:2], tv_tensors.Image), r"must give an image \(1 or 3, h, w\)"),
    ],
)
def test_a_torchvision_transform_that_cannot_be_used_is_named(transform, message):
    with pytest.raises(InputError, match=message):
        Augmentation(transform=transform)(
            sample_of(rectangle(9, 9, 30, 30), Point(9, 9)), seed=0, epoch=0, index=0
        )


def test_a_recipe_names_its_torchvision_transforms(tmp_path):
    recipe = make_recipe(
        {"out": str(tmp_path), "model": "medplib-tiny", "data": {}, "stages": {"vqa": {"data": []}},
         "augment": {"transform": {"RandomRotation": {"degrees": [9, 9]}, "Grayscale": None}}}
    )  # fmt: skip
    mask = rectangle(40, 30, 75, 60)
    new = augmentation(recipe)(sample_of(mask, Box(40, 30, 75, 60)), seed=0, epoch=0, index=0)
    want = v2.RandomRotation((9, 9))(tv_tensors.Mask(mask[None]))[0].numpy()
    np.testing.assert_array_equal(new.masks[0], want)
