import hashlib
import io
import os
from functools import cache
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from stillroom.errors import StillroomError
from stillroom.networks import (
    NETWORKS,
    SMALLEST,
    batchnorm_layers,
    build_network,
    end_size,
    load_pretrained_imagenet,
    penultimate_features,
)

SIZES = (32, 64, 224)
TEACHERS = ("resnet18", "mobilenet_v2", "efficientnet_b0", "shufflenet_v2")
LIGHT = ("resnet10_thin", "mobilenet_v2_thin", "efficientnet_b0_thin", "shufflenet_v2_thin", "convnet_thin")


@cache
def shape_of(name: str, image_size: int, channels: int = 3, classes: int = 10) -> nn.Module:
    """The network without memory for its weights: enough for every question of shape."""
    with torch.device("meta"):
        return NETWORKS[name].build(classes, image_size, channels)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("column", range(3))
def test_each_network_ends_at_the_size_its_row_states(name: str, column: int) -> None:
    image_size = SIZES[column]
    model = shape_of(name, image_size)
    assert end_size(model, image_size) == NETWORKS[name].end_sizes[column]


@pytest.mark.parametrize("name", NETWORKS)
def test_every_batchnorm_listed_runs_once_and_in_the_order_listed(name: str) -> None:
    model = shape_of(name, 32)
    listed = [key for key, _ in batchnorm_layers(model)]
    ran: list[str] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output, key=key: ran.append(key))
        for key, layer in batchnorm_layers(model)
    ]
    model(torch.empty(2, 3, 32, 32, device="meta"))
    for handle in handles:
        handle.remove()
    assert ran == listed
    assert len(listed) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_batchnorms_of_timm_are_found_although_they_hide_an_activation() -> None:
    model = build_network("timm:efficientnet_lite0", 10, 32)
    assert {type(layer).__name__ for _, layer in batchnorm_layers(model)} == {"BatchNormAct2d"}


def test_the_convnet_of_the_field_has_320010_parameters() -> None:
    assert parameters(shape_of("convnet_in", 32)) == 320_010
    assert parameters(shape_of("convnet", 32)) == 320_010
    assert batchnorm_layers(shape_of("convnet_in", 32)) == []


def test_instance_norm_of_convnet_normalises_each_channel_of_each_image() -> None:
    images = torch.randn(2, 128, 8, 8) * 3 + 1
    group_norm = build_network("convnet_in", 10, 32).features[1]
    torch.testing.assert_close(group_norm(images), nn.functional.instance_norm(images))


