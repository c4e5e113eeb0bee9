"""The web page. It holds no weights and asks the HTTP API, as any client would; a file a tab."""
