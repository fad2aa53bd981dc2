"""Gives the keys of committed results the names that they have since version 0.2; a file that has them is left alone.

Usage:
    python benchmarks/migrate_results.py [FILES, default: benchmarks/results/*.json]
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

NAMES = {
    "agrees": "agreement",
    "correct": "accuracy",
    "per_pass": "tokens_per_pass",
    "per_second": "tokens_per_second",
    "pictures": "images",
}
"""The old name of a quantity by the new one; what stands behind it (``_low``, ``_high``, ``_change``) stays."""
VALUES = {"picture": "image"}
"""The same for what values call a kind of thing."""
PATTERN = re.compile(rf"({'|'.join(NAMES)})(?=_low$|_high$|_change$|_change_low$|_change_high$|$)")


def renamed(value: Any) -> Any:
    """The same results under the new names, at any depth.

    Raises:
        ValueError: if an object holds a quantity by both names.
    """
    if isinstance(value, list):
        return [renamed(item) for item in value]
    if isinstance(value, str):
        return VALUES.get(value, value)
    if not isinstance(value, dict):
        return value
    pairs = [(PATTERN.sub(lambda found: NAMES[found[1]], key, count=1) if PATTERN.match(key) else key, item)
             for key, item in value.items()]  # fmt: skip
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError(f"both names of a quantity are there: {sorted(value)}")
    return {key: renamed(item) for key, item in pairs}


def main() -> None:
    """Rewrite the files whose names have changed, and say which."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    files = parser.parse_args().files or sorted((Path(__file__).parent / "results").glob("*.json"))
    for file in files:
        text = file.read_text(encoding="utf-8")
        before = json.loads(text)
        after = renamed(before)
        if after != before:
            indent = len(re.match(r"\{\n( *)", text)[1]) if re.match(r"\{\n( *)", text) else None  # type: ignore[index]
            file.write_text(json.dumps(after, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
            print(f"renamed keys of {file.name}")


if __name__ == "__main__":
    main()
