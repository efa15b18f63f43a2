"""The networks: one table from a name to a builder, small-image stems included.

Images of up to 64 px (`SMALL`) get a stem that keeps their resolution; larger ones get the network's own:

    ResNet           3x3 convolution of stride 1 and no max-pool, instead of 7x7 of stride 2 and a max-pool
    MobileNetV2      stem and second stage of stride 1
    EfficientNet-B0  stem of stride 1. The head convolution, which the published CIFAR scripts lack, stays: so the body
                     is the same at every image size
    ShuffleNetV2     stem of stride 1 and no max-pool. INFER's paper gives no width, and its scripts hold a ShuffleNet
                     v1 under this name; ours is v2 x1.0
    ConvNet          no stem: blocks of 3x3 convolution, norm, ReLU and 2x2 average pool. Three up to 63 px, one more
                     for each doubling (64: 4, 128: 5, 224: 5, 256: 6), so from 32 px on it ends at 4 to 7 px

The `_thin` rows are for laptops: half the width of the network they are named after. Weights start as torchvision
starts them (ConvNet: as PyTorch does). Dropout and stochastic depth act in train mode only.
"""

from __future__ import annotations

import copy
import difflib
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast
from urllib.error import URLError

import torch
from torch import nn

from stillroom.errors import StillroomError, suggest
from stillroom.files import sha256_file

SMALL = 64  # px: up to this side, small-image stems
SMALLEST = 8  # px: three halvings must leave a pixel


@dataclass(frozen=True)
class Network:
    """A row of the table.

    build: (classes, image_size, channels) -> network from [batch, channels, image_size, image_size] to
        [batch, classes], weights drawn from the global generator (`build_network` guards and seeds it).
    end_sizes: side in px of the last feature map, before global pooling (ConvNet: before its linear layer), for images
        of 32, 64 and 224 px.
    imagenet: torchvision's name for it, where torchvision publishes IMAGENET1K_V1 weights that fit.
    """

    build: Callable[[int, int, int], nn.Module]
    end_sizes: tuple[int, int, int]
    imagenet: str | None = None


def build_network(name: str, classes: int, image_size: int, seed: int = 0, *, channels: int = 3) -> nn.Module:
    """Build a network of fresh weights on the CPU, in train mode: [batch, channels, side, side] -> [batch, classes].

    name: a key of `NETWORKS`; or ``torchvision:NAME`` or ``timm:NAME``, built as that library defines it, without a
        small-image stem; or a bare name, looked up in the table, then in torchvision, then in timm.
    image_size: side of the square images in px, at least 8. seed: the same seed gives the same weights; the global
        random state is left as it was.
    Raises StillroomError for an unknown name, a number out of range, or a library network that cannot take such images.
    """
    for argument, value, least in (
        ("classes", classes, 1),
        ("image_size", image_size, SMALLEST),
        ("channels", channels, 1),
    ):
        if value < least:
            raise StillroomError(f"{argument}={value!r} is too small for network {name!r}: give at least {least}.")
    build = NETWORKS[name].build if name in NETWORKS else _find_in_libraries(name)
    # torch.manual_seed would reseed the accelerators too, which fork_rng(devices=[]) does not restore
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return build(classes, image_size, channels)


