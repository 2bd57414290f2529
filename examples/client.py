"""Generate and edit over HTTP with OpenAI's client. Start the server first: `glide serve`.

pip install openai
python examples/client.py "a red apple, 3D render" "a yellow star, 3D render"
"""

import argparse
import base64
import io

from openai import OpenAI
from PIL import Image

parser = argparse.ArgumentParser(description="Generate a picture, then edit its right half.")
parser.add_argument("prompt")
parser.add_argument("edit", help="prompt of the edit")
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
parser.add_argument("--key", default="none", help="API key, if the server has keys")
parser.add_argument("--steps", type=int, default=25, help="denoising steps at 64 pixels")
parser.add_argument("--out", default="from_server", help="beginning of the file names")
options = parser.parse_args()

client = OpenAI(base_url=options.url, api_key=options.key)
sampling = {"seed": 1, "steps": options.steps}  # fields that OpenAI's API does not have
first = client.images.generate(prompt=options.prompt, size="256x256", extra_body=sampling)
picture = base64.b64decode(first.data[0].b64_json)

mask = Image.new("LA", (256, 256), (0, 255))
mask.paste((0, 0), (128, 0, 256, 256))  # transparent: to be painted
buffer = io.BytesIO()
mask.save(buffer, "PNG")
edited = client.images.edit(
    image=("picture.png", picture, "image/png"),
    mask=("mask.png", buffer.getvalue(), "image/png"),
    prompt=options.edit,
    extra_body=sampling,
)
for name, png in (("generated", picture), ("edited", base64.b64decode(edited.data[0].b64_json))):
    with open(f"{options.out}_{name}.png", "wb") as file:
        file.write(png)
