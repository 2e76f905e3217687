import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.config import default_inventory, format_bytes, load_inventory, load_profile, parse_bytes
from testbed.errors import ConfigError, UsageError
from testbed.inventory import Budget, HardwareProfile
from testbed.package_data import data_folder

GIB = 1 << 30
MIB = 1 << 20

ONE = """
devices:
  orin-1:
    kind: emulated
    profile: jetson_orin_nano_8gb
    budget: {memory: "4 GiB", cores: 2}
    clients: 3
    tags: [jetson, desk]
    threads: 2
    accelerator: cuda
"""


def write(folder, text, name="lab.yaml"):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def device(settings):
    return f"devices: {{orin-1: {{kind: emulated, profile: jetson_orin_nano_8gb, {settings}}}}}"


def test_every_setting_of_a_device_arrives(tmp_path):
    (only,) = load_inventory(write(tmp_path, ONE))
    assert (only.name, only.kind, only.profile.name) == ("orin-1", "emulated", "jetson_orin_nano_8gb")
    assert only.budget == Budget(4 * GIB, 2)
    assert (only.clients, only.threads, only.accelerator) == (3, 2, "cuda")
    assert only.tags == {"jetson", "desk"}


def test_defaults_hold_where_a_device_says_nothing_else(tmp_path):
    text = """
    defaults: {kind: emulated, profile: raspberry_pi_5_4gb, clients: 2, budget: {memory: "500 MiB", cores: 1}}
    devices:
      plain: {}
      other: {clients: 5, budget: {memory: "600 MiB"}}
    """
    plain, other = load_inventory(write(tmp_path, text))
    assert (plain.clients, plain.budget) == (2, Budget(500 * MIB, 1))
    assert (other.clients, other.budget) == (5, Budget(600 * MIB, 1))


def test_a_budget_without_cores_has_no_quota(tmp_path):
    (only,) = load_inventory(write(tmp_path, device('budget: {memory: "1 GiB"}')))
    assert only.budget.cores is None


def test_a_profile_beside_the_inventory_hides_the_catalogue(tmp_path):
    original = (data_folder("inventory") / "profiles" / "jetson_orin_nano_8gb.yaml").read_text(encoding="utf-8")
    changed = original.replace('"7620 MiB"', '"7000 MiB"')
    write(tmp_path, changed, "profiles/jetson_orin_nano_8gb.yaml")
    (only,) = load_inventory(write(tmp_path, ONE))
    assert only.profile.usable_memory_bytes == 7000 * MIB


