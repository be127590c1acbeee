"""Models and data by name: transformers folders, files of texts, folders of images; and runs that are resumed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_ops as lro
from lowrank_ops import cli
from lowrank_ops.cli import compress
from tests import docs_models

transformers = pytest.importorskip("transformers")
PIL_Image = pytest.importorskip("PIL.Image")

TEXT = ("--model", f"hf:{docs_models.LANGUAGE_MODEL}", "--calibration", "text:texts.txt")
IMAGES = ("--model", f"hf:{docs_models.VIT}", "--calibration", "images:photos")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, a vision model, texts and images."""
    folder = tmp_path_factory.mktemp("saved")
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(folder)
        docs_models.save_language_model()
        docs_models.save_vit()
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(docs_models.VIT)
        docs_models.save_texts("texts.txt", copies=3)
        Path("photos/inside").mkdir(parents=True)
        for i in range(10):
            pixels = torch.randint(256, (20, 30, 3), dtype=torch.uint8).numpy()
            PIL_Image.fromarray(pixels).save(
                f"photos/{'inside/' if i % 2 else ''}{i}.{'png' if i < 5 else 'JPG'}", "PNG"
            )
    return folder


@pytest.fixture(autouse=True)
def in_folder(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    monkeypatch.setattr(sys, "path", list(sys.path))


def run(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """What a command prints: its result, or the last line of its errors."""
    assert cli.main(list(argv)) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err.splitlines()[-1]


@pytest.mark.filterwarnings("ignore:fewer calibration rows")
class TestTransformers:
    def test_language_model_is_compressed_and_loads_again(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "smaller"
        text = run(capsys, "compress", *TEXT, "--sensitivity", "fisher", "--budget", "0.7", "--out", str(out))
        assert f"transformers.Qwen3ForCausalLM.from_pretrained({str(out)!r})" in text
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert any(isinstance(module, lro.LowRankLinear) for module in model.modules())
        tokens = transformers.AutoTokenizer.from_pretrained(out)("The harbor was quiet", return_tensors="pt")
        assert model(**tokens).logits.isfinite().all()

    def test_padding_of_texts_does_not_count(self, capsys: pytest.CaptureFixture[str]) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(docs_models.LANGUAGE_MODEL)
        texts = [text for text in Path("texts.txt").read_text().split("\n\n") if text.strip()][:5]
        argv = ("--samples", "5", "--batch-size", "3", "--max-length", "7", "--json")
        found = json.loads(run(capsys, "analyze", *TEXT, *argv))
        rows = {layer["rows"] for layer in found["utilization"]["layers"] if "q_proj" in layer["fqn"]}
        assert rows == {sum(min(7, len(tokenizer(text)["input_ids"])) for text in texts)}

    def test_images_are_prepared_as_the_model_needs_them(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "smaller"
        text = run(capsys, "compress", *IMAGES, "--samples", "9", "--ranks", str(_ranks(tmp_path)), "--out", str(out))
        assert "ViTForImageClassification.from_pretrained" in text
        model = transformers.AutoModelForImageClassification.from_pretrained(out)
        processor = transformers.AutoImageProcessor.from_pretrained(out)
        image = PIL_Image.open("photos/0.png").convert("RGB")
        assert model(**processor(images=[image], return_tensors="pt")).logits.shape == (1, 10)
        found = json.loads(run(capsys, "analyze", *IMAGES, "--samples", "9", "--json"))
        assert {layer["rows"] for layer in found["utilization"]["layers"]} == {9 * 16, 9 * 17, 9}


@pytest.mark.filterwarnings("ignore:fewer calibration rows")
def test_a_folder_is_compressed_without_loading_it(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--budget", "0.7", "--pivoted", "--projection", "output", "--keep-dense", "re:.*q_proj", "--json")
    run(capsys, "compress", *TEXT, *options, "--tokens", "0.9", "--save-covariances", "c.safetensors", "--out", "whole")
    folder = ("compress", "--from-checkpoint", TEXT[1].partition(":")[2], "--covariances", "c.safetensors")
    found = json.loads(run(capsys, *folder, *options, "--out", "streamed"))
    assert all(layer["rows"] < 400 for layer in found["compression"]["layers"])
    assert Path("streamed", "tokenizer.json").exists()
    models = [load_file(f"{out}/model.safetensors") for out in ("whole", "streamed")]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert any(name.endswith("k_proj.order") for name in models[0])
    assert not any(name.endswith("q_proj.order") for name in models[0])
    for flags, part in {
        ("--reconstruct", "blocks"): "leave out --reconstruct",
        ("--model", "hf:x"): "leave out --model",
        ("--sensitivity", "fisher"): "leave out --sensitivity",
        ("--device", "nowhere"): "device='nowhere' cannot be used here",
        ("--max-memory", "1kB"): "max_memory is 1000 B. Pass a larger",
        ("--latency", "0.5", "--pivoted"): "--pivoted cannot be combined with --latency",
        ("--latency", "0.5"): "with --covariances it needs --latencies",
    }.items():
        assert part in run(capsys, *folder, *flags, "--out", "refused", code=2)
    assert "needs --covariances" in run(capsys, *folder[:3], *TEXT[2:], "--out", "refused", code=2)
    assert not Path("refused").exists()


def _ranks(folder: Path) -> Path:
    path = folder / "ranks.json"
    path.write_text('{"re:.*(intermediate|output).dense|.*fc.*|.*query|.*q_proj": 8}')
    return path


class TestRefused:
    @pytest.mark.parametrize(
        ("argv", "part"),
        [
            (("--model", "hf:nowhere", *TEXT[2:]), "--model hf:nowhere: no such folder; a name of the"),
            ((*TEXT[:3], "text:none.txt"), "--calibration text:none.txt: cannot be read: No such file"),
            ((*TEXT[:3], "text:photos/0.png"), "text:photos/0.png: is not UTF-8 text"),
            ((*TEXT[:3], "text:empty.txt"), "holds no text; write texts with empty lines between them"),
            ((*IMAGES[:3], "images:nowhere"), "images:nowhere: no such folder"),
            ((*IMAGES[:3], "images:google"), "images:google: holds no images (.bmp"),
            ((*IMAGES[:3], "images:torn"), "--calibration images:torn: reading 'torn/0.png' failed"),
            ((*IMAGES, "--max-length", "9"), "--max-length is for --calibration text:FILE"),
            ((*TEXT[:3], "docs:batches", "--samples", "3"), "--samples is for --calibration text:FILE or images:DIR"),
            (("--model", "collections:Counter", *TEXT[2:]), "MODEL collections:Counter must return a torch.nn.Module"),
            (("docs:model", *TEXT), "one model is needed: --model hf:DIR, timm:NAME or module:function"),
            (TEXT[2:], "one model is needed"),
            ((*TEXT, "--batch-size", "0"), "must be a whole number from 1; got '0'"),
            (("--model", "hf:t5", *TEXT[2:]), "the model is an encoder with a decoder; pass module:function"),
            (("--model", "hf:odd", *TEXT[2:]), "config.json names no transformers class (architectures: ['Odd'])"),
            (("--model", "hf:words", *TEXT[2:]), "names no transformers class (architectures: ['AutoTokenizer'])"),
        ],
    )  # fmt: skip
    def test_bad_names(self, saved: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], part: str) -> None:
        Path("empty.txt").write_text("\n \n")
        Path("torn").mkdir(exist_ok=True)
        Path("torn/0.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
        config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=20)
        if not Path("t5").exists():
            transformers.T5Model(config).save_pretrained("t5")
            transformers.BertConfig(architectures=["Odd"]).save_pretrained("odd")
            transformers.BertConfig(architectures=["AutoTokenizer"]).save_pretrained("words")
        assert part in run(capsys, "analyze", *argv, code=2)

    def test_names_of_the_hub_are_looked_up(
        self, saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        line = run(capsys, "analyze", "--model", "hf:no/where", *TEXT[2:], code=2)
        assert "hf:no/where: no such folder; loading it from the Hugging Face Hub failed: OSError: We couldn't" in line

    def test_missing_library_is_named(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "timm", None)
        line = run(capsys, "analyze", "--model", "timm:resnet18", *IMAGES[2:], code=2)
        assert "--model timm: needs timm: pip install timm" in line


def test_timm_models_and_their_transform(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The calls of timm's functions; timm itself is not installed for the tests."""
    asked = {}

    def create_model(name: str, pretrained: bool) -> nn.Module:
        asked[name] = pretrained
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))

    def create_transform(size: int, is_training: bool):
        assert not is_training
        return lambda image: torch.full((3, size, size), image.size[0] / 30)

    data = SimpleNamespace(
        resolve_model_data_config=lambda model: {"size": 2}, create_transform=create_transform
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=create_model, data=data))
    found = json.loads(run(capsys, "analyze", "--model", "timm:tiny", *IMAGES[2:], "--batch-size", "4", "--json"))
    assert (asked, found["utilization"]["layers"][0]["rows"]) == ({"tiny": True}, 10)


@pytest.mark.filterwarnings("ignore:fewer calibration rows")
class TestResume:
    def test_interrupted_run_goes_on(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        argv = ("compress", *TEXT, "--samples", "6", "--budget", "0.7", "--reconstruct", "sequential", "--out")
        assert cli.main([*argv, str(tmp_path / "whole")]) == 0
        out, folder = tmp_path / "out", tmp_path / "out.resume"

        def interrupted(*args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(compress, "compress_", interrupted)
            assert cli.main([*argv, str(out), "--resume"]) == 130
        assert (folder / "covariances.safetensors").exists() and not out.exists()
        line = run(capsys, *argv, str(out), "--resume", "--samples", "7", code=2)
        assert "is of another run, which differs in samples" in line
        with monkeypatch.context() as patch:
            patch.setattr("lowrank_ops.cli.inputs.calibrate", interrupted)  # would end the run
            assert cli.main([*argv, str(out), "--resume"]) == 0
        assert "--resume takes the covariances from" in capsys.readouterr().err
        assert not folder.exists()
        first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
        assert first == second


def test_completions_come_from_argcomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    parsers = []
    monkeypatch.setitem(sys.modules, "argcomplete", SimpleNamespace(autocomplete=parsers.append))
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    assert cli.main(["analyze"]) == 2
    assert "compress" in parsers[0].format_help()


def test_module_function_is_named_before_it_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Path("names_its_code.py").write_text("import sys\nprint('running', file=sys.stderr)\nbatches = lambda: []")
    assert cli.main(["analyze", *TEXT[:3], "names_its_code:batches"]) == 1
    lines = capsys.readouterr().err.splitlines()
    named = next(i for i, line in enumerate(lines) if "--calibration runs names_its_code:batches, code of" in line)
    assert named < lines.index("running") and str(Path("names_its_code.py").resolve()) in lines[named]
