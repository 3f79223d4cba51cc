"""Run a function on several gloo workers, for the tests of what workers compute together."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.context import SpawnProcess

LOOPBACK = "127.0.0.1"


class RankError(AssertionError):
    """A rank failed; the message holds that rank's own traceback."""


def run_on(world: int, function: Callable[..., Any], *args: Any, deadline: float = 120.0) -> list[Any]:
    """Call `function(*args)` on `world` new processes of one gloo process group, and return the results by rank.

    `function` must be importable in a new process (at the top level of its module); arguments and results are pickled.
    Each process uses one thread.

    Raises:
        RankError: a rank raised (its own traceback is the message), or died.
        TimeoutError: not all were done after `deadline` seconds.
    """
    end = time.monotonic() + deadline
    limit = timedelta(seconds=deadline)
    # the store takes a free port by itself: choosing one first, and binding it later, would be a race
    store = dist.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False, timeout=limit)
    context = multiprocessing.get_context("spawn")
    payload = pickle.dumps((function, args))
    readers: dict[Connection, int] = {}
    processes: list[SpawnProcess] = []
    results: dict[int, Any] = {}
    try:
        for rank in range(world):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(rank, world, store.port, deadline, payload, writer), daemon=True
            )
            process.start()
            writer.close()
            processes.append(process)
            readers[reader] = rank
        while readers:
            ready = wait(list(readers), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"ranks {sorted(readers.values())} of {world} were not done after {deadline:g} s")
            for reader in ready:
                assert isinstance(reader, Connection)
                rank = readers.pop(reader)
                results[rank] = _receive(reader, rank, processes[rank])
        return [results[rank] for rank in range(world)]
    finally:
        for process in processes:
            if results.keys() != set(range(world)):
                process.kill()
            process.join(10)
            if process.is_alive():
                process.kill()


def _receive(reader: Connection, rank: int, process: SpawnProcess) -> Any:
    try:
        succeeded, value = pickle.loads(reader.recv_bytes())
    except EOFError:
        process.join(10)
        raise RankError(f"rank {rank} died with exit code {process.exitcode}, without a result") from None
    if not succeeded:
        raise RankError(f"rank {rank} failed:\n{value}")
    return value


def _work(rank: int, world: int, port: int, deadline: float, payload: bytes, writer: Connection) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    limit = timedelta(seconds=deadline)
    try:
        store = dist.TCPStore(LOOPBACK, port, is_master=False, timeout=limit)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        function, args = pickle.loads(payload)
        message = pickle.dumps((True, function(*args)))
    except BaseException:  # noqa: BLE001  whatever it was, the parent must hear of it
        # sent before the group is left, so that it arrives ahead of the others' "connection closed by peer"
        writer.send_bytes(pickle.dumps((False, traceback.format_exc())))
        return
    dist.barrier()
    writer.send_bytes(message)
    dist.destroy_process_group()
