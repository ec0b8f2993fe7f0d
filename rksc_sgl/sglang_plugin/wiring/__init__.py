"""How our code gets into SGLang's processes: the table of hooks, admission, and the radix backend's name."""
