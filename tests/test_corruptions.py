import colorsys
import io

import numpy as np
import pytest
from PIL import Image

import corruptions
import embedded
from corruptions import NAMES, SEVERITIES, corrupt

FIXED = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "gaussian_blur"}
FIXED |= {"saturate"}  # these draw nothing
BLURS = ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur", "elastic_transform", "pixelate")


def flat(value, side=32):
    return np.full((side, side, 3), value, dtype=np.uint8)


def coordinates(side=32):
    """An image whose red and green are a pixel's row and column (pixels), to see where corruptions take pixels from."""
    rows, columns = np.indices((side, side), dtype=np.float32)
    return np.stack([rows, columns, np.zeros_like(rows)], axis=-1)


def at_all_severities(image, name, seed=0):
    return [corrupt(image, name, severity, np.random.default_rng(seed)).astype(float) for severity in SEVERITIES]


@pytest.fixture(scope="module")
def images():
    rows = list(embedded.rows("test", 0, embedded.CHUNK))[:24]
    return [np.asarray(Image.open(io.BytesIO(row["img"]["bytes"]))) for row in rows]  # read-only, as decoded ones are


def test_the_names_and_their_order():
    fifteen = (
        *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
        *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    )
    assert fifteen == corruptions.MEAN_15
    assert (*fifteen, "speckle_noise", "gaussian_blur", "spatter", "saturate") == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_is_an_image_that_the_generators_state_decides(images, name):
    image = images[0]
    before = image.copy()
    for severity in SEVERITIES:
        out, again, other = (corrupt(image, name, severity, np.random.default_rng(seed)) for seed in (7, 7, 8))
        assert out.dtype == np.uint8
        assert out.shape == image.shape
        assert (out != image).any()
        assert (out == again).all()
        assert (out == other).all() == (name in FIXED)
    assert (image == before).all()


@pytest.mark.parametrize("size", [(8, 8), (8, 40), (45, 33)])
def test_other_sizes(size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    for name in NAMES:
        for severity in SEVERITIES:
            assert corrupt(image, name, severity, rng).shape == image.shape, (name, severity)


@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_images_give_no_warnings(value):
    with np.errstate(all="raise", under="ignore"):
        for name in NAMES:
            at_all_severities(flat(value), name)


def test_unknown_names_and_severities():
    with pytest.raises(KeyError, match="rain"):
        corrupt(flat(0), "rain", 1, np.random.default_rng())
    for severity in (0, 6, -1):
        with pytest.raises(ValueError, match="severity"):
            corrupt(flat(0), "fog", severity, np.random.default_rng())


# Where a severity changes the kind rather than the amount (water and mud, pale and strong colours), or blurs more but
# moves less (glass, elastic), only those are in order that differ in amount.
ORDER = {
    "glass_blur": [(2, 4), (3, 5)],
    "frost": [(1, 2)],
    "spatter": [(1, 2, 3), (4, 5)],
    "saturate": [(1, 2), (3, 4, 5)],
    "elastic_transform": [],
    "motion_blur": [(1, 2, 3), (4, 5)],
}


@pytest.mark.parametrize("name", NAMES)
def test_more_severe_is_further_from_the_image(images, name):
    distances = np.mean(
        [[np.abs(out - image).mean() for out in at_all_severities(image, name, i)] for i, image in enumerate(images)], 0
    )
    for group in ORDER.get(name, [SEVERITIES]):
        assert (np.diff(distances[np.array(group) - 1]) > 0).all(), distances


# From the authors' settings for CIFAR, of those that other tests see only a part of.
PUBLISHED = {
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "glass_blur": ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2)),
    "snow": (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    ),
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_settings_are_the_published_ones(name):
    assert corruptions._CORRUPTIONS[name][1] == PUBLISHED[name]


# ---- noise -------------------------------------------------------------------------------------------------------


def deviations(name, value):
    """Standard deviation of the noise on a grey image, by severity, after a check that its mean is the image's."""
    noises = [(out - value) / 255 for out in at_all_severities(flat(value, 128), name)]
    assert np.abs([noise.mean() for noise in noises]).max() < 0.002
    return [noise.std() for noise in noises]


def test_gaussian_noise():
    assert deviations("gaussian_noise", 128) == pytest.approx([0.04, 0.06, 0.08, 0.09, 0.10], rel=0.02)


