"""The command line `glide`. Each command's imports are its own, so that `glide --help` answers at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import presets
from .config import Preset, ServeConfig, UserError, override, validate

DEMO = Path("runs/demo")
BASE, UPSAMPLER = DEMO / "base" / "weights.safetensors", DEMO / "upsampler" / "weights.safetensors"

DESCRIPTION = """Train and serve GLIDE (Nichol et al. 2021), text-to-image diffusion for generation and editing.

  glide demo                                     everything once, on this machine, in minutes
  glide corpus --out runs/corpus                 the emoji corpus as tar shards
  glide train emoji-base --set steps=5000        a preset, with settings of your own
  glide generate "a red apple, 3D render"        pictures from trained weights
  glide serve                                    the OpenAI Images API on http://127.0.0.1:8000
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Exit code 0, or 2 with one sentence on standard error for what the user can mend."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
    except UserError as error:
        print(f"glide: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("ray", "deepspeed", "fastapi", "matplotlib", "httpx", "pyarrow"):
            print(f"glide: this command needs {error.name}; install the project with `pip install '.[cluster]'`.", file=sys.stderr)
            return 2
        raise
    except KeyboardInterrupt:
        print("\nglide: interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


# -- commands ---------------------------------------------------------------------------------------------------------

def demo(options) -> None:
    _use_checkout()
    from . import demo as whole
    whole.run(options.out)


def corpus(options) -> None:
    from .distributed.corpus import prepare, survey
    made = [survey(options.survey, options.min_size)] if options.survey else prepare(options.out, options.min_size, print)
    for part in made:
        print(f"{part.path}: {part.rows}; {part.captions:,} captions, {part.cut_captions} cut at 128 tokens")


def train(options) -> None:
    preset = _preset(options)
    from .distributed.train import train as run
    out = options.out or Path("runs") / preset.model.name
    result = run(preset, out)
    if result.rows:
        print(f"rows streamed: {result.rows}")
    print(f"step {result.steps:,}: held-out loss {result.first_held_out:.4f} -> {result.last_held_out:.4f}; EMA weights in {result.weights}")


def generate(options) -> None:
    cascade = _cascade(options)
    from .data.images import encode
    from .storage import put
    _warn_of_cut(options.prompt, cascade.base.config.unet.text.context)
    images = _with_bar(lambda progress: cascade.generate(
        [options.prompt] * options.n, range(options.seed, options.seed + options.n), options.guidance_scale, options.steps,
        options.upsampler_steps, options.sampler, progress))
    for n, image in enumerate(images):
        path = options.out if options.n == 1 else options.out.with_stem(f"{options.out.stem}-{n}")
        put(encode(image), path)
        print(f"{path}  seed {options.seed + n}")


def edit(options) -> None:
    cascade = _cascade(options)
    from .data.images import ImageError, centre_crop, encode, flatten, load, open_image
    from .data.masks import centre_crop_mask, check_sizes, mask_of
    from .storage import put, read
    pictures = {}
    for name, path in (("image", options.image), ("mask", options.mask)):
        try:
            pictures[name] = load(open_image(read(path)))
        except ImageError as error:
            raise ImageError(f"{path}: {error}") from None
    check_sizes(pictures["image"], pictures["mask"])
    known = centre_crop_mask(mask_of(pictures["mask"]), cascade.size)
    _warn_of_cut(options.prompt, cascade.base.config.unet.text.context)
    image = _with_bar(lambda progress: cascade.edit(
        centre_crop(flatten(pictures["image"]), cascade.size), known, options.prompt, options.seed, options.guidance_scale,
        options.steps, options.upsampler_steps, progress=progress))
    put(encode(image), options.out)
    print(f"{options.out}  seed {options.seed}")


def serve(options) -> None:
    _use_checkout()
    config = validate(ServeConfig, {"base": str(options.base), "upsampler": str(options.upsampler), "host": options.host,
                                    "port": options.port, "precision": options.precision})
    from serve.app import build, serving

    from .distributed.local import connect
    build(config)        # a missing file is said before Ray is started
    connect(4)
    with serving(config) as url:
        print(f"{url}/v1/images/generations  (documentation at {url}/docs; Ctrl-C ends it)", flush=True)
        import threading
        threading.Event().wait()


def info(options) -> None:
    preset = _preset(options)
    from .info import describe
    print(describe(preset))


def bench(options) -> None:
    from . import bench as benches
    run = {"forward": benches.bench_forward, "sample": benches.bench_sample}[options.what]
    defaults = {"forward": ("paper-base", 1), "sample": ("filtered-base", 5)}[options.what]
    result = run(presets.get(options.preset or defaults[0]), options.precision, options.repeats or defaults[1])
    print(json.dumps(result))


# -- shared by commands -----------------------------------------------------------------------------------------------

def _preset(options) -> Preset:
    return override(presets.get(options.preset), options.set)


def _cascade(options):
    from .cascade import Cascade, check_options
    check_options(options.guidance_scale, options.steps, options.seed)
    check_options(steps=options.upsampler_steps)
    if not options.prompt.strip():
        print("glide: the prompt is empty; the picture will be of anything.", file=sys.stderr)
    return Cascade.load(options.base, None if options.no_upsampler else options.upsampler, options.precision)


def _warn_of_cut(prompt: str, context: int) -> None:
    from .tokenizer import Tokenizer
    if Tokenizer(context).encode(prompt).cut:
        print(f"glide: the prompt is longer than {context} tokens; what comes after them is not read.", file=sys.stderr)


def _with_bar(run):
    """Run with a bar of denoising steps for each stage."""
    from tqdm import tqdm
    bars: dict[str, tqdm] = {}

    def progress(stage: str, done: int, total: int) -> None:
        bar = bars.get(stage) or bars.setdefault(stage, tqdm(total=total, desc=stage, unit="step", dynamic_ncols=True))
        bar.update(done - bar.n)
        if done == total:
            bar.close()
    return run(progress)


def _use_checkout() -> None:
    """Put the checkout on the path: `serve/` is run from there and not installed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "serve" / "app.py").exists():
        raise UserError("this command runs from a checkout of glide_ray: clone it and `pip install --editable '.[cluster,emoji]'` there.")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))


def _parser() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("glide", description=DESCRIPTION, formatter_class=form)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name, function, help, epilog=None):
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", epilog=epilog, formatter_class=form)
        command.set_defaults(command=function)
        return command

    command = add("demo", demo, "corpus, training, serving and pictures in one go, with the nano models")
    command.add_argument("--out", type=Path, default=DEMO, help="folder of the results (default: %(default)s)")

    command = add("corpus", corpus, "make the emoji corpus as tar shards and count it, or count one of your own")
    command.add_argument("--out", type=Path, default=Path("runs/corpus"), help="folder for train/ and held_out/ (default: %(default)s)")
    command.add_argument("--survey", metavar="PATH", help="only stream and count this corpus: a folder or s3:// prefix of .tar or .parquet")
    command.add_argument("--min-size", type=int, default=64, metavar="PIXELS", help="drop images smaller on a side (default: %(default)s)")

    names = ", ".join(presets.PRESETS)
    settings = "examples of settings:\n  --set steps=5000 --set batch=256 --set data.corpus=s3://bucket/train --set train.zero_stage=3"
    command = add("train", train, "train a preset under Ray Train; the same command goes on with an interrupted run", settings)
    command.add_argument("preset", help=names)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; may be repeated")
    command.add_argument("--out", type=Path, help="folder of the run (default: runs/PRESET)")

    for name, function, help in (("generate", generate, "pictures for a prompt"), ("edit", edit, "paint a part of a picture anew")):
        command = add(name, function, help)
        command.add_argument("prompt")
        if name == "edit":
            command.add_argument("--image", required=True, help="the picture; its centred square is used")
            command.add_argument("--mask", required=True, help="a PNG of the same size, transparent where to paint")
        else:
            command.add_argument("-n", type=_positive, default=1, help="how many, with seeds one after the other (default: 1)")
            command.add_argument("--sampler", choices=["ancestral", "ddim", "plms", "dpm++"], help="default: the model's own")
        command.set_defaults(sampler=None)
        command.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture (default: %(default)s)")
        command.add_argument("--guidance-scale", type=float, help="how strongly the prompt pulls; 1 is none (default: the model's own)")
        command.add_argument("--steps", help="base model: a number, or a respacing such as 10,10,3,2,2 (default: the model's own)")
        command.add_argument("--upsampler-steps", help="likewise for the upsampler")
        command.add_argument("--no-upsampler", action="store_true", help="stop at 64x64")
        command.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="PNG to write (default: %(default)s)")
        _add_weights(command)

    command = add("serve", serve, "the OpenAI Images API for trained weights, on Ray Serve")
    command.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine only; there is no authentication yet")
    command.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    _add_weights(command)

    command = add("info", info, "parameters by part, memory and operations of a preset")
    command.add_argument("preset", help=names)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; may be repeated")

    command = add("bench", bench, "measure this machine; prints one line of JSON")
    command.add_argument("what", choices=["forward", "sample"],
                         help="forward: one network call; sample: one guided step as a ratio to the released form")
    command.add_argument("--preset", help="default: paper-base for forward, filtered-base for sample")
    command.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="default: %(default)s")
    command.add_argument("--repeats", type=_positive, help="default: 1 for forward, 5 pairs for sample")
    return parser


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", type=Path, default=BASE, help="weights of the base model (default: %(default)s)")
    command.add_argument("--upsampler", type=Path, default=UPSAMPLER, help="weights of the upsampler (default: %(default)s)")
    command.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="default: fp16 on a GPU, fp32 on a CPU")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 upwards")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
