"""The interfaces of the parts of a model and of its data: what a class of one's own must have, and what it may have.

Members of a Protocol are required where a config names such a part. A Protocol named Optional... lists members that
code asks for by `getattr` or `hasattr`: a class without them works, and does without what their comment says. The
interfaces of the other parts are next to what uses them: Schedule (diffusion/schedule.py), Metric and FeatureNet
(metrics/), Adapter (checkpoint/load.py), Recipe (recipes/recipe.py), Logger (training/loggers.py). Samplers, guidance,
tasks and densities of times are functions; their types are Sampler, Guidance, Task and Times.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ldm.condition import Condition
from ldm.data.stream import Samples
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.schedule import Schedule
from ldm.tensors import KeyedNoise


class Network(Protocol):
    """A denoising network, an nn.Module: `net`.

    Its constructor gets those of in_channels, out_channels (twice as many for a learned variance), context_dim,
    vector_dim (None without) and concat_channels that its signature names.
    """

    def forward(self, x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        """Return (B, out_channels, ...) for x (B, in_channels, ...), images or not, and the schedule's net_time t (B,).

        cond.context is (B, L, context_dim), cond.mask (B, L) or None, cond.vector (B, vector_dim), cond.concat (B,
        concat_channels, h, w).
        """
        ...


class OptionalNetwork(Protocol):
    """What a Network may have besides.

    With `embed` and `memory`, and a forward that takes their results as emb= and memory=, what all sampling steps share
    is computed once (net/inference.py); GuidanceEmbedding needs them too.  A ControlNet needs a U-Net's `encode`.
    """

    has_unused_parameters: bool  # whether a step may leave a parameter without gradient: DDP then searches for them
    # the sides of x besides its channels, of a network that takes no other number of them; or a static method that
    # returns it for the options in the config, of which it names the one that decides first
    spatial_dims: int | Callable[..., int]

    def embed(self, t: Tensor, cond: Condition) -> Tensor: ...
    def memory(self, cond: Condition) -> Any: ...
    def encode(self, h: Tensor, emb: Tensor, cursor: Any, /) -> Any: ...


class Encoder(Protocol):
    """The encoder of a first stage, an nn.Module: `autoencoder.encoder`; its constructor may name `channels`."""

    def forward(self, image: Tensor) -> Tensor:
        """Return the moments of images (B, channels, H, W) in [-1, 1].

        (B, 2 z_channels, H / factor, W / factor) in AutoencoderKL, mean and log-variance; (B, z_channels, ...) in
        AutoencoderVQ.
        """
        ...


class Decoder(Protocol):
    """The decoder of a first stage, an nn.Module: `autoencoder.decoder`; its constructor may name `channels`."""

    @property
    def last_layer(self) -> Tensor:
        """The last weight, whose gradients balance the reconstruction and adversarial losses."""
        ...

    def forward(self, z: Tensor) -> Tensor:
        """Return images (B, channels, H, W) of latents (B, z_channels, H / factor, W / factor)."""
        ...


class Conditioner(Protocol):
    """What turns a batch into a Condition, an nn.Module: `conditioner`.

    Its constructor gets those of num_classes, image_channels, factor, z_channels and encode (image -> z) that its
    signature names.
    keys: the keys of the batch that it reads; without one of them the null condition is used.
    context_dim, vector_dim: of the Condition's fields, None for a field that is not used.  concat_channels: 0 likewise.
    """

    keys: tuple[str, ...]
    context_dim: int | None
    vector_dim: int | None
    concat_channels: int

    def forward(self, batch: dict[str, Any]) -> Condition:
        """Return the condition of a batch of B rows."""
        ...

    def null(self, batch: dict[str, Any]) -> Condition:
        """Return the condition of no condition, with the same fields, for as many rows as the batch has.

        The batch may hold no more than `noise`, KeyedNoise of B rows (conditioner/rows.py:num_rows).
        """
        ...


class OptionalConditioner(Protocol):
    """What a Conditioner may have besides."""

    needs: tuple[str, ...]  # keys without which the null condition is used, where these are not `keys`
    reads: tuple[str, ...]  # further keys that it reads if they are there
    requires: Mapping[str, str]  # keys that training data must have -> an option that adds the key to their batches
    words: tuple[str, ...]  # placeholder tokens that textual inversion taught it
    conditioners: Mapping[str, Any]  # the conditioners that it consists of, by name
    cache: Any  # of a text encoder's features, as in conditioner/text.py, for textual inversion and export
    number: int  # of the hints that it adds

    def load_files(self, folder: Path) -> None: ...  # reads what it has in the run folder, when a run is loaded


class Objective(Protocol):
    """What is minimised, an nn.Module: `objective`."""

    def forward(
        self, denoiser: Denoiser, x0: Tensor, cond: Condition, noise: KeyedNoise, batch: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return terms (B,) of which `loss` is minimised; `t`, the times, splits the loss by time in the log."""
        ...


