"""The things that the judge is asked to name: plain single objects whose names are unlike each other, chosen by a stable hash."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..data.splits import share
from ..data.sprites import Sprite

ASKED = 100  # names among which a thing is to be told
LEAST_STYLES = 6  # in which a thing must be drawn, or in all where there are fewer
# Words for things that are drawn alike: of each line, one name at most is chosen.
ALIKE = tuple(
    frozenset(line.split())
    for line in """
book notebook ledger notepad scroll newspaper bookmark index clipboard calendar cabinet chart memo page map label ticket receipt
hospital school factory office hotel bank store building stadium church mosque synagogue shrine house hut
disk dvd videocassette cd optical pager battery
locomotive tram train monorail metro railway car bus minibus trolleybus taxi automobile ambulance lorry truck engine
ship boat sailboat speedboat ferry canoe
mouse rat hamster chipmunk rabbit
ox buffalo cow bison
ram ewe goat sheep
dog poodle wolf
cat leopard tiger
boar pig
honeybee bug ant beetle fly
shoe boot sandal sneaker
tulip rose hibiscus bouquet blossom rosette
mail envelope mailbox postbox package inbox outbox tray
banknote money
camera projector
crocodile lizard dragon
chick chicken bird duck eagle dove rooster turkey penguin
watch clock stopwatch timer
tomato apple peach tangerine melon lemon pear
candy lollipop
loudspeaker megaphone speaker
fish shark whale dolphin blowfish
handbag purse bag briefcase backpack
guitar violin
""".strip().splitlines()
)


@dataclass(frozen=True)
class Vocabulary:
    """`names`: the plain names of things, by code points. `order`: the things that an object is
    distinguished from, in order. `untold`: things whose style the judge misclassifies.
    """

    names: Mapping[str, str]
    order: tuple[str, ...]
    count: int = ASKED
    untold: frozenset[str] = frozenset()

    @property
    def asked(self) -> tuple[str, ...]:
        """The things that prompts ask for."""
        return self.order[: self.count]

    def among(self, thing: str) -> list[str]:
        """`count` things, this one first: it is to be told from the others, whose names are unlike its own."""
        words = _words(self.names[thing])
        others = [
            other
            for other in self.order
            if other != thing and not words & _words(self.names[other])
        ]
        return [thing, *others[: self.count - 1]]


def choose(
    rows: Iterable[tuple[str, str, str, str]],
    count: int = ASKED,
    least_styles: int = LEAST_STYLES,
    untold: Collection[str] = (),
) -> Vocabulary:
    """From pictures as (code points, name, group, style), without what is `untold`."""
    rows = list(rows)
    least_styles = min(least_styles, len({style for *_, style in rows}))
    about: dict[str, tuple[str, str]] = {}
    styles: dict[str, set[str]] = {}
    for emoji, name, group, style in rows:
        about[emoji] = name, group
        styles.setdefault(emoji, set()).add(style)
    plain = {
        emoji: name
        for emoji, (name, group) in sorted(about.items())
        if is_plain(emoji, name, group)
    }
    common = sorted(
        (emoji for emoji in plain if len(styles[emoji]) >= least_styles and emoji not in untold),
        key=lambda emoji: share(f"judge/{emoji}"),
    )
    return Vocabulary(plain, _unlike(common, plain), count, frozenset(untold) & plain.keys())


def is_plain(emoji: str, name: str, group: str) -> bool:
    """Whether a thing is a single object with a plain name, as scenes of several objects are composed of."""
    return Sprite(emoji, name, group, "", "", "", 0, 0).counted


def _unlike(order: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """Those of which no earlier one shares a word, or a word for what is drawn alike."""
    chosen, taken = [], set()
    for emoji in order:
        words = _words(names[emoji])
        if not words & taken:
            chosen.append(emoji)
            taken |= words
    return tuple(chosen)


def _words(name: str) -> set[str]:
    """The words of a name, and for each that stands in a line of ALIKE the whole line."""
    words = set(name.lower().split())
    return words.union(*(line for line in ALIKE if line & words))
