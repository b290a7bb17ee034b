"""Learned sink logits beside gpt-oss's own attention."""

from types import SimpleNamespace

import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from weft.nn.attend import attend_grouped


def test_sink_logits_are_those_of_gpt_oss() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 9, 6, 8, generator=generator)
    k, v = (torch.randn(2, 9, 3, 8, generator=generator) for _ in range(2))
    sink = torch.randn(6, generator=generator)
    index = torch.arange(9)
    mask = (index <= index[:, None]) & (index[:, None] - index < 4)
    added = torch.zeros(9, 9).masked_fill(~mask, torch.finfo(torch.float32).min)[None, None]
    theirs = SimpleNamespace(sinks=sink, num_key_value_groups=2, training=False)
    want, _ = eager_attention_forward(theirs, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), added, scaling=0.3)
    got = attend_grouped(q, k, v, mask.expand(2, -1, -1), 0.3, sink=sink)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (attend_grouped(q, k, v, mask.expand(2, -1, -1), 0.3) - want).abs().max() > 0.01, "control: without it weights sum to 1"
