"""The 28B shapes in bfloat16 on one device: a prompt with a picture, then decoding, at full size."""

from __future__ import annotations

import time

import pytest
import torch

from actors.checkpoint import write_random_checkpoint
from actors.ernie.bank import VisionBank, empty_bank_buffer
from actors.ernie.config import ErnieConfig
from actors.ernie.text import LanguageModel
from actors.ernie.vision import VisionModel
from actors.types import Grid, MediaKind
from tests.unit.engine.harness import Rig, request, span

NEEDED_GIB = 80


def _random(views: dict[str, torch.Tensor]) -> None:
    for name, view in views.items():
        if name.endswith("bias"):
            view.zero_()
        elif view.dim() == 1:
            view.fill_(1.0)
        else:
            view.normal_(0, view.shape[-1] ** -0.5)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ErnieConfig:
    if torch.cuda.mem_get_info()[0] < NEEDED_GIB << 30:
        pytest.skip(f"needs {NEEDED_GIB} GiB of device memory")
    import json

    summary = write_random_checkpoint(tmp_path_factory.mktemp("full") / "model", preset="28b", write=False)
    return ErnieConfig.from_dict(json.loads(json.dumps(summary.config)))


def test_a_picture_and_a_text_at_full_size(config: ErnieConfig) -> None:
    torch.manual_seed(0)
    started = torch.cuda.memory_allocated()
    model = LanguageModel(config.text, dtype=torch.bfloat16, device="cuda")
    _random(model.parameters_by_name())
    decode_bytes = torch.cuda.memory_allocated() - started
    bank = VisionBank(config.text, torch.bfloat16, empty_bank_buffer(config.text, torch.bfloat16, "cuda"))
    _random(bank.parameters_by_name())
    prefill_bytes = torch.cuda.memory_allocated() - started
    model.attach_vision_bank(bank)
    vision = VisionModel(
        config.vision, dtype=torch.bfloat16, device="cuda", image_mean=(0.5,) * 3, image_std=(0.25,) * 3
    )
    _random(vision.parameters_by_name())
    vision_bytes = torch.cuda.memory_allocated() - started - prefill_bytes
    print(
        f"decode {decode_bytes / 1e9:.2f} GB, prefill {prefill_bytes / 1e9:.2f} GB, vision {vision_bytes / 1e9:.2f} GB"
    )
    assert 43e9 < decode_bytes < 45.5e9
    assert 13e9 < prefill_bytes - decode_bytes < 14e9
    assert vision_bytes < 1.7e9

    grid = Grid(1, 32, 32)
    patches = torch.randint(0, 256, (grid.patches, 588), dtype=torch.uint8, device="cuda")
    began = time.perf_counter()
    with torch.inference_mode():
        (embedding,) = vision.encode(patches, [grid])
    torch.cuda.synchronize()
    print(f"encode {grid.patches} patches: {time.perf_counter() - began:.3f} s, the first call")
    image = [config.image_token_id] * grid.tokens
    prompt = [*range(10, 30), config.image_start_token_id, *image, config.image_end_token_id, *range(30, 200)]
    picture = request(prompt, media=[span(MediaKind.IMAGE, 21, grid)], max_tokens=32)
    texts = [request(list(range(100 + i, 356 + i)), max_tokens=32) for i in range(8)]
    options = {"block_size": 16, "max_model_len": 4096, "max_num_seqs": 16, "max_batched_tokens": 2048}
    for _ in range(2):
        with Rig(model, config=config, blocks=2048, **options) as rig:
            began = time.perf_counter()
            outputs = rig.run((picture, {(0, 0): embedding}), *((text, None) for text in texts))
            print(f"9 requests, {sum(map(len, outputs))} tokens: {time.perf_counter() - began:.2f} s")
    assert [len(output) for output in outputs] == [32] * 9
    assert all(token < config.im_patch_id for output in outputs for token in output)
