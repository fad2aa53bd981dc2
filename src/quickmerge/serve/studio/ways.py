"""The recipes that the page offers, and each of them as Python, as a command and as a file.

A way is what the options of ``quickmerge generate`` would say, so that the command that is shown does the same.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quickmerge.console.options import check_share, one_sentence
from quickmerge.data import PRIORS
from quickmerge.errors import QuickmergeError
from quickmerge.merge.cli.options import parse_reducer
from quickmerge.recipe import Recipe
from quickmerge.recipe.options import load_recipe, make_recipe, place, text_merge

__all__ = ["PATCHES", "Told", "Way", "loaded", "told_image", "told_text", "way_called", "ways_of"]

MERGING = ("reducer", "prior")
"""Options that mean that tokens are merged, or dropped, in the prompt."""


@dataclass(frozen=True)
class Way:
    """One way to make a text cheaper.

    Attributes:
        label: what the page calls it.
        about: a sentence on it.
        options: by the names of the command's options, without dashes; ``{keep}`` stands for the share.
        shares: whether there is a share to choose.
        recipe: what was loaded, in place of options.
        source: where that was loaded from.
    """

    label: str
    about: str
    options: Mapping[str, str] = field(default_factory=dict)
    shares: bool = True
    recipe: Recipe | None = None
    source: str = ""

    @property
    def merges(self) -> bool:
        """Whether tokens of the prompt become fewer."""
        if self.recipe is not None:
            return self.recipe.merge is not None
        return any(name in self.options for name in MERGING)

    def made(self, keep: float, literals: bool = False) -> Recipe:
        """The recipe with a share; ``literals`` keeps numbers, names and paths whole where tokens are merged.

        Raises:
            QuickmergeError: the share is none.
        """
        if self.recipe is not None:
            return self.recipe
        check_share("keep", keep)
        given = self.given(keep)
        merge = None
        if self.merges:
            merge = text_merge(
                given.get("reducer"), keep, None, given.get("prior"), 0, "literals" if literals else None
            )
        with one_sentence():
            return make_recipe(merge=merge, cache=given.get("cache"), drafter=given.get("drafter"))

    def given(self, keep: float) -> dict[str, str]:
        """The options with the share put in."""
        return {name: text.replace("{keep}", f"{keep:g}") for name, text in self.options.items()}


def ways_of(model: str, further: Sequence[Way] = ()) -> list[Way]:
    """The ways for a language model of that name; the loaded ones of ``further`` come first."""
    ways = [
        *further,
        Way("QuickMerge", "Merges tokens that say little into their neighbours.", {"reducer": "quickmerge"}),
    ]
    if model in PRIORS:
        about = "QuickMerge, led by a small network that was trained for this model."
        ways.append(Way("QuickMerge with its trained prior", about, {"reducer": "quickmerge", "prior": model}))
    both = {"reducer": "quickmerge", "drafter": "lookup"}
    return [
        *ways,
        Way("QuickMerge and prompt lookup", "Merges, and drafts the answer from the text: no further loss.", both),
        Way(
            "SnapKV: a smaller cache",
            "Reads all tokens, then drops cache entries that the end of the prompt does not look at.",
            {"cache": "snapkv:keep={keep}:min_tokens=0"},
        ),
        Way("Prompt lookup: nothing lost", "Drafts the answer from the text; the model checks every token.",
            {"drafter": "lookup"}, shares=False),
        Way("Baseline: attention", "Keeps the tokens that are looked at most, drops the others.",
            {"reducer": "attention"}),
        Way("Baseline: ToMe", "Merges the most similar tokens.", {"reducer": "tome"}),
        Way("Baseline: truncate", "Keeps the end of the text.", {"reducer": "truncate"}),
        Way("Baseline: random", "Keeps tokens at random.", {"reducer": "random"}),
    ]  # fmt: skip


def loaded(given: str) -> Way:
    """A saved recipe as a way, used as it is: a folder, a file or a hub id, as ``--recipe`` takes it.

    Raises:
        QuickmergeError: there is none, or it does nothing to a text.
    """
    recipe = load_recipe(given)
    if recipe.empty or recipe.visual is not None or recipe.tower is not None:
        raise QuickmergeError(f"--recipe must be one for texts, got {recipe.label} in {given!r:.200}")
    return Way(f"{recipe.label[:60]} ({given[-40:]})", "A saved recipe, used as it is.", {}, False, recipe, given)


def way_called(label: object, ways: Sequence[Way]) -> Way:
    """The way of that label.

    Raises:
        QuickmergeError: there is none.
    """
    for way in ways:
        if way.label == label:
            return way
    raise QuickmergeError(f"the recipe must be one of {', '.join(way.label for way in ways)}, got {label!r:.80}")


# As Python, as a command, as a file -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Told:
    """A recipe to take along: ``python``, ``command``, and ``file``, the content of recipe.json."""

    python: str
    command: str
    file: str


def told_text(way: Way, recipe: Recipe, model: str, question: str, keep: float, literals: bool, longest: int) -> Told:
    """What was done to a text.

    Args:
        way: that was chosen.
        recipe: that it made.
        model: its name.
        question: that was asked.
        keep: the share.
        literals: whether those stay whole.
        longest: tokens of the answer.
    """
    python = "\n".join([
        "import quickmerge as qm",
        "from quickmerge.recipe.answer import answer",
        "",
        _python(recipe, way.source),
        f"model, tokenizer = qm.load({model!r})",
        'document = open("document.txt", encoding="utf-8").read()',
        f"found = answer(model, tokenizer, document, {question!r}, recipe, max_new_tokens={longest})",
        "print(found.text)",
        "print(found.stats)",
        "",
    ])  # fmt: skip
    words = ["quickmerge", "generate", "text", "document.txt", "--prompt", question, "--model", model]
    if way.recipe is not None:
        words += ["--recipe", way.source]
    else:
        for name, value in way.given(keep).items():
            words += [f"--{name}", value]
        if way.merges:
            words += ["--keep", f"{keep:g}", "--min-tokens", "0"]
            words += ["--protect", "literals"] if literals else []
    words += ["--max-new-tokens", str(longest), "--compare"]
    return Told(python, shlex.join(words), _file(recipe))


PATCHES = {"vision": "tower", "vlm": "visual"}
"""Where patches become fewer, by the kind of the model: the recipe's argument."""


