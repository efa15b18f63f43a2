import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms.v2 import functional as reference

from stillroom.augment import (
    Mixing,
    apply_crops,
    apply_cutmix,
    apply_flips,
    apply_mixup,
    apply_patch_orders,
    apply_resized_crops,
    apply_shift,
    apply_shifts,
    draw_crops,
    draw_cutmix,
    draw_flips,
    draw_mixup,
    draw_patch_orders,
    draw_resized_crops,
    draw_shift,
    draw_shifts,
)
from stillroom.errors import StillroomError

DRAWS = {
    "crops": lambda g: draw_crops(g, 6, 4),
    "crop": lambda g: draw_crops(g, 6, 4, per_image=False),
    "flips": lambda g: draw_flips(g, 64),
    "shift": lambda g: draw_shift(g, 1000),
    "shifts": lambda g: draw_shifts(g, 6, 4),
    "patch orders": lambda g: draw_patch_orders(g, 6, 4),
    "resized crops": lambda g: draw_resized_crops(g, 6, 32, 24),
    "mixup": lambda g: draw_mixup(g, 6, 0.8, folded=False),
    "cutmix": lambda g: draw_cutmix(g, 6, 1.0, 32, 24),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_images(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=seeded(seed)).to(dtype)


@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_follows_its_generator_and_nothing_else(name: str) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = str(DRAWS[name](seeded(5)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert str(DRAWS[name](seeded(5))) == first
    assert len({str(DRAWS[name](seeded(seed))) for seed in range(8)}) > 1


@pytest.mark.parametrize("name", DRAWS)
def test_successive_draws_differ(name: str) -> None:
    generator = seeded()
    assert len({str(DRAWS[name](generator)) for _ in range(8)}) > 1


@pytest.mark.parametrize("draw", [draw_crops, draw_flips, draw_resized_crops])
def test_one_draw_can_serve_the_whole_batch(draw) -> None:
    arguments = {draw_crops: (4,), draw_flips: (), draw_resized_crops: (32, 32)}[draw]
    shared = draw(seeded(), 64, *arguments, per_image=False)
    assert len(shared) == 64
    assert len(shared.unique(dim=0)) == 1
    assert len(draw(seeded(), 64, *arguments).unique(dim=0)) > 1


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 5),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    padding=st.integers(0, 5),
    dtype=st.sampled_from([torch.uint8, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_crops_equal_padding_and_slicing_image_by_image(batch, height, width, padding, dtype, seed) -> None:
    images = draw_images(batch, 3, height, width, dtype=dtype, seed=seed)
    offsets = draw_crops(seeded(seed), batch, padding)
    cropped = apply_crops(images, offsets, padding, fill=7)
    assert cropped.dtype == dtype
    for image, (top, left), result in zip(images, offsets.tolist(), cropped, strict=True):
        padded = reference.pad(image, [padding] * 4, fill=7)
        assert torch.equal(result, padded[:, top : top + height, left : left + width])


def test_crop_corners_are_even_over_the_whole_range() -> None:
    offsets = draw_crops(seeded(), 9000, 4)
    for direction in (0, 1):
        counts = offsets[:, direction].bincount(minlength=9)
        assert len(counts) == 9
        assert counts.min() > 850
    assert abs(torch.corrcoef(offsets.T.float())[0, 1]) < 0.05


def test_black_padding_before_normalisation_is_a_fill_per_channel_after_it() -> None:
    mean, std = torch.tensor([0.5, 0.4, 0.3]).reshape(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).reshape(3, 1, 1)
    pixels = torch.rand(8, 3, 6, 6, generator=seeded())
    offsets = draw_crops(seeded(), 8, 2)
    padded_first = (apply_crops(pixels, offsets, 2) - mean) / std
    normalised_first = apply_crops((pixels - mean) / std, offsets, 2, fill=(-mean / std).flatten())
    assert torch.equal(padded_first, normalised_first)


def test_the_centre_crop_is_the_image_itself() -> None:
    images = draw_images(3, 2, 5, 6)
    assert torch.equal(apply_crops(images, torch.full((3, 2), 4), 4), images)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_flips_mirror_the_marked_images_only(dtype: torch.dtype) -> None:
    images = draw_images(16, 3, 5, 6, dtype=dtype)
    flips = draw_flips(seeded(), 16)
    assert 0 < flips.sum() < 16
    for image, flip, result in zip(images, flips, apply_flips(images, flips), strict=True):
        assert torch.equal(result, reference.horizontal_flip(image) if flip else image)
    assert torch.equal(apply_flips(apply_flips(images, flips), flips), images)


def test_half_of_the_images_are_flipped() -> None:
    assert draw_flips(seeded(), 10_000).float().mean() == pytest.approx(0.5, abs=0.02)


def test_a_shift_moves_down_and_right_and_wraps() -> None:
    image = torch.zeros(1, 1, 4, 5)
    image[0, 0, 3, 1] = 1
    assert apply_shift(image, (1, 2))[0, 0, 0, 3] == 1
    assert apply_shifts(image, torch.tensor([[1, 2]]))[0, 0, 0, 3] == 1


def test_shifts_per_image_equal_one_shift_each() -> None:
    images = draw_images(20, 3, 7, 9, dtype=torch.uint8)
    shifts = draw_shifts(seeded(), 20, 12)
    expected = [apply_shift(image[None], tuple(shift)) for image, shift in zip(images, shifts.tolist(), strict=True)]
    assert torch.equal(apply_shifts(images, shifts), torch.cat(expected))


def test_shifts_are_one_sided_and_reach_their_limit() -> None:
    generator = seeded()
    assert {draw_shift(generator, 2) for _ in range(200)} == {(down, right) for down in range(3) for right in range(3)}
    assert draw_shifts(seeded(), 500, 4).unique().tolist() == [0, 1, 2, 3, 4]
    assert draw_shift(seeded(), 0) == (0, 0)


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 40), width=st.integers(1, 40), size=st.integers(1, 40), seed=st.integers(0, 1000))
def test_resized_crops_equal_torchvision_image_by_image(height: int, width: int, size: int, seed: int) -> None:
    images = torch.rand(4, 3, height, width, generator=seeded(seed))
    boxes = draw_resized_crops(seeded(seed), 4, height, width)
    for image, box, result in zip(images, boxes.tolist(), apply_resized_crops(images, boxes, size), strict=True):
        torch.testing.assert_close(result, reference.resized_crop(image, *box, [size, size], antialias=True))


def test_the_full_box_at_the_full_size_is_the_image_itself() -> None:
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    assert torch.equal(apply_resized_crops(images, torch.tensor([[0, 0, 16, 16]] * 2), 16), images)


def test_resized_crops_keep_a_flat_image_flat() -> None:
    boxes = draw_resized_crops(seeded(), 8, 24, 32)
    torch.testing.assert_close(
        apply_resized_crops(torch.full((8, 3, 24, 32), 2.5), boxes, 17), torch.full((8, 3, 17, 17), 2.5)
    )


def test_boxes_lie_inside_with_the_share_of_area_and_the_ratio_asked_for() -> None:
    height, width = 500, 700
    top, left, high, wide = draw_resized_crops(seeded(), 4000, height, width).double().unbind(1)
    assert bool((top >= 0).all() & (left >= 0).all() & (top + high <= height).all() & (left + wide <= width).all())
    share, ratio = high * wide / (height * width), wide / high
    assert share.min() > 0.079
    assert share.quantile(0.01) < 0.1
    assert 0.745 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 1.34
    small = share < 0.4  # these always fit, so their ratio is even in its logarithm
    assert ratio[small].log().mean().abs() < 0.02
    assert (top / (height - high).clamp(min=1)).mean() == pytest.approx(0.5, abs=0.03)


def test_boxes_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms import RandomResizedCrop

    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(3, 64, 48)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(3000)])
    ours = draw_resized_crops(seeded(), 3000, 64, 48)
    torch.testing.assert_close(ours.double().mean(0), theirs.double().mean(0), rtol=0, atol=0.9)
    torch.testing.assert_close(ours.double().std(0), theirs.double().std(0), rtol=0, atol=0.6)


