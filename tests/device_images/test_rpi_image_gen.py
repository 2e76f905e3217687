"""The layer for rpi-image-gen, as far as it can be looked at without that tool."""

from __future__ import annotations

import shutil
import subprocess

import yaml

from testbed.device_images import catalogue
from testbed.device_images.catalogue import folder, named
from testbed.device_images.render import recipe_digest

RECIPE = folder() / "raspberry_pi_os"
HERE = RECIPE / "rpi-image-gen"
LAYER, CONFIG = HERE / "layer/edge-testbed.yaml", HERE / "config/edge-testbed.yaml"


def test_the_configuration_has_the_kernels_words_and_the_layer():
    config = yaml.safe_load(CONFIG.read_text())
    assert config["image"]["cmdline_extra"] == (RECIPE / "files/bootfs/cmdline.append").read_text().strip()
    assert config["layer"][-1] == "edge-testbed"


def test_the_files_that_are_copied_are_those_of_every_board(tmp_path):
    """The hook is run as the tool runs it, on an empty folder in the place of a root file system."""
    copy, *_ = yaml.safe_load(LAYER.read_text())["mmdebstrap"]["customize-hooks"]
    environment = {"IGconf_edgetestbed_recipes": str(LAYER.parent / "../../.."), "PATH": "/usr/bin:/bin"}
    subprocess.run(["sh", "-c", copy, "hook", str(tmp_path)], env=environment, check=True)
    written = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    overlays = [folder() / "common/overlay", RECIPE / "overlay"]
    of_every_board = {
        str(path.relative_to(overlay)): path.read_text()
        for overlay in overlays
        for path in overlay.rglob("*")
        if path.is_file() and path.suffix != ".jinja"
    }
    assert written == of_every_board


def test_every_line_about_the_layer_is_a_comment_before_it():
    head, separator, rest = LAYER.read_text().partition("# METAEND\n---\n")
    assert separator
    assert all(line.startswith("#") for line in head.splitlines())
    assert set(yaml.safe_load(rest)) == {"mmdebstrap"}


def test_nothing_of_it_is_in_what_is_rendered(tmp_path, monkeypatch):
    """A folder that was rendered is still of the same recipe when the layer has changed."""
    shutil.copytree(folder(), tmp_path / "device_images")
    image = named("raspberry_pi_os_trixie")
    before = recipe_digest(image)
    monkeypatch.setattr(catalogue, "folder", lambda: tmp_path / "device_images")
    assert recipe_digest(image) == before
    (tmp_path / "device_images" / LAYER.relative_to(folder())).write_text("mmdebstrap: {}\n")
    assert recipe_digest(image) == before
    (tmp_path / "device_images/raspberry_pi_os/files/bootfs/cmdline.append").write_text("quiet\n")
    assert recipe_digest(image) != before
