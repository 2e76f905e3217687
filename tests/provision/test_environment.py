"""Environments, decided: facts in, decision out."""

import io
import json
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import tomllib

from testbed.config import load_profile
from testbed.connection import LocalConnection
from testbed.errors import DeviceError
from testbed.inventory import Budget, Device
from testbed.package_data import PACKAGE, data_folder
from testbed.provision import environment, environment_build, environment_torch, wheels
from testbed.provision.environment import EnvironmentOptions
from testbed.provision.environment_torch import CPU, JETPACK_6, JETPACK_7, PYPI, NoTorchError, torch_build
from testbed.provision.part import facts_of, script_of
from testbed.provision.runner import ENVIRONMENT_PARTS
from testbed.provision.step import Change, Note, Problem
from testbed.provision.wheels import Target

CLONE = PACKAGE.parent
#: Of the first 20 bytes of an ELF file: see elf(5).
ELF_AARCH64 = b"\x7fELF" + bytes(14) + b"\xb7\x00"


def profile(name, **changes):
    return replace(load_profile(data_folder("inventory") / "profiles" / f"{name}.yaml"), **changes)


def device(board="raspberry_pi_5_4gb", **changes):
    return replace(Device("pi", "generic", profile(board), Budget(1 << 30), folder="/testbed"), **changes)


def facts(*versions, machine="aarch64", glibc="2.41", l4t=None, **environment_facts):
    candidates = [{"path": f"/usr/bin/python{number}", "version": number, "platform": ""} for number in versions]
    return {
        "board": {"machine": machine, "l4t": l4t},
        "python": {"candidates": candidates},
        "environment": {"glibc": glibc, "kernel": "6.12", "code": [], **environment_facts},
    }


def step(name, options=None, of=None):
    return next(each for each in environment.steps(of or device(), options) if each.name == name)


def archive(path, member="python/bin/python3.12", header=ELF_AARCH64):
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(member)
        info.size = len(header)
        tar.addfile(info, io.BytesIO(header))
    return path


# ── torch ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("board", "l4t", "machine", "build"),
    [
        ("raspberry_pi_3b_plus", None, "aarch64", CPU),
        ("raspberry_pi_5_4gb", None, "aarch64", CPU),
        ("jetson_orin_nano_8gb", "36.4.3", "aarch64", JETPACK_6),
        ("jetson_orin_nano_8gb", None, "aarch64", JETPACK_6),
        ("jetson_orin_nano_8gb", "39.2.0", "aarch64", JETPACK_7),
        ("jetson_agx_orin_64gb", "R35.6.3", "aarch64", CPU),
        ("jetson_xavier_nx_8gb", "35.6.3", "aarch64", CPU),
        ("jetson_nano_4gb", "32.7.6", "aarch64", CPU),
        ("jetson_orin_nano_8gb", "36.4.3", "x86_64", CPU),  # a rehearsal
    ],
)
def test_each_board_gets_its_build_of_torch(board, l4t, machine, build):
    assert torch_build(device(board), facts(l4t=l4t, machine=machine)) is build


@pytest.mark.parametrize(
    ("board", "found", "told"),
    [
        (device("jetson_xavier_nx_8gb", accelerator="cuda"), facts(l4t="35.6.3"), "older than 3.10"),
        (device(accelerator="cuda"), facts(), "only CPU wheels"),
        (device("jetson_orin_nano_8gb"), facts(l4t="40.1.0"), r"is for another release than L4T 40; .* 36, 38, 39"),
    ],
)
def test_what_no_build_can_do_is_refused(board, found, told):
    with pytest.raises(NoTorchError, match=told):
        torch_build(board, found)


def test_a_release_that_is_not_known_has_no_cuda_build_and_may_have_a_cpu_build():
    board = device(profile=profile("jetson_orin_nano_8gb", torch_source="cpu"))
    assert torch_build(board, facts(l4t="40.1.0")) is CPU


def test_pypi_is_for_arm_only_where_its_build_is_a_cpu_build():
    board = device(profile=profile("raspberry_pi_5_4gb", torch_source="https://pypi.org/simple/"))
    assert torch_build(board, facts()) is PYPI
    with pytest.raises(NoTorchError, match="no CPU build of torch for x86_64"):
        torch_build(board, facts(machine="x86_64"))


def test_an_unknown_source_is_refused_with_the_known_ones():
    board = device(profile=profile("raspberry_pi_5_4gb", torch_source="https://example.org/simple"))
    with pytest.raises(NoTorchError, match=r"known are https://download\.pytorch\.org"):
        torch_build(board, facts())


