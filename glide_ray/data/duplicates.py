"""Near-duplicates in a whole corpus: a picture resized or recompressed, whatever its caption.

The fingerprint of an image takes 392 bytes: a 64-bit perceptual hash (low DCT frequencies compared
with their median, as in `imagehash`), which finds candidate pairs, and a thumbnail, which confirms
them. Mirrored pictures are not duplicates: an arrow to the left is not one to the right.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

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
# Above this number of images, candidates must agree in 3 of 8 groups (24 bits), and above 64 times
# this number in 4 of 9 groups (28 bits), so that few agree by chance. Hashes that differ in up to 5
# bits still agree in enough groups. At most 0.03% of copies differ in 6 bits; pairs of groups find
# more of those.
LONGER_BANDS_FROM = 4_000_000
# Each row is compared with at most this many following rows that have the same band value. Larger
# sets of different pictures with the same value are blank or nearly blank.
MAX_COMPARED = 4096
SLICE_ROWS = 1 << 20  # rows sorted at once: larger arrays are slower, each being mapped anew
MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, with bits spread evenly
CELLS = 2, 4  # rows and columns of the sketch: means of the thumbnail's brightness, a byte each


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
    # Compare only the best image of each distinct fingerprint: a web crawl has the same grey square
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
    hashes, sketches, masks = hash_of(fingerprints), sketch_of(fingerprints), band_masks(0)
    near = [candidates(hashes, sketches, masks, n) for n in range(len(masks))]
    pairs = np.concatenate([np.empty((0, 2), np.int64), *near])
    return stays_of(len(hashes), pairs[alike(fingerprints, pairs)])


def stays_of(count: int, pairs: np.ndarray) -> np.ndarray:
    """For each of `count` images, the best first, the first of its similar ones that stays.

    `pairs` (M, 2) of similar images. An image that stays has its own index.
    """
    pairs = np.sort(pairs, axis=1)
    stays = np.arange(count)
    # in the order of `other`: whether the better ones stay is then already decided
    for better, other in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))].tolist():
        if stays[better] == better and stays[other] == other:
            stays[other] = better
    return stays


def hash_of(fingerprints: np.ndarray) -> np.ndarray:
    """The perceptual hashes (N,) uint64 of fingerprints (N, FINGERPRINT_BYTES)."""
    return np.ascontiguousarray(fingerprints[:, :8]).view(np.uint64)[:, 0]


def sketch_of(fingerprints: np.ndarray) -> np.ndarray:
    """Mean brightness of eight cells of each thumbnail, a byte each: (N,) uint64.

    The cells of near-duplicates differ by at most MAX_LUMA, as do all their pixels.
    """
    rows, columns = CELLS
    luma = fingerprints[:, 8 : 8 + LUMA**2].reshape(
        -1, rows, LUMA // rows, columns, LUMA // columns
    )
    means = luma.sum((2, 4), dtype=np.uint32) // (LUMA**2 // (rows * columns))
    return np.ascontiguousarray(means.reshape(-1, 8).astype(np.uint8)).view(np.uint64)[:, 0]


def band_masks(images: int) -> list[np.uint64]:
    """Masks of the hash bits in which candidates agree, by the number of images compared."""
    chosen: Iterable[tuple[np.ndarray, ...]]
    if images <= LONGER_BANDS_FROM:
        chosen = itertools.combinations(BANDS, 2)
    elif images <= 64 * LONGER_BANDS_FROM:
        chosen = itertools.combinations(np.array_split(np.arange(64), 8), 3)
    else:
        chosen = itertools.combinations(np.array_split(np.arange(64), 9), 4)
    return [
        np.bitwise_or.reduce(np.uint64(1) << np.concatenate(bands).astype(np.uint64))
        for bands in chosen
    ]


def slice_of(hashes: np.ndarray, mask: np.uint64, slices: int) -> np.ndarray:
    """Slice (N,) of 0 to `slices` - 1 of each hash; hashes that agree in the mask share it."""
    return (_band_values(hashes, mask).astype(np.uint64) * np.uint64(slices)) >> np.uint64(32)


def _band_values(hashes: np.ndarray, mask: np.uint64) -> np.ndarray:
    """The bits in the mask as (N,) uint32, mixed so that the values are spread evenly."""
    return (((hashes & mask) * MIX) >> np.uint64(32)).astype(np.uint32)


def candidates(
    hashes: np.ndarray, sketches: np.ndarray, masks: Sequence[np.uint64], number: int
) -> np.ndarray:
    """Pairs (M, 2) of rows that agree in mask `number` and in no earlier one.

    Their hashes differ in at most MAX_BITS bits, and their sketches by at most MAX_LUMA.
    """
    values = np.empty(len(hashes), np.uint32)
    for start in range(0, len(hashes), SLICE_ROWS):
        some = slice(start, start + SLICE_ROWS)
        values[some] = _band_values(hashes[some], masks[number])
    found = [np.empty((0, 2), np.int64)]
    if len(hashes) <= SLICE_ROWS:
        rows = np.arange(len(hashes))
        found += _pairs_of_equal(values, rows, hashes, sketches, masks, number)
    else:
        low, high = int(values.min()), int(values.max()) + 1
        step = -(-(high - low) // -(-len(hashes) // SLICE_ROWS))
        for first in range(low, high, step):
            rows = np.flatnonzero((values >= first) & (values <= min(first + step, high) - 1))
            found += _pairs_of_equal(values, rows, hashes, sketches, masks, number)
    return np.concatenate(found)


def _pairs_of_equal(
    values: np.ndarray,
    rows: np.ndarray,
    hashes: np.ndarray,
    sketches: np.ndarray,
    masks: Sequence[np.uint64],
    number: int,
) -> Iterator[np.ndarray]:
    """Pairs (M, 2), as of `candidates`, among `rows` with equal `values`."""
    # One sort of (value, row) as a single number is much faster than an argsort and a gather.
    packed = np.sort(values[rows].astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64))
    order, sorted_values = packed.astype(np.uint32), (packed >> np.uint64(32)).astype(np.uint32)
    # `start`: sorted rows whose value is that of the row `apart` places further on
    start, apart = np.flatnonzero(sorted_values[:-1] == sorted_values[1:]), 1
    while len(start) and apart <= MAX_COMPARED:
        one, other = order[start], order[start + apart]
        differing = hashes[one] ^ hashes[other]
        near = np.flatnonzero(np.bitwise_count(differing) <= MAX_BITS)
        near = near[_cells_agree(sketches[one[near]], sketches[other[near]])]
        one, other, differing = one[near], other[near], differing[near]
        new = (differing & masks[number]) == 0  # equal values may be of other bits
        for earlier in masks[:number]:
            new &= (differing & earlier) != 0
        yield np.stack([one[new], other[new]], axis=1).astype(np.int64)
        apart += 1
        start = start[: np.searchsorted(start, len(order) - apart)]
        start = start[sorted_values[start] == sorted_values[start + apart]]


def _cells_agree(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether the cells of two sketches, (M,) uint64 each, are within MAX_LUMA: (M,) bool."""
    cells = [sketch.view(np.uint8).reshape(-1, 8).astype(np.int16) for sketch in (one, other)]
    return np.abs(cells[0] - cells[1]).max(1, initial=0) <= MAX_LUMA


def alike(fingerprints: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Whether the thumbnails of each pair (M, 2) are within the limits: (M,) bool."""
    alike = np.empty(len(pairs), bool)
    for start in range(0, len(pairs), 1 << 16):
        some = pairs[start : start + (1 << 16)]
        apart = np.abs(fingerprints[some[:, 0], 8:].astype(np.int16) - fingerprints[some[:, 1], 8:])
        alike[start : start + len(some)] = (apart[:, : LUMA**2].max(1) <= MAX_LUMA) & (
            apart[:, LUMA**2 :].max(1) <= MAX_CHROMA
        )
    return alike
