"""The OpenAI HTTP API over the engine: FastAPI and uvicorn in front of :mod:`dq_runtime.runtime.engine`.

``run`` starts and stops it, ``app`` puts it together, ``gate`` is what every request passes. An endpoint (``chat``,
``completions``, ``responses``) is a schema (what may be asked), a route (HTTP request in, engine requests out) and a
form (what the answer looks like); ``job`` is the engine requests of one answer, ``answer`` sends it whole or streamed.
Needs the extra ``serve``; nothing else in the package imports this folder but the command line, and that lazily.
"""
