"""A decoder that gives invalid answers: ``python -m tests.babbling_decoder``."""

import json
import socket
import sys
import time

from ade_base.pictures.decoder_process import ANSWER, READY, REQUEST, receive

if __name__ == "__main__":
    connection = socket.socket(fileno=sys.stdin.fileno())
    connection.sendall(READY)
    (length,) = REQUEST.unpack(receive(connection, REQUEST.size))
    last = receive(connection, length)[-1]
    answers = [
        bytes(range(64)),  # nonsense
        ANSWER.pack(True, 2, 60_000, 60_000) + b"[]",  # too many pixels
        ANSWER.pack(True, 2**31, 4, 4),  # too much text
        ANSWER.pack(True, 4, 4, 4) + b"{}[]" + bytes(48),  # no JSON
        ANSWER.pack(False, 4, 0, 0) + json.dumps("no").encode(),  # not an error
        ANSWER.pack(True, 2, 4, 4) + b"[]" + bytes(48),  # no size
        ANSWER.pack(True, 10, 4, 4) + b"[[],[5,4]]" + bytes(48),  # another size
        ANSWER.pack(True, 10, 4, 4) + b"[[],[4,4]]" + bytes(20),  # too few pixels
        b"",
    ]
    if last >= len(
        answers
    ):  # no silence is longer than half a second, or a moment; there is no end
        connection.sendall(ANSWER.pack(True, 2**16, 4, 4))
        while True:
            connection.sendall(b" ")
            time.sleep(0.5 if last == len(answers) else 0.0002)
    connection.sendall(answers[last % len(answers)])
