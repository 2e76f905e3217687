"""Environments, built for real on this machine through a connection, out of a local wheelhouse.

The wheels are tiny: "torch" brings in the libraries of the environment that the tests run in, so that what is proved is
the real torch, and building takes seconds.
"""

import base64
import hashlib
import json
import secrets
import subprocess
import sys
import sysconfig
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from testbed.config import load_inventory
from testbed.connection import LocalConnection
from testbed.errors import DeviceError, UsageError
from testbed.fact_sheets import facts_of
from testbed.inventory import Budget, Device, HardwareProfile
from testbed.provision import environment, part, wheels
from testbed.provision.environment import EnvironmentOptions
from testbed.provision.environment_torch import CPU
from testbed.provision.runner import ENVIRONMENT_PARTS, Provisioning
from testbed.provision.visit import CHANGED, READY, Options
from testbed.provision.wheels import Target
from testbed.ssh import connect
from tests.lab_runs import traffic
from tests.ssh_server import SshServer, need_sshd
from tests.virtual_lab import ssh

HERE = Target(f"3.{sys.version_info.minor}", sysconfig.get_platform().partition("-")[2])
pytestmark = pytest.mark.skipif(
    HERE.python not in CPU.pythons or HERE.machine not in CPU.machines, reason="no wheels of torch for this Python"
)