def test_boxes_reach_every_edge() -> None:
    top, left, high, wide = draw_resized_crops(seeded(), 2000, 8, 8, scale=(0.25, 0.25), ratio=(1.0, 1.0)).unbind(1)
    assert high.unique().tolist() == wide.unique().tolist() == [4]
    assert top.unique().tolist() == left.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("height", "width", "expected"), [(100, 10, [44, 0, 13, 10]), (10, 100, [0, 44, 10, 13])])
def test_a_box_that_cannot_fit_is_the_largest_centred_one(height: int, width: int, expected: list[int]) -> None:
    boxes = draw_resized_crops(seeded(), 5, height, width, scale=(1.0, 1.0))
    assert boxes[:, 2:].tolist() == [expected[2:]] * 5
    assert boxes[0, :2].tolist() == [(height - expected[2]) // 2, (width - expected[3]) // 2]


def test_autocast_does_not_round_resized_pixels() -> None:
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    boxes = draw_resized_crops(seeded(), 2, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        result = apply_resized_crops(images, boxes, 8)
    assert torch.equal(result, apply_resized_crops(images, boxes, 8))


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 9), width=st.integers(1, 9), patches=st.integers(1, 4), seed=st.integers(0, 1000))
def test_patch_orders_move_whole_rows_and_columns_of_patches(height: int, width: int, patches: int, seed: int) -> None:
    """Against NumPy, which cuts the strips, lists them in the order drawn and joins them: first rows, then columns."""
    patches = min(patches, height, width)
    images, orders = draw_images(3, 2, height, width), draw_patch_orders(seeded(seed), 3, patches)
    shuffled = apply_patch_orders(images, orders)
    for image, own, found in zip(images.numpy(), orders.tolist(), shuffled.numpy(), strict=True):
        for axis, length in ((1, height), (2, width)):
            cuts = [length // patches * number for number in range(1, patches)]
            strips = np.split(image, cuts, axis)
            image = np.concatenate([strips[number] for number in own[axis - 1]], axis)
        np.testing.assert_array_equal(found, image)


def test_each_image_has_patch_orders_of_its_own_and_all_are_drawn() -> None:
    orders = draw_patch_orders(seeded(), 3000, 2)
    assert orders.dtype == torch.int64
    rows, columns = orders[:, :, 0].unbind(1)  # which comes first
    counts = torch.bincount(2 * rows + columns, minlength=4)
    assert stats.chisquare(counts.numpy()).pvalue > 0.01
    assert torch.equal(orders.sort(-1).values, torch.arange(2).expand(3000, 2, 2))


def test_patches_of_bytes_stay_bytes_and_one_patch_is_the_image() -> None:
    images = draw_images(4, 3, 8, 8, dtype=torch.uint8)
    assert apply_patch_orders(images, draw_patch_orders(seeded(), 4, 2)).dtype == torch.uint8
    assert torch.equal(apply_patch_orders(images, draw_patch_orders(seeded(), 4, 1)), images)


@pytest.mark.parametrize(
    "kind", ["crops", "flips", "shift", "shifts", "patch orders", "resized crops", "mixup", "cutmix"]
)
def test_gradients_reach_the_pixels(kind: str) -> None:
    images = torch.rand(4, 2, 6, 6, dtype=torch.float64, generator=seeded(), requires_grad=True)
    generator = seeded(1)
    apply, *drawn = {
        "crops": (apply_crops, draw_crops(generator, 4, 2), 2),
        "flips": (apply_flips, draw_flips(generator, 4)),
        "shift": (apply_shift, draw_shift(generator, 3)),
        "shifts": (apply_shifts, draw_shifts(generator, 4, 3)),
        "patch orders": (apply_patch_orders, draw_patch_orders(generator, 4, 3)),
        "resized crops": (apply_resized_crops, draw_resized_crops(generator, 4, 6, 6), 3),
        "mixup": (apply_mixup, draw_mixup(generator, 4, 0.8, folded=True)),
        "cutmix": (apply_cutmix, draw_cutmix(generator, 4, 1.0, 6, 6)),
    }[kind]
    assert torch.autograd.gradcheck(lambda pixels: apply(pixels, *drawn), images)


@pytest.mark.parametrize("beta", [0.2, 0.8, 1.0, 3.0])
def test_plain_mixup_weights_follow_the_beta_distribution(beta: float) -> None:
    generator = seeded()
    weights = [draw_mixup(generator, 1, beta, folded=False).weight for _ in range(3000)]
    assert stats.kstest(weights, stats.beta(beta, beta).cdf).pvalue > 0.01
    assert stats.pearsonr(weights[1:], weights[:-1]).pvalue > 0.01


def test_folded_weights_favour_the_image_itself_and_draw_the_same_otherwise() -> None:
    for seed in range(20):
        plain = draw_mixup(seeded(seed), 8, 0.8, folded=False)
        folded = draw_mixup(seeded(seed), 8, 0.8, folded=True)
        assert folded.weight == max(plain.weight, 1 - plain.weight)
        assert torch.equal(folded.permutation, plain.permutation)


def test_mixup_mixes_each_image_and_its_labels_with_the_same_partner() -> None:
    images, labels = draw_images(8, 3, 4, 4), torch.eye(8)
    mixing = draw_mixup(seeded(), 8, 0.8, folded=False)
    assert sorted(mixing.permutation.tolist()) == list(range(8))
    mixed, soft = apply_mixup(images, mixing), apply_mixup(labels, mixing)
    for i, partner in enumerate(mixing.permutation.tolist()):
        torch.testing.assert_close(mixed[i], mixing.weight * images[i] + (1 - mixing.weight) * images[partner])
    # the labels of one-hot rows name exactly the images mixed
    torch.testing.assert_close(torch.einsum("ij,jchw->ichw", soft, images), mixed)
    torch.testing.assert_close(soft.sum(1), torch.ones(8))


def test_weight_one_keeps_everything_and_weight_zero_swaps_everything() -> None:
    images = draw_images(5, 3, 4, 4)
    permutation = torch.tensor([1, 2, 3, 4, 0])
    assert torch.equal(apply_mixup(images, Mixing(permutation, 1.0)), images)
    assert torch.equal(apply_mixup(images, Mixing(permutation, 0.0)), images[permutation])
    assert torch.equal(apply_cutmix(images, Mixing(permutation, 1.0, (2, 2, 0, 0))), images)
    assert torch.equal(apply_cutmix(images, Mixing(permutation, 0.0, (0, 0, 4, 4))), images[permutation])


@settings(max_examples=50, deadline=None)
@given(height=st.integers(1, 20), width=st.integers(1, 20), beta=st.floats(0.1, 5), seed=st.integers(0, 1000))
def test_cutmix_weighs_the_label_by_the_pixels_that_stay(height: int, width: int, beta: float, seed: int) -> None:
    mixing = draw_cutmix(seeded(seed), 4, beta, height, width)
    mine = torch.arange(4.0)[:, None, None, None].expand(4, 1, height, width)
    mixed = apply_cutmix(mine, mixing)
    assert torch.equal(mine[:, 0, 0, 0], torch.arange(4.0))
    top, left, box_height, box_width = mixing.box
    for image, own, partner in zip(mixed, range(4), mixing.permutation.tolist(), strict=True):
        assert set(image.unique().tolist()) <= {own, partner}
        if partner != own:
            assert (image == own).double().mean().item() == pytest.approx(mixing.weight)
            assert bool((image[:, top : top + box_height, left : left + box_width] == partner).all())


def test_cutmix_rectangles_reach_every_pixel_and_have_the_area_drawn() -> None:
    generator, covered, largest = seeded(), torch.zeros(64, 64), 0
    for _ in range(400):
        # so large a beta puts every weight near one half
        top, left, height, width = draw_cutmix(generator, 2, 1e6, 64, 64).box
        covered[top : top + height, left : left + width] += 1
        largest = max(largest, height * width)
    assert covered.min() > 0
    assert largest == 44 * 44  # 64 times the square root of one half, made even


def test_cutmix_of_bytes_stays_bytes() -> None:
    images = draw_images(4, 3, 8, 8, dtype=torch.uint8)
    assert apply_cutmix(images, draw_cutmix(seeded(), 4, 1.0, 8, 8)).dtype == torch.uint8


def test_the_input_is_never_changed() -> None:
    images = draw_images(6, 3, 8, 8)
    before, generator = images.clone(), seeded()
    apply_crops(images, draw_crops(generator, 6, 2), 2)
    apply_flips(images, draw_flips(generator, 6))
    apply_shifts(images, draw_shifts(generator, 6, 2))
    apply_patch_orders(images, draw_patch_orders(generator, 6, 2))
    apply_resized_crops(images, draw_resized_crops(generator, 6, 8, 8), 8)
    apply_mixup(images, draw_mixup(generator, 6, 1.0, folded=True))
    apply_cutmix(images, draw_cutmix(generator, 6, 1.0, 8, 8))
    assert torch.equal(images, before)


def test_a_batch_in_chunks_gives_what_the_whole_gives() -> None:
    images = torch.rand(6, 3, 8, 8, generator=seeded())
    boxes, offsets = draw_resized_crops(seeded(), 6, 8, 8), draw_crops(seeded(), 6, 2)
    for chunk in (1, 2, 4):
        pieces = [apply_resized_crops(x, b, 5) for x, b in zip(images.split(chunk), boxes.split(chunk), strict=True)]
        torch.testing.assert_close(torch.cat(pieces), apply_resized_crops(images, boxes, 5))
        pieces = [apply_crops(x, o, 2) for x, o in zip(images.split(chunk), offsets.split(chunk), strict=True)]
        assert torch.equal(torch.cat(pieces), apply_crops(images, offsets, 2))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: draw_crops(seeded(), 4, -1), "padding=-1"),
        (lambda: draw_flips(seeded(), 0), "batch=0"),
        (lambda: draw_shift(seeded(), -2), "limit=-2"),
        (lambda: draw_patch_orders(seeded(), 4, 0), "patches=0"),
        (lambda: apply_patch_orders(torch.zeros(4, 3, 8, 8), draw_patch_orders(seeded(), 4, 9)), "patches=9.*1 to 8"),
        (lambda: apply_patch_orders(torch.zeros(4, 3, 8, 8), draw_patch_orders(seeded(), 3, 2)), r"orders=\(3, 2, 2\)"),
        (lambda: draw_resized_crops(seeded(), 4, 8, 8, scale=(0.5, 0.2)), r"scale=\(0.5, 0.2\)"),
        (lambda: draw_resized_crops(seeded(), 4, 8, 8, ratio=(0.0, 1.0)), r"ratio=\(0.0, 1.0\)"),
        (lambda: draw_mixup(seeded(), 4, 0.0, folded=True), "beta=0.0"),
        (lambda: apply_crops(torch.zeros(4, 3, 8, 8), torch.zeros(3, 2, dtype=torch.int64), 1), r"offsets=\(3, 2\)"),
        (lambda: apply_crops(torch.zeros(4, 3, 8, 8), torch.zeros(4, 2, dtype=torch.int64), 1, torch.ones(2)), "fill="),
        (lambda: apply_flips(torch.zeros(3, 8, 8), torch.ones(3, dtype=torch.bool)), r"images=\(3, 8, 8\)"),
        (lambda: apply_resized_crops(torch.zeros(1, 3, 8, 8).byte(), torch.zeros(1, 4), 8), "uint8"),
        (lambda: apply_mixup(torch.zeros(4).long(), Mixing(torch.arange(4), 0.5)), "one-hot"),
        (lambda: apply_mixup(torch.zeros(8, 10), Mixing(torch.arange(4), 0.5)), r"tensor=\(8, 10\)"),
        (lambda: apply_cutmix(torch.zeros(4, 3, 8, 8), Mixing(torch.arange(4), 0.5)), "draw_cutmix"),
    ],
)
def test_bad_input_is_named(call, expected: str) -> None:
    with pytest.raises(StillroomError, match=expected):
        call()
