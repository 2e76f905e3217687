"""Devices over SSH.  `connect(name, access)` logs in; importing this imports paramiko: do it where it is used."""

from testbed.ssh.connection import SshConnection, connect

__all__ = ["SshConnection", "connect"]
