"""Boards to render, with keys that were made for these tests and open nothing."""

from __future__ import annotations

from pathlib import Path

from testbed.config import load_profile
from testbed.device_images.board import Board
from testbed.device_images.host_key import HostKey
from testbed.inventory import HardwareProfile, ImageSettings
from testbed.package_data import data_folder

HERE = Path(__file__).parent
KEYS = HERE / "keys"
PUBLIC_KEY = KEYS / "login.pub"
VIRTUAL = HardwareProfile("virtual_board_arm64", "Virtual board", 2 << 30, 1900 << 20, cores=2)
WIFI_PASSWORD = "open sesame"


def profile(name: str) -> HardwareProfile:
    return load_profile(data_folder("inventory") / "profiles" / f"{name}.yaml")


def board(image: str, of: HardwareProfile, **more: object) -> Board:
    settings = ImageSettings(**{key: more.pop(key) for key in list(more) if key in ImageSettings.__dataclass_fields__})
    return Board(
        image=image,
        host_name="board-1",
        user="ada",
        profile=of,
        settings=settings,
        authorized_keys=(PUBLIC_KEY.read_text(encoding="ascii").strip(),),
        host_key=HostKey.read(KEYS / "of_no_board"),
        known_as=("board-1.lab",),
        device="board_1",
        inventory="lab.yaml",
        **more,  # type: ignore[arg-type]
    )


#: One of every image at least, by the name of its golden folder.
GOLDEN = {
    "raspberry_pi_os_trixie_by_wifi": lambda: board(
        "raspberry_pi_os_trixie", profile("raspberry_pi_5_8gb"), wifi="lab net", country="DE",
        wifi_password=WIFI_PASSWORD, time_servers=("192.0.2.1",),
    ),
    "ubuntu_24_04_raspberry_pi_at_an_address": lambda: board(
        "ubuntu_24_04_raspberry_pi", profile("raspberry_pi_4b_4gb"), address="192.0.2.12/24", gateway="192.0.2.1",
        name_servers=("192.0.2.1",), interface="eth0", timezone="Europe/Berlin",
    ),
    "jetson_orin_jetpack_6_super": lambda: board(
        "jetson_orin_jetpack_6", profile("jetson_orin_nano_8gb"), power_mode="MAXN_SUPER", timezone="Europe/Berlin",
        time_servers=("192.0.2.1",),
    ),
    "jetson_orin_jetpack_6_agx_as_nx_by_wifi": lambda: board(
        "jetson_orin_jetpack_6", profile("jetson_agx_orin_as_orin_nx_8gb"), wifi="lab; net", country="DE",
        wifi_password=WIFI_PASSWORD,
    ),
    "jetson_orin_jetpack_7": lambda: board("jetson_orin_jetpack_7", profile("jetson_orin_nx_16gb"), power_mode="15W"),
    "jetson_xavier_nx_jetpack_5_at_an_address": lambda: board(
        "jetson_xavier_nx_jetpack_5", profile("jetson_xavier_nx_16gb"), address="192.0.2.13/24", gateway="192.0.2.1",
        name_servers=("192.0.2.1", "192.0.2.2"), interface="eth0", power_mode="MODE_15W_6CORE",
    ),
    "jetson_nano_jetpack_4": lambda: board("jetson_nano_jetpack_4", profile("jetson_nano_2gb"), power_mode="MAXN"),
    "debian_trixie": lambda: board("debian_trixie", VIRTUAL, time_servers=("192.0.2.2:1123",)),
}  # fmt: skip
