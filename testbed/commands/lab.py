"""`testbed lab`: hosts of our own on this machine, to rehearse on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.commands._options import Command, json_option
from testbed.commands._sigterm import tidied_on_sigterm
from testbed.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from testbed.lab.link import LinkShape
    from testbed.lab.opened import AnyHost, AnyLab


@click.group("lab")
def command() -> None:
    """Rehearse on a virtual lab: hosts with an address, an SSH server, users and a memory cap of their own.

    The hosts live in namespaces of this machine, on a network of their own: they reach each other and this machine,
    and nothing else.  They can wear the face of a board (a persona).  Making and changing them needs root.  With --vm
    they are virtual machines, booted from the Debian image: slower, and with a kernel of their own.
    """


def _folder_option(made: Command) -> Command:
    return click.option(
        "--folder",
        type=click.Path(path_type=Path),
        help="The lab's folder [default: lab, in the cache of the testbed].",
    )(made)


def _shape_options(made: Command) -> Command:
    loss = click.option("--loss", metavar="SHARE", help='Packets dropped in each direction, such as "1%".')
    delay = click.option("--delay", metavar="TIME", help='Delay in each direction, such as "50ms".')
    bandwidth = click.option("--bandwidth", metavar="RATE", help='Limit in each direction, such as "20mbit".')
    return bandwidth(delay(loss(made)))


@command.command("up")
@click.option("--devices", type=click.IntRange(min=1), help="Hosts [default: one per --persona, else 3; 1 with --vm].")
@click.option(
    "--persona", "personas", metavar="NAME", multiple=True,
    help="The face that hosts wear, by turns: a board's, or plain; may be repeated [default: one of each board].",
)  # fmt: skip
@click.option("--memory", metavar="SIZE", help='Memory cap of every host, such as "2 GiB" [default: the persona\'s].')
@_shape_options
@click.option("--subnet", default="10.99.0.0/24", show_default=True, help="Network of the lab.")
@click.option("--boot-delay", default="1s", show_default=True, metavar="TIME", help="How long a reboot takes.")
@click.option("--vm", is_flag=True, help="Virtual machines by QEMU, from the files of `testbed image render`.")
@click.option(
    "--architecture", type=click.Choice(["arm64", "amd64"]), help="Of virtual machines [default: arm64, a Cortex-A76]."
)
@click.option("--no-environment", is_flag=True, help="Virtual machines get no second disk with Python packages.")
@_folder_option
@click.pass_context
def up(context: click.Context, /, folder: Path | None, *, vm: bool, **options: Any) -> None:
    """Make a lab, and an inventory that works at once with --inventory."""
    from testbed.lab.lab import default_folder

    names, why = (_OF_NAMESPACES, "is not for virtual machines (--vm)") if vm else (_OF_MACHINES, "needs --vm")
    _refuse_others(context, names, why)
    shape = _shape(**{name: options.pop(name) for name in ("bandwidth", "delay", "loss")})
    with tidied_on_sigterm():
        lab = (_machines if vm else _namespaces)(folder or default_folder(), shape, **options)
    _print(lab)
    click.echo(f"\ninventory: {lab.inventory}\nlog in:    ssh -F {lab.ssh_config} {lab.hosts[0].name}")


#: Options of `up` that only one kind of host knows.
_OF_NAMESPACES = ("personas", "subnet", "boot_delay")
_OF_MACHINES = ("architecture", "no_environment")


def _refuse_others(context: click.Context, names: tuple[str, ...], why: str) -> None:
    from click.core import ParameterSource

    for parameter in context.command.params:
        given = context.get_parameter_source(str(parameter.name)) is not ParameterSource.DEFAULT
        if parameter.name in names and given:
            raise UsageError(f"{parameter.opts[0]} {why}")


def _memory(text: str) -> int:
    from testbed.byte_text import parse_bytes

    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise UsageError(f"--memory: {error}") from None


def _machines(
    folder: Path, shape: LinkShape, *, devices: int | None, memory: str | None, architecture: str | None,
    no_environment: bool, **_: Any,
) -> AnyLab:  # fmt: skip
    from testbed.lab.machines.lab import DEFAULT_ARCHITECTURE, DEFAULT_MEMORY_BYTES, MachineLab, MachineWish

    wish = MachineWish(
        devices=devices or 1,
        memory_bytes=DEFAULT_MEMORY_BYTES if memory is None else _memory(memory),
        architecture=architecture or DEFAULT_ARCHITECTURE,
        environment=not no_environment,
        shape=shape,
    )
    started = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"{time.monotonic() - started:5.0f} s  {text}", err=True)

    return MachineLab.up(folder, wish, say)


def _namespaces(
    folder: Path, shape: LinkShape, *, devices: int | None, personas: tuple[str, ...], memory: str | None, subnet: str,
    boot_delay: str, **_: Any,
) -> AnyLab:  # fmt: skip
    from testbed.lab.lab import Lab
    from testbed.lab.link import parse_delay
    from testbed.lab.wish import LabWish

    wish = LabWish(
        devices=devices,
        personas=personas,
        memory_bytes=None if memory is None else _memory(memory),
        shape=shape,
        subnet=subnet,
        boot_delay_seconds=parse_delay(boot_delay),
    )
    return Lab.up(folder, wish)


@command.command("down")
@_folder_option
def down(folder: Path | None) -> None:
    """Remove a lab: processes, network, cgroups, files; also one of which half is gone."""
    from testbed.lab.lab import default_folder
    from testbed.lab.opened import take_down

    folder = folder or default_folder()
    take_down(folder)
    left = "; what else is in the folder stays" if folder.exists() else ""
    click.echo(f"The lab in {folder} is gone{left}.")


@command.command("status")
@json_option
@_folder_option
def status(as_json: bool, folder: Path | None) -> None:
    """Show the hosts of a lab, and how each of them is."""
    lab = _open(folder)
    if as_json:
        click.echo(json.dumps(_data(lab), indent=2, ensure_ascii=False))
    else:
        _print(lab)


@command.command("shape")
@click.argument("host")
@_shape_options
@_folder_option
def shape(host: str, folder: Path | None, **options: str | None) -> None:
    """Give HOST's link another bandwidth, delay and loss; what is not named is lifted."""
    wanted = _shape(**options)
    _open(folder).host(host).shape(wanted)
    click.echo(f"{host}: {wanted}")


