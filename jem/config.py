"""The schema of everything that can be configured: types, defaults, descriptions, limits.

One model per job (`PretrainConfig`, `EvaluateConfig`, ...). Unknown keys and impossible values are refused. The order
is defaults < recipe < file < command line; reading those is the work of `pipelines/settings.py`, not this file's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
NonNegative = Annotated[float, Field(ge=0)]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Section(BaseModel):
    """Base of all sections: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# --- data ---------------------------------------------------------------------------------------------------------


class StreamConfig(Section):
    """From Parquet shards to uint8 batches."""

    canvas: PositiveInt = Field(256, description="side S of the decoded square image, in pixels")
    window: PositiveInt = Field(4, description="row groups that are read together and shuffled among each other")
    remainder: Literal["drop", "carry"] = Field(
        "drop", description="images that do not fill the epoch's last global batch: drop them, or carry them over"
    )
    decode_tasks: PositiveInt | None = Field(
        None, description="decode tasks at a time per train worker; default: what the cluster's CPUs allow"
    )
    decode_cpus: PositiveFloat = Field(0.25, description="CPUs that one decode task reserves")
    prefetch: PositiveInt = Field(2, description="batches held ready before the step")
    pixel_limit: PositiveInt = Field(178_956_970, description="larger images are refused (decompression bombs)")


# --- augmentation -------------------------------------------------------------------------------------------------


class JitterConfig(Section):
    """Colour jitter, in torchvision's terms."""

    p: Fraction = Field(0.8, description="probability")
    brightness: NonNegative = 0.4
    contrast: NonNegative = 0.4
    saturation: NonNegative = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.1


class BlurConfig(Section):
    """Gaussian blur."""

    p: Fraction = Field(0.5, description="probability")
    sigma: tuple[PositiveFloat, PositiveFloat] = Field(
        (0.1, 2.0), description="range of the standard deviation, pixels"
    )
    kernel: PositiveInt = Field(23, description="kernel size in pixels, odd")

    @model_validator(mode="after")
    def _odd(self) -> BlurConfig:
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, not {self.kernel}")
        if self.sigma[0] > self.sigma[1]:
            raise ValueError(f"sigma must be a range from low to high, not {self.sigma}")
        return self


class ViewConfig(Section):
    """How one view (or `count` views alike) is made."""

    count: PositiveInt = Field(1, description="how many views are made this way")
    size: PositiveInt = Field(224, description="side of the view in pixels")
    scale: tuple[PositiveFloat, PositiveFloat] = Field((0.08, 1.0), description="crop area, as a share of the image")
    ratio: tuple[PositiveFloat, PositiveFloat] = Field((3 / 4, 4 / 3), description="crop aspect, width / height")
    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    jitter: JitterConfig | None = Field(JitterConfig(), description="colour jitter; null for none")
    grey: Fraction = Field(0.2, description="probability of greyscale")
    blur: BlurConfig | None = Field(None, description="Gaussian blur; null for none")
    solarize: Fraction = Field(0.0, description="probability of solarizing above 0.5")

    @model_validator(mode="after")
    def _ranges(self) -> ViewConfig:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} must be a range from low to high, not ({low}, {high})")
        if self.scale[1] > 1:
            raise ValueError(f"scale cannot pass 1, got {self.scale[1]}")
        if self.blur is not None and self.blur.kernel // 2 >= self.size:
            raise ValueError(f"blur.kernel {self.blur.kernel} is too large for a view of {self.size} pixels")
        return self


class AugmentConfig(Section):
    """The views and where they are made."""

    placement: Literal["device", "pool"] = Field(
        "device", description="device: on the training device, one batch ahead; pool: in a Ray Data actor pool"
    )
    pool_actors: PositiveInt = Field(1, description="actors per train worker (placement: pool)")
    pool_gpus: NonNegative = Field(0.0, description="GPUs that one actor reserves, may be a fraction (placement: pool)")
    pool_cpus: NonNegative = Field(0.25, description="CPUs that one actor reserves (placement: pool)")
    views: tuple[ViewConfig, ...] = Field(
        (ViewConfig(count=2),), min_length=1, description="global views first, then local ones (multi-crop)"
    )
    mean: tuple[float, float, float] = Field(IMAGENET_MEAN, description="per channel, of images in [0, 1]")
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = Field(IMAGENET_STD, description="per channel")


# --- networks and methods -----------------------------------------------------------------------------------------


class BackboneConfig(Section):
    """The network that is kept."""

    name: Literal["resnet18", "resnet34", "resnet50"] = "resnet18"
    stem: Literal["imagenet", "cifar", "stride2"] = Field(
        "imagenet",
        description="imagenet: 7x7 stride 2, max-pool; cifar: 3x3 stride 1, stride2: 3x3 stride 2, no max-pool",
    )
    zero_init: bool = Field(True, description="zero the last batch norm's weight of each residual block")


class VICRegConfig(Section):
    """VICReg (Bardes, Ponce, LeCun, 2022)."""

    name: Literal["vicreg"] = "vicreg"
    lam: NonNegative = Field(25.0, description="lambda, weight of the invariance term")
    mu: NonNegative = Field(25.0, description="mu, weight of the variance term; 0 collapses")
    nu: NonNegative = Field(1.0, description="nu, weight of the covariance term")
    expander: tuple[PositiveInt, ...] = Field((2048, 2048, 2048), min_length=1, description="widths of its layers")
    branches: Literal["shared", "separate"] | tuple[BackboneConfig, BackboneConfig] = Field(
        "shared", description="the views' networks: one, two alike, or two of the given backbones (the first is kept)"
    )


class SupervisedConfig(Section):
    """Cross entropy on the labels, for comparison; one view is enough."""

    name: Literal["supervised"] = "supervised"
    label_smoothing: Fraction = 0.0


