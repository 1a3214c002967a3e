"""What each kind of worker is told when it starts. Frozen; composed once by the cluster."""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.types import MediaOptions

DTYPES = ("bfloat16", "float32", "float64")
ATTENTION_FORMS = ("plain", "paged", "varlen")
EXPERTS_FORMS = ("loop", "grouped", "native")


def _require_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{owner}.{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessorConfig:
    """A CPU worker that turns messages into token ids and patches."""

    model_dir: str
    workers: int = 2
    """Requests processed at once, one thread each."""
    patch_bytes: int = 2 << 30
    """Budget for patches, kept and in the making; what does not fit waits before it is decoded."""
    media: MediaOptions = field(default_factory=MediaOptions)
    """Over the model directory's own settings; a request and its parts go over these."""

    def __post_init__(self) -> None:
        _require_positive("PreprocessorConfig", workers=self.workers, patch_bytes=self.patch_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionEncoderConfig:
    """A worker that holds the vision tower and the resampler."""

    model_dir: str
    encoder_id: str
    dtype: str
    """One of ``DTYPES``."""
    device: str = "cpu"
    max_batch_patches: int = 16_384
    """Patches of one forward pass; a larger unit goes alone."""
    patch_window_bytes: int = 64_000_000
    """Patches being pulled or waiting for their batch; a larger unit goes alone."""
    embedding_bytes: int = 2 << 30
    """Budget for embeddings, in the making, leased and cached together."""
    cache_bytes: int = 1 << 30
    """How much of it embeddings without a lease may take."""
    pull_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"VisionEncoderConfig.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        _require_positive(
            "VisionEncoderConfig",
            max_batch_patches=self.max_batch_patches,
            patch_window_bytes=self.patch_window_bytes,
            embedding_bytes=self.embedding_bytes,
            pull_timeout_s=self.pull_timeout_s,
        )
        if self.cache_bytes < 0:
            raise ValueError(f"VisionEncoderConfig.cache_bytes must not be negative, got {self.cache_bytes}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineReplicaConfig:
    """A worker that holds the language model and serves one role at a time."""

    model_dir: str
    pool: str
    """Engine pool it belongs to, as the planner knows it."""
    dtype: str
    """One of ``DTYPES``."""
    compat: str = "original"
    """``original`` or ``transformers``: whose routing and position rules apply."""
    device: str = "cpu"
    ranks: int = 1
    """Processes that share the experts, the replica's own among them."""
    rebalance_steps: int = 1000
    """Steps with tokens after which the experts of a group may change ranks; 0 leaves them where they are."""
    max_model_len: int | None = None
    """Longest prompt and reply together; the checkpoint's own when None."""
    block_size: int = 16
    max_num_seqs: int = 64
    max_batched_tokens: int = 2048
    max_waiting: int = 256
    prefix_caching: bool = True
    """KV of finished prompts and replies is kept while there is room and found again by what it holds."""
    kv_cache_gib: float | None = None
    """Size of the KV cache. None takes what ``gpu_memory_utilization`` leaves of a GPU, a share of the free memory on a
    CPU.
    """
    gpu_memory_utilization: float = 0.9
    attention: str | None = None
    """One of ``ATTENTION_FORMS``; None takes the fastest there is."""
    experts: str | None = None
    """One of ``EXPERTS_FORMS``; None takes the fastest there is."""
    cuda_graphs: bool | None = None
    """Decode steps as CUDA graphs; None where they can run."""
    media_window_bytes: int = 64_000_000
    """Embeddings held ahead of use."""
    media_cache_bytes: int = 64_000_000
    """Embeddings pulled lately, for other prompts with the same media."""
    drain_timeout_s: float = 30.0
    """Time running attempts have to finish when the replica stops."""
    role_drain_s: float = 5.0
    """Likewise when it changes its role."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"EngineReplicaConfig.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.compat not in ("original", "transformers"):
            raise ValueError(f"EngineReplicaConfig.compat must be original or transformers, got {self.compat!r}")
        for name, value, known in (
            ("attention", self.attention, ATTENTION_FORMS),
            ("experts", self.experts, EXPERTS_FORMS),
        ):
            if value is not None and value not in known:
                raise ValueError(f"EngineReplicaConfig.{name} must be one of {', '.join(known)}, got {value!r}")
        _require_positive(
            "EngineReplicaConfig",
            ranks=self.ranks,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_batched_tokens=self.max_batched_tokens,
            max_waiting=self.max_waiting,
            media_window_bytes=self.media_window_bytes,
            media_cache_bytes=self.media_cache_bytes,
        )
        if self.rebalance_steps < 0:
            raise ValueError(f"EngineReplicaConfig.rebalance_steps must not be negative, got {self.rebalance_steps}")
