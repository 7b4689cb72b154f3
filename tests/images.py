"""Small images to test with, encoded and as parquet."""

import io
import struct
import zlib

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage


def encode(image: PILImage.Image, format="PNG") -> dict:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return {"bytes": buffer.getvalue(), "path": None}


def parquet_of(folder, images, labels=None, features=None, **columns):
    labels = labels if labels is not None else [i % 2 for i in range(len(images))]
    features = features or Features(image=Image(), label=ClassLabel(names=["a", "b"]))
    rows = Dataset.from_dict({"image": images, "label": labels} | columns, features=features)
    for split in ("train", "test"):
        rows.to_parquet(folder / f"{split}.parquet")
    return folder


def noise(count, size=(16, 16), seed=0):
    rng = np.random.default_rng(seed)
    return [PILImage.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for _ in range(count)]


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that claims to be that large."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">II", zlib.crc32(header), 9) + b"IDAT"
