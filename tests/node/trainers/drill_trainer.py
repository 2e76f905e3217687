"""A real trainer without torch: what it does is written in the job's scalars.

{"steps": [["phase", name], ["allocate", bytes], ["free"], ["progress"], ["wait_for", path], ["touch", path],
           ["take_time", seconds], ["spin", seconds], ["step", step, steps], ["exit", code], ["fail", text],
          ["raise_memory_error"], ["fork_hog", bytes], …],
 "update": {name: [shape]} or absent, "values": number}
"""

import json
import os
import select
import struct
import time
from pathlib import Path

import testbed
from testbed.node.link import AgentLink

UPDATE_FILL = 1.0


def main():
    link = AgentLink.connect()
    link.ready({"drill": "1"})
    for assignment in link.jobs(unload=lambda: None):
        serve(link, assignment)


def serve(link, assignment):
    try:
        Drill(link, assignment).run()
    except (MemoryError, OSError, RuntimeError) as error:
        link.failed(assignment.id, error)
    else:
        link.done(assignment.id)


class Drill:
    def __init__(self, link, assignment):
        self.link = link
        self.assignment = assignment
        self.script = assignment.job["scalars"]
        self.held = []
        self.times = []
        self.shares = []  # of the processor, that it had while it spun

    def run(self):
        for verb, *arguments in self.script.get("steps", []):
            getattr(self, verb)(*arguments)
        tensors = self.script.get("update", {})
        if tensors:
            self.assignment.update.write_bytes(safetensors(tensors))
        self.corrupt()
        self.assignment.write_result(
            {
                "examples": 7,
                "tokens": 70,
                "scalars": {
                    "pid": os.getpid(),
                    "payload": self.payload_bytes(),
                    "code": testbed.__file__,
                    "now": self.times,
                    "shares": self.shares,
                },
                "tensors": [
                    {"name": name, "dtype": "F32", "shape": shape, "ranges": None}
                    for name, shape in self.script.get("said", tensors).items()
                ],
                "state": None,
            }
            | self.script.get("result", {})
        )

    def payload_bytes(self):
        payload = self.assignment.payload
        return payload.stat().st_size if payload else None

    def phase(self, name):
        self.link.phase(name)

    def allocate(self, count):
        self.held.append(bytearray(os.urandom(1)) * count)

    def free(self):
        self.held.clear()

    def progress(self, **figures):
        self.link.progress(**{"step": 1, "loss": 0.5, **figures})

    def step(self, step, steps):
        self.progress(step=step, steps=steps)

    def spin(self, seconds):
        """Work without a pause for so long by the wall's clock."""
        begun, spent = time.monotonic(), time.process_time()
        while time.monotonic() < begun + seconds:
            pass
        self.shares.append((time.process_time() - spent) / (time.monotonic() - begun))

    def now(self):
        self.times.append(time.time())

    def wait_for(self, path):
        while not Path(path).exists():
            select.select([], [], [], 0.002)  # libfaketime does not let clock_nanosleep be

    def wait_for_ever(self):
        while True:
            time.sleep(3600)

    def take_time(self, seconds):
        time.sleep(seconds)

    def touch(self, path):
        Path(path).write_text(json.dumps({"pid": os.getpid()}))

    def count(self, path):
        with Path(path).open("a") as file:
            file.write("ran\n")

    def exit(self, code):
        print("the drill says goodbye", flush=True)
        os._exit(code)

    def fail(self, text):
        raise RuntimeError(text)

    def raise_memory_error(self):
        raise MemoryError

    def fork_hog(self, count):
        if not os.fork():
            self.allocate(count)
            os._exit(0)
        self.wait_for_ever()

    def say(self, line):
        self.link._sock.sendall(line.encode() + b"\n")

    def fill_disk(self):
        with self.assignment.update.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))

    def corrupt(self):
        how = self.script.get("corrupt")
        update = self.assignment.update
        if how == "truncate":
            os.truncate(update, update.stat().st_size - 5)
        elif how == "garbage":
            update.write_bytes(os.urandom(500))
        elif how == "header":
            update.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def safetensors(tensors):
    header, data = {}, b""
    for name, shape in tensors.items():
        count = 1
        for size in shape:
            count *= size
        values = struct.pack(f"<{count}f", *[UPDATE_FILL] * count)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


if __name__ == "__main__":
    main()