def test_a_cpu_board_never_gets_a_cuda_build():
    """PyPI's wheels for aarch64 are CUDA builds from 2.11 on, and 2.10.0 dies on a Cortex-A72."""
    assert PYPI.version == "2.9.1"
    assert CPU.version.endswith("+cpu")  # which PyPI cannot satisfy


def test_nodes_and_controller_have_the_same_torch():
    constraints = tomllib.loads((CLONE / "pyproject.toml").read_text())["tool"]["uv"]["constraint-dependencies"]
    assert f"torch=={CPU.version.removesuffix('+cpu')}" in constraints


# ── CUDA ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("capability", "architectures", "covered"),
    [
        ("sm_87", ["sm_80", "sm_86", "sm_87"], True),  # an Orin with wheels for it
        ("sm_87", ["sm_80", "sm_90"], True),  # … for a server's GPU
        ("sm_87", ["sm_89", "sm_90"], False),  # a higher minor
        ("sm_87", ["sm_75", "sm_90", "compute_90"], False),  # other majors
        ("sm_87", ["compute_50"], False),  # PTX of another major would have to be compiled there first
        ("sm_72", ["sm_70"], True),  # a Xavier
        ("sm_53", ["sm_60", "sm_70"], False),  # a Nano
        ("sm_110", ["sm_100", "sm_110"], True),  # three digits: a Thor
        ("sm_121", ["sm_120"], True),
        ("sm_120", ["sm_100a", "sm_90a"], False),
        ("sm_100", ["sm_10"], False),
        ("sm_87", [], False),
    ],
)
def test_code_runs_on_its_major_and_no_lower_minor(capability, architectures, covered):
    assert environment_build._covered(capability, architectures) is covered


ORIN = {
    "torch": "2.8.0",
    "torch_cuda": "12.6",
    "cuda_available": True,
    "cuda_device": "Orin",
    "capability": "sm_87",
    "architectures": ["sm_87"],
}


@pytest.mark.parametrize(
    ("differs", "told"),
    [
        ({"cuda_available": False, "torch_cuda": None}, r"torch 2\.8\.0 \(a CPU build\) sees no CUDA device"),
        ({"cuda_available": False}, r"\(built for CUDA 12\.6\) sees no CUDA device; .* `video` and `render`"),
        ({"architectures": ["sm_75", "sm_90"]}, "was built for sm_75, sm_90, and the board's Orin is sm_87"),
    ],
)
def test_an_accelerator_that_cannot_be_used_is_refused_with_the_cause(differs, told):
    with pytest.raises(DeviceError, match=told):
        environment_build._prove_cuda(LocalConnection("it"), {**ORIN, **differs})


def test_an_accelerator_that_can_be_used_is_proved():
    environment_build._prove_cuda(LocalConnection("it"), ORIN)


@pytest.mark.parametrize(
    ("kind", "architectures", "noted"),
    [
        ("jetson", ["sm_87"], False),
        ("jetson", ["sm_80"], True),
        ("generic", ["sm_80"], False),
    ],
)
def test_a_jetson_that_torch_has_no_code_of_its_own_for_is_noted(kind, architectures, noted):
    of = device("jetson_orin_nano_8gb", accelerator="cuda", kind=kind)
    proof = step("proof", of=of)
    known = facts("3.10.12", l4t="36.4.3", **ORIN | {"architectures": architectures})
    key = proof._key(known, of)
    known["environment"]["proof"] = {"key": key, "baseline": {"bytes": 1}}
    assert isinstance(proof.check(known, of), Note) is noted


# ── Python ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("board", "found"),
    [
        ("raspberry_pi_5_4gb", facts("3.13.5")),
        ("raspberry_pi_4b_2gb", facts("3.11.2", glibc="2.36")),
        ("jetson_orin_nano_8gb", facts("3.10.12", glibc="2.35", l4t="36.4.3")),
        ("jetson_orin_nano_8gb", facts("3.12.3", glibc="2.39", l4t="39.2.0")),
        ("jetson_xavier_nx_8gb", facts("3.8.10", "3.11.9", glibc="2.31", l4t="35.6.3")),
    ],
)
def test_a_python_that_will_do_is_left_alone(board, found):
    assert step("python").check(found, device(board)) is None


