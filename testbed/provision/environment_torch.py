"""Which build of torch a board gets: one version per source, with the reason.

Looked at in the wheels themselves (metadata, torch/version.py, disassembly) unless something else is named:

- aarch64 on PyPI: up to 2.10 the wheels are CPU builds, from 2.11 on CUDA 13 builds (420 MB, and gigabytes of nvidia-*
  packages) that no Jetson's CUDA and no Raspberry Pi can use.
- 2.10.0 for aarch64 executes an atomic instruction of ARMv8.1 (`ldaddal`, in libc10.so's `_mi_options_init`) as soon as
  it is loaded, and dies with SIGILL on a Cortex-A53, A57 or A72: Raspberry Pi 3 and 4, Jetson Nano
  (github.com/pytorch/pytorch/issues/174344).  2.9.1 does not have that code; 2.13.0 asks the processor first.
- PyTorch's own index of CPU wheels has 2.13.0+cpu for both machines.  The "+cpu" cannot be satisfied by PyPI, which
  has no local versions: pip can never take the CUDA build for it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from testbed.inventory import Device

#: What the wheels are built against; JetPack 4 has 2.27.
MINIMUM_GLIBC = (2, 28)


@dataclass(frozen=True)
class TorchBuild:
    """A version of torch, and where it comes from.

    beside     requirements with hashes that it needs and does not declare, or needs in another version than the lock's
    preload    libraries among them that must be loaded before torch, as globs below site-packages
    """

    index: str
    version: str
    machines: tuple[str, ...]
    pythons: tuple[str, ...]
    cuda: bool = False
    beside: tuple[str, ...] = ()
    preload: tuple[str, ...] = ()

    @property
    def requirement(self) -> str:
        return f"torch=={self.version}"

    @property
    def text(self) -> str:
        return f"torch {self.version} from {self.index}"


CPU = TorchBuild(
    index="https://download.pytorch.org/whl/cpu",
    version="2.13.0+cpu",
    machines=("aarch64", "x86_64"),
    pythons=("3.10", "3.11", "3.12", "3.13"),
)
#: For a profile that names PyPI, where the index of CPU wheels is out of reach: the last CPU build there that runs on
#: every 64-bit Raspberry Pi.
PYPI = TorchBuild(
    index="https://pypi.org/simple", version="2.9.1", machines=("aarch64",), pythons=("3.10", "3.11", "3.12", "3.13")
)
#: Tried on: nothing yet.  The wheel was compiled with NumPy 1 (github.com/dusty-nv/jetson-containers/issues/1537), so
#: that `torch.from_numpy` fails beside NumPy 2, and links libcudss.so.0, which JetPack does not bring
#: (github.com/NVIDIA/Isaac-GR00T/issues/343); nvidia-cudss 1.0 has libcudss.so.1.
JETPACK_6 = TorchBuild(
    index="https://pypi.jetson-ai-lab.io/jp6/cu126",
    version="2.8.0",
    machines=("aarch64",),
    pythons=("3.10",),
    cuda=True,
    beside=(
        "numpy==1.26.4 --hash=sha256:d209d8969599b27ad20994c8e41936ee0964e6da07478d6c35016bc386b66ad4",
        "nvidia-cudss-cu12==0.7.1.6 --hash=sha256:edf9a0d40463841a18e77e34071747ae7ae3145e0af65c976923a9ac125f97ac",
    ),
    preload=("nvidia/cu12/lib/libcudss.so.0",),
)
#: Tried on: nothing yet.  Links NVPL and cuDSS without declaring them
#: (github.com/pollen-robotics/microduck_rl/issues/38, seen on an AGX Thor with 2.9.1).
JETPACK_7 = TorchBuild(
    index="https://pypi.jetson-ai-lab.io/sbsa/cu130",
    version="2.9.1",
    machines=("aarch64",),
    pythons=("3.12",),
    cuda=True,
    beside=(
        "nvidia-cudss-cu13==0.7.1.6 --hash=sha256:6fbc8cf61f0ec66d2d7bffad63605f914cae032412b8881ccdc7e89f29088f6d",
        "nvpl-blas==0.6.0 --hash=sha256:27576f8aaf57517a41233ad2e9fdb821a45bbd2d37b5fe29214df75dc9f1d927",
        "nvpl-lapack==0.4.0.1 --hash=sha256:54e838ed9d584128070b43bd4561ece488f67dc8531192f508f4d37353b4b1cc",
    ),
    preload=(
        "nvpl/lib/libnvpl_blas_core.so.0",
        "nvpl/lib/libnvpl_blas_lp64_gomp.so.0",
        "nvpl/lib/libnvpl_lapack_core.so.0",
        "nvpl/lib/libnvpl_lapack_lp64_gomp.so.0",
        "nvidia/cu13/lib/libcudss.so.0",
    ),
)
_BUILDS = (CPU, PYPI, JETPACK_6, JETPACK_7)
#: By the major number of L4T.  JetPack 4 and 5 (32, 35) have NVIDIA's wheels for Python 3.6 and 3.8 only, which no
#: current transformers accepts: there, the CPU build.
_BY_L4T = {32: CPU, 35: CPU, 36: JETPACK_6, 38: JETPACK_7, 39: JETPACK_7}


class NoTorchError(ValueError):
    """No build fits; the text says why, and the way out."""


def l4t_major(facts: Mapping[str, Any]) -> int | None:
    """The release of L4T by its major number; None for what is no Jetson."""
    found = re.match(r"R?(\d+)", str((facts.get("board") or {}).get("l4t") or ""))
    return int(found[1]) if found else None


def torch_build(device: Device, facts: Mapping[str, Any]) -> TorchBuild:
    """The build for a board as it was found; raises NoTorchError."""
    machine = device_machine(device, facts)
    if machine not in CPU.machines:
        raise NoTorchError(f"there are no wheels of torch for {machine}; a 64-bit system is needed")
    build = _build_for(device, facts)
    if machine not in build.machines and build.cuda:
        build = CPU  # a Jetson's face on another machine: a rehearsal
    if machine not in build.machines:
        raise NoTorchError(
            f"{build.index} has no CPU build of torch for {machine}; set `torch_source: cpu` in the profile "
            f"{device.profile.name}"
        )
    if device.accelerator == "cuda" and not build.cuda:
        raise NoTorchError(
            f"accelerator: cuda is asked for, and there are only CPU wheels for it{_because(facts)}; set `accelerator: "
            f"cpu`, or name an interpreter of your own that has torch with `python:`"
        )
    return build


def _build_for(device: Device, facts: Mapping[str, Any]) -> TorchBuild:
    """An emulated device's profile, and the wheels that it names, are of the board that it stands for: not its own."""
    if device.kind == "emulated":
        return CPU
    major = l4t_major(facts)
    build = _BY_L4T.get(major or 0) or _by_source(device)
    if build.cuda and major is not None and major not in _BY_L4T:
        raise NoTorchError(
            f"{build.text} (profile {device.profile.name}) is for another release than L4T {major}; builds are known "
            f"for L4T {', '.join(map(str, _BY_L4T))}: set `torch_source: cpu` in the profile, or name an interpreter "
            f"of your own that has torch with `python:`"
        )
    return build


def device_machine(device: Device, facts: Mapping[str, Any]) -> str:
    """What `uname -m` says there; before anything was found out, what the profile says."""
    board = facts.get("board") or {}
    return str(board.get("machine") or device.profile.architecture)


def _by_source(device: Device) -> TorchBuild:
    source = device.profile.torch_source.rstrip("/")
    if not source.startswith(("http://", "https://")):  # "cpu", or a sentence about wheels that are too old for us
        return CPU
    for build in _BUILDS:
        if build.index == source:
            return build
    raise NoTorchError(
        f"no version of torch is known for torch_source {source} (profile {device.profile.name}); known are "
        f"{', '.join(build.index for build in _BUILDS)}; or name an interpreter of your own that has torch with "
        f"`python:`"
    )


def _because(facts: Mapping[str, Any]) -> str:
    major = l4t_major(facts)
    return f" (L4T {major}: NVIDIA's wheels there are for a Python older than 3.10)" if major in {32, 35} else ""
