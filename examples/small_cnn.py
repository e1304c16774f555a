"""The examples' own network."""

import torch


class SmallConvNet(torch.nn.Module):
    """Two convolutions and two linear layers: 307,978 parameters for ten classes of 28 x 28 grey images."""

    def __init__(self, channels, classes):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(channels, 16, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(16, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            # Images of 28 x 28 are 7 x 7 here already; larger ones are averaged down to it.
            torch.nn.AdaptiveAvgPool2d(7),
        )
        self.classifier = torch.nn.Sequential(
            torch.nn.Flatten(),
            torch.nn.Linear(32 * 7 * 7, 192),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.25),
            torch.nn.Linear(192, classes),
        )

    def forward(self, images):
        return self.classifier(self.features(images))
