"""The card of a packaged folder: what was done to which model, and how it is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from quickmerge._version import __version__
from quickmerge.errors import QuickmergeError, clean
from quickmerge.models import MODELS
from quickmerge.recipe import Recipe

__all__ = ["card"]

LICENCE = ("license", "license_name", "license_link", "language")
"""What a model's own card says that goes for the packaged one too."""


def card(name: str, source: Path, recipe: Recipe, model: Any, *, out: str) -> str:
    """README.md of a packaged folder.

    Args:
        name: of the model, as it was given.
        source: its folder.
        recipe: what is done to it.
        model: loaded, for what that costs.
        out: what the folder is called.
    """
    hub = "/" in name and not Path(name).is_dir()
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["quickmerge", "custom_generate"]}
    head |= {"base_model": name} if hub else {}
    head |= _licence(source)
    called = name if hub or name in MODELS else source.name
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = min(4096, most) if isinstance(most, int) else 4096
    try:
        does = str(recipe.told(model, tokens))
    except QuickmergeError as error:  # what is told needs more than shapes in some families
        does = str(error)
    return f"""---
{yaml.safe_dump(head, sort_keys=True, allow_unicode=True).strip()}
---

# {clean(called)}, with fewer tokens

{clean(called)} with a recipe of [quickmerge](https://pypi.org/project/quickmerge/) {__version__}:
{clean(recipe.label)}. The weights are those of the model; `recipe/` says what is done to it.

```text
{clean(does)}
```

## Serve it

```bash
pip install quickmerge[serve]
transformers serve {clean(out)} --trust-remote-code
```

Without `--trust-remote-code` it is the plain model, and `--continuous-batching` is refused. A request asks for another
share by `"generation_config": "{{\\"keep\\": 0.5}}"` in its body; 1 is the plain model.

## Open it

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{clean(out)}", trust_remote_code=True)
model.generate(**inputs)              # by the recipe
model.generate(**inputs, keep=1.0)    # the plain model
```

## The recipe

```json
{json.dumps(recipe.as_dict(), indent=1, ensure_ascii=False)}
```
"""


def _licence(source: Path) -> dict[str, Any]:
    """What the head of the model's own card says of its licence; it may be a stranger's."""
    try:
        text = (source / "README.md").read_text(encoding="utf-8")[: 1 << 16]
        data = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
    except (OSError, ValueError, IndexError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(data, dict):
        return {}
    found = {name: data[name] for name in LICENCE if name in data}
    return {
        name: value
        for name, value in found.items()
        if (isinstance(value, str) and len(value) < 300)
        or (isinstance(value, list) and len(value) < 100 and all(isinstance(each, str) for each in value))
    }
