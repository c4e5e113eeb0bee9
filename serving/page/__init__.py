"""The web page, one module per tab. It holds no weights and uses the HTTP API like any client."""
