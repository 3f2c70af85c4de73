"""Logits of a few tokens at a time give what all of them at once give."""

import math

import pytest
import torch

from flashgrpo.processes.tokens import chunks
from flashgrpo.processes.tokens.chunks import by_chunks
from flashgrpo.processes.tokens.uniform.scores import log_probs, scores


def test_scores_are_means_over_tokens_and_divergences_are_exact():
    logits, action = torch.tensor([[[2.0, 0, -1], [0, 1, 0]]]), torch.tensor([[0, 1]])
    own = log_probs(3, logits, lambda hidden: hidden)
    assert scores(3, action, (), logits, lambda hidden: hidden).tolist() == [[pytest.approx(-0.36064537, abs=1e-7)]]
    uniform = torch.full_like(own, 1 / 3).log()
    score, from_itself, from_uniform = scores(3, action, (own, uniform), logits, lambda hidden: hidden)[0].tolist()
    assert score == pytest.approx(-0.36064537, abs=1e-7)
    assert from_itself == 0
    assert from_uniform == pytest.approx(math.log(3) - float(-(own.exp() * own).sum(-1).mean()), abs=1e-6)


def test_divergences_are_never_negative():
    rows = 3 * torch.randn(2, 50, 40, generator=torch.Generator().manual_seed(0))
    other = rows.flip(0).log_softmax(dim=-1)
    found = scores(40, torch.zeros(2, 50, dtype=torch.int64), (other,), rows, lambda hidden: hidden)
    assert bool((found[:, 1] > 0).all())


def test_chunks_hold_so_many_logits():
    parts = list(chunks.chunks(4, 1024, 64_000))
    assert (len(parts), parts[0], parts[-1]) == (16, slice(0, 65), slice(975, 1024))
    assert list(chunks.chunks(10**6, 3, 10**6)) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert list(chunks.chunks(2, 16, 8)) == [slice(0, 16)]


def test_by_chunks_is_what_one_call_is_and_keeps_no_logits(monkeypatch):
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    hidden, tokens = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)), torch.randint(0, 8, (2, 6))
    calls = []

    def head(states):
        calls.append(states.shape[1])
        return states @ weight.T

    def read():
        make = lambda few, logits: logits.log_softmax(-1).gather(-1, tokens[:, few, None])  # noqa: E731
        return by_chunks(hidden, head, 8, make)

    whole = read()
    whole.square().sum().backward()
    expected, weight.grad = weight.grad, None
    assert calls == [6]
    monkeypatch.setattr(chunks, "AT_ONCE", 2 * 8 * 4)
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(read(), whole)
    assert calls == [4, 2]
    calls.clear()
    parts = read()
    torch.testing.assert_close(parts, whole)
    parts.square().sum().backward()
    torch.testing.assert_close(weight.grad, expected)
    assert sorted(calls) == [2, 2, 4, 4]  # once more in the backward pass
