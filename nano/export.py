"""Writes a trained state as a checkpoint of the real format.

python -m nano.export build/nano/nano.pt actors/checkpoint/nano

The heads that only training uses go to ``heads.safetensors`` here: training can go on from the checkpoint alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from actors.checkpoint.writer import CONFIG, write_json, write_neighbours
from actors.ernie.files import SINGLE_FILE
from actors.ernie.names import tensor_shapes
from nano.files import documents, tokenizer_document

HEADS = ("head", "early", "late", "things", "corners", "ordinals")
HEADS_FILE = Path(__file__).parent / "heads.safetensors"


def export(state: dict[str, torch.Tensor], directory: Path) -> int:
    """Writes weights (bfloat16, routers float32), config, tokenizer, template, processors and font; returns the bytes
    of the weights. Raises ValueError when the state is not of this model."""
    made = documents()
    specs = tensor_shapes(made.model)
    tensors = {}
    for name, spec in specs.items():
        tensor = state.get(name.removeprefix("model."))
        if tensor is None or tuple(tensor.shape) != tuple(spec.shape):
            raise ValueError(
                f"{name}: expected {tuple(spec.shape)}, got {None if tensor is None else tuple(tensor.shape)}"
            )
        tensors[name] = tensor.to(torch.float32 if spec.keep_fp32 else torch.bfloat16).contiguous()
    if extra := {f"model.{name}" for name in state} - set(specs):
        raise ValueError(f"the checkpoint format has no {sorted(extra)[0]}")
    directory.mkdir(parents=True, exist_ok=True)
    write_neighbours(directory, made, tokenizer_document(), "pt")
    _save(tensors, directory / SINGLE_FILE)
    write_json(directory / CONFIG, made.config)
    return sum(t.nbytes for t in tensors.values())


def save_heads(state: dict[str, dict[str, torch.Tensor]], path: Path) -> None:
    """The heads of a trained state, by ``head.name``, in bfloat16."""
    tensors = {f"{head}.{name}": t.bfloat16().contiguous() for head in HEADS for name, t in state[head].items()}
    _save(tensors, path)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    # The library leaves files that only their owner may read.
    path.chmod(0o644)


def load_checkpoint(directory: Path, heads: Path = HEADS_FILE) -> dict[str, dict[str, torch.Tensor]]:
    """A checkpoint and its heads as the state of a training, without an optimiser's."""
    state = {"nano": {name.removeprefix("model."): t.float() for name, t in load_file(directory / SINGLE_FILE).items()}}
    for name, tensor in load_file(heads).items():
        head, _, rest = name.partition(".")
        state.setdefault(head, {})[rest] = tensor.float()
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("state", type=Path)
    parser.add_argument("directory", type=Path)
    options = parser.parse_args()
    state = torch.load(options.state)
    size = export(state["nano"], options.directory)
    save_heads(state, HEADS_FILE)
    print(f"{options.directory}: {size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    main()
