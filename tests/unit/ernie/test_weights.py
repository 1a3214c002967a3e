from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.ernie import weights
from actors.ernie.bank import VisionBank, empty_bank_buffer
from actors.ernie.config import ErnieConfig
from actors.ernie.files import stored_tensors
from actors.ernie.weights import Checkpoint, load_language, load_vision, load_vision_bank
from actors.parallel.layout import ExpertLayout, ExpertPlacement, ExpertShare
from tests.tiny_model import tiny_checkpoint

NAMINGS = ["hf", "baidu"]


@pytest.fixture
def edit(tmp_path: Path) -> Callable[..., Path]:
    """Copies a tiny checkpoint and rewrites its tensors by a function of the dictionary."""

    def apply(change: Callable[[dict[str, Tensor]], None], **kwargs: Any) -> Path:
        directory = Path(shutil.copytree(tiny_checkpoint(**kwargs), tmp_path / "copy"))
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")
        return directory

    return apply


def test_both_namings_hold_the_same_tensors() -> None:
    with Checkpoint(tiny_checkpoint()) as hf, Checkpoint(tiny_checkpoint(naming="baidu")) as baidu:
        assert (hf.naming, baidu.naming) == ("hf", "baidu")
        for name in hf.specs:
            assert torch.equal(hf.load(name), baidu.load(name)), name


@pytest.mark.parametrize("naming", NAMINGS)
def test_models_are_filled_with_what_the_files_hold(naming: str) -> None:
    with Checkpoint(tiny_checkpoint(naming=naming)) as checkpoint:
        text = checkpoint.config.text
        storage = empty_bank_buffer(text, torch.float32)
        model = load_language(checkpoint, checkpoint.config, dtype=torch.float32, bank_storage=storage)
        assert model.vision_bank is not None
        vision = load_vision(checkpoint, checkpoint.config, dtype=torch.float32)
        views = model.parameters_by_name() | model.vision_bank.parameters_by_name() | vision.parameters_by_name()
        assert views.keys() == checkpoint.specs.keys()
        for name, view in views.items():
            assert torch.equal(view, checkpoint.load(name)), name


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_routers_stay_wide_and_the_rest_is_converted(stored: str, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    with Checkpoint(tiny_checkpoint(dtype=stored)) as checkpoint:
        views = load_language(checkpoint, checkpoint.config, dtype=dtype).parameters_by_name()
        for name, view in views.items():
            assert view.dtype == (wide if checkpoint.specs[name].keep_fp32 else dtype), name
            assert torch.equal(view, checkpoint.load(name).to(view.dtype)), name
        assert checkpoint.load("model.language_model.layers.1.mlp.text_moe.gate.weight").dtype == torch.float32


@pytest.mark.parametrize("naming", NAMINGS)
def test_each_place_reads_only_its_own_bytes(naming: str) -> None:
    directory = tiny_checkpoint(naming=naming)
    config = ErnieConfig.from_dir(directory)
    with Checkpoint(directory) as decode:
        load_language(decode, config, dtype=torch.float32)
        language = decode.bytes_to_read(decode.specs)["language"]
        assert decode.report.bytes_read == {"language": language, "vision_experts": 0, "vision": 0}
        bank = VisionBank(config.text, torch.float32, empty_bank_buffer(config.text, torch.float32))
        report = load_vision_bank(decode, bank)
        experts = decode.bytes_to_read(decode.specs)["vision_experts"]
        assert report.bytes_read == {"language": 0, "vision_experts": experts, "vision": 0}
        assert decode.report.bytes_read == {"language": language, "vision_experts": experts, "vision": 0}
    with Checkpoint(directory) as encoder:
        load_vision(encoder, config, dtype=torch.float32)
        vision = encoder.bytes_to_read(encoder.specs)["vision"]
        assert encoder.report.bytes_read == {"language": 0, "vision_experts": 0, "vision": vision}
        assert encoder.report.total_bytes == vision > 0
    data = sum(tensor.nbytes for tensor in stored_tensors(directory).values())
    assert language + experts + vision == data


def test_small_pieces_give_the_same_and_progress_counts_all_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PIECE_BYTES", 1000)
    monkeypatch.setattr(weights, "PROGRESS_INTERVAL_S", 0.0)
    seen: list[tuple[int, int]] = []
    with Checkpoint(tiny_checkpoint(naming="baidu")) as checkpoint:
        vision = load_vision(checkpoint, checkpoint.config, dtype=torch.float32, progress=lambda *c: seen.append(c))
        for name, view in vision.parameters_by_name().items():
            assert torch.equal(view, checkpoint.load(name)), name
        total = checkpoint.bytes_to_read(checkpoint.specs)["vision"]
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and len(seen) > 100


def test_progress_is_logged_by_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), Checkpoint(tiny_checkpoint()) as checkpoint:
        load_vision(checkpoint, checkpoint.config, dtype=torch.float32)
    assert "loading" in caplog.text and "GB" in caplog.text


