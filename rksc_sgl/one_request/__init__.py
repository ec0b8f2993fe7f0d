"""One request is one fork: any OpenAI client gets the selected answer of several branches. Pure: no SGLang, no I/O.

The contract
============

``POST /rksc/v1/chat/completions`` and ``/rksc/v1/completions`` take OpenAI's bodies, with SGLang's own fields, and
answer in OpenAI's schema. A client changes its base URL to ``http://host:port/rksc/v1`` and nothing else.

What is asked of the fork is an object: the body's field ``rksc``; or ``chat_template_kwargs.rksc``; or the header
``x-rksc-fork``, as JSON. What one of them says of a key goes before what the next one says, and what nobody says is
the server's default (``rksc serve --rksc-fork '{...}'``), or that of
:class:`~rksc_sgl.one_request.options.ForkOptions`, which documents each key. A wrong key or value answers 400 in
OpenAI's format, with ``param`` naming it.

1. The prompt is rendered once, by SGLang's own conversion, and each branch is a request of its own with these tokens
   and the client's sampling parameters (``seed`` plus the branch's number). ``n`` is how many choices come back: it
   makes no branches.
2. Branches run as ``early_stop`` says and vote with their ``content``: a thought in ``reasoning_content`` never votes,
   and a branch that calls tools votes with their names and arguments. They are verified in place where the vote does
   not decide, and one is selected, by the code that :func:`rksc_sgl.verify_gated` runs: the same verdict for the same
   texts.
3. The answer's choices are the selected branches, the best first: ``n`` of them, or with ``return`` ``all`` every one
   that finished. ``usage`` has the prompt once, the completion tokens of all branches, also of those that were
   stopped, and in its details what was cached of the prompt before the fork. ``rksc`` has the whole verdict.
4. A stream sends progress as comments, which clients ignore, then the selected text in chunks. ``rksc`` stands in the
   chunk with the last ``finish_reason``.
5. Limits of the server (:class:`~rksc_sgl.one_request.options.ForkLimits`): too many branches or tokens answer 400,
   too many forks at once 429. After the deadline the best of the branches that finished is returned, without further
   verification, and ``rksc.partial`` is true; where none finished the answer is 504.
6. A client that goes away ends every request of its fork.

:class:`~rksc_sgl.one_request.fork.Fork` is the course of one fork as events in, actions out;
``sglang_plugin/one_request`` carries it out in the server's HTTP process.
"""
