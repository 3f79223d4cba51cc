"""One configuration for each job."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jem.config.methods import MethodConfig, VICRegConfig
from jem.config.networks import VITS, WAVEFORM, BackboneConfig
from jem.config.section import Fraction, Section
from jem.config.training import (
    ClusterConfig,
    EvaluationSettings,
    LARSConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrackConfig,
    TrainConfig,
)
from jem.config.views import AugmentConfig, StreamConfig, ViewConfig, indivisible


class IngestConfig(Section):
    """Build a data set of Parquet shards from images."""

    source: str = Field(
        description="class folders, a flat folder, a CSV or JSONL list, Hugging Face Parquet, or WebDataset tars"
    )
    dest: str = Field(description="folder or URI of the new data set")
    format: Literal["auto", "classes", "flat", "list", "parquet", "webdataset"] = Field(
        "auto", description="what SOURCE is; auto looks"
    )
    overwrite: bool = Field(False, description="replace a finished data set at DEST")
    short_side: PositiveInt | None = Field(None, description="re-encode images whose short side is longer, in pixels")
    max_rejected: Fraction = Field(0.5, description="fail if more than this share of the images is bad")
    shard_mb: PositiveFloat = Field(256.0, description="size of a shard in MB, about")
    row_group_mb: PositiveFloat = Field(8.0, description="size of a row group in MB, about; the unit of reading")
    row_group_rows: PositiveInt = Field(1000, description="images in a row group, at most")
    max_row_group_mb: PositiveFloat = Field(
        512.0, description="refuse a Parquet SOURCE with a larger row group, uncompressed: it is read as a whole"
    )
    seed: int = Field(0, description="of the order in which images are put into shards")
    pixel_limit: PositiveInt = StreamConfig.model_fields["pixel_limit"].default
    cluster: ClusterConfig = ClusterConfig()


class PreviewConfig(Section):
    """A picture of the views that a recipe makes."""

    data: str = Field(description="data set: folder, file or glob of Parquet shards")
    out: str = Field(description="PNG file to write")
    images: PositiveInt = Field(8, description="how many images, one per row")
    limit: PositiveInt | None = None
    seed: int = 0
    overwrite: bool = Field(False, description="replace OUT")
    stream: StreamConfig = StreamConfig()
    augment: AugmentConfig = AugmentConfig()


class PretrainConfig(Section):
    """Pretrain an encoder without labels, judge it and register it."""

    data: str = Field("", description="training set: folder, file or glob of Parquet shards, local or a URI")
    test: str | None = Field(None, description="labelled test set; default: none, kNN then on held-out training images")
    limit: PositiveInt | None = Field(None, description="use only the first so many training images")
    name: str | None = Field(None, description="name of the run, unique in STORAGE; default: made from method and time")
    resume: str | None = Field(None, description="go on with the run of this name")
    storage: str = Field("runs", description="folder or URI that all nodes can write: checkpoints and configuration")
    seed: int = Field(0, ge=0)
    profile: bool = Field(False, description="measure where a step's time goes, and record a trace of a few steps")
    stream: StreamConfig = StreamConfig()
    augment: AugmentConfig = AugmentConfig()
    backbone: BackboneConfig = BackboneConfig()
    method: MethodConfig = VICRegConfig()
    optimizer: OptimizerConfig = LARSConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    cluster: ClusterConfig = ClusterConfig()
    evaluation: EvaluationSettings = EvaluationSettings()
    track: TrackConfig = TrackConfig()

    @model_validator(mode="after")
    def _consistent(self) -> PretrainConfig:
        if self.resume is not None:
            return self  # what is given is a part: it is checked with the run's own settings
        if not self.data:
            raise ValueError("data is missing: give a data set with --data, or go on with a run with --resume NAME")
        batch, workers, accumulate = self.train.batch_size, self.cluster.workers, self.train.accumulate
        if batch < workers:
            raise ValueError(
                f"train.batch_size {batch} is smaller than cluster.workers {workers}: raise it or use fewer workers"
            )
        if batch % (workers * accumulate):
            raise ValueError(
                f"train.batch_size {batch} does not divide among cluster.workers {workers} "
                f"x train.accumulate {accumulate}: make it a multiple of {workers * accumulate}"
            )
        if self.parts % workers or batch % (self.parts * accumulate):
            raise ValueError(
                f"train.parts {self.parts} must be a multiple of cluster.workers {workers}, and train.batch_size "
                f"{batch} one of train.parts x train.accumulate {self.parts * accumulate}: change one of them"
            )
        least = self.cluster.min_workers
        if least is not None and least not in self.worlds:
            raise ValueError(
                f"cluster.min_workers {least} must divide train.parts {self.parts} and not pass cluster.workers "
                f"{workers}: change one of them"
            )
        if least is not None and not self.train.sync_bn:
            raise ValueError(
                "with cluster.min_workers the number of workers changes, and with it the images that each one's batch "
                "norm sees: set train.sync_bn true, or leave min_workers out"
            )
        if self.stream.cache is not None and self.augment.placement == "pool":
            raise ValueError(
                "stream.cache is read by the train workers: set augment.placement to device, or leave it out"
            )
        for key, backbone, views in self._networks():
            _check_views(key, backbone, views)
        self.method.check(self)
        return self

    @property
    def parts(self) -> int:
        """That each epoch is cut into."""
        return self.train.parts or self.cluster.workers

    @property
    def worlds(self) -> list[int]:
        """Numbers of workers that the run may have, from the least."""
        least = self.cluster.min_workers or self.cluster.workers
        return [world for world in range(least, self.cluster.workers + 1) if self.parts % world == 0]

    def _networks(self) -> list[tuple[str, BackboneConfig, list[ViewConfig]]]:
        """Each backbone with the key that sets it and the views that it gets."""
        views = [view for view in self.augment.views for _ in range(view.count)]
        branches = getattr(self.method, "branches", None)
        if not isinstance(branches, tuple):
            return [("backbone", self.backbone, views)]
        first, second = branches
        return [("method.branches.0", first, views[:1]), ("method.branches.1", second, views[1:])]


def _check_views(key: str, backbone: BackboneConfig, views: list[ViewConfig]) -> None:
    """Refuse views that `backbone`, set by `key`, cannot take, and what it has no use for.

    Raises:
        ValueError: what does not fit, why, and what to change.
    """
    if backbone.name == WAVEFORM:
        raise ValueError(f"{key}: {WAVEFORM} takes waveforms, (N, 1, L), data sets hold images: use it from Python")
    for view in views:
        if backbone.is_vit and view.size % backbone.patch:
            raise ValueError(indivisible(view.size, f"{key}.patch", backbone.patch))
        if view.mask is None:
            continue
        if not backbone.is_vit:
            raise ValueError(
                f"masks need a ViT: {backbone.name} has no patches that could be left out (a convolution mixes masked "
                f"and visible pixels); leave out the mask of augment.views, or set {key}.name to {', '.join(VITS)}"
            )
        if view.mask.patch != backbone.patch:
            raise ValueError(
                f"augment.views has a mask of patches of {view.mask.patch} pixels, and {key} patches of "
                f"{backbone.patch}: set mask.patch to {backbone.patch}"
            )
    if backbone.masked == "token" and all(view.mask is None for view in views):
        raise ValueError(
            f"{key}.masked is token, but none of its views has a mask: leave it out, or set augment.views' mask"
        )


class EvaluateConfig(Section):
    """kNN, linear probe and collapse diagnostics of a registered encoder."""

    encoder: str = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/encoder, or a folder")
    data: str = Field(description="labelled training set")
    test: str = Field(description="labelled test set")
    limit: PositiveInt | None = Field(None, description="use only the first so many training images")
    stream: StreamConfig = StreamConfig()
    evaluation: EvaluationSettings = EvaluationSettings(online=None)
    cluster: ClusterConfig = ClusterConfig()
    track: TrackConfig = TrackConfig()
    seed: int = Field(0, ge=0)


class EmbedConfig(Section):
    """Embed a data set with a registered encoder: Parquet with id, embedding and label."""

    encoder: str = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/encoder, or a folder")
    data: str = Field(description="data set: folder, file or glob of Parquet shards")
    out: str = Field(description="folder or URI for the Parquet files")
    limit: PositiveInt | None = None
    overwrite: bool = Field(False, description="replace a finished OUT")
    batch_size: PositiveInt = 256
    actors: PositiveInt = Field(1, description="encoder actors; with GPUs, one each")
    stream: StreamConfig = StreamConfig()
    cluster: ClusterConfig = ClusterConfig()
    track: TrackConfig = TrackConfig()


class EncodersListConfig(Section):
    """List the registered encoders."""

    track: TrackConfig = TrackConfig()


class EncodersShowConfig(Section):
    """Show what a registered encoder is and where it comes from."""

    encoder: str = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/ID/encoder, or a folder")
    track: TrackConfig = TrackConfig()


class EncodersPromoteConfig(Section):
    """Give an alias to a registered encoder; the version that had it loses it."""

    encoder: str = Field(description="models:/NAME/VERSION or models:/NAME@ALIAS")
    alias: str = Field(description="such as champion")
    track: TrackConfig = TrackConfig()


class EncodersPullConfig(Section):
    """Copy an encoder's files to a folder."""

    encoder: str = Field(description="models:/NAME@ALIAS, models:/NAME/VERSION, or runs:/ID/encoder")
    dest: str = Field(description="folder to make")
    overwrite: bool = Field(False, description="replace the encoder at DEST")
    track: TrackConfig = TrackConfig()


class DemoConfig(Section):
    """The main job, offline, on scikit-learn's handwritten digits."""

    out: str = Field("demo", description="folder for the data set, the runs and the embeddings")
    epochs: PositiveInt = 10
    workers: PositiveInt = 2
    seed: int = Field(0, ge=0)
    track: TrackConfig = TrackConfig(experiment="jem-demo", register_as="demo-digits", alias="champion")


class DoctorConfig(Section):
    """Versions, devices, decoders, Ray, MLflow, storage: what works, and what to do about the rest."""

    storage: str = Field("runs", description="folder or URI that all nodes can write, to be tested")
    deadline: PositiveFloat = Field(60.0, description="seconds that Ray, and that MLflow, may take to answer")
    cluster: ClusterConfig = ClusterConfig()
    track: TrackConfig = TrackConfig()


class MethodsConfig(Section):
    """The methods: family, what keeps each from collapsing, what it needs, paper."""

    markdown: bool = Field(False, description="print a Markdown table")


class RecipesListConfig(Section):
    """The recipes that ship with jem."""


class RecipesShowConfig(Section):
    """The YAML of a recipe."""

    name: str = Field(description="name of the recipe")
