"""`glide demo`: from the shipped weights to a style of one's own, on this machine, in minutes.

Each stage stores its result on disk and is skipped if that exists, so an interrupted demo resumes.
The page shows the results so far.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from ... import storage
from ...config.data import CleanConfig
from ...pretrained import shipped
from .page import PAGE, write_page
from .plan import STYLE, Plan
from .results import Result, Results

log = logging.getLogger(__name__)


def run(out: Path, plan: Plan = Plan(), packages: Path | None = None) -> None:
    """Run the demo in the folder `out`. Raises UserError.

    `packages`: folder of npm tarballs; None fetches them with npm.
    """
    began, results, pair = time.monotonic(), Results(out), shipped.find()
    models = {
        "base": storage.fingerprint(pair.base),
        "upsampler": storage.fingerprint(pair.upsampler),
    }
    try:
        sheet = _sheet(results, plan, pair, models)
        log.info(f"  {_place(out, sheet)}")
        write_page(out)
        _corpus(results, packages)
        write_page(out)
        tuned = _tuned(results, plan, pair, models)
        log.info(f"  held-out loss {tuned['before']:.4f} -> {tuned['after']:.4f}")
        write_page(out)
        _answers(results, plan, pair, models, tuned)
        write_page(out)
    finally:
        from ...distributed.cluster import disconnect

        disconnect()
    log.info(_summary(results, (time.monotonic() - began) / 60))


# -- stages --------------------------------------------------------------------------------------


def _sheet(results: Results, plan: Plan, pair: shipped.Pair, models: dict[str, str]) -> Result:
    log.info(
        f"\n[1/4] {len(plan.things)} things in {len(plan.styles)} styles, from the shipped weights"
    )
    from .sheet import make_sheet

    key = {
        **models,
        "things": plan.things,
        "styles": plan.styles,
        "options": plan.sheet_options.model_dump(),
    }
    return results.cached_result("sheet", key, lambda: make_sheet(results.folder, plan, pair))


def _corpus(results: Results, packages: Path | None) -> Result:
    log.info(
        f"\n[2/4] a corpus in a style that they have not seen, {STYLE}: fetch, render, clean "
        "with Ray Data"
    )
    from .tuning import make_corpus

    key = {"style": STYLE, "clean": CleanConfig().model_dump()}
    return results.cached_result("corpus", key, lambda: make_corpus(results.folder, packages))


def _tuned(results: Results, plan: Plan, pair: shipped.Pair, models: dict[str, str]) -> Result:
    log.info(
        "\n[3/4] fine-tune the shipped base model on it: Ray Train, DeepSpeed ZeRO, two workers"
    )
    from .tuning import tune

    key = {"base": models["base"], "settings": plan.settings}
    return results.cached_result("tuning", key, lambda: tune(results.folder, plan, pair.base))


def _answers(
    results: Results,
    plan: Plan,
    pair: shipped.Pair,
    models: dict[str, str],
    tuned: Result,
) -> Result:
    log.info(
        "\n[4/4] serve both models with Ray Serve, and request pictures over the OpenAI Images API"
    )
    from .asking import ask

    weights = results.folder / tuned["weights"]
    key = {**models, "tuned": storage.fingerprint(weights), **plan.asked()}
    return results.cached_result(
        "answers", key, lambda: ask(results.folder, plan, pair, weights, tuned["name"])
    )


# -- summary -------------------------------------------------------------------------------------


def _place(out: Path, sheet: Result) -> str:
    return f"{out / sheet['files'][0]} ({sheet['seconds']:g} s)"


def _summary(results: Results, minutes: float) -> str:
    out, tuned = results.folder, _result(results, "tuning")
    return f"""
Done in {minutes:.1f} minutes. Everything is on one page: {out / PAGE}
{_times(results)}

Try next:
  glide generate "a fox, flat icon" --seed 3
  glide generate "a fox, {STYLE}" --base {out / tuned["weights"]}
  glide serve                      # then POST to http://127.0.0.1:8000/v1/images/generations"""


def _times(results: Results) -> str:
    """Seconds of each stage, as measured when it ran."""
    names = {"sheet": "sheet", "corpus": "corpus", "tuning": "fine-tuning", "answers": "serving"}
    times = (f"{name} {_result(results, stage)['seconds']:g} s" for stage, name in names.items())
    return f"Seconds of each stage: {', '.join(times)}."


def _result(results: Results, stage: str) -> Result:
    found = results.read(stage)
    assert found is not None  # the summary comes after all stages
    return found
