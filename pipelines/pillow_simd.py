"""Set-up of Pillow-SIMD: built from source, compared with Pillow, and installed only where nothing is lost.

Pillow-SIMD resizes faster and owns the same `PIL` folder as Pillow. It is built against the libraries whose headers
the machine has: without those of WebP, say, it cannot read WebP, which Pillow's wheel can. So it is built into a
scratch folder first and has to decode every image that Pillow decodes. What came of it is kept in the environment,
for `jem doctor`. Standard library only: it runs while the environment is being made.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BUILD_SECONDS = 600
PROBE_SECONDS = 60
IGNORED = ("tkinter", "raqm", "fribidi", "harfbuzz", "libimagequant", "mozjpeg", "xcb", "zlib_ng")
"""Features of Pillow that no image file needs: windows, typesetting, screenshots, smaller files, another zlib."""

# Run by the interpreter that is asked about, with a folder of samples; "make" writes them first.
PROBE = r"""
import json, sys
from pathlib import Path
import PIL
from PIL import Image, features
folder = Path(sys.argv[1])
picture = Image.linear_gradient("L").resize((48, 32))
rgb = Image.merge("RGB", (picture, picture.rotate(180), picture))
samples = {
    "jpeg.jpg": (rgb, {}),
    "jpeg-progressive.jpg": (rgb, {"progressive": True}),
    "jpeg-grey.jpg": (picture, {}),
    "jpeg-cmyk.jpg": (rgb.convert("CMYK"), {}),
    "png.png": (rgb, {}),
    "png-alpha.png": (rgb.convert("RGBA"), {}),
    "png-palette.png": (rgb.quantize(16), {}),
    "png-16bit.png": (Image.new("I;16", (48, 32), 4096), {}),
    "png-1bit.png": (picture.convert("1"), {}),
    "webp.webp": (rgb, {}),
    "webp-lossless.webp": (rgb, {"lossless": True}),
    "webp-animated.webp": (rgb, {"save_all": True, "append_images": [rgb.rotate(90)]}),
    "gif.gif": (rgb.quantize(16), {}),
    "bmp.bmp": (rgb, {}),
    "tiff.tiff": (rgb, {}),
    "tiff-lzw.tiff": (rgb, {"compression": "tiff_lzw"}),
    "tiff-deflate.tiff": (rgb, {"compression": "tiff_adobe_deflate"}),
    "tiff-jpeg.tiff": (rgb, {"compression": "jpeg"}),
    "jpeg2000.jp2": (rgb, {}),
    "avif.avif": (rgb, {}),
    "ppm.ppm": (rgb, {}),
    "ico.ico": (rgb, {}),
    "tga.tga": (rgb, {}),
}
if "make" in sys.argv:
    for name, (image, options) in samples.items():
        try:
            image.save(folder / name, **options)
        except Exception:
            (folder / name).unlink(missing_ok=True)
able = []
for path in sorted(folder.iterdir()):
    try:
        with Image.open(path) as image:
            image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR).tobytes()
        able.append(path.stem)
    except Exception:
        pass
Image.init()
print(json.dumps({"version": PIL.__version__, "able": able + sorted(Image.OPEN), "features": features.get_supported()}))
"""


@dataclass
class Note:
    """What the set-up did, and why."""

    active: str
    """`Pillow-SIMD 12.1.1.post0` or `Pillow 13.0.0`."""
    reason: str
    lost: list[str] = field(default_factory=list)
    """What Pillow-SIMD as built here lacks of Pillow: abilities, formats, features."""


def note_path() -> Path:
    """Where the note is kept: in the environment that it is about."""
    return Path(sys.prefix) / "pillow-simd.json"


def read_note() -> Note | None:
    """What the set-up did; None if it did not run here."""
    try:
        return Note(**json.loads(note_path().read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def probe(samples: Path, *words: str, path: Path | None = None) -> dict[str, Any]:
    """What the PIL in `path` (or the environment's own) decodes of `samples`, and its version and features."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path is not None else {})}
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(samples), *words],
        env=environment, capture_output=True, text=True, timeout=PROBE_SECONDS, check=True, cwd=samples,
    )  # fmt: skip
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def lost(pillow: dict[str, Any], simd: dict[str, Any]) -> list[str]:
    """What `pillow` can and `simd` cannot, as far as image files are concerned."""
    had = [*pillow["able"], *(name for name in pillow["features"] if name not in IGNORED)]
    has = {*simd["able"], *simd["features"]}
    return [name for name in dict.fromkeys(had) if name not in has]


