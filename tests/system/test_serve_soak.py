"""Many streams at once, some of them cancelled: none is lost, every whole answer is the one it would be alone, and memory stays."""

import asyncio
import json
import random
import time

import httpx
import psutil
import pytest
from serve_cases import endless, make_model, serving

STREAMS = 64
PROMPTS = [f"Line {i}: the quick" for i in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "small")


class Soak:
    """`STREAMS` clients that ask, read, and now and then go away, until the time is over."""

    def __init__(self, server, folder, seconds):
        self.server, self.until = server, time.monotonic() + seconds
        self.fields = endless(folder)
        self.whole, self.cancelled, self.wrong = 0, 0, []
        self.alone = {}
        self.resident = []

    def body(self, prompt, tokens):
        messages = [{"role": "user", "content": PROMPTS[prompt]}]
        return {"model": self.server.model, "messages": messages, "temperature": 0, "stream": True, **self.fields, "max_tokens": tokens}

    async def ask(self, client, prompt, tokens, leave_after=None):
        """The text of an answer; None where the client left."""
        text, events = "", 0
        async with client.stream("POST", "/v1/chat/completions", json=self.body(prompt, tokens)) as response:
            assert response.status_code == 200
            lines = response.aiter_lines()
            async for line in lines:
                if line == "data: [DONE]":
                    return text
                if line:
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                    events += 1
                if events == leave_after:
                    return None
        raise AssertionError("a stream ended without its end mark")

    async def client(self, number):
        choose = random.Random(number)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=60) as client:
            while time.monotonic() < self.until:
                prompt, tokens = choose.randrange(len(PROMPTS)), choose.choice([8, 30, 90])
                leave = choose.randrange(1, 20) if choose.random() < 0.25 else None
                text = await self.ask(client, prompt, tokens, leave)
                if text is None:
                    self.cancelled += 1
                elif text == self.alone[prompt, tokens]:
                    self.whole += 1
                else:
                    self.wrong.append((prompt, tokens, text))

    async def watch(self):
        process = psutil.Process(self.server.process.pid)
        while time.monotonic() < self.until:
            self.resident.append(process.memory_info().rss)
            await asyncio.sleep(0.25)

    async def run(self, seconds):
        async with httpx.AsyncClient(base_url=self.server.url, timeout=60) as client:
            for prompt in range(len(PROMPTS)):
                for tokens in (8, 30, 90):
                    self.alone[prompt, tokens] = await self.ask(client, prompt, tokens)
        self.until = time.monotonic() + seconds
        await asyncio.gather(self.watch(), *(self.client(number) for number in range(STREAMS)))


@pytest.mark.parametrize("seconds", [8, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_soak(folder, seconds):
    with serving(folder, "--dtype", "float64", "--memory", "64") as server:
        soak = Soak(server, folder, seconds)
        asyncio.run(soak.run(seconds))
        end = time.monotonic() + 20
        while server.metric("weft_running") + server.metric("weft_queue") and time.monotonic() < end:
            time.sleep(0.05)
        assert soak.wrong == []
        assert soak.whole > 20
        assert soak.cancelled > 5
        assert server.metric("weft_running") + server.metric("weft_queue") == 0  # nothing is left behind by those who went away
        assert server.metric("weft_failed_total") == 0
        # The first third warms up: pools of state grow to what 64 streams need, and the cache to its budget.
        warm, rest = soak.resident[: len(soak.resident) // 3], soak.resident[len(soak.resident) // 3 :]
        assert max(rest) <= 1.05 * max(warm), [size >> 20 for size in soak.resident]
        print(f"{soak.whole} whole, {soak.cancelled} cancelled, resident {max(warm) >> 20} -> {rest[-1] >> 20} MiB")
