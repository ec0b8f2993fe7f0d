"""What a user writes for the branch that the model itself judges best, with one request."""

from openai import OpenAI


def answer(url: str, messages: list, samples: int, max_tokens: int, temperature: float) -> str:
    client = OpenAI(base_url=url, api_key="none")
    reply = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=max_tokens,
        temperature=temperature,
        extra_body={"rksc": {"branches": samples, "select": "score", "early_stop": False}},
    )
    return reply.choices[0].message.content
