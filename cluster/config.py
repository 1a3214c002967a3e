"""The whole cluster in one description, read by ``ernie serve`` and by ``serve deploy`` alike.

Every error names the path of the field. What a field leaves open (``None`` or ``auto``) is settled once, by
``resolve``, from the accelerators at hand; the parts only ever see settled values.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from actors.processing.config import ProcessingLimits
from actors.processing.parser_names import ReasoningParserName, ToolCallParserName
from actors.types import EngineRole, MediaOptions
from cluster.config_base import Amount, Count, Gpus, Port, Seconds, Section, settled
from cluster.config_scaling import (
    Autoscaling,
    EngineAutoscaling,
    PreprocessorAutoscaling,
    RoleMoves,
    Slo,
    VisionEncoderAutoscaling,
    check_initial,
)

Compat = Literal["original", "transformers"]
DType = Literal["auto", "bfloat16", "float32", "float64"]
Placement = Literal["pack", "strict_pack", "spread", "strict_spread"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
LogFormat = Literal["text", "json"]


LOOPBACK = "127.0.0.1"
LOOPBACK_HOSTS = (LOOPBACK, "localhost", "::1")

ROUTERS, PLANNERS, PREPROCESSORS, VISION_ENCODERS = "router", "planner", "preprocessor", "vision_encoder"
POOL_NAMES_TAKEN = (ROUTERS, PLANNERS, PREPROCESSORS, VISION_ENCODERS)

NANO, RANDOM = "nano", "random"
"""Names of the built-in models. A directory called so is written ``./nano``."""

ENGINE_GPU_SHARE = 0.75
ENCODER_GPU_SHARE = 0.25
BLOCK_SIZE = 16
GPU_BLOCK_SIZE = 256
"""FlashAttention 2, which torch brings, reads pages of a multiple of this by block table."""
BATCHED_TOKENS = 1024
GPU_BATCHED_TOKENS = 2048


class Pool(Section):
    """What all pools say of where their replicas run."""

    node_labels: dict[str, str] = Field(default_factory=dict)
    """Only on nodes with these labels. Values as in Ray's label selectors: ``a100``, ``!a100``, ``in(a100, h100)``."""


class RouterPool(Pool):
    """Routers: the public face. ``max_active`` requests are admitted at once, the next is refused as overload."""

    replicas: Count = 1
    max_active: Count = 1024
    num_cpus: Amount = 0.5
    suspect_after_s: Seconds = 1.0
    """A part that is silent for so long gets nothing new."""
    lost_after_s: Seconds = 3.0
    """After so long its requests go on elsewhere."""
    retry_share: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Work done again because a part was lost, as a share of the requests admitted; more of it waits."""
    retry_burst: Count = 256
    """Of it, saved up at most."""
    alone_tokens: Annotated[int, Field(ge=0)] = 512
    """The most that an engine with the role decode computes of a prompt itself, where that is shorter than a transfer;
    pictures and videos it must have cached. 0: every prompt goes through an engine that prefills."""

    @field_validator("replicas")
    @classmethod
    def _one(cls, replicas: int) -> int:
        if replicas != 1:
            raise ValueError("more than one router is not built yet")
        return replicas

    @model_validator(mode="after")
    def _suspicion_comes_first(self) -> Self:
        if self.suspect_after_s > self.lost_after_s:
            raise ValueError(f"suspect_after_s {self.suspect_after_s:g} is over lost_after_s {self.lost_after_s:g}")
        return self


class EqualPool(Pool):
    """Replicas that all do the same, as many as are said or as the load asks for."""

    replicas: Count = 1
    autoscaling: Autoscaling | None = None

    @model_validator(mode="after")
    def _initial(self) -> Self:
        check_initial(self.replicas, self.autoscaling, "replicas")
        return self

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas


class PreprocessorPool(EqualPool):
    """Preprocessors: media and text to token ids and patches, on CPUs."""

    autoscaling: PreprocessorAutoscaling | None = None
    num_cpus: Amount = 1.0
    concurrency: Count = 2
    """Requests decoded at once; others wait."""
    max_ongoing: Count = 256
    """Requests accepted at once, waiting ones included."""
    patch_bytes: Count = 2 << 30
    """Patches kept for pulling; what does not fit waits before it is decoded."""
    hedge_after_s: Seconds = 2.0
    """A request that is not answered by then is sent to another preprocessor as well."""
    timeout_s: Seconds = 60.0
    """After so long without an answer a request is sent again."""
    limits: ProcessingLimits = ProcessingLimits()
    """What one request may carry, ``allowed_media_domains`` among it."""
    media: MediaOptions = MediaOptions()
    """How pictures and videos are prepared where requests do not say; what is unset is the checkpoint's."""


