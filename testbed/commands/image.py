"""`testbed image`: from a blank card to a board that `testbed provision` finds ready."""

from __future__ import annotations

import shlex
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.commands._options import json_option
from testbed.commands._sigterm import tidied_on_sigterm
from testbed.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from testbed.device_images.base import Progress
    from testbed.device_images.board import Board

_FILE = click.Path(path_type=Path)

_base_option = click.option(
    "--base", metavar="FILE", type=_FILE, help="The publisher's file that the image starts from, as it was downloaded."
)
_checksums_option = click.option(
    "--checksums", metavar="FILE", type=_FILE,
    help="The publisher's file of checksums, which BASE is compared with; the catalogue has none of its own yet.",
)  # fmt: skip


@click.group("image")
def command() -> None:
    """Make a board from a blank card: render an image's files for that very board, check them, bake a whole image."""


@command.command("list")
def list_images() -> None:
    """Show the images there are, and which boards they are for."""
    from testbed.commands._table import show, table
    from testbed.device_images import catalogue

    rows = [
        (name, image.system, ", ".join(image.profiles), ", ".join(image.media), image.tried_on)
        for name, image in catalogue.images().items()
    ]
    show(table(("image", "system", "profiles", "media", "tried on"), rows))


@command.command("render")
@click.argument("board", metavar="DEVICE|PROFILE")
@click.option("-o", "--output", metavar="DIR", type=_FILE, required=True, help="Where the files go; made if need be.")
@click.option("--inventory", metavar="FILE", type=_FILE, help="The inventory that DEVICE is in.")
@click.option("--image", "image_name", metavar="NAME", help="An image of the catalogue [default: the board's first].")
@click.option(
    "--authorized-key", "authorized_keys", metavar="FILE", type=_FILE, multiple=True,
    help="A file of public keys that may log in; may be repeated [default: the inventory's, else those of ssh].",
)  # fmt: skip
@click.option(
    "--wifi-password-file", metavar="FILE", type=_FILE, help="The password of the inventory's wireless network."
)
@_base_option
@_checksums_option
def render(
    board: str, output: Path, inventory: Path | None, image_name: str | None, authorized_keys: tuple[Path, ...],
    wifi_password_file: Path | None, base: Path | None, checksums: Path | None,
) -> None:  # fmt: skip
    """Write the ready-to-copy files for a DEVICE of the inventory, or for any board of a PROFILE.

    Host name, user, keys and network are the inventory's.  The files hold the board's SSH host key, and a wireless
    password where there is one: they are yours alone, and stand nowhere else.  With --base, the publisher's file is
    compared with its checksum first, and nothing is written where it is another one.
    """
    from testbed.device_images.base import refuse_base, verify
    from testbed.device_images.catalogue import named
    from testbed.device_images.render import KNOWN_HOSTS, refuse_foreign, write
    from testbed.device_images.render import render as rendered

    if checksums is not None and base is None:
        raise UsageError("--checksums: there is no file to compare with it; name the publisher's by `--base FILE`")
    password = None if wifi_password_file is None else _password(wifi_password_file)
    made = _board(board, inventory, image_name, authorized_keys, password, output)
    refuse_foreign(output, made.host_name)
    refuse_base(named(made.image), base, checksums)
    files = rendered(made)
    if base is not None:
        with _progress() as tell:
            verified = verify(base, checksums, named(made.image).base, tell)
    write(files, output)
    for note in made.notes:
        click.echo(f"note: {note}", err=True)
    for file in files:
        click.echo(f"{output / file.path}{' (secret)' if file.secret else ''}")
    click.echo(f"\n{made.host_name}: {made.image} for {made.profile.title}")
    if base is not None:
        click.echo(f"{base}: {verified}")
    click.echo(f"what to do with them:  {output / 'README.txt'}")
    click.echo(f"so that it is known:   cat {output / KNOWN_HOSTS} >> ~/.ssh/known_hosts")


