"""The proof that an environment works: run in it, on the device, as text (see environment_builder for how).

Prints what was found as one line of JSON: versions, whether CUDA can be used and for which architectures torch was
built, and the gradient of a tiny forward and backward pass on each processor that there is.
"""

from __future__ import annotations

import json
import platform
import sys


def main() -> None:
    """Import everything, compute something, say what it is."""
    import numpy as np
    import safetensors
    import torch
    import transformers

    usable = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability(0) if usable else None
    found = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "cuda_available": usable,
        "cuda_device": torch.cuda.get_device_name(0) if usable else None,
        "capability": f"sm_{capability[0]}{capability[1]}" if capability else None,
        "architectures": torch.cuda.get_arch_list(),
        "platform": platform.platform(),
        "gradient": {kind: _gradient(kind) for kind in (["cpu", "cuda"] if usable else ["cpu"])},
    }
    print(json.dumps(found), flush=True)


def _gradient(kind: str) -> float:
    """d/dw of sum((w x)^2) at w = 1, x = 0 … 7: 2 · 140.  From an array of NumPy, which a wrong pair cannot read."""
    import numpy as np
    import torch

    x = torch.from_numpy(np.arange(8, dtype=np.float32)).to(kind).reshape(8, 1)
    layer = torch.nn.Linear(1, 1, bias=False, device=kind)
    torch.nn.init.ones_(layer.weight)
    torch.autograd.backward(layer(x).square().sum())
    if layer.weight.grad is None:
        raise RuntimeError(f"no gradient on {kind}")
    return layer.weight.grad.item()


if __name__ == "__main__":
    main()
