"""The optimizer and the loop, where they run, how the result is judged and tracked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from jem.config.section import Fraction, NonNegative, Section


class LARSConfig(Section):
    """LARS in the dialect of the VICReg and Barlow Twins papers' code."""

    name: Literal["lars"] = "lars"
    lr: PositiveFloat = Field(0.3, description="base rate for a global batch of 256")
    weight_decay: NonNegative = 1e-4
    momentum: Fraction = 0.9
    eta: PositiveFloat = Field(0.001, description="trust coefficient")
    bias_lr: NonNegative | None = Field(
        None, description="base rate of biases and norms; default: lr (Barlow Twins gives them their own)"
    )
    clip: bool = Field(False, description="limit the trust ratio so that the local rate does not pass the global one")


class SGDConfig(Section):
    """Stochastic gradient descent with momentum."""

    name: Literal["sgd"] = "sgd"
    lr: PositiveFloat = Field(0.06, description="base rate for a global batch of 256")
    weight_decay: NonNegative = 5e-4
    momentum: Fraction = 0.9
    nesterov: bool = False


class AdamConfig(Section):
    """Adam, whose weight decay is a part of the gradient."""

    name: Literal["adam"] = "adam"
    lr: PositiveFloat = Field(1e-3, description="base rate for a global batch of 256")
    weight_decay: NonNegative = 1e-6
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)


class AdamWConfig(Section):
    """AdamW."""

    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat = Field(1e-3, description="base rate for a global batch of 256")
    weight_decay: NonNegative = 0.01
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)


OptimizerConfig = Annotated[LARSConfig | SGDConfig | AdamConfig | AdamWConfig, Field(discriminator="name")]


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
    parts: PositiveInt | None = Field(
        None,
        description="that an epoch and each global batch are cut into, one or more per worker; with as many parts the "
        "batches and views are the same on any number of workers that divides them; default: cluster.workers",
    )
    accumulate: PositiveInt = Field(1, description="split each worker's batch into so many forward passes")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="bf16 is autocast; losses stay in float32")
    channels_last: bool = True
    joint_views: bool = Field(
        False,
        description="views of one size in one forward pass of the backbone, whose batch norm then takes its statistics "
        "over them together; a backbone without batch norm always does so",
    )
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
    workers: PositiveInt = Field(1, description="train workers, one per GPU; the most, where there is a least")
    min_workers: PositiveInt | None = Field(
        None,
        description="least train workers: the run shrinks when a node is lost, to a number that divides train.parts, "
        "and grows when one joins; default: it waits for as many as there were",
    )
    resize_seconds: PositiveFloat = Field(60.0, description="between looks for room to grow (with min_workers)")
    gpu: bool | None = Field(None, description="one GPU per worker and NCCL; default: if the cluster has enough")
    cpus_per_worker: PositiveFloat = Field(0.5, description="CPUs that a train worker reserves")
    max_failures: int = Field(3, ge=-1, description="restarts after a dead worker; -1: without limit")
    wait_for_nodes: NonNegative = Field(
        0.0, description="seconds to wait for the autoscaler's nodes where a job does not fit; 0: it is refused at once"
    )
    start_timeout: PositiveFloat = Field(
        300.0, description="seconds in which the workers must have started, or started again"
    )


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