def _board(
    name: str, inventory: Path | None, image: str | None, keys: tuple[Path, ...], password: str | None, output: Path
) -> Board:
    """A device of the inventory where one is named or has that name, else any board of that profile."""
    from dataclasses import replace

    from testbed.config import default_inventory, load_image_settings, load_inventory, load_named_profile, profiles
    from testbed.device_images.board import board_of, board_of_profile
    from testbed.device_images.network import check_alone
    from testbed.device_images.render import host_key_in
    from testbed.spelling import did_you_mean

    path = inventory or default_inventory()
    devices = {device.name: device for device in load_inventory(path)}
    if name in devices:
        stated = load_image_settings(path)
        settings = stated[name] if image is None else replace(stated[name], name=image)
        key = host_key_in(output)
        made = board_of(devices[name], settings, key, authorized_keys=keys, wifi_password=password, inventory=str(path))
        check_alone(name, {each: stated[each] for each in devices if devices[each].kind != "emulated"})
        return made
    if name not in profiles(path) and inventory is None:
        raise UsageError(
            f"there is no profile {name!r}; {did_you_mean(name, profiles(path))}; if {name} is a device, name its "
            "inventory by `--inventory FILE`"
        )
    if name not in profiles(path):
        known = [*devices, *profiles(path)]
        raise UsageError(f"{path} has no device {name!r}, and there is no such profile; {did_you_mean(name, known)}")
    if password is not None:
        raise UsageError("a wireless network is the inventory's (`image: {wifi: …}`): name a device, not a profile")
    profile = load_named_profile(path, name)
    return board_of_profile(profile, host_key_in(output), image=image, authorized_keys=keys)


def _password(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").rstrip("\r\n")
        open_to_others = file.stat().st_mode & 0o077
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"--wifi-password-file: {file} cannot be read: {reason}") from None
    if not 8 <= len(text) <= 63:
        raise UsageError(f"--wifi-password-file: a password of WPA has 8 to 63 characters, {file} has {len(text)}")
    if not text.isprintable():
        raise UsageError(f"--wifi-password-file: expected the password alone, on one line; {file} has more than that")
    if open_to_others:
        click.echo(f"note: others may read the password in {file}: chmod 600 {shlex.quote(str(file))}", err=True)
    return text


@command.command("check")
@click.argument("folder", metavar="DIR", type=_FILE)
@click.option("--strict", is_flag=True, help="A file that no tool could look at is wrong too.")
@json_option
def check(folder: Path, strict: bool, as_json: bool) -> int:
    """Look whether the rendered files in DIR are as they were rendered, private, and right as their own tools see them.

    Exits with 1 when one is not.
    """
    import json
    from dataclasses import asdict

    from testbed.commands._table import show, table
    from testbed.device_images.check import UNSEEN, WRONG
    from testbed.device_images.check import check as looked

    findings = looked(folder)
    bad = [each for each in findings if each.verdict == WRONG or (strict and each.verdict == UNSEEN)]
    if as_json:
        click.echo(json.dumps([asdict(each) for each in findings], indent=2, ensure_ascii=False))
    else:
        rows = [(each.file, each.looked_at, each.verdict, each.text) for each in findings]
        show(table(("file", "looked at", "verdict", ""), rows))
        click.echo(f"{len(findings)} looks, {len(bad)} wrong")
    return 1 if bad else 0


@command.command("build")
@click.argument("folder", metavar="DIR", type=_FILE)
@click.option("-o", "--output", metavar="FILE", type=_FILE, required=True, help="The image that is made, a new file.")
@_base_option
@_checksums_option
def build(folder: Path, output: Path, base: Path | None, checksums: Path | None) -> None:
    """Build the whole image of a board from the files that `testbed image render` wrote into DIR.

    It holds the board's SSH host key, as DIR does: it is yours alone.  DIR is checked first, and BASE is compared with
    its checksum.
    """
    from testbed.device_images.build import build as built
    from testbed.device_images.render import KNOWN_HOSTS

    with tidied_on_sigterm(), _progress() as tell:
        lines = built(folder, output, base=base, checksums=checksums, tell=tell)
    for line in lines:
        click.echo(line)
    click.echo(f"so that it is known: cat {folder / KNOWN_HOSTS} >> ~/.ssh/known_hosts")


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on the error stream, for what reads or writes gigabytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    # Where nobody looks there is no bar, nor the empty line that one leaves.
    with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("checking", total=None)
        yield lambda text, done, total: bars.update(bar, description=text, completed=done, total=total)
