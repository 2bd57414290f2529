"""The things that the judge is asked to name.

Plain single objects with dissimilar names, chosen by a stable hash.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..data.splits import share
from ..data.sprites import Sprite

ASKED = 100  # candidates from which the judge chooses a thing's name
MIN_STYLES = 6  # styles in which a thing must be drawn; all styles if there are fewer
# Words for things that look alike when drawn: at most one name is chosen from each line.
# A backslash continues a line.
ALIKE = tuple(
    frozenset(line.split())
    for line in """
book notebook ledger notepad scroll newspaper bookmark index clipboard calendar cabinet chart \
memo page map label ticket receipt
hospital school factory office hotel bank store building stadium church mosque synagogue shrine \
house hut
disk dvd videocassette cd optical pager battery
locomotive tram train monorail metro railway car bus minibus trolleybus taxi automobile ambulance \
lorry truck engine
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
    """The names of things, and the things that prompts ask for.

    `names`: plain names of things, by code points.
    `order`: the things that an object is distinguished from, in the order of a hash.
    `count`: number of candidates from which the judge chooses a name.
    `misjudged`: things whose style the judge misclassifies.
    """

    names: Mapping[str, str]
    order: tuple[str, ...]
    count: int = ASKED
    misjudged: frozenset[str] = frozenset()

    @property
    def asked(self) -> tuple[str, ...]:
        """The things that prompts ask for."""
        return self.order[: self.count]

    def candidates(self, thing: str) -> list[str]:
        """`count` candidates for naming `thing`: itself, then others with dissimilar names."""
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
    least_styles: int = MIN_STYLES,
    misjudged: Collection[str] = (),
) -> Vocabulary:
    """Choose the vocabulary from pictures as (code points, name, group, style).

    Things in `misjudged` are not asked for.
    """
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
        (emoji for emoji in plain if len(styles[emoji]) >= least_styles and emoji not in misjudged),
        key=lambda emoji: share(f"judge/{emoji}"),
    )
    return Vocabulary(plain, _unlike(common, plain), count, frozenset(misjudged) & plain.keys())


def is_plain(emoji: str, name: str, group: str) -> bool:
    """Whether a thing is a single object with a plain name, usable in composed scenes."""
    return Sprite(emoji, name, group, "", "", "", 0, 0).counted


def _unlike(order: Sequence[str], names: Mapping[str, str]) -> tuple[str, ...]:
    """The things of `order`, without those that share a word or ALIKE line with an earlier one."""
    chosen: list[str] = []
    used_words: set[str] = set()
    for emoji in order:
        words = _words(names[emoji])
        if not words & used_words:
            chosen.append(emoji)
            used_words |= words
    return tuple(chosen)


def _words(name: str) -> set[str]:
    """The words of a name, and all words of each line of ALIKE that has one of them."""
    words = set(name.lower().split())
    return words.union(*(line for line in ALIKE if line & words))
