"""Where an engine computes, and what `trunkline tune` found to be fastest there."""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import torch

from trunkline.engine.cache_folder import cache_folder
from trunkline.kernels.decisions import Choices, use
from trunkline.kernels.dispatch import has_kernels, triton


def usable_device(name: str) -> torch.device:
    """The device of that name; auto: a GPU if there is one; of several processes, which torchrun numbers, each its own.
    Ops take from now on what was tuned for it.

    Raises:
        ValueError: there is none, or it cannot be used here.
    """
    device = _named(name)
    use_tuned(device)
    return device


def _named(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ and (gpus := torch.cuda.device_count()):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % gpus)
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        return device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        here = ["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0]
        raise ValueError(f"config: device '{name}' cannot be used: {reason}; here are {', '.join(here)}") from error


def card(device: torch.device) -> dict[str, str]:
    """What a choice of `trunkline tune` was made on, and is good for: the GPU, its driver and what compiles for it."""
    from trunkline import __version__

    return {
        "device": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "torch": str(torch.__version__),
        "triton": str(getattr(triton, "__version__", "not installed")),
        "trunkline": __version__,
    }


def _driver() -> str:
    try:
        (version,) = re.findall(r"NVRM version:.*?(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except (OSError, ValueError):  # not Linux
        return "unknown"
    return version


def tuned_file(device_name: str) -> Path:
    """Where the choices for a kind of GPU are kept."""
    return cache_folder() / "tuned" / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower())}.json"


def read_tuned(made_on: Mapping[str, str]) -> tuple[Choices, str]:
    """What `trunkline tune` chose on such a card, and a sentence about it. No choices where there is no file, a damaged
    one, or one from before another driver or release was installed."""
    try:
        path = tuned_file(made_on["device"])
        content = json.loads(path.read_text(encoding="utf-8"))
        choices, about = content["choices"], content["made on"]
        if content["sha256"] != _digest(about, choices):
            raise ValueError("it is not what was written")
    except FileNotFoundError:
        return {}, f"not tuned for {made_on['device']}: `trunkline tune CONFIG` would choose the fastest kernels once"
    except RuntimeError:  # nobody's home
        return {}, ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"{path} cannot be used ({error}): tune again; the defaults serve"
    if differences := [
        f"{key} {about.get(key)}, here {value}" for key, value in made_on.items() if about.get(key) != value
    ]:
        return {}, f"{path} was made on {'; '.join(differences)}: tune again; the defaults serve"
    return choices, f"tuned for {made_on['device']}: {_count(choices)} choices of {path}"


def write_tuned(made_on: Mapping[str, str], choices: Choices) -> Path:
    """Adds choices to those that were made on the same card; the file is complete or as it was.

    Raises:
        OSError: the cache cannot be written.
        RuntimeError: there is none; the user has no home.
    """
    path, before = tuned_file(made_on["device"]), read_tuned(made_on)[0]
    names = sorted({*before, *choices})
    merged = {name: {**before.get(name, {}), **choices.get(name, {})} for name in names}
    content = {"made on": dict(made_on), "choices": merged, "sha256": _digest(made_on, merged)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        file = Path(temporary) / path.name
        file.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(file, path)
    return path


def use_tuned(device: torch.device) -> str:
    """Takes what was chosen on this kind of card from now on, in this process; a sentence about it, where there is a
    GPU. TRUNKLINE_TUNED=0 leaves the defaults, to tell a choice's fault from others."""
    if not has_kernels(device) or device.type != "cuda":
        return ""
    if os.environ.get("TRUNKLINE_TUNED") == "0":
        use({})
        return "TRUNKLINE_TUNED=0: what `trunkline tune` chose is left out"
    choices, told = read_tuned(card(device))
    use(choices)
    return told


def _count(choices: Choices) -> int:
    return sum(map(len, choices.values()))


def _digest(made_on: Mapping[str, str], choices: Choices) -> str:
    return sha256(json.dumps([dict(made_on), choices], sort_keys=True).encode()).hexdigest()
