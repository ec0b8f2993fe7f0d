"""What a user of its-hub writes for the best of several samples, of which the model itself is the judge."""

from its_hub import BestOfN, LLMJudge, OpenAICompatibleLanguageModel
from its_hub.api import ChatMessage


def answer(url: str, messages: list, samples: int, max_tokens: int, temperature: float) -> str:
    model = OpenAICompatibleLanguageModel(
        url, "none", "default", max_completion_tokens=max_tokens, temperature=temperature
    )
    judge = LLMJudge(OpenAICompatibleLanguageModel(url, "none", "default", max_completion_tokens=128))
    return BestOfN(judge).infer(model, [ChatMessage.from_dict(one) for one in messages], budget=samples)["content"]
