"""A reader's desk: a folder in which a page's commands are typed, with the little that a page takes for granted.

What would take minutes is typed in another form, and what is put in its place is here:

- a run, an experiment and a deployment are planned (`--dry-run`), with the settings that the page has, and of an
  experiment the first method only;
- where the default data would be read, a small file is;
- an experiment that comes along is named by its file;
- a frontier is that of a small model, on one device;
- a meter is looked at for a second;
- a board's image is rendered with a public key of the tests;
- RUN is a run that is there: small, real, done once for all pages.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import yaml

from testbed.data_sources import DOCSTRINGS
from tests.device_images.boards import PUBLIC_KEY
from tests.lab_runs import Desk, Said
from tests.pages import ROOT, ShownFile, Typed

#: What a page finds in the folder where the repository is.
OF_THE_REPOSITORY = ("inventory", "benchmarks", "methods")
PLANNED = ("run-method", "experiment", "deploy")
LEARNING = ("run-method", "deploy", "frontier")
#: By hardware profile: which host of the virtual lab wears that board's face.
HOSTS = {
    "jetson_orin_nano_8gb": "jetson-orin-nano",
    "raspberry_pi_5_8gb": "raspberry-pi-5",
    "raspberry_pi_4b_4gb": "raspberry-pi-4b",
}
#: Where a page speaks of a lab and does not show it.
SOME_LAB = """\
devices:
  orin-1: {kind: jetson, profile: jetson_orin_nano_8gb, budget: {memory: "5 GiB"}}
  pi-1: {kind: raspberry_pi, profile: raspberry_pi_5_8gb, budget: {memory: "5 GiB"}}
"""


class PageDesk(Desk):
    """`tiny`: a folder with model/ and data.jsonl (tests.tiny_lab); `runs`: the folder with the run."""

    def __init__(self, folder: Path, tiny: Path, runs: Path) -> None:
        super().__init__(folder)
        self.variables["TESTBED_CACHE"] = str(tiny / "cache")
        self._tiny = tiny
        for name in OF_THE_REPOSITORY:
            (folder / name).symlink_to(ROOT / name)
        for file in (ROOT / "experiments").glob("*.yaml"):
            self._write_shipped(file)
        shutil.copytree(runs, folder / "runs")
        (folder / "wheels").mkdir()

    def write(self, file: ShownFile) -> Path:
        """An experiment that leaves the data out, or names the default ones, gets the small file."""
        path = self.folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = file.text
        if path.suffix == ".yaml" and "\nmethods:" in text:
            text = re.sub(r"\ndata: .*", "", text) + self._small_data
        path.write_text(text, encoding="utf-8")
        return path

    def _write_shipped(self, file: Path) -> None:
        """The same, but what leaves the data out may be about images."""
        text, default = file.read_text(encoding="utf-8"), f"\ndata: [{DOCSTRINGS}]\n"
        (self.folder / "experiments").mkdir(exist_ok=True)
        (self.folder / "experiments" / file.name).write_text(text.replace(default, self._small_data), encoding="utf-8")

    @property
    def _small_data(self) -> str:
        return f"\ndata: [{{name: {self._tiny}/data.jsonl, text: body, label: kind}}]\n"

    def type(self, command: Typed) -> Said:
        """In the form above; the exit code must be 0."""
        return self.testbed(*self.in_short(command.words))

    def in_short(self, words: tuple[str, ...]) -> list[str]:
        run = min(path.name for path in (self.folder / "runs").iterdir() if path.is_dir())
        typed = [run if word == "RUN" else word for word in words]
        if words[0] == "experiment" and (self.folder / f"experiments/{words[1]}.yaml").exists():
            typed[1] = f"experiments/{words[1]}.yaml"
        if words[0] in PLANNED and "--dry-run" not in words:
            typed.append("--dry-run")
        if words[0] == "experiment" and "--only" not in words:
            typed += ["--only", self._first_method(typed[1])]
        if words[0] in LEARNING and not {"--data", "--task"} & set(words):
            typed += ["--data", str(self._tiny / "data.jsonl"), "--data-set", "text=body", "--data-set", "label=kind"]
        if words[0] == "frontier":
            typed += ["--model", str(self._tiny / "model"), "--only", "raspberry-pi-4"]
            typed += [] if "--length" in words else ["--length", "32"]  # as much as that model takes
        if words[:2] == ("image", "render"):
            typed += ["--authorized-key", str(PUBLIC_KEY)]
        if words[0] == "meter":
            typed += ["--seconds", "1"]
        return typed

    def _first_method(self, experiment: str) -> str:
        return str(next(iter(yaml.safe_load((self.folder / experiment).read_text(encoding="utf-8"))["methods"])))


def on_the_lab(inventory: str, ssh_config: Path, python: str) -> str:
    """A page's inventory with the lab's hosts in place of its boards: what these have is that of the page.

    Left out is what a host of the lab has not: an accelerator, another power mode, a plug.
    """
    content = yaml.safe_load(inventory)
    reached = {"user": "admin", "ssh_config": str(ssh_config), "python": python}
    left_out = ("accelerator", "power_mode", "meter", "user")
    hosts = iter(sorted(HOSTS.values()))
    devices = {
        name: {
            **{key: value for key, value in device.items() if key not in left_out},
            "host": HOSTS.get(device["profile"]) or next(hosts),
        }
        for name, device in content["devices"].items()
    }
    return yaml.safe_dump({"defaults": {**content.get("defaults", {}), **reached}, "devices": devices})
