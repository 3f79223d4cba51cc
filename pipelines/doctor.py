"""`jem doctor`: what of an installation works, and what to do about the rest."""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

import jem
from jem.config import DoctorConfig
from jem.errors import InputError
from pipelines.command import main_for
from pipelines.pillow_simd import PROBE_SECONDS, probe, read_note

State = Literal["ok", "note", "problem"]
FORMATS = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "tiff-lzw", "jpeg2000", "avif")
LOW_DISK_GB = 10.0
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108, Ray keeps its object store there

# A process of its own, so that it can be given up: a Ray that waits for something cannot be interrupted.
RAY_TRIAL = """
import json, sys
import ray
from jem.config import ClusterConfig
from jem.errors import InputError
from pipelines.cluster import check_shared, connect
config, storage = ClusterConfig.model_validate_json(sys.argv[1]), sys.argv[2]
try:
    with connect(config) as cluster:
        answer = ray.get(ray.remote(lambda: 6 * 7).options(num_cpus=0.1).remote())
        check_shared(cluster, storage, storage)
        print(json.dumps({"says": str(cluster), "answer": answer, "version": ray.__version__}))
except InputError as error:
    print(json.dumps({"problem": str(error)}))
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    state: State
    says: str
    remedy: str = ""


@dataclass(frozen=True)
class DoctorResult:
    """All that was looked at."""

    checks: tuple[Check, ...]

    @property
    def exit_status(self) -> int:
        """1 where something is broken."""
        return int(any(check.state == "problem" for check in self.checks))


def doctor(config: DoctorConfig) -> DoctorResult:
    """Look at packages, devices, decoders, memory, disk, storage, MLflow and Ray; print each with its remedy."""
    checks: list[Check] = []
    for look in (_packages, _devices, _decoders, _machine, _storage, _tracking, _ray):
        try:
            for check in look(config):
                _show(check)
                checks.append(check)
        except Exception as error:  # noqa: BLE001, the doctor goes on to the next
            broken = Check(look.__name__.strip("_"), "problem", f"{type(error).__name__}: {error}", "report this")
            _show(broken)
            checks.append(broken)
    result = DoctorResult(tuple(checks))
    problems = sum(check.state == "problem" for check in checks)
    print("\nall is well" if not problems else f"\n{problems} problem{'s' if problems > 1 else ''}, see above")
    return result


def _show(check: Check) -> None:
    mark = {"ok": "ok", "note": "note", "problem": "PROBLEM"}[check.state]
    print(f"{mark:<9}{check.name:<16}{check.says}", flush=True)
    if check.remedy:
        print(f"{'':<25}-> {check.remedy}", flush=True)


# --- what is installed --------------------------------------------------------------------------------------------


def _packages(_config: DoctorConfig) -> Iterator[Check]:
    yield Check(
        "jem", "ok", f"{jem.__version__}, Python {platform.python_version()} on {platform.platform(terse=True)}"
    )
    versions, wrong = [], []
    for line in importlib.metadata.requires("jem") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if versions:
        yield Check("packages", "ok", ", ".join(versions))
    if wrong:
        yield Check("packages", "problem", "; ".join(wrong), "make setup, or pip install --upgrade jem")
    for name in ("torch", "torchvision", "pyarrow", "mlflow"):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001, an import can fail in any way
            advice = "install torch and torchvision of the same release" if "torch" in name else f"reinstall {name}"
            yield Check(name, "problem", f"cannot be imported: {error}", advice)


def _devices(_config: DoctorConfig) -> Iterator[Check]:
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            it = torch.cuda.get_device_properties(number)
            slow = "" if torch.cuda.is_bf16_supported() else ", without bf16: use train.precision fp32"
            yield Check(
                "GPU", "ok", f"{number}: {it.name}, {it.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}{slow}"
            )
    elif shutil.which("nvidia-smi") and _runs("nvidia-smi"):
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        yield Check(
            "GPU",
            "problem",
            f"nvidia-smi sees one and torch {torch.__version__}, which {built}, does not",
            "update the driver, or install a torch built for the driver's CUDA version",
        )
    else:
        yield Check(
            "GPU", "note", "none: training runs on the CPU", "for more than a trial, use a machine or cluster with GPUs"
        )
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check(
        "CPU", "ok", f"{cpus} cores, {torch.get_num_threads()} torch threads, {torch.backends.cpu.get_cpu_capability()}"
    )


def _runs(command: str) -> bool:
    return subprocess.run([command], capture_output=True, timeout=20, check=False).returncode == 0


def _decoders(_config: DoctorConfig) -> Iterator[Check]:
    with tempfile.TemporaryDirectory(prefix="jem-doctor-") as folder:
        try:
            able = probe(Path(folder), "make")
        except subprocess.SubprocessError as error:
            advice = "python -m pip install --force-reinstall --no-deps pillow"
            yield Check("Pillow", "problem", f"does not work within {PROBE_SECONDS} s: {error}", advice)
            return
    name = "Pillow-SIMD" if ".post" in able["version"] else "Pillow"
    note = read_note()
    why = ""
    if note is not None:
        why = f"; {note.reason}" + (f" ({', '.join(note.lost)})" if note.lost else "")
    elif name == "Pillow":
        why = "; Pillow-SIMD resizes faster: python -m pipelines.pillow_simd tries to build it"
    yield Check(name, "ok", f"{able['version']}{why}")
    lost = [kind for kind in FORMATS if kind not in able["able"]]
    if lost:
        needed = "problem" if {"jpeg", "png"} & set(lost) else "note"
        yield Check(
            "formats",
            needed,  # type: ignore[arg-type]
            f"not read: {', '.join(lost)}: ingest would quarantine such images",
            "python -m pip install --force-reinstall --no-deps pillow",
        )
    else:
        yield Check("formats", "ok", ", ".join(FORMATS))
    yield _simplejpeg()


def _simplejpeg() -> Check:
    """Decode a JPEG that Pillow wrote, at half its size."""
    try:
        import simplejpeg
        from PIL import Image

        file = io.BytesIO()
        Image.new("RGB", (64, 64), (250, 20, 20)).save(file, "JPEG")
        picture = simplejpeg.decode_jpeg(file.getvalue(), min_height=32, min_width=32, min_factor=1)
        if picture.shape != (32, 32, 3) or abs(int(picture[16, 16, 0]) - 250) > 8:
            raise ValueError(f"decoded to {picture.shape}")  # noqa: TRY301
    except Exception as error:  # noqa: BLE001, an import can fail in any way
        return Check(
            "simplejpeg", "problem", f"does not decode: {error}", "python -m pip install --force-reinstall simplejpeg"
        )
    return Check("simplejpeg", "ok", f"{importlib.metadata.version('simplejpeg')}, decodes at reduced scale")


# --- the machine --------------------------------------------------------------------------------------------------


def _machine(config: DoctorConfig) -> Iterator[Check]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Check("memory", "ok", f"{memory / 2**30:.1f} GiB")
    if SHARED_MEMORY.is_dir():
        size = shutil.disk_usage(SHARED_MEMORY).total
        if size < 0.3 * memory:  # Ray's default share for the object store
            yield Check(
                str(SHARED_MEMORY),
                "note",
                f"{size / 2**30:.1f} GiB, and Ray's object store wants 30 % of the memory: it would use the disk",
                "in a container: docker run --shm-size=30%-of-memory, or an emptyDir of medium Memory on Kubernetes",
            )
        else:
            yield Check(str(SHARED_MEMORY), "ok", f"{size / 2**30:.1f} GiB for Ray's object store")
    local = config.storage.removeprefix("file://")
    places = {"temporary files and Ray": Path(tempfile.gettempdir())}
    if "://" not in local:
        places["storage"] = next(
            path for path in [Path(local).absolute(), *Path(local).absolute().parents] if path.exists()
        )
    for what, place in places.items():
        usage = shutil.disk_usage(place)
        free, share = usage.free / 1e9, 1 - usage.free / usage.total
        says = f"{what} ({place}): {free:.0f} GB free, {share:.0%} used"
        if share > 0.95:  # Ray refuses to write objects to a disk that is fuller
            yield Check("disk", "problem", says, "free some space: Ray stops spilling above 95 %")
        elif free < LOW_DISK_GB:
            yield Check(
                "disk", "note", says, f"checkpoints and spilled objects may need more than {LOW_DISK_GB:.0f} GB"
            )
        else:
            yield Check("disk", "ok", says)


def _storage(config: DoctorConfig) -> Iterator[Check]:
    from pipelines.folder import RunFolder

    try:
        folder = RunFolder.at(config.storage, "doctor")
        folder.check_writable()
    except InputError as error:
        yield Check("storage", "problem", str(error), "--storage takes a folder or URI that all nodes can write")
    else:
        yield Check("storage", "ok", f"{folder.storage} can be written from here")


# --- services -----------------------------------------------------------------------------------------------------


def _tracking(config: DoctorConfig) -> Iterator[Check]:
    from jem.tracking.store import connect, sqlite_file, store_uri

    try:
        uri = store_uri(config.track.uri)
        file = sqlite_file(uri)
        if file is not None and not file.exists():
            above = next(path for path in file.parents if path.exists())
            if os.access(above, os.W_OK):
                yield Check("MLflow", "ok", f"{uri} will be made by the first run")
            else:
                yield Check("MLflow", "problem", f"{above} cannot be written", "give another place with --track.uri")
            return
        connect(uri, min(config.deadline, 15.0))
    except InputError as error:
        yield Check("MLflow", "problem", str(error), "--track.uri or MLFLOW_TRACKING_URI names the store")
    else:
        yield Check("MLflow", "ok", f"{uri} answers")


def _ray(config: DoctorConfig) -> Iterator[Check]:
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    where = f"the cluster at {address}" if address else "a Ray of its own on this machine"
    storage = config.storage if "://" in config.storage else str(Path(config.storage).absolute())
    try:
        done = subprocess.run(
            [sys.executable, "-c", RAY_TRIAL, config.cluster.model_dump_json(), storage],
            capture_output=True,
            text=True,
            timeout=config.deadline,
            check=False,
        )
    except subprocess.TimeoutExpired:
        advice = "ray status on the head node; a proxy or firewall between the nodes; more with --deadline SECONDS"
        yield Check("Ray", "problem", f"{where} did not run a task within {config.deadline:.0f} s", advice)
        return
    last = next(iter(reversed(done.stdout.strip().splitlines())), "")
    try:
        report = json.loads(last)
    except ValueError:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        yield Check("Ray", "problem", f"{where}: {lines[-1] if lines else 'no answer'}", "ray stop, then try again")
        return
    if "problem" in report:
        yield Check("Ray", "problem", report["problem"])
    else:
        yield Check("Ray", "ok", f"{report['version']}, {where} ran a task: {report['says']}")


if __name__ == "__main__":
    raise SystemExit(main_for("doctor"))