def test_missing_unexpected_and_misshaped_tensors_are_named(edit: Callable[..., Path]) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors["model.vision_tower.ln.bias"]
        tensors["model.language_model.layers.9.extra"] = torch.zeros(3)
        tensors["model.language_model.norm.weight"] = torch.zeros(7)

    with pytest.raises(ValueError) as error:
        Checkpoint(edit(spoil))
    text = str(error.value)
    assert "missing (1): model.vision_tower.ln.bias" in text
    assert "unexpected (1): model.language_model.layers.9.extra" in text
    assert "misshaped (1): model.language_model.norm.weight [7] instead of [96]" in text


def test_at_most_ten_names_are_listed(edit: Callable[..., Path]) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "experts.1." in n]:
            del tensors[name]

    with pytest.raises(ValueError, match=r"missing \(9\): model\.layers\.1\.mlp\.experts\.1\.down_proj\.weight"):
        Checkpoint(edit(spoil, naming="baidu"))


def test_long_lists_are_cut(edit: Callable[..., Path]) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if "vision_tower" in n]:
            del tensors[name]

    with pytest.raises(ValueError, match=r"missing \(27\): .* and 17 more"):
        Checkpoint(edit(spoil))


def test_a_transposed_router_is_misshaped(edit: Callable[..., Path]) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.2.mlp.gate.weight_1"
        tensors[name] = tensors[name].t().contiguous()

    with pytest.raises(ValueError, match=r"gate\.weight_1 \[8, 96\] instead of \[96, 8\]"):
        Checkpoint(edit(spoil, naming="baidu"))


def test_prefixed_tower_redundant_head_and_mtp_tensors_are_accepted(edit: Callable[..., Path]) -> None:
    def respell(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("vision_model.")]:
            tensors["model." + name] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.mtp_block.0.norm.weight"] = torch.zeros(2)

    directory = edit(respell, naming="baidu")
    with Checkpoint(directory) as ours, Checkpoint(tiny_checkpoint()) as plain:
        load_vision(ours, ours.config, dtype=torch.float32)
        for name in plain.specs:
            assert torch.equal(ours.load(name), plain.load(name)), name


def test_one_tensor_under_two_spellings_is_refused(edit: Callable[..., Path]) -> None:
    def double(tensors: dict[str, Tensor]) -> None:
        tensors["model.vision_model.ln.bias"] = tensors["vision_model.ln.bias"] + 1

    with pytest.raises(ValueError, match=r"unexpected \(1\): (model\.)?vision_model\.ln\.bias"):
        Checkpoint(edit(double, naming="baidu"))


def test_an_index_cannot_lead_out_of_its_directory(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(tiny_checkpoint(shard_bytes=300_000), tmp_path / "copy"))
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name, shard = next(iter(index["weight_map"].items()))
    index["weight_map"][name] = f"../copy/{shard}"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="is not a file name"):
        Checkpoint(directory)


