"""Masks of models with several sequences: every layer counts the real rows of its own sequence.

What each layer received is recorded by hooks of this file; which of it is real, each test says.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

import lowrank_ops as lro
from lowrank_ops.models.layers import is_conv
from tests.sums import assert_sums

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SMALL_BART = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 50,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 16,
}  # fmt: skip


def ids(*shape):
    return torch.randint(3, 48, shape)


def mask_of(*lengths, positions):
    return (torch.arange(positions) < torch.tensor(lengths).unsqueeze(1)).long()


def t5():
    config = transformers.T5Config(
        d_model=16, d_ff=24, num_layers=1, num_heads=2, d_kv=8, vocab_size=50, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SMALL_BART))


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_key_value_heads=1, vocab_size=50, pad_token_id=0, **SMALL)
    )


def check(model, batches, real, mask="attention_mask", forward=None, dtype=torch.float64, **options):
    """Compare every layer's sums with its own rows, of which ``real(fqn, x)`` is the mask or None."""
    model = model.to(dtype).eval()
    seen = {}

    def record(fqn, x):
        rows = real(fqn, x)
        seen.setdefault(fqn, []).append((x if rows is None else x[rows.bool()]).reshape(-1, x.shape[-1]))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        covariances = lro.calibrate(model, batches, mask=mask, forward=forward, **options)
    handles = [
        model.get_submodule(fqn).register_forward_pre_hook(lambda m, args, fqn=fqn: record(fqn, args[0]))
        for fqn in covariances
        if not is_conv(model.get_submodule(fqn))  # all their patches count
    ]
    for batch in batches:  # with gradients, without which torch's encoder removes the padding
        forward(model, batch) if forward else model(**batch)
    for handle in handles:
        handle.remove()
    for fqn, rows in seen.items():
        assert covariances[fqn].activations.count == sum(map(len, rows)), fqn
        assert_sums(covariances[fqn].activations, torch.cat(rows).detach())
    assert covariances
    return covariances, "\n".join(str(one.message) for one in caught if "mask" in str(one.message))


# Both sides have the same shape, so that the masks differ by meaning alone.
TWO_SIDES = {
    "input_ids": ids(3, 9), "attention_mask": mask_of(9, 4, 6, positions=9),
    "decoder_input_ids": ids(3, 9), "decoder_attention_mask": mask_of(2, 9, 5, positions=9),
}  # fmt: skip
OF_ENCODER = ("encoder.", "EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj", "encoder_attn.v_proj")


def side(fqn):
    return "attention_mask" if any(name in fqn for name in OF_ENCODER) else "decoder_attention_mask"


@pytest.mark.parametrize("how", ["attention_mask", "by module", "by pattern"])
@pytest.mark.parametrize("build", [t5, bart])
def test_encoder_and_decoder_have_their_own_masks(build, how):
    model = build()
    prefix = "" if build is t5 else "model."
    mask = {
        "attention_mask": "attention_mask",
        "by module": {f"{prefix}encoder": "attention_mask", f"{prefix}decoder": "decoder_attention_mask"},
        "by pattern": {
            "re:(model.)?encoder": lambda args, kwargs: kwargs["attention_mask"],
            "re:(model.)?decoder": "decoder_attention_mask",
        },
    }[how]
    _, warned = check(model, [TWO_SIDES], lambda fqn, x: TWO_SIDES[side(fqn)], mask)
    assert not warned


def test_positional_batches_have_masks_too():
    batch = (TWO_SIDES["input_ids"], TWO_SIDES["attention_mask"])
    covariances = lro.calibrate(transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL)), [batch],
                                mask="attention_mask")  # fmt: skip
    assert covariances["encoder.layer.0.attention.self.query"].activations.count == batch[1].sum()


def test_decoder_without_a_mask_is_counted_whole_or_refused():
    batch = {name: value for name, value in TWO_SIDES.items() if name != "decoder_attention_mask"}

    def real(fqn, x):
        return batch["attention_mask"] if side(fqn) == "attention_mask" else None

    _, warned = check(t5(), [batch], real)
    start = "decoder.block.0.layer.0.SelfAttention.q, decoder.block.0.layer.0.SelfAttention.o, "
    assert start in warned and "more: is in 'decoder', which was called without attention_mask" in warned
    with pytest.raises(ValueError, match=r"mask of layer 'decoder\S+' is unknown: it is in 'decoder'"):
        lro.calibrate(t5(), [batch], mask="attention_mask", unmasked_rows="error")
    assert not check(t5(), [batch], real, {"encoder": "attention_mask", "decoder": None}, unmasked_rows="error")[1]