@pytest.mark.parametrize(
    ("board", "found", "told"),
    [
        ("jetson_xavier_nx_8gb", facts("3.8.10", glibc="2.31", l4t="35.6.3"), "--python-archive FILE"),
        ("jetson_nano_4gb", facts("3.6.9", glibc="2.27", l4t="32.7.6"), "--rootfs-archive FILE"),
        ("jetson_orin_nano_8gb", facts("3.12.3", l4t="36.4.3"), "needs Python 3.10, and there is 3.12.3"),
        ("raspberry_pi_4b_2gb", facts("3.11.2", machine="armv7l"), "64-bit system"),
        ("raspberry_pi_4b_2gb", facts(), "there is none"),
    ],
)
def test_a_python_that_will_not_do_is_a_problem_with_the_way_out(board, found, told):
    problem = step("python").check(found, device(board))
    assert isinstance(problem, Problem)
    assert problem.fatal
    assert told in problem.text


def test_a_standalone_python_is_pushed_where_the_own_is_too_old(tmp_path):
    options = EnvironmentOptions(python_archive=archive(tmp_path / "cpython.tar.gz"))
    found = facts("3.8.10", glibc="2.31", l4t="35.6.3")
    change = step("python", options).check(found, device("jetson_xavier_nx_8gb"))
    assert isinstance(change, Change)
    assert (change.found, change.wanted) == ("Python 3.8.10", "the Python of cpython.tar.gz")
    environment_change = step("environment", options).check(found, device("jetson_xavier_nx_8gb"))
    assert "on Python 3.12" in environment_change.wanted


def test_it_is_not_pushed_where_the_own_will_do(tmp_path):
    options = EnvironmentOptions(python_archive=archive(tmp_path / "cpython.tar.gz"))
    assert step("python", options).check(facts("3.13.5"), device()) is None


def test_jetpack_4_gets_a_root_file_system(tmp_path):
    options = EnvironmentOptions(rootfs_archive=archive(tmp_path / "debian.tar.gz", "./usr/bin/python3.11"))
    found = facts("3.6.9", glibc="2.27", l4t="32.7.6")
    assert isinstance(step("python", options).check(found, device("jetson_nano_4gb")), Change)
    assert "on Python 3.11" in step("environment", options).check(found, device("jetson_nano_4gb")).wanted
    found["python"]["candidates"].append({"path": "/testbed/python/bin/python3", "version": "3.11.2"})
    note = step("python", options).check(found, device("jetson_nano_4gb"))
    assert isinstance(note, Note)
    assert "untried" in note.text


@pytest.mark.parametrize(
    ("member", "header", "told"),
    [
        ("python/bin/python3.12", b"\x7fELF" + bytes(14) + b"\x3e\x00", "for x86_64, and the board is aarch64"),
        ("python/bin/python3.9", ELF_AARCH64, "holds Python 3.9"),
        ("readme", b"", "found neither"),
    ],
)
def test_an_archive_that_does_not_fit_is_refused(tmp_path, member, header, told):
    options = EnvironmentOptions(python_archive=archive(tmp_path / "cpython.tar.gz", member, header))
    found = facts("3.8.10", glibc="2.31", l4t="35.6.3")
    problem = step("python", options).check(found, device("jetson_xavier_nx_8gb"))
    assert isinstance(problem, Problem)
    assert told in problem.text


def test_an_interpreter_of_the_user_is_proved_and_nothing_is_installed():
    own = device(python="/opt/python")
    assert [each.name for each in environment.steps(own)] == ["python", "code", "proof"]
    found = facts()
    found["python"]["given"] = {"path": "/opt/python", "version": "3.9.2"}
    assert "3.10 is the oldest" in step("python", of=own).check(found, own).text
    found["python"]["given"]["version"] = None
    assert "cannot be started" in step("python", of=own).check(found, own).text
    found["python"]["given"]["version"] = "3.11.2"
    assert step("python", of=own).check(found, own) is None


# ── environment ──────────────────────────────────────────────────────────────────────────────────────────────────────
def test_an_environment_as_it_should_be_is_left_alone():
    found = facts("3.13.5")
    wanted, _ = environment._plan(found, device(), EnvironmentOptions())
    found["environment"]["record"] = {"wanted": wanted.key}
    assert step("environment").check(found, device()) is None


def test_another_lock_or_torch_is_a_change_that_says_both():
    found = facts("3.13.5", record={"wanted": {"torch": "2.9.1", "lock": "0" * 64, "python": "3.11"}})
    change = step("environment").check(found, device())
    assert change.found == "torch 2.9.1 and lock 00000000 on Python 3.11"
    assert change.wanted.startswith(f"torch {CPU.version} and lock ")
    assert change.wanted.endswith("on Python 3.13")


