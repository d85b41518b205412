"""What ranks say to each other: on one process the identity, on two gloo ranks the truth."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flux2 import distributed
from flux2.data.loader import Loader
from flux2.data.record import Record, UnreadableRecord
from flux2.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
JOB = """
import torch
from flux2 import distributed as d

assert d.launched() and d.size() == 2
d.start(torch.device("cpu"))
r = d.rank()
assert d.is_main() == (r == 0)
assert d.broadcast({"rank": r}) == {"rank": 0}
assert d.gather_objects(r) == [0, 1] and d.largest(r * 5) == 5
rows = torch.arange(r + 1.0)[:, None] + 10 * r  # unequal numbers of rows
assert d.gather(rows).tolist() == [[0.0], [10.0], [11.0]]
assert d.gather(torch.full((1,), float("nan"))).isnan().all()
a, b, c = (torch.nn.Parameter(torch.zeros(3)) for _ in range(3))
a.grad = torch.full((3,), 1.0 + r)
if r == 1:
    b.grad = torch.ones(3)  # rank 0 has none: it counts as zero
d.sum_gradients([a, b, c])
assert a.grad.tolist() == [3.0] * 3 and b.grad.tolist() == [1.0] * 3 and c.grad is None
d.barrier()
d.stop()
print("agreed")
"""


def test_one_process_speaks_to_itself():
    assert (distributed.rank(), distributed.size(), distributed.is_main()) == (0, 1, True)
    assert distributed.broadcast("x") == "x" and distributed.gather_objects(3) == [3]
    rows = torch.arange(4.0)
    assert distributed.gather(rows) is rows and distributed.largest(2) == 2
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    distributed.sum_gradients([p])
    assert p.grad.tolist() == [1, 1]


@pytest.mark.dist
def test_two_ranks_agree():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", JOB],
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and "agreed" in out, err


class Numbers:
    """Records whose prompt is their number; some cannot be read."""

    def __init__(self, length: int, broken: tuple[int, ...] = ()) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def bucket_of(self, index: int):
        return (1, 1, 0)

    def __getitem__(self, index: int) -> Record:
        if index in self.broken:
            raise UnreadableRecord(f"{index} is broken")
        return Record(index, str(index), None)


def rows(monkeypatch, ranks: int, broken: tuple[int, ...] = ()) -> list[tuple]:
    """(prompt, sample id, caption dropped) of a batch of four, over `ranks` ranks."""
    seen = []

    def collate(records, ids, dropped):
        seen.extend(zip([r.prompt for r in records], ids.tolist(), dropped, strict=True))

    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "size", lambda: ranks)
        Loader(Numbers(12, broken), collate, 4, seed=1, caption_dropout=0.5)(2)
    return seen


@pytest.mark.parametrize("broken", [(), (0, 1, 2, 3, 4, 5)])
def test_ranks_share_the_batch_of_one_process(monkeypatch, broken, capsys):
    whole = rows(monkeypatch, 1, broken)
    assert rows(monkeypatch, 2, broken) == whole == rows(monkeypatch, 4, broken)
    assert [i for _, i, _ in whole] == [0, 1, 2, 3] and {d for *_, d in whole} == {True, False}
    assert ("left out" in capsys.readouterr().err) == bool(broken)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    with pytest.raises(InputError, match="batch_size is 4 and there are 3 ranks"):
        rows(monkeypatch, 3)
