"""Near-duplicates in a whole corpus: a picture resized or recompressed, whatever its caption.

The fingerprint of an image takes 392 bytes: a 64-bit perceptual hash (low DCT frequencies compared
with their median, as in `imagehash`), which finds candidate pairs, and a thumbnail, which confirms
them. Mirrored pictures are not duplicates: an arrow to the left is not one to the right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
from PIL import Image
from scipy.fft import dctn

LUMA, CHROMA = 16, 8  # side in pixels of the thumbnail's brightness, and of its two colour channels
FINGERPRINT_BYTES = 8 + LUMA**2 + 2 * CHROMA**2
HASHED = 32  # side in pixels of the image before the DCT
# A hash bit is set if its frequency exceeds their median by MARGIN. Half the frequencies of a
# symmetrical drawing are zero, and so is their median: without the margin, their bits are noise.
MARGIN = 200

# Limits of a near-duplicate. Measured on a copy of each of 10,941 emoji in eight styles (resized by
# 0.5 to 2 but to at least 64 pixels, JPEG of quality 60 to 95, WebP of 50 to 95): 99.97% of the
# copies are within all three limits, none differs by more than 6 bits, and the copies of 10,834 of
# the 10,840 emoji that resemble no other are found. Emoji that differ only in a skin tone or a
# clock's hand are beyond the limits, by their thumbnails.
MAX_BITS = 16  # differing bits of the hash
# largest difference of a thumbnail's pixel, of 255; compression changes colours more
MAX_LUMA, MAX_CHROMA = 8, 12
# Groups of hash bits. Candidates agree in two groups, some 20 bits: with 10^7 images, an image
# agrees by chance with about ten others in each pair of groups, few enough to compare. Up to 5
# differing bits leave at least one of the first six groups untouched, and one of the last six.
BANDS = [*np.array_split(np.arange(64), 6), *(np.arange(start, 64, 6) for start in range(6))]


def fingerprint(image: Image.Image) -> bytes:
    """Fingerprint of an RGB image for `find_duplicates`: FINGERPRINT_BYTES bytes."""
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
    """For each of N images, the index of the one to keep in its place, or -1 if it stays itself.

    `fingerprints` (N, FINGERPRINT_BYTES) uint8; `pixels` (N,), the size of each image. Of several
    copies the largest stays, the first among equals. A dropped image always resembles the image
    that stays, not just another copy of it: resemblance is not transitive.
    """
    # best first: the largest, then the earliest
    rank = np.lexsort((np.arange(len(pixels)), -np.asarray(pixels, np.int64)))
    # Compare only the best image of each distinct fingerprint: a web crawl has the same placeholder
    # ten thousand times, and all pairs of its copies would not fit in memory.
    _, best, unique_index = np.unique(
        fingerprints[rank], axis=0, return_index=True, return_inverse=True
    )
    order = np.argsort(best)
    stays = np.empty_like(best)
    stays[order] = best[order][_first_alike(fingerprints[rank[best[order]]])]
    kept_copy = np.empty_like(rank)
    kept_copy[rank] = rank[stays[unique_index]]
    return np.where(kept_copy == np.arange(len(rank)), -1, kept_copy)


def _first_alike(fingerprints: np.ndarray) -> np.ndarray:
    """For each fingerprint, the index of the first similar one that stays, or its own index.

    `fingerprints` (N, FINGERPRINT_BYTES), all different, the best first.
    """
    hashes = np.ascontiguousarray(fingerprints[:, :8]).view(np.uint64)[:, 0]
    alike = [pairs[_alike(fingerprints, pairs)] for pairs in _candidates(hashes)]
    pairs = np.unique(np.sort(np.concatenate([np.empty((0, 2), np.int64), *alike]), axis=1), axis=0)
    stays = np.arange(len(hashes))
    # in the order of `other`: whether the better ones stay is then already decided
    for better, other in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if stays[better] == better and stays[other] == other:
            stays[other] = better
    return stays


def _candidates(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Pairs of rows (M, 2) whose hashes agree in two bands and differ in at most MAX_BITS bits."""
    for bands in itertools.combinations(BANDS, 2):
        band = hashes & np.bitwise_or.reduce(
            np.uint64(1) << np.concatenate(bands).astype(np.uint64)
        )
        order = np.argsort(band, kind="stable")
        band, sorted_hashes = band[order], hashes[order]
        start, apart = np.arange(len(order)), 0
        # `start`: sorted rows whose bands agree with those of the row `apart` places further on
        while len(start):
            apart += 1
            start = start[: np.searchsorted(start, len(order) - apart)]
            start = start[band[start] == band[start + apart]]
            near = start[
                np.bitwise_count(sorted_hashes[start] ^ sorted_hashes[start + apart]) <= MAX_BITS
            ]
            yield np.stack([order[near], order[near + apart]], axis=1)


def _alike(fingerprints: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whether the thumbnails of each pair (M, 2) are within the limits: (M,) bool."""
    alike = np.empty(len(pairs), bool)
    for start in range(0, len(pairs), 1 << 16):
        some = pairs[start : start + (1 << 16)]
        apart = np.abs(fingerprints[some[:, 0], 8:].astype(np.int16) - fingerprints[some[:, 1], 8:])
        alike[start : start + len(some)] = (apart[:, : LUMA**2].max(1) <= MAX_LUMA) & (
            apart[:, LUMA**2 :].max(1) <= MAX_CHROMA
        )
    return alike
