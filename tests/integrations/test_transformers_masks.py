"""The transformers adapter below the models: packed sequences, prefixes, refusals, and waiting for the device."""

from __future__ import annotations

from typing import Any

import broadhead
import pytest
import torch
from transformers_models import (
    COMMON,
    Waits,
    assert_same,
    assert_same_gradients,
    assert_same_tokens,
    cuts_blocks_by_sequence,
    ids,
    integration,
    make,
    output_of,
    padding,
    transformers,
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    integration.register()


def test_cross_attention_with_padded_keys() -> None:
    """As many queries as keys, of which the last are padding: the queries are not."""
    layer = torch.nn.Module()
    layer.is_causal = False
    q, k, v = (torch.randn(2, 4, 9, 16) for _ in range(3))
    mask = padding(2, 9, "right").bool()
    out, _ = integration.attention_forward(layer, q, k, v, mask, sliding_window=None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-5)


def test_chunked_attention() -> None:
    layer = torch.nn.Module()
    layer.config = transformers.LlamaConfig(**COMMON)
    layer.config.layer_types = ["chunked_attention"]
    layer.config.attention_chunk_size = 4
    layer.layer_idx, layer.is_causal = 0, True
    q, k, v = (torch.randn(1, 2, 11, 16) for _ in range(3))
    out, _ = integration.attention_forward(layer, q, k, v, None)
    place = torch.arange(11)
    mask = (place[:, None] >= place) & (place[:, None] // 4 == place // 4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-5)


def test_mixed_dtypes_take_the_lowest() -> None:
    """Norms kept in fp32 upcast q and k, not v."""
    layer = torch.nn.Module()
    q, k = (torch.randn(1, 2, 5, 16) for _ in range(2))
    v = torch.randn(1, 2, 5, 16, dtype=torch.bfloat16)
    out, _ = integration.attention_forward(layer, q, k, v, None)
    assert out.dtype == torch.bfloat16


#: Positions of three sequences of 7, 9 and 3 tokens in one row.
RESTARTING = torch.cat([torch.arange(7), torch.arange(9), torch.arange(3)])
RANKS = {1: RESTARTING, 2: RESTARTING[None], 3: RESTARTING.expand(4, 1, -1)}


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_by_position_ids(name: str) -> None:
    assert_same(make(name), input_ids=ids(1, 19), position_ids=RANKS[2], use_cache=False)


def test_packed_by_position_ids_of_every_axis() -> None:
    """Qwen3.5 takes a row of positions for the text and one for each rotary axis."""
    assert_same(make("qwen3_5"), input_ids=ids(1, 19), position_ids=RANKS[3], use_cache=False)


def test_gradients_of_packed_sequences() -> None:
    tokens = ids(1, 19)
    assert_same_gradients("llama", input_ids=tokens, position_ids=RANKS[2], labels=tokens, use_cache=False)


def test_packed_rows_of_a_batch_keep_their_last_queries() -> None:
    """A model that cuts its hidden states to the last tokens cuts the third dimension of the mask alike."""
    starts = torch.zeros(2, 8, dtype=torch.bool)
    starts[:, 0] = starts[0, 5] = starts[1, 3] = True
    owner = starts.cumsum(1)

    def packed_causal(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (owner[b, q] == owner[b, k])

    mask = integration.attention_mask(2, 8, 8, mask_function=packed_causal)
    assert mask is not None
    place = torch.arange(8)
    visible = packed_causal(torch.arange(2)[:, None, None], place[:1], place[:, None], place)
    q, k, v = (torch.randn(2, 2, 8, 16) for _ in range(3))
    for last in (8, 5, 1):
        out, _ = integration.attention_forward(torch.nn.Module(), q[:, :, -last:], k, v, mask[:, :, slice(-last, None)])
        expected = sdpa(q[:, :, -last:], k, v, visible[:, None, -last:])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_positions_separate_sequences_where_no_mask_does(rank: int) -> None:
    """A model that makes a cache gets no packed mask from transformers; its layers still pass the positions on."""
    layer = torch.nn.Module()
    layer.layer_idx = 0
    q, k, v = (torch.randn(1, 2, 19, 16) for _ in range(3))
    out, _ = integration.attention_forward(layer, q, k, v, None, position_ids=RANKS[rank].clone())
    owner = (RESTARTING == 0).cumsum(0)
    mask = (owner[:, None] == owner) & torch.ones(19, 19, dtype=torch.bool).tril()
    torch.testing.assert_close(out, sdpa(q, k, v, mask), rtol=0, atol=1e-5)


def test_positions_of_images_are_one_sequence() -> None:
    """An image repeats its position in time and steps back in the others: it starts no sequence."""
    time = torch.tensor([0, 1, 2, 2, 2, 2, 4, 5])
    height = torch.tensor([0, 1, 2, 2, 3, 3, 4, 5])
    width = torch.tensor([0, 1, 2, 3, 2, 3, 4, 5])
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    positions = torch.stack([time, height, width])[:, None]
    out, _ = integration.attention_forward(torch.nn.Module(), q, k, v, None, position_ids=positions)
    torch.testing.assert_close(out, sdpa(q, k, v, torch.ones(8, 8, dtype=torch.bool).tril()), rtol=0, atol=1e-5)


def test_changed_positions_are_read_again() -> None:
    layer = torch.nn.Module()
    layer.layer_idx = 0
    q, k, v = (torch.randn(1, 2, 6, 16) for _ in range(3))
    positions = torch.arange(6)[None].clone()
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    out, _ = integration.attention_forward(layer, q, k, v, None, position_ids=positions)
    torch.testing.assert_close(out, sdpa(q, k, v, causal), rtol=0, atol=1e-5)
    positions.copy_(torch.tensor([0, 1, 2, 0, 1, 2]))
    out, _ = integration.attention_forward(layer, q, k, v, None, position_ids=positions)
    causal[3:, :3] = False
    torch.testing.assert_close(out, sdpa(q, k, v, causal), rtol=0, atol=1e-5)


def prefix_types(mask: torch.Tensor, length: int) -> torch.Tensor:
    """token_type_ids with ones on the first ``length`` tokens of each row, 2 fewer in each row after the first."""
    rank = mask.cumsum(1) - 1
    lengths = length - 2 * torch.arange(mask.shape[0])[:, None]
    return ((rank < lengths) & (mask == 1)).long()


@pytest.mark.parametrize("side", ["left", "right", None])
def test_prefix(side: str | None) -> None:
    mask = torch.ones(2, 13, dtype=torch.long) if side is None else padding(2, 13, side)
    types = prefix_types(mask, 7)
    model = make("hrm_text")
    inputs = {"input_ids": ids(2, 13), "attention_mask": mask, "use_cache": False}
    assert_same(model, mask.bool(), token_type_ids=types, **inputs)
    with torch.no_grad():  # The prefix is seen: without it the logits are others.
        with_prefix = output_of(model, "broadhead", token_type_ids=types, **inputs)
        assert (with_prefix - output_of(model, "broadhead", **inputs)).abs().max() > 1e-2 * with_prefix.abs().max()


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_after_a_prefix(cache: str | None) -> None:
    mask = padding(2, 9, "left")
    options = {"cache_implementation": cache, "disable_compile": True}
    assert_same_tokens(
        make("hrm_text"), ids(2, 9), attention_mask=mask, token_type_ids=prefix_types(mask, 5), **options
    )


@cuts_blocks_by_sequence
def test_prefix_of_packed_sequences() -> None:
    """Every sequence of a packed row has its own prefix, or none."""
    types = torch.zeros(1, 19, dtype=torch.long)
    types[0, :4] = types[0, 7:12] = 1
    tokens = ids(1, 19)
    inputs = {"input_ids": tokens, "position_ids": RANKS[2], "token_type_ids": types, "use_cache": False}
    assert_same(make("hrm_text"), **inputs)
    assert_same_gradients("hrm_text", labels=tokens, **inputs)


@cuts_blocks_by_sequence
def test_prefix_of_packed_sequences_whose_offsets_are_given() -> None:
    """Offsets alone tell no prefix: the mask does, or the call is refused."""
    types = torch.zeros(1, 19, dtype=torch.long)
    types[0, :4] = types[0, 7:12] = 1
    offsets = torch.tensor([0, 7, 16, 19], dtype=torch.int32)
    given = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 9, "max_length_k": 9}
    inputs = {"input_ids": ids(1, 19), "token_type_ids": types, "use_cache": False}
    model = make("hrm_text")
    with torch.no_grad():
        expected = output_of(model, "eager", position_ids=RANKS[2], **inputs)
        got = output_of(model, "broadhead", position_ids=RANKS[2], **given, **inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4 * expected.abs().max().item())
    types[0, 4:] = 0
    with pytest.raises(broadhead.UnsupportedError, match="cu_seq_lens_q and a prefix"):
        output_of(model, "broadhead", **given, **inputs)


def test_blocks_that_reach_into_other_sequences_are_refused() -> None:
    """Blocks joined to a mask of packed sequences, and not cut by it, see the blocks of other sequences."""
    masks = transformers.masking_utils
    owner, block = torch.tensor([[0, 0, 0, 1, 1, 1]]), torch.tensor([[0, 0, -1, 0, 0, -1]])
    separate, blocks = masks.packed_sequence_mask_function(owner), masks.blockwise_overlay(block)
    joined_last = masks.or_masks(masks.and_masks(masks.causal_mask_function, separate), blocks)
    joined_first = masks.and_masks(masks.or_masks(masks.causal_mask_function, blocks), separate)
    with pytest.raises(broadhead.UnsupportedError, match="blocks of tokens that see each other"):
        integration.attention_mask(1, 6, 6, mask_function=joined_last)
    assert integration.attention_mask(1, 6, 6, mask_function=joined_first) is not None


def test_block_between_text() -> None:
    types = torch.zeros(1, 9, dtype=torch.long)
    types[0, 3:6] = 1
    assert_same(make("hrm_text"), input_ids=ids(1, 9), token_type_ids=types, use_cache=False)


@pytest.mark.parametrize("block", [[0, 1, 5, 6], [0, 1, 6]])
def test_blocks_in_pieces_are_refused(block: list[int]) -> None:
    """Text lies between the tokens of one block: two runs of them, or a single token that a prefix sees ahead."""
    types = torch.zeros(1, 9, dtype=torch.long)
    types[0, block] = 1
    with pytest.raises(broadhead.UnsupportedError, match="blocks of tokens that see each other"):
        output_of(make("hrm_text"), "broadhead", input_ids=ids(1, 9), token_type_ids=types, use_cache=False)


def mask_with_hole() -> torch.Tensor:
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, 5:9] = 0
    return mask


WAIT_CASES: dict[str, dict[str, Any]] = {
    "unpadded": {},
    "positions": {"position_ids": torch.arange(19)[None]},
    "left": {"attention_mask": padding(2, 19, "left")},
    "right": {"attention_mask": padding(2, 19, "right")},
    "between tokens": {"attention_mask": mask_with_hole()},
    "packed": {"position_ids": RANKS[2]},
    "offsets": {"cu_seq_lens_q": torch.tensor([0, 7, 38]), "cu_seq_lens_k": torch.tensor([0, 7, 38])},
}


@pytest.mark.parametrize("case", WAIT_CASES)
def test_no_layer_waits_for_the_device(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention function reads nothing back. On a CPU attention itself does, to check lengths: it is left out."""
    waits, calls = Waits(), []

    def attention(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return torch.zeros_like(q)

    def counted(*args: Any, **kwargs: Any) -> Any:
        with waits:
            return integration.attention_forward(*args, **kwargs)

    monkeypatch.setattr(broadhead, "mha_fwd", lambda *args, **kwargs: (attention(*args), None))
    for function in ("flash_attn_func", "flash_attn_varlen_func"):
        monkeypatch.setattr(broadhead, function, attention)
    transformers.AttentionInterface.register("broadhead_counted", counted)
    transformers.AttentionMaskInterface.register("broadhead_counted", integration.attention_mask)
    model = make("llama")
    with torch.no_grad():
        output_of(model, "broadhead_counted", input_ids=ids(2, 19), use_cache=False, **WAIT_CASES[case])
    assert len(calls) == model.config.num_hidden_layers
    # Positions that may hold packed sequences are read once a pass, in its first layer.
    assert len(waits.seen) == (1 if case in ("unpadded", "positions") else 0), waits.seen


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "four_dimensional_mask": ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, "attention_mask"),
    "output_attentions": ({"output_attentions": True}, "output_attentions"),
    "dropout": ({"dropout": 0.1}, "dropout"),
    "joined_masks": ({"attention_mask": torch.zeros(1, 1, 1, 10, dtype=torch.int32)}, "attention_mask"),
    "position_bias": ({"position_bias": torch.zeros(1, 2, 6, 6)}, "position_bias"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_by_name(case: str) -> None:
    options, name = REFUSALS[case]
    q, k, v = (torch.randn(1, 2, 6, 16) for _ in range(3))
    with pytest.raises(broadhead.UnsupportedError, match=name):
        integration.attention_forward(torch.nn.Module(), q, k, v, **{"attention_mask": None, **options})


def test_custom_mask_function_refused() -> None:
    from transformers.masking_utils import create_causal_mask

    model = make("llama")
    model.set_attn_implementation("broadhead")
    with pytest.raises(broadhead.UnsupportedError, match="attention mask"):
        create_causal_mask(
            model.config, torch.zeros(1, 6, 64), None, None, and_mask_function=lambda b, h, q, k: q - k != 2
        )


def test_block_table_writes_and_reads_pages() -> None:
    """Continuous batching decodes over pages: the new key of each sequence is written, then all keys are seen."""
    page_size, lengths = 4, [5, 9, 0]
    k_cache, v_cache = torch.randn(8, page_size, 2, 16), torch.randn(8, page_size, 2, 16)
    table = torch.tensor([[2, 5, 0], [1, 7, 3], [6, 0, 0]], dtype=torch.int32)
    keys, values = k_cache[table.long()].flatten(1, 2), v_cache[table.long()].flatten(1, 2)
    q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    offsets = torch.tensor([0, *lengths]).cumsum(0) + torch.arange(4)
    out, _ = integration.attention_forward(
        torch.nn.Module(),
        q,
        k,
        v,
        None,
        block_table=table,
        k_cache=k_cache,
        v_cache=v_cache,
        cu_seq_lens_q=torch.arange(4),
        cu_seq_lens_k=offsets,
        max_length_q=1,
        max_length_k=10,
    )
    for b, length in enumerate(lengths):
        page, slot = int(table[b, length // page_size]), length % page_size
        assert torch.equal(k_cache[page, slot], k[0, :, b]) and torch.equal(v_cache[page, slot], v[0, :, b])
        all_k = torch.cat([keys[b, :length], k[:, :, b]]).transpose(0, 1)[None]
        all_v = torch.cat([values[b, :length], v[:, :, b]]).transpose(0, 1)[None]
        expected = torch.nn.functional.scaled_dot_product_attention(q[:, :, b : b + 1], all_k, all_v, enable_gqa=True)
        torch.testing.assert_close(out[:, b], expected[:, :, 0], rtol=0, atol=1e-5)
