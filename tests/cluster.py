"""A Ray cluster of several nodes, MLflow's server and an object store, each of its own processes, on this machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

LOOPBACK = "127.0.0.1"
REPOSITORY = Path(__file__).resolve().parents[1]
START_SECONDS = 120.0
STOP_SECONDS = 3.0
BUCKET = "jem"


@dataclass
class Nodes:
    """A head without CPUs for tasks and its worker nodes, with the dashboard's address, which takes jobs."""

    folder: Path
    """Ray's temporary folder; jobs' logs are below it."""
    address: str
    """Of the dashboard."""
    environment: dict[str, str]
    """Of the nodes, and so of the jobs; it holds the token."""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    """Of `ray start --block`: the head's first."""

    def submit(self, name: str, *command: str, cwd: Path, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """`ray job submit`, as a user calls it; its output is what the user sees."""
        submit = ["ray", "job", "submit", "--address", self.address, "--submission-id", name, *options, "--", *command]
        return self.cli(*submit, cwd=cwd)

    def stop(self, name: str, cwd: Path) -> None:
        """`ray job stop`; returns when the job has stopped."""
        process = self.cli("ray", "job", "stop", "--address", self.address, name, cwd=cwd)
        output, _ = process.communicate(timeout=START_SECONDS)
        assert process.returncode == 0, output

    def cli(self, *command: str, cwd: Path) -> subprocess.Popen[str]:
        """Start a command as on the machine of a user, who has the token and nothing of the cluster's."""
        names = ("PATH", "HOME", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED")
        environment = {name: self.environment[name] for name in names}
        return subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def about(self, name: str) -> dict[str, Any]:
        """What Ray knows of a job: `status`, `message`, `driver_exit_code`, ..."""
        request = urllib.request.Request(f"{self.address}/api/jobs/{name}")
        request.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                about: dict[str, Any] = json.loads(answer.read())
                return about
        except urllib.error.HTTPError:  # not yet known
            return {}

    def log(self, name: str) -> str:
        """All that a job's driver wrote."""
        return next(self.folder.glob(f"session_2*/logs/job-driver-{name}.log")).read_text()

    def ending(self, name: str) -> str:
        """How Ray saw a job's driver end."""
        log = next(self.folder.glob(f"session_2*/logs/jobs/supervisor-{name}.log")).read_text()
        return log.splitlines()[-1].partition(" job_id=")[0]

    def train_workers(self) -> list[int]:
        """How many train workers each worker node runs."""
        return [len(list(_below(process.pid, "RayTrainWorker"))) for process in self.processes[1:]]


def _below(pid: int, word: str) -> Iterator[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if word in " ".join(process.cmdline()):
                    yield process


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def ray_nodes(workers: int, cpus: int, settings: Mapping[str, str]) -> Iterator[Nodes]:
    """Start a head and `workers` nodes of `cpus` CPUs (a count only), with token authentication; end them all.

    The nodes have jem as it is installed in this environment, or lies in this repository. `settings` are added to
    their environment. Nothing of it is seen by a Ray that runs beside it: neither ports nor folders.
    """
    folder = Path(tempfile.mkdtemp(prefix="jem-ray-"))  # short: a socket's path has 107 characters at most
    home = folder / "home"
    home.mkdir()
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))
    }
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(home),
        "XDG_CACHE_HOME": str(home / "cache"),
        "PYTHONPATH": os.pathsep.join(paths),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_idle_worker_killing_time_threshold_ms": "600000",
        "OMP_NUM_THREADS": "1",
        **settings,
    }
    port, dashboard, client, *agents = free_ports(4 + workers)
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--min-worker-port=0"]
    start += ["--max-worker-port=0", f"--node-ip-address={LOOPBACK}", "--object-store-memory=120000000"]
    head = ["--head", f"--port={port}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}", "--num-cpus=0"]
    head += [f"--ray-client-server-port={client}", f"--dashboard-host={LOOPBACK}"]
    nodes = Nodes(folder, f"http://{LOOPBACK}:{dashboard}", environment)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for number, agent in enumerate(agents):
            kind = [f"--address={LOOPBACK}:{port}", f"--num-cpus={cpus}"] if number else head
            command = [*start, *kind, f"--dashboard-agent-listen-port={agent}"]
            log = folder / f"node-{number}.log"
            nodes.processes.append(stack.enter_context(_running(command, environment, folder, log)))
            wait_for(lambda log=log: "block forever" in log.read_text(), f"node {number}", nodes.processes[-1], log)
        wait_for(lambda: _answers(f"{nodes.address}/api/version", environment["RAY_AUTH_TOKEN"]), "the dashboard")
        yield nodes


@contextlib.contextmanager
def mlflow_server(folder: Path, artifacts: str, settings: Mapping[str, str]) -> Iterator[str]:
    """MLflow's server with a database in `folder`, through which clients store their files at `artifacts`; its URI."""
    folder.mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    command = [sys.executable, "-m", "mlflow", "server", f"--host={LOOPBACK}", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder / 'mlflow.db'}", f"--artifacts-destination={artifacts}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **settings}
    log = folder / "mlflow.log"
    with _running(command, environment, folder, log) as process:
        uri = f"http://{LOOPBACK}:{port}"
        wait_for(lambda: _answers(f"{uri}/health"), "MLflow's server", process, log)
        yield uri


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[dict[str, str]]:
    """moto's S3 server with an empty bucket; the variables that lead clients to it, and let them in."""
    folder.mkdir(parents=True, exist_ok=True)
    [port] = free_ports(1)
    endpoint = f"http://{LOOPBACK}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "jem",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(8),
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-m", "moto.server", "-H", LOOPBACK, "-p", str(port)]
    log = folder / "s3.log"
    with _running(command, dict(os.environ), folder, log) as process:
        wait_for(lambda: _answers(f"{endpoint}/moto-api/"), "the object store", process, log)
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        yield settings


@contextlib.contextmanager
def _running(
    command: list[str], environment: Mapping[str, str], cwd: Path, log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=dict(environment), cwd=cwd, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        started = [*_below(process.pid, "")]
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()
        for each in psutil.wait_procs(started, timeout=1)[1]:  # nobody waits for what a raylet would still do
            each.kill()
        process.wait()


def wait_for(
    condition: Callable[[], object],
    what: str,
    process: subprocess.Popen[Any] | None = None,
    log: Path | None = None,
    seconds: float = START_SECONDS,
) -> None:
    """Wait until something holds.

    Raises:
        AssertionError: `process`, which should bring it about, has ended; or it is too late.
    """
    end = time.monotonic() + seconds
    while not condition():
        said = log.read_text()[-3000:] if log is not None else ""
        assert process is None or process.poll() is None, f"{what} ended with {process.returncode}\n{said}"
        assert time.monotonic() < end, f"{what} was not there after {seconds:g} s\n{said}"
        time.sleep(0.2)


def _answers(url: str, token: str | None = None) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        urllib.request.urlopen(request, timeout=5).close()
    except OSError:
        return False
    return True


def write_images(folder: Path, images: Any, labels: Any) -> Path:
    """Write digits (N, 8, 8), values 0..16, as PNGs of 32 pixels in class folders: what a user has before ingest."""
    import numpy as np
    from PIL import Image

    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((32, 32)).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())
    return folder
