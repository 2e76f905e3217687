"""The model that a run trained, for whoever goes on with it in Python: `testbed.load(RUN)`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import StoreError
from testbed.evaluate import mounted
from testbed.method import Workload
from testbed.model.checkpoint import BaseModel
from testbed.plugins import restore_method
from testbed.prepare import content_store, model_folder
from testbed.store import RunFolder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from testbed.method import Snapshot


def load(
    run: str | Path, runs_dir: str | Path = "runs", client: int | None = None, accelerator: str = "cpu"
) -> PreTrainedModel:
    """The model of a run's newest checkpoint: a `transformers` model with the method's modules mounted, in eval mode.

    `run` is as for `testbed report`: an id, its unique beginning, or a path; `client` asks for the personal model of
    a client, of methods that have one; `accelerator`: where its weights are, "cpu" or "cuda".  On the CPU, its logits
    are those that the run evaluated, on this machine, bit for bit.
    Raises StoreError for a run without a checkpoint, or whose base model is no longer what it was trained on.
    """
    folder = RunFolder.open(Path(runs_dir), str(run))
    last = folder.load_checkpoint()
    if last is None:
        raise StoreError(f"run {folder.run_id} has no checkpoint yet: no round of it has ended")
    config = folder.config
    work = Workload(**folder.plan["work"])
    base = BaseModel.open(model_folder(config["model"]), content_store(), work.task, work.labels)
    _check_same(folder, base)
    method = restore_method(config["method"], config["settings"])
    snapshot = _of_client(folder, method.snapshots(last[0], base), client)
    work = replace(work, accelerator=accelerator)
    return mounted(method, base, snapshot.submodel, snapshot.tensors, work).model.eval()


def _check_same(folder: RunFolder, base: BaseModel) -> None:
    trained_on = folder.plan["model"]
    if [base.outside, *base.blocks] != [trained_on["outside"], *trained_on["blocks"]]:
        raise StoreError(
            f"run {folder.run_id} was trained on other weights than {base.folder} has now: put the base model back"
        )


def _of_client(folder: RunFolder, snapshots: Sequence[Snapshot], client: int | None) -> Snapshot:
    found = {snapshot.client: snapshot for snapshot in snapshots}
    if client not in found:
        known = ", ".join("the global one" if index is None else f"client {index}'s" for index in found)
        asked = "no global model" if client is None else f"no model of client {client}"
        raise StoreError(f"run {folder.run_id} has {asked}; it has {known}")
    return found[client]
