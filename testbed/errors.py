"""Every error that the testbed raises on purpose.  The tree:

TestbedError            whatever a user can be told in one message
├── UsageError          a command, method, setting, run or name that does not exist or cannot be combined so
├── ConfigError         a file of the user: which file, which key, what was expected, what stood there
├── DataError           a data set that cannot be read, split or used for the task
├── ModelError          a base model that cannot be read, or whose structure was not found
├── PlanError           nobody can take part, or too few
├── LimitError          the memory of a trainer cannot be capped here
├── LabError            a virtual lab that cannot be made here, or is not in the state that was expected
├── DeviceError         a device that cannot be reached or whose agent does not answer
│   ├── HostKeyError    a device whose host key is unknown or has changed: nothing was executed there
│   ├── RightError      a right that is lacking on a device: which one, and what it was for
│   ├── LockedError     a device that another run holds
│   ├── BoardError      another board than the one that was expected behind an address
│   └── DiskError       a device whose disk takes no more
├── MeterError          a power meter that cannot be read: what, why, and the way out
├── WireError           a frame, file or update that is not what it says it is
└── StoreError          the results cannot be written or read
"""

from __future__ import annotations


class TestbedError(Exception):
    """Base of all: its text is a message for the user (state, what was asked, the way out)."""

    __test__ = False  # not a test case, whatever pytest makes of the name


class UsageError(TestbedError):
    """A command, method, setting, run or name that does not exist or cannot be combined so."""


class ConfigError(TestbedError):
    """A file of the user: which file, which key, what was expected, what stood there."""


class DataError(TestbedError):
    """A data set that cannot be read, split or used for the task."""


class ModelError(TestbedError):
    """A base model that cannot be read, or whose structure was not found."""


class PlanError(TestbedError):
    """Nobody can take part, or too few."""


class LimitError(TestbedError):
    """The memory of a trainer cannot be capped here."""


class LabError(TestbedError):
    """A virtual lab that cannot be made here, or is not in the state that was expected."""


class DeviceError(TestbedError):
    """A device that cannot be reached or whose agent does not answer."""


class HostKeyError(DeviceError):
    """A device whose host key is unknown or has changed: nothing was executed there."""


class RightError(DeviceError):
    """A right that is lacking on a device: which one, and what it was for."""


class LockedError(DeviceError):
    """A device that another run holds."""


class BoardError(DeviceError):
    """Another board than the one that was expected behind an address."""


class DiskError(DeviceError):
    """A device whose disk takes no more."""


class MeterError(TestbedError):
    """A power meter that cannot be read: what, why, and the way out."""


class WireError(TestbedError):
    """A frame, file or update that is not what it says it is."""


class StoreError(TestbedError):
    """The results cannot be written or read."""