def test_shot_noise_has_poissons_variance():
    expected = [(100 / 255 / photons) ** 0.5 for photons in (500, 250, 100, 75, 50)]
    assert deviations("shot_noise", 100) == pytest.approx(expected, rel=0.02)


def test_speckle_noise_is_in_proportion_to_the_light():
    for value in (50, 100):
        expected = [value / 255 * std for std in (0.06, 0.1, 0.12, 0.16, 0.2)]
        assert deviations("speckle_noise", value) == pytest.approx(expected, rel=0.02)


def test_impulse_noise_is_half_salt_half_pepper_by_value():
    for out, amount in zip(
        at_all_severities(flat(128, 256), "impulse_noise"), (0.01, 0.02, 0.03, 0.05, 0.07), strict=True
    ):
        assert (out == 0).mean() == pytest.approx(amount / 2, rel=0.1)
        assert (out == 255).mean() == pytest.approx(amount / 2, rel=0.1)
        assert (out == 128).mean() == pytest.approx(1 - amount, rel=0.01)
        assert (out != 128).any(-1).mean() == pytest.approx(1 - (1 - amount) ** 3, rel=0.1), "channels on their own"


# ---- blur --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BLURS)
def test_blurs_leave_a_plain_image_plain(name):
    for out in at_all_severities(np.broadcast_to(np.array([10, 100, 200], np.uint8), (24, 32, 3)), name):
        assert (out == [10, 100, 200]).all()


def spread(name, severity):
    """How a white point in the middle is spread: (share of the light left in it, variance in pixels by row)."""
    image = flat(0, 33)
    image[16, 16] = 255
    light = corrupt(image, name, severity, np.random.default_rng(0))[..., 0] / 255
    assert light.sum() == pytest.approx(1, abs=0.05)
    return light[16, 16], (light.sum(1) * (np.arange(33) - 16) ** 2).sum()


def test_gaussian_blur_has_its_sigma():
    for severity, sigma in zip(SEVERITIES, (0.4, 0.6, 0.7, 0.8, 1), strict=True):
        weights = np.exp(-0.5 * (np.arange(-5, 6) / sigma) ** 2)
        assert spread("gaussian_blur", severity)[0] == pytest.approx((1 / weights.sum()) ** 2, abs=0.005)


def test_defocus_blur_is_a_disc():
    """At severity 5 a disc of radius 1.5: nine pixels alike. At 4 of radius 1: five. Below, a point, anti-aliased."""
    assert spread("defocus_blur", 5) == (pytest.approx(1 / 9, abs=0.003), pytest.approx(2 / 3, abs=0.03))
    assert spread("defocus_blur", 4) == (pytest.approx(1 / 5, abs=0.003), pytest.approx(2 / 5, abs=0.03))
    assert spread("defocus_blur", 1)[1] < spread("defocus_blur", 3)[1] < 0.4


@pytest.mark.parametrize("iterations", [1, 2])
def test_glass_blur_takes_each_pixel_from_above_or_left(iterations):
    """Each time the pixel itself or one of three neighbours, alike often; the first two rows and columns stay."""
    image = coordinates(200)
    out = corruptions.glass_blur(image, np.random.default_rng(0), 0.01, iterations)
    moved = (image - out)[..., :2]
    assert not moved[:2].any() and not moved[:, :2].any()
    shares = np.array([1, 1]) / 2 if iterations == 1 else np.array([1, 2, 1]) / 4
    inner = moved[4:, 4:].astype(int)
    for up in range(iterations + 1):
        for left in range(iterations + 1):
            share = (inner == (up, left)).all(-1).mean()
            assert share == pytest.approx(shares[up] * shares[left], abs=0.015)


def test_glass_blur_smooths_what_it_moved(images):
    """Severities 2 and 3 move pixels alike but blur them differently, as do 4 and 5."""
    rough = [np.abs(np.diff(out, axis=0)).mean() for out in at_all_severities(images[0], "glass_blur")]
    assert rough[1] > 1.05 * rough[2]
    assert rough[3] > 1.05 * rough[4]


