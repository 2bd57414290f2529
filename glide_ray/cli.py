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
  glide generate "a red apple, 3D render"        pictures from trained weights; edit, vary and scene change them
  glide reproduce generate.png                   the same picture again, from what its PNG says
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
    cascade, asked = _cascade(options), _asked(options)
    from .recipe import Maker, save_picture
    seeds = list(range(options.seed, options.seed + options.n))
    if options.best_of > 1:
        ranked = [_with_bar(lambda progress, first=seed: cascade.best_of(
            options.prompt, range(first, first + options.best_of), asked, progress))
            for seed in range(options.seed, options.seed + options.n * options.best_of, options.best_of)]
        seeds, images = [best.seed for best in ranked], [best.image for best in ranked]
        notes = [f"  best of {options.best_of}: CLIP score {best.scores[best.seed]:.2f}, mean "
                 f"{sum(best.scores.values()) / options.best_of:.2f}" for best in ranked]
    else:
        images = _with_bar(lambda progress: cascade.generate([options.prompt] * options.n, seeds, asked, progress))
        notes = [""] * options.n
    for n, (image, seed, note) in enumerate(zip(images, seeds, notes, strict=True)):
        path = options.out if options.n == 1 else options.out.with_stem(f"{options.out.stem}-{n}")
        save_picture(image, path, Maker.of(cascade).recipe("generate", options.prompt, seed, asked))
        print(f"{path}  seed {seed}{note}")


def edit(options) -> None:
    cascade, asked = _cascade(options), _asked(options)
    image, known = _image_and_mask(options.image, options.mask, cascade.size)
    from .recipe import Maker, save_picture
    made = _with_bar(lambda progress: cascade.edit(image, known, options.prompt, options.seed, asked, progress))
    save_picture(made, options.out, Maker.of(cascade).recipe("edit", options.prompt, options.seed, asked), {"image": image, "mask": known})
    print(f"{options.out}  seed {options.seed}")


def vary(options) -> None:
    cascade, asked = _cascade(options), _asked(options)
    from .data.images import centre_crop, flatten, lay_over
    from .data.masks import check_sizes
    from .recipe import Maker, save_picture
    inputs = dict(zip(("image", "mask"), _image_and_mask(options.image, options.mask, cascade.size), strict=False))
    if options.sketch:
        picture, sketch = _open(options.image), _open(options.sketch)
        check_sizes(picture, sketch, "sketch")
        inputs["sketch"] = centre_crop(lay_over(flatten(picture), sketch), cascade.size)
    made = _with_bar(lambda progress: cascade.vary(inputs["image"], options.prompt, options.seed, options.strength, inputs.get("mask"),
                                                   inputs.get("sketch"), asked, progress))
    save_picture(made, options.out, Maker.of(cascade).recipe("vary", options.prompt, options.seed, asked, options.strength), inputs)
    print(f"{options.out}  seed {options.seed}, strength {options.strength:g}")


def scene(options) -> None:
    if (options.prompt is None) == (options.image is None):
        raise UserError("a scene begins with a prompt or with --image; give one of the two.")
    cascade, asked = _cascade(options), _asked(options)
    from .data.images import centre_crop, flatten
    from .data.masks import centre_crop_mask, mask_of
    from .recipe import Maker, save_picture

    def path(n: int) -> Path:
        return options.out.with_stem(f"{options.out.stem}-{n}")
    edits = [(centre_crop_mask(_named(mask, lambda mask=mask: mask_of(_open(mask))), cascade.size), prompt) for mask, prompt in options.edit]
    for _, prompt in edits:
        _warn_of_cut(prompt, cascade.base.config.context)
    if options.image:
        image, seed = centre_crop(flatten(_open(options.image)), cascade.size), options.seed
    else:
        image, seed = _with_bar(lambda progress: cascade.generate([options.prompt], [options.seed], asked, progress))[0], options.seed + 1
        save_picture(image, path(0), Maker.of(cascade).recipe("generate", options.prompt, options.seed, asked))
        print(f"{path(0)}  seed {options.seed}  {options.prompt}")

    def apply(progress, image=image) -> None:
        for n, made in enumerate(cascade.scene(image, edits, seed, asked, progress)):
            known, prompt = edits[n]
            save_picture(made, path(n + 1), Maker.of(cascade).recipe("edit", prompt, seed + n, asked), {"image": image, "mask": known})
            print(f"{path(n + 1)}  seed {seed + n}  {prompt}")
            image = made
    _with_bar(apply)


