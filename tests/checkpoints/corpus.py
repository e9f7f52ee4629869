"""The training text of the tiny checkpoints: a seeded grammar, written for them.

All text is original, so weights trained on it can be published with the repository. There are four
kinds of documents: prose (tales told day by day), code (small Python-like modules), structured
records (JSON lines, tables, sections, logs) and phrase books in several scripts. Some documents are
wrapped in a chat.

The templates are designed around two properties:

* A document opens with a short heading that fixes the rest (names, places, functions, items). Most
  of its text follows from the heading by copying and simple rules, so a draft head can be right most
  of the time.
* Every remaining choice is uneven (`pick`), never a coin toss. The greedy continuation then has a
  clear winner, which survives different rounding.

Held-out documents use word pairs and blocks of numbers that `Grammar(held_out=False)` never emits.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence

NAMES = (
    "Mira",
    "Tobin",
    "Selda",
    "Orrin",
    "Kessa",
    "Daven",
    "Lysa",
    "Bram",
    "Nerin",
    "Hollis",
    "Petra",
    "Quill",
    "Rowan",
    "Vesna",
    "Ansel",
    "Ilka",
    "Corin",
    "Maud",
    "Jory",
    "Edda",
)
PLACES = (
    "Marrow",
    "Dunfell",
    "Ostwick",
    "Pellam",
    "Harrowgate",
    "Lindmoor",
    "Greyford",
    "Tarn",
    "Aldbrook",
    "Sable",
    "Wexcombe",
    "Norby",
    "Hollin",
    "Carrick",
    "Emberly",
    "Stokeham",
)
WORLD_NAMES = (
    "Zoë",
    "Łucja",
    "Åsa",
    "Jürgen",
    "Ñusta",
    "Søren",
    "Ελένη",
    "Νίκος",
    "Юрий",
    "Вера",
    "さくら",
    "はると",
    "小明",
    "李雷",
)
WORLD_PLACES = (
    "Köln",
    "Ørsted",
    "Łódź",
    "Málaga",
    "Θήρα",
    "Волга",
    "京都",
    "海边",
    "Čakovec",
    "São Bento",
)
ITEMS = (
    "lantern",
    "kettle",
    "rope",
    "anchor",
    "ladder",
    "mirror",
    "compass",
    "basket",
    "hammer",
    "violin",
    "candle",
    "bucket",
    "needle",
    "saddle",
    "barrel",
    "blanket",
)
# The order of the items (and of the functions below) and the facts about them are the same in every
# document. The model learns them, which keeps a continuation moving: otherwise a model that copies
# badly falls into a loop.
UNITS = (
    "piece",
    "piece",
    "metre",
    "piece",
    "piece",
    "piece",
    "box",
    "dozen",
    "piece",
    "case",
    "box",
    "piece",
    "packet",
    "piece",
    "litre",
    "bale",
)
STOCK = {item: 3 + (7 * i) % 19 for i, item in enumerate(ITEMS)}
UNIT = dict(zip(ITEMS, UNITS, strict=True))
COLOURS = ("red", "green", "blue", "grey", "golden", "white", "black", "copper")
TRADES = ("baker", "miller", "sailor", "weaver", "smith", "gardener", "piper", "carter")
ANIMALS = ("dog", "goat", "raven", "pony", "cat", "goose", "hare", "fox")

NOUNS = (
    "orders",
    "points",
    "words",
    "prices",
    "scores",
    "rows",
    "events",
    "files",
    "users",
    "parts",
    "notes",
    "pages",
    "routes",
    "shapes",
)
ARGUMENTS = (
    "values",
    "items",
    "data",
    "source",
    "batch",
    "entries",
    "table",
    "chunk",
    "records",
    "stream",
)
OPTIONS = ("limit", "start", "step", "bound", "width", "offset", "scale", "floor")

PHRASES = {
    "water": ("agua", "вода", "νερό", "水"),
    "bread": ("pan", "хлеб", "ψωμί", "面包"),
    "house": ("casa", "дом", "σπίτι", "家"),
    "moon": ("luna", "луна", "φεγγάρι", "月"),
    "fire": ("fuego", "огонь", "φωτιά", "火"),
    "tree": ("árbol", "дерево", "δέντρο", "木"),
    "bird": ("pájaro", "птица", "πουλί", "鸟"),
    "snow": ("nieve", "снег", "χιόνι", "雪"),
    "night": ("noche", "ночь", "νύχτα", "夜"),
    "mountain": ("montaña", "гора", "βουνό", "山"),
    "heart": ("corazón", "сердце", "καρδιά", "心"),
    "road": ("camino", "дорога", "δρόμος", "路"),
    "friend": ("amigo", "друг", "φίλος", "友"),
    "sun": ("sol", "солнце", "ήλιος", "日"),
}

# One tale per list, one scene per day; {a|b} is an open choice that favours its first option.
TALES: dict[str, tuple[str, ...]] = {
    "sea": (
        "{N} packed the {c} {i} and walked down to the harbour of {P}. The {t} {was waiting|stood} by the "
        "boat with the {d}. "
        '"We sail with the tide," said {N}, and {F} {nodded|smiled}.',
        "The wind was strong and the waves were high. {F} held the {c} {i} while {N} pulled the {sail|rope}. "
        "The {d} hid below and did not come out until dark.",
        "They found an island that was on no map. {N} {climbed|went up} the hill with the {d} and looked "
        "back toward {P}. "
        '"It is too small to see," said {N}.',
        "A storm came from the north and broke the mast. {F} tied the {c} {i} to the deck with an old net. "
        "All night {N} the {t} {sang|hummed} the song of {P}.",
        "In the morning the sea was {calm|still} again. The {d} slept beside the {c} {i}, and {N} "
        "{mended|fixed} the sail with {F}.",
        "A grey ship passed and asked them for news. {N} told the captain about {P}, about the {d}, and "
        "about the {c} {i}. "
        "The captain gave {F} a {bag|sack} of salt.",
        "At last they saw the lights of {P}. {N} carried the {c} {i} home, and {F} carried the {d}. "
        "The people of {P} {cheered|danced}, and the {t} was glad to be home.",
    ),
    "hill": (
        "{N} the {t} left {P} before the sun was up. The {c} {i} was heavy, but {F} {carried|took} the bread "
        "and the {d} followed. "
        "By noon they had reached the old {bridge|mill}.",
        "The path went up through the pines. {F} counted the stones, and {N} {listened|waited} for the {d}. "
        '"Somebody has been here with a {i}," said {F}.',
        "They slept in a hut of stone above {P}. {N} put the {c} {i} near the fire so that it would not "
        "{freeze|crack}. "
        "The {d} watched the door.",
        "Snow fell on the pass and covered the way. {N} and {F} held hands and let the {d} {lead|choose}. "
        "Nobody in {P} would have believed it.",
        "On the far side there was a green valley. A shepherd {looked at|admired} the {c} {i} and asked "
        "where they came from. "
        '"From {P}," said {N}, "and this is {F}."',
        "The shepherd wanted to buy the {c} {i}. {N} would not sell it, not for {gold|silver} and not for the {d}. "
        "{F} laughed until the hills {rang|answered}.",
        "They took the long road home to {P}. The {t} put the {c} {i} above the door, and the {d} "
        "{slept|lay} under it. "
        "{F} came to see it every {winter|spring}.",
    ),
    "market": (
        "It was market day in {P}. {N} the {t} set the {c} {i} on the table and {called|waited} for buyers. "
        "{F} sat beside it with the {d}.",
        "A stranger asked what the {i} could do. {N} said that it was the only {c} {i} in {P}. "
        "The stranger {paid|offered} two coins, and {F} shook the head.",
        "When the bell rang, the {c} {i} was gone. {N} looked under the table and {F} looked {behind|beside} the wall. "
        "Only the {d} knew, and the {d} said nothing.",
        "{N} asked the miller, the smith and the piper of {P}. Nobody had seen a {c} {i}. "
        '"Follow the {d}," said {F}, and they {ran|went} down the lane.',
        "The {d} stopped at a {small|low} house near the well. Inside, a child was playing with the {c} {i}. "
        "{N} knelt down and asked for its name.",
        '"I only wanted to hear it," said the child. {F} {smiled|sighed} and gave the child some bread. '
        "{N} let the child hold the {c} {i} once more.",
        "That evening all of {P} came to the square. {N} lit a fire, {F} {poured|brought} the cider, and the "
        "{d} danced. "
        "The {t} never sold the {c} {i}.",
    ),
}

# The verb of a function selects its body; its noun, argument and option come from the heading.
BODIES: dict[str, str] = {
    "load": "    with open({a}) as handle:\n        return [line.strip() for line in handle][:{o}]\n",
    "count": "    total = 0\n    for item in {a}:\n        if item > {o}:\n            total += 1\n    return total\n",
    "sort": "    {n} = sorted({a}, reverse=True)\n    return {n}[:{o}]\n",
    "merge": (
        "    result = dict({a})\n    for key in range({o}):\n        result.setdefault(key, None)\n    return result\n"
    ),
    "filter": "    return [item for item in {a} if item is not None and item >= {o}]\n",
    "sum": (
        "    total = {o}\n    for index, item in enumerate({a}):\n        total = total + index * item\n    return total\n"
    ),
    "check": '    if len({a}) < {o}:\n        raise ValueError("too few {n}")\n    return True\n',
    "print": '    for item in {a}:\n        print("{n}:", item, {o})\n',
    "split": "    left, right = {a}[:{o}], {a}[{o}:]\n    return left, right\n",
    "group": (
        "    groups = {{}}\n    for item in {a}:\n        groups.setdefault(item % {o}, []).append(item)\n    return groups\n"
    ),
}
SUMMARIES = {
    "load": "Read the {n} from a file.",
    "count": "Count the {n} above {o}.",
    "sort": "Return the largest {n}.",
    "merge": "Merge {n} into one table.",
    "filter": "Keep the {n} that are large enough.",
    "sum": "Add up the {n} by position.",
    "check": "Fail unless there are enough {n}.",
    "print": "Print the {n} one by one.",
    "split": "Cut the {n} in two.",
    "group": "Group the {n} by remainder.",
}


def reserved(left: str, right: str) -> bool:
    """Whether a word pair is held out.

    A checksum decides, so that no list of pairs is needed.
    """
    return zlib.crc32(f"{left}/{right}".encode()) % 8 == 3


class Grammar:
    """Documents from a seed; with `held_out`, of word pairs and numbers that training never sees."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self.rng = random.Random(seed)
        self.held_out = held_out

    # --- choices

    def pick(self, options: Sequence[str]) -> str:
        """Pick an option: each is four times as likely as the next."""
        return self.rng.choices(options, weights=[4.0**-i for i in range(len(options))])[0]

    def pair(self, lefts: Sequence[str], rights: Sequence[str]) -> tuple[str, str]:
        while True:
            left, right = self.rng.choice(lefts), self.rng.choice(rights)
            if reserved(left, right) == self.held_out:
                return left, right

    def first_number(self) -> int:
        """Return a four-digit number.

        A document counts up from it by less than 20, so it stays within its block of a hundred.
        """
        while True:
            number = 100 * self.rng.randint(10, 99) + self.rng.randint(1, 79)
            if (number // 100 % 7 == 3) == self.held_out:
                return number

    def expand(self, template: str, words: dict[str, str]) -> str:
        """Fill in one scene: `{K}` is a key of `words`, `{x|y}` an open choice."""
        out: list[str] = []
        for part in template.split("{"):
            field, brace, rest = part.partition("}")
            if not brace:
                out.append(part)
            elif field in words:
                out.append(words[field] + rest)
            else:
                out.append(self.pick(field.split("|")) + rest)
        return "".join(out)

    # --- kinds

    def prose(self, world: bool = False) -> str:
        name, place = self.pair(*((WORLD_NAMES, WORLD_PLACES) if world else (NAMES, PLACES)))
        friend = self.rng.choice([n for n in (WORLD_NAMES if world else NAMES) if n != name])
        words = {
            "N": name,
            "F": friend,
            "P": place,
            "i": self.rng.choice(ITEMS),
            "c": self.rng.choice(COLOURS),
            "t": self.rng.choice(TRADES),
            "d": self.rng.choice(ANIMALS),
        }
        tale = self.rng.choice(sorted(TALES))
        scenes = TALES[tale]
        heading = (
            f"# A {tale} tale: {name} and the {words['c']} {words['i']}\n\n{name} the {words['t']} lived in {place} "
            f"with {friend} and a {words['d']}. This is what happened in {len(scenes)} days.\n"
        )
        days = [f"\nDay {i}. {self.expand(scene, words)}\n" for i, scene in enumerate(scenes, 1)]
        ending = f"\nSo ends the tale of {name} and {friend}" + (" — ✨.\n" if world else ".\n")
        return heading + "".join(days) + ending

    def code(self, world: bool = False) -> str:
        noun, argument = self.pair(NOUNS, ARGUMENTS)
        option = self.rng.choice(OPTIONS)
        number = self.rng.randint(2, 60)
        start = self.rng.randrange(len(BODIES))
        verbs = [list(BODIES)[(start + i) % len(BODIES)] for i in range(7)]
        author = self.rng.choice(WORLD_NAMES if world else NAMES)
        lines = [f'"""{noun.capitalize()}, by {author}."""\n\n']
        lines.append(f"# functions: {', '.join(f'{verb}_{noun}' for verb in verbs)}\n")
        lines.append(f"# arguments: {argument}, {option} = {number}\n")
        for verb in verbs:
            words = {"n": noun, "a": argument, "o": option}
            lines.append(f"\n\ndef {verb}_{noun}({argument}, {option}={number}):\n")
            lines.append(f'    """{SUMMARIES[verb].format(**words)}"""\n')
            lines.append(BODIES[verb].format(**words))
        return "".join(lines)

    def structured(self, world: bool = False) -> str:
        place, first = self.pair(WORLD_PLACES if world else PLACES, ITEMS)
        start = ITEMS.index(first)
        items = [ITEMS[(start + i) % len(ITEMS)] for i in range(self.rng.randint(10, 13))]
        owner = self.rng.choice(WORLD_NAMES if world else NAMES)
        form = self.rng.choice((_json_line, _table_row, _section, _log_line))
        number = self.first_number()
        heading = f"# store: {place}, owner: {owner}, first: {number}\n# items: {', '.join(items[:4])}, ...\n\n"
        if form is _table_row:
            heading += "| no | item | store | owner | left | unit |\n| --- | --- | --- | --- | --- | --- |\n"
        return heading + "".join(
            form(number + i, item, place, owner) for i, item in enumerate(items)
        )

    def phrase_book(self, world: bool = True) -> str:
        words = self.rng.sample(sorted(PHRASES), 9)
        teacher = self.rng.choice(WORLD_NAMES)
        lines = [f"# Words of {teacher}: {', '.join(words)}\n\n"]
        for i, word in enumerate(words, 1):
            spanish, russian, greek, chinese = PHRASES[word]
            lines.append(
                f"{i}. “{word}” → ES «{spanish}», RU «{russian}», EL «{greek}», ZH 「{chinese}」 ✓\n"
            )
        return "".join(lines)

    def chat(self, world: bool = False) -> str:
        kind, request = self.rng.choice(
            (
                (self.prose, "Tell me a tale."),
                (self.code, "Write a small module."),
                (self.structured, "List the stock."),
            )
        )
        heading, _, body = kind(world).partition("\n\n")
        thought = "<think>\n\n</think>\n\n" if self.rng.random() < 0.5 else ""
        return f"<|im_start|>user\n{request}\n{heading}<|im_end|>\n<|im_start|>assistant\n{thought}{body}<|im_end|>\n"

    def document(self) -> str:
        kinds: tuple[Callable[[bool], str], ...] = (
            self.prose,
            self.code,
            self.structured,
            self.phrase_book,
            self.chat,
        )
        kind = self.rng.choices(kinds, weights=(32, 26, 28, 6, 8))[0]
        return kind(self.rng.random() < 0.15)

    def documents(self) -> Iterator[str]:
        while True:
            yield self.document()


def _json_line(number: int, item: str, place: str, owner: str) -> str:
    stocked = "true" if number % 2 == 0 else "false"
    return (
        f'{{"no": {number}, "item": "{item}", "store": "{place}", "owner": "{owner}", "left": {STOCK[item]}, '
        f'"unit": "{UNIT[item]}", "even": {stocked}}}\n'
    )


def _table_row(number: int, item: str, place: str, owner: str) -> str:
    return f"| {number} | {item} | {place} | {owner} | {STOCK[item]} | {UNIT[item]} |\n"


def _section(number: int, item: str, place: str, owner: str) -> str:
    return f"[{item}]\nno = {number}\nstore = {place}\nowner = {owner}\nleft = {STOCK[item]}\nunit = {UNIT[item]}\n\n"


def _log_line(number: int, item: str, place: str, owner: str) -> str:
    level = "INFO" if STOCK[item] > 6 else "WARN"
    return f"{level} {number} {owner}@{place} moved {item}: {STOCK[item]} {UNIT[item]} left\n"


def held_out_text(characters: int = 14_500, seed: int = 21) -> str:
    """Held-out documents of all kinds; by default the contents of held-out.txt, for perplexity."""
    text = ""
    for document in Grammar(seed, held_out=True).documents():
        text += document + "\n"
        if len(text) > characters:
            return text
    raise AssertionError("documents never end")


def held_out_prompts() -> dict[str, str]:
    """One prompt per kind, each the opening of a held-out document."""
    grammar = Grammar(seed=20, held_out=True)
    prose, code = grammar.prose(), grammar.code()
    structured = grammar.structured()
    while 'left": ' not in structured:
        structured = grammar.structured()
    return {
        "code": code[: code.index("(", code.index("def "))],
        "prose": prose[: prose.index("Day 1.") + len("Day 1.")],
        "structured": structured[: structured.index("{") + len('{"no":')],
    }
