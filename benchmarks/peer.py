"""transformers' ``generate``, in a process of its own, so that neither side's threads meet the other's."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenarios import Outcome, Prompt, Scenario
from torch import Tensor

from actors.ernie.config import pixel_normalisation
from actors.ernie.weights import Checkpoint


class Peer:
    """Starts the process and asks it for one run at a time."""

    def __init__(self, directory: Path, dtype: torch.dtype, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, directory, dtype, threads), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def run(self, scenario: Scenario, prompts: Sequence[Prompt], tokens: int) -> Outcome:
        """``tokens`` outputs of each sequence."""
        self._connection.send((scenario, prompts, tokens))
        outcome: Outcome = self._answer()
        return outcome

    def close(self) -> None:
        self._connection.close()
        self._process.join()

    def _answer(self) -> Any:
        """What the process sent; raises RuntimeError if it ended or failed."""
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the transformers process ended with {self._process.exitcode}") from None
        if isinstance(answer, Exception):
            raise RuntimeError("transformers failed") from answer
        return answer


def _serve(connection: Connection, directory: Path, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    answer: Any = None
    try:
        theirs = Theirs(directory, dtype)
        while True:
            connection.send(answer)
            answer = theirs.run(*connection.recv())
    except EOFError:
        return
    except Exception as error:
        connection.send(error)
        raise


class Theirs:
    """transformers, with the grouped form of its experts."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForImageTextToText

        with Checkpoint(directory) as checkpoint:
            self.config = checkpoint.config
            self.mean, self.std = (
                np.repeat(np.array(values, dtype=np.float32), self.config.vision.patch_size**2)
                for values in pixel_normalisation(directory)
            )
        self.model = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=dtype, experts_implementation="grouped_mm"
        )
        self.model.train(False)
        self.model.generation_config.eos_token_id = None

    def run(self, scenario: Scenario, prompts: Sequence[Prompt], tokens: int) -> Outcome:
        from transformers import StoppingCriteria, StoppingCriteriaList

        times: list[float] = []

        class Clock(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
                times.append(time.perf_counter())
                return torch.zeros(input_ids.shape[0], dtype=torch.bool)

        inputs = self._inputs(scenario, prompts)
        started = time.perf_counter()
        out = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            output_logits=True,
            return_dict_in_generate=True,
            stopping_criteria=StoppingCriteriaList([Clock()]),
        )
        first = out.sequences[:, len(prompts[0].ids)].tolist()
        if scenario.decode:
            speed = len(prompts) / statistics.median(b - a for a, b in pairwise(times))
        else:
            speed = inputs["input_ids"].numel() / (times[0] - started)
        return Outcome(tokens_per_s=speed, first=first, logits_BV=out.logits[0].numpy())

    def _inputs(self, scenario: Scenario, prompts: Sequence[Prompt]) -> dict[str, Any]:
        ids = torch.tensor([prompt.ids for prompt in prompts])
        config = self.config
        placeholder = ids == config.image_token_id
        delimiter = (ids == config.image_start_token_id) | (ids == config.image_end_token_id)
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": placeholder.long(),
            "moe_mm_token_type_ids": (placeholder | delimiter).long(),
        }
        if scenario.grid is not None:
            rows = np.concatenate([p.patches for p in prompts if p.patches is not None]).astype(np.float32)
            inputs["pixel_values"] = torch.from_numpy((rows * np.float32(1 / 255) - self.mean) / self.std)
            inputs["image_grid_thw"] = torch.tensor([tuple(scenario.grid)] * len(prompts))
        return inputs
