import json
from pathlib import Path

import pytest
from tokenizer_samples import byte_level, sentencepiece_bpe
from transplant_samples import model_folder, tokenizer_folder

from quickmerge.errors import DamagedWeightsError, QuickmergeError
from quickmerge.transplant.api import transplant
from quickmerge.transplant.tokens import read_vocabulary
from quickmerge.transplant.write import read_former, vocabulary_sha256


@pytest.fixture
def out(tmp_path: Path) -> Path:
    base = model_folder(tmp_path / "base", "llama tied")
    transplant(base, None, tokenizer_folder(tmp_path / "wanted"), tmp_path / "out", method="mean")
    return tmp_path / "out"


def test_a_folder_knows_its_former_vocabulary(out: Path) -> None:
    former = read_former(out)
    assert former is not None and former.rows == 420 and len(former.origin) == 520
    assert former.vocabulary == vocabulary_sha256(read_vocabulary(byte_level(420)))
    assert former.vocabulary != vocabulary_sha256(read_vocabulary(sentencepiece_bpe(520)))
    kept = set(former.origin[former.origin >= 0].tolist())
    assert kept | set(former.put_aside.tolist()) == set(range(420))
    assert former.tensor("input", former.put_aside[2:5]).shape == (3, 32)


def test_another_folder_knows_none(out: Path) -> None:
    assert read_former(out.parent / "base") is None
    (out / "transplant" / "dropped_rows.safetensors").unlink()
    assert read_former(out) is None


def test_what_is_damaged_or_newer_is_told(out: Path) -> None:
    path = out / "transplant.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format": 2}))
    with pytest.raises(QuickmergeError, match="must be of format 1, got 2"):
        read_former(out)
    path.write_text("{")
    with pytest.raises(DamagedWeightsError, match="not a manifest of a transplant"):
        read_former(out)
    path.write_text(json.dumps(data))
    rows = out / "transplant" / "rows.safetensors"
    rows.write_bytes(rows.read_bytes()[:-3])
    with pytest.raises(DamagedWeightsError, match=r"rows\.safetensors is damaged"):
        read_former(out)
    rows.unlink()
    with pytest.raises(DamagedWeightsError, match="is missing"):
        read_former(out)
