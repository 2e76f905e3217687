"""Who wants what is being made waits, and is told."""

from __future__ import annotations

import threading

from testbed.cache import held


def test_the_second_to_want_a_folder_says_that_it_waits(tmp_path):
    told, had = threading.Event(), []

    def second():
        with held(tmp_path, lambda text: (had.append(text), told.set())):
            had.append((tmp_path / "made").read_text())

    waiting = threading.Thread(target=second)
    with held(tmp_path, had.append):
        waiting.start()
        assert told.wait(60)
        (tmp_path / "made").write_text("all of it")
    waiting.join(60)
    assert had == [f"{tmp_path} is being filled already: waiting for that", "all of it"]
