"""What a user writes for one sample; with optillm the same, and its own URL."""

from openai import OpenAI


def answer(url: str, messages: list, samples: int, max_tokens: int, temperature: float) -> str:
    client = OpenAI(base_url=url, api_key="none")
    reply = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    return reply.choices[0].message.content
