"""On which Arm processors a wheel of torch can be loaded: each wheel, on each processor as QEMU emulates it.

    python benchmarks/torch_processors.py --root ROOTFS WHEEL …

ROOTFS is an unpacked arm64 Debian (`testbed image build debian_trixie --architecture arm64` makes one), or any folder
with its C and C++ libraries and Python 3.  Needs qemu-user-static.  Of each wheel libc10.so is loaded, which every part
of torch needs, then libtorch_cpu.so where that can be had without CUDA.  A signal is told by its name; SIGILL is an
instruction that this processor does not have, and `ldaddal` (ARMv8.1) is one that a Cortex-A53, A57 or A72 lacks in
silicon too.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import tempfile
import zipfile
from pathlib import Path

#: Processor by the boards that have it.
PROCESSORS = {
    "cortex-a53": "Raspberry Pi 3",
    "cortex-a57": "Jetson Nano",
    "cortex-a72": "Raspberry Pi 4",
    "cortex-a76": "Raspberry Pi 5",
}
_LIBRARIES = ("libc10.so", "libtorch_cpu.so")
_LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1]); print('loaded')"
_SECONDS = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="an unpacked arm64 system")
    parser.add_argument("wheels", type=Path, nargs="+")
    options = parser.parse_args()
    print("| wheel | library | " + " | ".join(f"{name} ({board})" for name, board in PROCESSORS.items()) + " |")
    print("|---|---|" + "---|" * len(PROCESSORS))
    for wheel in options.wheels:
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if ".so" in name and "/lib" in name])
            for library in sorted(Path(folder).rglob("lib*.so"), key=lambda path: path.name):
                if library.name in _LIBRARIES:
                    ends = [load(options.root, processor, library) for processor in PROCESSORS]
                    print(f"| {wheel.name.split('-cp')[0]} | {library.name} | {' | '.join(ends)} |", flush=True)


def load(root: Path, processor: str, library: Path) -> str:
    """How loading it ends: "loads", a signal's name, or the first of what is lacking."""
    python = next(path for path in sorted((root / "usr/bin").glob("python3*")) if not path.is_symlink())
    beside = sorted({str(path.parent) for path in library.parents[2].rglob("*.so*")})
    done = subprocess.run(
        ["qemu-aarch64-static", "-cpu", processor, "-L", str(root), "-E", f"LD_LIBRARY_PATH={':'.join(beside)}",
         "-E", f"PYTHONHOME={root / 'usr'}", str(python), "-c", _LOAD, str(library)],
        capture_output=True, text=True, timeout=_SECONDS, check=False,
    )  # fmt: skip
    if "loaded" in done.stdout:
        return "loads"
    if done.returncode < 0 or done.returncode > 128:  # QEMU dies of its guest's signal
        number = -done.returncode if done.returncode < 0 else done.returncode - 128
        return signal.Signals(number).name
    lines = done.stderr.strip().splitlines() or ["it said nothing"]
    lacks = re.search(r"(lib\S+\.so\S*): cannot open", lines[-1])
    return f"lacks {lacks[1]}" if lacks else f"not loaded: {lines[-1][-80:]}"


if __name__ == "__main__":
    main()