class VisionEncoderPool(EqualPool):
    """Vision encoders: patches to embeddings."""

    autoscaling: VisionEncoderAutoscaling | None = None
    num_cpus: Amount = 1.0
    num_gpus: Gpus | None = None
    max_batch_patches: Count = 16384
    """Patches computed in one pass."""
    patch_window_bytes: Count = 64_000_000
    """Patches held ahead of their batch."""
    embedding_bytes: Count = 2 << 30
    """Embeddings kept, leased and cached together."""
    cache_bytes: Annotated[int, Field(ge=0)] = 1 << 30
    """How much of it embeddings nobody leases may take."""


class Roles(Section):
    """How many engines of a pool take each role."""

    prefill: Annotated[int, Field(ge=0)] = 0
    decode: Annotated[int, Field(ge=0)] = 0
    colocated: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.total == 0:
            raise ValueError("at least one of prefill, decode and colocated must be positive")
        return self

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.colocated


class EnginePool(Pool):
    """Language-model engines of one shape. One Serve replica is one expert-parallel group."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,30}$")] = "engine"
    roles: Roles
    expert_parallel: Count = 1
    """Ranks of an engine. Each is a process, holds its share of the experts and claims CPUs and GPUs as below."""
    placement: Placement = "pack"
    """How the ranks of one engine lie on nodes: on few, on one, on many, or each on its own."""
    move_roles: RoleMoves | None = None
    """Set (``{}`` for the defaults), engines change their roles as the load asks; else only ``ernie role`` does."""
    autoscaling: EngineAutoscaling | None = None
    """Set, there are more or fewer engines as the load asks; ``roles`` is how they begin."""
    rebalance_steps: Annotated[int, Field(ge=0)] = 1000
    """Steps after which busy experts may change ranks; 0 leaves them where they are."""
    num_cpus: Amount = 1.0
    num_gpus: Gpus | None = None
    kv_cache_gib: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Size of the KV cache. Unset takes what ``gpu_memory_utilization`` leaves of a GPU, and on a CPU an eighth of the
    free memory, at most 4 GiB.
    """
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    block_size: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Tokens per KV block; unset is 16, and 256 where there are GPUs. Engines exchange KV only if theirs are equal."""
    attention: Literal["plain", "paged", "varlen"] | None = None
    """Unset takes the fastest that runs; a form that cannot run is refused. Likewise below."""
    experts: Literal["loop", "grouped", "native"] | None = None
    cuda_graphs: bool | None = None
    max_num_seqs: Count = 64
    max_batched_tokens: Count | None = None
    """Tokens of a step, which nothing interrupts, not even a cancellation; unset is 2048, and 1024 on CPUs."""
    max_waiting: Count = 256
    """Sequences that wait in an engine; the next is refused as overload."""
    media_window_bytes: Count = 64_000_000
    """Embeddings of pictures and videos held ahead of their use."""
    media_cache_bytes: Count = 64_000_000
    """Those pulled lately, kept for other prompts with the same media."""
    prefix_caching: bool = True
    """Prompts that begin like earlier ones are not computed again."""

    @field_validator("name")
    @classmethod
    def _free(cls, name: str) -> str:
        if name in POOL_NAMES_TAKEN:
            raise ValueError(f"{name!r} is the name of another pool")
        return name

    @model_validator(mode="after")
    def _decoding_fits(self) -> Self:
        if self.max_batched_tokens is not None and self.max_num_seqs > self.max_batched_tokens:
            raise ValueError(
                f"max_num_seqs {self.max_num_seqs} is over max_batched_tokens {self.max_batched_tokens}: "
                "prompts would never advance beside decoding"
            )
        return self

    @model_validator(mode="after")
    def _initial(self) -> Self:
        check_initial(self.replicas, self.autoscaling, "roles: the total of")
        kinds = len(self.role_counts())
        if self.autoscaling is not None and self.autoscaling.min_replicas < kinds:
            least = self.autoscaling.min_replicas
            raise ValueError(f"autoscaling.min_replicas {least} is below {kinds}: each of the roles needs an engine")
        return self

    @property
    def replicas(self) -> int:
        return self.roles.total

    @property
    def most_replicas(self) -> int:
        return self.replicas if self.autoscaling is None else self.autoscaling.max_replicas

    def role_counts(self) -> Mapping[EngineRole, int]:
        """Wanted engines per role; roles nobody wants are left out."""
        counts = {
            EngineRole.PREFILL: self.roles.prefill,
            EngineRole.DECODE: self.roles.decode,
            EngineRole.COLOCATED: self.roles.colocated,
        }
        return {role: count for role, count in counts.items() if count}


class Admin(Section):
    """Who may change a running cluster over HTTP (``POST /admin/role``)."""

    token: Annotated[str, Field(min_length=16)] | None = None
    """Sent as ``Authorization: Bearer``. Unset, whoever reaches the HTTP port may, so only on loopback."""


class PoolDefaults(Section):
    """What holds for engine pools that do not say otherwise themselves."""

    max_num_seqs: Count | None = None
    max_batched_tokens: Count | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None

    def over(self, pool: EnginePool) -> EnginePool:
        """The pool with what it left out. Raises ValueError for what does not go together."""
        given = self.model_dump(exclude_none=True) | pool.model_dump(exclude_unset=True)
        try:
            return EnginePool.model_validate(given)
        except ValidationError as error:
            raise ValueError(f"pool {pool.name}: {error_lines(error)[0]}") from None


class ClusterConfig(Section):
    """Everything. ``model`` is a built-in model's name, a checkpoint directory at the same path on every node, or the
    name of a repository on a hub, which every node fetches for itself (``cluster/hub.py``)."""

    model: Annotated[str, Field(min_length=1)] = NANO
    revision: Annotated[str, Field(min_length=1)] | None = None
    """Branch, tag or commit of a repository on a hub."""
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    """Name clients ask for. Unset: the last part of a directory, the whole name of a repository."""
    dtype: DType = "auto"
    """``auto`` is bfloat16 on GPUs and float32 elsewhere."""
    compat: Compat = "original"
    """Whose routing and position rules to follow where they differ."""
    max_model_len: Annotated[int, Field(ge=2)] | None = None
    """Longest prompt and reply together. The checkpoint's own when unset."""
    reasoning_parser: ReasoningParserName | None = None
    """What reads thinking out of replies. All names stand for one parser, which goes by the prompt."""
    tool_call_parser: ToolCallParserName = "ernie45"
    """What reads calls out of replies: anywhere in an answer, or (``ernie-45-vl-thinking``) only before its text."""

    router: RouterPool = RouterPool()
    preprocessor: PreprocessorPool = PreprocessorPool()
    vision_encoder: VisionEncoderPool = VisionEncoderPool()
    engines: tuple[EnginePool, ...] | None = None
    """Unset: chosen from the GPUs there are (``resolve``)."""
    pool_defaults: PoolDefaults = PoolDefaults()
    slo: Slo = Slo()

    default_timeout_s: Seconds = 600.0
    """Deadline of a request that names none."""
    drain_timeout_s: Seconds = 30.0
    """Time running requests have to finish when the cluster stops."""
    role_drain_s: Seconds = 5.0
    """Time what runs on an engine has to finish there when it changes its role; the rest goes on elsewhere."""

    admin: Admin | None = None
    """Unset, the cluster is not changed over HTTP. ``ernie serve`` sets it while it listens on loopback."""
    host: Annotated[str, Field(min_length=1)] = LOOPBACK
    http_port: Port = 8000
    grpc_port: Port = 9000
    metrics_port: Port | None = None
    """Serves ``/metrics``, which is on the HTTP port anyway, on a port of its own as well, on the router's node."""
    metrics_host: Annotated[str, Field(min_length=1)] | None = None
    """Address that port is on. Unset: the node's; ``ernie serve`` then uses ``host``."""
    worker_host: Annotated[str, Field(min_length=1)] | None = None
    """Address on which workers listen for each other. Unset: their node's; ``ernie serve`` then uses loopback."""
    log_level: LogLevel = "WARNING"
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s]+$")] | None = None
    """``http://host:4317`` or, with TLS, ``https://...``: where requests are told as OpenTelemetry spans, by OTLP over
    gRPC. Needs the extra ``traces``."""
    log_format: LogFormat = "text"
    """``json``: a line of logs is an object."""

    @field_validator("engines")
    @classmethod
    def _distinct(cls, engines: tuple[EnginePool, ...] | None) -> tuple[EnginePool, ...] | None:
        if engines == ():
            raise ValueError("at least one pool, or leave the field out")
        names = [pool.name for pool in engines or ()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two pools are called {', '.join(twice)}")
        if engines is not None:
            prefills = sum(pool.roles.prefill + pool.roles.colocated for pool in engines)
            decodes = sum(pool.roles.decode + pool.roles.colocated for pool in engines)
            if not prefills or not decodes:
                raise ValueError(f"no engine is to {'decode' if prefills else 'prefill'}: no request could be answered")
        return engines

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": self.metrics_port}
        for (name, port), (other, its) in itertools.combinations(ports.items(), 2):
            if port == its:
                raise ValueError(f"{name} and {other} are both {port}")
        return self

    @model_validator(mode="after")
    def _not_everybody_changes_it(self) -> Self:
        if self.admin is not None and self.admin.token is None and self.host not in LOOPBACK_HOSTS:
            raise ValueError(f"admin.token must be set where host is {self.host}: only loopback goes without")
        return self

    @model_validator(mode="after")
    def _defaults_fit(self) -> Self:
        for pool in self.engines or _default_engines(0):
            self.pool_defaults.over(pool)
        return self

    @property
    def model_name(self) -> str:
        """Name clients ask for."""
        if self.served_model_name is not None:
            return self.served_model_name
        return self.model if self.model in (NANO, RANDOM) else Path(self.model).resolve().name

    @property
    def pools(self) -> tuple[EnginePool, ...]:
        """Engine pools of a settled description.

        Raises:
            ValueError: ``resolve`` was not called.
        """
        return settled(self.engines)


def parse(values: Mapping[str, Any], source: str) -> ClusterConfig:
    """Validates a description.

    Raises:
        ValueError: one line per wrong field, each beginning with ``source`` and the field's path.
    """
    try:
        return ClusterConfig.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError("\n".join(f"{source}: {line}" for line in error_lines(error))) from None


def error_lines(error: ValidationError) -> list[str]:
    """One line per wrong field: its path, then what is wrong with it."""
    return [
        f"{'.'.join(str(part) for part in item['loc']) or 'config'}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors(include_url=False)
    ]


def read_file(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping; validation is ``parse``'s.

    Raises:
        ValueError: unreadable, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path}: must be a mapping of field names to values")
    return values


def resolve(config: ClusterConfig, *, gpus: int) -> ClusterConfig:
    """Settles what a description leaves open, for a cluster with so many GPUs.

    Without ``engines``: no GPU - one prefill and one decode engine; one GPU - a colocated engine and the encoder share
    it; more - decode and prefill engines one to one (decode takes the odd one), the encoder shares a prefill GPU.
    """
    encoder_gpus = config.vision_encoder.num_gpus
    if encoder_gpus is None:
        encoder_gpus = ENCODER_GPU_SHARE if gpus else 0.0
    engines = config.engines or _default_engines(gpus)
    return config.model_copy(
        update={
            "served_model_name": config.model_name,
            "dtype": _settled_dtype(config.dtype, gpus),
            "vision_encoder": config.vision_encoder.model_copy(update={"num_gpus": encoder_gpus}),
            "engines": tuple(_settled_pool(config.pool_defaults.over(pool), gpus) for pool in engines),
        }
    )


def _settled_dtype(dtype: DType, gpus: int) -> DType:
    if dtype != "auto":
        return dtype
    return "bfloat16" if gpus else "float32"


def _default_engines(gpus: int) -> tuple[EnginePool, ...]:
    if gpus == 0:
        return (EnginePool(roles=Roles(prefill=1, decode=1)),)
    if gpus == 1:
        return (EnginePool(roles=Roles(colocated=1), num_gpus=ENGINE_GPU_SHARE),)
    prefills = gpus // 2
    return (
        EnginePool(name="prefill", roles=Roles(prefill=prefills), num_gpus=ENGINE_GPU_SHARE),
        EnginePool(name="decode", roles=Roles(decode=gpus - prefills), num_gpus=1.0),
    )


def _settled_pool(pool: EnginePool, gpus: int) -> EnginePool:
    num_gpus = pool.num_gpus
    if num_gpus is None:
        num_gpus = 1.0 if gpus else 0.0
    batched = pool.max_batched_tokens or max(pool.max_num_seqs, GPU_BATCHED_TOKENS if num_gpus else BATCHED_TOKENS)
    block_size = pool.block_size or (GPU_BLOCK_SIZE if gpus else BLOCK_SIZE)
    return pool.model_copy(update={"num_gpus": num_gpus, "block_size": block_size, "max_batched_tokens": batched})
