"""Malformed requests to the server, drawn at random."""

import io
import random

import httpx
from PIL import Image

from helpers.processes import replica_processes


def check_malformed_requests(url, count, seed):
    """Send `count` malformed requests; none may crash the server or cost it memory."""
    draw, statuses, sizes = random.Random(seed), {}, []
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(count):
            path, content = broken_request(draw)
            status = client.post(f"/v1/images/{path}", **content).status_code
            statuses[status] = statuses.get(status, 0) + 1
            if number % 50 == 49:
                ingress = replica_processes("ingress")
                sizes.append(sum(process.memory_info().rss for process in ingress))
    print(statuses, [size // 2**20 for size in sizes])
    # A few corrupted images are still readable.
    assert set(statuses) <= {200, 400, 404, 413} and statuses[400] > 0.8 * count
    assert sizes[-1] < sizes[len(sizes) // 2] + 32 * 2**20
    assert httpx.get(f"{url}/readyz").status_code == 200


def broken_request(draw):
    """(path, keyword arguments for httpx) of a request that is almost certainly invalid."""
    junk = [
        None,
        True,
        -1,
        0,
        1e308,
        "x" * draw.randrange(1, 5000),
        [],
        {},
        [1, 2],
        "NaN",
        "\u0000",
        "\U0001f600",
        2**70,
        -2.5,
        "../../etc/passwd",
        "10",
    ]
    names = [
        "prompt",
        "n",
        "size",
        "seed",
        "steps",
        "guidance_scale",
        "sampler",
        "output_format",
        "model",
        "stream",
        "best_of",
        "strength",
        "loras",
        draw.choice("abc") * 9,
    ]
    kind = draw.randrange(6)
    if kind == 0:
        return "generations", {
            "json": {"n": 0}
            | {draw.choice(names): draw.choice(junk) for _ in range(draw.randrange(1, 6))}
        }
    if kind == 1:
        return "generations", {
            "content": draw.randbytes(draw.randrange(0, 3000)),
            "headers": {"content-type": "application/json"},
        }
    if kind == 2:
        return "generations", {
            "content": b'{"prompt": ' + b"[" * draw.randrange(1, 100_000),
            "headers": {"content-type": "application/json"},
        }
    if kind == 3:
        return draw.choice(["edits", "variations"]), {
            "files": {"image": ("i.png", broken_image(draw), "image/png")},
            "data": {"prompt": "x", "steps": "1", "size": "64x64"},
        }
    if kind == 4:
        return "edits", {
            "files": {
                draw.choice(["image", "image[]", "mask", "picture"]): (
                    "i.png",
                    draw.randbytes(50),
                    "image/png",
                )
            },
            "data": {draw.choice(names): str(draw.choice(junk))[:2000] for _ in range(3)}
            | {"n": "0"},
        }
    return "edits", {
        "content": draw.randbytes(draw.randrange(0, 3000)),
        "headers": {
            "content-type": "multipart/form-data; boundary=" + draw.choice(["x", "", "y" * 300])
        },
    }


def broken_image(draw):
    """A truncated or corrupted image, or a bomb: few bytes but very many pixels."""
    buffer = io.BytesIO()
    kind = draw.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "bomb"])
    if kind == "bomb":
        Image.new("1", (draw.randrange(5000, 20_000), 20_000)).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    Image.new("RGB", (64, 64), "red").save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for _ in range(draw.randrange(1, 20)):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data[: draw.randrange(1, len(data))])
