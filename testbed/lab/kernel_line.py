"""The words that a kernel was booted with, and what they mean for the memory cgroup of a Raspberry Pi."""

from __future__ import annotations


def memory_cgroup_on(cmdline: str) -> bool:
    """Whether a Raspberry Pi that booted with this kernel line has its memory cgroup: the last word on it wins.

    The firmware puts cgroup_disable=memory before the words of cmdline.txt
    (https://github.com/raspberrypi/linux/issues/6980).
    """
    on = False
    for word in cmdline.split():
        key, _, value = word.partition("=")
        if key in {"cgroup_enable", "cgroup_disable"} and "memory" in value.split(","):
            on = key == "cgroup_enable"
    return on
