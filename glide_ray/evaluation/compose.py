"""`glide compose`: generate pictures for prompts of known content, and score them with the judge.

Results are reported by category as in GenEval (Ghosh et al. 2023), beside those of real pictures.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import storage
from ..config.sampling import SampleOptions
from ..data.images import area_downsample
from ..errors import UserError
from ..progress import Progress
from ..records import cached_result
from ..sampling.cascade import Cascade
from ..sampling.recipe import ModelSet, Recipe, save_picture, stored_picture
from .cases import Case, Row, first_seed, make_cases, single_cases
from .categories import INPAINTING, KNOWN_PIXELS, LINES, MIN_ACCURACY, NEW, Line
from .judge import Judge, Verdict, kind_of_size
from .pages import Picture, Section, page
from .regions import resized

log = logging.getLogger(__name__)

FIGURES, PAGE, PICTURES, REAL = "figures.json", "report.html", "pictures", "real.json"
PROMPTS_PER_CALL = 8  # batch size of the cascade
DRAWS = 2000  # bootstrap draws
PICTURES_SHOWN = 60  # maximum pictures per category on the page


class ComposeError(UserError):
    """A request that cannot be generated or scored."""


@dataclass(frozen=True)
class ComposeRun:
    """Settings of one run of `glide compose`.

    `count`: number of prompts of each of `categories`.
    `size`: side of the pictures in pixels.
    `out`: folder of the results.
    `new_style`: rows of an additional style, the source of the prompts of category NEW.
    """

    judge: Judge
    corpus: str
    out: Path
    count: int
    categories: Sequence[str]
    size: int
    seed: int = 0
    options: SampleOptions = SampleOptions()
    new_style: Sequence[Row] = ()

    def score_real(self) -> list[dict[str, Any]]:
        """Figures of the prompts' real pictures."""
        cases = self._cases()
        real = self._real(cases)
        return score_lines(self.judge, cases, real, real, self.size)

    def score_models(
        self,
        cascade: Cascade,
        progress: Progress | None = None,
    ) -> list[dict[str, Any]]:
        """Generate and judge the pictures, write the report, and return the figures.

        Raises ComposeError, CorpusError, RequestError.
        """
        check_inpainting(cascade, self.categories)
        cases = self._cases()
        real = self._real(cases)
        pictures = make_pictures(cascade, cases, self.out / PICTURES, self.options, progress)
        log.info(f"judging {len(pictures):,} pictures")
        verdicts = judge_pictures(self.judge, cases, pictures)
        rows = score_lines(self.judge, cases, verdicts, real, self.size)
        recipe = ModelSet.of(cascade).recipe("generate", "", self.seed, self.options)
        settings = {
            "models": {role: model.model_dump() for role, model in recipe.models.items()},
            **({"loras": [one.model_dump() for one in recipe.loras]} if recipe.loras else {}),
            "options": recipe.options.model_dump(),
            "made_with": recipe.made_with,
            "corpus": self.corpus,
            "prompts": self.count,
        }
        write_report(self.out, settings, rows, self.judge, cases, pictures, verdicts)
        return rows

    def _cases(self) -> list[Case]:
        cases = make_cases(
            self.corpus, self.judge.vocabulary, self.count, self.categories, self.seed
        )
        return cases + single_cases(NEW, self.new_style, self.count, first_seed(NEW, self.seed))

    def _real(self, cases: Sequence[Case]) -> list[dict[str, Verdict]]:
        """Verdicts on the prompts' real pictures, cached in the folder `out`."""

        def judge_real() -> dict[str, Any]:
            verdicts = judge_pictures(
                self.judge, cases, [real_picture(case, self.size) for case in cases]
            )
            rows = [{name: asdict(verdict) for name, verdict in row.items()} for row in verdicts]
            return {"verdicts": rows}

        key = _fingerprint(cases, self.size, self.judge)
        found, _ = cached_result(str(self.out / REAL), key, judge_real)
        return [
            {question: Verdict(**verdict) for question, verdict in row.items()}
            for row in found["verdicts"]
        ]


def check_inpainting(cascade: Cascade, categories: Sequence[str]) -> None:
    """Raise ComposeError if `categories` needs inpainting and the models cannot inpaint."""
    if INPAINTING in categories and not all(
        stage.config.inpaint for stage in (cascade.base, cascade.upsampler) if stage
    ):
        raise ComposeError(
            "These models were not trained to inpaint; give inpainting forms with --base and "
            "--upsampler, or leave the category inpainting out with --categories."
        )


def _fingerprint(cases: Sequence[Case], size: int, judge: Judge) -> str:
    """Cache key of the verdicts on the real pictures: digest of cases, size and judge."""
    digest = hashlib.sha256(f"{size}{judge.digest()}".encode())
    for case in cases:
        digest.update(
            f"{case.category}{case.prompt}{json.dumps(case.labels, sort_keys=True)}".encode()
            + case.picture.tobytes()
        )
    return digest.hexdigest()


