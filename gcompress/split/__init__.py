"""Split learning: a client has the data and a model's first layers, a server has the rest.

The client sends activations, and the server sends their gradients back. Both are compressed:

    head, tail = split.cut(model, "layer2")

    # client                                      # server
    link = split.Link("server:50051", …)          server = split.SplitServer(tail, shape=(128, 28, 28), …)
    client = split.SplitClient(head, link, …)     server.listen("0.0.0.0:50051", …)
    loss = client(images, labels)                 server.wait()
    loss.backward()
    optimizer.step()

Vepakomma et al. (arXiv 1812.00564); SplitFed: Thapa et al. (arXiv 2004.12088). Needs
`pip install gcompress[split]`. Activations are not private: the server can learn much about
the inputs from them.
"""

try:
    import google_crc32c  # noqa: F401
    import grpc  # noqa: F401
except ImportError as error:
    raise ImportError(f"{error}; gcompress.split needs more than gcompress: pip install 'gcompress[split]'") from None

from .agreement import Agreement
from .checkpoint import Checkpoints
from .client import SplitClient
from .codec import Stats
from .cut import activation_shape, cut
from .link import Link
from .rounds import Sequential, SplitFed
from .security import make_certificates
from .server import SplitServer

__all__ = [
    "Agreement",
    "Checkpoints",
    "Link",
    "Sequential",
    "SplitClient",
    "SplitFed",
    "SplitServer",
    "Stats",
    "activation_shape",
    "cut",
    "make_certificates",
]