def test_a_redundant_head_of_another_shape_is_refused(edit: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight \[3, 4\]"):
        Checkpoint(edit(lambda tensors: tensors.update({"lm_head.weight": torch.zeros(3, 4)})))


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_head_of_its_own_is_refused_where_the_config_ties_it(edit: Callable[..., Path], naming: str) -> None:
    """transformers would quietly use it."""

    def other_head(tensors: dict[str, Tensor]) -> None:
        name = "model.embed_tokens.weight" if naming == "baidu" else "model.language_model.embed_tokens.weight"
        tensors["lm_head.weight"] = tensors[name].clone()
        tensors["lm_head.weight"][-1, -1] += 1

    with Checkpoint(edit(other_head, naming=naming)) as checkpoint:
        with pytest.raises(ValueError, match=r"tie_word_embeddings = true, but lm_head\.weight is stored and differs"):
            load_language(checkpoint, checkpoint.config, dtype=torch.float32)
        load_vision(checkpoint, checkpoint.config, dtype=torch.float32)


def test_untied_heads_are_loaded() -> None:
    directory = tiny_checkpoint(overrides={"tie_word_embeddings": False})
    with Checkpoint(directory) as checkpoint:
        model = load_language(checkpoint, checkpoint.config, dtype=torch.float32)
        assert torch.equal(model.head_VD, checkpoint.load("lm_head.weight"))
        assert not torch.equal(model.head_VD, model.embed_VD)


def test_stored_integers_are_refused_by_name(edit: Callable[..., Path]) -> None:
    name = "model.language_model.norm.weight"
    with pytest.raises(ValueError, match=f"{name} has dtype I64"):
        Checkpoint(edit(lambda tensors: tensors.update({name: torch.zeros(96, dtype=torch.int64)})))


def test_destinations_are_checked_before_reading() -> None:
    with Checkpoint(tiny_checkpoint()) as checkpoint:
        with pytest.raises(ValueError, match=r"nope is not a tensor of this model"):
            checkpoint.load_into({"nope": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"norm\.weight: destination has shape \[5\]"):
            checkpoint.load_into({"model.language_model.norm.weight": torch.zeros(5)})
        router = "model.language_model.layers.1.mlp.text_moe.gate.weight"
        with pytest.raises(ValueError, match="need float32 or float64"):
            checkpoint.load_into({router: torch.zeros(8, 96, dtype=torch.bfloat16)})
        assert checkpoint.report.total_bytes == 0


def test_the_config_must_be_the_checkpoints() -> None:
    other = ErnieConfig.from_dir(tiny_checkpoint(overrides={"text_config.moe_k": 2}))
    with Checkpoint(tiny_checkpoint()) as checkpoint, pytest.raises(ValueError, match="not that of"):
        load_language(checkpoint, other, dtype=torch.float32)


class TestFiles:
    def copy(self, tmp_path: Path, **kwargs: Any) -> Path:
        return Path(shutil.copytree(tiny_checkpoint(**kwargs), tmp_path / "copy"))

    def test_shards_load_like_one_file(self) -> None:
        directory = tiny_checkpoint(shard_bytes=300_000)
        assert len(list(directory.glob("model-*.safetensors"))) > 5
        with Checkpoint(directory) as sharded, Checkpoint(tiny_checkpoint()) as whole:
            for name in whole.specs:
                assert torch.equal(sharded.load(name), whole.load(name)), name

    def test_no_weights(self, tmp_path: Path) -> None:
        directory = self.copy(tmp_path)
        (directory / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
            Checkpoint(directory)

    def test_missing_shard(self, tmp_path: Path) -> None:
        directory = self.copy(tmp_path, shard_bytes=300_000)
        victim = sorted(directory.glob("model-*.safetensors"))[2]
        victim.unlink()
        with pytest.raises(ValueError, match=f"{victim.name} does not exist"):
            Checkpoint(directory)

    def test_index_that_names_the_wrong_shard(self, tmp_path: Path) -> None:
        directory = self.copy(tmp_path, shard_bytes=300_000)
        path = directory / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        name = "model.language_model.embed_tokens.weight"
        index["weight_map"][name] = max(index["weight_map"].values())
        path.write_text(json.dumps(index))
        with pytest.raises(ValueError, match=f"not in the shard the index names: {name}"):
            Checkpoint(directory)

    @pytest.mark.parametrize("keep", [4, 100, -1])
    def test_truncated_file(self, tmp_path: Path, keep: int) -> None:
        directory = self.copy(tmp_path)
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
            Checkpoint(directory)

    def test_header_that_is_not_json(self, tmp_path: Path) -> None:
        directory = self.copy(tmp_path)
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", 8) + b"nonsense" + b"0" * 64)
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            Checkpoint(directory)


class TestShares:
    """A rank's experts lie in the files apart or in one tensor; both give the same rows, in the rank's order."""

    def placement(self, checkpoint: Checkpoint) -> ExpertPlacement:
        layout = ExpertLayout(text=((6, 7, 0, 3), (2, 1, 4, 5)), vision=((1, 0, 2), (7, 3, 4, 5, 6)))
        sparse = checkpoint.config.text.sparse_layers
        layers = range(checkpoint.config.text.num_hidden_layers)
        return ExpertPlacement(tuple(layout if i in sparse else None for i in layers))

    @pytest.mark.parametrize("naming", NAMINGS)
    @pytest.mark.parametrize("rank", [0, 1])
    def test_a_rank_gets_its_own_experts_and_everything_else(self, naming: str, rank: int) -> None:
        with Checkpoint(tiny_checkpoint(naming=naming)) as checkpoint:
            text = checkpoint.config.text
            share = ExpertShare(self.placement(checkpoint), rank)
            storage = empty_bank_buffer(text, torch.float64, share=share)
            model = load_language(checkpoint, checkpoint.config, dtype=torch.float64, bank_storage=storage, share=share)
            assert model.vision_bank is not None
            rows = model.expert_rows() | model.vision_bank.expert_rows()
            views = model.parameters_by_name() | model.vision_bank.parameters_by_name()
            assert len(rows) == 4 * len(text.sparse_layers)
            for name, view in views.items():
                whole = checkpoint.load(name, torch.float64)
                assert torch.equal(view, whole[list(rows[name])] if name in rows else whole), name

    def test_ranks_together_read_every_expert_once(self) -> None:
        read = {}
        for naming in NAMINGS:
            with Checkpoint(tiny_checkpoint(naming=naming)) as checkpoint:
                text, whole = checkpoint.config.text, checkpoint.bytes_to_read(checkpoint.specs)["language"]
                dense = load_language(checkpoint, checkpoint.config, dtype=torch.float32).parameters_by_name()
                shared = sum(view.nbytes for name, view in dense.items() if ".experts." not in name)
                sizes = []
                for rank in range(2):
                    share = ExpertShare(self.placement(checkpoint), rank)
                    before = checkpoint.report
                    load_language(checkpoint, checkpoint.config, dtype=torch.float32, share=share)
                    sizes.append(checkpoint.report.bytes_read["language"] - before.bytes_read["language"])
                    bank = VisionBank(text, torch.float32, empty_bank_buffer(text, torch.float32, share=share), share)
                    report = load_vision_bank(checkpoint, bank)
                    assert report.bytes_read == checkpoint.bytes_to_read(bank.parameters_by_name(), bank.expert_rows())
                    sizes.append(report.bytes_read["vision_experts"])
                assert sizes[0] + sizes[2] == whole + shared
                assert sizes[1] < sizes[3], "three vision experts and five"
                read[naming] = sizes
        assert read["hf"] == read["baidu"]

    def test_fingerprints_are_those_of_the_whole_checkpoint(self) -> None:
        with Checkpoint(tiny_checkpoint()) as checkpoint:
            before = checkpoint.fingerprint("language")
            share = ExpertShare(self.placement(checkpoint), 1)
            load_language(checkpoint, checkpoint.config, dtype=torch.float32, share=share)
            assert checkpoint.fingerprint("language") == before

    def test_rows_are_checked_before_reading(self) -> None:
        name = "model.language_model.layers.1.mlp.text_moe.experts.down_proj"
        with Checkpoint(tiny_checkpoint()) as checkpoint:
            for rows in ((8,), (1, 1), (-1,)):
                with pytest.raises(ValueError, match="no separate rows"):
                    checkpoint.load_into({name: torch.zeros(len(rows), 96, 48)}, rows={name: rows})
            with pytest.raises(ValueError, match=r"destination has shape \[8, 96, 48\], need \[2, 96, 48\]"):
                checkpoint.load_into({name: torch.zeros(8, 96, 48)}, rows={name: (1, 2)})
            assert checkpoint.report.total_bytes == 0
