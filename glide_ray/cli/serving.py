"""Commands of the server: serve and key."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from ..config.models import SHIPPED
from ..config.serving import ServeConfig
from .arguments import (
    Commands,
    add_guiding_clip,
    add_settings,
    add_weights,
    local_path,
    positive,
)

# Settings that have an option of their own or, for more_models, need a file
WITH_OPTION = {
    *("base", "upsampler", "clip", "loras", "keys", "host", "port", "precision", "more_models"),
}


def add_commands(commands: Commands) -> None:
    _add_serve(commands)
    _add_key(commands)


# -- serve -----------------------------------------------------------------------------------------


def _add_serve(commands: Commands) -> None:
    values = "  ".join(f"{name}={value}" for name, value in _settings(ServeConfig()).items())
    command = commands.add(
        "serve",
        serve,
        "serve trained weights over the OpenAI Images API, on Ray Serve",
        f"settings, as --set KEY=VALUE:\n  {values}\nexamples:\n"
        "  glide serve --clip runs/nano-clip/weights.safetensors\n"
        "  glide serve --host 0.0.0.0 --keys keys.json --set base_scale.max_replicas=4",
    )
    command.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (default: %(default)s, this machine only; any other needs "
        "--keys)",
    )
    command.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default: %(default)s)"
    )
    add_guiding_clip(command)
    command.add_argument("--keys", help="file of API keys that `glide key` writes")
    add_settings(command)
    add_weights(command)


def _settings(config: ServeConfig) -> dict[str, object]:
    """Settings by dotted name, without those in WITH_OPTION."""
    found: dict[str, object] = {}
    for name, value in config.model_dump(exclude=WITH_OPTION).items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found[name] = value
    return found


def serve(options: Namespace) -> None:
    config = _serve_config(options)
    from ..distributed.cluster import connect, is_connected
    from ..serving.deployment import build_application, check_port, cpus, serving

    build_application(config)  # reports a missing file before Ray starts
    if not is_connected():
        check_port(config)
    connect(cpus(config))
    with serving(config) as url:
        print(
            f"{url}/v1/images/generations  (documentation at {url}/docs; Ctrl-C ends it)",
            flush=True,
        )
        import threading

        threading.Event().wait()


def _serve_config(options: Namespace) -> ServeConfig:
    from ..config.overrides import override, validate

    settings = {
        name: getattr(options, name) for name in ("host", "port", "precision", "clip", "keys")
    }
    settings |= {"base": str(options.base), "loras": options.lora}
    if options.upsampler:
        settings["upsampler"] = str(options.upsampler)
    config = override(validate(ServeConfig, settings), options.set)
    if options.upsampler is None and config.upsampler == SHIPPED:
        from ..pretrained.shipped import upsampler_for

        config = config.model_copy(update={"upsampler": upsampler_for(config.base)})
    return config


# -- key -------------------------------------------------------------------------------------------


def _add_key(commands: Commands) -> None:
    command = commands.add(
        "key",
        key,
        "create an API key for the server; the file keeps only its hash",
        "example:\n  glide key ann --per-minute 60\n"
        "To revoke a key, delete its name from the file and restart or redeploy the server.",
    )
    command.add_argument("name", help="name of the key's owner, for the server's log")
    command.add_argument(
        "--keys",
        type=local_path,
        default=Path("keys.json"),
        help="file of API keys to add to (default: %(default)s)",
    )
    command.add_argument(
        "--at-once",
        type=positive,
        metavar="IMAGES",
        help="images in progress for this key at a time (default: up to the server's own limit)",
    )
    command.add_argument(
        "--per-minute",
        type=positive,
        metavar="IMAGES",
        help="images that this key may request per minute (default: no limit)",
    )


def key(options: Namespace) -> None:
    from ..serving.api_keys import new_key

    key = new_key(options.name, options.keys, options.at_once, options.per_minute)
    print(
        f"{key}\n"
        f"It is shown only now; {options.keys} keeps its hash. Serve with --keys {options.keys}."
    )