# -- pictures --------------------------------------------------------------------------------------


def make_pictures(
    cascade: Cascade,
    cases: Sequence[Case],
    out: str | Path,
    options: SampleOptions,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """A generated picture for each case, uint8 (S, S, 3), stored in `out` with its recipe.

    A picture already in `out` from the same models and options is not generated again.
    """
    model_set, pictures = ModelSet.of(cascade), {}
    jobs = [_Job.of(case, cascade.size, model_set, options, Path(out)) for case in cases]
    for n, job in enumerate(jobs):
        stored = job.stored()
        if stored is not None:
            pictures[n] = stored
    for batch in _batches(jobs):
        missing = [n for n in batch if n not in pictures]
        if not missing:
            continue
        # Regenerate the whole batch: a picture's last bits may depend on the others in its batch.
        for n, picture in zip(batch, _generate(cascade, [jobs[n] for n in batch]), strict=True):
            if n in missing:
                save_picture(picture, jobs[n].path, jobs[n].recipe, jobs[n].inputs)
                pictures[n] = picture
        if progress:
            progress(len(pictures), len(cases))
    return [pictures[n] for n in range(len(cases))]


@dataclass(frozen=True)
class _Job:
    """A picture to generate: recipe, inputs and output path."""

    recipe: Recipe
    inputs: Mapping[str, np.ndarray]
    path: Path

    @classmethod
    def of(
        cls, case: Case, size: int, model_set: ModelSet, options: SampleOptions, out: Path
    ) -> _Job:
        task, inputs = "generate", {}
        if case.hole is not None:
            known = _known_pixels(case.hole, size)
            task, inputs = (
                "edit",
                {
                    "image": np.where(known[..., None], real_picture(case, size), 255).astype(
                        np.uint8
                    ),
                    "mask": known,
                },
            )
        return cls(
            model_set.recipe(task, case.prompt, case.seed, options),
            inputs,
            out / f"{case.category}-{case.seed:04d}.png",
        )

    def stored(self) -> np.ndarray | None:
        """The stored picture; None if missing or made from another recipe or other inputs."""
        return stored_picture(self.path, self.recipe, self.inputs)


def _batches(jobs: Sequence[_Job]) -> Iterator[list[int]]:
    """Batches as lists of indices: PROMPTS_PER_CALL prompts each, edits one by one."""
    prompts = [n for n, job in enumerate(jobs) if not job.inputs]
    yield from (
        prompts[start : start + PROMPTS_PER_CALL]
        for start in range(0, len(prompts), PROMPTS_PER_CALL)
    )
    yield from ([n] for n, job in enumerate(jobs) if job.inputs)


def _generate(cascade: Cascade, jobs: Sequence[_Job]) -> list[np.ndarray]:
    recipes = [job.recipe for job in jobs]
    if jobs[0].inputs:
        return [
            cascade.edit(
                job.inputs["image"],
                job.inputs["mask"],
                job.recipe.prompt,
                job.recipe.seed,
                job.recipe.options,
            )
            for job in jobs
        ]
    return cascade.generate(
        [recipe.prompt for recipe in recipes],
        [recipe.seed for recipe in recipes],
        recipes[0].options,
    )


def real_picture(case: Case, size: int) -> np.ndarray:
    """A case's real picture at the size of the generated ones."""
    return area_downsample(case.picture, size)


def _known_pixels(hole: np.ndarray, size: int) -> np.ndarray:
    factor = len(hole) // size
    return np.asarray(~hole.reshape(size, factor, size, factor).any(axis=(1, 3)))


# -- scores ----------------------------------------------------------------------------------------


def judge_pictures(
    judge: Judge, cases: Sequence[Case], pictures: Sequence[np.ndarray]
) -> list[dict[str, Verdict]]:
    """The judge's verdicts, and for edits whether the known pixels are unchanged."""
    verdicts = judge.verdicts(cases, pictures)
    for case, picture, answers in zip(cases, pictures, verdicts, strict=True):
        if case.hole is not None:
            known = _known_pixels(case.hole, len(picture))
            equal = np.array_equal(picture[known], real_picture(case, len(picture))[known])
            answers[KNOWN_PIXELS] = Verdict(equal, "as given" if equal else "changed")
    return verdicts


def score_lines(
    judge: Judge,
    cases: Sequence[Case],
    verdicts: Sequence[Mapping[str, Verdict]],
    real: Sequence[Mapping[str, Verdict]],
    size: int,
) -> list[dict[str, Any]]:
    """A row for each of LINES that has pictures.

    A row holds the share answered correctly with its 95% interval, the share for the real pictures
    of the same prompts, the ratio of the two with its interval, the bar, and `measurable`: whether
    the judge is accurate enough to report a figure.
    """
    rows = []
    for line in LINES:
        chosen = [
            n
            for n, case in enumerate(cases)
            if case.category == line.category and (case.new_colour or not line.new_colours)
        ]
        if not chosen or line.question not in verdicts[chosen[0]]:
            continue
        right, right_real = (
            np.array([row[n][line.question].right for n in chosen], float)
            for row in (verdicts, real)
        )
        rows.append(
            _score(line, right, right_real, judge.measurable(size, line.category, line.question))
        )
    return rows


def _score(line: Line, right: np.ndarray, real: np.ndarray, measurable: bool) -> dict[str, Any]:
    row = {**asdict(line), "pictures": len(right), "measurable": measurable}
    if not measurable:
        return row
    low, high = wilson(int(right.sum()), len(right))
    share, share_low, share_high = share_of_real(right, real)
    value = share if line.of_real else right.mean()
    return {
        **row,
        "right": float(right.mean()),
        "low": low,
        "high": high,
        "real": float(real.mean()),
        "share": share,
        "share_low": share_low,
        "share_high": share_high,
        "reached": None if line.bar is None else bool(value >= line.bar),
    }


def wilson(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): low, high."""
    z, share = 1.959964, right / count
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def share_of_real(right: np.ndarray, real: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Ratio of two means over the same prompts, and its 95% interval (low, high).

    The interval is a bootstrap over prompts.
    """
    draws = np.random.default_rng(seed).integers(0, len(right), (DRAWS, len(right)))
    ratios = right[draws].mean(1) / real[draws].mean(1).clip(1 / len(right))
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(right.mean() / max(real.mean(), 1 / len(right))), float(low), float(high)


# -- the report ------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The figures as rows of text, the heading first."""
    head = ["", "pictures", "right", "95% interval", "real pictures", "share of real", "bar"]
    return [head, *([row["about"], str(row["pictures"]), *_cells(row)] for row in rows)]


def _cells(row: Mapping[str, Any]) -> list[str]:
    if not row["measurable"]:
        return ["not measurable", "", "", "", ""]
    bar = ""
    if row["bar"] is not None:
        reached = "reached" if row["reached"] else "not reached"
        bar = f"{row['bar']:.0%}{' of real' if row['of_real'] else ''}: {reached}"
    return [
        f"{row['right']:.1%}",
        f"{row['low']:.1%} to {row['high']:.1%}",
        f"{row['real']:.1%}",
        f"{row['share']:.2f} ({row['share_low']:.2f} to {row['share_high']:.2f})",
        bar,
    ]


def judge_table(judge: Judge, size: int) -> list[list[str]]:
    """The judge's accuracy on real pictures that it was not fitted to, as rows of text."""
    known = judge.accuracy.get(kind_of_size(size), {})
    rows = [
        [
            category,
            question,
            f"{accuracy['right']:.1%}",
            str(accuracy["pictures"]),
            f"{MIN_ACCURACY[question]:.0%}",
            "" if judge.measurable(size, category, question) else "not measurable",
        ]
        for category, questions in known.items()
        for question, accuracy in questions.items()
    ]
    return [["category", "question", "right", "real pictures", "needed", ""], *rows]


def write_report(
    out: str | Path,
    settings: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    judge: Judge,
    cases: Sequence[Case],
    pictures: Sequence[np.ndarray],
    verdicts: Sequence[Mapping[str, Verdict]],
) -> None:
    """Write FIGURES and PAGE to the folder `out`."""
    out, size = Path(out), len(pictures[0])
    shown = [
        {
            "category": case.category,
            "prompt": case.prompt,
            "seed": case.seed,
            "verdicts": {question: asdict(verdict) for question, verdict in answers.items()},
        }
        for case, answers in zip(cases, verdicts, strict=True)
    ]
    found = {
        **settings,
        "size": size,
        "lines": list(rows),
        "judge": judge.accuracy,
        "pictures": shown,
    }
    storage.put(json.dumps(found, indent=1, ensure_ascii=False).encode(), out / FIGURES)
    sections = [
        Section("Figures", f"Of {len(pictures):,} pictures of {size} pixels.", table=table(rows)),
        Section(
            "The judge on real pictures",
            "Not measurable: the judge is right less often than needed.",
            table=judge_table(judge, size),
        ),
    ]
    for category in dict.fromkeys(case.category for case in cases):
        chosen = [n for n, case in enumerate(cases) if case.category == category][:PICTURES_SHOWN]
        groups = [
            [Picture(resized(pictures[n], max(size, 112)), _label(cases[n], verdicts[n]))]
            for n in chosen
        ]
        sections.append(Section(category, groups=groups))
    storage.put(page("Pictures made for prompts of known content", sections).encode(), out / PAGE)


def _label(case: Case, verdicts: Mapping[str, Verdict]) -> str:
    answers = "; ".join(
        f"{question}: {'right' if verdict.right else f'wrong ({verdict.found})'}"
        for question, verdict in verdicts.items()
    )
    return f"{case.prompt} — {answers}"
