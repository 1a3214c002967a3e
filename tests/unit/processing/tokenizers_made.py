"""Small tokenizers of both families: byte-level, and sentencepiece-like with byte fallback as the real one."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ["<unk>", "<s>", "</s>", "<|end_of_sentence|>", "<think>", "</think>", "<|IMAGE_PLACEHOLDER|>"]
_CORPUS = ["the quick brown fox jumps over the lazy dog", "what is in this picture ? a dog and a cat", "héé ça là"]


def byte_level(path: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return _save(tokenizer, path)


def byte_fallback(path: Path, *, strip: bool = False) -> Path:
    """``strip``: a leading space is added by the normalizer and taken off by the decoder, as Llama's does."""
    letters = [chr(c) for c in range(0x21, 0x7F)] + ["\u2581", "\u00e9"]
    pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + letters
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "a"), ("\u2581", "\u2581")]
    pieces += ["".join(pair) for pair in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps: list[normalizers.Normalizer] = [normalizers.Prepend("\u2581")] if strip else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tail = [decoders.Strip(" ", 1, 0)] if strip else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *tail]
    )
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(str(i), normalized=False, special=False) for i in range(10)])
    return _save(tokenizer, path)


def _save(tokenizer: Tokenizer, path: Path) -> Path:
    tokenizer.save(str(path))
    return path