def load_pretrained_imagenet(name: str) -> nn.Module:
    """Load torchvision's IMAGENET1K_V1 weights (1000 classes, 224 px), in eval mode, from torch hub's cache or the web.

    A file is held against the first digits of its SHA-256, which are in its name, whenever it is read, and nothing in
    it is run. Raises StillroomError when there are none for `name`, when they are neither cached nor to be had, and
    when the cached file is not the published one.
    """
    published = {key: row.imagenet for key, row in NETWORKS.items() if row.imagenet}
    if name not in published:
        raise StillroomError(f"No ImageNet weights for network {name!r}." + suggest(name, published))
    model = build_network(name, classes=1000, image_size=224)
    weights = _models().get_model_weights(published[name])["IMAGENET1K_V1"]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    digits = re.search(r"-([0-9a-f]{8,})\.", cached.name)
    # torch checks them where it downloads the file, and never again
    if cached.exists() and (digits is None or not sha256_file(cached).startswith(digits[1])):
        raise StillroomError(
            f"{cached} is not the file that torchvision publishes: its SHA-256 does not begin as its name says. It is "
            "damaged, or another's: delete it, and it is fetched anew."
        )
    try:
        model.load_state_dict(weights.get_state_dict(progress=False, check_hash=True, weights_only=True))
    except pickle.UnpicklingError as error:
        raise StillroomError(
            f"{cached} holds code or other things beside weights, none of which was run: delete it, and it is fetched "
            "anew."
        ) from error
    except (URLError, OSError, RuntimeError) as error:
        raise StillroomError(
            f"Could not load the ImageNet weights of {name!r} ({error}). They are read from {torch.hub.get_dir()}"
            f"/checkpoints, or downloaded from {weights.url}: connect once, or put the file there."
        ) from error
    return model.eval()


