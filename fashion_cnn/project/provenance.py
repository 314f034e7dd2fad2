"""The provenance of a training: its code, data and machine."""

import hashlib
import json
import platform
import sys
from pathlib import Path

import numpy as np


def machine_tags() -> dict[str, str]:
    """Everything that can change the last bits of a result, apart from code and params."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def digest(*arrays: np.ndarray) -> str:
    """First 32 hex digits of the SHA-256 of the arrays' bytes (MLflow takes at most 36)."""
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()[:32]


def result_key(stage: str, params: dict[str, object], data_digest: str) -> str:
    """Digest of everything that determines a training's result: code, params, data, machine."""
    hasher = hashlib.sha256(json.dumps([stage, params, data_digest, machine_tags()]).encode())
    package = Path(__file__).resolve().parents[1]
    code = (f"{package}/", f"{package.with_name('stages')}/")
    for path in sorted(str(getattr(module, "__file__", None)) for module in list(sys.modules.values())):
        if path.startswith(code) and path != f"{package}/schema.py":
            hasher.update(Path(path).read_bytes())
    return hasher.hexdigest()
