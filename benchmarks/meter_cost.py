"""What it costs a processor to read a board's own sensor, alone and as the agent does it: stamped and kept on the disk.

    python benchmarks/meter_cost.py [--readings 20000]
    python benchmarks/meter_cost.py --root / [--readings 500]      # a Jetson's own INA3221

Without --root, of a tree like an Orin's in a temporary folder: three rails, two files each, without what the sensor's
driver does in the kernel.  Only processor time is
measured (of this process, in the kernel too).  On a board the driver's own waiting for a conversion comes on top as
time, not as processor time; the time that a reading took there is printed beside it.

The target is less than 1 % of a core at 50 readings a second; one that is missed is told, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from testbed.meters._power_log import PowerLog
from testbed.meters._sampler import Sampler, columns
from testbed.meters.ina3221 import Ina3221

RATES = (10, 50)
TARGET = 0.01
ORIN = {"VDD_IN": (5016, 904), "VDD_CPU_GPU_CV": (5016, 104), "VDD_SOC": (5016, 288)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, help="where a board's tree begins")
    parser.add_argument("--readings", type=int, default=20_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        meter = Ina3221(str(args.root or orin(folder)))
        meter.open()
        sampler = Sampler(meter, PowerLog(folder / "power", columns(meter)))
        ways = {"a reading": meter.read, "a sample, kept": sampler.sample}
        within = [cost(way, call, args.readings) for way, call in ways.items()]
        sampler.stop()
    sys.exit(0 if all(within) else 1)


def orin(root: Path) -> Path:
    """The files of a sensor that are read."""
    chip = root / "sys/bus/i2c/devices/1-0040"
    hwmon = chip / "hwmon/hwmon1"
    hwmon.mkdir(parents=True)
    (chip / "name").write_text("ina3221\n")
    for number, (rail, (millivolts, milliamperes)) in enumerate(ORIN.items(), 1):
        (hwmon / f"in{number}_label").write_text(f"{rail}\n")
        (hwmon / f"in{number}_input").write_text(f"{millivolts}\n")
        (hwmon / f"curr{number}_input").write_text(f"{milliamperes}\n")
    return root


def cost(way: str, call: Callable[[], object], readings: int) -> bool:
    """Print what one takes; whether it is within the target."""
    call()
    begun, since = time.process_time(), time.monotonic()
    for _ in range(readings):
        call()
    seconds = (time.process_time() - begun) / readings
    took = (time.monotonic() - since) / readings
    shares = {rate: seconds * rate for rate in RATES}
    told = ", ".join(f"{share:.3%} of a core at {rate} Hz" for rate, share in shares.items())
    missed = "" if shares[max(RATES)] < TARGET else f"   MISSED: the target is {TARGET:.0%}"
    print(f"{way:15} {seconds * 1e6:8.1f} µs of a processor ({took * 1e6:.1f} µs in all): {told}{missed}")
    return not missed


if __name__ == "__main__":
    main()