SITE = """\
defaults: {kind: generic, profile: jetson_orin_nano_8gb, budget: {memory: "4 GiB"}}
devices:
  far: {host: a, via: gate}
  gate: {host: HOST}
"""
BROKEN = {
    "wrong unit": (
        device("budget: {memory: 4gb}"),
        'devices.orin-1.budget.memory: expected bytes such as "4 GiB", got "4gb"',
    ),
    "no unit": (
        device("budget: {memory: 4}"),
        'devices.orin-1.budget.memory: expected bytes such as "4 GiB", got 4',
    ),
    "decimal unit": (
        device('budget: {memory: "4 GB"}'),
        'devices.orin-1.budget.memory: expected bytes such as "4 GiB", got "4 GB"',
    ),
    "unknown key": (
        device('budget: {memroy: "4 GiB"}'),
        'devices.orin-1.budget.memroy: unknown key; did you mean "memory"? There are: cores, memory',
    ),
    "unknown key of a device": (
        device('budget: {memory: "4 GiB"}, client: 2'),
        'devices.orin-1.client: unknown key; did you mean "clients"?',
    ),
    "unknown key of the file": (
        "device: {}",
        'device: unknown key; did you mean "devices"? There are: defaults, devices',
    ),
    "unknown key of the defaults": (
        ONE + "\ndefaults: {thread: 1}",
        'defaults.thread: unknown key; did you mean "threads"?',
    ),
    "missing profile": (
        device('budget: {memory: "4 GiB"}').replace("nano", "nono"),
        (
            "devices.orin-1.profile: expected the name of a hardware profile such as raspberry_pi_4b_4gb, got "
            '"jetson_orin_nono_8gb"; did you mean "jetson_orin_nano_8gb"?'
        ),
    ),
    "profile left out": (
        'devices: {orin-1: {kind: emulated, budget: {memory: "4 GiB"}}}',
        "devices.orin-1.profile: expected the name of a hardware profile such as raspberry_pi_4b_4gb, got nothing",
    ),
    "unknown kind": (
        device('budget: {memory: "4 GiB"}').replace("emulated", "emulatd"),
        'devices.orin-1.kind: expected a device kind such as emulated, got "emulatd"; did you mean "emulated"?',
    ),
    "kind left out": (
        ONE.replace("kind: emulated", ""),
        "devices.orin-1.kind: expected a device kind such as emulated, got nothing",
    ),
    "budget left out": (
        device("clients: 1"),
        'devices.orin-1.budget.memory: expected bytes such as "4 GiB", got nothing',
    ),
    "budget as text": (
        device('budget: "4 GiB"'),
        'devices.orin-1.budget: expected a mapping such as {memory: "700 MiB", cores: 1}, got "4 GiB"',
    ),
    "budget above the board": (
        device('budget: {memory: "9 GiB"}'),
        (
            "devices.orin-1.budget.memory: expected at most 7.4 GiB (the usable memory of jetson_orin_nano_8gb), "
            'got "9 GiB"'
        ),
    ),
    "more cores than the board": (
        device('budget: {memory: "4 GiB", cores: 7}'),
        "devices.orin-1.budget.cores: expected at most 6 (the cores of jetson_orin_nano_8gb), got 7",
    ),
    "more threads than the board": (
        device('budget: {memory: "4 GiB"}, threads: 7'),
        "devices.orin-1.threads: expected at most 6 (the cores of jetson_orin_nano_8gb), got 7",
    ),
    "no core at all": (
        device('budget: {memory: "4 GiB", cores: 0}'),
        "devices.orin-1.budget.cores: expected a number of cores above 0, got 0",
    ),
    "no client": (
        device('budget: {memory: "4 GiB"}, clients: 0'),
        "devices.orin-1.clients: expected a whole number from 1, got 0",
    ),
    "clients as text": (
        device('budget: {memory: "4 GiB"}, clients: two'),
        'devices.orin-1.clients: expected a whole number from 1, got "two"',
    ),
    "unknown accelerator": (
        device('budget: {memory: "4 GiB"}, accelerator: gpu'),
        'devices.orin-1.accelerator: expected "cpu" or "cuda", got "gpu"',
    ),
    "tags as text": (
        device('budget: {memory: "4 GiB"}, tags: big'),
        'devices.orin-1.tags: expected a list of words, got "big"',
    ),
    "a tag of two words": (
        device('budget: {memory: "4 GiB"}, tags: [a, big one]'),
        'devices.orin-1.tags[1]: expected a list of words, got "big one"',
    ),
    "a name that is no name": ("devices: {../x: {}}", "devices: expected a name in its place"),
    "a name that is a number": ("devices: {3: {}}", "devices: expected a name in its place"),
    "duplicate device": (
        "devices:\n  orin-1: {}\n  pi: {}\n  orin-1: {}\n",
        "devices.orin-1: expected each name once, got it twice (lines 2 and 4)",
    ),
    "duplicate key": (
        device('clients: 1, clients: 2, budget: {memory: "4 GiB"}'),
        "devices.orin-1.clients: expected each name once, got it twice (lines 1 and 1)",
    ),
    "no device": (
        "devices: {}",
        "devices: expected at least one device: a mapping from its name to its settings, got {}",
    ),
    "devices left empty": ("devices:", "devices: expected at least one device"),
    "devices as a list": ("devices: [orin-1]", "devices: expected at least one device: a mapping from its name to its"),
    "empty file": ("", "expected an inventory (a mapping), got nothing"),
    "a list": ("- orin-1", 'expected an inventory (a mapping), got ["orin-1"]'),
    "broken YAML": ("devices: {orin-1: [}", "expected YAML, got an error in line 1, column 20"),
    "two documents": ("devices: {}\n---\ndevices: {}\n", "expected YAML, got an error in line 2"),
    "a Python object": ("devices: !!python/object:os.system {}", "expected YAML, got an error in line 1"),
    "a way through a device that has one itself": (
        SITE.replace("HOST", "b").replace("gate: {", "gate: {via: far, "),
        "devices.far.via: expected a device without a `via` of its own (gate has `via: far`), got",
    ),
    "a way through a device on the same host": (
        SITE.replace("HOST", "a"),
        "devices.far.via: expected a device on another host (gate is on a too; leave `via` out), got",
    ),
    "a control character": ("devices: \x07", "expected YAML, got"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_wrong_file_is_told_with_file_key_expected_and_got(case, tmp_path):
    text, message = BROKEN[case]
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as told:
        load_inventory(file)
    assert str(told.value).startswith(f"{file}: {message}")


def test_every_complaint_about_a_file_is_told_at_once(tmp_path):
    file = write(tmp_path, device("budget: {memory: 4gb}, client: 2"))
    with pytest.raises(ConfigError) as told:
        load_inventory(file)
    assert len(str(told.value).splitlines()) == 2


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"lab\.yaml: expected an inventory file, got nothing: there is no such file"):
        load_inventory(tmp_path / "lab.yaml")


def test_a_file_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "lab.yaml").write_bytes(b"\xff\xfe\x00")
    for file, what in ((tmp_path, "a folder"), (tmp_path / "lab.yaml", "one that is no text")):
        with pytest.raises(ConfigError, match=f"expected an inventory file, got {what}"):
            load_inventory(file)


