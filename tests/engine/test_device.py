"""What `trunkline tune` found is used on the card that it was found on, and on no other; a damaged file is said."""

import json
import os

import pytest
import torch

from trunkline.engine import device
from trunkline.engine.device import read_tuned, tuned_file, use_tuned, write_tuned
from trunkline.kernels import decisions

CARD = {"device": "NVIDIA Pretended 100", "driver": "1.2", "torch": "2.0", "triton": "3.0", "trunkline": "0.1.0"}
CHOICES = {"attention_tiles.block_tile": {"forward, bfloat16, 64, True": {"BLOCK_M": 64}}}


@pytest.fixture(autouse=True)
def used(own_cache, monkeypatch):
    """Seen as if there were a GPU."""
    monkeypatch.setattr(device, "card", lambda _: CARD)
    monkeypatch.setattr(device, "has_kernels", lambda _: True)
    yield lambda: decisions._used
    decisions.use({})


GPU = torch.device("cuda")


def test_choices_are_used_where_they_were_made(used):
    path = write_tuned(CARD, CHOICES)
    assert path == tuned_file("NVIDIA Pretended 100")
    assert path.name == "nvidia-pretended-100.json"
    assert use_tuned(GPU) == f"tuned for NVIDIA Pretended 100: 1 choices of {path}"
    assert used() == CHOICES


def test_every_engine_on_a_gpu_uses_them(used, monkeypatch):
    write_tuned(CARD, CHOICES)
    monkeypatch.setattr(device, "_named", torch.device)
    assert device.usable_device("cuda") == GPU
    assert used() == CHOICES


def test_without_a_file_the_defaults_stay_and_it_is_said(used):
    assert use_tuned(GPU) == (
        "not tuned for NVIDIA Pretended 100: `trunkline tune CONFIG` would choose the fastest kernels once"
    )
    assert used() == {}


@pytest.mark.parametrize("changed", CARD)
def test_file_of_another_card_driver_or_release_is_said_and_ignored(changed, used):
    path = write_tuned(CARD, CHOICES)
    other = {**CARD, changed: "another"}
    if changed == "device":  # as if somebody had copied it
        path = path.rename(tuned_file("another"))
    choices, told = read_tuned(other)
    assert choices == {}
    assert told == f"{path} was made on {changed} {CARD[changed]}, here another: tune again; the defaults serve"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"BLOCK_M": 64', '"BLOCK_M": 65'),
        lambda text: "[]",
        lambda text: "{}",
        lambda text: "\xff",
    ],
    ids=["empty", "half of it", "another number", "a list", "no keys", "no UTF-8"],
)
def test_damaged_file_is_said_and_ignored(damage, used):
    path = write_tuned(CARD, CHOICES)
    path.write_text(damage(path.read_text()), encoding="latin-1")
    told = use_tuned(GPU)
    assert told.startswith(f"{path} cannot be used (")
    assert told.endswith("tune again; the defaults serve")
    assert used() == {}
    write_tuned(CARD, CHOICES)  # which begins anew
    assert read_tuned(CARD)[0] == CHOICES


def test_what_is_written_adds_to_what_was_there():
    write_tuned(CARD, CHOICES)
    write_tuned(
        CARD, {"attention_tiles.block_tile": {"forward, bfloat16, 128, True": {"BLOCK_M": 128}}, "other": {"1": 2}}
    )
    of_tiles = {"forward, bfloat16, 64, True": {"BLOCK_M": 64}, "forward, bfloat16, 128, True": {"BLOCK_M": 128}}
    assert read_tuned(CARD)[0] == {"attention_tiles.block_tile": of_tiles, "other": {"1": 2}}


def test_write_that_is_cut_off_leaves_the_file_as_it_was(monkeypatch):
    path = write_tuned(CARD, CHOICES)

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_tuned(CARD, {"other": {"1": 2}})
    assert read_tuned(CARD)[0] == CHOICES
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_defaults_can_be_had_in_spite_of_it(used, monkeypatch):
    write_tuned(CARD, CHOICES)
    monkeypatch.setenv("TRUNKLINE_TUNED", "0")
    assert use_tuned(GPU) == "TRUNKLINE_TUNED=0: what `trunkline tune` chose is left out"
    assert used() == {}


def test_cpu_is_never_tuned(used):
    write_tuned(CARD, CHOICES)
    assert use_tuned(torch.device("cpu")) == ""
    assert used() == {}


def test_card_is_named_by_all_that_compiles_for_it(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    found = device.card(GPU)
    assert found["device"] == "NVIDIA H100 80GB HBM3"
    assert found["torch"] == torch.__version__
    assert found.keys() == CARD.keys()
    assert json.dumps(found)
