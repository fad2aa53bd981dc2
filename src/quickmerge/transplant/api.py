"""Another tokenizer for a model, without training: all of it, from the folders that are read to the one written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.data import demo_document
from quickmerge.errors import QuickmergeError, check_string, first_sentence, near_match
from quickmerge.models.tokenizers import load_tokenizer
from quickmerge.transplant.checkpoint import find_matrices, open_checkpoint
from quickmerge.transplant.choose_by_text import rebuild_by_text
from quickmerge.transplant.choose_by_tokens import check_method
from quickmerge.transplant.donor import Donor, model_folder, read_donor
from quickmerge.transplant.matching import Matching, Segmenter, digit_report, match
from quickmerge.transplant.quality import Report
from quickmerge.transplant.rebuild import Made, Maker, check_clip, rebuild
from quickmerge.transplant.rows import Plan, make_plan, new_size, return_plan, same_vocabulary
from quickmerge.transplant.settings import Template, choose_template, of_tokenizer
from quickmerge.transplant.tokens import Vocabulary, read_vocabulary
from quickmerge.transplant.write import Former, Transplant, read_former, vocabulary_sha256, write_transplant
from quickmerge.transplant.writer import check_out

if TYPE_CHECKING:
    from quickmerge.transplant.rows import Side

__all__ = ["Progress", "transplant"]

CHOOSING = ("text", "held-out")

Progress = Callable[[str, int, int], None]
"""Told what goes on, how much of it is done, and how much there is."""


def transplant(
    base: str | os.PathLike[str],
    donor: str | os.PathLike[str] | None,
    tokenizer: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    method: str = "auto",
    k: int | None = None,
    special: Mapping[str, str] | None = None,
    pad_to_multiple_of: int | None = None,
    vocab_size: int | None = None,
    clip: float | None = None,
    text: Sequence[str] | None = None,
    choose_by: str = "text",
    choose_on: Sequence[str] | None = None,
    keep_dropped: bool = True,
    dry_run: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Report:
    """Write a model that has the body of one model and the vocabulary of another.

    Rows of tokens that both vocabularies have are copied bit for bit. A model that a transplant wrote remembers the
    vocabulary that it had: given that tokenizer, it goes back to it, and nothing is approximated.

    Args:
        base: the model that is kept: an embedded name, a folder, or a hub id; its weights as safetensors.
        donor: where vectors of the new tokens come from: a model, or a safetensors file with a row for each token id;
            None where there are none.
        tokenizer: the tokenizer that is wanted: a folder, a file, a name; None for the donor's own.
        out: the folder that is written: a new one, or one that a transplant wrote.
        method: one of ``METHODS``; ``auto`` lets them compete.
        k: how many shared tokens a row is made of, in the methods that ask; None lets held-out tokens decide.
        special: token of the new vocabulary -> text of the base that has its job.
        pad_to_multiple_of: round the number of rows up.
        vocab_size: exactly so many rows.
        clip: scale new rows down to this quantile of the norms of shared rows; None leaves them as they are.
        text: texts to make vectors from where there is no donor.
        choose_by: what ``auto`` trusts. ``"text"``: what a text costs with the new rows, for each kind of token; the
            base is loaded for it. ``"held-out"``: how well hidden shared tokens are rebuilt, and no more.
        choose_on: texts to choose on, of the kind that the model is for; default the shipped document, in English.
        keep_dropped: put the rows that nobody takes over aside, for the way back.
        dry_run: do everything but write.
        seed: draws the held-out tokens.
        progress: told what goes on.

    Returns:
        What was done.

    Raises:
        QuickmergeError: something that was given can't be used or has no meaning, or ``out`` can't be written; nothing
            is then at ``out`` but what was there before.
        UnknownModelError, UnsupportedModelError, DamagedWeightsError, FetchError, CacheFolderError: as for `load`.
    """
    from quickmerge.models.read import read_config, transformers_silenced

    target = Path(out).expanduser()
    given = donor is not None or bool(text)
    check_method(method, k, vectors=given)
    _check_choosing(method, choose_by, choose_on)
    for name, texts in (
        ("text", text),
        ("choose_on", choose_on),
        ("special", [*(special or {}), *(special or {}).values()]),
    ):
        for one in texts or ():
            check_string(name, one)
    check_clip(clip)
    if tokenizer is None and donor is None:
        raise QuickmergeError("give tokenizer, or a donor that has one, got neither")
    wanted = tokenizer if tokenizer is not None else donor
    assert wanted is not None
    folder = model_folder(base, progress=progress is not None)
    others = [Path(one) for one in (donor, tokenizer) if one is not None]
    if not dry_run:
        check_out(target, folder, *others)
    new_tokenizer, old_tokenizer = load_tokenizer(wanted), load_tokenizer(folder)
    with transformers_silenced():
        config = read_config(str(folder))
    checkpoint = open_checkpoint(folder)
    matrices = find_matrices(checkpoint, config)
    theirs, ours = read_vocabulary(new_tokenizer), read_vocabulary(old_tokenizer)
    vectors = None if donor is None else read_donor(donor, progress=progress is not None)
    former = read_former(folder)
    matching = match(theirs, ours, special, base_tokenizer=old_tokenizer)
    plan, way_back = _plan(
        matching, theirs, ours, matrices.rows, vectors, former, vocab_size=vocab_size, pad=pad_to_multiple_of
    )
    if special and (way_back or plan.identical):
        raise QuickmergeError(
            "special has no meaning where the tokenizer is the model's own or its former one, for all of its rows are "
            f"known: leave it out (got {len(special)})"
        )
    if vectors is not None and len(plan.rebuilt):
        _check_donor(vectors, theirs, plan)
    if vectors is None and text and len(plan.rebuilt):
        vectors = _from_text(new_tokenizer, text, seed=seed, progress=progress)
    sides: dict[Side, Any] = {"input": matrices.input}
    if matrices.output is not None:
        sides["output"] = matrices.output
    segmenter = Segmenter(ours, old_tokenizer)
    made: dict[Side, Made] = {}
    makers: dict[Side, Maker] = {}
    for side, entry in sides.items():
        matrix = checkpoint.read(entry.name)
        if not len(plan.rebuilt):
            made[side] = Made(matrix[:0].float(), "none needed")
            continue
        rows = None if vectors is None else (vectors.input if side == "input" else vectors.output)
        maker = Maker(plan, theirs, matrix, rows, segmenter)
        made[side] = rebuild(
            maker, side, method=method, k=k, clip=clip, seed=seed, kinds=matching.kinds, progress=progress
        )
        if method == "auto" and choose_by == "text":
            makers[side] = maker
    if makers:
        made = rebuild_by_text(
            _loaded(base), new_tokenizer, choose_on or [demo_document()], makers, made,
            bias=None if matrices.bias is None else checkpoint.read(matrices.bias.name), clip=clip,
            kinds=matching.kinds, progress=progress,
        )  # fmt: skip
    template = choose_template(old_tokenizer, new_tokenizer)
    if way_back:
        template = _former_template(former, new_tokenizer)
    work = Transplant(
        base=os.fspath(base), donor=None if donor is None else os.fspath(donor), tokenizer_name=os.fspath(wanted),
        folder=folder, checkpoint=checkpoint, matrices=matrices, plan=plan, made=made,
        former=former if way_back else None,
        ours=ours, theirs=theirs, old_tokenizer=old_tokenizer, tokenizer=new_tokenizer, template=template,
        method=method, k=k, clip=clip, seed=seed, keep_dropped=keep_dropped,
    )  # fmt: skip
    notes = write_transplant(work, None if dry_run else target, progress)
    return Report(
        base=work.base, donor=work.donor, tokenizer=work.tokenizer_name, out=None if dry_run else str(target),
        base_rows=matrices.rows, rows=plan.size, counts=plan.counts(), kinds=plan.kinds(),
        unmapped=tuple(theirs.by_id[one].text for one in plan.unmapped if one in theirs.by_id),
        special={theirs.by_id[one].text: tuple(ours.by_id[b].text for b in ids) for one, ids in plan.special.items()},
        matrices={side: one.as_dict() for side, one in made.items()}, tied=matrices.output is None,
        identical=plan.identical, way_back=way_back, template=(template.source, template.why),
        digits=digit_report(old_tokenizer, new_tokenizer, seed=seed), notes=tuple(notes),
    )  # fmt: skip


def _plan(
    matching: Matching,
    theirs: Vocabulary,
    ours: Vocabulary,
    base_rows: int,
    vectors: Donor | None,
    former: Former | None,
    *,
    vocab_size: int | None,
    pad: int | None,
) -> tuple[Plan, bool]:
    """The plan, and whether it is the way back to a former vocabulary."""
    if same_vocabulary(theirs, ours):
        size = new_size(theirs.size, vocab_size=vocab_size, pad_to_multiple_of=pad, usual=base_rows)
        return make_plan(matching, theirs, ours, size=size, base_rows=base_rows, identical=True), False
    if former is not None and former.vocabulary == vocabulary_sha256(theirs):
        size = new_size(theirs.size, vocab_size=vocab_size, pad_to_multiple_of=pad, usual=former.rows)
        return return_plan(former.origin, former.put_aside, size=size), True
    usual = 0 if vectors is None else vectors.rows
    size = new_size(theirs.size, vocab_size=vocab_size, pad_to_multiple_of=pad, usual=usual)
    return make_plan(matching, theirs, ours, size=size, base_rows=base_rows), False


def _former_template(former: Former | None, tokenizer: Any) -> Template:
    """On the way back the template that the model had, whatever lies beside the tokenizer that was given."""
    own = of_tokenizer(tokenizer) if former is None or former.template is None else former.template[0]
    return Template(own, "none" if own is None else "tokenizer", "the vocabulary is the model's former one")


def _check_choosing(method: str, choose_by: str, choose_on: Sequence[str] | None) -> None:
    if choose_by not in CHOOSING:
        near = near_match(str(choose_by), CHOOSING)
        raise QuickmergeError(f"choose_by must be one of {', '.join(CHOOSING)}, got {choose_by!r}{near}")
    if choose_on is not None:
        if method != "auto" or choose_by != "text":
            raise QuickmergeError(
                f"choose_on belongs to method auto with choose_by text, got method {method} with choose_by {choose_by}"
            )
        if not any(one.strip() for one in choose_on):
            raise QuickmergeError("choose_on must hold a text, got none")


def _loaded(base: str | os.PathLike[str]) -> Any:
    """The base, to be asked what texts cost."""
    from quickmerge.models import load

    try:
        return load(base, progress=False)[0]
    except (MemoryError, RuntimeError) as error:
        raise QuickmergeError(
            f"base can't be loaded, which choosing by text needs ({first_sentence(error)}): choose by held-out tokens "
            "instead (choose_by='held-out')"
        ) from error


def _check_donor(donor: Donor, vocabulary: Vocabulary, plan: Plan) -> None:
    beyond = plan.rebuilt[plan.rebuilt >= donor.rows]
    ordinary = [int(one) for one in beyond if not vocabulary.by_id[int(one)].added]
    if ordinary:
        raise QuickmergeError(
            f"donor must have a vector for each token of the tokenizer, got {donor.rows} vectors in {donor.name} and "
            f"{len(ordinary)} tokens beyond them, {vocabulary.by_id[ordinary[0]].text!r} (id {ordinary[0]}) first: "
            "give the tokenizer that belongs to the donor"
        )


def _from_text(tokenizer: Any, text: Sequence[str], *, seed: int, progress: Progress | None) -> Donor:
    from quickmerge.transplant.donor import embeddings_from_text

    if progress is not None:
        progress("making vectors from text", 0, 1)
    rows = embeddings_from_text(tokenizer, text, seed=seed)
    if progress is not None:
        progress("making vectors from text", 1, 1)
    if not bool(rows.any()):
        raise QuickmergeError("text must be long enough to make vectors from, got none for any token")
    return Donor("text", rows, rows, "vectors from text")