def test_one_function_for_two_sequences_is_refused():
    with pytest.raises(ValueError, match=r"'encoder' and 'decoder' process different sequences; pass mask="):
        lro.calibrate(t5(), [TWO_SIDES], mask=lambda args, kwargs: kwargs["attention_mask"])


@pytest.mark.parametrize("build", [t5, bart])
def test_encoder_rows_are_masked_in_generate(build):
    batch = {"input_ids": ids(3, 6), "attention_mask": mask_of(6, 2, 4, positions=6)}
    forward = lambda model, batch: model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)  # noqa: E731
    real = lambda fqn, x: batch["attention_mask"] if side(fqn) == "attention_mask" else None  # noqa: E731
    check(build(), [batch], real, forward=forward)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
def test_padded_prompts_are_masked_in_generate(cache):
    batch = {"input_ids": ids(3, 6), "attention_mask": mask_of(6, 2, 4, positions=6).flip(1)}
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}

    def forward(model, batch):
        return model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, **options)

    def real(fqn, x):
        if cache == "static" or fqn == "lm_head" or (cache and x.shape[1] == 1):
            return None  # a static cache comes with masks (batch, 1, positions, positions), which give no mask of rows
        return torch.cat([batch["attention_mask"], torch.ones(3, x.shape[1] - 6, dtype=torch.long)], 1)

    _, warned = check(llama(), [batch], real, forward=forward)
    assert bool(warned) is (cache == "static")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_relative_positions_are_not_masked(batch_size):
    config = transformers.DebertaV2Config(
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=4, vocab_size=50,
        norm_rel_ebd="layer_norm", max_position_embeddings=16, **SMALL
    )  # fmt: skip
    # Eight positions, as many as there are relative positions.
    batch = {"input_ids": ids(batch_size, 8), "attention_mask": mask_of(*[3, 8, 5][:batch_size], positions=8)}
    count = []

    def real(fqn, x):
        count.append(fqn)
        relative = x.shape[0] == 1 and count.count(fqn) % 2 == 0 and "_proj" in fqn and "value" not in fqn
        return None if relative else batch["attention_mask"]

    batches = [batch, {"input_ids": ids(batch_size, 8), "attention_mask": batch["attention_mask"]}]
    covariances, warned = check(transformers.DebertaV2Model(config), batches, real)
    assert not warned
    first = "encoder.layer.0.attention.self.query_proj"
    assert covariances[first].activations.count == 2 * (int(batch["attention_mask"].sum()) + 8)


def test_image_patches_are_not_masked():
    vision = transformers.CLIPVisionConfig(image_size=16, patch_size=8, **SMALL)
    text = transformers.LlamaConfig(num_key_value_heads=1, vocab_size=50, pad_token_id=0, **SMALL)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=49, vision_feature_layer=-1
    )
    model = transformers.LlavaForConditionalGeneration(config)
    for positions in (4, 5, 9):  # as many as patches, with and without the class token, and others
        batch = {
            "input_ids": torch.cat([ids(2, positions - 4), torch.full((2, 4), 49)], 1), "pixel_values":
            torch.randn(2, 3, 16, 16), "attention_mask": mask_of(positions, positions - 2, positions=positions).flip(1)
        }  # fmt: skip
        batch["pixel_values"] = batch["pixel_values"].double()
        text = batch["attention_mask"]
        real = lambda fqn, x, text=text: None if "vision_tower" in fqn or "projector" in fqn else text  # noqa: E731
        _, warned = check(model, [batch], real)
        assert "lm_head" not in warned and "projector.linear_2: is outside 'model.language_model'" in warned


