"""What is found on a device about Python: interpreters, the environment that provisioning made, the proof, our code.

FACTS_PART is a part of the script that gathers facts (POSIX sh; `$FOLDER` is the testbed's folder there, `$DEVICE` the
device's name, and `$DEVICE_PYTHON` the interpreter that the inventory names, if any); `parse` reads what it prints.
"""

from __future__ import annotations

import json
from typing import Any

#: Files of records below the testbed's folder; each is one line of JSON.
ENVIRONMENT_RECORD = "env/testbed.json"
#: A proof is of one device: guests that share a folder differ in threads.
PROOF_RECORD = "proof-{}.json"

#: Runs on any Python 3, without `site`: about 20 ms on a PC.
_ASK = "import sys,sysconfig;print('%d.%d.%d'%sys.version_info[:3],sysconfig.get_platform())"
#: In the interpreter that the inventory names: what is installed there, as one line.
_ASK_PACKAGES = (
    "import json;from importlib import metadata as m;print(json.dumps({n:d.version for n in "
    "('numpy','safetensors','torch','transformers') for d in list(m.distributions(name=n))[:1]}))"
)

FACTS_PART = f"""\
ask() {{ printf 'python\\t%s\\t' "$1"; "$1" -I -S -c "{_ASK}" || echo; }}
for name in python3 python3.13 python3.12 python3.11 python3.10; do
  path=$(command -v "$name") || continue
  real=$(readlink -f "$path" || echo "$path")
  case "$seen" in *" $real "*) continue ;; esac
  seen="$seen $real "
  ask "$path"
done
test -x "$FOLDER/python/bin/python3" && ask "$FOLDER/python/bin/python3"
if test -n "$DEVICE_PYTHON"; then
  case $DEVICE_PYTHON in "~/"*) DEVICE_PYTHON=$HOME/${{DEVICE_PYTHON#??}} ;; esac
  printf 'given'; ask "$DEVICE_PYTHON"
  printf 'packages\\t'; "$DEVICE_PYTHON" -I -c "{_ASK_PACKAGES}" || echo
fi
test -x "$FOLDER/env/bin/python" && {{ printf 'env'; ask "$FOLDER/env/bin/python"; }}
test -f "$FOLDER/{ENVIRONMENT_RECORD}" && {{ printf 'environment\\t'; cat "$FOLDER/{ENVIRONMENT_RECORD}"; echo; }}
proof="$FOLDER/{PROOF_RECORD.format("$DEVICE")}"
test -f "$proof" && {{ printf 'proof\\t'; cat "$proof"; echo; }}
test -d "$FOLDER/code" && ls "$FOLDER/code" | sed 's/^/code\t/'
printf 'folder\\t%s\\n' "$FOLDER"
printf 'glibc\\t%s\\n' "$(getconf GNU_LIBC_VERSION)"
printf 'kernel\\t%s\\n' "$(uname -r)"
true
"""


def parse(text: str) -> dict[str, Any]:
    """The facts `python`, `environment` and `baseline` from what FACTS_PART printed.

    python       path and version of the interpreter that trainers will run with; `candidates` (path, version,
                 platform) in the order of preference; `given`, the inventory's; `packages` installed there
    environment  what was proved (python, torch, transformers, numpy, safetensors, cuda_available, architectures,
                 platform); `record` of the environment, `proof` with its key, `code` (hashes unpacked), `glibc`,
                 `kernel`, `folder` (absolute)
    baseline     what an empty trainer takes there, or None
    """
    rows = [line.split("\t", 2) for line in text.splitlines() if "\t" in line]
    single = {row[0]: row[1] for row in rows if len(row) == 2}
    pythons = [(row[0], _python(row[1], row[2])) for row in rows if len(row) == 3 and row[0].endswith("python")]
    given = next((found for kind, found in pythons if kind == "givenpython"), None)
    own = next((found for kind, found in pythons if kind == "envpython"), None)
    proof = _record(text, "proof")
    used = given or own or {}
    return {
        "python": {
            "path": used.get("path"),
            "version": used.get("version"),
            "candidates": [found for kind, found in pythons if kind == "python" and found["version"]],
            "given": given,
            "packages": _record(text, "packages"),
        },
        "environment": {
            **((proof or {}).get("found") or {}),
            "record": _record(text, "environment") if own and own["version"] else None,
            "proof": proof,
            "code": [row[1] for row in rows if row[0] == "code" and len(row) == 2],
            "glibc": single.get("glibc", "").removeprefix("glibc ").strip() or None,
            "kernel": single.get("kernel") or None,
            "folder": single.get("folder") or None,
        },
        "baseline": (proof or {}).get("baseline"),
    }


def _python(path: str, answer: str) -> dict[str, Any]:
    version, _, platform = answer.strip().partition(" ")
    return {"path": path, "version": version or None, "platform": platform or None}


def _record(text: str, name: str) -> dict[str, Any] | None:
    """A record in JSON; None where there is none, or only half of one."""
    for line in text.splitlines():
        if line.startswith(f"{name}\t"):
            try:
                found = json.loads(line.partition("\t")[2])
            except ValueError:
                return None
            return found if isinstance(found, dict) else None
    return None
