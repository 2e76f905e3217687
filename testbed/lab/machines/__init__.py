"""Virtual machines as hosts of a lab: boards that QEMU emulates, made from the very files of `testbed image render`.

Where a namespace host shares this machine's kernel, a virtual machine has its own: cgroup v2, netem, a clock that can
be stepped, a boot.  No root is needed but to build the image that they start from.

spec.py              what such a lab consists of, as its folder remembers it
preparation.py       inventory, keys, rendered files, disks: what a machine is started with
environment_disk.py  a second disk with Python packages, so that nothing is installed inside
qemu.py              the command that starts a machine
qmp.py               QEMU's own protocol: freeze, unplug, switch off
link.py              bandwidth, delay and loss, by the machine's own kernel
time_server.py       the lab's clock, which the boards' chrony asks
clock.py             … as a process
host.py              one machine and the verbs of `testbed.lab.host.LabHost`
lab.py               bring such a lab up, find it again, take it down
"""