PROFILE = """
title: A board
memory: "4 GiB"
usable_memory: "3 GiB"
cores: 4
cgroup_default: v2
peak_source: sampled
swap_default: none
python: "3.11"
torch_source: cpu
"""
BROKEN_PROFILES = {
    "total rail that is none": ("total_rails: [VDD_IN]", "total_rails: expected names from rails"),
    "unverified field that is none": (
        "unverified: [usable_memroy]",
        "unverified: no field 'usable_memroy'; did you mean \"usable_memory\"?",
    ),
    "unknown key": ("watts: 5", "watts: unknown key"),
}


@pytest.mark.parametrize("case", BROKEN_PROFILES)
def test_a_wrong_profile_is_told(case, tmp_path):
    line, message = BROKEN_PROFILES[case]
    file = write(tmp_path, PROFILE + line, "board.yaml")
    with pytest.raises(ConfigError) as told:
        load_profile(file)
    assert str(told.value).startswith(f"{file}: {message}")


def test_a_profile_cannot_have_more_usable_memory_than_memory(tmp_path):
    file = write(tmp_path, PROFILE.replace("3 GiB", "5 GiB"), "board.yaml")
    with pytest.raises(ConfigError, match=r'usable_memory: expected at most the board.s memory \(4 GiB\), got "5 GiB"'):
        load_profile(file)