def batchnorm_layers(model: nn.Module) -> list[tuple[str, nn.BatchNorm2d]]:
    """Every BatchNorm2d of `model`, timm's BatchNormAct2d included, as (qualified name, module) in module order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]


def end_size(model: nn.Module, image_size: int) -> int:
    """Side in px of the last feature map of `model` for square images of `image_size` px, before global pooling.

    Measured on a copy without data, as the side after the last convolution, norm or pool that is not adaptive. So a
    network that convolves after its global pooling (MobileNetV3) measures 1, and a transformer its grid of patches.
    """
    sides: list[int] = []
    shadow = copy.deepcopy(model).to("meta").eval()
    for module in shadow.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm | nn.AvgPool2d | nn.MaxPool2d):
            module.register_forward_hook(lambda module, args, output: sides.append(output.shape[-1]))
    _forward_without_data(shadow, image_size)
    return sides[-1]


@torch.no_grad()
def penultimate_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the last linear layer of `model` is given for `images`: float32 [batch, features], without a gradient.

    model: in eval mode, of the table, torchvision or timm, whose networks say themselves what comes before their
    logits. images: normalised, [batch, channels, side, side], on the model's device. Always computed in float32: what
    is selected or measured by features must not depend on who has fast bfloat16.
    Raises StillroomError in train mode, and for a network that does not end in a linear layer (SqueezeNet).
    """
    name, network = type(model).__name__, cast(Any, model)
    if model.training:
        raise StillroomError(f"{name} is in train mode, where features depend on the batch; call its eval() first.")
    with torch.autocast(images.device.type, enabled=False):
        if hasattr(model, "forward_head"):  # timm's
            return network.forward_head(network.forward_features(images.float()), pre_logits=True).flatten(1)
        latest: list[torch.Tensor] = []  # input and output of the linear layer that ran last

        def remember(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
            latest[:] = args[0], output

        linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        handles = [module.register_forward_hook(remember) for module in linear]
        try:
            logits = model(images.float())
        finally:
            for handle in handles:
                handle.remove()
    if not latest or latest[1] is not logits:
        raise StillroomError(
            f"{name} does not end in a linear layer, so it has no penultimate features; use another network."
        )
    return latest[0].flatten(1)


@torch.no_grad()
def _forward_without_data(shadow: nn.Module, image_size: int) -> Any:
    first = next(module for module in shadow.modules() if isinstance(module, nn.Conv2d))
    return shadow(torch.empty(2, first.in_channels, image_size, image_size, device="meta"))


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> nn.Conv2d:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def _models() -> Any:
    """torchvision.models, imported where a network is built: it takes seconds (torch's compiler comes with it)."""
    import torchvision

    return torchvision.models


def _resnet(name: str, classes: int, image_size: int, channels: int) -> nn.Module:
    model = _models().get_model(name, num_classes=classes)
    if image_size <= SMALL:
        model.conv1 = _convolution(channels, 64, 3, stride=1)
        model.maxpool = nn.Identity()
    elif channels != 3:
        model.conv1 = _convolution(channels, 64, 7, stride=2)
    return model


def _thin_resnet(blocks: int, classes: int, image_size: int, channels: int) -> nn.Module:
    """ResNet of half the width, `blocks` basic blocks a stage; torchvision's own takes no other width than 64."""
    widths = (32, 64, 128, 256)
    small = image_size <= SMALL
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["conv1"] = _convolution(channels, widths[0], 3 if small else 7, stride=1 if small else 2)
    layers["bn1"] = nn.BatchNorm2d(widths[0])
    layers["relu"] = nn.ReLU(inplace=True)
    layers["maxpool"] = nn.Identity() if small else nn.MaxPool2d(3, stride=2, padding=1)
    inputs = widths[0]
    for stage, width in enumerate(widths, start=1):
        members = []
        for _ in range(blocks):
            stride = 1 if inputs == width else 2
            shortcut = None
            if inputs != width:
                shortcut = nn.Sequential(_convolution(inputs, width, 1, stride), nn.BatchNorm2d(width))
            members.append(_models().resnet.BasicBlock(inputs, width, stride, shortcut))
            inputs = width
        layers[f"layer{stage}"] = nn.Sequential(*members)
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["fc"] = nn.Linear(inputs, classes)
    model = nn.Sequential(layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _mobilenet_v2(width: float, classes: int, image_size: int, channels: int) -> nn.Module:
    model = _models().mobilenet_v2(num_classes=classes, width_mult=width)
    stem = model.features[0]
    if channels != 3:
        stem[0] = _convolution(channels, stem[0].out_channels, 3, stride=2)
    if image_size <= SMALL:
        stem[0].stride = (1, 1)
        model.features[2].conv[1][0].stride = (1, 1)  # the depthwise convolution that opens the second stage
    return model


_EFFICIENTNET_B0 = (  # the EfficientNet paper's Table 1: expansion, kernel, stride, channels in, channels out, layers
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)


def _efficientnet_b0(width: float, classes: int, image_size: int, channels: int) -> nn.Module:
    library = _models().efficientnet
    stages = [library.MBConvConfig(*stage, width_mult=width) for stage in _EFFICIENTNET_B0]
    model = library.EfficientNet(stages, dropout=0.2, stochastic_depth_prob=0.2, num_classes=classes)
    stem = model.features[0]
    if channels != 3:
        stem[0] = _convolution(channels, stem[0].out_channels, 3, stride=2)
    if image_size <= SMALL:
        stem[0].stride = (1, 1)
    return model


def _shufflenet_v2(name: str, classes: int, image_size: int, channels: int) -> nn.Module:
    model = _models().get_model(name, num_classes=classes)
    if channels != 3:
        model.conv1[0] = _convolution(channels, model.conv1[0].out_channels, 3, stride=2)
    if image_size <= SMALL:
        model.conv1[0].stride = (1, 1)
        model.maxpool = nn.Identity()
    return model


def _convnet(norm: Callable[[int], nn.Module], width: int, classes: int, image_size: int, channels: int) -> nn.Module:
    depth = max(3, image_size.bit_length() - 3)  # one more for each doubling above 32 px
    layers: list[nn.Module] = []
    for inputs in (channels, *[width] * (depth - 1)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), norm(width), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
    head = nn.Linear(width * (image_size >> depth) ** 2, classes)
    return nn.Sequential(OrderedDict(features=nn.Sequential(*layers), flatten=nn.Flatten(), classifier=head))


def _instance_norm(width: int) -> nn.Module:
    return nn.GroupNorm(width, width)


# fmt: off
NETWORKS: dict[str, Network] = {                                                     # end sizes at 32, 64, 224 px
    "resnet18":             Network(partial(_resnet, "resnet18"),                     (4, 8, 7), "resnet18"),
    "resnet34":             Network(partial(_resnet, "resnet34"),                     (4, 8, 7), "resnet34"),
    "resnet50":             Network(partial(_resnet, "resnet50"),                     (4, 8, 7), "resnet50"),
    "resnet101":            Network(partial(_resnet, "resnet101"),                    (4, 8, 7), "resnet101"),
    "mobilenet_v2":         Network(partial(_mobilenet_v2, 1.0),                      (4, 8, 7), "mobilenet_v2"),
    "efficientnet_b0":      Network(partial(_efficientnet_b0, 1.0),                   (2, 4, 7), "efficientnet_b0"),
    "shufflenet_v2":        Network(partial(_shufflenet_v2, "shufflenet_v2_x1_0"),    (4, 8, 7), "shufflenet_v2_x1_0"),
    "convnet":              Network(partial(_convnet, nn.BatchNorm2d, 128),           (4, 4, 7)),
    "convnet_in":           Network(partial(_convnet, _instance_norm, 128),           (4, 4, 7)),
    "resnet10_thin":        Network(partial(_thin_resnet, 1),                         (4, 8, 7)),
    "resnet18_thin":        Network(partial(_thin_resnet, 2),                         (4, 8, 7)),
    "mobilenet_v2_thin":    Network(partial(_mobilenet_v2, 0.5),                      (4, 8, 7)),
    "efficientnet_b0_thin": Network(partial(_efficientnet_b0, 0.5),                   (2, 4, 7)),
    "shufflenet_v2_thin":   Network(partial(_shufflenet_v2, "shufflenet_v2_x0_5"),    (4, 8, 7)),
    "convnet_thin":         Network(partial(_convnet, nn.BatchNorm2d, 64),            (4, 4, 7)),
}
# fmt: on


def _find_in_libraries(name: str) -> Callable[[int, int, int], nn.Module]:
    library, _, bare = name.rpartition(":")
    if library not in ("", "torchvision", "timm"):
        choices = ["torchvision", "timm"]
        raise StillroomError(f"Unknown library {library!r} in network {name!r}." + suggest(library, choices))
    known = set() if library else set(NETWORKS)
    if library != "timm":
        names = _models().list_models(module=_models())  # classifiers: not detection, video, ...
        if bare in names:
            return partial(_from_torchvision, bare)
        known.update(names)
    if library != "torchvision":
        import timm  # slow to import, and needed for its own networks only

        if timm.is_model(bare):
            return partial(_from_timm, bare)
        known.update(timm.list_models())
    near = difflib.get_close_matches(bare, sorted(known))  # the libraries hold more names than an error should list
    raise StillroomError(f"Unknown network {name!r}." + suggest(bare, near or NETWORKS))


def _from_torchvision(name: str, classes: int, image_size: int, channels: int) -> nn.Module:
    if channels != 3:
        raise StillroomError(f"channels={channels}: torchvision:{name} takes 3; use timm or a network of the table.")
    return _checked(_models().get_model(name, num_classes=classes), f"torchvision:{name}", classes, image_size)


def _from_timm(name: str, classes: int, image_size: int, channels: int) -> nn.Module:
    import timm

    facts = timm.get_pretrained_cfg(name, allow_unregistered=True)
    size: dict[str, Any] = {"img_size": image_size} if facts is not None and facts.fixed_input_size else {}
    model = timm.create_model(name, pretrained=False, num_classes=classes, in_chans=channels, **size)
    return _checked(model, f"timm:{name}", classes, image_size)


def _checked(model: nn.Module, name: str, classes: int, image_size: int) -> nn.Module:
    """Refuse now, not in an hour, what cannot train as a classifier of such images."""
    try:
        output = _forward_without_data(copy.deepcopy(model).to("meta"), image_size)
    except Exception as error:
        raise StillroomError(
            f"Network {name!r} does not take image_size={image_size} px ({error}). Choose another size or network."
        ) from error
    if not isinstance(output, torch.Tensor) or output.shape != (2, classes):
        raise StillroomError(f"Network {name!r} does not return [batch, {classes}] in train mode. Choose another one.")
    return model
