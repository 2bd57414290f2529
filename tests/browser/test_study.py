"""Human comparisons of pictures: pairs, turns, `glide rate` in browsers, `glide elo`."""

import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from helpers.drawings import COLOURS
from PIL import Image, PngImagePlugin

from glide_ray.cli.main import main
from glide_ray.errors import UserError
from glide_ray.evaluation import study, tables
from glide_ray.evaluation.pairing import BLOCK, FIRST, SECOND, Comparison, next_turn
from glide_ray.evaluation.votes import PREFETCHED_COMPARISONS, StudyDefinition, Votes

GLIDE = os.path.join(os.path.dirname(sys.executable), "glide")
# Each model paints in its own colour.
MODELS = {
    "zanzibar": (200, 40, 40),
    "quixote": (40, 200, 40),
    "umbrella": (40, 40, 200),
}
CHROMIUM, DRIVER = "/usr/bin/chromium", "/usr/bin/chromedriver"
browsing = pytest.mark.skipif(
    not (os.path.exists(CHROMIUM) and os.path.exists(DRIVER)),
    reason="no browser is here: apt-get install chromium chromium-driver",
)


def bulk(folder, colour, prompts, seeds=None):
    """A folder like that of bulk generation; the PNGs name their model, as those of glide do."""
    (folder / "00000").mkdir(parents=True)
    lines, text = [], PngImagePlugin.PngInfo()
    text.add_text("recipe", folder.name)
    for n, prompt in enumerate(prompts):
        pixels = np.full((32, 32, 3), colour, np.uint8)
        pixels[4:8, n % 28 : n % 28 + 4] = n
        Image.fromarray(pixels).save(folder / "00000" / f"{n:09d}.png", pnginfo=text)
        lines.append(
            json.dumps(
                {
                    "file_name": f"00000/{n:09d}.png",
                    "text": prompt,
                    "seed": n if seeds is None else seeds[n],
                }
            )
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("bulk")
    return {
        name: bulk(root / name, colour, [f"thing number {n} <i>&amp;" for n in range(30)])
        for name, colour in MODELS.items()
    }


@contextmanager
def rating(*arguments):
    """Run `glide rate` in its own process; yields its link and the process."""
    server = subprocess.Popen(
        [GLIDE, "rate", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output = []
        for line in server.stdout:
            output.append(line)
            if line.startswith("http"):
                break
        else:
            raise AssertionError("".join(output))
        threading.Thread(target=server.stdout.read, daemon=True).start()
        yield line.split()[0], server
    finally:
        with suppress(ProcessLookupError):
            server.send_signal(signal.SIGINT)
        server.wait(20)


def folder_arguments(folders):
    return [f"{name}={folder}" for name, folder in folders.items()]


def database(
    tmp_path, count=12, models=("a", "b"), checks=3, questions=("photorealism", "caption")
):
    """A study in SQLite without pictures."""
    votes = Votes(f"sqlite:///{tmp_path}/votes.sqlite")
    votes.begin(StudyDefinition({name: name for name in models}, questions, count), "secret")
    votes.add_comparisons(make_comparisons(count, models, checks, questions))
    return votes


def make_comparisons(count, models, checks, questions=("photorealism", "caption")):
    pairs = [(one, other) for n, one in enumerate(models) for other in models[n + 1 :]]
    rows = [
        (*pairs[n % len(pairs)], f"p{n}", f"{2 * n:016x}", f"{2 * n + 1:016x}", None)
        for n in range(count)
    ]
    rows += [
        ("", "", "check", f"{n:016x}", "f" * 16, question)
        for question in questions
        for n in range(checks)
    ]
    return [Comparison(n, *row) for n, row in enumerate(rows, 1)]


def browse(size=(1280, 800), phone=False):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tempfile.mkdtemp(prefix="glide-browser-")
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
        "--window-size={},{}".format(*size),
    ):
        options.add_argument(argument)
    if phone:
        options.add_experimental_option(
            "mobileEmulation",
            {
                "deviceMetrics": {
                    "width": size[0],
                    "height": size[1],
                    "pixelRatio": 2,
                    "touch": True,
                    "mobile": True,
                }
            },
        )
    # With the path of the driver, Selenium does not search for one.
    browser = webdriver.Chrome(options, Service(DRIVER))
    browser.profile = profile
    return browser


@contextmanager
def browsers(*settings):
    opened = []
    try:
        opened.extend(browse(**options) for options in settings)
        yield opened
    finally:
        for browser in opened:
            browser.quit()
            shutil.rmtree(browser.profile, ignore_errors=True)


def seen(browser, before=None, seconds=90):
    """(question, left, right) once the page shows others than `before` and accepts an answer.

    None at the end of the study.
    """
    script = (
        "const at = id => document.getElementById(id), "
        "name = id => at(id).getAttribute('src').match(/([0-9a-f]{16}).png/)[1];\n"
        "        if (!at('end').hidden) return 'end';\n"
        "        return ready && !at('asking').hidden ? [at('question').textContent, "
        "name('left-picture'), name('right-picture')] : null"
    )
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = browser.execute_script(script)
        if found and found != before:
            return None if found == "end" else found
        time.sleep(0.02)
    raise AssertionError(
        f"the page asks nothing new: {browser.execute_script('return document.body.innerText')}"
    )


def key(browser, answer):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(browser).send_keys(
        {"left": Keys.ARROW_LEFT, "right": Keys.ARROW_RIGHT, "tie": Keys.ARROW_DOWN}[answer]
    ).perform()


def tap(browser, answer):
    """Answer by a touch at the middle of the element on the screen."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder
    from selenium.webdriver.common.actions.interaction import POINTER_TOUCH
    from selenium.webdriver.common.actions.pointer_input import PointerInput

    actions = ActionBuilder(browser, PointerInput(POINTER_TOUCH, "finger"), duration=0)
    actions.pointer_action.move_to(browser.find_element("id", answer)).pointer_down().pointer_up()
    actions.perform()


def painters(folder):
    """The model of each picture of a study, by the picture's opaque name; None for noise."""
    found = {}
    for path in Path(folder, "pictures").glob("*.png"):
        corner = np.asarray(Image.open(path))[20:].reshape(-1, 3)
        found[path.stem] = next(
            (name for name, colour in MODELS.items() if (corner == colour).all()), None
        )
    return found


def rate(browser, number, painted, act, count, reload_at=None):
    """Rate `count` pairs; returns (question, first, second, won) from the pictures shown.

    Passes all attention checks, and mostly prefers zanzibar.
    """
    answered, turn = [], None
    for n in range(count):
        if n == reload_at:
            before = seen(browser, turn)
            browser.refresh()
            assert seen(browser) == before  # resumes where the rater was
            turn = None
        turn = seen(browser, turn)
        question, left, right = turn
        best = min(
            ("left", painted[left]),
            ("right", painted[right]),
            key=lambda side: ("zanzibar", "quixote", "umbrella", None).index(side[1]),
        )
        check = None in (painted[left], painted[right])
        answer = (
            best[0]
            if check
            else "tie"
            if n % 7 == 3
            else {"left": "right", "right": "left"}[best[0]]
            if n % 5 == number
            else best[0]
        )
        act(browser, answer)
        if not check:
            answered.append(
                (
                    question,
                    painted[left],
                    painted[right],
                    {"left": 1.0, "right": 0.0, "tie": 0.5}[answer],
                )
            )
    browser.execute_async_script(
        "const done = arguments[0]; const look = () => "
        "sending || waiting().length ? setTimeout(look, 20) : done(); look()"
    )
    return answered


def count_wins(answered, question):
    """Wins (3, 3), counted one by one."""
    order, table = list(MODELS), np.zeros((3, 3))
    for one, left, right, won in answered:
        if one == question:
            table[order.index(left), order.index(right)] += won
            table[order.index(right), order.index(left)] += 1 - won
    return table


@browsing
@pytest.mark.parametrize("votes", [60, pytest.param(100, marks=pytest.mark.slow)])
def test_two_concurrent_browsers_cast_blind_votes_and_each_is_counted(
    votes, folders, tmp_path, capsys
):
    with (
        rating(
            *folder_arguments(folders),
            "--out",
            tmp_path / "study",
            "--comparisons",
            70,
            "--port",
            0,
        ) as (
            link,
            _,
        ),
        browsers({}, {"size": (390, 844), "phone": True}) as (desk, phone),
    ):
        painted, found = painters(tmp_path / "study"), {}
        for browser in (desk, phone):
            browser.get(link)
        threads = [
            threading.Thread(
                target=lambda number=number, browser=browser, act=act, at=at: found.update(
                    {number: rate(browser, number, painted, act, votes // 2, at)}
                )
            )
            for number, browser, act, at in ((0, desk, key, 20), (1, phone, tap, None))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {0, 1}  # neither thread failed
        for browser in (desk, phone):
            addresses = browser.execute_script(
                "return performance.getEntries().map(entry => entry.name).join(' ') "
                "+ location + document.cookie"
            )
            assert not re.search(
                "|".join(MODELS), browser.page_source + addresses
            ) and "<i>" not in browser.find_element("id", "caption").get_attribute("innerHTML")
            assert browser.execute_script(
                "return document.documentElement.scrollWidth <= innerWidth "
                "&& document.documentElement.scrollHeight <= innerHeight"
            )

    answered = found[0] + found[1]
    with sqlite3.connect(tmp_path / "study" / "votes.sqlite") as file:
        rows = file.execute(
            "select rater, count(*) from votes where answer is not null group by rater"
        ).fetchall()
        assert [count for _, count in rows] == [votes // 2, votes // 2]
        lefts = Counter(
            file.execute(
                "select left_picture, question, first, second "
                "from votes join comparisons on comparison = comparisons.id"
            ).fetchall()
        )
    # An imbalance of at most one for each rater.
    assert all(abs(lefts[(FIRST, *models)] - lefts[(SECOND, *models)]) <= 2 for _, *models in lefts)
    assert main(["elo", str(tmp_path / "study"), "--json", str(tmp_path / "elo.json")]) == 0
    printed, figures = capsys.readouterr().out, json.loads((tmp_path / "elo.json").read_text())
    assert figures["raters"] == 2 and figures["raters_left_out"] == 0
    from glide_ray.evaluation.elo import scores
    from glide_ray.evaluation.pairing import QUESTIONS

    for question, words in QUESTIONS.items():
        table, figures_of = count_wins(answered, words), figures["questions"][question]
        assert figures_of["votes"] == table.sum() == sum(vote[0] == words for vote in answered)
        for model, score in zip(MODELS, scores(table), strict=True):
            assert (
                figures_of["scores"][model]["score"] == pytest.approx(score)
                and f"{score:.1f}" in printed
            )
            for other, won in zip(MODELS, table[list(MODELS).index(model)], strict=True):
                if other != model:
                    assert figures_of["wins"][model][other]["share"] == pytest.approx(
                        won / (won + table[list(MODELS).index(other), list(MODELS).index(model)])
                    )


@browsing
def test_answers_given_during_an_outage_are_sent_afterwards_and_the_last_can_be_changed(
    folders, tmp_path
):
    out = tmp_path / "study"
    with browsers({}) as (browser,):
        with rating(*folder_arguments(folders), "--out", out, "--comparisons", 20, "--port", 0) as (
            link,
            server,
        ):
            browser.get(link + "&rater=ann")
            turn = seen(browser)
            server.kill()
            server.wait(10)
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(browser).click(browser.find_element("id", "left")).pause(
            0.12
        ).click().perform()
        # The next pictures are prefetched, and the second click was not taken as their answer.
        turn = seen(browser, turn)
        key(browser, "left")
        last = turn
        turn = seen(browser, turn)
        browser.find_element("id", "tie").click()
        assert "Your answers are kept" in browser.find_element("id", "status").text
        with rating("--out", out, "--port", httpx.URL(link).port):
            waiting_turn = seen(browser, turn)
            browser.find_element("id", "back").click()
            assert seen(browser, waiting_turn) == turn != last
            key(browser, "right")
            assert seen(browser, turn) == waiting_turn
            browser.execute_async_script(
                "const done = arguments[0]; const look = () => "
                "sending || waiting().length ? setTimeout(look, 20) : done(); look()"
            )
    with sqlite3.connect(out / "votes.sqlite") as file:
        rows = file.execute(
            "select rater, answer, left_picture from votes where answer is not null order by turn"
        ).fetchall()
    assert (
        [rater for rater, _, _ in rows] == ["ann"] * 3
        and [answer == left for _, answer, left in rows] == [True, True, False]
        and rows[2][1] != "tie"
    )


# -- HTTP ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyed(folders, tmp_path_factory):
    """The link of a server, which contains a key, and the server's folder."""
    out = tmp_path_factory.mktemp("keyed")
    with rating(*folder_arguments(folders), "--out", out, "--comparisons", 10, "--port", 0) as (
        link,
        _,
    ):
        yield link, out


def test_voting_and_viewing_require_the_key_of_the_link(keyed):
    link, out = keyed
    base = link.partition("?")[0]
    picture = next(Path(out, "pictures").glob("*.png")).name
    for client in (
        httpx.Client(base_url=base),
        httpx.Client(base_url=base, cookies={"glide_key": "wrong", "glide_rater": "ann"}),
    ):
        with client:
            answers = [
                client.get("/"),
                client.get("/?key=wrong"),
                client.get("/?rater=ann"),
                client.get("/turns"),
                client.get(f"/pictures/{picture}"),
                client.post("/votes", json={"token": "x", "answer": "tie"}),
            ]
            assert [answer.status_code for answer in answers] == [
                403
            ] * 6 and "glide_key" not in client.get("/").headers.get("set-cookie", "")
    with httpx.Client(follow_redirects=True) as client:
        page = client.get(link)
        assert (
            page.status_code == 200
            and "key=" not in str(page.url)
            and client.get(f"{base}pictures/{picture}").status_code == 200
        )


def test_responses_name_no_model_and_only_pictures_of_the_study_are_served(keyed):
    link, out = keyed
    base = link.partition("?")[0]
    with httpx.Client(follow_redirects=True) as client:
        answers = [client.get(link), client.get(f"{base}turns")]
        turn = answers[1].json()["turns"][0]
        answers += [client.get(f"{base}pictures/{turn[side]}.png") for side in ("left", "right")]
        answers += [
            client.post(
                f"{base}votes", json={"token": turn["token"], "answer": "left", "seconds": 1.5}
            )
        ]
        for answer in answers:
            assert answer.status_code == 200 and not re.search(
                "|".join(MODELS).encode(),
                answer.content + str(answer.headers).encode() + str(answer.url).encode(),
            )
            assert "last-modified" not in answer.headers
        # The metadata that named the model is removed from the PNG.
        assert not Image.open(io.BytesIO(answers[2].content)).info
        assert {turn["token"] for turn in answers[-1].json()["turns"]}.isdisjoint(
            {turn["token"]}
        ) and answers[-1].json()["done"] == 1
        for path in (
            "pictures/../votes.sqlite",
            "pictures/..%2fvotes.sqlite",
            "pictures/..%2fvotes.sqlite.png",
            "pictures/%2e%2e/x.png",
            "pictures/" + "0" * 16 + ".png",
            "openapi.json",
        ):
            assert client.get(httpx.URL(base + path)).status_code == 404, path
        refused = [
            client.post(f"{base}votes", json=body).status_code
            for body in (
                {"token": "nothing", "answer": "left"},
                {"token": turn["token"], "answer": "zanzibar"},
                {"token": turn["token"], "answer": "tie", "seconds": -1},
            )
        ]
        assert (
            refused == [404, 422, 422]
            and client.get(f"{base}?rater=%3Cscript%3E").status_code == 422
        )


def test_a_turn_belongs_to_one_rater_and_a_repeated_answer_changes_nothing(keyed):
    link, out = keyed
    base = link.partition("?")[0]
    with httpx.Client(follow_redirects=True) as ann, httpx.Client(follow_redirects=True) as bob:
        for client, name in ((ann, "ann"), (bob, "bob")):
            client.get(f"{link}&rater={name}")
        turn = ann.get(f"{base}turns").json()["turns"][0]
        # As after a reload or in another tab.
        assert ann.get(f"{base}turns").json()["turns"][0] == turn
        body = {"token": turn["token"], "answer": "left", "seconds": 2.0}
        assert bob.post(f"{base}votes", json=body).status_code == 404
        assert [
            ann.post(f"{base}votes", json={**body, "answer": answer}).json()["done"]
            for answer in ("left", "left", "tie")
        ] == [1, 1, 1]
    with sqlite3.connect(Path(out) / "votes.sqlite") as file:
        assert file.execute(
            "select answer = left_picture, seconds from votes where token = ?", (turn["token"],)
        ).fetchall() == [(1, 2.0)]


# -- database --------------------------------------------------------------------------------------


def test_concurrent_raters_and_tabs_lose_no_vote_and_duplicate_none(tmp_path):
    """Eight threads with separate connections, two for each rater, like servers and tabs."""
    database(tmp_path, 30)
    answered, url = [], f"sqlite:///{tmp_path}/votes.sqlite"

    def tab(rater):
        votes = Votes(url)
        while turns := votes.turns(rater, 4)[0]:
            assert votes.answer(rater, turns[0].token, "left", 1.0)
            answered.append((rater, turns[0].token))

    threads = [threading.Thread(target=tab, args=(f"r{n % 4}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cast = Votes(url).cast()
    assert (
        len(cast)
        == len(set(answered))
        == len({(vote.rater, vote.comparison.id, vote.question) for vote in cast})
    )
    assert Counter(
        (vote.comparison.id, vote.question) for vote in cast if not vote.comparison.check_of
    ) == {(n, question): 4 for n in range(1, 31) for question in ("photorealism", "caption")}


def test_a_comparison_is_reserved_for_its_viewer_and_reassigned_when_the_viewer_leaves(
    tmp_path, monkeypatch
):
    votes = database(tmp_path, PREFETCHED_COMPARISONS, checks=0, questions=("caption",))
    held = votes.turns("ann", 1)[0]
    assert len(held) == PREFETCHED_COMPARISONS and votes.turns("bob", 1) == ([], 0, 0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    assert (
        len(votes.turns("bob", 1)[0]) == PREFETCHED_COMPARISONS and votes.turns("ann", 1)[0] == held
    )


def answer_all(votes, rater, passes, count=1):
    while turns := votes.turns(rater, count)[0]:
        noise = next(
            (side for side in ("left", "right") if getattr(turns[0], side) == "f" * 16), None
        )
        other = {"left": "right", "right": "left"}
        votes.answer(
            rater,
            turns[0].token,
            "left" if noise is None else other[noise] if passes else noise,
            1.0,
        )


def test_raters_who_fail_the_attention_checks_are_excluded_and_replaced(tmp_path):
    votes = database(tmp_path, 40)
    answer_all(votes, "careless", False)
    answer_all(votes, "careful", True)
    ballot = tables.count(votes.cast())
    assert list(ballot.left_out) == ["careless"] and (ballot.raters, ballot.votes_left_out) == (
        2,
        80,
    )
    assert {question: len(question_votes) for question, question_votes in ballot.votes.items()} == {
        "photorealism": 40,
        "caption": 40,
    }
    assert {vote.rater for vote in votes.cast() if not vote.comparison.check_of} == {
        "careless",
        "careful",
    }
    printed = tables.text(tables.figures(ballot, draws=20))
    assert (
        "of 1 raters. Left out: 1 raters who failed more than 25%" in printed
        and "with 80 votes" in printed
        and "chosen in 100%" in printed
    )


def test_an_answer_changes_only_if_the_rater_goes_back(tmp_path):
    votes = database(tmp_path)
    turn = votes.turns("ann", 1)[0][0]
    answers = []
    for side, again in (("left", False), ("right", False), ("right", True), ("tie", True)):
        assert votes.answer("ann", turn.token, side, 1.0, again)
        answers.append(votes.cast()[0].answer)
    left = votes.cast()[0].left
    assert (
        answers == [left, left, {FIRST: SECOND, SECOND: FIRST}[left], "tie"]
        and len(votes.cast()) == 1
    )


# -- turns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_turns_are_balanced_and_complete_and_differ_between_raters(seed):
    random, comparisons, questions = (
        np.random.default_rng(seed),
        {comparison.id: comparison for comparison in make_comparisons(60, ("a", "b", "c"), 20)},
        ("photorealism", "caption"),
    )
    raters = {f"r{n}": [] for n in range(5)}
    while active := [
        rater
        for rater in raters
        if raters[rater] is not None and (not raters[rater] or raters[rater][-1])
    ]:
        rater = active[random.integers(len(active))]
        votes_of_others = Counter(
            (turn.comparison, turn.question)
            for other, had in raters.items()
            if other != rater
            for turn in had
            if turn
        )
        raters[rater].append(
            next_turn(
                f"secret {seed}", rater, comparisons, questions, raters[rater], votes_of_others, 2
            )
        )
    turns = {rater: [turn for turn in had if turn] for rater, had in raters.items()}
    votes = Counter(
        (turn.comparison, turn.question)
        for had in turns.values()
        for turn in had
        if not comparisons[turn.comparison].check_of
    )
    assert votes == {(n, question): 2 for n in range(1, 61) for question in questions}
    for had in turns.values():
        assert len({(turn.comparison, turn.question) for turn in had}) == len(had)
        for n in range(0, len(had) - BLOCK + 1, BLOCK):
            block = had[n : n + BLOCK]
            assert len({turn.question for turn in block}) == 1 or n + 2 * BLOCK > len(had)
            checks = [k for k, turn in enumerate(block) if comparisons[turn.comparison].check_of]
            assert len(checks) <= 1 and (n or 1 <= checks[0] <= BLOCK // 2)
        ahead = Counter()
        for turn in had:
            comparison = comparisons[turn.comparison]
            ahead[comparison.first, comparison.second, turn.question] += (
                1 if turn.left == FIRST else -1
            )
            assert abs(ahead[comparison.first, comparison.second, turn.question]) <= 1
    orders = {tuple(turn.comparison for turn in had[:10]) for had in turns.values()}
    assert len(orders) == 5


def test_the_first_side_and_the_first_comparison_of_a_rater_are_unpredictable():
    comparisons, questions = (
        {comparison.id: comparison for comparison in make_comparisons(20, ("a", "b"), 2)},
        ("photorealism", "caption"),
    )
    first = [
        next_turn("secret", f"rater {n}", comparisons, questions, [], {}, 1) for n in range(1000)
    ]
    # Bounds of 4.4 standard deviations.
    assert (
        430 < sum(turn.left == FIRST for turn in first) < 570
        and 430 < sum(turn.question == "caption" for turn in first) < 570
    )
    assert (
        all(20 < count < 90 for count in Counter(turn.comparison for turn in first).values())
        and len(Counter(turn.comparison for turn in first)) == 20
    )
    other = [
        next_turn("another", f"rater {n}", comparisons, questions, [], {}, 1) for n in range(1000)
    ]
    assert sum(turn == other_turn for turn, other_turn in zip(first, other, strict=True)) < 60


def test_the_comparisons_with_the_fewest_answers_are_shown_first():
    comparisons = {comparison.id: comparison for comparison in make_comparisons(20, ("a", "b"), 0)}
    votes_of_others = {(n, "caption"): 1 for n in comparisons if n not in (3, 11, 17)}
    had = []
    for _ in range(4):
        had.append(next_turn("secret", "ann", comparisons, ["caption"], had, votes_of_others, 2))
    assert {turn.comparison for turn in had[:3]} == {3, 11, 17} and had[3].comparison not in (
        3,
        11,
        17,
    )


# -- pairs -----------------------------------------------------------------------------------------


def test_pairs_share_prompt_and_seed_and_are_balanced_over_the_models(folders):
    found = {name: study.find_pictures(folder) for name, folder in folders.items()}
    pairs = study.choose_pairs(found, 60, "secret")
    assert (
        set(Counter((first, second) for first, second, _, _ in pairs).values()) == {20}
        and len(set(pairs)) == 60
    )
    assert all(
        (first.prompt, first.seed) == (second.prompt, second.seed) for _, _, first, second in pairs
    )
    assert (
        study.choose_pairs(found, 60, "secret") == pairs != study.choose_pairs(found, 60, "another")
    )
    assert len(study.choose_pairs(found, 1000, "secret")) == 90


def test_pictures_are_paired_by_seed_if_both_have_seeds_and_else_by_order(tmp_path, drawn_corpus):
    first = study.find_pictures(bulk(tmp_path / "one", (1, 1, 1), ["x", "x", "x"], [5, 6, 7]))["x"]
    second = study.find_pictures(bulk(tmp_path / "other", (2, 2, 2), ["x", "x"], [7, 9]))["x"]
    strange = study.find_pictures(bulk(tmp_path / "strange", (2, 2, 2), ["x", "x"], [70, 90]))["x"]
    assert [(a.seed, b.seed) for a, b in study.pairs_of(first, second)] == [(7, 7)]
    assert [(a.seed, b.seed) for a, b in study.pairs_of(first, strange)] == [(5, 70), (6, 90)]
    real = study.find_pictures(str(drawn_corpus / "held_out"))
    # A study accepts any corpus, with all captions of its images.
    assert (
        len(real["a red ellipse"]) == len(real["a blue rectangle"]) == 2
        and real["a red ellipse"][0].seed is None
    )


def test_an_interrupted_study_is_rebuilt_and_real_pictures_serve_as_caption_checks(
    folders, drawn_corpus, tmp_path, monkeypatch
):
    definition = StudyDefinition(
        folders, ["photorealism", "caption"], 30, str(drawn_corpus / "train")
    )
    write = study._write

    def interrupted_write(pixels, folder, name):
        if len(list(folder.glob("*.png")) if folder.exists() else []) > 20:
            raise KeyboardInterrupt
        write(pixels, folder, name)

    monkeypatch.setattr(study, "_write", interrupted_write)
    with pytest.raises(KeyboardInterrupt):
        study.open_study(tmp_path, None, definition)
    monkeypatch.undo()
    votes = study.open_study(tmp_path, None, None)
    rows = votes.comparisons().values()
    named_pictures = {
        name
        for comparison in rows
        for name in (comparison.first_picture, comparison.second_picture)
    }
    # No picture of the interrupted attempt is left unused.
    assert {path.stem for path in (tmp_path / "pictures").glob("*.png")} == named_pictures
    assert Counter(comparison.check_of for comparison in rows) == {
        None: 30,
        "photorealism": 3,
        "caption": 3,
    }
    for comparison in rows:
        # Both pictures are drawings, and the caption describes only the first.
        if comparison.check_of == "caption":
            colours = [
                tuple(
                    np.asarray(Image.open(tmp_path / "pictures" / f"{name}.png"))[32, 32].tolist()
                )
                for name in (comparison.first_picture, comparison.second_picture)
            ]
            right = next(colour for name, colour in COLOURS.items() if name in comparison.prompt)
            assert colours[0] == right != colours[1]
    pixels = [
        np.asarray(Image.open(tmp_path / "pictures" / f"{comparison.second_picture}.png"))
        for comparison in rows
        if comparison.check_of == "photorealism"
    ]
    # Uniform noise has a standard deviation of 256 / sqrt(12) = 74.
    assert all(60 < image.std() < 90 for image in pixels)


def test_a_failed_study_can_be_replaced_and_missing_pictures_are_copied_again(
    folders, tmp_path, capsys
):
    bare = bulk(tmp_path / "bare", (9, 9, 9), ["", ""])
    typo = StudyDefinition({**folders, "umbrella": str(tmp_path / "no")}, ["photorealism"], 9)
    for definition, message in (
        (typo, "There is no corpus"),
        (StudyDefinition(folders, ["photorealism"], 9, bare), "bare has a caption"),
    ):
        with pytest.raises(UserError, match=message):
            study.open_study(tmp_path / "s", None, definition)
    definition = StudyDefinition(folders, ["photorealism"], 9)
    votes = study.open_study(tmp_path / "s", None, definition)  # same folder, corrected input
    names = sorted(path.name for path in (tmp_path / "s" / "pictures").glob("*.png"))
    assert votes.asked == definition and len(votes.comparisons()) == 10
    # The database of the first folder, opened from another one.
    reopened = study.open_study(tmp_path / "elsewhere", votes.url, None)
    assert reopened.comparisons() == votes.comparisons()
    picture_names = {
        f"{name}.png"
        for comparison in reopened.comparisons().values()
        for name in (comparison.first_picture, comparison.second_picture)
    }
    assert (
        {path.name for path in (tmp_path / "elsewhere" / "pictures").glob("*.png")}
        == picture_names
        <= set(names)
    )


# -- tables ----------------------------------------------------------------------------------------


def test_the_tables_of_a_csv_of_votes_equal_those_counted_by_hand(tmp_path, capsys):
    path = tmp_path / "votes.csv"
    path.write_text(
        "question,first,second,winner,when\n"
        + "caption,free,clip,free,1\n" * 6
        + "caption,clip,free,clip,2\n" * 2
        + "caption,free,clip,tie,3\n" * 4
        + "photorealism,free,clip,free,4\n" * 3
    )
    assert main(["elo", str(path), "--json", str(tmp_path / "elo.json")]) == 0
    printed, found = (
        capsys.readouterr().out,
        json.loads((tmp_path / "elo.json").read_text())["questions"],
    )
    # 6 wins, 2 losses and 4 ties: odds of 8 to 4.
    score_difference = 400 * np.log10(8 / 4)
    assert found["caption"]["scores"]["free"]["score"] == pytest.approx(
        score_difference / 2
    ) and found["caption"]["wins"]["free"]["clip"] == {"share": 8 / 12, "votes": 12}
    assert (
        found["photorealism"]["scores"] == {}
        and "clip has never won" in found["photorealism"]["no_scores"]
    )
    lines = [re.split(r"\s{2,}", line) for line in printed.splitlines()]
    assert [
        "free against clip",
        "100%",
        "of 3",
        "67%",
        "of 12",
    ] in lines and "photorealism: clip has never won" in printed
    assert (
        re.search(rf"free +- +{score_difference / 2:.1f}  \[", printed)
        and "12 votes on caption (33% ties)" in printed
    )


@pytest.mark.parametrize(
    "content, message",
    [
        ("question,first,second\nx,a,b\n", "has no column winner"),
        (
            "question,first,second,winner\ncaption,a,b,a\ncaption,a,b,c\n",
            "line 3: the winner must be",
        ),
        ("question,first,second,winner\ncaption,a,a,a\n", "line 2"),
        ("question,first,second,winner\n", "no votes to count"),
        ("\xff\xfe\x00", "UTF-8"),
    ],
)
def test_an_invalid_csv_of_votes_is_refused_with_its_line_number(
    tmp_path, capsys, content, message
):
    (tmp_path / "votes.csv").write_bytes(content.encode("latin-1"))
    assert main(["elo", str(tmp_path / "votes.csv")]) == 2 and message in capsys.readouterr().err


def test_invalid_input_to_a_study_is_refused_in_one_sentence(folders, tmp_path, capsys):
    study.open_study(
        tmp_path / "s", None, StudyDefinition(folders, ["photorealism", "caption"], 1000)
    )
    strange, other = (
        bulk(tmp_path / "strange", (1, 1, 1), ["something else"]),
        folder_arguments(folders),
    )
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (
            [f"zanzibar={folders['quixote']}", *other[1:], "--out", tmp_path / "s"],
            "holds a study of other folders; give another folder",
        ),
        ([*other, "--out", tmp_path / "s", "--question", "caption"], "of other questions"),
        ([other[0], "--out", tmp_path / "s"], "two or more models"),
        (["--out", tmp_path / "new"], "holds no study yet; name the pictures"),
        ([other[0], f"x={strange}", "--out", tmp_path / "t"], "no prompt in common"),
        ([other[0], f"x={tmp_path / 'empty'}", "--out", tmp_path / "u"], "is empty"),
        (["--out", "s3://bucket/study"], "give a local folder"),
        (
            [*other, "--out", tmp_path / "v", "--database", "oracular://x"],
            "cannot be opened as a database",
        ),
        (["--out", tmp_path / "s", "--port", "70000"], "another --port"),
    ):
        assert main(["rate", *map(str, arguments)]) == 2, arguments
        printed = capsys.readouterr()
        assert message in printed.err and printed.err.count("\n") == 1
    for arguments, message in (
        ([str(tmp_path / "empty")], "There is no"),
        ([f"sqlite:///{tmp_path}/other.sqlite"], "holds no study"),
        ([str(tmp_path / "s")], "no votes to count yet; let people rate"),
    ):
        assert main(["elo", *arguments]) == 2 and message in capsys.readouterr().err
