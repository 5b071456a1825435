"""Lines of symbolic mathematics: what `shard` draws is right, and `evaluate` counts what a model answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from training_support import make_context, read_events

from polytrope.models import build_model
from polytrope.models.checkpoint import save_model
from polytrope.pipeline.data.description import read_dataset
from polytrope.pipeline.data.evaluation_file import read_evaluation
from polytrope.pipeline.data.expressions import (
    POINTS,
    UndefinedError,
    is_expression,
    split_line,
    value_and_slope,
)
from polytrope.pipeline.data.promised import PromisedImages, PromisedModel, PromisedText
from polytrope.pipeline.data.reader import open_split
from polytrope.pipeline.data.tokenization import Tokenizer, read_tokenizer
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stage import Artifact, Resources
from polytrope.pipeline.stages.evaluate.answers import Line, answer_of, held_out_lines, line_of, mark
from polytrope.pipeline.stages.evaluate.evaluate import evaluate
from polytrope.pipeline.stages.evaluate.evaluate import promise as promise_evaluation
from polytrope.pipeline.stages.evaluate.parameters import EvaluateParameters
from polytrope.pipeline.stages.shard import symbolic
from polytrope.pipeline.stages.shard.corpus import is_validation
from polytrope.pipeline.stages.shard.parameters import ShardParameters
from polytrope.pipeline.stages.shard.shard import fingerprint, promise, shard
from polytrope.pipeline.stages.shard.symbolic import LinesTask, draw_lines

LENGTH = 48


def drawn(task: Any = "derivative", count: int = 60, depth: int = 4, seed: int = 0) -> list[str]:
    return draw_lines(LinesTask(task, seed, depth, 0, count))


def function_of(text: str) -> Callable[[Any], Any]:
    """An independent reading of prefix notation: a function of numbers of mpmath."""
    words = iter(text.split())
    binary = {
        "+": mpmath.fadd,
        "-": mpmath.fsub,
        "*": mpmath.fmul,
        "/": mpmath.fdiv,
        "pow": lambda a, b: mpmath.mpf(a) ** b,
    }
    unary = {"sin": mpmath.sin, "cos": mpmath.cos, "exp": mpmath.exp, "log": mpmath.log}

    def read() -> Callable[[Any], Any]:
        word = next(words)
        if word == "x":
            return lambda x: x
        if word in binary:
            left, right = read(), read()
            return lambda x: binary[word](left(x), right(x))
        if word in unary:
            inner = read()
            return lambda x: unary[word](inner(x))
        return lambda _x: mpmath.mpf(int(word))

    found = read()
    assert next(words, None) is None
    return found


@pytest.mark.parametrize("task", ["derivative", "integral"])
def test_sixty_of_sixty_pairs_agree_with_numerical_differentiation(task: str) -> None:
    right = 0
    for line in drawn(task):
        question, answer = line.split(" ; ")
        function, derivative = (question, answer) if task == "derivative" else (answer, question)
        with mpmath.workdps(50):
            right += all(
                mpmath.almosteq(mpmath.diff(function_of(function), x), function_of(derivative)(x), rel_eps=1e-20)
                for x in (mpmath.mpf(point.numerator) / point.denominator for point in POINTS)
            )
        words = set(function.split())
        assert words <= {"+", "-", "*", "/", "pow", "sin", "cos", "exp", "log", "x", *"12345"}
    assert right == 60


def test_integrals_are_the_pairs_reversed_and_depth_bounds_the_expression() -> None:
    forwards, backwards = drawn(), drawn("integral")
    assert [" ; ".join(reversed(line.split(" ; "))) for line in forwards] == backwards
    for depth in (1, 2):
        sizes = [len(line.partition(" ; ")[0].split()) for line in drawn(depth=depth)]
        assert max(sizes) == 2 ** (depth + 1) - 1
    assert drawn(seed=1) != forwards


def test_value_and_slope_are_those_of_the_functions() -> None:
    for text in ("pow x pow x 2", "/ sin * 3 x log + 1 x", "- exp cos x pow 2 x", "pow / x 5 -3", "- * -2 x 7"):
        for point in POINTS:
            value, slope = value_and_slope(text, point)
            with mpmath.workdps(50):
                x = mpmath.mpf(point.numerator) / point.denominator
                assert mpmath.almosteq(value, function_of(text)(x), rel_eps=1e-45)
                assert mpmath.almosteq(slope, mpmath.diff(function_of(text), x), rel_eps=1e-20)
    for text in (
        "/ 1 - x x", "log - x 5", "pow - x 5 / 1 2", "pow 5 pow 5 pow 5 5", "exp exp exp 5", "9" * 5000,
        "pow - x x - x x", "/ x - 1 1", "pow - * 7 x 3 / 1 2",
    ):  # fmt: skip
        assert is_expression(text)
        with pytest.raises(UndefinedError):
            value_and_slope(text, Fraction(3, 7))
    for power, slope in ((1, 7), (2, 0)):  # of 7 x - 3 where it is 0
        assert value_and_slope(f"pow - * 7 x 3 {power}", Fraction(3, 7)) == (0, slope)


LINE = Line((0,), "* x x", "* 2 x")


@pytest.mark.parametrize(
    ("answer", "valid", "correct", "exact"),
    [
        ("* 2 x", True, True, True),
        (" *  2 x ", True, True, True),
        ("+ x x", True, True, False),
        ("/ pow * 2 x 3 * 4 * x x", True, True, False),
        ("+ * 2 x - sin / 1 3 sin / 1 3", True, True, False),
        ("* 3 x", True, False, False),
        ("+ * 2 x / 1 pow 10 14", True, False, False),
        ("x", True, False, False),
        ("log - 0 x", True, False, False),
        ("* 2", False, False, False),
        ("* 2 x x", False, False, False),
        ("2 * x", False, False, False),
        ("* 2 y", False, False, False),
        ("* 2.0 x", False, False, False),
        ("", False, False, False),
        ("* 2 x ; x", False, False, False),
        (None, False, False, False),
    ],
)
def test_an_answer_is_right_however_it_is_written(answer: str | None, valid: bool, correct: bool, exact: bool) -> None:
    found = mark("derivative", LINE, answer)
    assert (found.valid, found.correct, found.exact) == (valid, correct, exact)


def test_an_integral_is_right_up_to_a_constant() -> None:
    line = Line((0,), "* 2 x", "* x x")
    assert mark("integral", line, "+ 7 pow x 2").correct
    assert not mark("integral", line, "* 2 x").correct
    own = [split_line(text) for text in drawn("integral", 20)]
    assert all(mark("integral", Line((0,), *pair), pair[1]).exact for pair in own if pair)
    assert all(mark("integral", Line((0,), *pair), f"+ 3 {pair[1]}").correct for pair in own if pair)


def parameters(**changes: Any) -> ShardParameters:
    source = {"kind": "symbolic", "task": "derivative", "count": 300, "depth": 2, **changes.pop("source", {})}
    given = {"source": source, "tokenizer": {"kind": "bytes"}, "sequence_length": LENGTH, "validation_fraction": 0.2}
    return ShardParameters.model_validate({**given, **changes})


def documents(output: Path, split: str) -> list[str]:
    """Of a split, as its blocks hold them."""
    tokenizer, reader = read_tokenizer(output), open_split(output, split)
    stream = reader.samples(np.arange(len(reader)))
    tokens = [*stream[0].tolist(), *stream[1:, 1:].reshape(-1).tolist()]
    found: list[list[int]] = [[]]
    for token in tokens:
        if token == tokenizer.end_of_text:
            found.append([])
        else:
            found[-1].append(token)
    return [tokenizer.decode(tokens) for tokens in found]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    directory = tmp_path_factory.mktemp("symbolic")
    shard(make_context(directory, workers=1), parameters())
    return Artifact(directory / "output", "digest", "shard")


def test_the_text_is_the_same_whatever_the_tasks_workers_and_shards(
    tmp_path: Path, dataset: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = drawn(count=300, depth=2)
    assert (
        lines
        == [
            line for first in range(0, 300, 37) for line in draw_lines(LinesTask("derivative", 0, 2, first, first + 37))
        ][:300]
    )
    assert drawn(count=3, depth=4, seed=5) == [  # whatever the seed of Python's hashes
        "- cos x 1 ; * -1 sin x",
        "log log + log x 4 ; / 1 * * x + log x 4 log + log x 4",
        "log + 3 / + x x sin x ; / + / * * -2 x cos x pow sin x 2 / 2 sin x + / * 2 x sin x 3",
    ]
    whole = documents(dataset.path, "train")
    expected = [line for line in dict.fromkeys(lines) if not is_validation(line.encode(), 0.2)]
    assert whole[:-1] == expected[: len(whole) - 1]
    assert len(whole) >= len(expected) - 1
    about = read_dataset(dataset.path)
    assert about.kind == "text"
    assert about.task == "derivative"
    assert about.left_out == {"lines that were drawn before": 300 - len(set(lines))}

    monkeypatch.setattr(symbolic, "LINES_PER_TASK", 70)
    context = make_context(tmp_path / "two", workers=2)
    shard(context, parameters())
    assert read_dataset(context.output) == about
    events = read_events(tmp_path / "two", "progress")
    told = [event["message"] for event in events if "of 300 lines" in event["message"]]
    assert told == [f"{done} of 300 lines" for done in (70, 140, 210, 280, 300)]


@pytest.mark.parametrize(
    ("changes", "said", "way"),
    [
        (
            {"source": {"kind": "symbolic", "task": "derivative", "count": 2}},
            "2 lines, none for the",
            "draw more lines",
        ),
        (
            {"sequence_length": 5000},
            "the validation split has too little text for one sample of 5000",
            "draw more lines",
        ),
    ],
)
def test_too_few_lines_are_told_by_what_draws_more(
    tmp_path: Path, changes: dict[str, Any], said: str, way: str
) -> None:
    with pytest.raises(UserError, match=rf"source\.count: {said}") as refused:
        shard(make_context(tmp_path), parameters(**changes))
    assert refused.value.hint.startswith(way)


def test_held_out_lines_are_the_whole_documents_of_the_split(tmp_path: Path) -> None:
    shard(make_context(tmp_path), parameters(shard_bytes=400))
    output = tmp_path / "output"
    tokenizer, reader = read_tokenizer(output), open_split(output, "validation")
    assert len(json.loads((output / "validation" / "manifest.json").read_text())["shards"]) > 2
    found = held_out_lines(output, reader, tokenizer, LENGTH, 10**6)
    own = [line for line in dict.fromkeys(drawn(count=300, depth=2)) if is_validation(line.encode(), 0.2)]
    lines = [f"{line.question} ; {line.answer}" for line in found.lines]
    assert set(lines) <= set(own)
    fitting = [line for line in own if len(line) + 2 <= LENGTH]
    assert len(fitting) > len(lines) >= 0.8 * len(fitting)  # the last of each shard is cut
    assert {line.prompt[0] for line in found.lines} == {tokenizer.end_of_text}
    assert [tokenizer.decode(line.prompt[1:]) for line in found.lines] == [f"{line.question} ;" for line in found.lines]
    short = held_out_lines(output, reader, tokenizer, 20, 10**6)
    assert 0 < len(short.lines) < len(found.lines)
    assert len(short.lines) + short.too_long == len(found.lines) + found.too_long
    assert len(held_out_lines(output, reader, tokenizer, LENGTH, 3).lines) == 3
    with pytest.raises(UserError, match="answers: no line of the validation split fits into 3 tokens"):
        held_out_lines(output, reader, tokenizer, 3, 5)


def test_the_stage_counts_what_models_answer(
    tmp_path: Path, dataset: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, reader = read_tokenizer(dataset.path), open_split(dataset.path, "validation")
    lines = held_out_lines(dataset.path, reader, tokenizer, LENGTH, 6).lines
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "sequence_length": LENGTH, "n_layer": 1, "n_head": 2, "n_embd": 48}
    model: Any = build_model("gpt2", {**sizes, "activation": "gelu"})
    save_model(tmp_path / "untrained", model, tokenizer=dataset.path)
    # learns the first four by heart, and of the others something that is wrong
    texts = [f"{line.question} ; {line.answer if place < 4 else '+ 5 5'}" for place, line in enumerate(lines)]
    rows = torch.full((6, LENGTH), tokenizer.end_of_text)
    for row, text in zip(rows, texts, strict=True):
        row[1 : 1 + len(text)] = torch.tensor(tokenizer.encode(text))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
    save_model(tmp_path / "trained", model.eval(), tokenizer=dataset.path)
    models = {name: Artifact(tmp_path / name, name, "train") for name in ("trained", "untrained")}
    settings: dict[str, Any] = {"answers": {"count": 6}, "sample_tokens": 0, "activation_samples": 0}
    metrics = evaluate(make_context(tmp_path / "run"), dataset, models, EvaluateParameters.model_validate(settings))
    found = read_evaluation(tmp_path / "run" / "output").models
    answers = found["trained"].answers
    assert answers is not None
    assert (answers.task, answers.lines, answers.valid, answers.correct, answers.exact) == ("derivative", 6, 6, 4, 4)
    assert metrics["trained/answers_correct"] == pytest.approx(4 / 6)
    assert metrics["untrained/answers_valid"] == 0.0
    assert not any("questions" in event["text"] for event in read_events(tmp_path / "run", "message"))

    settings |= {"precision": "bf16"}
    settings["answers"]["count"] = 10**5
    kinds: set[torch.dtype] = set()

    def generate(network: Any, *arguments: Any, **keywords: Any) -> Any:
        handle = network.lm_head.register_forward_hook(lambda _module, _inputs, logits: kinds.add(logits.dtype))
        made = original(network, *arguments, **keywords)
        handle.remove()
        return made

    original = type(model).generate
    monkeypatch.setattr(type(model), "generate", generate)
    untrained = {"untrained": models["untrained"]}
    evaluate(make_context(tmp_path / "all"), dataset, untrained, EvaluateParameters.model_validate(settings))
    answers = read_evaluation(tmp_path / "all" / "output").models["untrained"].answers
    assert answers is not None
    assert kinds == {torch.bfloat16}
    assert [event["text"] for event in read_events(tmp_path / "all", "message")] == [
        f"answers: {answers.lines} questions instead of 100000: the validation split has no more whole lines that "
        f"differ ({answers.too_long} others are too long for the context)"
    ]


def test_an_answer_without_end_or_with_tokens_that_are_none_is_no_expression() -> None:
    tokenizer = Tokenizer(None)
    assert answer_of([*b" x", 256, *b"sin"], tokenizer) == " x"
    assert answer_of([*b" x", 300, 256], tokenizer) is None
    assert answer_of([*b" x"], tokenizer) is None
    assert answer_of([256, 300], tokenizer) == ""


def test_generation_ends_where_every_row_has_ended() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "sequence_length": 40, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model: Any = build_model("gpt2", {**sizes, "activation": "gelu"})
    tokens = torch.tensor([[1, 2], [3, 4]])
    whole = model.generate(tokens, 30, temperature=0.0)
    end = int(whole[0, 6])
    made = model.generate(tokens, 30, temperature=0.0, end=end)
    ends = [row.index(end) for row in whole[:, 2:].tolist() if end in row]
    last = max(ends) + 1 if len(ends) == 2 else 30
    assert torch.equal(made, whole[:, : 2 + last])
    alone = model.generate(tokens[:1], 30, temperature=0.0, end=end)
    assert alone.size(1) < 2 + 30
    assert int(alone[0, -1]) == end


@pytest.mark.parametrize(
    "wrong", [{"count": 1}, {"depth": 5}, {"depth": 0}, {"seed": -1}, {"task": "limit"}, {"operators": ["+"]}], ids=str
)
def test_bad_sources_are_refused_by_their_field(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=rf"source\.symbolic\.{next(iter(wrong))}"):
        parameters(source=wrong)


def test_answers_are_for_questions() -> None:
    asked = parameters()
    assert fingerprint(asked, Path.cwd()) == {"sympy": version("sympy")}
    text = promise(asked, {}, Resources(), Path.cwd())
    assert text.task == "derivative"
    given = EvaluateParameters.model_validate({"answers": {"count": 5}})
    model = {"models": {"m": PromisedModel("gpt2", {})}}
    promise_evaluation(given, {**model, "dataset": text}, Resources(), Path.cwd())
    with pytest.raises(UserError, match="answers: the lines of this dataset ask no questions"):
        promise_evaluation(given, {**model, "dataset": PromisedText(LENGTH, 257, "bytes")}, Resources(), Path.cwd())
    images = {"models": {"m": PromisedModel("convnext", {})}, "dataset": PromisedImages(32, 3, 10)}
    with pytest.raises(UserError, match="answers: for text, and this dataset holds images"):
        promise_evaluation(given, images, Resources(), Path.cwd())
    with pytest.raises(ValidationError, match=r"answers\.count"):
        EvaluateParameters.model_validate({"answers": {"count": 0}})


def test_a_tokenizer_that_joins_question_and_answer_is_refused() -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, trainers

    backend = Backend(models.BPE())
    backend.decoder = decoders.Fuse()
    texts = ["sin x ; cos x"] * 5
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=100, special_tokens=["<|endoftext|>"]))
    tokenizer = Tokenizer(backend)
    tokens = tokenizer.encode(texts[0])
    assert len(tokens) == 1  # nothing cuts the text before its merges
    with pytest.raises(UserError, match="a token of this tokenizer holds `;` and what follows it"):
        line_of([0, *tokens, 0], texts[0], tokenizer)