def test_text_of_clip_is_masked_and_its_images_are_not():
    config = transformers.CLIPConfig(
        text_config={"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 8, **SMALL},
        vision_config={"image_size": 16, "patch_size": 8, **SMALL}, projection_dim=8,
    )  # fmt: skip
    batch = {"input_ids": ids(2, 5), "attention_mask": mask_of(5, 3, positions=5)}
    batch["pixel_values"] = torch.randn(2, 3, 16, 16).double()
    _, warned = check(
        transformers.CLIPModel(config), [batch],
        lambda fqn, x: batch["attention_mask"] if fqn.startswith("text_model") else None,
    )  # fmt: skip
    assert not warned


def test_whisper_masks_its_decoder_alone():
    options = {name: value for name, value in SMALL_BART.items() if name != "max_position_embeddings"}
    config = transformers.WhisperConfig(
        max_source_positions=9, max_target_positions=9, num_mel_bins=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, **options,
    )  # fmt: skip
    batch = {name: value for name, value in TWO_SIDES.items() if name.startswith("decoder")}
    batch["input_features"] = torch.randn(3, 8, 18).double()
    model = transformers.WhisperForConditionalGeneration(config)
    mask = {"model.encoder": None, "model.decoder": "decoder_attention_mask"}
    real = lambda fqn, x: None if side(fqn) == "attention_mask" else batch["decoder_attention_mask"]  # noqa: E731
    assert not check(model, [batch], real, mask)[1]
    assert not check(model, [batch], real)[1]
    # Of spectrogram frames, twice as many as the encoder's rows; Whisper's encoder ignores it.
    frames = {**batch, "attention_mask": mask_of(18, 7, 11, positions=18)}
    assert not check(model, [frames], real)[1]


def test_audio_masks_are_reduced_to_frames():
    config = transformers.Wav2Vec2Config(
        conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_feat_extract_layers=2, vocab_size=50,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **SMALL,
    )  # fmt: skip
    model = transformers.Wav2Vec2Model(config)
    batch = {"input_values": torch.randn(2, 41).double(), "attention_mask": mask_of(41, 20, positions=41)}
    frames = model._get_feature_vector_attention_mask(9, batch["attention_mask"])
    assert frames.sum().item() not in (18, 0)
    assert not check(model, [batch], lambda fqn, x: frames)[1]


def test_padding_of_a_mixtral_is_masked(monkeypatch):
    monkeypatch.setattr("lowrank_ops.models.experts.MIN_ROWS", 0)  # no rows that went to other experts
    config = transformers.MixtralConfig(num_key_value_heads=1, vocab_size=50, num_local_experts=4, **SMALL)
    model = transformers.MixtralForCausalLM(config).eval()
    batch = {"input_ids": ids(3, 7), "attention_mask": mask_of(7, 2, 4, positions=7)}
    real, seen, experts = batch["attention_mask"].bool().flatten(), {}, "model.layers.0.mlp.experts"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        covariances = lro.calibrate(model, [batch], mask="attention_mask")
    hook = model.get_submodule(experts).register_forward_pre_hook(lambda m, args: seen.update(x=args[0], index=args[1]))
    with torch.no_grad():
        model(**batch)
    hook.remove()
    for expert in range(4):
        rows = seen["x"][(seen["index"] == expert).any(1) & real]
        layer = covariances.get(f"{experts}.{expert}.gate_up_proj")
        assert (0 if layer is None else layer.activations.count) == len(rows)
        if len(rows):
            assert_sums(layer.activations, rows, rtol=1e-5)
    assert covariances["model.layers.0.self_attn.o_proj"].activations.count == real.sum()


def test_positions_first_are_not_taken_for_the_batch():
    config = transformers.XLNetConfig(vocab_size=50, d_model=16, n_layer=1, n_head=2, d_inner=24)
    model, lengths = transformers.XLNetModel(config), (6, 2, 4, 3, 5, 1)
    batch = {"input_ids": ids(3, 6), "attention_mask": mask_of(*lengths[:3], positions=6)}
    assert not check(model, [batch], lambda fqn, x: batch["attention_mask"].T)[1]
    square = {"input_ids": ids(6, 6), "attention_mask": mask_of(*lengths, positions=6)}
    assert "layer.0.ff.layer_1: has an activation (6, 6, 16) whose" in check(model, [square], lambda fqn, x: None)[1]
    with pytest.raises(ValueError, match=r"mask of layer 'layer.0.ff.layer_1' is unknown"):
        lro.calibrate(model, [square], mask="attention_mask", unmasked_rows="error")


class Routed(nn.Module):
    """Experts that are Linears; the first one receives all tokens, in another order."""

    def __init__(self):
        super().__init__()
        self.first, self.experts = nn.Linear(16, 16), nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x, attention_mask):
        x = self.first(x).flatten(0, 1)
        return self.experts[0](x.flip(0)).flip(0) + self.experts[1](x[::2]).repeat_interleave(2, 0)


