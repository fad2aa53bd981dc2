"""The fonts of the token map picture, and which characters they can draw."""

from __future__ import annotations

from functools import cache

# The first comes with matplotlib, so a Latin, Greek or Cyrillic document looks the same everywhere; the others are
# what systems have for the scripts it lacks.
_FAMILIES = (
    "DejaVu Sans Mono",
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "MS Gothic",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Arabic",
)
_MISSING = "▯"


def families() -> list[str]:
    """Return the families to draw with, first choice first, of those that are installed."""
    return list(_characters())


def heading_families() -> list[str]:
    """Return the families for titles: proportional first, then those for other scripts."""
    return ["DejaVu Sans", *families()]


def drawable(text: str) -> str:
    """Return ``text`` with a box for every character that no family has, instead of a warning for each."""
    known = _characters().values()
    return "".join(char if any(ord(char) in table for table in known) else _MISSING for char in text)


@cache
def _characters() -> dict[str, frozenset[int]]:
    from matplotlib.font_manager import findfont, fontManager
    from matplotlib.ft2font import FT2Font

    installed = set(fontManager.get_font_names())
    return {name: frozenset(FT2Font(findfont(name)).get_charmap()) for name in _FAMILIES if name in installed}
