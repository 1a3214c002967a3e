from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from actors.model_files import media_token_ids, processor_section, read_json

DELIMITERS = {
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
}
BAIDU = {"model_type": "ernie4_5_moe_vl"}


@pytest.mark.parametrize(
    ("config", "image", "video"),
    [
        ({}, 100295, 103367),
        ({"image_token_id": 100200, "video_token_id": 100201}, 100200, 100201),
        ({"image_token_id": None}, 100295, 103367),
        (BAIDU | {"im_patch_id": 100295}, 100295, 100295),
        (BAIDU | {"im_patch_id": 100295, "video_token_id": 103367}, 100295, 103367),
        (BAIDU | {"im_patch_id": 500} | DELIMITERS, 500, 500),
    ],
)
def test_media_tokens(config: dict[str, Any], image: int, video: int) -> None:
    assert media_token_ids(config) == {"image_token_id": image, "video_token_id": video, **DELIMITERS}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BAIDU, "image_token_id is missing"),
        (BAIDU | {"im_patch_id": 500}, "image_start_token_id is missing"),
        ({"image_token_id": "5"}, "image_token_id = '5'"),
        ({"video_token_id": True}, "video_token_id = True"),
        ({"video_end_token_id": -1}, "video_end_token_id = -1"),
    ],
)
def test_wrong_media_tokens_are_named(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        media_token_ids(config)


def test_processor_sections(tmp_path: Path) -> None:
    assert processor_section(tmp_path, "video") == (str(tmp_path / "video_preprocessor_config.json"), None)
    (tmp_path / "preprocessor_config.json").write_text('{"a": 1}')
    assert processor_section(tmp_path, "image")[1] == {"a": 1}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"a": 2}}))
    assert processor_section(tmp_path, "image")[1] == {"a": 2}
    assert processor_section(tmp_path, "video")[1] is None


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for text, said in ((None, "does not exist"), ("{", "cannot be read as JSON"), ("[]", "JSON list")):
        if text is not None:
            path.write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json.* {said}|config\.json holds a {said}"):
            read_json(path)
