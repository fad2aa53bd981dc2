"""What a result was measured with: versions and hardware."""

from __future__ import annotations

import platform

__all__ = ["environment"]


def environment() -> dict[str, str]:
    """Versions and hardware, for every committed result."""
    import os

    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    except OSError:
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
    }
