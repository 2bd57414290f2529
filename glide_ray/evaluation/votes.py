"""The database of a study: comparisons, what each rater was shown, and what they answered.

SQLite in a file, or any database that SQLAlchemy supports.

A row of `votes` is inserted when a rater is shown a comparison, and receives the answer later.
There is one row for each rater, comparison and question, so that a reload, a second tab, a double
click or a resent answer adds nothing.
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

BUSY_SECONDS = 30  # maximum wait of a SQLite write for another one
# Seconds for which a comparison that was shown but not answered is reserved for its rater.
RESERVED_SECONDS = 600
# Comparisons sent to a rater's page at once: the next ones load ahead of time, and are there even
# if the connection is lost.
PREFETCHED_COMPARISONS = 3

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
    Column("given_at", Double, nullable=False),  # Unix time in seconds
    Column("answer", String(8)),
    Column("answered_at", Double),
    Column("seconds", Double),
    UniqueConstraint("rater", "comparison", "question"),
    UniqueConstraint("rater", "turn"),
)


class VotesError(UserError):
    """A database that cannot be used, or that holds another study."""


@dataclass(frozen=True)
class StudyDefinition:
    """Definition of a study: questions, number of comparisons, sources of pictures.

    `folders`: of pictures, by model name. `real`: corpus of the attention checks; None: noise.
    """

    folders: Mapping[str, str]
    questions: Sequence[str]
    comparisons: int
    real: str | None = None


@dataclass(frozen=True)
class ShownTurn:
    """A turn as sent to the page, without the models' names."""

    token: str
    question: str
    left: str  # `left`, `right`: opaque names of pictures
    right: str
    caption: str | None


@dataclass(frozen=True)
class CastVote:
    """An answer: FIRST, SECOND or TIE. `left`: which picture was on the left."""

    rater: str
    question: str
    comparison: Comparison
    left: str
    answer: str
    seconds: float | None


