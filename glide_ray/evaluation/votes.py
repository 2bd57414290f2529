"""The database of a study: what is compared, what each rater was shown, and what they answered. SQLite in a file, or any that SQLAlchemy speaks.

A row of `votes` is made when a rater is shown a comparison, and holds the answer when it comes: there is one for each rater, comparison and
question, so that a reload, a second tab, a double click or an answer sent again adds nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Double,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    func,
    insert,
    inspect,
    make_url,
    select,
    update,
)
from sqlalchemy.exc import ArgumentError, DatabaseError, IntegrityError, NoSuchModuleError

from ..errors import UserError
from .pairing import FAILED_SHARE, FIRST, SECOND, TIE, Comparison, Turn, next_turn, remaining

BUSY_SECONDS = 30  # that a write to SQLite waits for another
OPEN_SECONDS = (
    600  # for which a comparison that a rater was shown and has not answered is kept from others
)
PREFETCHED_COMPARISONS = 3  # comparisons that a rater's page is given: the next ones load meanwhile, and are there when the connection is not

SCHEMA = MetaData()
STUDY = Table(
    "study",
    SCHEMA,
    Column("id", Integer, primary_key=True),
    Column("asked", Text, nullable=False),
    Column("secret", String(64), nullable=False),
    Column("link_key", String(64), nullable=False),
)
COMPARISONS = Table(
    "comparisons",
    SCHEMA,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("first", Text, nullable=False),
    Column("second", Text, nullable=False),
    Column("prompt", Text, nullable=False),
    Column("first_picture", String(64), nullable=False),
    Column("second_picture", String(64), nullable=False),
    Column("check_of", String(32)),
)
VOTES = Table(
    "votes",
    SCHEMA,
    Column("token", String(32), primary_key=True),
    Column("turn", Integer, nullable=False),
    Column("rater", String(64), nullable=False),
    Column("comparison", ForeignKey(COMPARISONS.c.id), nullable=False),
    Column("question", String(32), nullable=False),
    Column("left_picture", String(8), nullable=False),
    Column("given_at", Double, nullable=False),  # seconds since 1970
    Column("answer", String(8)),
    Column("answered_at", Double),
    Column("seconds", Double),
    UniqueConstraint("rater", "comparison", "question"),
    UniqueConstraint("rater", "turn"),
)


class VotesError(UserError):
    """A database that cannot be used, or holds another study."""


@dataclass(frozen=True)
class Asked:
    """What a study is of: folders of pictures by the models' names, and where the attention checks come from."""

    folders: Mapping[str, str]
    questions: Sequence[str]
    comparisons: int
    real: str | None = None


@dataclass(frozen=True)
class Shown:
    """A turn as the page has it, which names no model."""

    token: str
    question: str
    left: str  # opaque names of pictures
    right: str
    caption: str | None


@dataclass(frozen=True)
class Cast:
    """An answer: FIRST, SECOND or TIE; `left` is which stood on the left."""

    rater: str
    question: str
    comparison: Comparison
    left: str
    answer: str
    seconds: float | None