def test_rows_of_experts_have_no_mask_by_their_number():
    batch = {"x": torch.randn(2, 4, 16).double(), "attention_mask": mask_of(4, 1, positions=4)}
    real = lambda fqn, x: batch["attention_mask"] if fqn == "first" else None  # noqa: E731
    _, warned = check(Routed(), [batch], real)
    assert "experts.0: has an activation (8, 16)" in warned and "experts.1: has an activation (4, 16)" in warned


class TwoEncodings(nn.Module):
    """One encoder for questions and answers of the same length, as in sentence encoders."""

    def __init__(self):
        super().__init__()
        self.bert = transformers.BertModel(transformers.BertConfig(vocab_size=50, **SMALL))

    def forward(self, question, question_mask, answer, answer_mask):
        q = self.bert(input_ids=question, attention_mask=question_mask).pooler_output
        return q @ self.bert(input_ids=answer, attention_mask=answer_mask).pooler_output.T


def test_each_call_of_a_shared_encoder_has_its_own_mask():
    batch = {"question": ids(3, 6), "question_mask": mask_of(6, 1, 2, positions=6)}
    batch |= {"answer": ids(3, 6), "answer_mask": mask_of(5, 6, 4, positions=6)}
    masks, calls = [batch["question_mask"], batch["answer_mask"]], []

    def real(fqn, x):
        calls.append(fqn)
        return None if "pooler" in fqn else masks[calls.count(fqn) % 2 - 1]

    with pytest.raises(ValueError, match=r"mask='question_mask' is one of several masks .*\(answer_mask\)"):
        lro.calibrate(TwoEncodings(), [batch], mask="question_mask")
    assert not check(TwoEncodings(), [batch], real)[1]


class TorchEncoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=batch_first)
        self.encoder, self.head = nn.TransformerEncoder(layer, 1), nn.Linear(16, 4)

    def forward(self, src, src_key_padding_mask=None):
        return self.head(self.encoder(src, src_key_padding_mask=src_key_padding_mask).relu())


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
def test_key_padding_masks_are_true_for_padding(batch_first, floats):
    real = mask_of(5, 1, 3, 2, 4, positions=5).bool()  # as many samples as positions
    x = torch.randn(5, 5, 16).double()
    padding = torch.zeros(5, 5).double().masked_fill(~real, -torch.inf) if floats else ~real
    batch = {"src": x, "src_key_padding_mask": padding}
    rows = real if batch_first else real.T
    whole = () if batch_first else ("head",)  # unknown: the head may as well have batches first
    _, warned = check(
        TorchEncoder(batch_first), [batch], lambda fqn, x: None if fqn in whole else rows, "src_key_padding_mask",
        sensitivity="output",
    )  # fmt: skip
    assert ("head: has an activation (5, 5, 16)" in warned) is bool(whole)


class TorchTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Transformer(16, 2, 1, 1, 24, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, src, tgt, src_key_padding_mask, tgt_key_padding_mask):
        masks = {"src_key_padding_mask": src_key_padding_mask, "tgt_key_padding_mask": tgt_key_padding_mask}
        masks["memory_key_padding_mask"] = src_key_padding_mask
        return self.head(self.both(src, tgt, **masks).relu())


def test_both_sides_of_a_torch_transformer():
    source, target = mask_of(4, 1, 3, positions=4).bool(), mask_of(2, 4, 3, positions=4).bool()
    batch = {"src": torch.randn(3, 4, 16).double(), "tgt": torch.randn(3, 4, 16).double()}
    batch |= {"src_key_padding_mask": ~source, "tgt_key_padding_mask": ~target}
    rows = {"both.encoder": source, "both.decoder": target}
    real = lambda fqn, x: rows.get(".".join(fqn.split(".")[:2]))  # noqa: E731
    _, warned = check(TorchTransformer(), [batch], real, "src_key_padding_mask")
    assert "head" in warned
    mask = {"both.encoder": "src_key_padding_mask", "re:both.decoder|head": "tgt_key_padding_mask"}
    rows["head"] = target
    assert not check(TorchTransformer(), [batch], real, mask)[1]