@pytest.mark.parametrize(
    ("image_size", "depth"), [(8, 3), (28, 3), (32, 3), (48, 3), (64, 4), (128, 5), (224, 5), (256, 6)]
)
def test_convnet_gains_a_block_for_each_doubling(image_size: int, depth: int) -> None:
    model = shape_of("convnet", image_size)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == depth
    assert model(torch.empty(2, 3, image_size, image_size, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("name", [name for name, row in NETWORKS.items() if row.imagenet])
def test_large_image_networks_are_torchvisions_own_and_small_ones_hold_the_same_layers(name: str) -> None:
    with torch.device("meta"):
        reference = torchvision.models.get_model(NETWORKS[name].imagenet)
    large, small = shape_of(name, 224, classes=1000), shape_of(name, 32, classes=1000)
    expected = {key: value.shape for key, value in reference.state_dict().items()}
    assert {key: value.shape for key, value in large.state_dict().items()} == expected
    assert list(small.state_dict()) == list(expected)
    differing = [key for key, value in small.state_dict().items() if value.shape != expected[key]]
    assert differing == (["conv1.weight"] if name.startswith("resnet") else [])


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2"])
def test_our_large_image_network_computes_what_torchvisions_does(name: str) -> None:
    ours = build_network(name, 1000, 224).eval()
    theirs = torchvision.models.get_model(NETWORKS[name].imagenet).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 72, 72)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize("name", LIGHT)
def test_thin_networks_are_lighter_than_half_of_their_namesakes(name: str) -> None:
    full = {"resnet10_thin": "resnet18"}.get(name, name.removesuffix("_thin"))
    assert parameters(shape_of(name, 32)) < parameters(shape_of(full, 32)) / 2


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (build_network("resnet10_thin", 10, 32, seed=seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("name", ["convnet_thin", "shufflenet_v2_thin", "timm:resnet10t", "torchvision:mnasnet0_5"])
def test_building_leaves_the_global_random_state_alone(name: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build_network(name, 10, 32, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_do_not_depend_on_the_default_device() -> None:
    here = build_network("convnet_thin", 10, 32).classifier.weight
    with torch.device("meta"):
        there = build_network("convnet_thin", 10, 32).classifier.weight
    assert torch.equal(here, there)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("image_size", [SMALLEST, 96])
def test_any_number_of_input_channels_and_classes_is_served(name: str, image_size: int) -> None:
    model = shape_of(name, image_size, 1, 7)
    assert model(torch.empty(2, 1, image_size, image_size, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("name", LIGHT)
def test_training_is_random_where_the_network_drops_and_evaluation_never_is(name: str) -> None:
    model = build_network(name, 10, 16)
    images = torch.randn(4, 3, 16, 16)
    drops = name in ("mobilenet_v2_thin", "efficientnet_b0_thin")
    assert torch.equal(model(images), model(images)) is not drops
    model.eval()
    assert torch.equal(model(images), model(images))


@pytest.mark.parametrize("name", LIGHT)
def test_channels_last_and_bfloat16_autocast_change_rounding_only(name: str) -> None:
    model = build_network(name, 10, 16)
    images = torch.randn(8, 3, 16, 16)
    model(images)
    model.eval()
    expected = model(images)
    model.to(memory_format=torch.channels_last)
    last = images.to(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(model(last), expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(last)
    assert torch.corrcoef(torch.stack([rounded.float().flatten(), expected.flatten()]))[0, 1] > 0.95
    rounded.float().square().sum().backward()
    assert last.grad is not None
    assert last.grad.isfinite().all()


@pytest.mark.parametrize("name", ["resnet10_thin", "convnet_thin"])
def test_a_network_compiles_to_one_graph(name: str) -> None:
    model = build_network(name, 10, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


def test_measuring_the_end_leaves_the_network_as_it_was() -> None:
    model = build_network("resnet10_thin", 10, 32)
    model.bn1.eval()
    end_size(model, 32)
    assert model.training
    assert not model.bn1.training
    assert model.bn1.num_batches_tracked == 0
    assert not any(module._forward_hooks for module in model.modules())
    assert model.conv1.weight.device.type == "cpu"


@pytest.mark.parametrize("name", [*LIGHT, "resnet18", "mobilenet_v2", "convnet_in", "torchvision:mnasnet0_5"])
def test_logits_are_the_last_linear_layer_of_the_penultimate_features(name: str) -> None:
    model = build_network(name, 7, 32).eval()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = penultimate_features(model, images)
    assert features.shape == (3, linear.in_features)
    assert not features.requires_grad
    torch.testing.assert_close(linear(features), model(images))
    assert not linear._forward_hooks


@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:vit_tiny_patch16_224"])
def test_timm_says_itself_what_its_penultimate_features_are(name: str) -> None:
    model = build_network(name, 7, 32).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = penultimate_features(model, images)
    assert features.shape == (2, model.num_features)
    torch.testing.assert_close(model.get_classifier()(features), model(images))


def test_penultimate_features_are_float32_whatever_the_precision_around_them() -> None:
    model = build_network("convnet_thin", 7, 32).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = penultimate_features(model, images)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, penultimate_features(model, images))


def test_a_network_without_penultimate_features_says_so() -> None:
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(StillroomError, match="SqueezeNet does not end in a linear layer"):
        penultimate_features(build_network("torchvision:squeezenet1_1", 7, 64).eval(), images)
    squashed = nn.Sequential(build_network("convnet_thin", 7, 64), nn.Sigmoid()).eval()
    with pytest.raises(StillroomError, match="Sequential does not end in a linear layer"):
        penultimate_features(squashed, images)
    with pytest.raises(StillroomError, match="Sequential is in train mode"):
        penultimate_features(build_network("convnet_thin", 7, 64), images)


def test_libraries_serve_the_names_that_the_table_lacks() -> None:
    assert build_network("timm:resnet10t", 4, 64).fc.out_features == 4
    assert build_network("torchvision:mnasnet0_5", 4, 64).classifier[1].out_features == 4
    assert type(build_network("mnasnet0_5", 4, 64)).__module__.startswith("torchvision")
    assert type(build_network("resnet10t", 4, 64, channels=1)).__module__.startswith("timm")
    assert isinstance(build_network("resnet18", 4, 32).maxpool, nn.Identity)
    assert isinstance(build_network("torchvision:resnet18", 4, 32).maxpool, nn.MaxPool2d)


def test_a_transformer_of_timm_takes_the_image_size_asked_for() -> None:
    model = build_network("timm:vit_tiny_patch16_224", 10, 64)
    assert end_size(model, 64) == 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet19", "Did you mean 'resnet18'"),
        ("timm:resnet10x", "Did you mean"),
        ("torchvision:convnet", "Unknown network 'torchvision:convnet'"),
        ("qqqqqq", "Choose from: convnet, convnet_in"),
        ("tim:resnet18", "Did you mean 'timm'"),
    ],
)
def test_an_unknown_name_is_answered_with_its_neighbours(name: str, expected: str) -> None:
    with pytest.raises(StillroomError, match=expected):
        build_network(name, 10, 32)


@pytest.mark.parametrize("argument", ["classes", "image_size", "channels"])
def test_numbers_out_of_range_are_named(argument: str) -> None:
    arguments = {"classes": 10, "image_size": 32, "channels": 3} | {argument: 0}
    with pytest.raises(StillroomError, match=f"{argument}=0"):
        build_network("convnet", **arguments)


def test_a_library_network_that_cannot_serve_is_refused_when_built() -> None:
    with pytest.raises(StillroomError, match="image_size=32"):
        build_network("vit_b_32", 10, 32)
    with pytest.raises(StillroomError, match="channels=1"):
        build_network("torchvision:mnasnet0_5", 10, 32, channels=1)


@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet:FutureWarning")
def test_a_network_with_more_than_one_output_is_refused() -> None:
    with pytest.raises(StillroomError, match="train mode"):
        build_network("torchvision:googlenet", 10, 32)


def cache_as_published(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes) -> Path:
    """Put `content` into torch hub's cache, as the weights of `name` that torchvision publishes by its hash."""
    weights = torchvision.models.get_model_weights(NETWORKS[name].imagenet)["IMAGENET1K_V1"]
    digits = hashlib.sha256(content).hexdigest()[:8]
    monkeypatch.setattr(weights.value, "url", f"https://download.pytorch.org/models/{name}-{digits}.pth")
    monkeypatch.setenv("TORCH_HOME", str(folder))
    path = folder / "hub" / "checkpoints" / f"{name}-{digits}.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def saved_by_torch(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, harm: Path) -> None:
        self.harm = harm

    def __reduce__(self):
        return os.mkdir, (str(self.harm),)


def test_imagenet_weights_are_read_from_the_cache_of_torch_hub(tmp_path, monkeypatch) -> None:
    published = build_network("shufflenet_v2", 1000, 224, seed=5).state_dict()
    cache_as_published(tmp_path, monkeypatch, "shufflenet_v2", saved_by_torch(published))
    model = load_pretrained_imagenet("shufflenet_v2")
    assert not model.training
    assert all(torch.equal(value, published[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("hash_fits", [True, False])
def test_code_in_cached_imagenet_weights_never_runs(tmp_path, monkeypatch, hash_fits: bool) -> None:
    harm = tmp_path / "harm"
    path = cache_as_published(tmp_path, monkeypatch, "shufflenet_v2", saved_by_torch({"a": Payload(harm)}))
    if not hash_fits:
        path.write_bytes(saved_by_torch({"b": Payload(harm)}))
    message = "holds code or other things" if hash_fits else "is not the file that torchvision publishes"
    with pytest.raises(StillroomError, match=f"{path} {message}.* delete it, and it is fetched anew"):
        load_pretrained_imagenet("shufflenet_v2")
    assert not harm.exists()
    torch.load(path, weights_only=False)
    assert harm.exists()  # the payload was live


def test_cached_imagenet_weights_that_are_damaged_are_refused(tmp_path, monkeypatch) -> None:
    published = build_network("shufflenet_v2", 1000, 224, seed=5).state_dict()
    path = cache_as_published(tmp_path, monkeypatch, "shufflenet_v2", saved_by_torch(published))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in a tensor, which torch would load
    path.write_bytes(content)
    with pytest.raises(StillroomError, match="its SHA-256 does not begin as its name says"):
        load_pretrained_imagenet("shufflenet_v2")


def test_imagenet_weights_out_of_reach_give_one_clear_error(tmp_path, monkeypatch) -> None:
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(StillroomError, match=r"ImageNet weights of 'shufflenet_v2' \(no route to host\)"):
        load_pretrained_imagenet("shufflenet_v2")
    with pytest.raises(StillroomError, match=r"Did you mean .*'resnet18'"):
        load_pretrained_imagenet("resnet10_thin")


def test_all_seven_published_networks_have_imagenet_weights() -> None:
    published = {row.imagenet for row in NETWORKS.values() if row.imagenet}
    assert len(published) == 7
    for name in published:
        assert "IMAGENET1K_V1" in torchvision.models.get_model_weights(name).__members__
    assert all(NETWORKS[name].imagenet for name in TEACHERS)