class Votes:
    """A study's database, created if missing; without `create` it must hold a study.

    Raises VotesError.
    """

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
                f"{_hidden(url)} cannot be opened as a database ({_first_line(error)}); "
                f"give an SQLAlchemy URL, and install its driver."
            ) from None
        if not held:
            raise VotesError(f"{_hidden(url)} holds no study; start one with `glide rate`.")

    def _holds_study(self) -> bool:
        with self._transaction() as connection:
            return (
                inspect(connection).has_table(STUDY.name)
                and connection.execute(select(STUDY.c.id)).first() is not None
            )

    # -- the study ---------------------------------------------------------------------------------

    def begin(self, definition: StudyDefinition, secret: str | None = None) -> None:
        """Record the study's definition, or check it against the recorded one.

        A recorded definition without comparisons is replaced: they could not be made. Raises
        VotesError if the definitions differ.
        """
        text = json.dumps(asdict(definition))
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
                f"{_hidden(self.url)} holds a study of other {' and '.join(differs)}; give "
                "another folder with --out, or leave out the pictures to resume it."
            )

    @cached_property
    def study(self) -> Any:
        """The row `asked`, `secret`, `link_key`. Raises VotesError if there is no study."""
        with self._transaction() as connection:
            row = connection.execute(select(STUDY)).first()
        if row is None:
            raise VotesError(
                f"{_hidden(self.url)} holds no study yet; name the pictures to compare, as "
                f"NAME=FOLDER NAME=FOLDER."
            )
        return row

    @property
    def asked(self) -> StudyDefinition:
        return StudyDefinition(**json.loads(self.study.asked))

    def add_comparisons(self, comparisons: Sequence[Comparison]) -> None:
        """Insert all comparisons or none, in one transaction.

        No effect if another process has already inserted them.
        """
        with self._transaction() as connection:
            if connection.execute(select(COMPARISONS.c.id).limit(1)).first() is None:
                connection.execute(insert(COMPARISONS), [asdict(one) for one in comparisons])

    def comparisons(self) -> dict[int, Comparison]:
        """Comparisons by id; {} until they are made."""
        with self._transaction() as connection:
            return {
                row.id: Comparison(*row)
                for row in connection.execute(select(COMPARISONS).order_by(COMPARISONS.c.id))
            }

    @cached_property
    def _comparisons(self) -> dict[int, Comparison]:
        return self.comparisons()  # cached: comparisons never change

    # -- raters ------------------------------------------------------------------------------------

    def turns(self, rater: str, needed: int) -> tuple[list[ShownTurn], int, int]:
        """The rater's next turns, the number answered, and the number left including these turns.

        At most PREFETCHED_COMPARISONS turns: first those shown before but not answered, in their
        order. `needed`: number of votes for each comparison and question.
        """
        comparisons, study = self._comparisons, self.study
        for _ in range(9):
            try:
                with self._transaction() as connection:
                    return self._turns(
                        connection, rater, needed, study.secret, self.asked.questions, comparisons
                    )
            except IntegrityError:  # another tab of this rater just received this turn
                continue
        raise VotesError(
            f"The comparisons of rater {rater} could not be stored; open the page again."
        )

    def answer(
        self, rater: str, token: str, side: str, seconds: float | None, again: bool = False
    ) -> bool:
        """Record the choice "left", "right" or TIE; return whether the rater has such a turn.

        The first answer stays, unless `again` is set.
        """
        with self._transaction() as connection:
            row = connection.execute(
                select(VOTES.c.left_picture, VOTES.c.answer).where(
                    VOTES.c.token == token, VOTES.c.rater == rater
                )
            ).first()
            if row is None:
                return False
            stored = (
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
                .values(answer=stored, answered_at=time.time(), seconds=seconds)
            )
        return True

    def _turns(
        self,
        connection: Connection,
        rater: str,
        needed: int,
        secret: str,
        questions: Sequence[str],
        comparisons: Mapping[int, Comparison],
    ) -> tuple[list[ShownTurn], int, int]:
        rows = connection.execute(
            select(VOTES).where(VOTES.c.rater == rater).order_by(VOTES.c.turn)
        ).all()
        waiting = [row for row in rows if row.answer is None][:PREFETCHED_COMPARISONS]
        past = [Turn(row.comparison, row.question, row.left_picture) for row in rows]
        others = self._taken(connection, rater)
        shown = [
            self._shown(row.token, Turn(row.comparison, row.question, row.left_picture))
            for row in waiting
        ]
        while len(shown) < PREFETCHED_COMPARISONS and (
            turn := next_turn(secret, rater, comparisons, questions, past, others, needed)
        ):
            token = secrets.token_urlsafe(12)
            connection.execute(
                insert(VOTES).values(
                    token=token,
                    turn=len(past),
                    rater=rater,
                    comparison=turn.comparison,
                    question=turn.question,
                    left_picture=turn.left,
                    given_at=time.time(),
                )
            )
            past.append(turn)
            shown.append(self._shown(token, turn))
        rest = sum(
            len(remaining(comparisons.values(), question, past, others, needed))
            for question in questions
        )
        return shown, len(rows) - sum(row.answer is None for row in rows), rest + len(shown)

    def _taken(self, connection: Connection, rater: str) -> dict[tuple[int, str], int]:
        """Number of votes and recently opened turns of other raters, by comparison and question.

        Without excluded raters.
        """
        fresh = VOTES.c.answer.is_not(None) | (VOTES.c.given_at > time.time() - RESERVED_SECONDS)
        others = VOTES.c.rater.not_in([rater, *left_out(_checks(connection))])
        rows = connection.execute(
            select(VOTES.c.comparison, VOTES.c.question, func.count())
            .where(fresh, others)
            .group_by(VOTES.c.comparison, VOTES.c.question)
        )
        return {(comparison, question): count for comparison, question, count in rows}

    def _shown(self, token: str, turn: Turn) -> ShownTurn:
        comparison = self._comparisons[turn.comparison]
        left, right = (
            (comparison.first_picture, comparison.second_picture)
            if turn.left == FIRST
            else (comparison.second_picture, comparison.first_picture)
        )
        return ShownTurn(
            token,
            turn.question,
            left,
            right,
            comparison.prompt if turn.question == "caption" else None,
        )

    # -- results -----------------------------------------------------------------------------------

    def cast(self) -> list[CastVote]:
        """All answers, in order of arrival."""
        with self._transaction() as connection:
            rows = connection.execute(
                select(VOTES)
                .where(VOTES.c.answer.is_not(None))
                .order_by(VOTES.c.answered_at, VOTES.c.token)
            ).all()
        return [
            CastVote(
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
    """Raters who failed too many attention checks. `checks`: rater -> (passed, answered)."""
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
    passed: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    for rater, answer, count in rows:
        answered[rater] += count
        passed[rater] += count * (answer == FIRST)
    return {rater: (passed[rater], answered[rater]) for rater in answered}


def _prepare_sqlite(connection, _) -> None:
    # Turn off the driver's implicit BEGIN: `Votes` sends BEGIN IMMEDIATE, so that no other write
    # can come between a transaction's read and its write.
    connection.isolation_level = None
    # WAL with synchronous=FULL: a committed answer stays on the disk.
    for setting in (
        f"busy_timeout={BUSY_SECONDS * 1000}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {setting}")


def _file_is_there(url: URL) -> bool:
    """Whether the database exists: connecting to SQLite would create the file."""
    return url.get_backend_name() != "sqlite" or os.path.exists(url.database or "")


def _hidden(url: str) -> str:
    """The URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "The given URL"


def _first_line(error: object) -> str:
    return str(error).splitlines()[0][:160]
