import io
import zipfile

import numpy as np
import pytest
import torch
from images import encode, noise, png_header
from PIL import ExifTags, ImageOps
from PIL import Image as PILImage

import decoding
from errors import UserError


def test_16_bits_a_pixel_become_8():
    """Pillow's own conversion cuts off what is above 255, and so makes nearly all of it white."""
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image = np.asarray(decoding.decode(encode(PILImage.fromarray(ramp), "PNG")))
    assert (image == (ramp // 257)[..., None]).all()
    assert image.max() == 255 and len(np.unique(image)) == 64


def test_a_photo_stands_as_the_camera_was_held():
    upright = PILImage.new("RGB", (8, 16), (250, 10, 10))
    upright.paste((10, 10, 250), (0, 0, 8, 4))
    exif = PILImage.Exif()
    exif[ExifTags.Base.Orientation] = 6  # stored lying on its left side
    file = io.BytesIO()
    upright.transpose(PILImage.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    assert np.array_equal(decoding.decode({"bytes": file.getvalue(), "path": None}), upright)


def test_a_turned_photo_whose_other_facts_are_odd_is_no_corrupt_one():
    """Pillow's own turning writes all of a photo's EXIF anew, and fails at a tag of an unexpected type."""
    stored, exif, file = noise(1, (8, 16))[0], PILImage.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = 8
    exif[ExifTags.Base.ResolutionUnit] = "inch"  # where a number is expected
    stored.save(file, "JPEG", exif=exif.tobytes())
    without = decoding.decode(encode(stored, "JPEG"))
    turned = decoding.decode({"bytes": file.getvalue(), "path": None})
    assert np.array_equal(turned, without.transpose(PILImage.Transpose.ROTATE_90))


@pytest.mark.parametrize("turned", range(1, 9))
def test_photos_are_turned_as_pillow_turns_them(turned):
    exif, file = PILImage.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = turned
    noise(1, (8, 16))[0].save(file, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(PILImage.open(io.BytesIO(file.getvalue())))
    assert np.array_equal(decoding.decode({"bytes": file.getvalue(), "path": None}), expected)


def test_a_file_in_an_archive_is_read(tmp_path):
    image = noise(1)[0]
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a/b.png", encode(image)["bytes"])
    read = decoding.decode({"bytes": None, "path": f"zip://a/b.png::{tmp_path}/images.zip"})
    assert np.array_equal(read, image)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_broken_image_is_never_half_read(format):
    """Pillow hands out what there is of an image if it is asked again after an error."""
    content = bytearray(encode(noise(1, (32, 32))[0], format)["bytes"])
    for cut in (len(content) // 4, len(content) // 2, len(content) - 200):
        with pytest.raises(decoding.CorruptImage):
            decoding.decode({"bytes": bytes(content[:cut]), "path": None})
    if format == "PNG":  # the others keep no sums of their pixels
        for place in range(60, len(content) - 20, 97):
            broken = content.copy()
            broken[place] ^= 0x55
            with pytest.raises(decoding.CorruptImage):
                decoding.decode({"bytes": bytes(broken), "path": None})


def test_a_photo_whose_facts_are_garbage_stands_as_it_is():
    image, file = noise(1, (8, 16))[0], io.BytesIO()
    image.save(file, "PNG", exif=b"Exif\0\0garbage of no format")
    assert np.array_equal(decoding.decode({"bytes": file.getvalue(), "path": None}), image)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_told(dtype):
    """Read as 16 bits they would be black."""
    with pytest.raises(decoding.CorruptImage, match="32 bits a pixel"):
        decoding.decode(encode(PILImage.fromarray(np.ones((8, 8), dtype)), "TIFF"))


@pytest.mark.parametrize(
    "path, said",
    [
        ("http://169.254.169.254/latest/x.png", "images are read from this machine's files and from the hub"),
        ("zip://x.png::ftp://somewhere/x.zip", "images are read from this machine's files and from the hub"),
        ("ftp://127.0.0.1:9/x.png::hf://datasets/a/b/c", "images are read from this machine's files and from the hub"),
        ("ftp://127.0.0.1:9/x.png::/nowhere/x", "images are read from this machine's files and from the hub"),
        ("/dev/zero", "/dev/zero is no file"),
        ("gzip://x::/dev/zero", "/dev/zero is no file"),
    ],
)
def test_a_dataset_can_have_nothing_opened_but_files_of_this_machine_and_the_hub(path, said):
    with pytest.raises(UserError, match=f"{path} can't be read: {said}"):
        decoding.decode({"bytes": None, "path": path})


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode):
    red = PILImage.new("RGB", (8, 8), (250, 10, 10)).convert(mode, palette=PILImage.Palette.ADAPTIVE)
    image = decoding.decode(encode(red, "TIFF" if mode in ("CMYK", "LA") else "PNG"))
    assert image.mode == "RGB"
    if mode in ("P", "RGBA", "CMYK"):
        assert np.abs(np.asarray(image)[0, 0].astype(int) - (250, 10, 10)).max() < 8


def test_an_image_that_unpacks_to_a_bomb_is_told():
    with pytest.raises(decoding.CorruptImage, match="could be decompression bomb"):
        decoding.decode({"bytes": png_header(20_000, 20_000), "path": None})


def test_batches_are_uint8_of_the_stored_pixels(tiny_data):
    collate = decoding.Collate("img", "fine_label", 100, (32, 32), None)
    rows = [tiny_data.train[i] for i in range(3)]
    batch = collate(rows)
    assert batch["image"].dtype == torch.uint8
    assert batch["label"].dtype == torch.int64
    first = np.asarray(PILImage.open(io.BytesIO(rows[0]["img"]["bytes"])))
    assert np.array_equal(batch["image"][0].permute(1, 2, 0).numpy(), first)


def mixed_rows():
    return [{"image": encode(noise(1, size)[0]), "label": 0} for size in ((16, 16), (40, 20))]


def test_images_of_mixed_sizes_need_image_size():
    with pytest.raises(UserError, match=r"16x16 and 40x20 pixels\): set a size .* --data.image_size"):
        decoding.Collate("image", "label", 1, (16, 16), None)(mixed_rows())
    assert decoding.Collate("image", "label", 1, (16, 16), 24)(mixed_rows())["image"].shape == (2, 3, 24, 24)


@pytest.mark.parametrize("label", [-1, None, 2])
def test_a_label_that_is_none_of_the_classes_is_told(label):
    rows = [{"image": encode(noise(1)[0]), "label": label}]
    with pytest.raises(
        UserError, match=f"column 'label' holds {label} in split 'train', which is none of the 2 classes"
    ):
        decoding.Collate("image", "label", 2, (16, 16), None)(rows)


def test_small_images_are_left_to_the_device_to_enlarge_and_large_ones_shrink_in_the_worker():
    small, large = mixed_rows()
    assert decoding.Collate("image", "label", 1, (16, 16), 64)([small])["image"].shape == (1, 3, 16, 16)
    assert decoding.Collate("image", "label", 1, (20, 40), 8)([large])["image"].shape == (1, 3, 8, 8)