def test_polarity_is_not_guessed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x, padding_mask):
            return self.fc(x)

    batch = {"x": torch.randn(2, 3, 4), "padding_mask": torch.tensor([[0, 0, 1], [0, 1, 1]])}
    with pytest.raises(ValueError, match=r"mask='padding_mask': the name does not show whether true means padding"):
        lro.calibrate(Model(), [batch], mask="padding_mask")
    covariances = lro.calibrate(Model(), [batch], mask=lambda args, kwargs: kwargs["padding_mask"] == 0)
    assert covariances["fc"].activations.count == 3
    with pytest.raises(ValueError, match=r"mask holds negative values, as masks do that are added"):
        lro.calibrate(Model(), [batch], mask=lambda args, kwargs: kwargs["padding_mask"] * -1e4)
    with pytest.raises(ValueError, match=r"and labels of padding"):
        lro.calibrate(Model(), [batch], mask=lambda args, kwargs: kwargs["padding_mask"] * -100)
    with pytest.raises(ValueError, match=r"mask holds NaN; pass one that is true or 1"):
        lro.calibrate(Model(), [batch], mask=lambda args, kwargs: kwargs["padding_mask"] * torch.nan)


class Reads(nn.Module):
    """Rows of another sequence, which are named as such by the parameter."""

    def __init__(self):
        super().__init__()
        self.own, self.other = nn.Linear(4, 4), nn.ModuleDict({"kv": nn.Linear(4, 4)})

    def forward(self, x, memory, attention_mask):
        return self.own(x) + self.other["kv"](memory)


@pytest.mark.parametrize(
    ("mask", "rows"),
    [("attention_mask", 6), ({"": "attention_mask"}, 3), ({"own": "attention_mask", "other": None}, 6)],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:the masks of these layers are unknown")
def test_rows_of_another_sequence_have_the_mask_that_is_named(mask, rows):
    real = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": torch.randn(2, 3, 4), "memory": torch.randn(2, 3, 4), "attention_mask": real}
    covariances = lro.calibrate(Reads(), [batch], mask=mask)
    assert [layer.activations.count for layer in covariances.values()] == [3, rows]
    same = lro.calibrate(Reads(), [{**batch, "memory": batch["x"]}], mask="attention_mask")  # attends to itself
    assert [layer.activations.count for layer in same.values()] == [3, 3]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"encodr": "attention_mask"}, ValueError, r"key 'encodr', which names no module"),
        ({"layer.0.SelfAttention.q": "m"}, ValueError, r"did you mean 'encoder\S+SelfAttention.q'"),
        ({"re:nothing.*": "attention_mask"}, ValueError, r"key 're:nothing.\*', which names no module"),
        ({0: "attention_mask"}, TypeError, r"keys of mask must be names of modules"),
        ({"encoder": 3}, TypeError, r"mask\['encoder'\] must be the name of an argument"),
        (torch.ones(2, 2), TypeError, r"mask must be the name of an argument"),
        ({"encoder": "atention_mask"}, ValueError, r"mask\['encoder'\]='atention_mask' is not among"),
    ],
)  # fmt: skip
def test_bad_masks_are_named(mask, error, message):
    with pytest.raises(error, match=message):
        lro.calibrate(t5(), [TWO_SIDES], mask=mask)
    with pytest.raises(ValueError, match=r"unmasked_rows must be 'count' or 'error'; got 'skip'"):
        lro.calibrate(t5(), [TWO_SIDES], mask="attention_mask", unmasked_rows="skip")


def test_all_steps_take_masks_by_module():
    """Padding may hold anything, on both sides, in every step."""
    mask = {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
    torch.manual_seed(0)
    dense = t5().double().eval()
    spoiled = dict(TWO_SIDES)
    for side_of in ("", "decoder_"):
        ids_name, mask_name = f"{side_of}input_ids", f"{side_of}attention_mask"
        spoiled[ids_name] = torch.where(TWO_SIDES[mask_name] == 1, TWO_SIDES[ids_name], 1)
    found = []
    for batch in (TWO_SIDES, spoiled):
        model = copy.deepcopy(dense)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            statistics = lro.calibrate(
                model, [batch], mask=mask, sensitivity=lambda output, batch: _loss(output, batch)
            )
            again = lro.SequentialReconstruction([batch], mask=mask)
            config = lro.CompressionConfig(4, projection="output")
            lro.compress_(model, statistics, config, reconstruction=again)
            found.append(lro.measure_errors(dense, model, [batch], mask=mask))
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def _loss(output, batch):
    return output.logits[batch["decoder_attention_mask"].bool()].square().sum() / 2
