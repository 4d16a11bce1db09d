"""What the local servers that stand in for a hub have in common."""

import http.server


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET and HEAD alike; a subclass defines `do_GET`, which calls `answer`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Log nothing."""

    def answer(self, body, status=200, **headers):
        """Send `body` (bytes); underscores in the names of headers stand for hyphens."""
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()
