"""The HTTP server of `bardling serve`: OpenAI's interface for completions and chat, and a page at /.

A request passes through these files, in this order:

    server.py      listens; on SIGTERM, finishes running requests, then exits
    protocol.py    HTTP/1.1 with limits on connections and headers
    guard.py       who may call: host, origin, key; counts requests; refuses all while the server shuts down
    app.py         routes: body -> request -> worker -> response
    requests.py    checks a body: every value has a type and bounds
    models.py      models by name: loaded on demand, unloaded when others need the memory (catalog.py: which there are)
    worker.py      one thread per model drives its inference engine
    responses.py   completions in OpenAI's shapes

Everything that a client sends is untrusted and bounded: connections, bytes, tokens, completions, waiting requests, time. An
error has OpenAI's shape (errors.py) and never a traceback. Nothing here knows how text is generated (`generation/`), or prints
(`cli/serve.py`).
"""
