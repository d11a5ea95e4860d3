"""What requests and responses are made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Text = str | Annotated[list[str], Field(min_length=1)]
Label = str | float | list[str]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")  # a misspelt field is an error, and not passed over


class Predict(_Strict):
    texts: list[Text] = Field(min_length=1, description="Each a text, or a list of texts for tasks on several.")
    tasks: list[str] = Field([], description="Names; none: all that take as many texts.")
    truncate: bool = Field(True, description="Whether texts beyond the longest length lose their end, or are refused.")
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"texts": ["a gripping film", ["A man sings.", "Someone sings."]]}]},
    )


class Prediction(BaseModel):
    label: Label = Field(description="A class, a list of them, a number, a tag for each word, or a text.")
    score: float | list[float | None] | None = Field(None, description="Its probability.")
    scores: dict[str, float] | None = Field(None, description="The probability of every class.")


class Predictions(BaseModel):
    predictions: list[dict[str, Prediction]] = Field(description="Of each text, what every task says of it.")
    truncated: list[int] = Field(description="Places of the texts that lost their end.")


class Generate(_Strict):
    texts: list[str] = Field(min_length=1)
    task: str | None = Field(None, description="May be left out where one task writes.")
    max_new_tokens: int | None = Field(None, ge=1, description="At most as many as the run's search.max_new_tokens.")
    truncate: bool = True


class Texts(BaseModel):
    texts: list[str] = Field(description="What was written for each text.")
    truncated: list[int]


class Inputs(_Strict):
    """As text-embeddings-inference takes them."""

    inputs: str | list[str] | list[list[str]] = Field(
        description="A text; a list: a pair of texts; a list of lists: several texts or pairs."
    )
    truncate: bool = False


class Score(BaseModel):
    label: str
    score: float


class TaskInfo(BaseModel):
    name: str
    head: str
    texts: list[str] = Field(description="The columns that its texts were in training.")
    labels: list[str]
    writes: bool
    temperature: float = Field(description="By which its logits are divided for probabilities; 1: not calibrated.")


class Info(BaseModel):
    name: str
    version: str
    digest: str = Field(description="SHA-256 of the weights.")
    device: str
    max_length: int = Field(description="Tokens of the longest sequence.")
    max_batch_tokens: int
    max_waiting_tokens: int
    tasks: list[TaskInfo]


class Fault(BaseModel):
    loc: list[str | int] = Field(description="Where in the request.")
    msg: str
    type: str


class Refusal(BaseModel):
    detail: list[Fault]
