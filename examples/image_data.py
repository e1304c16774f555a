"""Image data sets for train.py, held in memory as uint8 tensors of shape (images, channels, height, width).

There are no loader processes: where several ranks share few cores, indexing a tensor is faster than
handing batches from process to process.
"""

import dataclasses
import gzip
import pathlib

import numpy as np
import torch

NAMES = ("fashion-mnist", "cifar10", "cifar100", "folder")
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
FASHION_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# Where `make data` puts Fashion-MNIST, where Debian's package does, where torchvision's download does.
FASHION_PLACES = (
    pathlib.Path("data/fashion-mnist"),
    REPOSITORY / "data/fashion-mnist",
    pathlib.Path("/usr/share/datasets/fashion-mnist"),
    pathlib.Path("data/FashionMNIST/raw"),
)
FOLDER_IMAGE_SIZE = 64


class DataError(ValueError):
    """A data set that is missing or is not what its name says."""


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A training and a test set.

    Images are uint8 of shape (images, channels, height, width), labels int64 of shape (images,),
    `mean` and `deviation` float32 of shape (1, channels, 1, 1) in units of the uint8 values.
    """

    name: str
    classes: int
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor

    @property
    def image_shape(self):
        """(channels, height, width)"""
        return tuple(self.train_images.shape[1:])

    def normalised(self, images):
        """uint8 images as float32 of mean 0 and deviation 1 per channel."""
        return (images.float() - self.mean) / self.deviation


def read_idx(path):
    """Read one file in the IDX format of the MNIST family, plain or gzip-compressed.

    Args:
        path: the file; its name ends with `.gz` if it is compressed.

    Returns:
        A numpy uint8 array of the shape that the file declares.

    References:
        The MNIST database's description of its files (two zero bytes, the type 0x08 for uint8, the number
        of dimensions, each dimension as a big-endian uint32, then the entries).
    """
    path = pathlib.Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a complete gzip file ({error})") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise DataError(f"{path}: not an IDX file: it begins with {content[:4].hex()!r}, expected '0000'")
    kind, dimensions = content[2], content[3]
    if kind != 0x08:
        raise DataError(f"{path}: expected entries of IDX type 0x08 (uint8), found 0x{kind:02x}")
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise DataError(f"{path}: ends within its header of {header} bytes")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise DataError(f"{path}: shape {shape} needs {expected} bytes, the file has {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def find_idx(folder, stem):
    """The file `stem` or `stem.gz` in `folder`, or None."""
    candidates = (pathlib.Path(folder) / name for name in (stem, f"{stem}.gz"))
    return next((path for path in candidates if path.is_file()), None)


def has_fashion_mnist(folder):
    return all(find_idx(folder, stem) for stems in FASHION_FILES.values() for stem in stems)


def read_fashion_mnist(folder, part):
    """Read the "train" or the "test" part of Fashion-MNIST: (images of 28 x 28, labels below 10)."""
    paths = []
    for stem in FASHION_FILES[part]:
        path = find_idx(folder, stem)
        if path is None:
            raise DataError(f"{folder}: has neither {stem} nor {stem}.gz")
        paths.append(path)
    images, labels = map(read_idx, paths)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise DataError(f"{paths[0]}: expected images of shape (n, 28, 28), found {images.shape}")
    if labels.shape != images.shape[:1]:
        raise DataError(f"{paths[1]}: expected labels of shape ({len(images)},), found {labels.shape}")
    if labels.size and labels.max() > 9:
        raise DataError(f"{paths[1]}: expected labels from 0 to 9, found {labels.max()}")
    return torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def fashion_folder(path):
    """The folder to read Fashion-MNIST from: `path` if given, else the first place that has it, or None."""
    if path is not None:
        if not pathlib.Path(path).is_dir():
            raise DataError(f"--data {path}: no such folder")
        return pathlib.Path(path)
    return next((place for place in FASHION_PLACES if has_fashion_mnist(place)), None)


def download_if_missing(name, path):
    """Let torchvision download what is not on this machine. Call it on one rank of each machine only."""
    if name == "fashion-mnist":
        if fashion_folder(path) is None:
            _torchvision("FashionMNIST", "data", download=True)
    elif name in ("cifar10", "cifar100"):
        _torchvision(name.upper(), path or "data", download=True)


def _torchvision(class_name, root, **kwargs):
    """A torchvision data set, its complaints as a DataError of one sentence."""
    from torchvision import datasets

    try:
        return getattr(datasets, class_name)(root, **kwargs)
    except (RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{class_name} is not in {root} and could not be downloaded: {reason}") from error


def _load_fashion_mnist(path):
    folder = fashion_folder(path)
    if folder is None:
        places = ", ".join(str(place) for place in FASHION_PLACES)
        raise DataError(f"Fashion-MNIST is in none of {places}: run `make data` or give --data FOLDER")
    return 10, read_fashion_mnist(folder, "train"), read_fashion_mnist(folder, "test")


def _load_cifar(name, path):
    parts = []
    for train in (True, False):
        part = _torchvision(name.upper(), path or "data", train=train)
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        parts.append((images, torch.tensor(part.targets)))
    return int(name.removeprefix("cifar")), *parts


def _load_folder(path, image_size):
    """An image folder: PATH/train/CLASS/*.jpg and PATH/val/CLASS/*.jpg, resized and cropped to squares."""
    from torchvision import datasets, transforms

    if path is None:
        raise DataError("--dataset folder: expected --data FOLDER with train/ and val/ in it")
    size = image_size or FOLDER_IMAGE_SIZE
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    parts, classes = [], []
    for part in ("train", "val"):
        root = pathlib.Path(path) / part
        if not root.is_dir():
            raise DataError(f"--data {path}: has no folder {part}/")
        try:
            folder = datasets.ImageFolder(root, transforms.Compose(steps))
        except FileNotFoundError as error:
            raise DataError(f"{root}: {str(error).splitlines()[0]}") from error
        classes.append(folder.classes)
        parts.append((torch.stack([image for image, _ in folder]), torch.tensor(folder.targets)))
    if classes[0] != classes[1]:
        raise DataError(f"--data {path}: train/ has classes {classes[0]}, val/ has {classes[1]}")
    return len(classes[0]), *parts


def _mean_and_deviation(images):
    """Mean and standard deviation per channel, from counts of the 256 values: exact, and no float copy."""
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        mean = (counts * values).sum() / counts.sum()
        variance = (counts * (values - mean) ** 2).sum() / counts.sum()
        means.append(mean)
        # A channel of one constant value would divide by zero.
        deviations.append(variance.sqrt().clamp(min=1.0))
    return (torch.stack(column).float().view(1, -1, 1, 1) for column in (means, deviations))


def load(name, path=None, image_size=None, limit_train=None, limit_test=None):
    """Read a data set into memory.

    Args:
        name: one of NAMES.
        path: where it is; None for the usual places.
        image_size: for "folder", the side in pixels that images are resized and cropped to.
        limit_train, limit_test: keep only that many images of each part.

    Returns:
        An ImageData.
    """
    if name == "fashion-mnist":
        classes, train, test = _load_fashion_mnist(path)
    elif name in ("cifar10", "cifar100"):
        classes, train, test = _load_cifar(name, path)
    else:
        classes, train, test = _load_folder(path, image_size)
    mean, deviation = _mean_and_deviation(train[0])
    train = [tensor[:limit_train] for tensor in train]
    test = [tensor[:limit_test] for tensor in test]
    return ImageData(name, classes, *train, *test, mean, deviation)
