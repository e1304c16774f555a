"""Batches for split_learning.py: which come, and how they are cropped and mirrored, depends on seed and epoch alone."""

import pathlib

import torch

import image_data

TEST_BATCH = 500
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MemoryImages:
    """A data set held in memory: mirrored at random and, with `crop`, shifted by up to that many pixels.

    ids: name a sample and its mirror image apart, since their activations differ.
    """

    def __init__(self, data, batch_size, seed, crop=0):
        self.data, self.batch_size, self.seed, self.crop = data, batch_size, seed, crop
        count = len(data.train_images)
        # A last batch of one image would have no variance to be normalised by.
        self.steps_per_epoch = count // batch_size + (count % batch_size > 1)
        self.test_count = len(data.test_images)

    def train_batches(self, epoch, first, last):
        """(images, labels, ids) of the epoch's batches from number `first` to before `last`."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        count = len(self.data.train_images)
        order = torch.randperm(count, generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        shifts = torch.randint(0, 2 * self.crop + 1, (count, 2), generator=generator)
        for number in range(first, last):
            index = order[number * self.batch_size : (number + 1) * self.batch_size]
            images, mirror = self._shifted(self.data.train_images[index], shifts[index]), mirrored[index]
            images[mirror] = images[mirror].flip(3)
            yield self.data.normalised(images), self.data.train_labels[index], 2 * index + mirror

    def _shifted(self, images, shifts):
        if not self.crop:
            return images
        height, width = images.shape[2:]
        padded = torch.nn.functional.pad(images, (self.crop,) * 4)
        rows, columns = (shifts[:, axis, None] + torch.arange(size) for axis, size in ((0, height), (1, width)))
        batch = torch.arange(len(images))[:, None, None]
        return padded[batch, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()

    def test_batches(self):
        for first in range(0, self.test_count, TEST_BATCH):
            part = slice(first, first + TEST_BATCH)
            yield self.data.normalised(self.data.test_images[part]), self.data.test_labels[part]


class FolderImages:
    """An image folder read as it is needed, with ImageNet's crops: PATH/train/CLASS/* and PATH/val/CLASS/*."""

    def __init__(self, path, size, batch_size, seed, limit_train=None, limit_test=None, workers=0):
        from torchvision import datasets, transforms

        root = pathlib.Path(path)
        for part in ("train", "val"):
            if not (root / part).is_dir():
                raise image_data.DataError(f"--path {path}: has no folder {part}/")
        usual = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_DEVIATION)]
        random_crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
        centre = [transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)]
        try:
            train = datasets.ImageFolder(root / "train", transforms.Compose(random_crop + usual))
            test = datasets.ImageFolder(root / "val", transforms.Compose(centre + usual))
        except FileNotFoundError as error:
            raise image_data.DataError(f"--path {path}: {str(error).splitlines()[0]}") from error
        self.train, self.test, self.batch_size, self.seed, self.workers = train, test, batch_size, seed, workers
        self.train_count = min(len(train), limit_train or len(train))
        self.test_count = min(len(test), limit_test or len(test))
        self.steps_per_epoch = self.train_count // batch_size + (self.train_count % batch_size > 1)

    def train_batches(self, epoch, first, last):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.train), generator=generator)[: self.train_count]
        batches = order.split(self.batch_size)[first:last]
        seeded = Seeded(self.train, self.seed * 1_000_003 + epoch)
        loader = torch.utils.data.DataLoader(
            seeded, batch_sampler=[b.tolist() for b in batches], num_workers=self.workers
        )
        for (images, labels), ids in zip(loader, batches, strict=True):
            yield images, labels, ids

    def test_batches(self):
        test = torch.utils.data.Subset(self.test, range(self.test_count))
        yield from torch.utils.data.DataLoader(test, 100, num_workers=self.workers)


class Seeded(torch.utils.data.Dataset):
    """A data set whose random crops depend on epoch and index alone, in whichever process they are made."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, index):
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed * 2_000_003 + index)
            return self.dataset[index]

    def __len__(self):
        return len(self.dataset)


def load(arch, path, batch_size, seed, limit_train=None, limit_test=None, workers=0):
    """The arch's data set from `path`; any of them may also be a folder with train/ and val/."""
    folder = arch.dataset == "folder" or (path and (pathlib.Path(path) / "train").is_dir())
    if folder:
        if path is None:
            raise image_data.DataError("--path: got none, expected an image folder with train/ and val/")
        return FolderImages(path, arch.image_shape[1], batch_size, seed, limit_train, limit_test, workers)
    image_data.download_if_missing(arch.dataset, path)
    data = image_data.load(arch.dataset, path, None, limit_train, limit_test)
    return MemoryImages(data, batch_size, seed, crop=4 if arch.dataset.startswith("cifar") else 0)
