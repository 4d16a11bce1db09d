"""The HTTP server of `bardling serve`: OpenAI's interface for completions and chat, and a page at /.

A request passes through these files, in this order:

    server.py      listens; on SIGTERM, finishes running requests, then exits
    protocol.py    HTTP/1.1 with limits on connections and headers
    guard.py       access control: host, origin, key; refuses new requests while the server shuts down
    app.py         routes: body -> request -> worker -> response
    requests.py    checks a body: every value has a type and bounds
    models.py      loads models on demand and unloads idle ones (catalog.py: which models there are)
    answers.py     turns a request into those of the engine, and its outputs into a response
    worker.py      drives a model's inference engine in a thread
    responses.py   completions in OpenAI's format

Everything that a client sends is untrusted and limited: connections, bytes, tokens, completions, queue, time. Errors have
OpenAI's format (errors.py) and never contain a traceback. Generating text belongs to `generation/`, printing to
`cli/serve.py`.
"""
