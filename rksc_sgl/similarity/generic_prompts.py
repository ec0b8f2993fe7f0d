"""Prompts of many kinds, whose mean state is what all prompts have in common.

States of any two prompts point in nearly one direction; what tells them apart is what is left when the mean is taken
off (:func:`rksc_sgl.similarity.gate.pooled_similarity`).
"""

from __future__ import annotations

GENERIC_PROMPTS: tuple[str, ...] = (
    "A train leaves the station at 9:40 and travels 210 kilometers in 3 hours. What is its average speed?",
    "Write a Python function that returns the second largest value in a list of integers.",
    "Summarize the following paragraph in one sentence: Bees find their way home by the position of the sun.",
    "You are a patient tutor. Explain to a ten-year-old why the sky is blue and sunsets are red.",
    "Translate into German: The meeting has been moved to Thursday afternoon because of the strike.",
    "Is the following statement true or false? Every prime number greater than two is odd.",
    "A shop sells 14 loaves before noon and twice as many afterwards. How many loaves does it sell in a day?",
    "List three advantages and three disadvantages of working from home for a small company.",
    "The patient complains of a dry cough and mild fever since Monday. Which questions would you ask first?",
    "Rewrite this sentence in the passive voice: The committee rejected the proposal after a long debate.",
    "SELECT name, price FROM products WHERE price > 20 ORDER BY price; Explain what this query returns.",
    "Write a short poem about a lighthouse keeper who has never seen the sea.",
    "Which planet has the most moons, and how were most of them discovered?",
    "Dear support team, my order arrived with a broken screen. Please tell me how I can return it.",
    "If all cats are animals and some animals are black, does it follow that some cats are black? Give a reason.",
    "Solve for x: 3x + 7 = 25. Think step by step and give the final answer as a number.",
)
