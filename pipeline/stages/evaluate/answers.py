"""What a model answers to the questions of held-out lines `question ; answer`, checked by computing it.

An answer is right where it has the values of the reference at three rational points in 50-digit arithmetic, however it
is written (Lample & Charton, Deep Learning for Symbolic Mathematics, 2019, check in the same spirit).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from polytrope.pipeline.data.description import read_manifest
from polytrope.pipeline.data.evaluation_file import AnswerFigures
from polytrope.pipeline.data.expressions import SEPARATOR, Task, UndefinedError, is_expression, is_right, split_line
from polytrope.pipeline.data.reader import Reader
from polytrope.pipeline.data.tokenization import Tokenizer
from polytrope.pipeline.errors import UserError


@dataclass(frozen=True)
class Line:
    """A held-out line: the end of the document before it and the tokens up to and with the separator, as a model has
    seen them in training, and both sides as text."""

    prompt: tuple[int, ...]
    question: str
    answer: str


@dataclass(frozen=True)
class HeldOut:
    """Lines that fit into the context, each once; `too_long`: so many others stood between them."""

    lines: list[Line]
    too_long: int


def held_out_lines(dataset: Path, reader: Reader, tokenizer: Tokenizer, length: int, count: int) -> HeldOut:
    """The first `count` lines of the validation split that a context of `length` tokens holds with both ends.

    Raises:
        UserError: a document that is no such line; none that fits.
    """
    found: dict[str, Line] = {}
    too_long: set[str] = set()
    for tokens in _documents(dataset / "validation", reader, tokenizer.end_of_text):
        text = tokenizer.decode(tokens)
        if text in found or text in too_long:
            continue
        if len(tokens) + 2 > length:
            too_long.add(text)
            continue
        found[text] = line_of(tokens, text, tokenizer)
        if len(found) == count:
            break
    if not found:
        raise UserError(
            f"answers: no line of the validation split fits into {length} tokens",
            "use a longer sequence_length, or expressions of a smaller depth",
        )
    return HeldOut(list(found.values()), len(too_long))


def _documents(directory: Path, reader: Reader, end: int) -> Iterator[list[int]]:
    """Whole documents of a split: its blocks overlap by one token within a shard, whose last document may be cut."""
    first = 0
    for shard in read_manifest(directory)[1]:
        rest: list[int] = []
        for place in range(first, first + shard["samples"]):
            block = reader.samples(np.array([place]))[0]
            for token in (block if place == first else block[1:]).tolist():
                if token == end:
                    yield rest
                    rest = []
                else:
                    rest.append(token)
        first += shard["samples"]


def line_of(tokens: list[int], text: str, tokenizer: Tokenizer) -> Line:
    """The line of a document.

    Raises:
        UserError: it is none, or no token ends where the question does.
    """
    parts = split_line(text)
    if parts is None or not all(map(is_expression, parts)):
        raise UserError(f"answers: the validation split has a document that is no line of expressions: `{text[:80]}`")
    for size in range(1, len(tokens)):
        start = tokenizer.decode(tokens[:size])
        if SEPARATOR in start:
            if start.rstrip().endswith(SEPARATOR):
                return Line((tokenizer.end_of_text, *tokens[:size]), *parts)
            break
    raise UserError(
        f"answers: a token of this tokenizer holds `{SEPARATOR}` and what follows it, so that a question has no end",
        "use the tokenizer `bpe` or `bytes`",
    )


def measure_answers(
    model: nn.Module,
    held_out: HeldOut,
    task: Task,
    tokenizer: Tokenizer,
    batch_size: int,
    progress: Callable[[int], None],
) -> AnswerFigures:
    """Let the model answer all questions, always with the most probable token, and count.

    Args:
        model: a GPT-2 of this package.
        progress: told how many lines are done.
    """
    groups: dict[int, list[Line]] = defaultdict(list)
    for line in held_out.lines:
        groups[len(line.prompt)].append(line)
    done, marks = 0, []
    for lines in groups.values():
        for start in range(0, len(lines), batch_size):
            batch = lines[start : start + batch_size]
            for line, answer in zip(batch, _answers(model, batch, tokenizer), strict=True):
                marks.append(mark(task, line, answer))
            done += len(batch)
            progress(done)
    return AnswerFigures(
        task=task,
        lines=len(held_out.lines),
        too_long=held_out.too_long,
        valid=sum(entry.valid for entry in marks),
        correct=sum(entry.correct for entry in marks),
        exact=sum(entry.exact for entry in marks),
    )


@dataclass(frozen=True)
class Mark:
    """What an answer is: an expression, the right one, and written as in the line."""

    valid: bool
    correct: bool
    exact: bool


def mark(task: Task, line: Line, answer: str | None) -> Mark:
    """Check one answer; None: the model came to no end."""
    if answer is None or not is_expression(answer):
        return Mark(valid=False, correct=False, exact=False)
    try:
        correct = is_right(task, line.question, answer)
    except UndefinedError as error:
        raise UserError(f"answers: the question `{line.question}` has no value at a point: {error}") from error
    return Mark(valid=True, correct=correct, exact=answer.split() == line.answer.split())


def _answers(model: nn.Module, lines: list[Line], tokenizer: Tokenizer) -> list[str | None]:
    device = next(model.parameters()).device
    prompts = torch.tensor([line.prompt for line in lines], dtype=torch.long, device=device)
    left = int(model.config.sequence_length) - prompts.size(1)  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        made = model.generate(prompts, left, temperature=0.0, end=tokenizer.end_of_text)  # type: ignore[operator]
    return [answer_of(tokens, tokenizer) for tokens in made[:, prompts.size(1) :].tolist()]


def answer_of(tokens: list[int], tokenizer: Tokenizer) -> str | None:
    """The text up to the end of the document; None where that does not come, or a token before it stands for nothing,
    as an embedding may have more rows than there are tokens."""
    if tokenizer.end_of_text not in tokens:
        return None
    tokens = tokens[: tokens.index(tokenizer.end_of_text)]
    return tokenizer.decode(tokens) if all(token < tokenizer.vocab_size for token in tokens) else None