def reproduce(options) -> None:
    from .recipe import find_models, make_again, read_recipe, save_picture
    recipe, inputs, before = read_recipe(options.picture)
    models = find_models(recipe, {"base": options.base, "upsampler": options.upsampler, "clip": options.clip})
    from .cascade import Cascade
    cascade = Cascade.load(models["base"], models.get("upsampler"), recipe.precision, clip=models.get("clip"))
    made = _with_bar(lambda progress: make_again(cascade, recipe, inputs, progress))
    print(f"{recipe.task} {recipe.prompt!r}, seed {recipe.seed}, {recipe.options.sampler} {recipe.options.steps}, guidance scale "
          f"{recipe.options.guidance_scale:g}, {recipe.models['base'].name}")
    apart = abs(made.astype(int) - before) if made.shape == before.shape else None
    if apart is not None and not apart.any():
        print(f"the same as {options.picture}, to the last 8-bit value")
    elif apart is not None:
        print(f"differs from {options.picture} by up to {apart.max()} of 255, in {(apart > 0).mean():.2%} of its values; it was made with "
              f"{recipe.made_with}")
    else:
        print(f"{options.picture} has been resized since: it is {before.shape[1]}x{before.shape[0]} and was made at {made.shape[1]}x{made.shape[0]}")
    if options.out:
        save_picture(made, options.out, recipe, inputs)
        print(options.out)


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


def import_released(options) -> None:
    from .models.released import import_files
    from .models.weights import save_weights
    config, state, metadata = import_files(options.files, options.vocabulary)
    out = options.out or Path("runs") / config.name / "weights.safetensors"
    save_weights(out, state, config, source="released", **metadata)
    print(f"{out}: {config.name}, {sum(tensor.numel() for tensor in state.values()) / 1e6:,.2f}M parameters, every key and shape checked")


def export_released(options) -> None:
    from .models.released import export_files
    from .models.weights import load_weights
    config, state = load_weights(options.weights)
    for path in export_files(state, config, options.out or options.weights.with_suffix(".pt")):
        print(f"{path}: {config.name} under the released names")


def info(options) -> None:
    preset = _preset(options)
    from .info import describe
    print(describe(preset))


def bench(options) -> None:
    from . import bench as benches
    if options.what == "samplers":
        result = benches.bench_samplers(options.base)
    elif options.what == "inpainting":
        result = benches.bench_inpainting(options.base, options.inpaint, options.corpus)
    elif options.what == "guidance":
        result = benches.bench_guidance(options.base, options.clip)
    else:
        run = {"forward": benches.bench_forward, "sample": benches.bench_sample}[options.what]
        defaults = {"forward": ("paper-base", 1), "sample": ("filtered-base", 5)}[options.what]
        result = run(presets.get(options.preset or defaults[0]), options.precision, options.repeats or defaults[1])
    print(json.dumps(result))


# -- shared by commands -----------------------------------------------------------------------------------------------

def _preset(options) -> Preset:
    return override(presets.get(options.preset), options.set)


def _asked(options):
    """What the options say of sampling. Raises RequestError."""
    from .cascade import check_options
    from .config import SampleOptions
    asked = SampleOptions(sampler=options.sampler, steps=options.steps, upsampler_steps=options.upsampler_steps,
                          guidance_scale=options.guidance_scale, clip_scale=options.clip_scale, guidance_interval=options.guidance_interval)
    check_options(asked, options.seed, getattr(options, "strength", None))
    return asked


