"""Near-duplicate images over a whole corpus: the same picture resized or recompressed, whatever its caption says.

Each image leaves a fingerprint of 392 bytes: a 64-bit perceptual hash (of the signs of its low DCT frequencies, as `imagehash` takes
it) to find candidates with, and a thumbnail to judge them by. Mirrored pictures are not duplicates: an arrow to the left is not
one to the right.
"""

from __future__ import annotations

from collections.abc import Iterator

import imagehash
import numpy as np
from PIL import Image

LUMA, CHROMA = 16, 8                     # pixels on a side of the thumbnail's brightness and of its two colours
FINGERPRINT_BYTES = 8 + LUMA**2 + 2 * CHROMA**2

# Measured on 3,000 copies of emoji (0.5 to 2 times the size but at least 64 pixels, JPEG of quality 60 to 95, WebP of 50 to 95): 99.6%
# lie within all three. Emoji that differ in a skin tone or a clock's hand alone lie outside.
MAX_BITS = 10                            # of the hash that may differ
MAX_LUMA, MAX_CHROMA = 8, 12             # the largest difference of a thumbnail's pixel, of 255. Compression changes colours more
BANDS = 6                                # pieces of the hash: up to 5 differing bits leave one untouched, 10 do so 3 times in 4
BLOCK = 1 << 22                          # pairs of hashes that are compared at once


def fingerprint(image: Image.Image) -> bytes:
    """What `find_duplicates` compares, of an RGB image."""
    hashed = np.packbits(imagehash.phash(image).hash.ravel()).tobytes()
    colours = image.convert("YCbCr")
    luma, blue, red = (np.asarray(channel.resize((side, side), Image.Resampling.BILINEAR))
                       for channel, side in zip(colours.split(), (LUMA, CHROMA, CHROMA), strict=True))
    return hashed + luma.tobytes() + blue.tobytes() + red.tobytes()


def find_duplicates(fingerprints: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """For each of N images the index of the one to keep in its stead, or -1 for those that stay.

    `fingerprints` is (N, FINGERPRINT_BYTES) uint8, `pixels` (N,) the size of each: of several copies the largest stays, the first of
    equals. Every copy is one of the image that stays, not of another copy: resemblance is not passed on.
    """
    hashes = np.ascontiguousarray(fingerprints[:, :8]).view(np.uint64)[:, 0]
    rank = np.lexsort((np.arange(len(pixels)), -np.asarray(pixels, np.int64)))       # the best first
    place = np.empty_like(rank)
    place[rank] = np.arange(len(rank))
    pairs = [found for found in _candidates(hashes) if len(found)]
    stays_instead = np.full(len(hashes), -1, np.int64)
    if not pairs:
        return stays_instead
    pairs = np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)
    pairs = pairs[_alike(fingerprints, pairs)]
    first = np.where(place[pairs[:, 0]] < place[pairs[:, 1]], pairs[:, 0], pairs[:, 1])
    other = pairs.sum(1) - first
    for n in np.lexsort((place[first], place[other])):       # each copy after all that are better than it
        if stays_instead[first[n]] == -1 and stays_instead[other[n]] == -1:
            stays_instead[other[n]] = first[n]
    return stays_instead


def _candidates(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs of rows (M, 2) whose hashes agree in one band, and in all but MAX_BITS bits."""
    edges = np.linspace(0, 64, BANDS + 1).astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            rows = max(1, BLOCK // max(1, len(bucket)))
            for start in range(0, len(bucket) if len(bucket) > 1 else 0, rows):
                here = bucket[start:start + rows]
                near = np.bitwise_count(hashes[here, None] ^ hashes[bucket[None, start:]]) <= MAX_BITS
                left, right = np.nonzero(np.triu(near, 1))
                yield np.stack([here[left], bucket[start:][right]], axis=1)


def _alike(fingerprints: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whether the thumbnails of each pair agree: (M,) bool."""
    alike = np.empty(len(pairs), bool)
    for start in range(0, len(pairs), 1 << 16):
        some = pairs[start:start + (1 << 16)]
        apart = np.abs(fingerprints[some[:, 0], 8:].astype(np.int16) - fingerprints[some[:, 1], 8:])
        alike[start:start + len(some)] = (apart[:, :LUMA**2].max(1) <= MAX_LUMA) & (apart[:, LUMA**2:].max(1) <= MAX_CHROMA)
    return alike