@pytest.mark.parametrize(("severity", "radius", "sigma"), [(1, 6, 1), (2, 6, 1.5), (3, 6, 2), (4, 8, 2), (5, 9, 2.5)])
def test_motion_blur_is_half_a_gaussian_along_a_line(severity, radius, sigma):
    image = np.zeros((64, 64, 3), np.float32)
    image[32, 32] = 1
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2) / np.exp(-0.5 * (steps / sigma) ** 2).sum()
    assert spread("motion_blur", severity)[0] == pytest.approx(weights[0], abs=0.003)
    angles = []
    for seed in range(40):
        light = corruptions.motion_blur(image, np.random.default_rng(seed), radius, sigma)[..., 0]
        rows, columns = np.nonzero(light)
        lengths = np.hypot(rows - 32, columns - 32)
        assert (light[rows, columns] * lengths).sum() == pytest.approx((weights * steps).sum(), abs=0.4)
        far = lengths.argmax()
        assert lengths[far] == pytest.approx(2 * radius, abs=1)
        angles.append(np.degrees(np.arctan((rows[far] - 32) / (columns[far] - 32))))
    assert -50 < min(angles) < -35
    assert 35 < max(angles) < 50


def test_zoom_blur_averages_the_zooms_of_a_ramp():
    ramp = np.broadcast_to((np.arange(32, dtype=np.uint8) * 8)[None, :, None], (32, 32, 3))
    away = np.arange(32) - 15.5
    for out, last in zip(at_all_severities(ramp, "zoom_blur"), (106, 111, 115, 120, 125), strict=True):
        factors = np.array([100, *range(100, last + 1)]) / 100
        np.testing.assert_allclose(out[16, 1:-1, 0], 8 * (15.5 + away * (1 / factors).mean())[1:-1], atol=1)


# ---- weather -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_whitens_and_falls_from_both_sides(severity):
    settings = PUBLISHED["snow"][severity - 1]
    out = corrupt(flat(0), "snow", severity, np.random.default_rng(0))
    np.testing.assert_array_equal(out, out[::-1, ::-1])
    black, no_flakes = np.zeros((32, 32, 3), np.float32), (*settings[:3], 9.0, *settings[4:])
    whitened = corruptions.snow(black, np.random.default_rng(0), *no_flakes)
    np.testing.assert_allclose(whitened, (1 - settings[-1]) * 0.5, atol=1e-6)
    assert out.max() > 255 * whitened.max() + 20


def test_snow_falls_steeply():
    """Flakes are drawn out downwards rather than sideways: rows differ less from the next than columns do."""
    steep = [corrupt(flat(0), "snow", 5, np.random.default_rng(seed)).astype(float) for seed in range(20)]
    assert np.mean([np.abs(np.diff(out, axis=0)).mean() for out in steep]) < 0.8 * np.mean(
        [np.abs(np.diff(out, axis=1)).mean() for out in steep]
    )


def test_frost_is_added_to_a_share_of_the_image():
    weights = ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))
    frosts, on_grey = at_all_severities(flat(0), "frost"), at_all_severities(flat(100), "frost")
    for frost, out, (keep, cover) in zip(frosts, on_grey, weights, strict=True):
        np.testing.assert_allclose(out - frost, keep * 100, atol=1)
        assert frost.max() == pytest.approx(255 * cover, abs=2), "thick ice"
        assert frost.min() == 0, "a clearing"
        assert (np.diff(frost, axis=-1) >= 0).all(), "a touch of blue"


def test_fog_is_a_fractal_from_0_to_1_scaled_back_to_the_brightest():
    value = 150 / 255
    for out, strength in zip(at_all_severities(flat(150), "fog"), (0.2, 0.5, 0.75, 1, 1.5), strict=True):
        assert out.max() == pytest.approx(150, abs=1)
        assert out.min() == pytest.approx(255 * value**2 / (value + strength), abs=1)
        assert (out == out[..., :1]).all()


def test_fog_is_the_smoother_the_more_its_wibble_decays():
    image = np.full((32, 32, 3), 0.5, np.float32)
    rough = [
        np.mean([np.abs(np.diff(corruptions.fog(image, np.random.default_rng(i), 1, decay), axis=0)) for i in range(8)])
        for decay in (3, 2, 1.5, 1)
    ]
    assert (np.diff(rough) > 0).all()


# ---- digital and the others --------------------------------------------------------------------------------------


@pytest.fixture
def colours():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image[0, :3] = [[0, 0, 0], [255, 255, 255], [90, 90, 90]]
    return image


def by_hsv(image, change):
    pixels = [
        colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(pixel / 255).tolist()))) for pixel in image.reshape(-1, 3)
    ]
    return 255 * np.reshape(pixels, image.shape)


