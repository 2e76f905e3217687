"""Derive every figure of a run again from its raw samples and files, and say what does not hold.

    verification = verify(RunFolder.open(Path("runs"), "lora"))
    verification.holds
    [check for check in verification.checks if check.verdict == FAILS]

What is derived how, and what each check cannot see, stands in docs/results.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from testbed import manifest
from testbed.errors import StoreError
from testbed.run_record import INTERRUPTED
from testbed.verification.checks import Check, Verification, counted, judged, unknown
from testbed.verification.energy import check_energy
from testbed.verification.origin import check_base, check_data, check_versions, opened_base
from testbed.verification.peaks import check_peaks, check_times
from testbed.verification.rounds import check_results, check_rounds
from testbed.verification.state import check_export, check_state, newest_checkpoint

if TYPE_CHECKING:
    from testbed.run_record import Status
    from testbed.store import RunFolder

STATUS = "status.json"


def verify(folder: RunFolder, *, data: bool = True) -> Verification:
    """All checks of one run; changes nothing.  `data=False` leaves the data set out, which takes seconds to read.

    Raises StoreError for a folder whose plan, configuration or status cannot be read.
    """
    status = folder.status
    if status.alive:
        why = f"process {status.pid} is running it; verify it when that has ended"
        return Verification(folder.run_id, status.state, (unknown("run", why),))
    return Verification(folder.run_id, status.state, tuple(_checks(folder, data=data)))


def _checks(folder: RunFolder, *, data: bool) -> Iterator[Check]:
    results = [*folder.results(), *folder.rests()]
    yield check_files(folder)
    yield check_results(folder)
    yield check_rounds(folder)
    yield check_times(results)
    yield check_peaks(folder, results)
    yield check_energy(folder, results)
    newest, base = newest_checkpoint(folder), opened_base(folder)
    yield check_state(folder, newest)
    yield check_export(folder, newest, base)
    yield check_base(folder, base)
    if data:
        yield check_data(folder)
    yield check_versions(folder)


def check_files(folder: RunFolder) -> Check:
    """The files are as they were when the run was sealed; without a status nothing says that it was not."""
    status, path = folder.status, folder.path / manifest.MANIFEST
    sealed = status.facts.get(manifest.SEALED)
    failures = [] if (folder.path / STATUS).is_file() else [f"{STATUS} is missing"]
    if sealed is None and not failures and (not path.is_file() or _goes_on(status)):
        return unknown(
            "files",
            "it is not sealed: its controller was killed before the end, or it was run by a version that did not seal",
        )
    try:
        if sealed is not None and manifest.sha256_of(path) != sealed:
            return judged("files", "the manifest", [f"{manifest.MANIFEST} is not the one whose hash the status has"])
        found = manifest.differences(folder.path)
    except StoreError as error:
        return judged("files", "the manifest", [*failures, str(error)])
    failures += [f"{name} has changed" for name in found.changed]
    failures += [f"{name} is missing" for name in found.missing]
    failures += [f"{name} was added" for name in found.additional]
    return judged("files", f"{counted(len(manifest.stored_manifest(folder.path)), 'file')} by SHA-256", failures)


def _goes_on(status: Status) -> bool:
    """Whether a manifest that lies there is of an earlier end: the run was gone on with, and killed since."""
    return status.state == INTERRUPTED and manifest.SEALED in status.facts
