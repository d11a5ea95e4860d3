"""Where an engine computes."""

import torch


def usable_device(name: str) -> torch.device:
    """The device of that name; auto: a GPU if there is one.

    Raises:
        ValueError: there is none, or it cannot be used here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
