"""Backbones of other libraries: any classifier of torchvision or timm, without its last layer."""

from __future__ import annotations

import copy
import difflib
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torchvision import models

from jem.errors import InputError
from jem.models.backbones import Backbone, refuse_mask

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jem.config import BackboneConfig

HEADS = ("fc", "classifier", "head", "heads")
"""What torchvision's networks call the part that ends in the linear classifier."""
AUXILIARY = ("googlenet", "inception_v3")
"""They have further classifiers in their middle, which only they can be asked to leave out."""


class LibraryNetwork(Backbone):
    """`torchvision:NAME` or `timm:NAME`, with the library's initial weights and never with trained ones.

    Which sizes of images it takes is the library's matter: their vision transformers take one size only.

    Raises:
        InputError: the name is unknown, timm is not installed, or without its last layer the network does not give one
            vector for each image.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        library, _, name = config.name.partition(":")
        self.config = config
        self.network = _torchvision(name) if library == "torchvision" else _timm(name)
        self.dim = _width(config.name, self.network)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Images, float (N, 3, H, W), to the representation, (N, dim).

        Raises:
            InputError: the network does not take images of this size, or there is a mask.
        """
        refuse_mask(mask)
        try:
            return cast("Tensor", self.network(images))
        except AssertionError as error:
            height, width = images.shape[2:]
            raise InputError(
                f"{self.config.name} does not take images of {height} x {width} pixels ({error}): change the views' "
                "size, or take another backbone"
            ) from error


def _torchvision(name: str) -> nn.Module:
    known = models.list_models(module=models)
    if name not in known:
        raise InputError(_unknown("torchvision", name, known))
    settings = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
    network = cast("nn.Module", models.get_model(name, weights=None, **settings))
    if not _behead(network):
        raise InputError(
            f"torchvision:{name} does not end in a linear classifier that could be taken out: choose another network"
        )
    return network


def _timm(name: str) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise InputError(f"backbone timm:{name} needs timm, which is not installed: pip install timm") from None
    if name not in {*timm.list_models(), *timm.list_pretrained()}:  # the latter: after a dot, whose trained weights
        raise InputError(_unknown("timm", name, timm.list_models()))
    return timm.create_model(name, pretrained=False, num_classes=0)


def _unknown(library: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    remedy = f"did you mean {' or '.join(near)}?" if near else f"see {library}'s list_models()"
    return f"{library} has no classifier {name!r}: {remedy}"


def _behead(network: nn.Module) -> bool:
    """Let the last linear layer of the head pass on what it gets; False if there is none."""
    for attribute in HEADS:
        head = getattr(network, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(network, attribute, nn.Identity())
            return True
        if isinstance(head, nn.Sequential):
            linear = [name for name, layer in head.named_children() if isinstance(layer, nn.Linear)]
            if linear:
                setattr(head, linear[-1], nn.Identity())
                return True
    return False


def _width(name: str, network: nn.Module) -> int:
    """D; found without computing, from the shapes alone."""
    height, width = getattr(network, "default_cfg", {}).get("input_size", (3, 224, 224))[1:]
    dry = copy.deepcopy(network).to("meta").eval()
    with torch.no_grad():
        out = dry(torch.empty(2, 3, height, width, device="meta"))
    if not isinstance(out, Tensor) or out.dim() != 2:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputError(f"{name} gives {shape} for 2 images, not (2, D): choose another network")
    return out.shape[1]
