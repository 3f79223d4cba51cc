"""Networks of torchvision and timm by their names."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
import torchvision

from jem.config import BackboneConfig
from jem.encoder import Encoder, EncoderInfo, read_encoder, save_encoder
from jem.errors import InputError
from jem.models.backbones import build_backbone


def make(name: str):
    torch.manual_seed(0)
    return build_backbone(BackboneConfig(name=name))


@pytest.mark.parametrize(
    ("name", "head", "dim"),
    [
        ("mobilenet_v3_small", "classifier.3", 1024),
        ("shufflenet_v2_x0_5", "fc", 1024),
        ("swin_t", "head", 768),
        ("vit_b_32", "heads.head", 768),
    ],
)
def test_torchvisions_network_without_its_last_layer(name: str, head: str, dim: int) -> None:
    backbone = make(f"torchvision:{name}").eval()
    reference = torchvision.models.get_model(name, weights=None).eval()
    missing = reference.load_state_dict(backbone.network.state_dict(), strict=False)
    assert {key.rpartition(".")[0] for key in missing.missing_keys} == {head}
    assert missing.unexpected_keys == []
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        features, logits = backbone(images), reference(images)
        assert features.shape == (1, backbone.dim) == (1, dim)
        torch.testing.assert_close(reference.get_submodule(head)(features), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_classifiers_in_the_middle_are_left_out(name: str) -> None:
    assert not [key for key in make(f"torchvision:{name}").network.state_dict() if key.lower().startswith("aux")]


@pytest.mark.parametrize(("name", "dim"), [("resnet18", 512), ("convnext_atto.d2_in1k", 320)])
def test_timms_network_without_its_classifier(name: str, dim: int) -> None:
    backbone = make(f"timm:{name}").eval()
    reference = timm.create_model(name, pretrained=False, num_classes=0).eval()
    reference.load_state_dict(backbone.network.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), reference(images), rtol=1e-5, atol=1e-6)
    assert backbone.dim == dim


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:mobilenetv3_small_050"])
def test_every_parameter_has_a_gradient_and_no_other(name: str) -> None:
    backbone = make(name)
    backbone(torch.randn(2, 3, 64, 64)).sum().backward()
    assert [key for key, value in backbone.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision:convnex_tiny", r"torchvision has no classifier 'convnex_tiny': did you mean convnext_tiny"),
        ("torchvision:fcn_resnet50", "torchvision has no classifier 'fcn_resnet50'"),
        ("torchvision:?", "see torchvision's list_models"),
        ("timm:resnet1", "timm has no classifier 'resnet1': did you mean resnet18"),
        ("torchvision:squeezenet1_1", "does not end in a linear classifier that could be taken out: choose another"),
    ],
)
def test_what_is_no_backbone_is_refused_with_the_nearest_name(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(name)


def test_without_timm_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match="needs timm, which is not installed: pip install timm"):
        make("timm:resnet18")


def test_images_that_the_network_does_not_take_are_refused_in_its_words() -> None:
    with pytest.raises(InputError, match=r"timm:vit_tiny_patch16_224 does not take images of 32 x 32 pixels \(Input"):
        make("timm:vit_tiny_patch16_224")(torch.randn(2, 3, 32, 32))
    with pytest.raises(InputError, match="masks need a ViT"):
        make("timm:resnet18")(torch.randn(2, 3, 32, 32), torch.zeros(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v3_small", "timm:resnet18"])
def test_it_becomes_an_encoder_and_comes_back(name: str, tmp_path) -> None:
    architecture = BackboneConfig(name=name)
    encoder = Encoder(make(name), architecture, 64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).eval()
    save_encoder(encoder, tmp_path / "encoder", EncoderInfo(method="vicreg", data="none"))
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(read_encoder(tmp_path / "encoder")(images), encoder(images))
