"""A virtual machine's link: shaped by its own kernel, in each direction, and again at every boot."""

from __future__ import annotations

from testbed.lab.link import LinkShape

#: On the machine: what shapes the link, and the service that does it after a boot.
SCRIPT = "/usr/local/lib/edge-testbed-link.sh"
SERVICE = "edge-testbed-link.service"
_NETEM_FRAMES = 10_000
#: Frames that come in go through a device of the kernel's own, because only what goes out can be shaped.
_INCOMING = "ifb0"


def script(shape: LinkShape) -> str:
    """A shell script for root on the machine that shapes its link from now on."""
    return f"""\
set -eu
mkdir -p {SCRIPT.rpartition("/")[0]}
cat >{SCRIPT} <<'END'
{shaping(shape)}END
chmod 755 {SCRIPT}
cat >/etc/systemd/system/{SERVICE} <<'END'
[Unit]
After=network.target
[Service]
Type=oneshot
ExecStart=/bin/sh {SCRIPT}
[Install]
WantedBy=multi-user.target
END
systemctl daemon-reload
systemctl -q enable {SERVICE}
sh {SCRIPT}
"""


def shaping(shape: LinkShape) -> str:
    """What shapes the link, from whatever state it is in."""
    lines = [
        "set -eu",
        "for link in /sys/class/net/e*; do link=${link##*/}; break; done",
        'tc qdisc del dev "$link" root 2>/dev/null || true',
        'tc qdisc del dev "$link" ingress 2>/dev/null || true',
        f"ip link del {_INCOMING} 2>/dev/null || true",
    ]
    if shape == LinkShape():
        return "\n".join(lines) + "\n"
    discipline = f"root netem limit {_NETEM_FRAMES}{_words(shape)}"
    lines += [
        f"ip link add {_INCOMING} type ifb",
        f"ip link set {_INCOMING} up",
        'tc qdisc add dev "$link" ingress',
        f'tc filter add dev "$link" parent ffff: protocol all matchall action mirred egress redirect dev {_INCOMING}',
        f"tc qdisc add dev {_INCOMING} {discipline}",
        f'tc qdisc add dev "$link" {discipline}',
    ]
    return "\n".join(lines) + "\n"


def _words(shape: LinkShape) -> str:
    words = ""
    if shape.delay_seconds:
        words += f" delay {round(shape.delay_seconds * 1e6)}us"
    if shape.loss:
        words += f" loss {100 * shape.loss:g}%"
    if shape.bits_per_second is not None:
        words += f" rate {shape.bits_per_second}bit"
    return words