def build(folder: Path, constraint: str | None) -> Path:
    """Build the wheel in `folder`; with AVX2 where the processor has it."""
    flags = os.environ.get("CFLAGS", "")
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpu = ""
    if " avx2" in cpu:
        flags = f"{flags} -mavx2".strip()
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "wheel", "--no-deps"]
    command += ["--no-binary", "pillow-simd", "--no-cache-dir", "--wheel-dir", str(folder), "pillow-simd"]
    if constraint is not None:
        command += ["--constraint", constraint]
    subprocess.run(
        command,
        env={**os.environ, **({"CFLAGS": flags} if flags else {})},
        capture_output=True, text=True, timeout=BUILD_SECONDS, check=True,
    )  # fmt: skip
    return next(folder.glob("*.whl"))


def install(wheel: Path) -> None:
    """Put the wheel's `PIL` in the place of Pillow's, whose record stays: others ask for Pillow by name.

    Pillow's own files go first. Left beside Pillow-SIMD's, its compiled modules would be taken for parts of it.
    """
    for file in importlib.metadata.files("pillow") or ():
        place = Path(str(file.locate()))
        if ".dist-info" not in str(file) and place.is_file():
            place.unlink()
    _pip("install", "--no-deps", "--force-reinstall", "--no-index", str(wheel))


def restore() -> None:
    """Put Pillow back in the place of Pillow-SIMD."""
    version = importlib.metadata.version("pillow")
    _pip("uninstall", "--yes", "pillow-simd")
    _pip("install", "--no-deps", "--force-reinstall", f"pillow=={version}")


def _pip(*words: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *words],
        capture_output=True, text=True, timeout=BUILD_SECONDS, check=True,
    )  # fmt: skip


def set_up(constraint: str | None) -> Note:
    """Install Pillow-SIMD if it can be built here and loses nothing; otherwise say why Pillow stays."""
    with tempfile.TemporaryDirectory(prefix="pillow-simd-") as name:
        scratch = Path(name)
        samples, unpacked = scratch / "samples", scratch / "unpacked"
        samples.mkdir()
        pillow = probe(samples, "make")
        if ".post" in pillow["version"]:
            return read_note() or Note(f"Pillow-SIMD {pillow['version']}", "it was already installed")
        stays = f"Pillow {pillow['version']}"
        try:
            wheel = build(scratch, constraint)
        except subprocess.TimeoutExpired:
            return Note(stays, f"Pillow-SIMD was not built within {BUILD_SECONDS} s")
        except subprocess.CalledProcessError as error:
            return Note(stays, f"Pillow-SIMD cannot be built here: {_last_line(error)}")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        try:
            missing = lost(pillow, simd := probe(samples, path=unpacked))
        except (subprocess.SubprocessError, ValueError) as error:
            return Note(stays, f"Pillow-SIMD was built and does not run here: {_last_line(error)}")
        if missing:
            reason = "Pillow-SIMD as built here lacks some of Pillow's formats: install the headers of their libraries"
            return Note(stays, reason, missing)
        try:
            install(wheel)
            if (now := probe(samples))["version"] != simd["version"] or lost(pillow, now):
                raise ValueError("it does not work where it was installed")  # noqa: TRY301
        except (subprocess.SubprocessError, ValueError, OSError) as error:
            restore()
            return Note(stays, f"Pillow-SIMD could not be installed: {_last_line(error)}")
        return Note(f"Pillow-SIMD {simd['version']}", "built here; it reads all that Pillow reads")


def _last_line(error: Exception) -> str:
    """The line of a failed command that names the cause, as far as that can be told."""
    text = f"{getattr(error, 'stdout', '') or ''}\n{getattr(error, 'stderr', '') or ''}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    telling = [line for line in lines if "required" in line.lower() or "error:" in line.lower()]
    return next(iter(telling or lines[-1:]), str(error))[:200]


def main() -> int:
    """Set up, say what came of it, and keep the note. Pillow is enough, so this never fails the set-up."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.pillow_simd", description=__doc__.splitlines()[0])
    parser.add_argument("--constraint", metavar="FILE", help="pip's constraints for the version to build")
    parser.add_argument("--remove", action="store_true", help="put Pillow back")
    given = parser.parse_args()
    if given.remove:
        restore()
        note_path().unlink(missing_ok=True)
        return 0
    if shutil.which("cc") is None and shutil.which("gcc") is None and "CC" not in os.environ:
        note = Note(
            f"Pillow {importlib.metadata.version('pillow')}", "Pillow-SIMD needs a C compiler, and there is none"
        )
    else:
        note = set_up(given.constraint)
    note_path().write_text(json.dumps(asdict(note), indent=1) + "\n", encoding="utf-8")
    what = f" ({', '.join(note.lost)})" if note.lost else ""
    print(f"setup: {note.active}: {note.reason}{what}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
