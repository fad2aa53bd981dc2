"""transformers opens what quickmerge saves after ``import quickmerge``, in whatever order the two are imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from calm_samples import small_calm

CODE = """
import sys
folder = sys.argv[1]
{imports}
config = AutoConfig.from_pretrained(folder)
assert type(config).__name__ == "CalmConfig", config
{more}
"""
MODEL = """
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model).__name__ == "CalmForCausalLM"
coder = AutoModel.from_pretrained(folder + "/coder")
assert type(coder).__name__ == "CalmAutoencoder"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("auto")
    model = small_calm()
    model.save_pretrained(folder)
    model.autoencoder.save_pretrained(folder / "coder")
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import quickmerge\nassert 'transformers' not in sys.modules\nfrom transformers import AutoConfig",
        "from transformers import AutoConfig\nimport quickmerge",
        pytest.param(
            "import quickmerge\nfrom transformers import AutoModelForCausalLM, AutoConfig", marks=pytest.mark.slow
        ),
        "import quickmerge.continuous.config\nfrom transformers import AutoConfig",
        "import quickmerge.continuous.autoencoder\nfrom transformers import AutoConfig",
        pytest.param(
            "import quickmerge.continuous.autoencoder_config\nfrom transformers import AutoConfig",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_in_any_order(folder: Path, imports: str) -> None:
    code = CODE.format(imports=imports, more=MODEL)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
