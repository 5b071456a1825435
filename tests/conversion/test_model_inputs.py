"""Models with several inputs, from the command: what the calibration data is, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conversion_support import own_model, read_json, write_bert, write_texts, write_tokenizer

from polytrope.models.formats import read_model
from polytrope.pipeline.commands.cli import main
from polytrope.pipeline.errors import UserError
from polytrope.pipeline.stages.convert.calibration_data import array_batches, file_batches, longest_input
from polytrope.pipeline.stages.convert.parameters import ConvertParameters

T5 = {"vocab_size": 97, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
WHISPER = {
    "vocab_size": 97, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8,
    "max_source_positions": 20, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip


def test_an_encoder_decoder_is_converted_on_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(decoder_start_token_id=3, **T5)).save_pretrained(tmp_path / "t5")
    write_tokenizer(tmp_path / "t5")
    data = ["--data", str(write_texts(tmp_path)), "--degree", "4"]
    assert main(["convert", str(tmp_path / "t5"), str(tmp_path / "out"), *data]) == 0
    assert "the decoder reads the encoder's tokens, shifted by one" in capsys.readouterr().err
    layers = [layer["name"] for layer in read_json(tmp_path / "out" / "conversion.json")["layers"]]
    assert [name.partition(".")[0] for name in layers] == ["encoder", "decoder"]
    model = read_model(tmp_path / "t5")
    batch = file_batches(model, tmp_path / "t5", [tmp_path / "texts.txt"], ConvertParameters(), lambda _text: None)[0]
    assert batch["decoder_input_ids"][:, 0].unique().tolist() == [3]
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])


def test_a_model_of_sound_is_converted_on_arrays_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    WhisperForConditionalGeneration(WhisperConfig(**WHISPER)).save_pretrained(tmp_path / "whisper")
    generator = np.random.default_rng(0)
    features, tokens = generator.normal(size=(6, 8, 40)), generator.integers(3, 97, size=(6, 5))
    np.save(tmp_path / "features.npy", features)
    np.savez(tmp_path / "all.npz", input_features=features, decoder_input_ids=tokens)
    np.savez(tmp_path / "other.npz", input_features=features, decoder_inputs=tokens)
    np.savez(tmp_path / "short.npz", input_features=features, decoder_input_ids=tokens[:4])
    run = ["convert", str(tmp_path / "whisper"), str(tmp_path / "out"), "--degree", "4", "--batch-size", "4", "--data"]
    for name, message in (
        ("features.npy", "has a decoder, and the data has nothing for it"),
        ("other.npz", "decoder_inputs is no input of WhisperForConditionalGeneration"),
        ("short.npz", "columns of different lengths: input_features 6, decoder_input_ids 4"),
    ):
        assert main([*run, str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err
    assert main([*run, str(tmp_path / "all.npz"), "--onnx"]) == 0
    assert "it takes any batch and length" in capsys.readouterr().out
    layers = [layer["name"] for layer in read_json(tmp_path / "out" / "conversion.json")["layers"]]
    assert layers == [
        "model.encoder.layers.0.activation_fn",
        "model.encoder.gelu_call_1",
        "model.encoder.gelu_call_2",
        "model.decoder.layers.0.activation_fn",
    ]


def test_arrays_are_split_by_rows_and_a_model_with_one_input_takes_one(tmp_path: Path) -> None:
    model = own_model("gpt2")
    np.savez(tmp_path / "one.npz", tokens=np.ones((5, 4), dtype=np.int32))
    assert [batch["tokens"].shape for batch in array_batches(model, tmp_path / "one.npz", 2, 3)] == [(2, 4), (1, 4)]
    np.savez(tmp_path / "two.npz", tokens=np.ones((5, 4), dtype=np.int32), targets=np.ones((5, 4), dtype=np.int32))
    with pytest.raises(UserError, match="2 arrays, and a GPT2 has one input"):
        array_batches(model, tmp_path / "two.npz", 2, 3)


@pytest.mark.parametrize(
    ("kind", "positions", "wanted"), [("Bert", 300, 300), ("Roberta", 302, 300), ("MPNet", 302, 300)]
)
def test_all_positions_of_a_model_are_used(tmp_path: Path, kind: str, positions: int, wanted: int) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(max_position_embeddings=positions, intermediate_size=8, **sizes)
    model = getattr(transformers, f"{kind}Model")(config).eval()
    assert longest_input(model, tmp_path) == wanted
    model(input_ids=torch.full((1, wanted), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, wanted + 1), 5))
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 128}')
    assert longest_input(model, tmp_path) == 128


def test_texts_that_are_cut_are_counted_and_said(tmp_path: Path) -> None:
    model = write_bert(tmp_path / "bert")  # of 40 positions
    (tmp_path / "texts.txt").write_text("the cat sat\n" + "the cat " * 30 + "\n" + "a mat " * 20)
    told: list[str] = []
    batches = file_batches(model, tmp_path / "bert", [tmp_path / "texts.txt"], ConvertParameters(), told.append)
    assert max(batch["input_ids"].size(1) for batch in batches) == 40
    assert told == ["calibration: 1 of 3 texts are cut after 40 tokens (the model takes 40)"]