def test_brightness_is_hsvs_value(colours):
    for out, shift in zip(at_all_severities(colours, "brightness"), (0.05, 0.1, 0.15, 0.2, 0.3), strict=True):
        expected = by_hsv(colours, lambda h, s, v, shift=shift: (h, s, min(v + shift, 1)))
        np.testing.assert_allclose(out, expected, atol=0.51)


def test_saturate_is_hsvs_saturation(colours):
    settings = ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))
    for out, (scale, shift) in zip(at_all_severities(colours, "saturate"), settings, strict=True):
        expected = by_hsv(colours, lambda h, s, v, a=scale, b=shift: (h, min(a * s + b, 1), v))
        np.testing.assert_allclose(out, expected, atol=0.51)


def test_contrast_is_the_distance_from_the_channels_means(images):
    image = images[0].astype(float)
    means = image.mean((0, 1))
    for out, factor in zip(at_all_severities(images[0], "contrast"), (0.75, 0.5, 0.4, 0.3, 0.15), strict=True):
        np.testing.assert_allclose(out, means + factor * (image - means), atol=0.51)


ELASTIC = ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_transform_is_an_affine_map_and_a_smooth_field(severity):
    """Where pixels come from, read off an image of coordinates; a least-squares fit parts the map from the field."""
    alpha, sigma, affine = ELASTIC[severity - 1]
    side, inner = 64, slice(16, 48)
    image = coordinates(side)
    places = image[inner, inner].reshape(-1, 3)  # a copy
    places[:, 2] = 1
    fields, moves = [], []
    for seed in range(20):
        out = corruptions.elastic_transform(image, np.random.default_rng(seed), *ELASTIC[severity - 1])
        came_from = out[inner, inner, :2].reshape(-1, 2)
        fit = np.linalg.lstsq(places, came_from, rcond=None)[0]
        fields.append(np.std(came_from - places @ fit))
        anchors = side / 2 + side // 3 * np.array([[1, 1], [1, -1], [-1, -1]])
        moves.append(np.column_stack([anchors, np.ones(3)]) @ fit - anchors)
    assert np.std(moves) == pytest.approx(affine * side / 3**0.5, rel=0.25)
    # Uniform noise smoothed by a Gaussian, of which the fit takes a part: much where sigma is wide.
    expected = alpha * side / 3**0.5 / (2 * np.pi**0.5 * sigma * side) if sigma else 0
    if sigma < 0.1:
        assert np.mean(fields) == pytest.approx(expected, rel=0.2, abs=1e-4)
    else:
        assert 0 < np.mean(fields) < expected


def test_the_settings_of_elastic_transform_are_those(images):
    for out, settings in zip(at_all_severities(images[0], "elastic_transform"), ELASTIC, strict=True):
        image = images[0].astype(np.float32)
        np.testing.assert_allclose(
            out, corruptions.elastic_transform(image, np.random.default_rng(0), *settings), atol=0.51
        )


def test_pixelate_leaves_that_many_pixels():
    image = np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)
    for out, scale in zip(at_all_severities(image, "pixelate"), (0.95, 0.9, 0.85, 0.75, 0.65), strict=True):
        assert len(np.unique(out, axis=0)) == int(40 * scale)
        assert len(np.unique(out, axis=1)[0]) == int(32 * scale)


def test_jpeg_compression_is_pillows(images):
    for out, quality in zip(at_all_severities(images[0], "jpeg_compression"), (80, 65, 58, 50, 40), strict=True):
        file = io.BytesIO()
        Image.fromarray(images[0]).save(file, "JPEG", quality=quality)
        np.testing.assert_array_equal(out, np.asarray(Image.open(file)))


def test_spatter_is_turquoise_water_then_brown_mud():
    colour = np.array([175, 238, 238])
    for out in at_all_severities(flat(0), "spatter")[:3]:
        share = out[..., :1] / colour[0]
        np.testing.assert_allclose(out, share * colour, atol=1.5)
        assert share.min() == 0
        assert 0.2 < share.max() <= 0.505
    for out in at_all_severities(flat(255), "spatter")[3:]:
        share = (255 - out[..., :1]) / (255 - 63)
        np.testing.assert_allclose(out, 255 - share * (255 - np.array([63, 42, 20])), atol=1.5)
        assert share.min() < 0.01
        assert 0.5 < share.max() <= 0.605
