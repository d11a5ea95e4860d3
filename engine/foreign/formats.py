"""What tasks are exported as; here alone, since the command line names them before torch is imported."""

from typing import Literal

Format = Literal["hugging-face", "peft", "onnx"]
