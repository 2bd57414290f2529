"""Fine-tune the shipped base model on a folder of pictures, then generate with the result.

The folder holds images of at least 64 pixels a side, each with its caption in a text file beside
it: fox.png and fox.txt. Running the same command again resumes the run.

python examples/finetune_folder.py my_pictures "a fox in my style" --steps 500
"""

import argparse

from PIL import Image

import glide_ray
from glide_ray.config import presets
from glide_ray.config.overrides import override
from glide_ray.train.without_ray import train_alone

parser = argparse.ArgumentParser(description="Fine-tune on a folder of pictures with captions.")
parser.add_argument("folder")
parser.add_argument("prompt")
parser.add_argument("--steps", type=int, default=500)
parser.add_argument("--batch", type=int, default=16, help="pictures a step")
parser.add_argument("--out", default="runs/finetuned", help="folder of the run")
options = parser.parse_args()

settings = ["start_from=emoji", "learning_rate=3e-4", "warmup_steps=20", "constant_steps=none"]
settings += [f"data.corpus={options.folder}", f"data.held_out={options.folder}"]
settings += [f"steps={options.steps}", f"batch={options.batch}", "ema_rates=0.98", "trackers="]
preset = override(presets.get("emoji-base"), settings)
run = train_alone(preset, options.out)  # this process, no Ray; samples and metrics in options.out

cascade = glide_ray.load(run.weights, upsampler="emoji")
picture = cascade.generate([options.prompt], seeds=[0])[0]
Image.fromarray(picture).save(f"{options.out}/picture.png")