MethodConfig = Annotated[VICRegConfig | SupervisedConfig, Field(discriminator="name")]


# --- training -----------------------------------------------------------------------------------------------------


class LARSConfig(Section):
    """LARS in the dialect of the VICReg and Barlow Twins papers' code."""

    name: Literal["lars"] = "lars"
    lr: PositiveFloat = Field(0.3, description="base rate for a global batch of 256")
    weight_decay: NonNegative = 1e-4
    momentum: Fraction = 0.9
    eta: PositiveFloat = Field(0.001, description="trust coefficient")
    clip: bool = Field(False, description="limit the trust ratio so that the local rate does not pass the global one")


class SGDConfig(Section):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat = Field(0.06, description="base rate for a global batch of 256")
    weight_decay: NonNegative = 5e-4
    momentum: Fraction = 0.9
    nesterov: bool = False


class AdamWConfig(Section):
    """AdamW."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = Field(1e-3, description="base rate for a global batch of 256")
    weight_decay: NonNegative = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)


OptimizerConfig = Annotated[LARSConfig | SGDConfig | AdamWConfig, Field(discriminator="name")]


class ScheduleConfig(Section):
    """Learning rate and weight decay as functions of the step."""

    scale_lr: Literal["linear", "sqrt", "none"] = Field("linear", description="how lr follows the global batch / 256")
    warmup_epochs: NonNegative = Field(10.0, description="linear warm-up from 0")
    decay: Literal["cosine", "constant"] = "cosine"
    final: Fraction = Field(0.001, description="last rate as a share of the highest")
    final_weight_decay: NonNegative | None = Field(None, description="cosine to this value; default: constant")


class TrainConfig(Section):
    """The loop."""

    epochs: PositiveInt = 100
    batch_size: PositiveInt = Field(256, description="global: all workers together")
    accumulate: PositiveInt = Field(1, description="split each worker's batch into so many forward passes")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16 is autocast; losses stay in float32")
    channels_last: bool = True
    compile: bool = Field(False, description="torch.compile the backbone")
    sync_bn: bool = Field(True, description="batch norm statistics over the global batch")
    clip_norm: PositiveFloat | None = Field(None, description="limit of the gradient's norm")
    log_every: PositiveInt = Field(10, description="steps between logged metrics")
    health_every: PositiveInt = Field(
        50, description="steps between collapse diagnostics; each epoch ends with one too"
    )
    checkpoint_every: PositiveInt | None = Field(
        None, description="steps between checkpoints; default: each epoch's end"
    )
    keep_checkpoints: PositiveInt = Field(2, description="how many of the latest are kept")


class ClusterConfig(Section):
    """Where it runs, and with what."""

    address: str | None = Field(
        None, description="Ray address (auto, ray://...); default: RAY_ADDRESS, or a Ray of its own on this machine"
    )
    workers: PositiveInt = Field(1, description="train workers, one per GPU")
    gpu: bool | None = Field(None, description="one GPU per worker and NCCL; default: if the cluster has enough")
    cpus_per_worker: PositiveFloat = Field(0.5, description="CPUs that a train worker reserves")
    max_failures: int = Field(3, ge=-1, description="restarts after a dead worker; -1: without limit")
    start_timeout: PositiveFloat = Field(300.0, description="seconds in which the workers must have started")


class KNNConfig(Section):
    """Weighted k-nearest-neighbour classification on cosine similarity."""

    k: PositiveInt = 200
    temperature: PositiveFloat = 0.1


class ProbeConfig(Section):
    """Linear classifier on frozen features."""

    weight_decays: tuple[NonNegative, ...] = Field(
        (1e-6, 1e-4, 1e-2), min_length=1, description="tried on a held-out tenth of the training features"
    )
    max_iterations: PositiveInt = Field(300, description="of L-BFGS")


class OnlineConfig(Section):
    """kNN accuracy during training, where there are labels."""

    every: PositiveInt = Field(1, description="epochs between evaluations")
    bank: PositiveInt = Field(2000, description="training images in the bank, at most")
    queries: PositiveInt = Field(1000, description="test images, at most")


class EvaluationSettings(Section):
    """How features are judged."""

    knn: KNNConfig = KNNConfig()
    probe: ProbeConfig | None = Field(ProbeConfig(), description="linear probe; null for none")
    online: OnlineConfig | None = Field(OnlineConfig(), description="kNN during training; null for none")
    random_baseline: bool = Field(True, description="judge an untrained encoder of the same kind too")
    batch_size: PositiveInt = Field(256, description="images per forward pass")


class TrackConfig(Section):
    """MLflow."""

    uri: str | None = Field(None, description="tracking server; default: MLFLOW_TRACKING_URI, or sqlite:///mlflow.db")
    experiment: str = "jem"
    register_as: str | None = Field(None, description="name of the registered encoder; default: METHOD-BACKBONE")
    alias: str | None = Field(None, description="alias given to the new version, such as champion")


# --- jobs ---------------------------------------------------------------------------------------------------------


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
        if not self.data and self.resume is None:
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
        if self.method.name == "vicreg":
            if batch // accumulate < 2:
                raise ValueError(
                    f"train.batch_size {batch} in {accumulate} part(s) leaves 1 image, which has no variance: VICReg "
                    "needs at least 2, better 256"
                )
            if sum(view.count for view in self.augment.views) != 2:
                raise ValueError("augment.views must make exactly 2 views for vicreg")
        return self


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


class RecipesListConfig(Section):
    """The recipes that ship with jem."""


class RecipesShowConfig(Section):
    """The YAML of a recipe."""

    name: str = Field(description="name of the recipe")