def _cascade(options):
    _asked(options)         # found senseless before anything is loaded
    if options.prompt is not None and not options.prompt.strip():
        print("glide: the prompt is empty; the picture will be of anything.", file=sys.stderr)
    if (options.clip_scale or getattr(options, "best_of", 1) > 1) and not options.clip:
        raise UserError("--clip-scale and --best-of need a CLIP model; give one with --clip, trained by `glide train nano-clip` for example.")
    from .cascade import Cascade
    cascade = Cascade.load(options.base, None if options.no_upsampler else options.upsampler, options.precision, clip=options.clip)
    _warn_of_cut(options.prompt or "", cascade.base.config.context)
    return cascade


def _open(path: str):
    """A picture from a file, upright. Raises ImageError that names the file."""
    from .data.images import load, open_image
    from .storage import read
    return _named(path, lambda: load(open_image(read(path))))


def _named(path: str, work):
    """`work()`, with the file's name before what is said of it."""
    from .storage import StorageError
    try:
        return work()
    except StorageError:
        raise
    except UserError as error:
        raise type(error)(f"{path}: {error}") from None


def _image_and_mask(image: str, mask: str | None, size: int):
    """The centred square of a picture at `size` pixels, and of its mask if there is one: true where known."""
    from .data.images import centre_crop, flatten
    from .data.masks import centre_crop_mask, check_sizes, mask_of
    picture = _open(image)
    pixels = centre_crop(flatten(picture), size)
    if mask is None:
        return (pixels,)
    opened = _open(mask)
    check_sizes(picture, opened)
    return pixels, centre_crop_mask(_named(mask, lambda: mask_of(opened)), size)


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
            bars.pop(stage).close()
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

    command = add("generate", generate, "pictures for a prompt")
    command.add_argument("prompt")
    command.add_argument("-n", type=_positive, default=1, help="how many, with seeds one after the other (default: 1)")
    command.add_argument("--best-of", type=_positive, default=1, metavar="N", help="make N for each and keep the one that --clip scores highest")
    _add_sampling(command, "generate.png")

    command = add("edit", edit, "paint a part of a picture anew")
    command.add_argument("prompt")
    command.add_argument("--image", required=True, help="the picture; its centred square is used")
    command.add_argument("--mask", required=True, help="a PNG of the same size, transparent where to paint")
    _add_sampling(command, "edit.png")

    command = add("vary", vary, "make a picture anew from what it shows, or from a sketch on it (SDEdit)",
                  "example:\n  glide vary \"a red house\" --image photo.png --sketch strokes.png --mask hole.png --strength 0.7")
    command.add_argument("prompt")
    command.add_argument("--image", required=True, help="the picture to begin from; its centred square is used")
    command.add_argument("--strength", type=float, default=0.6, help="above 0, at most 1: how far from the picture (default: %(default)s)")
    command.add_argument("--mask", help="a PNG of the same size, transparent where it may change; the rest stays exactly")
    command.add_argument("--sketch", help="a PNG of the same size whose opaque strokes are laid on the picture first")
    _add_sampling(command, "vary.png")

    command = add("scene", scene, "a picture built up by edits, one after the other",
                  "example:\n  glide scene \"a cozy living room\" --edit wall.png \"a painting of a corgi\" --edit floor.png \"a round table\"")
    command.add_argument("prompt", nargs="?", help="of the picture to begin with, unless --image gives it")
    command.add_argument("--image", help="a picture to begin with; its centred square is used")
    command.add_argument("--edit", nargs=2, action="append", required=True, metavar=("MASK", "PROMPT"),
                         help="a PNG that is transparent where to paint, and what; may be repeated, in order")
    _add_sampling(command, "scene.png", "PNGs to write, with the number of the edit before the ending (default: %(default)s)")

    command = add("reproduce", reproduce, "make a picture again from the recipe in its PNG, and compare the two")
    command.add_argument("picture", help="a PNG that glide wrote")
    for role in ("base", "upsampler", "clip"):
        command.add_argument(f"--{role}", type=Path, help="where its weights are now (default: where they were; they must be the same)")
    command.add_argument("--out", type=Path, help="write the new picture here")

    command = add("import-released", import_released, "OpenAI's published checkpoints as weights files of ours, checked key by key",
                  "examples:\n  glide import-released base.pt\n  glide import-released image-enc.pt text-enc.pt --vocabulary "
                  "bpe_simple_vocab_16e6.txt.gz\nPickled code is refused, never run.")
    command.add_argument("files", nargs="+", help="base.pt, base-inpaint.pt, upsample.pt or upsample-inpaint.pt; or both encoders of CLIP")
    command.add_argument("--vocabulary", help="CLIP's bpe_simple_vocab_16e6.txt.gz")
    command.add_argument("--out", type=Path, help="weights file to write (default: runs/NAME/weights.safetensors)")

    command = add("export-released", export_released, "a weights file of ours under the released names, as a .pt file")
    command.add_argument("weights", type=Path, help="a weights file of a base model, an upsampler or noised CLIP")
    command.add_argument("--out", type=Path, help=".pt file to write; CLIP's two encoders add their names (default: beside the weights)")

    command = add("serve", serve, "the OpenAI Images API for trained weights, on Ray Serve")
    command.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine only; there is no authentication yet")
    command.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    _add_weights(command)

    command = add("info", info, "parameters by part, memory and operations of a preset")
    command.add_argument("preset", help=names)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; may be repeated")

    command = add("bench", bench, "measure this machine, or what trained models do; prints one line of JSON")
    command.add_argument("what", choices=["forward", "sample", "samplers", "inpainting", "guidance"],
                         help="forward: one network call; sample: one guided step as a ratio to the released form; of trained models, "
                              "samplers: distance to 250 DDIM steps; inpainting: error at a hole's border, of --base and of --inpaint; "
                              "guidance: score by --clip over the guidance scale")
    command.add_argument("--base", type=Path, default=BASE, help="default: %(default)s")
    command.add_argument("--inpaint", type=Path, default=Path("runs/nano-base-inpaint/weights.safetensors"), help="default: %(default)s")
    command.add_argument("--clip", type=Path, default=Path("runs/nano-clip/weights.safetensors"), help="default: %(default)s")
    command.add_argument("--corpus", type=Path, default=Path("runs/corpus/held_out"), help="pictures to inpaint (default: %(default)s)")
    command.add_argument("--preset", help="default: paper-base for forward, filtered-base for sample")
    command.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="default: %(default)s")
    command.add_argument("--repeats", type=_positive, help="default: 1 for forward, 5 pairs for sample")
    return parser


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument("--base", type=Path, default=BASE, help="weights of the base model (default: %(default)s)")
    command.add_argument("--upsampler", type=Path, default=UPSAMPLER, help="weights of the upsampler (default: %(default)s)")
    command.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="default: fp16 on a GPU, fp32 on a CPU")


def _add_sampling(command: argparse.ArgumentParser, out: str, help_out: str = "PNG to write (default: %(default)s)") -> None:
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same picture (default: %(default)s)")
    command.add_argument("--sampler", help="ancestral, ddim, plms or dpm++, the last for 15 to 30 steps (default: the model's own)")
    command.add_argument("--steps", help="base model: a number, or a respacing such as 10,10,3,2,2 (default: the model's own)")
    command.add_argument("--upsampler-steps", help="likewise for the upsampler")
    command.add_argument("--guidance-scale", type=float, help="how strongly the prompt pulls; 1 is none (default: the model's own)")
    command.add_argument("--clip", type=Path, help="weights of noised CLIP, or the folder of a public CLIP, for --clip-scale and --best-of")
    command.add_argument("--clip-scale", type=float, default=0.0, help="how strongly CLIP pulls, beside the other guidance (default: 0, none)")
    command.add_argument("--guidance-interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"),
                         help="guide only between these parts of the noise, 1 the noisiest (default: 0 1)")
    command.add_argument("--no-upsampler", action="store_true", help="stop at the base model's size")
    command.add_argument("--out", type=Path, default=Path(out), help=help_out)
    _add_weights(command)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 upwards")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