class Votes:
    """A study's database, made where there is none yet; without `create` it must hold a study. Raises VotesError."""

    def __init__(self, url: str, create: bool = True):
        self.url = url
        try:
            self._engine = create_engine(url, pool_pre_ping=True)
            if self._engine.dialect.name == "sqlite":
                event.listen(self._engine, "connect", _prepare_sqlite)
                event.listen(
                    self._engine,
                    "begin",
                    lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"),
                )
            if create:
                with self._transaction() as connection:
                    SCHEMA.create_all(connection)
            held = create or _file_is_there(self._engine.url) and self._holds_study()
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            raise VotesError(
                f"{_hidden(url)} is not a database that can be reached ({_first_line(error)}); write a URL as SQLAlchemy has them, with its driver "
                f"installed."
            ) from None
        if not held:
            raise VotesError(f"{_hidden(url)} holds no study; begin one with `glide rate`.")

    def _holds_study(self) -> bool:
        with self._transaction() as connection:
            return (
                inspect(connection).has_table(STUDY.name)
                and connection.execute(select(STUDY.c.id)).first() is not None
            )

    # -- the study ----------------------------------------------------------------------------------------------------

    def begin(self, asked: Asked, secret: str | None = None) -> None:
        """Note what the study is of, or find it noted. One that nothing could be made of gives way. Raises VotesError where it is of something else."""
        text = json.dumps(asdict(asked))
        with self._transaction() as connection:
            row = connection.execute(select(STUDY.c.asked)).first()
            if row is None:
                connection.execute(
                    insert(STUDY).values(
                        id=1,
                        asked=text,
                        secret=secret or secrets.token_hex(32),
                        link_key=secrets.token_urlsafe(16),
                    )
                )
                return
            if connection.execute(select(COMPARISONS.c.id).limit(1)).first() is None:
                connection.execute(update(STUDY).values(asked=text))
                return
        before, now = json.loads(row.asked), json.loads(text)
        if differs := [
            name.replace("real", "attention checks") for name in now if now[name] != before[name]
        ]:
            raise VotesError(
                f"{_hidden(self.url)} holds a study of other {' and '.join(differs)}; give another folder with --out, or no pictures to go on with it."
            )

    @cached_property
    def study(self) -> Any:
        """The row: `asked`, `secret`, `link_key`. Raises VotesError where nothing has begun."""
        with self._transaction() as connection:
            row = connection.execute(select(STUDY)).first()
        if row is None:
            raise VotesError(
                f"{_hidden(self.url)} holds no study yet; name the pictures to compare, as NAME=FOLDER NAME=FOLDER."
            )
        return row

    @property
    def asked(self) -> Asked:
        return Asked(**json.loads(self.study.asked))

    def add_comparisons(self, made: Sequence[Comparison]) -> None:
        """All or none of them; nothing where another process has added them."""
        with self._transaction() as connection:
            if connection.execute(select(COMPARISONS.c.id).limit(1)).first() is None:
                connection.execute(insert(COMPARISONS), [asdict(one) for one in made])

    def comparisons(self) -> dict[int, Comparison]:
        """By id; {} until they are made."""
        with self._transaction() as connection:
            return {
                row.id: Comparison(*row)
                for row in connection.execute(select(COMPARISONS).order_by(COMPARISONS.c.id))
            }

    @cached_property
    def _comparisons(self) -> dict[int, Comparison]:
        return self.comparisons()  # they do not change once there are any

    # -- raters -------------------------------------------------------------------------------------------------------

    def turns(self, rater: str, wanted: int) -> tuple[list[Shown], int, int]:
        """What the rater is to be shown, AHEAD comparisons of it; how many they have answered; how many are left for them, these among them.

        What was shown and not answered comes first, in its order. `wanted`: votes for each comparison and question.
        """
        comparisons, study = self._comparisons, self.study
        for _ in range(9):
            try:
                with self._transaction() as connection:
                    return self._turns(
                        connection, rater, wanted, study.secret, self.asked.questions, comparisons
                    )
            except IntegrityError:  # another tab of the rater's was given the same turn just now
                continue
        raise VotesError(f"The turns of rater {rater} could not be written; open the page again.")

    def answer(
        self, rater: str, token: str, side: str, seconds: float | None, again: bool = False
    ) -> bool:
        """Note that "left", "right" or TIE was chosen; whether there is such a turn of the rater's. The first answer stays, unless `again` changes it."""
        with self._transaction() as connection:
            row = connection.execute(
                select(VOTES.c.left_picture, VOTES.c.answer).where(
                    VOTES.c.token == token, VOTES.c.rater == rater
                )
            ).first()
            if row is None:
                return False
            given = (
                TIE
                if side == TIE
                else FIRST
                if (side == "left") == (row.left_picture == FIRST)
                else SECOND
            )
            unanswered = () if again else (VOTES.c.answer.is_(None),)
            connection.execute(
                update(VOTES)
                .where(VOTES.c.token == token, *unanswered)
                .values(answer=given, answered_at=time.time(), seconds=seconds)
            )
        return True

    def _turns(
        self,
        connection: Connection,
        rater: str,
        wanted: int,
        secret: str,
        questions: Sequence[str],
        comparisons: Mapping[int, Comparison],
    ) -> tuple[list[Shown], int, int]:
        rows = connection.execute(
            select(VOTES).where(VOTES.c.rater == rater).order_by(VOTES.c.turn)
        ).all()
        waiting = [row for row in rows if row.answer is None][:PREFETCHED_COMPARISONS]
        had = [Turn(row.comparison, row.question, row.left_picture) for row in rows]
        taken = self._taken(connection, rater)
        shown = [
            self._shown(row.token, Turn(row.comparison, row.question, row.left_picture))
            for row in waiting
        ]
        while len(shown) < PREFETCHED_COMPARISONS and (
            turn := next_turn(secret, rater, comparisons, questions, had, taken, wanted)
        ):
            token = secrets.token_urlsafe(12)
            connection.execute(
                insert(VOTES).values(
                    token=token,
                    turn=len(had),
                    rater=rater,
                    comparison=turn.comparison,
                    question=turn.question,
                    left_picture=turn.left,
                    given_at=time.time(),
                )
            )
            had.append(turn)
            shown.append(self._shown(token, turn))
        rest = sum(
            len(remaining(comparisons.values(), question, had, taken, wanted))
            for question in questions
        )
        return shown, len(rows) - sum(row.answer is None for row in rows), rest + len(shown)

    def _taken(self, connection: Connection, rater: str) -> dict[tuple[int, str], int]:
        """Votes of others who are not left out, and what they look at now, by comparison and question."""
        fresh = VOTES.c.answer.is_not(None) | (VOTES.c.given_at > time.time() - OPEN_SECONDS)
        others = VOTES.c.rater.not_in([rater, *left_out(_checks(connection))])
        rows = connection.execute(
            select(VOTES.c.comparison, VOTES.c.question, func.count())
            .where(fresh, others)
            .group_by(VOTES.c.comparison, VOTES.c.question)
        )
        return {(comparison, question): count for comparison, question, count in rows}

    def _shown(self, token: str, turn: Turn) -> Shown:
        one = self._comparisons[turn.comparison]
        left, right = (
            (one.first_picture, one.second_picture)
            if turn.left == FIRST
            else (one.second_picture, one.first_picture)
        )
        return Shown(
            token, turn.question, left, right, one.prompt if turn.question == "caption" else None
        )

    # -- what came of it ----------------------------------------------------------------------------------------------

    def cast(self) -> list[Cast]:
        """All answers, in the order in which they came."""
        with self._transaction() as connection:
            rows = connection.execute(
                select(VOTES)
                .where(VOTES.c.answer.is_not(None))
                .order_by(VOTES.c.answered_at, VOTES.c.token)
            ).all()
        return [
            Cast(
                row.rater,
                row.question,
                self._comparisons[row.comparison],
                row.left_picture,
                row.answer,
                row.seconds,
            )
            for row in rows
        ]

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except DatabaseError as error:
            raise VotesError(
                f"The database {_hidden(self.url)} cannot be used ({_first_line(error.orig)})."
            ) from None


