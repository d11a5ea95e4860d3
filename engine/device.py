"""Where an engine computes."""

import os

import torch


def usable_device(name: str) -> torch.device:
    """The device of that name; auto: a GPU if there is one; of several processes, which torchrun numbers, each its own.

    Raises:
        ValueError: there is none, or it cannot be used here.
    """
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
