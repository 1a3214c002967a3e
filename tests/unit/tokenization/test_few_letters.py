from __future__ import annotations

import io
from pathlib import Path

import sentencepiece

from actors.processing.detokenize import IncrementalDetokenizer
from actors.processing.tokenizer import TextTokenizer
from tests.sentencepiece_made import ERNIE_LIKE


def test_a_vocabulary_without_latin_letters_streams(tmp_path: Path) -> None:
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["今天天气很好。我们去公园散步。"] * 9 + ["图片里有一只红色的猫和两只狗。"] * 9),
        model_writer=written,
        minloglevel=2,
        vocab_size=310,
        **ERNIE_LIKE,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())
    tokenizer = TextTokenizer.from_dir(tmp_path)
    assert tokenizer.token_id("a") is None
    theirs = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    text = "今天 \U0001f600 is a 红色 day"
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text)
    stream = IncrementalDetokenizer(tokenizer)
    deltas = [stream.push([token_id]) for token_id in ids]
    # Without a piece for them even spaces are written in bytes, as the library marks them.
    assert "".join([*deltas, stream.flush()]) == theirs.decode(ids)
