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
        "import quickmerge.calm.config\nfrom transformers import AutoConfig",
        "import quickmerge.calm.autoencoder\nfrom transformers import AutoConfig",
        pytest.param(
            "import quickmerge.calm.config\nfrom transformers import AutoConfig",
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


BROKEN = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name in {broken!r}:
            raise {error}("half of it is there")

{imports}
assert AutoConfig.for_model("llama").model_type == "llama"
from transformers import AutoModel, PreTrainedModel
assert not any(name == "quickmerge.calm.config" for name in sys.modules)
"""


BEFORE = "import quickmerge\nsys.meta_path.insert(0, Broken())\nfrom transformers import AutoConfig"
AFTER = "from transformers import AutoConfig\nsys.meta_path.insert(0, Broken())\nimport quickmerge"
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("imports", "broken", "error"),
    [
        (BEFORE, "quickmerge.calm.config", "ImportError"),
        (BEFORE, "quickmerge.models.compat", "RuntimeError"),
        pytest.param(BEFORE, "quickmerge.calm.config", "AttributeError", marks=slow),
        pytest.param(BEFORE, "quickmerge.errors", "ImportError", marks=slow),
        pytest.param(AFTER, "quickmerge.calm.config", "ImportError", marks=slow),
        pytest.param(AFTER, "quickmerge.errors", "ImportError", marks=slow),
    ],
)
def test_a_broken_quickmerge_leaves_transformers_whole(imports: str, broken: str, error: str) -> None:
    code = BROKEN.format(imports=imports, broken=[broken], error=error)
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "can't open what quickmerge saves" in done.stderr and "half of it is there" in done.stderr
