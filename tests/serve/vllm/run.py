"""Every module of this folder in a process of its own: what `make vllm` runs.

An engine that failed to start breaks later ones in its process, and one that was started after numba's libraries were
loaded fails; so no two families of models share a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def main() -> int:
    """Run them one after another; arguments go to pytest. Exit code 1 if one fails."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE / "site"), environment.get("PYTHONPATH", "")]).rstrip(
        os.pathsep
    )
    failed = []
    for path in sorted(HERE.glob("test_*.py")):
        began = time.monotonic()
        print(f"== {path.name}", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", "-W", "ignore"]
        code = subprocess.run([*command, str(path), *sys.argv[1:]], cwd=ROOT, env=environment, check=False).returncode
        if code not in (0, 5):  # 5: the arguments chose nothing of this module
            failed.append(path.name)
        print(f"   {time.monotonic() - began:.0f} s", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
