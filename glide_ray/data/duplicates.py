"""Near-duplicate images over a whole corpus: the same picture resized or recompressed, whatever its caption says.

Each image leaves a fingerprint of 392 bytes: a 64-bit perceptual hash (of the signs of its low DCT frequencies, as in `imagehash`)
to find candidates with, and a thumbnail to judge them by. Mirrored pictures are not duplicates: an arrow to the left is not
one to the right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image
from scipy.fft import dctn

LUMA, CHROMA = 16, 8  # pixels on a side of the thumbnail's brightness and of its two colours
FINGERPRINT_BYTES = 8 + LUMA**2 + 2 * CHROMA**2
HASHED = 32  # pixels on a side of what is hashed
# A frequency counts as present when it is so much above their median. Half the frequencies of a
# symmetrical drawing are zero, as is the median then: without a margin their bits would be noise.
MARGIN = 200

# Measured on a copy of each of 10,941 emoji in eight styles (0.5 to 2 times the size but at least
# 64 pixels, JPEG of quality 60 to 95, WebP of 50 to 95): 99.97% lie within all three, none more than
# 6 bits apart, and 10,834 of the 10,840 that are like no other are found. Emoji that differ in a
# skin tone or a clock's hand alone lie outside, by their thumbnails.
MAX_BITS = 16  # of the hash that may differ
MAX_LUMA, MAX_CHROMA = (
    8,
    12,
)  # the largest difference of a thumbnail's pixel, of 255. Compression changes colours more
# Groups of bits of the hash, of which two must agree. These are some 20 bits: with 10^7 images an image agrees with some ten others by chance in each
# two groups, which are few enough to compare. Up to 5 differing bits leave one of the first six groups untouched and one of the others.
BANDS = [*np.array_split(np.arange(64), 6), *(np.arange(start, 64, 6) for start in range(6))]


def fingerprint(image: Image.Image) -> bytes:
    """What `find_duplicates` compares, of an RGB image."""
    grey = image.convert("L").resize((HASHED, HASHED), Image.Resampling.LANCZOS)
    low = dctn(np.asarray(grey, np.float64))[:8, :8]
    hashed = np.packbits(low > np.median(low) + MARGIN).tobytes()
    colours = image.convert("YCbCr")
    luma, blue, red = (
        np.asarray(channel.resize((side, side), Image.Resampling.BILINEAR))
        for channel, side in zip(colours.split(), (LUMA, CHROMA, CHROMA), strict=True)
    )
    return hashed + luma.tobytes() + blue.tobytes() + red.tobytes()


def find_duplicates(fingerprints: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """For each of N images the index of the one to keep in its stead, or -1 for those that stay.

    `fingerprints` is (N, FINGERPRINT_BYTES) uint8, `pixels` (N,) the size of each: of several copies the largest stays, the first of
    equals. Every copy is one of the image that stays, not of another copy: resemblance is not passed on.
    """
    rank = np.lexsort((np.arange(len(pixels)), -np.asarray(pixels, np.int64)))  # the best first
    # Of images with one and the same fingerprint the best one speaks for all: a web crawl has a placeholder ten thousand times, whose
    # pairs are too many to hold.
    _, best, of = np.unique(fingerprints[rank], axis=0, return_index=True, return_inverse=True)
    order = np.argsort(best)
    stays = np.empty_like(best)
    stays[order] = best[order][_first_alike(fingerprints[rank[best[order]]])]
    stays_instead = np.empty_like(rank)
    stays_instead[rank] = rank[stays[of]]
    return np.where(stays_instead == np.arange(len(rank)), -1, stays_instead)


def _first_alike(fingerprints: np.ndarray) -> np.ndarray:
    """For each of different fingerprints (N, FINGERPRINT_BYTES), the best first, the first one like it that stays: itself where there is none."""
    hashes = np.ascontiguousarray(fingerprints[:, :8]).view(np.uint64)[:, 0]
    alike = [pairs[_alike(fingerprints, pairs)] for pairs in _candidates(hashes)]
    pairs = np.unique(np.sort(np.concatenate([np.empty((0, 2), np.int64), *alike]), axis=1), axis=0)
    stays = np.arange(len(hashes))
    for better, other in pairs[
        np.lexsort((pairs[:, 0], pairs[:, 1]))
    ].tolist():  # each after all that are better than it
        if stays[better] == better and stays[other] == other:
            stays[other] = better
    return stays


def _candidates(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs of rows (M, 2) whose hashes agree in two bands, and in all but MAX_BITS bits."""
    for bands in itertools.combinations(BANDS, 2):
        band = hashes & np.bitwise_or.reduce(
            np.uint64(1) << np.concatenate(bands).astype(np.uint64)
        )
        order = np.argsort(band, kind="stable")
        band, sorted_hashes = band[order], hashes[order]
        here, apart = np.arange(len(order)), 0
        while len(here):  # those that agree with the one so far apart from them
            apart += 1
            here = here[: np.searchsorted(here, len(order) - apart)]
            here = here[band[here] == band[here + apart]]
            near = here[
                np.bitwise_count(sorted_hashes[here] ^ sorted_hashes[here + apart]) <= MAX_BITS
            ]
            yield np.stack([order[near], order[near + apart]], axis=1)


def _alike(fingerprints: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whether the thumbnails of each pair agree: (M,) bool."""
    alike = np.empty(len(pairs), bool)
    for start in range(0, len(pairs), 1 << 16):
        some = pairs[start : start + (1 << 16)]
        apart = np.abs(fingerprints[some[:, 0], 8:].astype(np.int16) - fingerprints[some[:, 1], 8:])
        alike[start : start + len(some)] = (apart[:, : LUMA**2].max(1) <= MAX_LUMA) & (
            apart[:, LUMA**2 :].max(1) <= MAX_CHROMA
        )
    return alike