def told_image(kind: str, model: str, reducer: str, keep: float, question: str, longest: int) -> tuple[Recipe, Told]:
    """What was done to an image: the recipe, and how to do it elsewhere.

    Args:
        kind: ``"vision"`` or ``"vlm"``.
        model: its name.
        reducer: the name of the method.
        keep: the share.
        question: that was asked of a vision-language model.
        longest: tokens of the answer.

    Raises:
        QuickmergeError: a setting is out of range.
    """
    check_share("keep", keep)
    method = parse_reducer(reducer, keep, "visual" if kind == "vlm" else "vision")
    recipe = Recipe(**{PATCHES[kind]: place(method, None, None)})  # type: ignore[arg-type]
    said = _python(recipe, "")
    if kind == "vlm":
        lines = [
            "import quickmerge as qm",
            "from PIL import Image",
            "from quickmerge.recipe.answer import answer_images",
            "",
            said,
            f"model, processor = qm.load_vlm({model!r})",
            'images = [Image.open("image.png")]',
            f"found = answer_images(model, processor, images, {question!r}, recipe, max_new_tokens={longest})",
            "print(found.text)",
        ]
        words = ["generate", "image", "image.png", "--prompt", question, "--model", model, "--reducer", reducer]
        words += ["--keep", f"{keep:g}", "--max-new-tokens", str(longest), "--compare"]
    else:
        lines = [
            "import quickmerge as qm",
            "from PIL import Image",
            "",
            said,
            f"model, processor = qm.load_vision({model!r})",
            'inputs = processor([Image.open("image.png")], return_tensors="pt")',
            "with qm.apply(model, recipe) as run:",
            "    features = model(**inputs).last_hidden_state",
            "print(run.summary())",
        ]
        words = ["show", "image", "image.png", "--model", model, "--reducer", reducer, "--keep", f"{keep:g}"]
    return recipe, Told("\n".join([*lines, ""]), shlex.join(["quickmerge", *words]), _file(recipe))


def _python(recipe: Recipe, source: str) -> str:
    """A line that makes an equal recipe, as one would write it where no trained part is inside."""
    if source:
        return f"recipe = qm.Recipe.from_pretrained({source!r})"
    data = recipe.as_dict()
    data.pop("quickmerge", None)
    if '"sha256"' in json.dumps(data):
        return f"recipe = qm.Recipe.from_dict({_plain(data)!r})"
    written = re.sub(r"\b(?=[A-Z]\w*\()", "qm.", repr(recipe))
    return f"recipe = {written}"


def _plain(data: Any) -> Any:
    """The same without the hashes of what ships, which are checked where it is read."""
    return {name: value for name, value in data.items() if name != "type"}


def _file(recipe: Recipe) -> str:
    return json.dumps(recipe.as_dict(), indent=2) + "\n"
