"""SmolLM2 with the vocabulary of Llama 2, rows from static vectors: what a real transplant comes to."""

from pathlib import Path

import pytest
from safetensors import safe_open
from transplant_samples import same_bits, tensors

from quickmerge.data import demo_document
from quickmerge.errors import FetchError
from quickmerge.models.download import cache_folder
from quickmerge.models.embedded import EMBEDDED
from quickmerge.transplant.api import transplant
from quickmerge.transplant.quality import measure

pytestmark = pytest.mark.slow
BASE, DONOR = "smollm2-135m", "wordllama-l2"


@pytest.fixture(scope="module")
def base() -> Path:
    try:
        EMBEDDED[DONOR].prepare(cache_folder(), progress=False)
        return EMBEDDED[BASE].prepare(cache_folder(), progress=False)
    except FetchError as error:
        pytest.skip(f"the weights can't be fetched: {error}")


def test_weights_that_sum_to_less_than_one_ruin_a_model_and_there_and_back_is_exact(base: Path, tmp_path: Path) -> None:
    text = [demo_document()[:3000]]
    chosen = transplant(BASE, DONOR, None, tmp_path / "auto")
    assert chosen.counts["copied"] == 18_709 and 13_100 < chosen.counts["rebuilt"] < 13_300 and not chosen.unmapped
    table = {row["rule"]: row for row in chosen.matrices["input"]["table"]}
    assert chosen.matrices["input"]["rule"].startswith("nearest")
    assert table["nearest k=64 softmax 10"]["centred_cosine"] > 0.5 > table["omp k=8 unit"]["centred_cosine"] > 0.4
    good = measure(BASE, chosen, text)
    assert good.before.bits_per_byte < good.after.bits_per_byte < good.before.bits_per_byte + 0.4
    assert good.logits is not None and good.logits.share_won < 0.05

    raw = transplant(BASE, DONOR, None, tmp_path / "raw", method="omp-raw", k=8)
    bad = measure(BASE, raw, text)
    # few tokens of the text are new, but new rows take a third of its positions from those that are not
    assert bad.after.bits_per_byte > good.after.bits_per_byte + 0.5
    assert bad.logits is not None and bad.logits.share_won > 0.2
    assert bad.logits.loudest > good.logits.loudest + 15

    transplant(tmp_path / "auto", None, BASE, tmp_path / "back")
    new = tensors(tmp_path / "back")
    with safe_open(base / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(new)
        assert all(same_bits(new[name], file.get_tensor(name)) for name in new)
