"""Several real ranks: they verify in parallel, agree on what is damaged, and one that cannot write is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paralm.training import checkpoint as ckpt
from tests.conftest import settings

_DRIVER = """
import json, os, signal, sys
from pathlib import Path
from paralm.config import Config
from paralm.errors import RunError, StoppedError
from paralm.training import checkpoint as ckpt
from paralm.training import checkpoint_writer, loop, tensor_file

rank, out = int(os.environ["RANK"]), Path(sys.argv[2])
hashed, create = [], tensor_file.create
original = ckpt.file_damage
ckpt.file_damage = lambda path, *rest: hashed.append(path.name) or original(path, *rest)

def refuse(path):
    if rank == 1 and refused and any(ckpt.step_name(step) in str(path) for step in refused):
        raise OSError(28, "No space left on device")
    return create(path)

request = loop._stop_request
loop._stop_request = lambda session, control: request(session, control) or (
    int(signal.SIGTERM) if session.step + 1 == case["stop"] else 0
)
tensor_file.create = refuse
publish = checkpoint_writer.write_file

def mute(path, content):  # it cannot even leave a record of its failure
    if rank == 1 and case["mute"] and any(ckpt.step_name(step) in str(path) for step in refused):
        raise OSError(28, "No space left on device")
    publish(path, content)

checkpoint_writer.write_file = mute
for line, text in enumerate(open(sys.argv[1])):
    case = json.loads(text)
    refused, said, steps, ended, hashed[:] = case["refused"], [], [], None, []
    if case["damage"] and rank == 0:
        path = Path(case["damage"])
        path.write_bytes(path.read_bytes()[:-1])
    try:
        progress = lambda row: steps.append(row["step"]) if row["kind"] == "train" else None
        loop.train(Config.model_validate(case["config"]), progress, said.append)
    except StoppedError:
        pass
    except RunError as error:
        ended = str(error)
    (out / f"{line}_{rank}.json").write_text(json.dumps([said, steps, ended, hashed]))
"""


@pytest.mark.slow
def test_ranks_verify_together_and_notice_each_others_failures(corpus: Path, prepared: Path, tmp_path: Path) -> None:
    world_size = 2
    run = tmp_path / "tiny" / "checkpoints"

    def case(
        stop: int, refused: tuple[int, ...] = (), damage: Path | None = None, mute: bool = False, **keep: Any
    ) -> str:
        keep = {"asynchronous": True, "every": 2, "keep_last": 9, **keep}
        made = settings(corpus, prepared, tmp_path, training={"max_steps": 30, "hang_timeout": 40.0}, checkpoint=keep)
        return (
            json.dumps({"config": made, "stop": stop, "mute": mute, "refused": refused, "damage": str(damage or "")})
            + "\n"
        )

    cases = [
        case(6, refused=(2,), mute=True),  # rank 1 cannot write step 2, nor say so in the folder
        case(8, damage=run / ckpt.step_name(6) / ckpt.rank_file(1)),  # rank 1 hashes that file, rank 0 must hear of it
        case(30, refused=(10,), on_failure="stop"),
    ]
    (tmp_path / "cases.jsonl").write_text("".join(cases))
    (tmp_path / "driver.py").write_text(_DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command += [str(tmp_path / "driver.py"), str(tmp_path / "cases.jsonl"), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    def result(line: int, rank: int) -> tuple[list[str], list[int], str | None, list[str]]:
        said, steps, ended, hashed = json.loads((tmp_path / f"{line}_{rank}.json").read_text())
        return said, steps, ended, hashed

    said, steps, ended, _ = result(0, 0)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert ended is None
    (line,) = said
    assert "checkpoint of step 2 not written" in line
    assert "rank 1" in line
    assert "No space left" in line
    assert result(0, 1)[0] == []  # said once, by rank 0

    said, steps, _, hashed = result(1, 0)
    assert steps == [5, 6, 7, 8]
    (line,) = said
    assert "damaged checkpoint passed over" in line
    assert ckpt.rank_file(1) in line
    assert hashed == [ckpt.rank_file(0)] * 2  # each rank has hashed its own share of both checkpoints
    assert result(1, 1)[3] == [ckpt.rank_file(1)] * 2

    for rank in range(world_size):  # on every rank: the one that failed, and the other
        _, _, ended, _ = result(2, rank)
        assert ended is not None
        assert "checkpoint of step 10 not written" in ended
        assert "rank 1" in ended
    assert result(2, 0)[1][-1] <= 12
    assert ckpt.steps(run) == [4, 6, 8]
    assert not list(run.glob(".step_*"))
    for step in ckpt.steps(run):
        ckpt.open_step(run, step).verify()