def left_out(checks: Mapping[str, tuple[int, int]]) -> list[str]:
    """Who has failed too many attention checks; `checks`: (passed, answered) by rater."""
    return sorted(
        rater
        for rater, (passed, answered) in checks.items()
        if answered - passed > FAILED_SHARE * answered
    )


def _checks(connection: Connection) -> dict[str, tuple[int, int]]:
    rows = connection.execute(
        select(VOTES.c.rater, VOTES.c.answer, func.count())
        .join(COMPARISONS, VOTES.c.comparison == COMPARISONS.c.id)
        .where(COMPARISONS.c.check_of.is_not(None), VOTES.c.answer.is_not(None))
        .group_by(VOTES.c.rater, VOTES.c.answer)
    ).all()
    passed, answered = Counter(), Counter()
    for rater, answer, count in rows:
        answered[rater] += count
        passed[rater] += count * (answer == FIRST)
    return {rater: (passed[rater], answered[rater]) for rater in answered}


def _prepare_sqlite(connection, _) -> None:
    connection.isolation_level = None  # transactions begin as we say: one that reads first and writes then must not find another's write between
    for setting in (
        f"busy_timeout={BUSY_SECONDS * 1000}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):  # what is answered stays on the disk
        connection.execute(f"PRAGMA {setting}")


def _file_is_there(url: URL) -> bool:
    """SQLite would make it."""
    return url.get_backend_name() != "sqlite" or os.path.exists(url.database or "")


def _hidden(url: str) -> str:
    """Without the password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "The given URL"


def _first_line(error: object) -> str:
    return str(error).splitlines()[0][:160]