def _verb(name: str, do: Callable[[AnyHost], None], done: str | None, text: str, *, begun: str | None = None) -> None:
    """A command that does something to hosts, and says what each of them is afterwards; None: what its state says."""

    @click.argument("hosts", metavar="HOST...", nargs=-1, required=True)
    @_folder_option
    def run(hosts: tuple[str, ...], folder: Path | None) -> None:
        lab = _open(folder)
        for host in [lab.host(name) for name in hosts]:
            if begun is not None:
                click.echo(f"{host.name}: {begun} …", err=True)
            do(host)
            click.echo(f"{host.name}: {done or _condition(host)}")

    command.command(name, help=text)(run)


def _reboot(host: AnyHost) -> None:
    host.reboot()
    _wait_up(host)


def _start(host: AnyHost) -> None:
    host.start()
    _wait_up(host)


def _wait_up(host: AnyHost) -> None:
    """A host that is cut off or frozen cannot answer."""
    state = host.state()
    if state.connected and state.state != "frozen":
        host.wait_up()


def _condition(host: AnyHost) -> str:
    state = host.state()
    return state.state if state.connected else f"{state.state}, and its cable is pulled"


_verb("cut", lambda host: host.cut(), "cut", "Pull the network cable of each HOST.")
_verb("mend", lambda host: host.mend(), "mended", "Put the network cable of each HOST back.")
_verb("freeze", lambda host: host.freeze(), "frozen", "Stop every process of each HOST where it is.")
_verb("thaw", lambda host: host.thaw(), "thawed", "Let the processes of each HOST go on.")
_verb("reboot", _reboot, None, "Reboot each HOST: its disk stays, /tmp and everything that ran is gone.",
      begun="rebooting")  # fmt: skip
_verb("stop", lambda host: host.stop(), "off", "Pull the plug of each HOST.")
_verb("start", _start, None, "Switch each HOST on.", begun="starting")


def _open(folder: Path | None) -> AnyLab:
    from testbed.lab.lab import default_folder
    from testbed.lab.opened import open_lab

    return open_lab(folder or default_folder())


def _shape(bandwidth: str | None = None, delay: str | None = None, loss: str | None = None) -> LinkShape:
    from testbed.lab.link import LinkShape, parse_bandwidth, parse_delay, parse_loss

    return LinkShape(
        bits_per_second=None if bandwidth is None else parse_bandwidth(bandwidth),
        delay_seconds=0.0 if delay is None else parse_delay(delay),
        loss=0.0 if loss is None else parse_loss(loss),
    )


def _data(lab: AnyLab) -> dict[str, Any]:
    return {
        "folder": str(lab.folder),
        "inventory": str(lab.inventory),
        "ssh_config": str(lab.ssh_config),
        **lab.facts(),
        "hosts": [{**asdict(host.spec), **asdict(host.state())} for host in lab.hosts],
    }


def _print(lab: AnyLab) -> None:
    from testbed.commands._table import show, table

    headings = ("host", "persona", "address", "state", "link", "memory", "problem")
    show(table(headings, [_row(host) for host in lab.hosts]))
    click.echo(lab.how())


def _row(host: AnyHost) -> tuple[str, ...]:
    from testbed.quantities import bytes_text

    spec, state = host.spec, host.state()
    link = str(state.shape) if state.connected else "cut"
    memory = f"{bytes_text(state.used_bytes)} of {bytes_text(spec.memory_bytes)}"
    return (spec.name, spec.persona or "plain", spec.address, state.state, link, memory, state.problem or "")
