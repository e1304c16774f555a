"""The models of split_learning.py, where they may be cut, and how each is trained."""

import collections
import dataclasses

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Arch:
    """A model with its data set and training; both halves are trained alike.

    build: function of nothing, returns the model. cuts: {depth: name of the last submodule at
    the client}. image_shape: of one input. schedule: ("cosine",), or (factor, epochs at which
    the learning rate is multiplied by it).
    """

    build: object
    dataset: str
    image_shape: tuple
    cuts: dict
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    schedule: tuple = ("cosine",)
    momentum: float = 0.9

    def optimizer(self, parameters):
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def scheduler(self, optimizer):
        """To be stepped once an epoch."""
        if self.schedule == ("cosine",):
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        factor, *milestones = self.schedule
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, factor)


def residual_network(channels, width, blocks, classes, stride):
    """A residual network of basic blocks with a 3 x 3 convolution in front, for small images."""
    from torchvision.models.resnet import BasicBlock

    def stage(entering, leaving, count, stride):
        shortcut = None
        if stride != 1 or entering != leaving:
            shortcut = nn.Sequential(nn.Conv2d(entering, leaving, 1, stride, bias=False), nn.BatchNorm2d(leaving))
        first = BasicBlock(entering, leaving, stride, shortcut)
        return nn.Sequential(first, *[BasicBlock(leaving, leaving) for _ in range(count - 1)])

    layers = collections.OrderedDict()
    convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    layers["stem"] = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())
    for number, count in enumerate(blocks):
        entering, leaving = width << max(0, number - 1), width << number
        layers[f"layer{number + 1}"] = stage(entering, leaving, count, 2 if number else 1)
    layers["pool"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["fc"] = nn.Linear(width << (len(blocks) - 1), classes)
    return nn.Sequential(layers)


def small_network(channels=1, classes=10):
    """Three convolutions and two linear layers: 426,234 parameters for grey images of 28 x 28."""

    def convolution(entering, leaving):
        return [nn.Conv2d(entering, leaving, 3, padding=1, bias=False), nn.BatchNorm2d(leaving), nn.ReLU()]

    layers = [*convolution(channels, 16), nn.MaxPool2d(2), *convolution(16, 32), nn.MaxPool2d(2), *convolution(32, 64)]
    layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Dropout(0.25), nn.Linear(128, classes)]
    return nn.Sequential(*layers)


def vgg19(classes):
    """VGG19 with batch normalisation for images of 32 x 32: one linear layer behind 16 convolutions."""
    from torchvision.models import vgg

    layers = {"features": vgg.make_layers(vgg.cfgs["E"], batch_norm=True), "flatten": nn.Flatten()}
    return nn.Sequential(collections.OrderedDict(layers, fc=nn.Linear(512, classes)))


def resnet34():
    from torchvision import models

    return models.resnet34(weights=None)


RESIDUAL_CUTS = {"shallow": "layer1.0", "medium": "layer2", "deep": "layer3"}
ARCHS = {
    "vgg19_cifar10": Arch(
        build=lambda: vgg19(10),
        dataset="cifar10",
        image_shape=(3, 32, 32),
        # After convolution 2 and its pooling, 8 and its pooling, 15.
        cuts={"shallow": "features.6", "medium": "features.26", "deep": "features.48"},
        epochs=200,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=5e-4,
    ),
    "res18_cifar100": Arch(
        build=lambda: residual_network(3, 64, (2, 2, 2, 2), 100, stride=1),
        dataset="cifar100",
        image_shape=(3, 32, 32),
        cuts=RESIDUAL_CUTS,  # shallow: the first block with its skip, which a cut after layer 2 would tear
        epochs=200,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=5e-4,
        schedule=(0.2, 60, 120, 160),
    ),
    "res34_imagenet": Arch(
        build=resnet34,
        dataset="folder",
        image_shape=(3, 224, 224),
        cuts=RESIDUAL_CUTS,
        epochs=90,
        batch_size=128,
        learning_rate=0.1,
        weight_decay=1e-4,
        schedule=(0.1, 30, 60),
    ),
    "cnn_fashion": Arch(
        build=small_network,
        dataset="fashion-mnist",
        image_shape=(1, 28, 28),
        cuts={"shallow": "3", "medium": "7", "deep": "10"},
        epochs=3,
        batch_size=64,
        learning_rate=0.05,
        weight_decay=5e-4,
    ),
    "res18_fashion": Arch(
        build=lambda: residual_network(1, 16, (2, 2, 2, 2), 10, stride=2),
        dataset="fashion-mnist",
        image_shape=(1, 28, 28),
        cuts=RESIDUAL_CUTS,
        epochs=3,
        batch_size=64,
        learning_rate=0.05,
        weight_decay=5e-4,
    ),
}