CATALOGUE = sorted((data_folder("inventory") / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("file", CATALOGUE, ids=lambda file: file.stem)
def test_every_profile_of_the_catalogue_is_sound(file):
    profile = load_profile(file)
    assert profile.name == file.stem
    assert 0.8 * profile.memory_bytes < profile.usable_memory_bytes <= profile.memory_bytes
    assert bool(profile.rails) == (profile.measurement_point is not None) == bool(profile.total_rails)
    assert bool(profile.l4t) == profile.name.startswith("jetson_")


def test_the_catalogue_has_every_memory_variant_of_every_board():
    assert [file.stem for file in CATALOGUE] == [
        "jetson_agx_orin_32gb",
        "jetson_agx_orin_64gb",
        "jetson_agx_orin_as_orin_nano_4gb",
        "jetson_agx_orin_as_orin_nano_8gb",
        "jetson_agx_orin_as_orin_nx_16gb",
        "jetson_agx_orin_as_orin_nx_8gb",
        "jetson_nano_2gb",
        "jetson_nano_4gb",
        "jetson_orin_nano_4gb",
        "jetson_orin_nano_8gb",
        "jetson_orin_nx_16gb",
        "jetson_orin_nx_8gb",
        "jetson_xavier_nx_16gb",
        "jetson_xavier_nx_8gb",
        "raspberry_pi_3b_plus",
        "raspberry_pi_4b_1gb",
        "raspberry_pi_4b_2gb",
        "raspberry_pi_4b_4gb",
        "raspberry_pi_4b_8gb",
        "raspberry_pi_5_16gb",
        "raspberry_pi_5_2gb",
        "raspberry_pi_5_4gb",
        "raspberry_pi_5_8gb",
    ]


def test_an_agx_orin_adds_up_rails_and_says_that_nobody_checked_the_sum():
    profile = load_profile(data_folder("inventory") / "profiles" / "jetson_agx_orin_64gb.yaml")
    assert profile.total_rails == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")
    assert "total_rails" in profile.unverified
    assert "VDDQ_VDD2_1V8AO" in [rail.name for rail in profile.rails]


def test_every_field_of_a_profile_can_stand_in_the_file():
    file_keys = {"memory_bytes": "memory", "usable_memory_bytes": "usable_memory", "name": None}
    from testbed.config import ProfileFile

    wanted = {file_keys.get(field.name, field.name) for field in dataclasses.fields(HardwareProfile)} - {None}
    assert wanted == set(ProfileFile.model_fields)


METERED = """\
devices:
  board: {{kind: {kind}, profile: {profile}, budget: {{memory: 1 GiB}}{more}}}
"""


@pytest.mark.parametrize(
    ("kind", "profile", "more", "meters"),
    [
        ("jetson", "jetson_orin_nano_8gb", "", ["ina3221"]),
        ("jetson", "jetson_agx_orin_64gb", "", ["ina3221"]),
        ("jetson", "jetson_nano_2gb", "", []),
        ("raspberry_pi", "raspberry_pi_5_8gb", "", ["rpi_pmic"]),
        ("raspberry_pi", "raspberry_pi_4b_4gb", "", []),
        ("generic", "raspberry_pi_5_8gb", "", []),
        ("emulated", "jetson_orin_nano_8gb", "", []),
        ("jetson", "jetson_orin_nano_8gb", ", meter: none", []),
        ("jetson", "jetson_orin_nano_8gb", ", meter: jtop", ["jtop"]),
        ("raspberry_pi", "raspberry_pi_5_8gb", ", meter: {rpi_pmic: {}, shelly: {host: plug}}", ["rpi_pmic", "shelly"]),
    ],
)
def test_a_board_has_its_own_sensors_or_the_meters_that_the_inventory_names(kind, profile, more, meters, tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(METERED.format(kind=kind, profile=profile, more=more))
    (board,) = load_inventory(path)
    assert [meter.name for meter in board.meters] == meters


@pytest.mark.parametrize(
    ("meter", "message"),
    [
        ("ina3212", 'devices.board.meter.ina3212: there is no meter "ina3212"; did you mean "ina3221"'),
        ("{shelly: {hots: plug}}", 'meter shelly has no setting "hots"; did you mean "host"'),
        ("{shelly: {host: plug, point: wall}}", "devices.board.meter.shelly.point: expected one of wall_ac, dc_input"),
        ("{shelly: {}}", "meter shelly needs host; write: meter: {shelly: {host: …}}"),
        ("{shelly: {host: plug, channel: two}}", "meter shelly: channel: expected a whole number, got 'two'"),
        ("{shelly: plug}", "devices.board.meter: expected the name of a meter such as ina3221, a mapping"),
    ],
)
def test_a_wrong_meter_is_told_with_its_place_and_the_right_word(meter, message, tmp_path):
    path = tmp_path / "lab.yaml"
    path.write_text(METERED.format(kind="jetson", profile="jetson_orin_nano_8gb", more=f", meter: {meter}"))
    with pytest.raises(ConfigError) as told:
        load_inventory(path)
    assert message in str(told.value)


def test_the_default_inventory_has_four_boards_of_different_memory():
    devices = load_inventory(default_inventory())
    assert len(devices) == len({d.profile.name for d in devices}) == len({d.budget.memory_bytes for d in devices}) == 4
    assert {d.kind for d in devices} == {"emulated"}
    assert {d.threads for d in devices} == {1}


def test_select_by_name_tag_and_profile():
    devices = load_inventory(default_inventory())
    names = [d.name for d in devices.select(["jetson", "raspberry_pi_5_4gb"])]
    assert names == ["jetson-orin-nano", "raspberry-pi-5", "jetson-nano"]
    with pytest.raises(UsageError, match="no device has the name, tag or profile 'orin'"):
        devices.select(["orin"])


@pytest.mark.parametrize(
    ("text", "size"),
    [("4 GiB", 4 * GIB), ("700MiB", 700 * MIB), ("1.5 GiB", 3 * GIB // 2), ("0 B", 0), ("2 TiB", 2048 * GIB)],
)
def test_bytes_are_read(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "4", "4gb", "4 GB", "4G", "GiB", "-1 GiB", "4 gib", "1e3 MiB", "4 GiB 2"])
def test_other_ways_to_write_bytes_are_refused(text):
    with pytest.raises(ConfigError, match='expected bytes such as "4 GiB", got'):
        parse_bytes(text)


@given(st.integers(min_value=0, max_value=1 << 50))
def test_bytes_are_shown_to_within_their_last_digit(size):
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.051, abs=1)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (700 * MIB, "700 MiB"), (4 * GIB, "4 GiB"), (3 * GIB // 2, "1.5 GiB"), (-MIB, "-1 MiB")],
)
def test_bytes_are_shown_as_people_write_them(size, text):
    assert format_bytes(size) == text
