"""From encoded images to batches of uint8: what a loader's workers do."""

import hashlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from datasets.utils.file_utils import xopen
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PILImage

import hub
from errors import UserError, first_line
from metrics import IGNORED

ROW = "__row__"  # column with a memory-mapped row's number within its split, for messages

PILImage.init()
# Raster formats only: Pillow hands others to programs that run code in them, such as Ghostscript.
PIXELS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "TGA", "TIFF", "WEBP")
FORMATS = tuple(name for name in PIXELS if name in PILImage.OPEN)
ARCHIVES = {"zip", "tar", "gzip", "bz2", "xz", "lz4", "zstd"}  # containers that an image's path may lead through
TURNED = {  # EXIF orientation to the transpose that sets a photo upright; Pillow's own fails if other tags are odd
    2: PILImage.Transpose.FLIP_LEFT_RIGHT,
    3: PILImage.Transpose.ROTATE_180,
    4: PILImage.Transpose.FLIP_TOP_BOTTOM,
    5: PILImage.Transpose.TRANSPOSE,
    6: PILImage.Transpose.ROTATE_270,
    7: PILImage.Transpose.TRANSVERSE,
    8: PILImage.Transpose.ROTATE_90,
}

if not hub.offline():
    hub.persist()  # here, so that spawned workers have it too: they import this module for `Collate`


class CorruptImage(Exception):
    """Bytes that can't be read as an image."""


def bytes_of(encoded: Mapping | None) -> bytes:
    """The bytes of an encoded image; empty if the row has no image."""
    if not encoded or (encoded["bytes"] is None and encoded["path"] is None):
        return b""
    if encoded["bytes"] is not None:
        return encoded["bytes"]
    path = encoded["path"]
    try:
        if os.path.isfile(path):  # by its literal name: `xopen` would give `::` in it a meaning
            with open(path, "rb") as file:
                return file.read()
        # Somebody else's dataset may name any path: open no devices, and contact no server but the hub.
        *inside, where = path.split("::")
        if os.path.exists(where) and not os.path.isfile(where):
            raise OSError(f"{where} is no file")
        schemes = [hop.partition("://")[0] for hop in (*inside, where) if "://" in hop]
        if not ARCHIVES.issuperset(schemes[: len(inside)]) or schemes[len(inside) :] not in ([], ["hf"]):
            raise OSError("images are read from this machine's files and from the hub alone")
        with xopen(path, "rb") as file:
            return file.read()
    except Exception as error:  # from a missing file to a lost connection
        raise UserError(f"{path} can't be read: {first_line(error)}") from error


def decode(encoded: Mapping | None) -> PILImage.Image:
    """An encoded image ({"bytes", "path"}) as an RGB PIL image, whatever mode it was stored in.

    Raises:
        CorruptImage: the bytes are not an image that Pillow can read, or its pixels have no known range.
        UserError: its path can't be read.
    """
    content = bytes_of(encoded)
    try:
        image = PILImage.open(io.BytesIO(content), formats=FORMATS)
        image.load()  # before other calls load it, too, and hide that it is broken
        turned = TURNED.get(_orientation(image))
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
            # 16 bits a pixel: scaled, as Pillow's conversion would clip all values above 255.
            image = PILImage.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise CorruptImage("it has 32 bits a pixel, and nothing says which value is white")
        image = image.convert("RGB")
        return image if turned is None else image.transpose(turned)
    except CorruptImage:
        raise
    except UnidentifiedImageError:
        raise CorruptImage("it is in no format that is read here" if content else "it is empty") from None
    except MemoryError:  # the image may be intact
        raise
    except Exception as error:  # Pillow's readers raise a dozen types on broken bytes
        raise CorruptImage(first_line(error)) from error


def _orientation(image: PILImage.Image) -> int | None:
    """How the camera was held, as EXIF's number; None if it is missing or unreadable."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # garbage in EXIF; the pixels may still be intact
        return None


def corrupt(row: Mapping, image: str, split: str, error: CorruptImage) -> UserError:
    """The error for a row whose image can't be decoded: it names row and file; in a stream, the file or a hash."""
    content, path = bytes_of(row[image]), (row[image] or {}).get("path")
    if ROW in row:
        where = f"the image in row {row[ROW]} of split '{split}'" + (f" ({path})" if path else "")
    else:
        digest = hashlib.blake2b(content, digest_size=8).hexdigest()
        which = f"an image of {len(content)} bytes (BLAKE2b {digest}; " if content else "an empty image ("
        unnamed = f"{which}--data.streaming false names its row)"
        where = path or unnamed
    return UserError(f"{where} can't be decoded: {error}; repair or remove it, or --data.on_corrupt skip")


@dataclass(frozen=True)
class Collate:
    """Decode rows into a batch; runs in the loader's workers.

    Returns from a call:
        dict: `image` uint8 (B, 3, H, W), `label` int64 (B,). Images keep their size; resizing to `image_size` is left
        to the device, unless they differ in size, are larger or not square: then they are cropped and resized here.
        With `skip`, a row whose image can't be decoded has the label `metrics.IGNORED`.

    Raises:
        UserError: a label that is no class, several sizes without `image_size`, or an image that can't be decoded.
    """

    image: str
    label: str
    classes: int
    size: tuple[int, int]
    image_size: int | None
    split: str = "train"
    skip: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        labels = [row[self.label] for row in rows]
        for label in labels:
            if label is None or not 0 <= label < self.classes:
                raise UserError(
                    f"data.label: column '{self.label}' holds {label} in split '{self.split}', which is none of the "
                    f"{self.classes} classes"
                )
        images = [row[self.image] for row in rows]
        decoded = all(isinstance(image, np.ndarray) and image.shape[:2] == self.size for image in images)
        if decoded and not self.must_fit():  # already right: skip the detour through Pillow
            return {"image": _batch(images), "label": torch.tensor(labels)}
        images = [self._decode(row) for row in rows]
        if None in images:
            # A black image fills the place, so batches stay equally large on all processes; no loss counts it.
            labels = [IGNORED if image is None else label for image, label in zip(images, labels, strict=True)]
            filling = PILImage.new("RGB", self.size[::-1])
            images = [image or filling for image in images]
        expected = self.size[::-1]
        odd = next((image.size for image in images if image.size != expected), None)
        if self.image_size is None and odd:
            raise UserError(
                f"images differ in size ({expected[0]}x{expected[1]} and {odd[0]}x{odd[1]} pixels): "
                "set a size to resize them all to, for example --data.image_size 224"
            )
        if self.image_size and (odd or self.must_fit()):
            square = (self.image_size, self.image_size)
            images = [ImageOps.fit(image, square, PILImage.Resampling.BILINEAR) for image in images]
        return {"image": _batch([np.asarray(image) for image in images]), "label": torch.tensor(labels)}

    def _decode(self, row: dict) -> PILImage.Image | None:
        if isinstance(row[self.image], np.ndarray):  # kept decoded
            return PILImage.fromarray(row[self.image])
        try:
            return decode(row[self.image])
        except CorruptImage as error:
            if self.skip:
                return None
            raise corrupt(row, self.image, self.split, error) from error

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of a batch if all its images are as large as the first."""
        return (self.image_size, self.image_size) if self.must_fit() else self.size

    def must_fit(self) -> bool:
        height, width = self.size
        return bool(self.image_size) and (max(height, width) > self.image_size or height != width)


def _batch(images: list[np.ndarray]) -> torch.Tensor:
    """Images (H, W, 3), all of one size, as one uint8 tensor (B, 3, H, W)."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
