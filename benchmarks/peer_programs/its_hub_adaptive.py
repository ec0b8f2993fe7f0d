"""What a user of its-hub writes for AdaptiveSelfConsistency."""

from its_hub import AdaptiveSelfConsistency, OpenAICompatibleLanguageModel
from its_hub.api import ChatMessage
from its_hub.core.algorithms.self_consistency import create_regex_projection_function


def answer(url: str, messages: list, samples: int, max_tokens: int, temperature: float) -> str:
    model = OpenAICompatibleLanguageModel(
        url, "none", "default", max_completion_tokens=max_tokens, temperature=temperature
    )
    voted = create_regex_projection_function(r"answer is ([^.\n]+)")
    algorithm = AdaptiveSelfConsistency(consistency_space_projection_func=voted)
    return algorithm.infer(model, [ChatMessage.from_dict(one) for one in messages], budget=samples)["content"]
