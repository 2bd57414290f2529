"""Display P3 beside Pillow: a profile, and the conversion by matrices."""

import numpy as np
from PIL import ImageCms


def p3_profile():
    """An ICC profile of Display P3: sRGB's curve, with the primaries of P3 adapted to D50."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    primaries = {
        b"rXYZ": (0.51512, 0.2412, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.1571, 0.06657, 0.78407),
    }
    for n in range(int.from_bytes(srgb[128:132], "big")):
        entry = 132 + 12 * n
        start = int.from_bytes(srgb[entry + 4 : entry + 8], "big")
        for k, value in enumerate(primaries.get(bytes(srgb[entry : entry + 4]), ())):
            place = start + 8 + 4 * k
            srgb[place : place + 4] = round(value * 65536).to_bytes(4, "big", signed=True)
    return bytes(srgb)


def display_p3_to_srgb(values):
    """8-bit Display P3 -> 8-bit sRGB as floats, by the matrices of CSS Color 4."""
    value = np.array(values) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_xyz = [
        [0.4865709, 0.2656677, 0.1982173],
        [0.2289746, 0.6917385, 0.0792869],
        [0, 0.0451134, 1.0439444],
    ]
    from_xyz = [
        [3.2409699, -1.5373832, -0.4986108],
        [-0.9692436, 1.8759675, 0.0415551],
        [0.0556301, -0.2039770, 1.0569715],
    ]
    linear = np.clip(np.array(from_xyz) @ np.array(to_xyz) @ linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
