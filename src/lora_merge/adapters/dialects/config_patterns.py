"""PEFT's patterns of module names, matched in time that grows with the name and not beyond.

They are regular expressions from a file, and Python's matcher tries every way to match one: a few
characters take it for ever. Whether *any* way exists is all that counts here, so all ways advance
together: a set of places in the name (the bits of a number), moved through the expression piece by
piece.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache, reduce
from itertools import pairwise
from operator import or_
from re import _constants as codes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_LONGEST = 10_000  # characters of a pattern
_MOST_TIMES = 1000  # of a piece that is repeated a given number of times
_DEEPEST = 3  # repetitions inside one another
_FEW_CHOICES = 4  # two of them PEFT's own: few enough for Python's matcher, which is faster
_CATEGORIES = {
    codes.CATEGORY_DIGIT: str.isdigit,
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_WORD: lambda letter: letter.isalnum() or letter == "_",
    codes.CATEGORY_NOT_DIGIT: lambda letter: not letter.isdigit(),
    codes.CATEGORY_NOT_SPACE: lambda letter: not letter.isspace(),
    codes.CATEGORY_NOT_WORD: lambda letter: not (letter.isalnum() or letter == "_"),
}


class PatternError(ValueError):
    """No pattern, or one with parts that no module name needs."""


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """First pattern that matches a module's name or a dotted suffix of it, as PEFT does.

    Raises:
        PatternError: If one before it is no pattern that can be matched.
    """
    return next((key for key in patterns if matcher(key)(module)), None)


@lru_cache(maxsize=4096)
def matcher(pattern: str, *, whole: bool = False) -> Callable[[str], bool]:
    r"""Whether a pattern, completed as PEFT does it to `(.*\.)?(pattern)$`, matches a name.

    Args:
        pattern: A regular expression.
        whole: It has to match the whole name, as `target_modules` does.

    Raises:
        PatternError: If it is no regular expression, or one with references or look-behind.
    """
    if len(pattern) > _LONGEST:
        raise PatternError(f"{len(pattern)} characters are too many")
    completed = rf"({pattern})$" if whole else rf"(.*\.)?({pattern})$"
    try:
        tree = parser.parse(completed)
        nesting, choices = _size(tree)
    except (re.error, OverflowError) as error:
        raise PatternError(str(error)) from error
    except RecursionError as error:
        raise PatternError("it is nested too deeply") from error
    if nesting > _DEEPEST:
        raise PatternError(f"repetitions inside one another more than {_DEEPEST} times")
    if tree.state.flags & (re.IGNORECASE | re.MULTILINE | re.DOTALL | re.VERBOSE):
        raise PatternError("flags are not supported")
    _advance(tree, "", 1)  # every kind of piece is looked at, and refused where unknown
    if nesting < 2 and choices <= _FEW_CHOICES:
        found = re.compile(completed)
        return lambda name: found.match(name) is not None
    return lambda name: bool(_advance(tree, name, 1) >> len(name))


def _size(pieces: Any) -> tuple[int, int]:
    """How many repetitions stand inside one another, and how many choices there are in all."""
    deepest = choices = 0
    for code, argument in pieces:
        inside: list[Any] = []
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            inside = [argument[2]]
        elif code is codes.BRANCH:
            inside = argument[1]
        elif code is codes.SUBPATTERN:
            inside = [argument[3]]
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            inside, choices = [argument[1]], choices + _FEW_CHOICES
        repeats = code in (codes.MAX_REPEAT, codes.MIN_REPEAT) and argument[1] > 1
        sizes = [_size(one) for one in inside]
        deepest = max([deepest, *(repeats + size[0] for size in sizes)])
        below = sum(size[1] for size in sizes)
        choices += below + (code is not codes.SUBPATTERN and bool(inside))
        if repeats and below:  # a choice that is made again and again
            choices += _FEW_CHOICES
    return deepest, choices


def _advance(pieces: Any, name: str, places: int) -> int:
    """Where in the name one can be after some pieces, from any of some places: bit i is place i."""
    for code, argument in pieces:
        if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            low, high, inside = argument
            places = _repeat(int(low), int(high), inside, name, places)
        elif code is codes.BRANCH:
            places = reduce(or_, (_advance(one, name, places) for one in argument[1]))
        elif code is codes.SUBPATTERN:
            _, added, removed, body = argument
            if added or removed:
                raise PatternError("flags are not supported")
            places = _advance(body, name, places)
        elif code is codes.AT:
            places &= _anchor(argument, name)
        elif code in (codes.ASSERT, codes.ASSERT_NOT):
            direction, ahead = argument
            places &= _looks_ahead(direction, ahead, name, places) ^ -(code is codes.ASSERT_NOT)
        else:
            fits = _letter(code, argument)
            letters = sum(1 << place for place, letter in enumerate(name) if fits(letter))
            places = (places & letters) << 1
    return places


def _repeat(low: int, high: int, inside: Any, name: str, places: int) -> int:
    if low > _MOST_TIMES:
        raise PatternError(f"a repetition of {low} times")
    for _ in range(max(low, 1)):  # once at least: it may hold what has to be refused
        before, moved = places, _advance(inside, name, places)
        places = moved if low else places
        if places == before:
            break
    found = new = places
    for _ in range(min(high - low, len(name) + 1)):
        new = _advance(inside, name, new) & ~found if new else 0
        found |= new
    return found


def _looks_ahead(direction: int, inside: Any, name: str, places: int) -> int:
    """The places from which some pieces could follow."""
    if direction < 0:
        raise PatternError("looking behind is not supported")
    _advance(inside, name, 1)  # it may hold what has to be refused
    each = (1 << place for place in range(places.bit_length()) if places >> place & 1)
    return sum(place for place in each if _advance(inside, name, place))


def _anchor(code: Any, name: str) -> int:
    if code in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
        return 1
    if code in (codes.AT_END, codes.AT_END_STRING):
        return 1 << len(name)
    if code is codes.AT_BOUNDARY:
        words = [False, *map(_CATEGORIES[codes.CATEGORY_WORD], name), False]
        return sum(1 << place for place, pair in enumerate(pairwise(words)) if pair[0] != pair[1])
    raise PatternError("only ^, $ and \\b are known of what stands between characters")


def _letter(code: Any, argument: Any) -> Any:
    """Whether one character fits a piece."""
    if code is codes.LITERAL:
        return lambda letter: ord(letter) == argument
    if code is codes.NOT_LITERAL:
        return lambda letter: ord(letter) != argument
    if code is codes.ANY:
        return lambda letter: letter != "\n"
    if code is codes.RANGE:
        return lambda letter: argument[0] <= ord(letter) <= argument[1]
    if code is codes.CATEGORY:
        return _CATEGORIES[argument]
    if code is codes.IN:
        negated = argument[0][0] is codes.NEGATE
        parts = [_letter(*one) for one in argument[negated:]]
        return lambda letter: any(fits(letter) for fits in parts) != negated
    raise PatternError(f"{str(code).lower()} is not supported")
