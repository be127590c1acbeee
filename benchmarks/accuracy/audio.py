"""Voiced sounds as frames of 1,024 samples at 16 kHz: synthesized tones, and speech where espeak-ng is installed."""

from __future__ import annotations

import math
import shutil
import subprocess
import wave
from io import BytesIO

import numpy as np
import torch
from torch import Tensor

RATE = 16_000  # Hz
FRAME = 1024  # samples
KINDS = ("tones", "short-tones", "speech")

# Voices and sentences of calibration and of the test have nothing in common.
VOICES = {
    "calibration": ("en-us+m1", "en-us+f1", "en-us+m4", "en-us+f4"),
    "test": ("en-gb+m3", "en-gb+f2", "en-gb+m7"),
}
_SENTENCES = {
    "calibration": (
        "The harbour was quiet when the last ferry came in.",
        "Who would carry nine heavy books up a hill in the rain?",
        "A yellow lamp was burning above the miller's window.",
        "My brother never learned to row, and now he owns a boat.",
        "Eleven people waited in line for warm bread.",
        "Do you remember the name of the river we crossed?",
    ),
    "test": (
        "Over the meadow a lonely bird is calling again.",
        "When will the engine be ready, Monday or Wednesday?",
        "She wrote her answer in green ink along the margin.",
        "All morning the wind blew sand under the door.",
        "Nobody in the village knew where the old road led.",
        "Give me one moment and I will open the gate.",
    ),
}


def frames(kind: str, part: str, count: int, seed: int = 0) -> Tensor:
    """Frames of zero mean and unit variance in random order, (count, 1024), float32.

    Args:
        kind: ``"tones"``, ``"short-tones"`` (ten times as many notes in as many frames) or ``"speech"``.
        part: ``"calibration"`` or ``"test"``: other sounds of the same kind.
        count: number of frames.
        seed: of the choice of frames.

    Raises:
        RuntimeError: speech without espeak-ng.
        ValueError: fewer frames than requested.
    """
    note = {"tones": 1.0, "short-tones": 0.1}.get(kind)
    audio = _speech(part) if note is None else _tones(part, count / 50, note)
    found = audio.unfold(0, FRAME, RATE // 100)  # one every 10 ms
    found = found[found.square().mean(1) > 1e-3 * audio.square().mean()]  # no silence
    if len(found) < count:
        raise ValueError(f"count must be at most {len(found)}, the frames of {kind} for the {part}; got {count}.")
    chosen = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]]
    chosen = chosen - chosen.mean(1, keepdim=True)
    return chosen / chosen.std(1, keepdim=True)


def _tones(part: str, seconds: float, note: float) -> Tensor:
    """Notes of ``note`` seconds: harmonics that fall at a rate of their own, vibrato, and some breath."""
    generator = torch.Generator().manual_seed(1 if part == "calibration" else 2)
    time = torch.arange(round(note * RATE)) / RATE
    notes = []
    for _ in range(math.ceil(seconds / note)):
        pitch, slope, depth, speed, breath = torch.rand(5, generator=generator).tolist()
        lowest = 70 * 2 ** (3.3 * pitch)  # 70 to 690 Hz
        bend = 0.3 * depth * torch.sin(2 * math.pi * (4 + 3 * speed) * time) / 12  # octaves: up to 0.3 semitones
        phase = 2 * math.pi * torch.cumsum(lowest * 2**bend, 0) / RATE
        order = torch.arange(1, int(RATE / 2 / (1.1 * lowest)) + 1)
        strength = order ** -(0.5 + 1.5 * slope) * torch.rand(len(order), generator=generator)
        shift = 2 * math.pi * torch.rand(len(order), 1, generator=generator)
        tone = (strength[:, None] * torch.sin(order[:, None] * phase + shift)).sum(0)
        tone /= tone.std()
        notes.append(tone + 0.1 * breath * torch.randn(len(time), generator=generator))
    return torch.cat(notes)


def _speech(part: str) -> Tensor:
    spoken = [say(sentence, voice) for voice in VOICES[part] for sentence in _SENTENCES[part]]
    return torch.cat(spoken)


def say(text: str, voice: str, words_per_minute: int = 175) -> Tensor:
    """Samples at 16 kHz.

    Raises:
        RuntimeError: espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise RuntimeError("speech needs espeak-ng: apt-get install espeak-ng.")
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "--stdout", text]
    data = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(BytesIO(data)) as file:
        rate = file.getframerate()
        samples = np.frombuffer(data[44:], dtype=np.int16).astype(np.float32) / 2**15
    return _resample(torch.from_numpy(samples), rate)


def _resample(samples: Tensor, rate: int) -> Tensor:
    """To 16 kHz; frequencies above 8 kHz are dropped."""
    length = len(samples) * RATE // rate
    kept = torch.fft.rfft(samples)[: length // 2 + 1]
    return torch.fft.irfft(kept, n=length) * (length / len(samples))
