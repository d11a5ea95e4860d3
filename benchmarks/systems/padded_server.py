"""A server as one would write it today: LitServe around a transformers model, batches padded to their longest text.

    python benchmarks/systems/padded_server.py FOLDER PORT [--texts 8]

FOLDER is a sequence classifier. Needs litserve, which nothing else here does.
"""

import argparse

import litserve
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Classifier(litserve.LitAPI):
    def __init__(self, folder: str, texts: int):
        super().__init__(max_batch_size=texts, batch_timeout=0.0)
        self.folder = folder

    def setup(self, device: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(self.folder).eval()

    def decode_request(self, request: dict) -> str:
        return request["text"]

    def batch(self, inputs: list[str]) -> list[str]:
        return inputs

    def predict(self, texts: str | list[str]) -> list[list[float]]:
        inputs = self.tokenizer(
            [texts] if isinstance(texts, str) else texts, padding=True, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            return self.model(**inputs).logits.softmax(-1).tolist()

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        return output

    def encode_response(self, output: list) -> dict:
        scores = output[0] if isinstance(output[0], list) else output
        return {"scores": scores}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("port", type=int)
    parser.add_argument("--texts", type=int, default=8, help="of a batch, at most")
    options = parser.parse_args()
    server = litserve.LitServer(Classifier(options.folder, options.texts), accelerator="cpu", timeout=False)
    server.run(host="127.0.0.1", port=options.port, num_api_servers=1, generate_client_file=False, log_level="error")