def test_a_proof_holds_for_threads_accelerator_and_kernel():
    found = facts("3.13.5")
    proof = step("proof")
    found["environment"]["proof"] = {"key": proof._key(found, device()), "baseline": {"bytes": 1}}
    assert proof.check(found, device()) is None
    assert isinstance(proof.check(found, device(threads=4)), Change)
    found["environment"]["kernel"] = "6.13"
    assert isinstance(proof.check(found, device()), Change)


# ── the lock ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("machine", ["aarch64", "x86_64"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_lock_has_every_line_hashed_for_every_node(python, machine):
    lines = wheels.requirements(wheels.lock_file(), Target(python, machine))
    names = {line.partition("==")[0] for line in lines}
    assert {"numpy", "safetensors", "transformers", "pip", "sympy", "filelock"} <= names
    assert "torch" not in names
    assert not [name for name in names if name.startswith(("nvidia", "cuda", "triton"))]
    assert all("--hash=sha256:" in line and ";" not in line for line in lines)


def versions(lock):
    return dict(line.split(" ")[0].split("==") for line in wheels.requirements(lock, Target("3.11", "x86_64")))


def test_nodes_and_controller_have_the_same_versions():
    node, here = versions(wheels.lock_file()), versions(CLONE / "requirements.lock")
    del node["pip"]
    assert node == {name: here.get(name) for name in node}


def test_what_a_build_needs_beside_replaces_the_lock():
    target = Target("3.10", "aarch64", (2, 35))
    assert any(line.startswith("numpy==2.2.6 ") for line in wheels.requirements(wheels.lock_file(), target))
    lines = wheels.requirements(wheels.lock_file(), target, JETPACK_6.beside)
    assert [line.split(" ")[0] for line in lines if line.startswith(("numpy", "nvidia"))] == [
        "numpy==1.26.4",
        "nvidia-cudss-cu12==0.7.1.6",
    ]


def test_a_target_takes_wheels_of_its_glibc_and_older():
    platforms = Target("3.11", "aarch64", (2, 31)).platforms
    assert platforms[0] == "manylinux_2_31_aarch64"
    assert {"manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64", "linux_aarch64"} <= set(
        platforms
    )


# ── facts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def gathered(of, folder):
    script = script_of(ENVIRONMENT_PARTS, str(folder), of.python, of.name)
    done = subprocess.run(["/bin/sh", "-c", script], capture_output=True, text=True, check=True)
    return facts_of(ENVIRONMENT_PARTS, done.stdout)


def test_a_guest_gets_the_cpu_build_whatever_it_stands_for():
    guest = device("jetson_orin_nano_8gb", kind="emulated")
    assert environment_torch.torch_build(guest, facts("3.11", machine="x86_64")) is environment_torch.CPU
    assert environment_torch.torch_build(guest, facts("3.10", l4t="36.4.3")) is environment_torch.CPU


def test_facts_of_a_fresh_machine(tmp_path):
    found = gathered(device(), tmp_path)
    assert found["baseline"] is None
    assert found["environment"]["record"] is None
    assert found["environment"]["code"] == []
    assert found["environment"]["folder"] == str(tmp_path)
    assert int(found["environment"]["glibc"].split(".")[0]) == 2


def test_facts_of_a_machine_that_was_provisioned(tmp_path):
    python = Path("/usr/bin/env").resolve()  # anything that is there; it says no version
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").symlink_to(python)
    (tmp_path / "env" / "testbed.json").write_text(json.dumps({"wanted": {"torch": "2"}}))
    (tmp_path / "proof-pi.json").write_text(json.dumps({"key": 1, "found": {"torch": "2"}, "baseline": {"bytes": 7}}))
    (tmp_path / "code" / "abc").mkdir(parents=True)
    found = gathered(device(), tmp_path)
    assert found["environment"]["torch"] == "2"
    assert found["environment"]["code"] == ["abc"]
    assert found["baseline"] == {"bytes": 7}
    assert found["environment"]["record"] is None  # its interpreter does not work: it is built again


def test_half_a_record_is_none(tmp_path):
    (tmp_path / "proof-pi.json").write_text('{"key": 1, "fou')
    assert gathered(device(), tmp_path)["environment"]["proof"] is None


def test_the_table_of_builds_has_a_hash_for_everything_beside():
    assert all("--hash=sha256:" in line for build in environment_torch._BUILDS for line in build.beside)