def make_wheel(folder, project, version, files):
    """A pure wheel; gives its path."""
    info = f"{project}-{version}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = [f"{name},sha256={record_hash(text)},{len(text.encode())}" for name, text in content.items()]
    content[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,", ""])
    folder.mkdir(exist_ok=True)
    path = folder / f"{project}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in content.items():
            archive.writestr(name, text)
    return path


def record_hash(text):
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def pip_wheel():
    """A wheel of pip that came with this Python."""
    places = (Path(sys.base_prefix) / f"lib/python{HERE.python}/ensurepip/_bundled", Path("/usr/share/python-wheels"))
    found = [path for place in places for path in sorted(place.glob("pip-*.whl"))]
    if not found:
        pytest.skip("this Python has no wheel of pip")
    return found[0]


def line_for(path):
    project, version, *_ = path.name.split("-")
    return f"{project}=={version} --hash=sha256:{wheels.file_hash(path)}"


def make_wheelhouse(folder):
    """A folder with all wheels that the lock beside it asks for, and torch; gives the options that name both."""
    libraries = sysconfig.get_path("purelib") + "\n"
    make_wheel(folder, "torch", CPU.version, {"libraries.pth": libraries})
    make_wheel(folder, "small", "1.0", {"small/__init__.py": "VALUE = 1\n"})
    pip = pip_wheel()
    (folder / pip.name).write_bytes(pip.read_bytes())
    lock = folder.with_name("nodes.lock")
    lock.write_text("".join(f"{line_for(path)}\n" for path in folder.glob("*.whl") if "torch" not in path.name))
    return EnvironmentOptions(wheelhouse=folder, lock=lock)


def add_wheel(options, project, text=""):
    """Have the lock ask for one wheel more."""
    path = make_wheel(options.wheelhouse, project, "2.0", {f"{project}.py": text})
    options.lock.write_text(f"{options.lock.read_text()}{line_for(path)}\n")
    wheels._locked.cache_clear()
    return path.name


def make_device(folder):
    profile = HardwareProfile("generic", "this machine", 1 << 33, 1 << 33, 2, HERE.machine, torch_source="cpu")
    return Device("here", "generic", profile, Budget(1 << 30), folder=str(folder))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def options(tmp_path):
    return make_wheelhouse(tmp_path / "wheelhouse")


@pytest.fixture
def device(tmp_path):
    return make_device(tmp_path / "testbed")


@pytest.fixture
def connection():
    return Recording("here")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(device, options, connection) of a device that was provisioned once."""
    folder = tmp_path_factory.mktemp("built")
    device, options, connection = (
        make_device(folder / "testbed"),
        make_wheelhouse(folder / "wheelhouse"),
        Recording("x"),
    )
    assert provision(device, options, connection) == ["code", "environment", "proof"]
    return device, options, connection


class Recording(LocalConnection):
    """This machine; remembers what was done, and loses the connection where it is told to."""

    def __init__(self, name):
        super().__init__(name)
        self.sent, self.verbs = [], []
        self.cut_at = None

    def attempt(self, command, patience_seconds=60.0, *, data=b"", become=False):
        arguments = json.loads(data) if data.startswith(b"{") else {}
        verb = " ".join(filter(None, (command[-1], arguments.get("stage"))))
        if verb == self.cut_at:
            raise DeviceError(f"{self.name}: the connection was lost")
        self.verbs.append(verb)
        return super().attempt(command, patience_seconds, data=data, become=become)

    def put(self, source, target):
        self.sent.append(source.name)
        return super().put(source, target)

    def installed(self):
        return [verb for verb in self.verbs if verb.startswith("install")]


def gathered(device, connection=None):
    script = part.script_of(ENVIRONMENT_PARTS, device.folder, device.python, device.name)
    answer = (connection or LocalConnection("here")).run(["/bin/sh", "-c", script])
    return {**part.facts_of(ENVIRONMENT_PARTS, answer), "board": {"machine": HERE.machine}}


def provision(device, options, connection, only=("python", "code", "environment", "proof")):
    """What a run of provisioning does; gives the names of the steps that changed something."""
    facts = gathered(device, connection)
    changed = []
    for step in environment.steps(device, options):
        found = step.check(facts, device) if step.name in only else None
        if found is not None:
            assert getattr(found, "action", None), found
            found.action(connection, lambda words: None)
            changed.append(step.name)
    return changed


def test_an_environment_is_built_proved_and_measured_and_then_left_alone(built):
    device, _, _ = built
    facts = gathered(device)
    assert facts["python"]["path"] == f"{device.folder}/env/bin/python"
    assert facts["environment"]["gradient"]["cpu"] == 280.0
    assert facts["baseline"]["bytes"] > 50 << 20
    assert provision(*built) == []


def test_the_environment_holds_what_the_lock_says_and_no_pip(built):
    python = Path(built[0].folder) / "env" / "bin" / "python"
    command = [python, "-I", "-c", "import small; print(small.__file__)"]
    told = subprocess.run(command, check=True, capture_output=True, text=True)
    assert told.stdout.startswith(f"{built[0].folder}/env/lib/")
    assert {path.name.partition("3")[0] for path in python.parent.iterdir()} == {"python"}
    assert not (Path(built[0].folder) / "env.partial").exists()


def test_wheels_travel_by_hash(built):
    device, options, connection = built
    wheelhouse = {path.name: wheels.file_hash(path) for path in options.wheelhouse.glob("*.whl")}
    content = {path.name for path in (Path(device.folder) / "content").iterdir()}
    assert set(wheelhouse.values()) <= content
    assert len(connection.sent) == len(wheelhouse) + 1  # and our code


def test_several_devices_download_once(built, monkeypatch, tmp_path):
    device, options, connection = built
    monkeypatch.setattr(wheels, "_fetch", None)  # would be called for a second download
    second = replace(device, name="second", folder=str(tmp_path / "second"))
    assert provision(second, options, connection, only=["environment"]) == ["environment"]


def test_an_interrupted_build_goes_on_where_it_stopped(device, options, connection):
    connection.cut_at = "install packages"
    with pytest.raises(DeviceError, match="lost"):
        provision(device, options, connection, only=["environment"])
    assert not (Path(device.folder) / "env").exists()
    (site,) = Path(device.folder).glob("env.partial/lib/python3*/site-packages")
    half = site / "small-1.0.dist-info"  # as if pip had been killed: no RECORD
    half.mkdir()
    (half / "METADATA").write_text("Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
    connection.cut_at = None
    provision(device, options, connection, only=["environment"])
    assert connection.installed() == ["install torch", "install packages"]
    assert gathered(device)["environment"]["record"]["wanted"]["torch"] == CPU.version
    assert list(Path(device.folder).glob("env/lib/python3*/site-packages/small/__init__.py"))


def test_an_old_environment_stays_until_the_new_one_is_whole(device, options, connection):
    """And for the new one, only what is new travels."""
    provision(device, options, connection, only=["environment"])
    connection.sent.clear()
    added = [add_wheel(options, "other")]
    make_wheel(options.wheelhouse, "torch", CPU.version, {"libraries.pth": ""})  # one that cannot be imported
    with pytest.raises(DeviceError, match=r"does not work: ModuleNotFoundError"):
        provision(device, options, connection, only=["environment"])
    assert connection.sent == [*added, f"torch-{CPU.version}-py3-none-any.whl"]
    python = Path(device.folder) / "env" / "bin" / "python"
    assert subprocess.run([python, "-I", "-c", "import torch, small"], check=False).returncode == 0


def test_an_interpreter_of_the_user_is_only_proved(device, options, connection):
    own = replace(device, python=sys.executable)
    assert provision(own, options, connection) == ["code", "proof"]
    assert gathered(own)["baseline"]["bytes"] > 50 << 20
    assert not (Path(device.folder) / "env").exists()
    assert provision(own, options, connection) == []


def test_guests_that_share_a_folder_are_proved_each(built):
    """And have the environment in common."""
    device, options, connection = built
    second = replace(device, name="second", threads=device.threads + 1)
    assert provision(second, options, connection) == ["proof"]
    assert [provision(guest, options, connection) for guest in (device, second)] == [[], []]


@pytest.mark.lab
def test_on_a_host_of_the_lab_from_the_first_visit_to_the_next(options, plain_lab, tmp_path, monkeypatch):
    """The whole way, as `testbed provision --wheelhouse` goes it: board, code, environment and proof."""
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path / "data"))
    (board,) = load_inventory(plain_lab.inventory).select(["board-1"])
    board = replace(board, python=None)
    first, second = (Provisioning([board], Options(), environment=options).run()[0] for _ in range(2))
    assert (first.status, first.problems) == (CHANGED, ())
    assert {"code", "environment", "proof"} <= {change.step for change in first.changes}
    assert (second.status, second.changes, second.problems) == (READY, (), ())
    sheet = facts_of(board)
    assert sheet["python"]["path"].endswith("/.local/share/edge-testbed/env/bin/python")
    assert sheet["environment"]["gradient"]["cpu"] == 280.0
    assert sheet["baseline"]["bytes"] > 50 << 20
    assert ssh(plain_lab, "board-1", "stat -c %a .local/share/edge-testbed") == "700\n"


# ── sites ────────────────────────────────────────────────────────────────────────────────────────────────────────────
BIG = 8 << 20


@pytest.fixture
def site(plain_lab, options, tmp_path, monkeypatch):
    """A gate and a board behind it that have nothing yet; makes some of them ready, all with one wheel of 8 MiB."""
    monkeypatch.setenv("TESTBED_DATA", str(tmp_path / "data"))
    add_wheel(options, "big", f"# {secrets.token_hex(BIG // 2)}")
    gate, far = (
        replace(device, python=None, folder=f"site-{tmp_path.name}")
        for device in load_inventory(plain_lab.inventory).select(["board-1", "board-2"])
    )
    far = replace(far, access=replace(far.access, via=gate.name))

    def make_ready(*devices, gate=gate, only=("python", "code", "environment")):
        chosen = replace(options, others=(gate, far))
        steps = lambda device: [step for step in environment.steps(device, chosen) if step.name in only]  # noqa: E731
        return Provisioning(devices, Options(), environment=chosen, steps=steps).run()

    yield gate, far, make_ready
    for device in (gate, far):
        ssh(plain_lab, device.name, f"chmod -fR u+w {device.folder}; rm -rf {device.folder}")


@contextmanager
def counted(lab, *devices):
    """What came in and went out over the network of each device's host in the meantime, in multiples of the wheel."""
    hosts, counts = [lab.host(device.name) for device in devices], []
    before = [traffic(host) for host in hosts]
    yield counts
    for host, was in zip(hosts, before, strict=True):
        counts.append(tuple((now - then) // BIG for now, then in zip(traffic(host), was, strict=True)))


@pytest.mark.lab
@pytest.mark.parametrize("takes_part", [True, False])
def test_what_a_site_lacks_crosses_the_uplink_once(plain_lab, site, takes_part):
    """Also while the device that it comes through is made ready itself, at the same time."""
    gate, far, make_ready = site
    with counted(plain_lab, gate, far) as counts:
        outcomes = make_ready(*([gate] if takes_part else []), far)
    assert [(outcome.status, outcome.problems) for outcome in outcomes] == [(CHANGED, ())] * len(outcomes)
    assert counts == [(1, 1), (1, 0)]
    assert [outcome.status for outcome in make_ready(far)] == [READY]


def held(lab, gate):
    ssh(lab, gate.name, f"""echo '{{"run": "lora-7", "owner": "bob"}}' >{gate.folder}/lock.json""")
    return gate


def not_to_be_written(lab, gate):
    ssh(lab, gate.name, f"chmod 500 {gate.folder}/content")
    return gate


def another_board(lab, gate):
    return replace(gate, profile=replace(gate.profile, compatible=("p3767-0005",)))


def out_of_reach(lab, gate):
    return replace(gate, access=replace(gate.access, port=9))


@pytest.mark.lab
@pytest.mark.parametrize(
    ("hinder", "told"),
    [
        (held, "held by run lora-7"),
        (not_to_be_written, "Permission denied"),
        (another_board, "nothing was changed there"),
        (out_of_reach, "Connection refused"),
    ],
)
def test_where_the_way_through_another_device_fails_contents_are_sent_directly(plain_lab, site, caplog, hinder, told):
    gate, far, make_ready = site
    ssh(plain_lab, gate.name, f"mkdir -p {gate.folder}/content")
    (outcome,) = make_ready(far, gate=hinder(plain_lab, gate), only=["code"])
    assert (outcome.status, outcome.problems) == (CHANGED, ())
    assert f"{far.name}: sent directly" in caplog.text
    assert told in caplog.text
    assert ssh(plain_lab, gate.name, f"ls {gate.folder}/content") == ""


@pytest.mark.sshd
def test_over_ssh_below_the_home_of_the_login_user(options, tmp_path):
    need_sshd()
    with SshServer(tmp_path / "server") as server:
        connection = connect("board", server.access)
        device = replace(make_device("folder/of the testbed"), access=server.access)
        assert provision(device, options, connection) == ["code", "environment", "proof"]
        assert gathered(device, connection)["baseline"]["bytes"] > 50 << 20
        assert provision(device, options, connection) == []
        connection.close()


@pytest.mark.parametrize("text", ["torch\n", "not a requirement at all\n", "torch==1.0\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_lock_is_told(tmp_path, text):
    lock = tmp_path / "some.lock"
    lock.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=r"some\.lock: a lock has lines NAME==VERSION --hash"):
        wheels.check_lock(lock)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_wheel_that_is_not_the_one_of_the_lock_is_refused(device, options, connection):
    make_wheel(options.wheelhouse, "small", "1.0", {"small/__init__.py": "VALUE = 2\n"})
    with pytest.raises(UsageError, match=r"small==1\.0 is not the file that .* names by its hash"):
        provision(device, options, connection, only=["environment"])
    assert connection.installed() == []


def test_a_missing_wheel_is_named(device, options, connection):
    (options.wheelhouse / "small-1.0-py3-none-any.whl").unlink()
    with pytest.raises(UsageError, match=r"wheelhouse has no wheel of small==1\.0 for Python 3\."):
        provision(device, options, connection, only=["environment"])


def test_the_cuda_build_of_pypi_is_refused_for_a_board_without_cuda(device, options, connection):
    next(options.wheelhouse.glob("torch-*.whl")).unlink()
    version = CPU.version.removesuffix("+cpu")
    make_wheel(options.wheelhouse, "torch", version, {"torch/version.py": "cuda: Optional[str] = '13.0'\n"})
    with pytest.raises(UsageError, match=rf"there is torch-{version}-py3-none-any\.whl \(a CUDA build\)"):
        provision(device, options, connection, only=["environment"])


def test_a_cuda_build_under_the_right_name_is_refused(device, options, connection):
    make_wheel(options.wheelhouse, "torch", CPU.version, {"torch/version.py": "cuda: Optional[str] = '13.0'\n"})
    with pytest.raises(UsageError, match="is a CUDA build, and the board has no CUDA"):
        provision(device, options, connection, only=["environment"])
    assert connection.installed() == []


def test_cuda_that_is_asked_for_and_not_there_is_told(device, options, connection):
    if gathered_cuda():
        pytest.skip("this machine has CUDA")
    own = replace(device, python=sys.executable, accelerator="cuda")
    with pytest.raises(DeviceError, match=r"is asked for, and torch .* sees no CUDA device"):
        provision(own, options, connection)


def gathered_cuda():
    import torch

    return torch.cuda.is_available()
