"""Reading a checkpoint: checked whole by its headers, loaded part by part straight into a model's tensors.

Opening a checkpoint compares every tensor name and shape in the files with the inventory of ``names`` without reading
data, so that each place refuses the same broken checkpoint although it loads only its own part. Files are memory
mapped; a tensor is copied (and converted) piece by piece into its destination, never as a whole in between. A rank of a
group reads only the experts it holds; fingerprints are those of the whole checkpoint all the same.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from actors.ernie.bank import VisionBank
from actors.ernie.config import ErnieConfig, check_special_ids, pixel_normalisation
from actors.ernie.experts_form import ExpertsForm
from actors.ernie.files import StoredTensor, quote_some, stored_tensors
from actors.ernie.fingerprint import WeightsClass, fingerprint, weights_class
from actors.ernie.names import (
    GROUPS,
    LM_HEAD,
    Group,
    Source,
    TensorSpec,
    detect_naming,
    normalise,
    sources,
    tensor_shapes,
)
from actors.ernie.text import LanguageModel
from actors.ernie.vision import VisionModel
from actors.ernie.vocabulary import generated_token_ids
from actors.parallel.dispatch import Dispatcher
from actors.parallel.layout import ExpertShare
from actors.tokenization.files import tokenizer_path

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], object]
"""Called with (bytes done, bytes in all) while loading."""

ExpertRows = Mapping[str, tuple[int, ...]]
"""By canonical name of a tensor of stacked experts: the experts wanted of it."""
NO_ROWS: ExpertRows = {}

PIECE_BYTES = 64 << 20
"""Most bytes of stored data converted at once."""
PROGRESS_INTERVAL_S = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadReport:
    """What one load read: bytes of stored tensor data per group, and how long it took."""

    bytes_read: dict[Group, int]
    seconds: float

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes_read.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """Part of a stored tensor: its rows ``first : first + count``, which fill ``source.target`` of a destination."""

    source: Source
    first: int
    count: int
    bytes: int


class Checkpoint:
    """An open model directory. A context manager; also usable until ``close``.

    Raises ValueError when opened on a directory whose config or tensors are not a whole supported checkpoint: it lists
    missing, unexpected and misshaped tensors by the names the files use, and tokens that could never be generated.
    """

    def __init__(self, directory: str | Path, config: ErnieConfig | None = None) -> None:
        self.directory = Path(directory)
        self.config = config or ErnieConfig.from_dir(self.directory)
        self._check_vocabulary()
        self.specs = tensor_shapes(self.config)
        stored = stored_tensors(self.directory)
        self.naming = detect_naming(stored)
        self._sources = {n: sources(n, spec, self.config, self.naming) for n, spec in self.specs.items()}
        self._stored = self._check_inventory(stored)
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}
        self._bytes_read: dict[Group, int] = dict.fromkeys(GROUPS, 0)
        self._seconds = 0.0

    @property
    def report(self) -> LoadReport:
        """Everything ``load_into`` has read so far."""
        return LoadReport(bytes_read=dict(self._bytes_read), seconds=self._seconds)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files. Loading again opens them anew."""
        self._files.clear()
        self._stack.close()

    def fingerprint(self, kind: WeightsClass) -> bytes:
        """32 bytes over the files' tensors of that class, loaded or not (see ``fingerprint``)."""
        names = {
            source.name
            for name, spec in self.specs.items()
            if weights_class(spec.group) == kind
            for source in self._sources[name]
        }
        return fingerprint(self._stored[name] for name in names)

    def bytes_to_read(self, names: Iterable[str], rows: ExpertRows = NO_ROWS) -> dict[Group, int]:
        """What ``load_into`` reads for destinations of these canonical names, told from the headers alone."""
        found: dict[Group, int] = dict.fromkeys(GROUPS, 0)
        for name in names:
            found[self._spec(name).group] += sum(read.bytes for read in self._reads(name, rows.get(name)))
        return found

    def load(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor by canonical name, on the CPU, as [shape of its spec]; ``dtype`` None keeps the stored one."""
        spec = self._spec(name)
        if dtype is None:
            dtype = _TORCH_DTYPES[self._stored[self._sources[name][0].name].dtype]
        tensor = torch.empty(spec.shape, dtype=dtype)
        for read in self._reads(name, None):
            for _ in self._copy(read, tensor):
                pass
        return tensor

    def load_into(
        self, destinations: Mapping[str, Tensor], progress: Progress | None = None, rows: ExpertRows = NO_ROWS
    ) -> LoadReport:
        """Fill tensors given by canonical name, in the order of the files' layout, converting to their dtypes.

        ``destinations`` may be views of fused storage, on any device. ``rows``: by name, which rows of a tensor of
        stacked experts its destination holds, in its order; nothing else of that tensor is read. ``progress`` is called
        at most once a second and at the end; by default it logs. Raises ValueError naming a destination of a wrong
        name, shape or dtype before anything is read.
        """
        for name, tensor in destinations.items():
            spec = self._spec(name)
            shape = self._shape_of_rows(name, rows[name]) if name in rows else spec.shape
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name}: destination has shape {list(tensor.shape)}, need {list(shape)}")
            if spec.keep_fp32 and tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name}: destination has dtype {tensor.dtype}, need float32 or float64")
        work = [(read, name) for name in destinations for read in self._reads(name, rows.get(name))]
        work.sort(key=lambda item: self._place(item[0]))
        total = sum(read.bytes for read, _ in work)
        started = time.monotonic()
        report = _Reporter(progress or self._log_progress, total)
        bytes_read: dict[Group, int] = dict.fromkeys(GROUPS, 0)
        for read, name in work:
            for count in self._copy(read, destinations[name]):
                bytes_read[self.specs[name].group] += count
                report.add(count)
        report.finish()
        seconds = time.monotonic() - started
        self._seconds += seconds
        for group, count in bytes_read.items():
            self._bytes_read[group] += count
        return LoadReport(bytes_read=bytes_read, seconds=seconds)

    def require_tied_head(self, embedding_VD: Tensor) -> None:
        """Raise ValueError if the files hold a head of its own although config.json ties it to ``embedding_VD``.

        Some writers store the tied head a second time; it is compared and not kept.
        """
        if not self.config.text.tie_word_embeddings or LM_HEAD not in self._stored:
            return
        view = self._file(self._stored[LM_HEAD]).get_slice(LM_HEAD)
        step = max(1, PIECE_BYTES // (self._stored[LM_HEAD].nbytes // embedding_VD.shape[0]))
        for start in range(0, embedding_VD.shape[0], step):
            if not torch.equal(view[start : start + step].to(embedding_VD), embedding_VD[start : start + step]):
                raise ValueError(
                    f"{self.directory}: config.json has tie_word_embeddings = true, but {LM_HEAD} is stored "
                    "and differs from the embedding"
                )

    def _spec(self, name: str) -> TensorSpec:
        if name not in self.specs:
            raise ValueError(f"{name} is not a tensor of this model")
        return self.specs[name]

    def _shape_of_rows(self, name: str, rows: tuple[int, ...]) -> tuple[int, ...]:
        shape = self._spec(name).shape
        if len(shape) != 3 or len(set(rows)) != len(rows) or not set(rows) <= set(range(shape[0])):
            raise ValueError(f"{name} of shape {list(shape)} has no separate rows {list(rows)}")
        return (len(rows), *shape[1:])

    def _reads(self, name: str, rows: tuple[int, ...] | None) -> Iterator[_Read]:
        """What fills a destination of tensor ``name``, or one of only these ``rows`` of it."""
        for source in self._sources[name]:
            if rows is None:
                first, count = (0, source.shape[0]) if source.row is None else (source.row, 1)
                yield self._read(source, first, count)
            elif source.target:
                expert, *rest = source.target
                if expert in rows:
                    yield self._read(replace(source, target=(rows.index(expert), *rest)), 0, source.shape[0])
            else:
                for place, first, count in _runs(rows):
                    yield self._read(replace(source, target=(slice(place, place + count),)), first, count)

    def _read(self, source: Source, first: int, count: int) -> _Read:
        size = self._stored[source.name].nbytes // source.shape[0] * count
        return _Read(source=source, first=first, count=count, bytes=size)

    def _place(self, read: _Read) -> tuple[str, int, int]:
        stored = self._stored[read.source.name]
        return stored.path.name, stored.offset, read.first

    @torch.no_grad()
    def _copy(self, read: _Read, destination: Tensor) -> Iterable[int]:
        """Copy part of one stored tensor piece by piece, yielding the bytes of each."""
        source, stored = read.source, self._stored[read.source.name]
        view = self._file(stored).get_slice(stored.name)
        target = destination[source.target] if source.target else destination
        if source.transpose:
            target = target.t()
        step = max(1, PIECE_BYTES // max(1, stored.nbytes // source.shape[0]))
        for start in range(0, read.count, step):
            count = min(step, read.count - start)
            rows = view[read.first + start : read.first + start + count]
            target[start : start + count].copy_(rows)
            yield rows.nbytes

    def _file(self, stored: StoredTensor) -> Any:
        if stored.path not in self._files:
            opened = self._stack.enter_context(safe_open(stored.path, framework="pt"))
            self._files[stored.path] = opened
        return self._files[stored.path]

    def _log_progress(self, done: int, total: int) -> None:
        logger.info("loading %s: %.2f of %.2f GB", self.directory, done / 1e9, total / 1e9)

    def _check_vocabulary(self) -> None:
        ids = generated_token_ids(self.directory)
        try:
            check_special_ids(self.config, ids)
        except ValueError as error:
            raise ValueError(f"{tokenizer_path(self.directory)}: {error}") from None

    def _check_inventory(self, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
        """The stored tensors by normalised name, all of them expected and of the right shape."""
        expected = {source.name: source.shape for parts in self._sources.values() for source in parts}
        if self.config.text.tie_word_embeddings:
            ignored = {LM_HEAD: (self.config.text.vocab_size, self.config.text.hidden_size)}
        else:
            ignored = {}
        found: dict[str, StoredTensor] = {}
        unexpected, misshaped = [], []
        for tensor in stored.values():
            name = normalise(tensor.name)
            if name is None:
                continue
            shape = expected.get(name, ignored.get(name))
            if shape is None or name in found:
                unexpected.append(tensor.name)
            elif shape != tensor.shape:
                misshaped.append(f"{tensor.name} {list(tensor.shape)} instead of {list(shape)}")
            found[name] = tensor
        problems = {
            "missing": [name for name in expected if name not in found],
            "unexpected": unexpected,
            "misshaped": misshaped,
        }
        text = "; ".join(f"{kind} ({len(names)}): {quote_some(names)}" for kind, names in problems.items() if names)
        if text:
            raise ValueError(f"{self.directory} does not hold the tensors its config.json describes: {text}")
        return found


def load_language(
    checkpoint: Checkpoint,
    config: ErnieConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    bank_storage: Tensor | None = None,
    share: ExpertShare | None = None,
    dispatcher: Dispatcher[Any] | None = None,
    experts_form: ExpertsForm | None = None,
    progress: Progress | None = None,
) -> LanguageModel:
    """The language model with its text experts; with ``bank_storage`` (see VisionBank) also the vision experts, in it.

    ``config`` must be the checkpoint's. Routers and correction biases stay float32 (float64 in a float64 model).
    ``share``: the experts a rank of a group holds, and reads; None = all. What was read is in ``checkpoint.report``.
    """
    _require_config(checkpoint, config)
    model = LanguageModel(
        config.text, dtype=dtype, device=device, share=share, dispatcher=dispatcher, experts_form=experts_form
    )
    destinations, rows = model.parameters_by_name(), model.expert_rows()
    bank = None if bank_storage is None else VisionBank(config.text, dtype, bank_storage, share)
    if bank is not None:
        destinations |= bank.parameters_by_name()
        rows |= bank.expert_rows()
    _require_groups(checkpoint, destinations, "language", *(() if bank is None else ("vision_experts",)))
    checkpoint.load_into(destinations, progress, rows)
    checkpoint.require_tied_head(model.embed_VD)
    if bank is not None:
        model.attach_vision_bank(bank)
    return model


def load_vision_bank(checkpoint: Checkpoint, bank: VisionBank, *, progress: Progress | None = None) -> LoadReport:
    """Fill a vision bank, for an engine that becomes able to prefill. Attaching it is the caller's."""
    destinations = bank.parameters_by_name()
    _require_groups(checkpoint, destinations, "vision_experts")
    return checkpoint.load_into(destinations, progress, bank.expert_rows())


def load_vision(
    checkpoint: Checkpoint,
    config: ErnieConfig,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> VisionModel:
    """Vision tower and resampler, with the checkpoint's pixel normalisation. ``config`` must be the checkpoint's."""
    _require_config(checkpoint, config)
    mean, std = pixel_normalisation(checkpoint.directory)
    model = VisionModel(config.vision, dtype=dtype, device=device, image_mean=mean, image_std=std)
    destinations = model.parameters_by_name()
    _require_groups(checkpoint, destinations, "vision")
    checkpoint.load_into(destinations, progress)
    return model


def _require_config(checkpoint: Checkpoint, config: ErnieConfig) -> None:
    if config != checkpoint.config:
        raise ValueError(f"the configuration is not that of {checkpoint.directory}")


def _require_groups(checkpoint: Checkpoint, destinations: Mapping[str, Tensor], *groups: Group) -> None:
    """A model must ask for exactly the tensors of its groups, or it would run on uninitialised memory."""
    wanted = {name for name, spec in checkpoint.specs.items() if spec.group in groups}
    if wanted != destinations.keys():
        raise ValueError(f"model and inventory disagree on {quote_some(wanted ^ destinations.keys())}")


def _runs(rows: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(place among ``rows``, first row, count) of each run of neighbouring rows."""
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield start, rows[start], i - start
            start = i


class _Reporter:
    """Calls back at most once per interval, and once at the end."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0
        self.last = time.monotonic()

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.last >= PROGRESS_INTERVAL_S:
            self.last = now
            self.progress(self.done, self.total)

    def finish(self) -> None:
        self.progress(self.done, self.total)


_TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
