"""Three thousand malformed requests to a real service: no worker dies, no answer is a 500 error."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from ade_client.client import AdeClient

malformed_requests = pytest.importorskip("benchmarks.malformed").malformed_requests


def test_malformed_requests_are_a_function_of_the_seed():
    first, again = list(malformed_requests(1, 50)), list(malformed_requests(1, 50))
    assert first == again != list(malformed_requests(2, 50))
    assert len({request.kind for request in malformed_requests(1, 300)}) == 9


@pytest.mark.slow
def test_malformed_requests_do_no_harm(service, real_images):
    def workers():
        return {process.pid for process in service.workers()}

    before = workers()
    with AdeClient(service.url) as client:
        expected = client.score(real_images[:4])
        with httpx.Client(
            base_url=service.url, timeout=60, limits=httpx.Limits(max_connections=8)
        ) as http:

            def send(request):
                answer = http.post(
                    f"/predictions/{request.operation}",
                    content=request.body,
                    headers={"Content-Type": request.content_type},
                )
                return request.kind, answer.status_code, answer.content

            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(send, malformed_requests(0, 3_000)))
        assert client.score(real_images[:4]) == expected
    assert workers() == before
    blamed = Counter(
        (kind, status) for kind, status, _ in answers if status >= 500 and status != 503
    )
    assert not blamed
    refused = [(status, content) for _, status, content in answers if 400 <= status < 500]
    assert len(refused) > 1_500
    for status, content in refused:
        error = json.loads(content).get("error")
        assert error and error["code"] and error["message"] and status in (400, 413, 415, 422), (
            status,
            content[:200],
        )
