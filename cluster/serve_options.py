"""Options that command lines of vLLM and FastDeploy have, as the model's cards and guides print them: each is carried
out, refused with the reason, or said to change nothing.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from actors.errors import InvalidRequest
from cluster.openai_media import FIELD, ProcessorKwargs, to_media_options
from cluster.openai_request import field_path

_POOL_OPTIONS = ("max_num_seqs", "max_batched_tokens", "gpu_memory_utilization")
_LIMITS = {"image": "max_images", "video": "max_videos"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """As given; ``None`` and False are options that were not."""

    max_num_seqs: int | None = None
    max_batched_tokens: int | None = None
    gpu_memory_utilization: float | None = None
    mm_processor_kwargs: str | None = None
    limit_mm_per_prompt: str | None = None
    tensor_parallel_size: int = 1
    quantization: str | None = None
    engine_worker_queue_port: int | None = None
    enable_mm: bool = False
    trust_remote_code: bool = False
    enable_auto_tool_choice: bool = False

    def apply(self, values: dict[str, Any]) -> None:
        """Writes them into a description, over what it says.

        Raises:
            ValueError: names the option that is wrong or not supported.
        """
        if self.quantization is not None:
            raise ValueError(f"quantization: {self.quantization} is not built yet")
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size: {self.tensor_parallel_size} is not supported, tensors are not cut; "
                "expert_parallel of a pool in the YAML description spreads the experts over several GPUs"
            )
        for name in _POOL_OPTIONS:
            if (value := getattr(self, name)) is not None:
                for pool in values.get("engines") or ():
                    if isinstance(pool, dict):
                        pool.pop(name, None)
                section(values, "pool_defaults")[name] = value
        if self.limit_mm_per_prompt is not None:
            section(values, "preprocessor", "limits").update(_limits(self.limit_mm_per_prompt))
        if self.mm_processor_kwargs is not None:
            section(values, "preprocessor", "media").update(_media(self.mm_processor_kwargs))

    def notices(self) -> list[str]:
        """What to tell of options that change nothing."""
        found = []
        if self.engine_worker_queue_port is not None:
            found.append("--engine-worker-queue-port: ignored, workers choose free ports.")
        if self.enable_mm:
            found.append("--enable-mm: ignored, pictures and videos are always taken.")
        if self.trust_remote_code:
            found.append("--trust-remote-code: ignored, no code of a checkpoint is ever run.")
        if self.enable_auto_tool_choice:
            found.append(
                "--enable-auto-tool-choice: ignored, the model may call the tools of a request by itself anyway."
            )
        return found


def section(values: dict[str, Any], *path: str) -> dict[str, Any]:
    """A mapping inside a description, made where it is missing. Raises ValueError naming one that is none."""
    found = values
    for depth, name in enumerate(path):
        inner = found.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{'.'.join(path[: depth + 1])}: must be a mapping")
        found = inner
    return found


def _limits(text: str) -> dict[str, int]:
    given = _object(text, "limit_mm_per_prompt")
    for kind, count in given.items():
        if kind not in _LIMITS:
            raise ValueError(f"limit_mm_per_prompt.{kind} is not supported, only {' and '.join(_LIMITS)}")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ValueError(f"limit_mm_per_prompt.{kind}: must be a count, not {count!r}")
    return {_LIMITS[kind]: count for kind, count in given.items()}


def _media(text: str) -> dict[str, float]:
    try:
        options, _ = to_media_options(ProcessorKwargs.model_validate(_object(text, FIELD)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ValueError(f"{FIELD}.{field_path(first['loc'])}: {first['msg']}") from None
    except InvalidRequest as error:
        raise ValueError(error.message) from None
    return {name: value for name, value in dataclasses.asdict(options).items() if value is not None}


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: must be a JSON object")
    return value