class OptionalObjective(Protocol):
    """What an Objective may have besides: `draw` and `loss_at` for validation, reports, and objectives that wrap it."""

    keys: tuple[str, ...]  # ("image",) for pixels in the batch
    has_unused_parameters: bool
    times: Any  # the density of the times, which validation replaces

    def draw(self, noise: KeyedNoise, x0: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]: ...
    def loss_at(self, denoiser: Denoiser, x0: Tensor, cond: Condition, t: Tensor, eps: Tensor) -> dict[str, Tensor]: ...


class OptionalSchedule(Protocol):
    """What a Schedule may have besides."""

    T: int  # number of entries, for discrete times, the variational bound and the grids `trailing` and `leading`
    alpha_bar: Tensor  # (T,), for export to diffusers


class Dataset(Samples, Protocol):
    """A data set: `data`; its constructor gets split="train" or "test".  InMemoryDataset and LazyDataset are two.

    Latents are cached under its fingerprint, the identity of pixels and labels.
    """

    def __len__(self) -> int: ...

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Return a batch without `image`."""
        ...

    def pixels(self, index: Sequence[int]) -> Tensor:
        """Return samples (B, *shape) float32 in [-1, 1], never flipped."""
        ...


class OptionalDataset(Protocol):
    """What a data set may have besides."""

    resolved_config: Mapping[str, Any]  # keys of `data` that the files decide, such as a content hash
    summary: str  # what was found, printed with an estimate of the training time
    unlabelled: int  # number of samples without a label
    held_out: int  # number of samples of split="test" that are not trained on
    medium: str  # what a sample is to a person, see media/medium.py; image without
    rate: float  # frames per second of a clip
    shapes: Sequence[tuple[int, int]]  # of images of several shapes, whose parts `joined` joins
    parts: Sequence[Any]

    def all_captions(self) -> Sequence[str]: ...  # each once, for text features that are computed ahead
    def to_buckets(self, multiple: int) -> Any: ...
    def joined(self, moments: Sequence[Tensor]) -> Any: ...
    def stream(self, batch: int, steps: int, seed: int, start: int, rank: int, world: int) -> Any: ...


def required_members(protocol: type) -> list[str]:
    """Return the names of the members that a Protocol and those that it extends require, annotated attributes first."""
    bases = [base for base in reversed(protocol.__mro__) if getattr(base, "_is_protocol", False)]
    attributes = {name for base in bases for name in vars(base).get("__annotations__", {})}
    methods = {name: None for base in bases for name in vars(base) if not name.startswith("_") or name == "__len__"}
    return [*sorted(attributes), *methods]


def missing_members(part: Any, protocol: type) -> list[str]:
    """Return the names of the members of a Protocol that an object, or a class, lacks."""
    return [name for name in required_members(protocol) if not hasattr(part, name)]
