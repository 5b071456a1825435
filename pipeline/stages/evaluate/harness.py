"""Text models of this package for EleutherAI's lm-evaluation-harness: importing this registers the model `polytrope`.

    import lm_eval
    import polytrope.pipeline.stages.evaluate.harness
    lm_eval.simple_evaluate(model="polytrope", model_args="path=MODEL", tasks=["lambada_openai"])

MODEL is the artifact of a `train` or `convert` stage. Needs the extra `harness`, and the data of the tasks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from polytrope.models.checkpoint import load_model, read_description
from polytrope.pipeline.data.tokenization import read_tokenizer
from polytrope.pipeline.errors import UserError

Pair = tuple[list[int], list[int]]  # context (never empty), continuation


@register_model("polytrope")
class HarnessModel(LM):  # type: ignore[misc]
    """A GPT-2 with its tokenizer.

    Args:
        path: directory with model.json, model.safetensors and tokenizer.json.
        device: `cpu` or `cuda`.
        max_gen_toks: tokens generated where a task does not say how many.

    Raises:
        UserError: no text model there.
    """

    def __init__(self, path: str, device: str = "cpu", max_gen_toks: int = 128, **_: Any) -> None:
        super().__init__()
        directory = Path(path)
        if not (directory / "tokenizer.json").is_file():
            raise UserError(
                f"path={path}: no text model (tokenizer.json is missing)", "name the files of a `train` stage"
            )
        self.tokenizer = read_tokenizer(directory)
        self.model: Any = load_model(directory, device).eval()
        self.length = int(read_description(directory, tangents=True)["config"]["sequence_length"])
        self.max_gen_toks = int(max_gen_toks)
        self._device = torch.device(device)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation after its context."""
        return [self._score(self._pair(*request.args)) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each whole text: every token once, with the longest context that fits."""
        return [
            sum(self._score(pair)[0] for pair in self._windows(self.tokenizer.encode(request.args[0])))
            for request in requests
        ]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Continue each context, greedily unless the task asks for sampling, up to one of its stop texts."""
        texts = []
        for request in requests:
            context, options = request.args
            prompt = (self.tokenizer.encode(context) or [self.tokenizer.end_of_text])[-self.length :]
            tokens = self.model.generate(
                torch.tensor([prompt], device=self._device),
                int(options.get("max_gen_toks", self.max_gen_toks)),
                temperature=float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0,
                generator=torch.Generator(self._device).manual_seed(0),
            )
            text = self.tokenizer.decode_produced(tokens[0, len(prompt) :].tolist())
            stops = options.get("until") or []
            texts.append(_until(text, [stops] if isinstance(stops, str) else stops))
        return texts

    def _pair(self, context: str, continuation: str) -> Pair:
        """The tokens of the joint text, cut where the context ends: a space belongs to the word that follows it."""
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        before = self.tokenizer.encode(context)
        whole = self.tokenizer.encode(context + continuation)
        return before or [self.tokenizer.end_of_text], whole[len(before) :]

    def _windows(self, tokens: list[int]) -> Iterable[Pair]:
        windows = get_rolling_token_windows(
            token_list=tokens, prefix_token=self.tokenizer.end_of_text, max_seq_len=self.length, context_len=1
        )
        return map(make_disjoint_window, windows)

    @torch.no_grad()
    def _score(self, pair: Pair) -> tuple[float, bool]:
        context, continuation = pair
        tokens = torch.tensor([*context, *continuation], device=self._device)[-self.length - 1 :]
        scored = min(len(continuation), len(tokens) - 1)
        if scored == 0:
            return 0.0, True
        logits = self.model(tokens[None, :-1])[0, -scored:]
        targets = tokens[-scored:]
        chosen = torch.log_softmax(logits.double(), dim=-1).gather(1, targets[:, None])
        return float(chosen.sum()), bool((logits.argmax(dim=-1) == targets).all())


def _until(text: str, stops: Iterable[str]) -> str:
    """The text up to the first of the stop texts."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends, default=len(text))]
