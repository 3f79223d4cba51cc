"""`jem encoders`: the registry in the terminal."""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jem.config import EncodersListConfig, EncodersPromoteConfig, EncodersPullConfig, EncodersShowConfig
    from jem.encoder import EncoderManifest
    from jem.tracking.registry import EncoderVersion


def list_encoders(config: EncodersListConfig) -> list[EncoderVersion]:
    """Print the registered encoders, the newest version of each name first."""
    from jem.tracking import registry

    encoders = registry.list_encoders(config.track)
    rows = [
        (
            encoder.uri,
            ",".join(encoder.aliases),
            encoder.tags.get("method", ""),
            encoder.tags.get("backbone", ""),
            encoder.tags.get("dimensions", ""),
            _day(encoder),
            " ".join(f"{key} {value:.4g}" for key, value in encoder.metrics.items()),
        )
        for encoder in encoders
    ]
    if rows:
        _table(("encoder", "aliases", "method", "backbone", "dim", "made", "metrics"), rows)
    else:
        print("no encoders are registered here: jem pretrain registers one, or give another store with --track.uri")
    return encoders


def show_encoder(config: EncodersShowConfig) -> EncoderManifest:
    """Print what an encoder is: its registered version and its description."""
    from jem.tracking import registry

    manifest, version = registry.show(config.encoder, config.track)
    facts: dict[str, object] = {}
    if version is not None:
        facts = {"encoder": version.uri, "aliases": ", ".join(version.aliases) or "none", "made": _day(version)}
        facts["run"] = version.run_id
    facts |= {
        "method": manifest.info.method,
        "data": manifest.info.data,
        "backbone": manifest.architecture.in_words,
        "dimensions": manifest.dimensions,
        "input": f"{manifest.input_size} x {manifest.input_size} pixels, mean {manifest.mean}, std {manifest.std}",
        **{key: f"{value:.6g}" for key, value in manifest.info.metrics.items()},
        "sha256": manifest.sha256,
        "jem": manifest.jem,
    }
    own = {"jem", "method", "data", "backbone", "dimensions", "input_size", "sha256", "config"}
    if version is not None:
        facts |= {key: tag for key, tag in version.tags.items() if key not in own and not key.startswith("metric.")}
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")
    if manifest.info.config:
        print(f"{'config':<{width}}  {json.dumps(manifest.info.config)}")
    return manifest


def promote_encoder(config: EncodersPromoteConfig) -> EncoderVersion:
    """Give an alias to a version, and print what has it now."""
    from jem.tracking import registry

    encoder = registry.promote(config.encoder, config.alias, config.track)
    print(f"models:/{encoder.name}@{config.alias} is version {encoder.version} now")
    return encoder


def pull_encoder(config: EncodersPullConfig) -> EncoderManifest:
    """Copy an encoder's files to a folder, and print how to use it."""
    from jem.tracking import registry

    manifest = registry.pull(config.encoder, config.dest, config.track, overwrite=config.overwrite)
    print(f"{config.dest}: {manifest.architecture.name}, {manifest.dimensions} dimensions, by {manifest.info.method}")
    print(f"  use it:    jem.load_encoder({config.dest!r})")
    return manifest


def _day(encoder: EncoderVersion) -> str:
    return dt.datetime.fromtimestamp(encoder.created).astimezone().strftime("%Y-%m-%d %H:%M")


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
